"""Copies of studies with another patient's identifiers: what refers to what, and what is linked.

The fake Orthanc stands for the archive. `tests/live/test_coercion_killed.py` kills the app in the
middle.
"""

from collections.abc import AsyncIterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import pydicom
import pytest
from pydicom import Dataset
from pydicom.uid import (
    ComprehensiveSRStorage,
    ImplicitVRLittleEndian,
    SegmentationStorage,
    generate_uid,
)

from app.arrivals.references import following, renumbered
from app.dicom import Limits, scan
from tests.contract.test_reconciliation import arrive, decide, one, orthanc_id, similar
from tests.fake_orthanc import URL, FakeOrthanc
from tests.images import ct_image
from tests.lightbox import Lightbox, make_settings, running

STUDY, SERIES, ELSEWHERE = "1.2.3.4", "1.2.3.4.5", "1.2.3.9.9"
IMAGES = ("1.2.3.4.5.1", "1.2.3.4.5.2")


@pytest.fixture(params=["keep", "remove"])
async def lightbox(
    request: pytest.FixtureRequest, sqlite_url: str, fake_orthanc: FakeOrthanc, tmp_path: Path
) -> AsyncIterator[Lightbox]:
    settings = make_settings(
        sqlite_url, URL, spool_dir=tmp_path, reconciliation_original=request.param
    )
    async with running(settings) as each:
        yield each


def slices() -> list[bytes]:
    return [
        similar(study_uid=STUDY, series_uid=SERIES, sop_uid=uid, InstanceNumber=number)
        for number, uid in enumerate(IMAGES, 1)
    ]


def reference(uid: str) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    item.ReferencedSOPInstanceUID = uid
    return item


def segmentation() -> bytes:
    """References as PS3.3 C.12.4 and the functional groups have them: by frame, and by series."""
    series = Dataset()
    series.SeriesInstanceUID = SERIES
    series.ReferencedInstanceSequence = [reference(each) for each in (*IMAGES, ELSEWHERE)]
    frames = []
    for uid in IMAGES:
        derived, frame = Dataset(), Dataset()
        derived.DerivationDescription = "Überlagert"
        derived.SourceImageSequence = [reference(uid)]
        frame.DerivationImageSequence = [derived]
        frames.append(frame)
    return similar(
        study_uid=STUDY,
        SOPClassUID=SegmentationStorage,
        Modality="SEG",
        SpecificCharacterSet="ISO_IR 192",
        FrameOfReferenceUID="1.2.3.4.77",
        ReferencedSeriesSequence=[series],
        PerFrameFunctionalGroupsSequence=frames,
    )


def report() -> bytes:
    """Evidence, and an item of the content tree (PS3.3 C.17.2.1, C.18.4)."""
    evidence, series, item = Dataset(), Dataset(), Dataset()
    series.SeriesInstanceUID = SERIES
    series.ReferencedSOPSequence = [reference(each) for each in IMAGES]
    evidence.StudyInstanceUID = STUDY
    evidence.ReferencedSeriesSequence = [series]
    item.RelationshipType, item.ValueType = "CONTAINS", "IMAGE"
    item.ReferencedSOPSequence = [reference(IMAGES[0])]
    named = Dataset()
    named.RelationshipType, named.ValueType, named.UID = "CONTAINS", "UIDREF", SERIES
    return similar(
        study_uid=STUDY,
        SOPClassUID=ComprehensiveSRStorage,
        Modality="SR",
        CurrentRequestedProcedureEvidenceSequence=[evidence],
        ContentSequence=[item, named],
    )


def uids_of(dataset: Dataset) -> set[str]:
    """All UIDs at any depth, but for what says what was before."""
    found: set[str] = set()
    for each in dataset:
        if each.keyword == "OriginalAttributesSequence":
            continue
        if each.VR == "SQ":
            found |= {uid for item in each.value for uid in uids_of(item)}
        elif each.VR == "UI":
            found |= {str(uid) for uid in ([each.value] if each.VM == 1 else each.value)}
    return found


async def coerced(
    lightbox: Lightbox, fake: FakeOrthanc, *files: bytes
) -> tuple[Any, str, dict[str, Any]]:
    """The patient, the copy's StudyInstanceUID, and what was confirmed."""
    patient = await lightbox.patient()
    order = await lightbox.order(patient)
    uid = await arrive(lightbox, fake, *files)
    body = {"order_id": order["id"], "version": (await one(lightbox, uid))["version"]}
    answer = await decide(lightbox, uid, "confirm", **body, coerce=True)
    assert answer.status_code == 200, answer.text
    return patient, answer.json()["study_instance_uid"], body


def stored(fake: FakeOrthanc, uid: str) -> list[bytes]:
    return [fake.bodies[key] for key, x in fake.instances.items() if x.StudyInstanceUID == uid]


