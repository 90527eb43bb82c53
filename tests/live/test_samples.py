"""Real files of many makers and modalities, broken ones too: taken and shown, or refused in words.

The samples are no part of the repository. They are looked for in LIGHTBOX_DICOM_SAMPLES, else in
`shared/dicom` beside it.
"""

import os
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pydicom
import pytest

from app.demo.stack import REPOSITORY
from app.dicom import orthanc_id
from tests.lightbox import Opened
from tests.live.conftest import Edged, Full, make_person, stored_frame, unique

SAMPLES = Path(os.environ.get("LIGHTBOX_DICOM_SAMPLES") or REPOSITORY.parent / "shared" / "dicom")

pytestmark = pytest.mark.skipif(
    not SAMPLES.is_dir(), reason="needs DICOM samples; name their folder in LIGHTBOX_DICOM_SAMPLES"
)


@dataclass
class Sent:
    """A sample, and what became of it."""

    name: str
    content: bytes
    status: int = 0
    answer: Any = None
    seen: str = ""  # of an accepted one: "pixels", "no pixels", or the status of its first frame

    @property
    def folder(self) -> str:
        return self.name.partition("/")[0]

    @property
    def study(self) -> str:
        return str(self.answer["study_instance_uid"])

    @property
    def series_path(self) -> str:
        return f"/studies/{self.study}/series/{self.answer['series_instance_uid']}"

    @property
    def frame_path(self) -> str:
        return f"{self.series_path}/instances/{self.answer['sop_instance_uid']}/frames/1"


def samples() -> list[Sent]:
    """Every file of the folder, without what describes it."""
    return [
        Sent(str(path.relative_to(SAMPLES)), path.read_bytes())
        for path in sorted(SAMPLES.rglob("*"))
        if path.is_file() and path.name not in ("MANIFEST.csv", "README.md")
    ]


def differs(content: bytes, frame: bytes) -> bool:
    """Is it surely not the first frame that pydicom reads from the file?"""
    try:
        return frame != stored_frame(content, 1)[0]
    except (AssertionError, AttributeError, OSError, TypeError, ValueError):
        return False  # big endian, or broken in a way that pydicom doesn't forgive


def table(sent: list[Sent]) -> str:
    """How many of each folder got which status, and what was to be seen of the accepted."""
    rows: dict[str, Counter[str]] = defaultdict(Counter)
    for each in sent:
        rows[each.folder][str(each.status)] += 1
        if each.seen:
            rows[each.folder][each.seen] += 1
    columns = sorted({key for row in rows.values() for key in row})
    total: Counter[str] = sum(rows.values(), Counter())
    lines = ["".join(f"{text:>12}" for text in ("", *columns))]
    for folder, row in [*sorted(rows.items()), ("all", total)]:
        lines.append(f"{folder:>12}" + "".join(f"{row[key] or '':>12}" for key in columns))
    return "\n".join(lines)


async def send(through_edge: Edged, order_id: str, each: Sent) -> None:
    answer = await through_edge.upload(each.content, order_id=order_id, coerce_patient="true")
    each.status, each.answer = answer.status_code, answer.json()
    assert each.status in (200, 409, 413, 415, 422), (each.name, answer.text)
    if each.status != 200:
        assert answer.headers["content-type"] == "application/problem+json"
        assert len(each.answer["detail"]) > 20, each.name


async def look(opened: Opened, accepted: list[Sent], mrn: str) -> None:
    """Each accepted sample's metadata, and its first frame or a reason why there is none."""
    metadata: dict[str, dict[str, Any]] = {}
    for each in accepted:
        if each.series_path not in metadata:
            answer = await opened.get(f"{each.series_path}/metadata")
            assert answer.status_code == 200, (each.name, answer.text)
            rows = {row["00080018"]["Value"][0]: row for row in answer.json()}
            metadata[each.series_path] = rows
        row = metadata[each.series_path][each.answer["sop_instance_uid"]]
        assert row["00100020"]["Value"] == [mrn], each.name
        frame = await opened.get(each.frame_path)
        if frame.status_code == 200:
            assert frame.content, each.name
            assert not differs(each.content, frame.content), each.name
            each.seen = "pixels"
        else:
            assert frame.status_code in (404, 503), each.name
            assert frame.headers["content-type"] == "application/problem+json", each.name
            is_image = "00280010" in row  # Rows
            each.seen = f"frame {frame.status_code}" if is_image else "no pixels"


