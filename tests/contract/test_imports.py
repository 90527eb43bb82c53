"""Imports: files sent in pieces, taken in one by one, watched, cancelled; and nobody else's."""

import asyncio
import base64
import hashlib
import io
import json
import stat
import time
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from app.db import utcnow
from app.errors import TooManyRequests
from tests.fake_orthanc import URL, FakeOrthanc
from tests.images import ct_image
from tests.lightbox import Lightbox, World, make_settings, running
from tests.tables import change, contents, moment, records, rows

API = "/api/v1/dicom/imports"
PIECES = {"Tus-Resumable": "1.0.0", "Content-Type": "application/offset+octet-stream"}
TECH = "technologist"


def creation(content: bytes, name: str = "image.dcm", **more: str) -> dict[str, str]:
    """The headers that announce a file."""
    said = {"filename": name, "sha256": hashlib.sha256(content).hexdigest()}
    metadata = ",".join(f"{k} {base64.b64encode(v.encode()).decode()}" for k, v in said.items())
    head = {"Tus-Resumable": "1.0.0", "Upload-Length": str(len(content))}
    return {**head, "Upload-Metadata": metadata, **more}


async def begin(lightbox: Lightbox, count: int, role: str = TECH, **body: Any) -> str:
    made = await lightbox.must(role, "POST", "/dicom/imports", json={"file_count": count, **body})
    return str(made["id"])


async def send(
    lightbox: Lightbox, import_id: str, content: bytes, name: str = "image.dcm", **more: Any
) -> httpx.Response:
    """A whole file in one request."""
    headers = {**creation(content, name), **PIECES}
    return await lightbox.ask(
        more.pop("role", TECH),
        "POST",
        f"{API}/{import_id}/files",
        headers=headers,
        content=content,
        **more,
    )


async def show(lightbox: Lightbox, import_id: str, **params: str) -> Any:
    return await lightbox.must(TECH, "GET", f"/dicom/imports/{import_id}", params=params)


async def until(
    lightbox: Lightbox, import_id: str, good: Callable[[Any], bool] | None = None
) -> Any:
    """The import, once it is as asked: over, by default."""
    deadline = time.monotonic() + 60
    while True:
        found = await show(lightbox, import_id, limit="200")
        if (good or (lambda each: each["state"] != "open"))(found):
            return found
        assert time.monotonic() < deadline, found
        await asyncio.sleep(0.02)


async def watched(lightbox: Lightbox, import_id: str, last: str = "0") -> list[dict[str, Any]]:
    """The events of an import that is over: id, event and data of each."""
    answer = await lightbox.ask(
        TECH, "GET", f"{API}/{import_id}/events", headers={"Last-Event-ID": last}
    )
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = []
    for block in answer.text.split("\n\n"):
        fields = dict(line.partition(": ")[::2] for line in block.splitlines())
        if "event" in fields:
            found.append({**fields, "data": json.loads(fields["data"])})
    return found


