"""STOW-RS: the checks of an upload for every part, and an answer that tells all of it."""

import io
from collections.abc import AsyncIterator, Iterable
from typing import Any
from uuid import uuid4

import httpx
import pydicom
import pytest

from app.routes import stow, uploads
from tests.fake_orthanc import URL, FakeOrthanc
from tests.images import ct_image
from tests.lightbox import Lightbox, Shared, World, make_settings, running
from tests.tables import REFUSE_RECORDS, change, contents, outcomes, records, rows

STUDIES = "/dicom-web/studies"
PART = b"--x\r\nContent-Type: application/dicom\r\n\r\n"
RELATED = 'multipart/related; type="application/dicom"; boundary=x'


def body_of(*files: bytes) -> bytes:
    return b"".join(PART + each + b"\r\n" for each in files) + b"--x--\r\n"


async def send(
    lightbox: Lightbox,
    content: Any,
    *,
    role: str | None = "technologist",
    study: str = "",
    kind: str | None = RELATED,
    **headers: str,
) -> httpx.Response:
    if kind is not None:
        headers["Content-Type"] = kind
    path = f"{STUDIES}/{study}" if study else STUDIES
    return await lightbox.ask(role, "POST", path, content=content, headers=headers)


def mine(**values: Any) -> bytes:
    return ct_image(patient_id="MRN-MINE", **values)


def image_of(content: bytes) -> pydicom.Dataset:
    return pydicom.dcmread(io.BytesIO(content))


def sop_uids(items: Iterable[bytes]) -> list[str]:
    return [str(image_of(each).SOPInstanceUID) for each in items]


def values_of(item: Any, tag: str) -> list[Any]:
    return list(item.get(tag, {}).get("Value", []))


def stored_of(answer: httpx.Response) -> list[str]:
    """The SOPInstanceUIDs that an answer says are stored."""
    items = values_of(answer.json(), "00081199")
    return [values_of(each, "00081155")[0] for each in items]


def failed_of(answer: httpx.Response) -> list[tuple[str, int]]:
    """SOPInstanceUID ("" where unknown) and FailureReason of each failure."""
    said = answer.json()
    return [
        (*(values_of(each, "00081155") or [""]), values_of(each, "00081197")[0])
        for tag in ("00081198", "0008119A")
        for each in values_of(said, tag)
    ]


def sentences_of(answer: httpx.Response) -> list[str]:
    said = answer.json()
    return [
        sentence
        for tag in ("00081198", "0008119A", "00081199")
        for each in values_of(said, tag)
        for sentence in values_of(each, "00091001")
    ]


# ------------------------------------------------------------------------------- what is stored


