"""The demo's synthetic CT: valid, plainly synthetic, the same each time, worth scrolling."""

from datetime import datetime
from io import BytesIO
from itertools import pairwise
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileDataset
from pydicom.uid import UID, CTImageStorage

from app.demo.canvas import FIELD_MM, HEIGHT_MM
from app.demo.synthetic import ct_series, to_bytes

STUDY = "1.2.826.0.1.3680043.10.999.1"

# Type 1 and type 2 of the CT Image IOD's mandatory modules (PS3.3 A.3.3).
TYPE_1 = (
    "SOPClassUID SOPInstanceUID StudyInstanceUID SeriesInstanceUID FrameOfReferenceUID Modality "
    "ImageType SamplesPerPixel PhotometricInterpretation Rows Columns BitsAllocated BitsStored "
    "HighBit PixelRepresentation PixelSpacing ImageOrientationPatient ImagePositionPatient "
    "RescaleIntercept RescaleSlope PixelData"
).split()
TYPE_2 = (
    "PatientName PatientID PatientBirthDate PatientSex StudyDate StudyTime StudyID AccessionNumber "
    "ReferringPhysicianName SeriesNumber PatientPosition PositionReferenceIndicator Manufacturer "
    "InstanceNumber SliceThickness KVP AcquisitionNumber ContrastBolusAgent"
).split()


def series(**changes: Any) -> list[FileDataset]:
    given: dict[str, Any] = {
        "patient_id": "MRN-1",
        "patient_name": "Müller^Anna",
        "birth_date": "19700131",
        "sex": "F",
        "study_instance_uid": STUDY,
        "accession_number": "A-1",
        "slices": 7,
        "size": 96,
    }
    return list(ct_series(**{**given, **changes}))


def test_a_file_says_whose_it_is_and_that_it_is_synthetic() -> None:
    made = series(
        issuer_of_patient_id="HOSPITAL",
        series_instance_uid="1.2.3",
        acquired=datetime(2026, 5, 4, 3, 2, 1),
    )
    for image in (pydicom.dcmread(BytesIO(to_bytes(i))) for i in made):
        assert (image.PatientID, image.IssuerOfPatientID) == ("MRN-1", "HOSPITAL")
        assert str(image.PatientName) == "Müller^Anna"
        assert (image.StudyInstanceUID, image.SeriesInstanceUID) == (STUDY, "1.2.3")
        assert image.AccessionNumber == "A-1"
        assert (image.StudyDate, image.StudyTime) == ("20260504", "030201")
        assert image.SOPClassUID == image.file_meta.MediaStorageSOPClassUID == CTImageStorage
        assert "SYNTHETIC" in image.SeriesDescription
        assert "no real person" in image.ImageComments


@pytest.mark.parametrize("slices", [1, 7])
def test_every_required_attribute_is_there(slices: int) -> None:
    with pydicom.config.disable_value_validation():
        made = [pydicom.dcmread(BytesIO(to_bytes(i))) for i in series(slices=slices, size=100)]
    for image in made:
        assert [k for k in TYPE_1 if k not in image or image[k].is_empty] == []
        assert [k for k in TYPE_2 if k not in image] == []
        for element in image:
            if element.VR == "DS" and not element.is_empty:
                texts = str(element.value).strip("[]").split(", ")
                assert all(len(text) <= 16 for text in texts), element
        for uid in (image.SOPInstanceUID, image.SeriesInstanceUID, image.FrameOfReferenceUID):
            assert UID(uid).is_valid


def test_slices_stand_where_their_position_says() -> None:
    made = series()
    heights = [float(image.ImagePositionPatient[2]) for image in made]
    thickness = float(made[0].SliceThickness)
    assert heights[0] > heights[-1]
    assert [a - b for a, b in pairwise(heights)] == pytest.approx([thickness] * 6, abs=1e-4)
    assert thickness * len(made) == pytest.approx(HEIGHT_MM, abs=1e-4)
    assert float(made[0].PixelSpacing[0]) * 96 == pytest.approx(FIELD_MM, abs=1e-3)
    assert len({image.SOPInstanceUID for image in made}) == 7
    assert len({image.FrameOfReferenceUID for image in made}) == 1
    assert [image.InstanceNumber for image in made] == list(range(1, 8))


def test_pixels_are_hounsfield_units_of_a_body() -> None:
    made = series(slices=5, size=128)
    volume = np.stack([image.pixel_array.astype(int) + image.RescaleIntercept for image in made])
    assert volume.min() >= -1024
    air, bone = (volume < -850).mean(), (volume > 300).mean()
    fat, soft = ((volume > -140) & (volume < -60)).mean(), ((volume > 20) & (volume < 130)).mean()
    assert 0.3 < air < 0.8
    assert 0.005 < bone < 0.1
    assert fat > 0.04
    assert soft > 0.1


def test_neighbouring_slices_differ() -> None:
    """By more than noise: the body itself changes from slice to slice."""
    made = [image.pixel_array.astype(int) for image in series(slices=80, size=64)]
    for a, b in pairwise(made):
        assert (np.abs(a - b) > 100).mean() > 0.002


def test_the_same_seed_gives_the_same_bytes_and_another_another_body() -> None:
    first, again, other = series(slices=2), series(slices=2), series(slices=2, seed=5)
    assert [to_bytes(i) for i in first] == [to_bytes(i) for i in again]
    assert first[0].SOPInstanceUID == other[0].SOPInstanceUID
    assert first[1].PixelData != other[1].PixelData
    elsewhere = series(slices=2, study_instance_uid="1.2.3.4")
    assert elsewhere[1].PixelData != first[1].PixelData
    assert elsewhere[1].SOPInstanceUID != first[1].SOPInstanceUID


@pytest.mark.parametrize("changes", [{"slices": 0}, {"size": 8}])
def test_nothing_to_draw_is_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least one slice"):
        series(**changes)