async def test_references_between_the_images_follow_the_copy(
    lightbox: Lightbox, fake_orthanc: FakeOrthanc
) -> None:
    files = [*slices(), segmentation(), report()]
    patient, copy, _ = await coerced(lightbox, fake_orthanc, *files)
    made = [pydicom.dcmread(BytesIO(each)) for each in stored(fake_orthanc, copy)]
    assert sorted(each.Modality for each in made) == ["CT", "CT", "SEG", "SR"]
    new = {uid: renumbered(patient["id"], uid) for uid in (STUDY, SERIES, *IMAGES)}
    named = {each.Modality: uids_of(each) for each in made if each.Modality != "CT"}
    assert {each.SOPInstanceUID for each in made if each.Modality == "CT"} == {
        new[each] for each in IMAGES
    }
    for found in named.values():
        assert found >= set(new.values())
        assert not found & set(new)
    # What is not of the study stays: another study's image, the frame of reference.
    assert named["SEG"] >= {ELSEWHERE, "1.2.3.4.77"}
    (segmented,) = [each for each in made if each.Modality == "SEG"]
    frame = segmented.PerFrameFunctionalGroupsSequence[1].DerivationImageSequence[0]
    assert frame.DerivationDescription == "Überlagert"
    assert frame.SourceImageSequence[0].ReferencedSOPInstanceUID == new[IMAGES[1]]
    was = segmented.OriginalAttributesSequence[0].ModifiedAttributesSequence[0]
    assert (was.StudyInstanceUID, was.PatientID) == (STUDY, "MRN-l")


async def test_the_original_is_kept_or_removed_as_the_setting_says(
    lightbox: Lightbox, fake_orthanc: FakeOrthanc
) -> None:
    files = slices()
    _, copy, _ = await coerced(lightbox, fake_orthanc, *files)
    keeps = lightbox.settings.reconciliation_original == "keep"
    assert sorted(stored(fake_orthanc, STUDY)) == (sorted(files) if keeps else [])
    assert len(stored(fake_orthanc, copy)) == 2
    (record,) = await lightbox.audit(action="study:coerce", outcome="done")
    assert record["detail"]["original"]["kept"] is keeps


@pytest.mark.parametrize("lightbox", ["remove"], indirect=True)
async def test_a_removal_that_fails_is_made_up_for_and_takes_what_was_copied_alone(
    lightbox: Lightbox, fake_orthanc: FakeOrthanc
) -> None:
    first = slices()[0]
    instance = fake_orthanc._store(first).json()["ID"]
    fake_orthanc.faults_at[f"/instances/{instance}"] = httpx.ConnectError("gone")
    _, copy, _ = await coerced(lightbox, fake_orthanc, *slices())
    assert first in stored(fake_orthanc, STUDY)
    late = similar(study_uid=STUDY, series_uid=SERIES, InstanceNumber=3)
    fake_orthanc._store(late)
    del fake_orthanc.faults_at[f"/instances/{instance}"]
    await lightbox.app.state.follower.tidy()
    assert stored(fake_orthanc, STUDY) == [late]
    assert len(stored(fake_orthanc, copy)) == 2


@pytest.mark.parametrize("lightbox", ["remove"], indirect=True)
async def test_a_removal_after_the_link_was_undone_is_none(
    lightbox: Lightbox, fake_orthanc: FakeOrthanc
) -> None:
    instance = fake_orthanc._store(slices()[0]).json()["ID"]
    fake_orthanc.faults_at[f"/instances/{instance}"] = httpx.ConnectError("gone")
    _, copy, _ = await coerced(lightbox, fake_orthanc, *slices())
    row = await one(lightbox, copy)
    answer = await decide(lightbox, copy, "undo", reason="wrong", version=row["version"])
    assert answer.status_code == 200, answer.text
    left = stored(fake_orthanc, STUDY)
    del fake_orthanc.faults_at[f"/instances/{instance}"]
    await lightbox.app.state.follower.tidy()
    assert left == stored(fake_orthanc, STUDY) != []


@pytest.mark.parametrize("lightbox", ["keep"], indirect=True)
async def test_of_the_same_images_one_study_is_linked(
    lightbox: Lightbox, fake_orthanc: FakeOrthanc
) -> None:
    """Not the original beside its copy, not a copy for somebody else beside the first."""
    patient, copy, body = await coerced(lightbox, fake_orthanc, *slices())
    other = await lightbox.patient("MRN-2")
    await lightbox.order(other)
    before = dict(fake_orthanc.bodies)
    row = await one(lightbox, STUDY)
    assert row["state"] == "rejected"
    for whom in ({"order_id": body["order_id"]}, {"patient_id": other["id"]}):
        answer = await decide(
            lightbox, STUDY, "confirm", **whom, version=row["version"], coerce=True
        )
        assert (answer.status_code, copy in answer.json()["detail"]) == (409, True), answer.text
    answer = await decide(lightbox, STUDY, "reject", reason="nobody's", version=row["version"])
    assert answer.status_code == 409
    assert fake_orthanc.bodies == before
    # Undone, the original may go to the other; and then the first copy to nobody.
    linked = await one(lightbox, copy)
    answer = await decide(lightbox, copy, "undo", reason="wrong", version=linked["version"])
    assert answer.status_code == 200, answer.text
    answer = await decide(
        *(lightbox, STUDY, "confirm"),
        patient_id=other["id"],
        version=row["version"],
        coerce=True,
    )
    assert answer.status_code == 200, answer.text
    second = answer.json()["study_instance_uid"]
    undone = await one(lightbox, copy)
    answer = await decide(
        lightbox, copy, "confirm", patient_id=patient["id"], version=undone["version"]
    )
    assert (answer.status_code, second in answer.json()["detail"]) == (409, True), answer.text