async def test_each_part_is_stored_for_the_patient_of_its_id(
    lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    theirs = ct_image(patient_id="MRN-VICTIM", PatientName="Victim^Vera")
    sent = [mine(), theirs]
    before = len(fake_orthanc.bodies)
    answer = await send(lightbox, body_of(*sent))
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/dicom+json"
    assert stored_of(answer) == sop_uids(sent)
    assert set(answer.json()) == {"00081199"}, "two studies have no one address"
    assert list(fake_orthanc.bodies.values())[before:] == sent, "to the byte"
    for content, owner in zip(sent, (world.mine, world.theirs), strict=True):
        uid = str(image_of(content).StudyInstanceUID)
        (row,) = rows(lightbox, "SELECT * FROM study WHERE study_instance_uid = ?", uid)
        assert row["patient_id"] in (owner["id"], owner["id"].replace("-", ""))
        linked = rows(lightbox, "SELECT * FROM order_study WHERE study_instance_uid = ?", uid)
        assert linked == [], "to no order"


async def test_the_answer_is_a_store_instances_response(lightbox: Lightbox, world: World) -> None:
    content = mine()
    image = image_of(content)
    answer = await send(lightbox, body_of(content), study=str(image.StudyInstanceUID))
    said = pydicom.Dataset.from_json(answer.json())
    study = f"{lightbox.settings.api_base_url}/dicom-web/studies/{image.StudyInstanceUID}"
    assert said.RetrieveURL == study
    (item,) = said.ReferencedSOPSequence
    assert item.ReferencedSOPClassUID == image.SOPClassUID
    assert item.ReferencedSOPInstanceUID == image.SOPInstanceUID
    instance = f"series/{image.SeriesInstanceUID}/instances/{image.SOPInstanceUID}"
    assert item.RetrieveURL == f"{study}/{instance}"
    assert len(item) == 3, "no warning"
    assert len(said) == 2, "no failure"


async def test_a_duplicate_is_a_success(
    lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    content = fake_orthanc.bodies[world.my_image["orthanc_instance_id"]]
    before = len(rows(lightbox, "SELECT * FROM instance"))
    answer = await send(lightbox, body_of(content, content))
    assert (answer.status_code, len(stored_of(answer))) == (200, 2)
    assert len(rows(lightbox, "SELECT * FROM instance")) == before


async def test_what_a_person_should_look_at_is_a_warning(lightbox: Lightbox, world: World) -> None:
    answer = await send(lightbox, body_of(mine(), mine(PatientSex="O")))
    assert (answer.status_code, len(stored_of(answer)), failed_of(answer)) == (202, 2, [])
    plain, warned = values_of(answer.json(), "00081199")
    assert "00081196" not in plain
    assert values_of(warned, "00081196") == [stow.DIFFERS]
    assert sentences_of(answer) == ["Part 2: The file's PatientSex differs from the patient's."]


@pytest.mark.parametrize(
    ("kind", "head"),
    [
        ("multipart/related; type=application/dicom; boundary=x", PART),
        ('Multipart/Related; BOUNDARY="x"; Type="Application/DICOM"', PART),
        ('multipart/related;boundary=x;start="<1>";type="application/dicom"', PART),
        ("multipart/related; type=application/dicom; boundary=x", b"--x\r\n\r\n"),
        (RELATED, b"--x\r\nContent-Type: application/dicom; transfer-syntax=1.2.3\r\n\r\n"),
        (RELATED, b"--x\r\nContent-Location: /a\r\nCONTENT-TYPE:APPLICATION/DICOM\r\n\r\n"),
        (RELATED, b"A preamble.\r\n--x\r\n\r\n"),
    ],
)
async def test_ways_to_write_a_body(
    kind: str, head: bytes, lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    content = mine()
    answer = await send(lightbox, head + content + b"\r\n--x--\r\nAn epilogue.", kind=kind)
    assert (answer.status_code, stored_of(answer)) == (200, sop_uids([content])), answer.text
    assert content in fake_orthanc.bodies.values()


async def test_a_body_that_is_one_file(
    lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    for kind in ("application/dicom", "Application/DICOM; transfer-syntax=1.2.840.10008.1.2.1"):
        content = mine()
        answer = await send(lightbox, content, kind=kind)
        assert (answer.status_code, stored_of(answer)) == (200, sop_uids([content]))
        assert content in fake_orthanc.bodies.values()
    answer = await send(lightbox, b"", kind="application/dicom")
    assert (answer.status_code, failed_of(answer)) == (400, [("", 0xC000)])


# ------------------------------------------------------------------------ what must not get in


async def test_a_stranger_between_good_parts_is_refused_alone(
    lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    good = [mine(), mine()]
    bad = [
        (ct_image(patient_id="MRN-NOBODY"), 0xC404),
        (ct_image(patient_id="mrn-mine"), 0xC404),
        (mine(IssuerOfPatientID="B"), 0xC404),
        (ct_image(patient_id=""), 0xC000),
        (mine(study_uid=world.their_study), 0xC409),
        (mine(study_uid=world.their_order["planned_study_instance_uid"]), 0xC409),
        (mine(series_uid=world.their_image["series_instance_uid"]), 0xC409),
        (mine(sop_uid=world.their_image["sop_instance_uid"]), 0xC409),
        (
            mine(
                study_uid=world.my_study,
                series_uid=world.my_image["series_instance_uid"],
                sop_uid=world.my_image["sop_instance_uid"],
                PixelData=b"\1" * 512,
            ),
            0xC409,
        ),
    ]
    before = dict(fake_orthanc.bodies)
    answer = await send(lightbox, body_of(good[0], *(each for each, _ in bad), good[1]))
    assert answer.status_code == 202
    assert stored_of(answer) == sop_uids(good)
    expected = [(str(image_of(each).SOPInstanceUID), reason) for each, reason in bad]
    assert failed_of(answer) == expected
    assert not [word for word in (*World.SECRET_WORDS, "NOBODY") if word in answer.text]
    new = [each for key, each in fake_orthanc.bodies.items() if key not in before]
    assert new == good
    assert len(rows(lightbox, "SELECT * FROM instance")) == len(before) + 2


async def test_parts_of_another_study_than_the_address_are_refused(
    lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    uid = world.my_study
    good, other = mine(study_uid=uid), mine()
    theirs = ct_image(patient_id="MRN-VICTIM", study_uid=world.their_study)
    before = len(fake_orthanc.bodies)
    answer = await send(lightbox, body_of(other, good, theirs), study=uid)
    assert (answer.status_code, stored_of(answer)) == (202, sop_uids([good]))
    assert failed_of(answer) == [(each, 0xC409) for each in sop_uids([other, theirs])]
    assert "StudyInstanceUID is another" in sentences_of(answer)[0]
    assert world.their_study not in answer.text
    assert len(fake_orthanc.bodies) == before + 1
    asked = list(fake_orthanc.requests)
    kept = contents(lightbox)
    answer = await send(lightbox, body_of(other, theirs), study=uid)
    assert (answer.status_code, stored_of(answer)) == (409, [])
    assert "00081190" not in answer.json(), "nothing of the study was stored"
    assert fake_orthanc.requests == asked
    assert contents(lightbox) == kept


@pytest.mark.parametrize("study", ["1.2.x", "1..2", "1" * 65, "%2e%2e", "*"])
async def test_an_address_that_names_no_study(study: str, untouched: Shared) -> None:
    answer = await send(untouched.lightbox, body_of(mine()), study=study)
    assert answer.status_code == 422, answer.text


async def test_parts_that_are_no_sound_files_hide_no_other(
    lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    good = [mine(), mine()]
    unknown_syntax = mine().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.9.9.9\0")
    undated = mine().replace(b"20250102", b"20259999")
    headers = b"--x\r\nContent-Type: "
    nested = headers + b"multipart/mixed; boundary=y\r\n\r\n--y\r\n\r\n" + mine() + b"\r\n--y--\r\n"
    body = (
        body_of(good[0], b"", b"text", good[0][:-1], unknown_syntax, undated)[:-7]
        + nested
        + headers
        + b"application/dicom+json\r\n\r\n[]\r\n"
        + headers
        + b"application/dicom\r\nContent-Transfer-Encoding: base64\r\n\r\nAAAA\r\n"
        + body_of(good[1])
    )
    answer = await send(lightbox, body)
    assert answer.status_code == 202
    assert stored_of(answer) == sop_uids(good)
    assert failed_of(answer) == [("", 0xC000)] * 8
    assert [each.partition(":")[0] for each in sentences_of(answer)] == [
        f"Part {number}" for number in range(2, 10)
    ]
    assert list(fake_orthanc.bodies.values())[2:] == good


async def test_a_boundary_in_the_pixels_cuts_the_part_and_stores_nothing_else(
    untouched: Shared,
) -> None:
    whole = mine(PixelData=b"\r\n--x\r\n" + bytes(505))
    ended = mine(PixelData=b"\r\n--x--" + bytes(505))
    planted = mine(PixelData=b"\r\n" + PART + b"\r\n--x--".ljust(511 - len(PART) - 1) + b"\0")
    for content, status in ((whole, 422), (ended, 400), (planted, 400)):
        answer = await send(untouched.lightbox, body_of(content))
        assert answer.status_code == status, answer.text


async def test_what_only_looks_like_a_boundary_is_kept(
    lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    content = mine(PixelData=b"\r\n--xx\r\n--x-\r\n--\r\n--x\r!".ljust(512, b"\0"))
    assert (await send(lightbox, body_of(content))).status_code == 200
    assert content in fake_orthanc.bodies.values()


@pytest.mark.parametrize("role", ["clinician", "admin", "auditor", None])
async def test_who_may_not_upload_stores_nothing(role: str | None, untouched: Shared) -> None:
    for kind, content in ((RELATED, body_of(mine())), ("application/dicom", mine())):
        answer = await send(untouched.lightbox, content, role=role, kind=kind)
        assert answer.status_code == (401 if role is None else 403)
        assert answer.headers["content-type"] == "application/problem+json"


async def test_who_is_refused_is_not_listened_to(untouched: Shared) -> None:
    async def body() -> AsyncIterator[bytes]:
        pytest.fail("the body was read")
        yield b""

    for role in ("clinician", None):
        assert (await send(untouched.lightbox, body(), role=role)).status_code in (401, 403)


# --------------------------------------------------------------------------- the request's form


@pytest.mark.parametrize(
    ("kind", "status", "word"),
    [
        (None, 415, "application/dicom"),
        ("", 415, "application/dicom"),
        ("text/plain", 415, "application/dicom"),
        ("application/dicom+json", 415, "application/dicom"),
        ("multipart/form-data; boundary=x", 415, "application/dicom"),
        ("multipart/mixed; type=application/dicom; boundary=x", 415, "multipart/related"),
        ("multipart/related; boundary=x", 415, "type="),
        ('multipart/related; type="application/octet-stream"; boundary=x', 415, "type="),
        ('multipart/related; type="application/dicom+json"; boundary=x', 415, "Metadata"),
        ('multipart/related; type="application/dicom+xml"; boundary=x', 415, "Metadata"),
        ('multipart/related; type="application/dicom"', 422, "boundary"),
        ('multipart/related; type="application/dicom"; boundary=', 422, "boundary"),
        (f'multipart/related; type="application/dicom"; boundary={"x" * 71}', 422, "boundary"),
        ('multipart/related; type="application/dicom"; boundary=y', 422, "no part"),
    ],
)
async def test_a_body_of_another_kind_is_refused(
    kind: str | None, status: int, word: str, untouched: Shared
) -> None:
    answer = await send(untouched.lightbox, body_of(mine()), kind=kind)
    assert answer.status_code == status, answer.text
    assert word in answer.json()["detail"]
    slug = "unsupported-media-type" if status == 415 else "invalid-request"
    assert answer.json()["type"] == f"urn:lightbox:problem:{slug}"


async def test_an_encoded_body_and_unknown_parameters_are_refused(untouched: Shared) -> None:
    lightbox = untouched.lightbox
    answer = await send(lightbox, body_of(mine()), **{"Content-Encoding": "gzip"})
    assert answer.status_code == 415
    answer = await send(lightbox, body_of(mine()), study="1.2?order_id=1")
    assert answer.status_code == 422


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"--x--\r\n",
        body_of(),
        body_of(mine()).replace(b"\r\n", b"\n"),
        PART + mine(),
        PART + mine() + b"\r\n--x",
        b"--x\r\n" + b"A: b\r\n" * 100_000 + b"\r\n" + mine() + b"\r\n--x--",
        b"--x\r\nA: " + b"b" * 1_000_000 + b"\r\n\r\n" + mine() + b"\r\n--x--",
    ],
    ids=["empty", "closed", "no-parts", "lf", "broken-off", "half-closed", "headers", "header"],
)
async def test_a_body_with_nothing_whole_in_it_is_refused(
    content: bytes, untouched: Shared
) -> None:
    answer = await send(untouched.lightbox, content)
    assert answer.status_code == 422, answer.text
    assert answer.json()["detail"]


@pytest.mark.parametrize(
    ("accept", "taken"),
    [
        ("*/*", True),
        ("application/dicom+json", True),
        ("Application/DICOM+JSON;q=0.1", True),
        ("application/json", True),
        ("application/dicom+xml, application/dicom+json;q=0.5", True),
        ("application/dicom+xml", False),
        ("text/html", False),
        ("application/dicom+json;q=0", False),
        ("application/dicom+json;q=x", False),
        ("caf\\xe9", False),
    ],
)
async def test_the_answer_is_dicom_json_or_none(
    accept: str, taken: bool, untouched: Shared
) -> None:
    answer = await send(untouched.lightbox, body_of(b"text"), Accept=accept)
    if taken:
        assert answer.status_code == 400
        assert answer.headers["content-type"] == "application/dicom+json"
    else:
        assert answer.status_code == 406
        assert answer.json()["type"] == "urn:lightbox:problem:not-acceptable"


# --------------------------------------------------------------- bodies that break off or go on


async def pieces(*sent: bytes) -> AsyncIterator[bytes]:
    for each in sent:
        yield each


@pytest.mark.parametrize(
    "rest",
    [
        PART + mine()[:300],
        PART,
        b"--x\r\n",
        b"--",
        b"",
        b"--x\r\nno header\r\n\r\n",
        b"--x\r\n" + b"A: b\r\n" * 100_000,
    ],
)
async def test_what_was_stored_before_a_break_is_told(
    rest: bytes, lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    content = mine()
    answer = await send(lightbox, pieces(PART + content + b"\r\n" + rest))
    if rest in (b"", b"--"):  # even the first part is not known to be whole
        assert answer.status_code == 422
        assert len(fake_orthanc.bodies) == 2
        return
    assert answer.status_code == 202
    assert stored_of(answer) == sop_uids([content])
    assert failed_of(answer) == [("", 0xC000)]
    assert "part 2" in sentences_of(answer)[0]
    assert len(fake_orthanc.bodies) == 3


@pytest.fixture
async def small(sqlite_url: str, fake_orthanc: FakeOrthanc) -> AsyncIterator[Lightbox]:
    """A Lightbox that takes a megabyte, and a megabyte around it."""
    async with running(make_settings(sqlite_url, URL, max_upload_bytes=1024 * 1024)) as lightbox:
        await lightbox.order(await lightbox.patient())
        yield lightbox


@pytest.mark.parametrize("kind", [RELATED, "application/dicom"])
async def test_a_body_beyond_the_limit_is_given_up(
    kind: str, small: Lightbox, fake_orthanc: FakeOrthanc
) -> None:
    sent = 0

    async def endless(start: bytes) -> AsyncIterator[bytes]:
        nonlocal sent
        yield start
        while sent < 64 * 1024 * 1024:
            sent += 256 * 1024
            yield bytes(256 * 1024)

    for start in (PART, b"", b"--x\r\n", b"--x--\r\n"):
        sent = 0
        answer = await send(small, endless(start), kind=kind)
        assert answer.status_code in (413, 422), answer.text
        assert sent <= 3 * 1024 * 1024
        sent = 0
        answer = await send(small, endless(start), kind=kind, **{"Content-Length": "99999999"})
        assert (answer.status_code, sent) == (413, 0)
    assert fake_orthanc.bodies == {}
    if kind == RELATED:
        sent = 0
        content = ct_image()
        # A Content-Length that lies changes nothing.
        answer = await send(
            small, endless(PART + content + b"\r\n" + PART), **{"Content-Length": "10"}
        )
        assert (answer.status_code, stored_of(answer)) == (202, sop_uids([content]))
        assert failed_of(answer) == [("", 0xA713)]
        assert "1048576 bytes" in sentences_of(answer)[0]
        assert sent <= 3 * 1024 * 1024


async def test_a_million_parts_are_given_up_at_the_limit(
    lightbox: Lightbox, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stow, "MAX_FILES", 20)
    sent = 0

    async def many(start: bytes) -> AsyncIterator[bytes]:
        nonlocal sent
        yield start
        while sent < 1_000_000:
            sent += 1000
            yield (PART + b"\r\n") * 1000

    taken = 0

    async def counted(*given: Any) -> Any:
        nonlocal taken
        taken += 1
        return await uploads.take_apart(*given)

    monkeypatch.setattr("app.routes.stow.take_apart", counted)
    answer = await send(lightbox, many(b""))
    assert (answer.status_code, sent, taken) == (413, 1000, 20)
    assert "at most 20 parts" in answer.json()["detail"]
    sent = taken = 0
    content = mine()
    answer = await send(lightbox, many(PART + content + b"\r\n"))
    assert (answer.status_code, sent, taken) == (202, 1000, 20)
    assert stored_of(answer) == sop_uids([content])
    assert len(failed_of(answer)) == 20
    assert uploads.MAX_FILES == 2000


async def test_nothing_is_left_in_the_spool_folder(
    sqlite_url: str, fake_orthanc: FakeOrthanc, tmp_path_factory: pytest.TempPathFactory
) -> None:
    spool = tmp_path_factory.mktemp("spool")
    async with running(make_settings(sqlite_url, URL, spool_dir=spool)) as lightbox:
        await lightbox.order(await lightbox.patient())
        big = ct_image(PixelData=bytes(2 * 1024 * 1024), Rows=1024, Columns=1024)
        assert (await send(lightbox, body_of(big, big[:-1], big))).status_code == 202
        assert (await send(lightbox, pieces(PART + big, b"\r\n" + PART + big))).status_code == 202
        assert (await send(lightbox, big, kind="application/dicom")).status_code == 200
    assert [each for each in spool.rglob("*") if each.is_file()] == []


# ---------------------------------------------------------------------- when something is down


async def test_nothing_stored_because_orthanc_is_down_is_503(
    lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    fake_orthanc.faults = [httpx.ConnectError("down")] * 20
    answer = await send(lightbox, body_of(mine(), mine()))
    assert answer.status_code == 503
    assert answer.headers["retry-after"]
    assert answer.json()["type"] == "urn:lightbox:problem:orthanc-unavailable"


async def test_what_was_stored_before_orthanc_went_down_is_told(
    lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    sent = [mine(), mine(), b"text"]

    def goes_down() -> None:
        fake_orthanc.faults = [httpx.ConnectError("down")] * 20

    # Whether it holds the instance is the last that an upload asks.
    fake_orthanc.meanwhile["GET"] = goes_down
    answer = await send(lightbox, body_of(*sent))
    assert answer.status_code == 202, answer.text
    assert stored_of(answer) == sop_uids(sent[:1])
    assert failed_of(answer) == [(sop_uids(sent[1:2])[0], 0xA700), ("", 0xC000)]


async def test_no_record_no_image(
    lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    change(lightbox, REFUSE_RECORDS)
    before = contents(lightbox)
    stored = dict(fake_orthanc.bodies)
    answer = await send(lightbox, body_of(mine(), mine()))
    assert (answer.status_code, answer.json()["type"]) == (
        503,
        "urn:lightbox:problem:audit-unavailable",
    )
    assert contents(lightbox) == before
    assert fake_orthanc.bodies == stored


async def test_what_nobody_foresaw_hides_no_stored_part(
    lightbox: Lightbox, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = [mine(), mine()]
    intake = lightbox.app.state.intake
    take = intake.take

    async def fails(each: Any, file: Any, target: Any) -> Any:
        if file.read() == sent[1]:
            raise RuntimeError("a fault")
        return await take(each, file, target)

    monkeypatch.setattr(intake, "take", fails)
    answer = await send(lightbox, body_of(*sent))
    assert (answer.status_code, stored_of(answer)) == (202, sop_uids(sent[:1]))
    assert failed_of(answer) == [(sop_uids(sent)[1], 0x0110)]


# -------------------------------------------------------------------------------- on the record


async def test_each_part_has_its_own_records(lightbox: Lightbox, world: World) -> None:
    """As an upload has them."""
    good = [mine(), mine()]
    stolen = mine(study_uid=world.their_study)
    body = body_of(good[0], b"text", stolen, ct_image(patient_id="MRN-NOBODY"), good[1])
    request_id = uuid4().hex
    await send(lightbox, body, **{"X-Request-ID": request_id})
    upload = "study:upload"
    assert outcomes(lightbox, request_id) == [
        (upload, "granted"),
        (upload, "done"),
        (upload, "failed"),  # nobody can say whose it is
        (upload, "granted"),
        (upload, "failed"),
        (upload, "denied"),
        (upload, "granted"),
        (upload, "done"),
    ]
    recorded = records(lightbox, request_id)
    done = [each["detail"]["sop_instance_uid"] for each in recorded if each["outcome"] == "done"]
    assert done == sop_uids(good)
    assert {each["reason"] for each in recorded} >= {"conflict", "unknown"}
    assert {each["actor"] for each in recorded} == {"technologist"}


async def test_a_patient_of_others_is_refused_as_an_unknown_one_is(
    untouched: Shared,
) -> None:
    """A PatientID can be guessed: only the trail tells the two apart."""
    said = []
    far = {"sub": "tom", "roles": ["technologist"], "site": "north"}
    for mrn, reason in (("MRN-VICTIM", "no-relationship"), ("MRN-NOBODY", "unknown")):
        content = ct_image(patient_id=mrn)
        request_id = uuid4().hex
        answer = await untouched.lightbox.ask(
            None,
            "POST",
            STUDIES,
            claims=far,
            content=body_of(content),
            headers={"Content-Type": RELATED, "X-Request-ID": request_id},
        )
        assert answer.status_code == 409
        assert failed_of(answer) == [(sop_uids([content])[0], 0xC404)]
        said.append(sentences_of(answer))
        (record,) = records(untouched.lightbox, request_id)
        assert (record["outcome"], record["reason"]) == ("denied", reason)
    assert said[0] == said[1]
