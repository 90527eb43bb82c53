"""STOW-RS through the real edge into the real Orthanc, from a real client library too."""

import socket
from collections.abc import AsyncIterator, Iterator
from io import BytesIO
from typing import Any

import anyio
import anyio.to_thread
import httpx
import pydicom
import pytest
from dicomweb_client import DICOMwebClient
from dicomweb_client.session_utils import create_session
from pydicom.uid import generate_uid

from app.demo.stack import AppServer, Edge, OrthancServer, free_port
from app.settings import MEBIBYTE
from tests.images import ct_image
from tests.live.conftest import Archive, Edged, Full, audit_of, edged, environment_of, make_person

STUDIES = "/dicom-web/studies"
PART = b"--cut-here\r\nContent-Type: application/dicom\r\n\r\n"
RELATED = {"Content-Type": 'multipart/related; type="application/dicom"; boundary=cut-here'}


def body_of(*files: bytes) -> bytes:
    return b"".join(PART + each + b"\r\n" for each in files) + b"--cut-here--\r\n"


async def send(caller: Edged, content: Any, path: str = STUDIES, **headers: str) -> httpx.Response:
    return await caller.ask(
        "technologist", "POST", path, content=content, headers={**RELATED, **headers}
    )


def image_of(content: bytes) -> pydicom.Dataset:
    return pydicom.dcmread(BytesIO(content))


def response_of(answer: httpx.Response) -> pydicom.Dataset:
    return pydicom.Dataset.from_json(answer.json())


def kept_as(archive: Archive, sop_instance_uid: str) -> bytes | None:
    """What Orthanc has of an instance, byte for byte; None: nothing."""
    found = [each["ID"] for each in archive.find(sop_instance_uid) if each["Type"] == "Instance"]
    assert len(found) <= 1
    return archive.file(found[0]) if found else None


def sop_uid_of(content: bytes) -> str:
    return str(image_of(content).SOPInstanceUID)


async def test_parts_good_and_bad(through_edge: Edged, full: Full) -> None:
    mine, theirs = await make_person(through_edge), await make_person(through_edge)
    good = [ct_image(patient_id=mine.mrn), ct_image(patient_id=theirs.mrn)]
    answer = await send(through_edge, body_of(*good))
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/dicom+json"
    uid = str(image_of(good[1]).StudyInstanceUID)
    fresh = ct_image(patient_id=mine.mrn)
    bad = [
        ct_image(patient_id=mine.mrn, study_uid=uid),
        ct_image(patient_id="NOBODY-HERE"),
        ct_image(patient_id=mine.mrn, sop_uid=sop_uid_of(good[0])),
    ]
    answer = await send(through_edge, body_of(good[0], *bad, b"text", fresh[:-5], fresh))
    assert answer.status_code == 202, answer.text
    said = response_of(answer)
    stored = [each.ReferencedSOPInstanceUID for each in said.ReferencedSOPSequence]
    assert stored == [sop_uid_of(good[0]), sop_uid_of(fresh)]
    failed = [(e.ReferencedSOPInstanceUID, e.FailureReason) for e in said.FailedSOPSequence]
    assert failed == [
        (sop_uid_of(bad[0]), 0xC409),
        (sop_uid_of(bad[1]), 0xC404),
        (sop_uid_of(bad[2]), 0xC409),
    ]
    assert [each.FailureReason for each in said[0x0008119A].value] == [0xC000, 0xC000]
    assert theirs.mrn not in answer.text
    for content in (*good, fresh):
        assert kept_as(full.archive, sop_uid_of(content)) == content
    assert full.archive.owners(uid) == [theirs.mrn]
    for content in bad[:2]:
        assert kept_as(full.archive, sop_uid_of(content)) is None
    done = audit_of(await through_edge.audit(patient_id=mine.patient["id"]), "study:upload", "done")
    assert [each["detail"]["duplicate"] for each in done] == [False, True, False]


async def test_the_study_of_the_address(through_edge: Edged, full: Full) -> None:
    person = await make_person(through_edge)
    uid = str(generate_uid(None))
    right = ct_image(patient_id=person.mrn, study_uid=uid)
    wrong = ct_image(patient_id=person.mrn)
    answer = await send(through_edge, body_of(wrong, right), f"{STUDIES}/{uid}")
    said = response_of(answer)
    assert answer.status_code == 202
    assert said.RetrieveURL == f"{full.settings.api_base_url}/dicom-web/studies/{uid}"
    assert kept_as(full.archive, sop_uid_of(right)) == right
    assert kept_as(full.archive, sop_uid_of(wrong)) is None
    answer = await send(through_edge, body_of(wrong), f"{STUDIES}/{uid}")
    assert answer.status_code == 409


async def test_one_file_alone(through_edge: Edged, full: Full) -> None:
    person = await make_person(through_edge)
    content = ct_image(patient_id=person.mrn)
    answer = await send(through_edge, content, **{"Content-Type": "application/dicom"})
    assert answer.status_code == 200, answer.text
    assert kept_as(full.archive, sop_uid_of(content)) == content