# The samples are broken on purpose, and pydicom says so.
@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
async def test_every_sample_is_taken_or_refused_in_words(
    through_edge: Edged, full: Full, capsys: pytest.CaptureFixture[str]
) -> None:
    """All to one order, their identity rewritten; then each accepted one is looked at.

    Samples that share a SOPInstanceUID wait for the next round, when the first are deleted.
    """
    person = await make_person(through_edge)
    everything = samples()
    waiting, accepted = everything, everything
    while waiting and accepted:
        for each in waiting:
            await send(through_edge, person.order["id"], each)
        accepted = [each for each in waiting if each.status == 200]
        waiting = [each for each in waiting if each.status == 409]
        if accepted:
            studies = {each.study for each in accepted}
            opened = await through_edge.open(f"/order/{person.order['id']}")
            rows = (await opened.get("/studies?limit=1000")).json()
            assert {row["0020000D"]["Value"][0] for row in rows} == studies
            await look(opened, accepted, person.mrn)
            for study in studies:
                path = f"/dicom/studies/{study}?reason=next+round"
                await through_edge.must("service", "DELETE", path)
        assert full.archive.alive()
    with capsys.disabled():
        print("\n" + table(everything))
        for each in everything:
            if each.status != 200 or each.seen.startswith("frame"):
                said = each.seen or each.answer["detail"]
                print(f"{each.status} {each.name}: {said}")
    assert len([each for each in everything if each.status == 200]) > len(everything) // 2


async def test_a_stale_file_meta_is_warned_of_and_harmless(through_edge: Edged, full: Full) -> None:
    """De-identifiers leave the old UID in the file meta; the dataset alone says what it is.

    Sent without coerce, so that what Orthanc files is what the sender wrote.
    """
    files = sorted((SAMPLES / "ct" / "series_lymphoma").glob("*.dcm"))
    assert len(files) == 11
    mrn = str(pydicom.dcmread(files[0], stop_before_pixels=True).PatientID)
    patient = await through_edge.patient(mrn)
    # The samples' own number; an issuer of its own makes it this order's.
    order = await through_edge.order(
        patient, accession_number="1", accession_issuer=unique("issuer")
    )
    studies = set()
    for path in files:
        content = path.read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            image = pydicom.dcmread(BytesIO(content))
        answer = await through_edge.upload(content, order_id=order["id"])
        assert answer.status_code == 200, answer.text
        uploaded = answer.json()
        assert image.file_meta.MediaStorageSOPInstanceUID != image.SOPInstanceUID
        assert any("file meta" in warning for warning in uploaded["warnings"])
        parts = [mrn, image.StudyInstanceUID, image.SeriesInstanceUID, image.SOPInstanceUID]
        assert uploaded["sop_instance_uid"] == image.SOPInstanceUID
        assert uploaded["orthanc_instance_id"] == orthanc_id(*parts)
        assert uploaded["orthanc_study_id"] == orthanc_id(*parts[:2])
        assert full.archive.file(uploaded["orthanc_instance_id"]) == content
        studies.add(image.StudyInstanceUID)
    (study,) = studies
    (found,) = await through_edge.must("clinician", "GET", f"/dicom/studies/order/{order['id']}")
    assert found["StudyInstanceUID"] == study
    assert found["NumberOfStudyRelatedInstances"] == 11
    await through_edge.must("service", "DELETE", f"/dicom/studies/{study}?reason=make+room")
