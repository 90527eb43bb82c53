"""What really is in the archive after an upload, and that what was refused never got there."""

import struct
import zipfile
from collections.abc import AsyncIterator
from io import BytesIO
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.uid import generate_uid

from app.dicomweb import freshness
from app.intake.identity import FORMER_IDENTITY
from tests.images import ct_image
from tests.lightbox import Lightbox
from tests.live.conftest import Archive, Edged, audit_of, make_person, sample, unique

STUDY_TAG = 0x0020000D


def study_uid_of(content: bytes) -> str:
    return str(pydicom.dcmread(BytesIO(content), specific_tags=[STUDY_TAG]).StudyInstanceUID)


def with_nested_sequences(depth: int, patient_id: str) -> bytes:
    """A CT image with sequences inside sequences, none of them with a length.

    48 crash Orthanc 1.10.1, 300 overflow pydicom's stack: so it is written by hand.
    """
    opening = struct.pack("<HH2sHI", 0x0040, 0xA730, b"SQ", 0, 0xFFFFFFFF)
    opening += struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
    closing = struct.pack("<HHIHHI", 0xFFFE, 0xE00D, 0, 0xFFFE, 0xE0DD, 0)
    content = ct_image(patient_id=patient_id)
    pixels = content.rindex(struct.pack("<HH2s", 0x7FE0, 0x0010, b"OW"))
    return content[:pixels] + opening * depth + closing * depth + content[pixels:]


def zipped(**files: bytes) -> bytes:
    out = BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"{name}.dcm", content)
    return out.getvalue()


# ---------------------------------------------------------------------------------- coercion

COERCED = [
    pytest.param("CT_small.dcm", id="explicit"),
    pytest.param("MR_small_implicit.dcm", id="implicit"),
    pytest.param("MR_small_bigendian.dcm", id="big-endian"),
    pytest.param("image_dfl.dcm", id="deflated"),
    pytest.param("JPEG2000.dcm", id="jpeg-2000"),
    pytest.param("SC_rgb_rle_2frame.dcm", id="rle-2-frames"),
]


@pytest.mark.parametrize("name", COERCED)
async def test_coercion_rewrites_the_identity_and_nothing_else(
    live: Lightbox, archive: Archive, name: str
) -> None:
    """Read back from Orthanc: the patient's tags, the order's accession number, the same pixels."""
    person = await make_person(live)
    content = sample(name)
    answer = await live.upload(content, order_id=person.order["id"], coerce_patient="true")
    assert answer.status_code == 200, answer.text
    uploaded = answer.json()
    sent = pydicom.dcmread(BytesIO(content))
    stored = archive.image(uploaded["orthanc_instance_id"])
    assert stored.PatientID == person.mrn
    assert stored.PatientName == "Doe^Jane"
    assert stored.PatientBirthDate == "19800101"
    assert stored.PatientSex == "F"
    assert stored.AccessionNumber == person.order["accession_number"]
    assert stored.file_meta.TransferSyntaxUID == sent.file_meta.TransferSyntaxUID
    assert stored.PixelData == sent.PixelData
    rewritten = {
        "PatientID",
        "IssuerOfPatientID",
        "PatientName",
        "PatientBirthDate",
        "PatientSex",
        "AccessionNumber",
        "SpecificCharacterSet",
    }
    for keyword in set(sent.dir()) & set(FORMER_IDENTITY):
        assert stored[keyword].is_empty, keyword
    for element in sent:
        if element.keyword not in rewritten | set(FORMER_IDENTITY) and element.tag.element != 0:
            assert stored.get(element.tag) == element, element
    # The answer says what was there before, and so does the trail.
    before = {keyword: each["file"] for keyword, each in uploaded["coerced"].items()}
    assert before["PatientID"] == str(sent.get("PatientID", ""))
    (done,) = audit_of(
        await live.audit(study_instance_uid=sent.StudyInstanceUID), "study:coerce", "done"
    )
    assert done["detail"]["coerced"] == uploaded["coerced"]
    assert archive.owners(sent.StudyInstanceUID) == [person.mrn]
    await live.must("service", "DELETE", f"/dicom/studies/{sent.StudyInstanceUID}?reason=make+room")


