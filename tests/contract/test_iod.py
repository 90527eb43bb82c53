"""Files that lack what their IOD requires: warned about or refused, whichever way they come."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from app.intake.iod import Validator
from tests.contract.test_imports import begin, until
from tests.contract.test_imports import send as send_to_import
from tests.contract.test_stow import body_of, failed_of, send, sentences_of, stored_of
from tests.fake_orthanc import URL, FakeOrthanc
from tests.images import ct_image
from tests.iod import stand_in, whole_ct
from tests.lightbox import Lightbox, World, make_settings, running
from tests.tables import contents, outcomes

Start = Callable[..., AbstractAsyncContextManager[Lightbox]]

LACKS = "The file lacks what its IOD requires (PS3.3): KVP (type 2, missing)."
UNKNOWN = "Whether the file has what its IOD requires could not be checked: "
CRASH = "kill -ABRT $$"


@pytest.fixture
def world(filled: tuple[Path, FakeOrthanc, World]) -> World:
    """Its names alone: on SQLite one app runs at a time."""
    return deepcopy(filled[2])


@pytest.fixture
def start(sqlite_url: str, world: World, fake_orthanc: FakeOrthanc, tmp_path: Path) -> Start:
    """Starts a Lightbox on the world that validates, by dciodvfy or a script in its place."""

    @asynccontextmanager
    async def start(mode: str, script: str = "") -> AsyncIterator[Lightbox]:
        program = stand_in(tmp_path, script) if script else ""
        settings = make_settings(
            sqlite_url, URL, spool_dir=tmp_path, iod_validation=mode, dciodvfy=program
        )
        async with running(settings) as each:
            yield each

    return start


def mine(**values: Any) -> bytes:
    return whole_ct(patient_id="MRN-MINE", **values)


async def test_by_default_nobody_is_asked(
    lightbox: Lightbox, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def asked(*_: Any) -> None:
        raise AssertionError("dciodvfy was asked")

    monkeypatch.setattr(Validator, "_ask", asked)
    assert (await lightbox.upload(mine(KVP=None))).json()["warnings"] == []


async def test_warned_it_is_stored_and_the_answer_says_so(start: Start, world: World) -> None:
    async with start("warn") as lightbox:
        answer = await lightbox.upload(mine(KVP=None), order_id=world.my_order["id"])
        assert answer.status_code == 200
        assert (answer.json()["status"], answer.json()["warnings"]) == ("uploaded", [LACKS])
        answer = await lightbox.upload(mine(), order_id=world.my_order["id"])
        assert answer.json()["warnings"] == []


async def test_refused_nothing_is_stored(
    start: Start, world: World, fake_orthanc: FakeOrthanc
) -> None:
    async with start("refuse") as lightbox:
        before, asked = contents(lightbox), list(fake_orthanc.requests)
        answer = await lightbox.upload(mine(KVP=None, PixelSpacing=""))
        assert answer.status_code == 422
        said = answer.json()
        assert said["type"] == "urn:lightbox:problem:nonconforming"
        assert said["detail"] == (
            "The file lacks what its IOD requires (PS3.3): PixelSpacing (type 1, empty), KVP "
            "(type 2, missing). Nothing was stored."
        )
        assert said["errors"] == [
            {"keyword": "PixelSpacing", "problem": "type 1, empty"},
            {"keyword": "KVP", "problem": "type 2, missing"},
        ]
        assert (contents(lightbox), fake_orthanc.requests) == (before, asked)
        assert outcomes(lightbox, said["request_id"]) == [
            ("study:upload", "granted"),
            ("study:upload", "failed"),
        ]
        good = await lightbox.upload(mine())
        assert (good.status_code, good.json()["warnings"]) == (200, [])


async def test_of_many_only_the_lacking_is_refused(start: Start, world: World) -> None:
    files = [("files", (f"{n}.dcm", each)) for n, each in enumerate([mine(KVP=None), mine()])]
    async with start("refuse") as lightbox:
        answer = await lightbox.must("technologist", "POST", "/dicom/upload-multiple", files=files)
    assert [each["status"] for each in answer["results"]] == ["failed", "uploaded"]
    first = answer["results"][0]
    assert first["error_type"] == "urn:lightbox:problem:nonconforming"
    assert (first["error_status"], first["error"]) == (422, f"{LACKS} Nothing was stored.")


async def test_what_is_coerced_counts_as_it_will_be(start: Start, world: World) -> None:
    image = whole_ct(patient_id="SOMEBODY", PatientBirthDate=None, PatientSex=None)
    async with start("refuse") as lightbox:
        sent = {"order_id": world.my_order["id"], "coerce_patient": "true"}
        answer = await lightbox.upload(image, **sent)
        assert answer.status_code == 200, answer.text
        assert not any("IOD" in each for each in answer.json()["warnings"])


async def test_who_may_not_store_it_does_not_have_it_looked_at(
    start: Start, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor do files that are refused for another reason."""

    async def asked(*_: Any) -> None:
        raise AssertionError("dciodvfy was asked")

    monkeypatch.setattr(Validator, "check", asked)
    async with start("refuse") as lightbox:
        answer = await lightbox.upload(mine(), role="clinician")
        assert answer.status_code == 403
        answer = await lightbox.upload(whole_ct(patient_id="MRN-NOBODY"))
        assert answer.status_code == 404
        answer = await lightbox.upload(
            whole_ct(patient_id="MRN-VICTIM"), order_id=world.my_order["id"]
        )
        assert answer.status_code == 409
        answer = await lightbox.upload(mine()[:-100])
        assert answer.status_code == 422
        assert answer.json()["type"].endswith("malformed-dicom")


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (CRASH, "dciodvfy ended with status -6."),
        ("yes >&2", "dciodvfy said more than 8 MiB about it."),
    ],
)
async def test_a_validator_that_breaks(
    start: Start, world: World, fake_orthanc: FakeOrthanc, script: str, reason: str
) -> None:
    async with start("warn", script) as lightbox:
        answer = await lightbox.upload(mine(KVP=None))
        assert (answer.status_code, answer.json()["warnings"]) == (200, [UNKNOWN + reason])
    async with start("refuse", script) as lightbox:
        before = list(fake_orthanc.requests)
        answer = await lightbox.upload(mine())
        assert answer.status_code == 422
        assert answer.json()["type"] == "urn:lightbox:problem:not-validated"
        assert answer.json()["detail"] == f"{UNKNOWN}{reason} Nothing was stored."
        assert fake_orthanc.requests == before