async def test_what_arrives_while_the_copy_is_made_is_not_left_out(
    lightbox: Lightbox, fake_orthanc: FakeOrthanc, monkeypatch: pytest.MonkeyPatch
) -> None:
    orthanc = lightbox.app.state.orthanc
    store, late = orthanc.store, similar(study_uid=STUDY, series_uid=SERIES, InstanceNumber=3)

    async def storing(*args: Any) -> Any:
        fake_orthanc._store(late)
        return await store(*args)

    patient = await lightbox.patient()
    await lightbox.order(patient)
    uid = await arrive(lightbox, fake_orthanc, *slices())
    monkeypatch.setattr(orthanc, "store", storing)
    body = {"patient_id": patient["id"], "coerce": True}
    version = (await one(lightbox, uid))["version"]
    answer = await decide(lightbox, uid, "confirm", version=version, **body)
    assert answer.status_code == 409
    assert len(stored(fake_orthanc, STUDY)) == len(fake_orthanc.bodies) == 3
    row = await one(lightbox, uid)
    assert row["state"] == "proposed"
    monkeypatch.undo()
    answer = await decide(lightbox, uid, "confirm", version=row["version"], **body)
    assert answer.status_code == 200, answer.text
    assert len(stored(fake_orthanc, answer.json()["study_instance_uid"])) == 3


async def test_a_copy_that_is_not_finished_is_nobodys_to_decide_about(
    lightbox: Lightbox, fake_orthanc: FakeOrthanc, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient = await lightbox.patient()
    await lightbox.order(patient)
    uid = await arrive(lightbox, fake_orthanc, *slices())
    orthanc, tried = lightbox.app.state.orthanc, []
    store = orthanc.store
    copy = renumbered(patient["id"], STUDY)

    async def storing(*args: Any) -> Any:
        found = await store(*args)
        await lightbox.app.state.follower.tidy()  # takes nothing away that is being made
        row = await one(lightbox, uid)
        body = {"patient_id": patient["id"], "version": row["version"], "coerce": True}
        for which, what in ((copy, {**body, "version": 1}), (uid, body)):
            tried.append(await decide(lightbox, which, "confirm", role="technologist", **what))
        return found

    monkeypatch.setattr(orthanc, "store", storing)
    version = (await one(lightbox, uid))["version"]
    answer = await decide(
        lightbox, uid, "confirm", patient_id=patient["id"], version=version, coerce=True
    )
    assert answer.status_code == 200, answer.text
    assert [each.status_code for each in tried] == [404, 409] * 2
    assert "radiologist is making a copy" in tried[1].json()["detail"]
    assert orthanc_id(fake_orthanc, copy)
    assert len(stored(fake_orthanc, copy)) == 2


# ----------------------------------------------------------------------------- by the byte


@pytest.mark.parametrize("syntax", ["explicit", "implicit"])
def test_only_the_uids_are_other_bytes(syntax: str) -> None:
    image = pydicom.dcmread(BytesIO(segmentation()))
    derived = image.PerFrameFunctionalGroupsSequence[0].DerivationImageSequence[0]
    private = derived.private_block(0x0009, "SOMEBODY", create=True)
    private.add_new(0x01, "LO", "grün")
    private.add_new(0x02, "OB", bytes(range(256)))
    derived.add_new("SmallestImagePixelValue", "US", 7)  # or SS: by the pixels alone
    out = BytesIO()
    if syntax == "implicit":
        image.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
        image.save_as(out, implicit_vr=True, little_endian=True, enforce_file_format=True)
    else:
        image.save_as(out)
    new = {uid: uid.replace("1.2.3.4", "9.8.7.6") for uid in (SERIES, *IMAGES)}  # as long
    with scan(out, Limits(1 << 20)) as scanned:
        found = following(out, scanned, new)
        content = out.getvalue()
        for tag, after in found.items():
            element = scanned.element(tag)
            assert element is not None
            before = content[element.header : element.end]
            for uid in sorted(new, key=len, reverse=True):
                before = before.replace(uid.encode(), new[uid].encode())
            assert after == before
    assert set(found) == {0x00081115, 0x52009230}


def test_a_file_without_references_keeps_its_bytes() -> None:
    out = BytesIO(ct_image(study_uid=STUDY, FrameOfReferenceUID="1.2.3.4.77"))
    with scan(out, Limits(1 << 20)) as scanned:
        assert following(out, scanned, {generate_uid(None): "1.2"}) == {}