async def test_what_agrees_is_stored_as_it_was_sent(live: Lightbox, archive: Archive) -> None:
    """Byte for byte, coerce or not."""
    person = await make_person(live)
    number = person.order["accession_number"]
    for coerce in ("false", "true"):
        content = ct_image(patient_id=person.mrn, AccessionNumber=number)
        answer = await live.upload(content, order_id=person.order["id"], coerce_patient=coerce)
        assert answer.json()["coerced"] == {}
        assert archive.file(answer.json()["orthanc_instance_id"]) == content


async def test_the_accession_number_is_filled_and_checked(live: Lightbox, archive: Archive) -> None:
    person = await make_person(live)
    order_id, number = person.order["id"], person.order["accession_number"]
    filled = await live.upload(
        ct_image(patient_id=person.mrn), order_id=order_id, coerce_patient="true"
    )
    assert list(filled.json()["coerced"]) == ["AccessionNumber"]
    assert archive.image(filled.json()["orthanc_instance_id"]).AccessionNumber == number
    kept = await live.upload(ct_image(patient_id=person.mrn), order_id=order_id)
    assert archive.image(kept.json()["orthanc_instance_id"]).AccessionNumber == ""
    other = ct_image(patient_id=person.mrn, AccessionNumber="OTHER")
    refused = await live.upload(other, order_id=order_id)
    assert refused.status_code == 409
    assert {"OTHER", number} == set(refused.json()["differences"]["AccessionNumber"].values())
    assert archive.find(study_uid_of(other)) == []


async def test_only_who_may_change_identities_coerces(live: Lightbox, archive: Archive) -> None:
    person = await make_person(live)
    content = ct_image(patient_id="SOMEBODY-ELSE")
    for role in ("service", "clinician", "admin", "auditor"):
        answer = await live.upload(
            content, role=role, order_id=person.order["id"], coerce_patient="true"
        )
        assert answer.status_code == 403, role
    assert archive.find(study_uid_of(content)) == []


# ---------------------------------------------------------------------------------- refusals

REFUSED: list[Any] = [
    pytest.param(lambda mrn: b"This is no DICOM file. " * 100, 415, id="text"),
    pytest.param(lambda mrn: b"", 415, id="empty"),
    pytest.param(lambda mrn: ct_image(patient_id=mrn)[:-100], 422, id="truncated-pixels"),
    pytest.param(lambda mrn: ct_image(patient_id=mrn)[:700], 422, id="truncated-header"),
    pytest.param(lambda mrn: ct_image(patient_id=mrn)[:140], 422, id="truncated-meta"),
    pytest.param(lambda mrn: with_nested_sequences(17, mrn), 422, id="17-nested"),
    pytest.param(lambda mrn: with_nested_sequences(48, mrn), 422, id="48-nested"),
    pytest.param(lambda mrn: with_nested_sequences(300, mrn), 422, id="300-nested"),
    pytest.param(lambda mrn: with_nested_sequences(50_000, mrn), 422, id="50000-nested"),
    pytest.param(
        lambda mrn: ct_image(patient_id=mrn, PixelData=bytes(9 << 20), Rows=2304, Columns=2048),
        413,
        id="oversized",
    ),
    pytest.param(lambda mrn: ct_image(patient_id="SOMEBODY-ELSE"), 409, id="another-patient"),
    pytest.param(lambda mrn: ct_image(patient_id=mrn, PatientID=None), 409, id="no-patient"),
    pytest.param(lambda mrn: ct_image(patient_id=mrn, StudyInstanceUID=None), 422, id="no-study"),
    pytest.param(
        lambda mrn: ct_image(patient_id=mrn).replace(b"20250102", b"20251399"),
        422,
        id="impossible-date",
    ),
]


@pytest.mark.parametrize(("make", "status"), REFUSED)
async def test_what_is_refused_never_reaches_the_archive(
    live: Lightbox, archive: Archive, make: Any, status: int
) -> None:
    """One by one, among others, and inside a ZIP: a reason, nothing stored, everybody alive."""
    person = await make_person(live)
    content = make(person.mrn)
    before = archive.ask("GET", "/statistics").json()["CountInstances"]
    answer = await live.upload(content, order_id=person.order["id"])
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert len(answer.json()["detail"]) > 20
    good = ct_image(patient_id=person.mrn)
    several = await live.ask(
        "technologist",
        "POST",
        "/api/v1/dicom/upload-multiple",
        files=[("files", ("bad.dcm", content)), ("files", ("good.dcm", good))],
        data={"order_id": person.order["id"]},
    )
    if status == 413:
        assert several.status_code == 413, several.text
    else:
        bad, fine = several.json()["results"]
        assert (bad["error_status"], fine["status"]) == (status, "uploaded")
        packed = await live.ask(
            "technologist",
            "POST",
            "/api/v1/dicom/upload-multiple",
            files=[("files", ("all.zip", zipped(bad=content, good=good)))],
            data={"order_id": person.order["id"]},
        )
        bad, fine = packed.json()["results"]
        assert (bad["error_status"], fine["status"]) == (status, "duplicate")
        before += 1
    assert archive.alive()
    assert archive.ask("GET", "/statistics").json()["CountInstances"] == before