async def test_stow_warns_in_the_words_of_its_answer(start: Start, world: World) -> None:
    async with start("warn") as lightbox:
        answer = await send(lightbox, body_of(mine(KVP=None), mine()))
    assert answer.status_code == 202
    warned, whole = answer.json()["00081199"]["Value"]
    assert warned["00081196"]["Value"] == [0xB001]
    assert "00081196" not in whole
    assert sentences_of(answer) == [f"Part 1: {LACKS}"]


async def test_stow_refuses_part_by_part(start: Start, world: World) -> None:
    lacking, whole = uuid4().int, uuid4().int
    sent = [mine(KVP=None, sop_uid=f"2.25.{lacking}"), mine(sop_uid=f"2.25.{whole}")]
    async with start("refuse") as lightbox:
        answer = await send(lightbox, body_of(*sent))
        assert answer.status_code == 202
        assert stored_of(answer) == [f"2.25.{whole}"]
        assert failed_of(answer) == [(f"2.25.{lacking}", 0xA900)]
        assert sentences_of(answer) == [f"Part 1: {LACKS} Nothing was stored."]
        answer = await send(lightbox, body_of(sent[0]))
        assert answer.status_code == 409, "it could be read"
    async with start("refuse", CRASH) as lightbox:
        answer = await send(lightbox, body_of(sent[0]))
        assert answer.status_code == 409
        assert failed_of(answer) == [(f"2.25.{lacking}", 0x0110)]


async def test_imports_too(start: Start, world: World) -> None:
    async with start("warn") as lightbox:
        import_id = await begin(lightbox, 1)
        await send_to_import(lightbox, import_id, mine(KVP=None))
        (file,) = (await until(lightbox, import_id))["files"]
        assert (file["state"], file["warnings"]) == ("linked", [LACKS])
    for script, kind, words in (
        ("", "nonconforming", LACKS),
        (CRASH, "not-validated", UNKNOWN),
    ):
        async with start("refuse", script) as lightbox:
            import_id = await begin(lightbox, 1)
            await send_to_import(lightbox, import_id, mine(KVP=None))
            done = await until(lightbox, import_id)
            (file,) = done["files"]
            assert (file["state"], file["error_type"]) == ("refused", kind)
            assert file["error_status"] == 422
            assert file["error"].startswith(words)


async def test_neither_answer_nor_log_quotes_the_file(
    start: Start, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """dciodvfy quotes names, dates and texts that it finds fault with."""
    content = ct_image(
        patient_id="MRN-MINE", PatientName="Quoted^Name\x01", StudyDescription="quoted\x02text"
    )
    async with start("refuse") as lightbox:
        answer = await lightbox.upload(content)
        assert answer.json()["type"].endswith("nonconforming")
    async with start("warn", f"cat >&2; {CRASH}") as lightbox:
        said = (await lightbox.upload(content)).json()["warnings"]
        assert any(each.startswith(UNKNOWN) for each in said)
    for word in ("uoted", "MRN-MINE"):
        assert word not in answer.text
        assert not any(word in each for each in said)
        assert word not in caplog.text