def zipped(**files: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


def mine(world: World, **values: Any) -> bytes:
    return ct_image(patient_id=world.mine["mrn"], **values)


def spool(lightbox: Lightbox) -> Any:
    return lightbox.app.state.imports.spool.folder


def in_spool(lightbox: Lightbox) -> list[str]:
    return sorted(each.name for each in spool(lightbox).iterdir())


# ------------------------------------------------------------------------------- what comes in


async def test_files_are_taken_in_as_uploads_are(
    lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    files = [mine(world) for _ in range(5)]
    import_id = await begin(lightbox, 5, order_id=world.my_order["id"])
    for content in files:
        assert (await send(lightbox, import_id, content)).status_code == 201
    done = await until(lightbox, import_id)
    assert (done["state"], done["counts"]) == ("done", {"linked": 5})
    assert [each["number"] for each in done["files"]] == [1, 2, 3, 4, 5]
    assert [each["duplicate"] for each in done["files"]] == [False] * 5
    stored = list(fake_orthanc.bodies.values())
    assert [stored.count(each) for each in files] == [1] * 5
    answered = await lightbox.must("service", "GET", f"/orders/{world.my_order['id']}")
    assert set(answered["studies"]) >= {each["study_instance_uid"] for each in done["files"]}
    assert in_spool(lightbox) == []
    trail = records(lightbox, f"import-{import_id}")
    assert [each["outcome"] for each in trail].count("done") == 5
    assert {each["actor"] for each in trail} == {TECH}
    assert {each["action"] for each in trail} == {"study:upload"}


async def test_a_file_in_pieces_goes_on_where_it_broke(lightbox: Lightbox, world: World) -> None:
    content = mine(world)
    import_id = await begin(lightbox, 1)
    made = await lightbox.ask(TECH, "POST", f"{API}/{import_id}/files", headers=creation(content))
    assert (made.status_code, made.headers["upload-offset"]) == (201, "0")
    url = made.headers["location"]
    for start, end in ((0, 100), (100, 101), (101, len(content))):
        part = await lightbox.ask(
            TECH,
            "PATCH",
            url,
            headers={**PIECES, "Upload-Offset": str(start)},
            content=content[start:end],
        )
        assert (part.status_code, part.headers["upload-offset"]) == (204, str(end)), part.text
        head = await lightbox.ask(TECH, "HEAD", url)
        assert head.headers["upload-offset"] == str(end)
        assert head.headers["upload-length"] == str(len(content))
        assert head.headers["tus-resumable"] == "1.0.0"
        again = await lightbox.ask(
            TECH, "PATCH", url, headers={**PIECES, "Upload-Offset": str(start)}, content=b"x" * 9
        )
        assert again.status_code == 409, "an old piece again changes nothing"
    assert (await until(lightbox, import_id))["counts"] == {"linked": 1}


async def test_the_same_content_again_is_the_same_file(
    lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    content, other = mine(world), mine(world)
    import_id = await begin(lightbox, 2)
    first = await send(lightbox, import_id, content)
    await until(lightbox, import_id, lambda found: found["counts"] == {"linked": 1})
    again = await send(lightbox, import_id, content, "another-name.dcm")
    assert again.headers["location"] == first.headers["location"]
    assert again.headers["upload-offset"] == str(len(content))
    await send(lightbox, import_id, other)
    assert (await until(lightbox, import_id))["counts"] == {"linked": 2}
    assert list(fake_orthanc.bodies.values()).count(content) == 1
    third = await begin(lightbox, 1)
    await send(lightbox, third, content)
    (file,) = (await until(lightbox, third))["files"]
    assert (file["state"], file["duplicate"]) == ("linked", True)
    assert list(fake_orthanc.bodies.values()).count(content) == 1


async def test_bytes_that_are_not_the_announced_ones_are_thrown_away(
    lightbox: Lightbox, world: World
) -> None:
    content = mine(world)
    import_id = await begin(lightbox, 1)
    changed = bytes([content[0] ^ 1]) + content[1:]
    wrong = await lightbox.ask(
        TECH,
        "POST",
        f"{API}/{import_id}/files",
        headers={**creation(content), **PIECES},
        content=changed,
    )
    assert wrong.status_code == 422
    assert "SHA-256" in wrong.json()["detail"]
    right = await send(lightbox, import_id, content)
    assert right.headers["upload-offset"] == str(len(content))
    assert (await until(lightbox, import_id))["counts"] == {"linked": 1}


async def test_bad_files_stop_no_other(
    lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    before = len(fake_orthanc.bodies)
    bomb = zipped(**{"a.dcm": mine(world), "b.dcm": b"\0" * 4_000_000})
    theirs = ct_image(patient_id="MRN-VICTIM", PatientName="Victim^Vera")
    files = {
        "good.dcm": mine(world),
        "text.txt": b"no image",
        "theirs.dcm": theirs,
        "bomb.zip": bomb,
        "good.zip": zipped(**{"1": mine(world), "../2": mine(world), "3": b"text"}),
        "last.dcm": mine(world),
    }
    import_id = await begin(lightbox, len(files), patient_id=world.mine["id"])
    for name, content in files.items():
        assert (await send(lightbox, import_id, content, name)).status_code == 201
    done = await until(lightbox, import_id)
    assert done["state"] == "done"
    said = {each["filename"]: (each["state"], each["error_type"]) for each in done["files"]}
    assert said == {
        "good.dcm": ("linked", None),
        "text.txt": ("refused", "not-dicom"),
        "theirs.dcm": ("refused", "patient-mismatch"),
        "bomb.zip": ("refused", "too-large"),
        "good.zip": ("unpacked", None),
        "good.zip/1": ("linked", None),
        "good.zip/../2": ("refused", "invalid-request"),
        "good.zip/3": ("refused", "not-dicom"),
        "last.dcm": ("linked", None),
    }
    assert len(fake_orthanc.bodies) == before + 3
    assert theirs not in fake_orthanc.bodies.values()
    assert in_spool(lightbox) == []


async def test_without_a_target_the_patient_id_decides_and_no_match_is_refused(
    lightbox: Lightbox, world: World
) -> None:
    import_id = await begin(lightbox, 2)
    await send(lightbox, import_id, mine(world))
    await send(lightbox, import_id, ct_image(patient_id="MRN-NOBODY"))
    linked, refused = (await until(lightbox, import_id))["files"]
    assert linked["state"] == "linked"
    assert (refused["state"], refused["error_status"]) == ("refused", 404)
    assert "MRN-NOBODY" in refused["error"]


async def test_what_a_file_is_announced_as(lightbox: Lightbox, world: World) -> None:
    import_id = await begin(lightbox, 1)
    content = mine(world)

    async def announce(**more: str) -> tuple[int, str]:
        answer = await lightbox.ask(
            TECH, "POST", f"{API}/{import_id}/files", headers=creation(content) | more
        )
        return answer.status_code, answer.text

    assert (await announce(**{"Tus-Resumable": "0.2.2"}))[0] == 412
    assert (await announce(**{"Upload-Length": "-1"}))[0] == 422
    assert (await announce(**{"Upload-Length": "1.5"}))[0] == 422
    assert (await announce(**{"Upload-Metadata": "filename eA=="}))[0] == 422
    assert (await announce(**{"Upload-Metadata": "sha256 !"}))[0] == 422
    assert (await announce(**{"Upload-Length": str(10**12)}))[0] == 413
    assert (await announce())[0] == 201
    status, text = await announce(**{"Upload-Metadata": creation(b"other")["Upload-Metadata"]})
    assert (status, "was to have 1 files" in text) == (409, True)
    more = await lightbox.ask(
        TECH,
        "PATCH",
        f"{API}/{import_id}/files/1",
        headers={**PIECES, "Upload-Offset": "0"},
        content=content + b"more",
    )
    assert more.status_code == 413
    other_type = {**PIECES, "Content-Type": "text/plain", "Upload-Offset": "0"}
    path = f"{API}/{import_id}/files/1"
    assert (await lightbox.ask(TECH, "PATCH", path, headers=other_type)).status_code == 415
    gone = await lightbox.ask(TECH, "DELETE", path, headers=PIECES)
    assert gone.status_code == 204
    assert (await lightbox.ask(TECH, "HEAD", path)).status_code == 404
    assert in_spool(lightbox) == []


async def test_a_name_is_shown_and_never_a_path(lightbox: Lightbox, world: World) -> None:
    import_id = await begin(lightbox, 1)
    await send(lightbox, import_id, mine(world), "../../evil\u202e\x00\n.dcm")
    (file,) = (await until(lightbox, import_id))["files"]
    assert file["filename"] == "../../evil\ufffd\ufffd\ufffd.dcm"


# ------------------------------------------------------------------------------------- the folder


async def test_the_folder_is_private_bounded_and_cleaned(
    sqlite_url: str, world: World, fake_orthanc: FakeOrthanc, tmp_path: Any, lightbox: Lightbox
) -> None:
    content = mine(world)
    settings = make_settings(
        sqlite_url, URL, spool_dir=tmp_path, import_spool_bytes=len(content) + 10
    )
    folder = spool(lightbox)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    nobodys = folder / f"{uuid4().hex}.1"
    nobodys.write_bytes(b"left behind")
    (folder / "other").write_bytes(b"left behind")
    async with running(settings) as bounded:
        assert in_spool(bounded) == []
        import_id = await begin(bounded, 2)
        first = await bounded.ask(
            TECH, "POST", f"{API}/{import_id}/files", headers=creation(content)
        )
        assert first.status_code == 201
        full = await send(bounded, import_id, mine(world))
        assert (full.status_code, full.headers["retry-after"]) == (503, "5")
        assert (await send(bounded, import_id, content)).status_code == 201
        await until(bounded, import_id, lambda found: found["counts"] == {"linked": 1})
        assert (await send(bounded, import_id, mine(world))).status_code == 201
        assert (await until(bounded, import_id))["counts"] == {"linked": 2}
    folder.chmod(0o755)
    with pytest.raises(RuntimeError, match="0700"):
        async with running(settings):
            pass


# ---------------------------------------------------------------------------------------- rights


async def test_another_user_cannot_see_feed_watch_or_cancel_it(
    lightbox: Lightbox, world: World
) -> None:
    content = mine(world)
    import_id = await begin(lightbox, 2, patient_id=world.mine["id"])
    made = await lightbox.ask(
        TECH, "POST", f"{API}/{import_id}/files", headers=creation(content, "Victim Vera.dcm")
    )
    url = made.headers["location"]
    before = contents(lightbox)
    feed = {**PIECES, "Upload-Offset": "0"}
    attempts: list[tuple[str, str, dict[str, Any]]] = [
        ("GET", f"{API}/{import_id}", {}),
        ("GET", f"{API}/{import_id}/events", {}),
        ("GET", url, {}),
        ("HEAD", url, {}),
        ("PATCH", url, {"headers": feed, "content": content}),
        ("POST", f"{API}/{import_id}/files", {"headers": {**creation(b"x"), **PIECES}}),
        ("DELETE", url, {"headers": PIECES}),
        ("DELETE", f"{API}/{import_id}", {}),
    ]
    for role, sub in ((TECH, "tina"), ("radiologist", None), ("service", "other-ehr")):
        for method, path, more in attempts:
            request_id = uuid4().hex
            headers = {**more.get("headers", {}), "X-Request-ID": request_id}
            answer = await lightbox.ask(role, method, path, sub=sub, **{**more, "headers": headers})
            assert answer.status_code == 404, (method, path, answer.text)
            unknown = await lightbox.ask(
                role, method, path.replace(import_id, str(UUID(int=7))), sub=sub, **more
            )
            assert unknown.status_code == 404
            if method != "HEAD":
                assert unknown.json()["detail"] == answer.json()["detail"]
            (denied,) = [x for x in records(lightbox, request_id) if x["outcome"] == "denied"]
            assert (denied["actor"], denied["reason"]) == (sub or role, "unknown")
            assert denied["detail"] == {"import_id": import_id}
        assert await lightbox.must(role, "GET", "/dicom/imports", sub=sub) == []
        everybodys = await lightbox.ask(role, "GET", API, sub=sub, params={"whose": "all"})
        assert everybodys.status_code == 403
    assert contents(lightbox) == before
    assert (await send(lightbox, import_id, content)).status_code == 201, "and it goes on"


async def test_an_admin_sees_counts_and_cancels_and_learns_nothing_of_patients(
    lightbox: Lightbox, world: World
) -> None:
    import_id = await begin(lightbox, 2, order_id=world.my_order["id"], key="jane-doe")
    await send(lightbox, import_id, mine(world), "Doe Jane.dcm")
    await until(lightbox, import_id, lambda found: found["counts"] == {"linked": 1})
    (listed,) = await lightbox.must("admin", "GET", "/dicom/imports", params={"whose": "all"})
    one = await lightbox.must("admin", "GET", f"/dicom/imports/{import_id}")
    for shown in (listed, one):
        assert (shown["id"], shown["sub"], shown["counts"]) == (import_id, TECH, {"linked": 1})
        assert not shown.keys() & {"order_id", "patient_id", "files", "key"}
        assert "doe" not in json.dumps(shown).lower()
    for path in (f"/{import_id}/events", f"/{import_id}/files/1"):
        assert (await lightbox.ask("admin", "GET", API + path)).status_code == 404
    fed = await send(lightbox, import_id, mine(world), role="admin")
    assert fed.status_code == 403
    assert (await lightbox.ask("admin", "DELETE", f"{API}/{import_id}")).status_code == 204
    over = await show(lightbox, import_id)
    assert (over["state"], over["reason"]) == ("cancelled", "Cancelled by admin.")


async def test_who_lost_the_right_meanwhile_imports_nothing_more(
    lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    named = await begin(lightbox, 3, patient_id=world.mine["id"])
    unnamed = await begin(lightbox, 2)
    for each in (named, unnamed):
        await send(lightbox, each, mine(world))
        await until(lightbox, each, lambda found: found["counts"] == {"linked": 1})
    stored = len(fake_orthanc.bodies)
    # The only order that ties the technologist to the patient is no longer.
    order = f"/orders/{world.my_order['id']}"
    await lightbox.must("service", "PATCH", order, json={"status": "cancelled"})
    await send(lightbox, named, mine(world))
    over = await until(lightbox, named)
    assert over["state"] == "stopped"
    assert over["counts"] == {"linked": 1, "refused": 1}
    assert (await send(lightbox, named, mine(world))).status_code == 409
    await send(lightbox, unnamed, mine(world))
    over = await until(lightbox, unnamed)
    assert over["files"][1]["error_status"] == 404
    assert len(fake_orthanc.bodies) == stored
    again = await lightbox.ask(
        TECH, "POST", API, json={"file_count": 1, "patient_id": world.mine["id"]}
    )
    assert again.status_code == 403


async def test_a_newer_token_with_less_counts_for_what_waits(
    lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    stored = len(fake_orthanc.bodies)
    fake_orthanc.held = asyncio.Event()
    import_id = await begin(lightbox, 2)
    await send(lightbox, import_id, mine(world))
    claims = {"sub": TECH, "roles": [TECH], "site": "elsewhere"}
    content = mine(world)
    answer = await lightbox.ask(
        None,
        "POST",
        f"{API}/{import_id}/files",
        claims=claims,
        headers={**creation(content), **PIECES},
        content=content,
    )
    assert answer.status_code == 201
    fake_orthanc.held.set()
    files = (await until(lightbox, import_id))["files"]
    assert files[1]["state"] == "refused"
    assert len(fake_orthanc.bodies) <= stored + 1


async def test_a_token_of_one_patient_makes_no_import(lightbox: Lightbox, world: World) -> None:
    claims = {"sub": TECH, "roles": [TECH], "patient": world.mine["id"]}
    answer = await lightbox.ask(None, "POST", API, claims=claims, json={"file_count": 1})
    assert (answer.status_code, answer.json()["reason"]) == (403, "out-of-context")


# ------------------------------------------------------------------------------------ interrupted


async def test_orthanc_away_for_a_while_refuses_nothing(
    lightbox: Lightbox,
    world: World,
    fake_orthanc: FakeOrthanc,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("app.imports.work.RETRY", timedelta(seconds=0))
    fake_orthanc.faults_at["/instances"] = httpx.ConnectError("gone")
    import_id = await begin(lightbox, 1)
    await send(lightbox, import_id, mine(world))
    await until(lightbox, import_id, lambda found: found["counts"] == {"validated": 1})
    fake_orthanc.faults_at.clear()
    assert (await until(lightbox, import_id))["counts"] == {"linked": 1}


async def test_an_app_that_starts_goes_on(
    sqlite_url: str, fake_orthanc: FakeOrthanc, tmp_path: Any
) -> None:
    """Files of every state that a killed process leaves, and a claim that it can't give back."""
    settings = make_settings(sqlite_url, URL, spool_dir=tmp_path)
    files = [ct_image() for _ in range(4)]
    async with running(settings) as first:
        await first.order(await first.patient())
        import_id = await begin(first, 4)
        fake_orthanc.held = asyncio.Event()
        for content in files[:3]:
            assert (await send(first, import_id, content)).status_code == 201
        half = await first.ask(TECH, "POST", f"{API}/{import_id}/files", headers=creation(files[3]))
        assert half.status_code == 201
        place = first.app.state.imports.spool.path(UUID(import_id), 4)
    # The last file came whole, and nobody said so any more.
    place.write_bytes(files[3])
    change(first, "UPDATE import_file SET state = 'stored' WHERE number = 1")
    claim = "UPDATE dicom_import SET claimed_by = 'dead', leased_until = ?"
    change(first, claim, moment(hours=1))
    fake_orthanc.held.set()
    assert fake_orthanc.bodies == {}
    async with running(settings) as second:
        done = await until(second, import_id)
    assert done["counts"] == {"linked": 4}
    assert sorted(fake_orthanc.bodies.values()) == sorted(files)


async def test_a_living_process_keeps_its_claim(
    lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    imports = lightbox.app.state.imports
    fake_orthanc.held = asyncio.Event()
    import_id = await begin(lightbox, 1)
    await send(lightbox, import_id, mine(world))
    deadline = time.monotonic() + 60
    while not rows(lightbox, "SELECT 1 FROM dicom_import WHERE claimed_by != ''"):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
    assert await imports.rows.claim("another", 4) == []
    change(lightbox, "UPDATE dicom_import SET leased_until = ?", moment(seconds=-1))
    assert await imports.rows.claim("another", 4) == [UUID(import_id)]
    assert not await imports.rows.renew(UUID(import_id), imports._process)
    fake_orthanc.held.set()
    await imports.rows.release(UUID(import_id), "another", utcnow())
    assert (await until(lightbox, import_id))["counts"] == {"linked": 1}


async def test_the_same_key_is_the_same_import_while_it_is_open(
    lightbox: Lightbox, world: World
) -> None:
    first = await begin(lightbox, 1, key="folder-1")
    assert await begin(lightbox, 1, key="folder-1") == first
    assert await begin(lightbox, 2, key="folder-1") != first
    assert await begin(lightbox, 1, "radiologist", key="folder-1") != first
    await send(lightbox, first, mine(world))
    await until(lightbox, first)
    assert await begin(lightbox, 1, key="folder-1") != first


# ----------------------------------------------------------------------------- cancelled, watched


async def test_cancelled_in_the_middle(
    lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    import_id = await begin(lightbox, 9)
    await send(lightbox, import_id, mine(world))
    await until(lightbox, import_id, lambda found: found["counts"] == {"linked": 1})
    stored = len(fake_orthanc.bodies)
    fake_orthanc.held = asyncio.Event()  # nothing that is cancelled may be stored when it is back
    for _ in range(6):
        await send(lightbox, import_id, mine(world))
    await lightbox.ask(TECH, "POST", f"{API}/{import_id}/files", headers=creation(mine(world)))
    for _ in range(2):  # safe to repeat
        assert (await lightbox.ask(TECH, "DELETE", f"{API}/{import_id}")).status_code == 204
    fake_orthanc.held.set()
    over = await until(
        lightbox, import_id, lambda found: set(found["counts"]) == {"linked", "cancelled"}
    )
    assert over["state"] == "cancelled"
    assert sum(over["counts"].values()) == 8
    assert len(fake_orthanc.bodies) == stored + over["counts"]["linked"] - 1
    assert over["counts"]["linked"] == 1
    assert in_spool(lightbox) == []
    late = await send(lightbox, import_id, mine(world))
    assert late.status_code == 409


async def test_events_come_in_order_and_go_on_after_the_last_one(
    lightbox: Lightbox, world: World
) -> None:
    import_id = await begin(lightbox, 4)
    for _ in range(3):
        await send(lightbox, import_id, mine(world))
    await send(lightbox, import_id, b"no image", "x.txt")
    await until(lightbox, import_id)
    events = await watched(lightbox, import_id)
    kinds = [each["event"] for each in events]
    assert kinds == ["file"] * 4 + ["progress", "done"]
    ids = [int(each["id"]) for each in events]
    assert ids == sorted(ids)
    assert events[-1]["data"]["counts"] == {"linked": 3, "refused": 1}
    for position in range(4):
        rest = await watched(lightbox, import_id, events[position]["id"])
        assert rest == events[position + 1 :]
    assert await watched(lightbox, import_id, events[-1]["id"]) == events[-1:]


async def test_many_files_that_change_together_are_all_told_of(
    lightbox: Lightbox, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.imports.events.BATCH", 3)
    import_id = await begin(lightbox, 8)
    for number in range(8):
        content = str(number).encode()
        await lightbox.ask(TECH, "POST", f"{API}/{import_id}/files", headers=creation(content))
    await lightbox.ask(TECH, "DELETE", f"{API}/{import_id}")
    events = await watched(lightbox, import_id)
    told = [each["data"]["number"] for each in events if each["event"] == "file"]
    assert told == list(range(1, 9))
    assert [("id" in each) for each in events] == [False] * 7 + [True] * 3


async def test_a_page_of_files_after_the_other(lightbox: Lightbox, world: World) -> None:
    import_id = await begin(lightbox, 5)
    for number in range(5):
        await send(lightbox, import_id, f"no image {number}".encode())
    await until(lightbox, import_id)
    numbers: list[int] = []
    path: str | None = f"{API}/{import_id}?limit=2&state=refused"
    while path:
        answer = await lightbox.ask(TECH, "GET", path)
        numbers += [each["number"] for each in answer.json()["files"]]
        path = answer.links.get("next", {}).get("url")
    assert numbers == [1, 2, 3, 4, 5]


async def test_imports_of_ones_own_are_listed_newest_first(lightbox: Lightbox) -> None:
    made = [await begin(lightbox, 1) for _ in range(5)]
    seen: list[str] = []
    path: str | None = f"{API}?limit=2"
    while path:
        answer = await lightbox.ask(TECH, "GET", path)
        seen += [each["id"] for each in answer.json()]
        path = answer.links.get("next", {}).get("url")
    assert seen == made[::-1]


async def test_what_nobody_feeds_is_cancelled_and_forgotten(
    lightbox: Lightbox, world: World
) -> None:
    imports = lightbox.app.state.imports
    content = mine(world)
    import_id = await begin(lightbox, 1)
    url = f"{API}/{import_id}/files"
    await lightbox.ask(TECH, "POST", url, headers=creation(content))
    headers = {**PIECES, "Upload-Offset": "0"}
    await lightbox.ask(TECH, "PATCH", f"{url}/1", headers=headers, content=content[:50])
    await imports._upkeep()
    assert len(in_spool(lightbox)) == 1
    change(lightbox, "UPDATE dicom_import SET fed_at = ?", moment(hours=-25))
    await imports._upkeep()
    over = await show(lightbox, import_id)
    assert (over["state"], in_spool(lightbox)) == ("cancelled", [])
    change(lightbox, "UPDATE dicom_import SET ended_at = ?", moment(days=-31))
    await imports._upkeep()
    assert rows(lightbox, "SELECT * FROM import_file") == []
    assert rows(lightbox, "SELECT * FROM dicom_import") == []


async def test_of_the_streams_of_one_person_eight_are_open_at_once(
    lightbox: Lightbox, world: World
) -> None:
    body = {"file_count": 1, "order_id": world.my_order["id"]}
    made = await lightbox.must("technologist", "POST", "/dicom/imports", json=body)
    path = f"/api/v1/dicom/imports/{made['id']}/events"
    streams = lightbox.app.state.import_streams
    with ExitStack() as others:
        for _ in range(8):
            others.enter_context(streams.one("technologist"))
        answer = await lightbox.ask("technologist", "GET", path)
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "10")
        for number in range(92):
            others.enter_context(streams.one(f"other-{number}"))
        with pytest.raises(TooManyRequests), streams.one("one more"):
            pass
    await lightbox.ask("technologist", "DELETE", path.removesuffix("/events"))
    answer = await lightbox.ask("technologist", "GET", path)
    assert answer.status_code == 200
    assert "event: done" in answer.text