EARLY = [
    # role, size of the file in MiB, is its length said in advance
    pytest.param("technologist", 9, True, 413, id="just-too-large"),
    pytest.param("technologist", 200, True, 413, id="far-too-large"),
    pytest.param("technologist", 200, False, 413, id="too-large-chunked"),
    pytest.param(None, 200, True, 401, id="no-token"),
    pytest.param(None, 200, False, 401, id="no-token-chunked"),
    pytest.param("clinician", 200, True, 403, id="no-right"),
]


@pytest.mark.parametrize(("role", "mebibytes", "length", "status"), EARLY)
async def test_an_answer_before_the_end_of_the_body_arrives(
    through_edge: Edged, role: str | None, mebibytes: int, length: bool, status: int
) -> None:
    """Through nginx, to a sender who is still sending: the reason, not a broken connection."""
    boundary = "----lightbox"
    head = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="a.dcm"\r\n\r\n'
    ).encode()
    tail = f"\r\n--{boundary}--\r\n".encode()

    async def body() -> AsyncIterator[bytes]:
        yield head
        for _ in range(mebibytes):
            yield bytes(1 << 20)
        yield tail

    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    if length:
        headers["Content-Length"] = str(len(head) + (mebibytes << 20) + len(tail))
    answer = await through_edge.ask(
        role, "POST", "/api/v1/dicom/upload", content=body(), headers=headers
    )
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["detail"]


@pytest.mark.parametrize("depth", [17, 48, 300, 50_000])
async def test_a_nested_file_reaches_no_parser_by_any_route(
    live: Lightbox, archive: Archive, depth: int
) -> None:
    crafted = with_nested_sequences(depth, "MRN")
    for path, fields in (("read-tags", {}), ("modify-tags", {"tags": '{"PatientID": "X"}'})):
        answer = await live.ask(
            "technologist",
            "POST",
            f"/api/v1/dicom/{path}",
            files={"file": ("crafted.dcm", crafted)},
            data=fields,
        )
        assert answer.status_code == 422, answer.text
        assert "sequence" in answer.json()["detail"]
    assert archive.alive()


async def test_as_deep_as_allowed_is_stored_and_shown(live: Lightbox, archive: Archive) -> None:
    """The bound is no tighter than it says."""
    person = await make_person(live)
    answer = await live.upload(with_nested_sequences(16, person.mrn), order_id=person.order["id"])
    assert answer.status_code == 200, answer.text
    opened = await live.open(f"/order/{person.order['id']}")
    study, series = answer.json()["study_instance_uid"], answer.json()["series_instance_uid"]
    metadata = await opened.get(f"/studies/{study}/series/{series}/metadata")
    assert len(metadata.json()) == 1


# --------------------------------------------------------------------------- planted instances