async def test_the_client_library_of_others(through_edge: Edged, full: Full) -> None:
    """Its large bodies come in chunks, without a Content-Length."""
    person = await make_person(through_edge)
    session = create_session()
    session.trust_env = False
    session.headers["Authorization"] = f"Bearer {through_edge.token('technologist')}"
    client = DICOMwebClient(f"{full.settings.api_base_url}/dicom-web", session)
    uid = str(generate_uid(None))
    pixels: dict[str, Any] = {"PixelData": bytes(2 * MEBIBYTE), "Rows": 1024, "Columns": 1024}
    sent = [
        ct_image(patient_id=person.mrn, study_uid=uid),
        ct_image(patient_id=person.mrn, study_uid=uid, **pixels),
    ]
    for files in (sent[:1], sent, sent):
        images = [image_of(each) for each in files]
        for study in (uid, None):
            said = await anyio.to_thread.run_sync(client.store_instances, images, study)
            stored = [each.ReferencedSOPInstanceUID for each in said.ReferencedSOPSequence]
            assert stored == [each.SOPInstanceUID for each in images]
            assert "FailedSOPSequence" not in said
            assert said.RetrieveURL.endswith(uid)
    for content in sent:
        kept = kept_as(full.archive, sop_uid_of(content))
        assert kept is not None
        assert image_of(kept) == image_of(content)
    other = image_of(ct_image(patient_id=person.mrn))
    said = await anyio.to_thread.run_sync(client.store_instances, [image_of(sent[0]), other], uid)
    assert [each.FailureReason for each in said.FailedSOPSequence] == [0xC409]
    assert "StudyInstanceUID" in said.FailedSOPSequence[0][0x00091001].value


async def test_a_sender_that_goes_away_leaves_what_was_whole(
    through_edge: Edged, full: Full
) -> None:
    person = await make_person(through_edge)
    first, second = ct_image(patient_id=person.mrn), ct_image(patient_id=person.mrn)
    token = through_edge.token("technologist")
    head = (
        f"POST {STUDIES} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n"
        f"Content-Type: {RELATED['Content-Type']}\r\nContent-Length: 100000\r\n\r\n"
    )
    with socket.create_connection(("localhost", full.edge.api_port), timeout=10) as connection:
        connection.sendall(head.encode() + PART + first + b"\r\n" + PART + second)
        with anyio.fail_after(60):
            while kept_as(full.archive, sop_uid_of(first)) is None:  # noqa: ASYNC110
                await anyio.sleep(0.05)
    assert kept_as(full.archive, sop_uid_of(first)) == first
    # Sent again it is a duplicate, and the other is new.
    answer = await send(through_edge, body_of(first, second))
    assert answer.status_code == 200, answer.text
    assert kept_as(full.archive, sop_uid_of(second)) == second


# --------------------------------------------------------------------------------- large bodies


@pytest.fixture
def wide(full: Full, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Full]:
    """The same parts with an app and an edge that take 64 MiB."""
    state = tmp_path_factory.mktemp("wide")
    spool, viewer_files = state / "spool", state / "viewer"
    spool.mkdir()
    viewer_files.mkdir()
    (viewer_files / "index.html").touch()
    api_port, viewer_port, app_port = free_port(), free_port(), free_port()
    orthanc = full.archive.server
    assert isinstance(orthanc, OrthancServer)
    settings = full.settings.model_copy(
        update={
            "api_base_url": f"http://localhost:{api_port}",
            "viewer_base_url": f"http://localhost:{viewer_port}",
            "spool_dir": spool,
            "max_upload_bytes": 64 * MEBIBYTE,
        }
    )
    app = AppServer(app_port, environment_of(settings), state_dir=state / "app")
    edge = Edge(
        state / "edge",
        api_port=api_port,
        viewer_port=viewer_port,
        app_port=app_port,
        orthanc=orthanc,
        ohif_dir=viewer_files,
    )
    with app, edge:
        yield Full(settings, full.archive, app, edge, full.database)


def large(mrn: str, seed: int) -> bytes:
    """An image of 10 MiB."""
    pixels = bytes((seed + each) % 251 for each in range(1024)) * (10 * 1024)
    return ct_image(patient_id=mrn, PixelData=pixels, Rows=2048, Columns=2560)


async def streamed(content: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(content), 100_000):
        yield content[start : start + 100_000]


async def test_forty_mebibytes_in_a_stream(wide: Full) -> None:
    async with edged(wide.settings) as caller:
        person = await make_person(caller)
        sent = [large(person.mrn, each) for each in range(4)]
        answer = await send(caller, streamed(body_of(*sent)))
        assert answer.status_code == 200, answer.text
        for content in sent:
            assert kept_as(wide.archive, sop_uid_of(content)) == content
        assert [each for each in wide.settings.spool_dir.rglob("*") if each.is_file()] == []


@pytest.mark.parametrize("beyond", [False, True], ids=["malformed", "too-large"])
async def test_what_was_stored_is_told_although_the_rest_is_not_read(
    beyond: bool, wide: Full
) -> None:
    async with edged(wide.settings) as caller:
        person = await make_person(caller)
        content = ct_image(patient_id=person.mrn)
        start = PART + content + b"\r\n" + (PART if beyond else b"--cut-here\r\nno header\r\n\r\n")
        rest = bytes(80 * MEBIBYTE if beyond else 40 * MEBIBYTE)
        answer = await send(caller, streamed(start + rest))
        assert answer.status_code == 202, answer.text
        said = response_of(answer)
        (stored,) = said.ReferencedSOPSequence
        assert stored.ReferencedSOPInstanceUID == sop_uid_of(content)
        (broken,) = said[0x0008119A].value
        assert broken.FailureReason == (0xA713 if beyond else 0xC000)
        assert kept_as(wide.archive, sop_uid_of(content)) == content
        assert [each for each in wide.settings.spool_dir.rglob("*") if each.is_file()] == []