async def test_an_instance_planted_under_a_known_study_is_shown_to_nobody(
    live: Lightbox, archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A modality stores another patient under our StudyInstanceUID, past every check of ours."""
    monkeypatch.setattr(freshness, "FRESH_SECONDS", 0.0)
    person = await make_person(live)
    uploaded = (
        await live.upload(ct_image(patient_id=person.mrn), order_id=person.order["id"])
    ).json()
    study, series = uploaded["study_instance_uid"], uploaded["series_instance_uid"]
    opened = await live.open(f"/order/{person.order['id']}")
    victim = unique("VICTIM")
    planted_sop = str(generate_uid(None))
    planted_series = str(generate_uid(None))
    for series_uid, sop in ((series, planted_sop), (planted_series, str(generate_uid(None)))):
        archive.store(
            ct_image(
                patient_id=victim,
                study_uid=study,
                series_uid=series_uid,
                sop_uid=sop,
                PatientName="Victim^Vera",
            )
        )
    assert archive.owners(study) == sorted([person.mrn, victim])

    more = await live.upload(
        ct_image(patient_id=person.mrn, study_uid=study), order_id=person.order["id"]
    )
    assert more.status_code == 409
    for subject in (study, f"order/{person.order['id']}", f"patient/{person.patient['id']}"):
        link = await live.ask("clinician", "GET", f"/api/v1/dicom/viewer/url/{subject}")
        assert link.status_code == 409, subject
        assert victim not in link.text

    # A viewer that was open before gets no more of the study, and never the planted images.
    base = f"/studies/{study}"
    metadata = await opened.get(f"{base}/series/{series}/metadata")
    assert metadata.status_code == 409
    assert victim not in metadata.text
    assert "Vera" not in metadata.text
    assert planted_sop not in metadata.text
    assert planted_series not in (await opened.get(f"{base}/series")).text
    for path, status in (
        (f"{base}/series/{planted_series}/metadata", 409),  # as all of the study's
        (f"{base}/series/{series}/instances/{planted_sop}/frames/1", 404),
        (f"{base}/series/{series}/instances/{planted_sop}/rendered", 404),
        (f"{base}/series/{planted_series}/instances/{planted_sop}/frames/1", 404),
    ):
        answer = await opened.get(path)
        assert answer.status_code == status, path
        assert victim not in answer.text
        assert "x-accel-redirect" not in answer.headers
    ours = await opened.get(
        f"{base}/series/{series}/instances/{uploaded['sop_instance_uid']}/frames/1"
    )
    # Nor ours, until a human has decided whose study it is.
    assert ours.status_code == 409
    assert "x-accel-redirect" not in ours.headers
    # A human removes it there, and all is well again.
    for each in archive.find(study):
        if each["Type"] == "Study":
            patient = archive.ask("GET", f"/studies/{each['ID']}/patient").json()
            if patient["MainDicomTags"]["PatientID"] == victim:
                archive.ask("DELETE", f"/studies/{each['ID']}")
    link = await live.ask("clinician", "GET", f"/api/v1/dicom/viewer/url/{study}")
    assert link.status_code == 200, link.text


async def test_what_came_in_past_the_checks_under_our_patient_is_not_shown_either(
    live: Lightbox, archive: Archive
) -> None:
    """The same PatientID proves nothing: two sites' PAT1 are one to Orthanc."""
    person = await make_person(live)
    uploaded = (
        await live.upload(ct_image(patient_id=person.mrn), order_id=person.order["id"])
    ).json()
    study, series = uploaded["study_instance_uid"], uploaded["series_instance_uid"]
    planted = str(generate_uid(None))
    archive.store(
        ct_image(patient_id=person.mrn, study_uid=study, series_uid=series, sop_uid=planted)
    )
    opened = await live.open(f"/order/{person.order['id']}")
    (row,) = (await opened.get(f"/studies/{study}/series/{series}/metadata")).json()
    assert row["00080018"]["Value"] == [uploaded["sop_instance_uid"]]
    path = f"/studies/{study}/series/{series}/instances/{planted}/frames/1"
    assert (await opened.get(path)).status_code == 404


async def test_a_study_that_is_another_patients_in_the_archive_only(
    live: Lightbox, archive: Archive
) -> None:
    """Orthanc was filled before Lightbox came: its studies are nobody's until somebody decides."""
    person = await make_person(live)
    legacy = ct_image(patient_id=unique("LEGACY"))
    archive.store(legacy)
    study = study_uid_of(legacy)
    answer = await live.upload(
        ct_image(patient_id=person.mrn, study_uid=study), order_id=person.order["id"]
    )
    assert answer.status_code == 409
    assert "LEGACY" not in answer.text
    found = await live.ask("clinician", "GET", f"/api/v1/dicom/studies/{study}")
    assert found.status_code == 404


async def test_the_pixels_of_a_coerced_image_are_the_pixels_of_the_sent_one(
    live: Lightbox, archive: Archive
) -> None:
    """Decoded, not only as bytes: the elements that say how to read them were left alone."""
    person = await make_person(live)
    content = sample("SC_rgb_small_odd.dcm")
    answer = await live.upload(content, order_id=person.order["id"], coerce_patient="true")
    stored = archive.image(answer.json()["orthanc_instance_id"])
    sent = pydicom.dcmread(BytesIO(content))
    np.testing.assert_array_equal(stored.pixel_array, sent.pixel_array)
    uid = answer.json()["study_instance_uid"]
    await live.must("service", "DELETE", f"/dicom/studies/{uid}?reason=make+room")
