"""DICOM files for tests: small, valid, and whatever is asked of them."""

from io import BytesIO
from typing import Any

from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, generate_uid


def ct_image(
    *,
    patient_id: str = "MRN-1",
    study_uid: str | None = None,
    series_uid: str | None = None,
    sop_uid: str | None = None,
    **values: Any,
) -> bytes:
    """A CT slice of 16 x 16 pixels, Explicit VR LE. `values` by keyword; None: absent."""
    image = Dataset()
    image.SOPClassUID = CTImageStorage
    image.SOPInstanceUID = sop_uid or generate_uid(None)
    image.StudyInstanceUID = study_uid or generate_uid(None)
    image.SeriesInstanceUID = series_uid or generate_uid(None)
    image.PatientID = patient_id
    image.PatientName = "Doe^Jane"
    image.PatientBirthDate = "19800101"
    image.PatientSex = "F"
    image.StudyDate = "20250102"
    image.StudyTime = "101500"
    image.StudyDescription = "CT test"
    image.AccessionNumber = ""
    image.Modality = "CT"
    image.SeriesNumber = 1
    image.InstanceNumber = 1
    image.Rows = image.Columns = 16
    image.SamplesPerPixel = 1
    image.PhotometricInterpretation = "MONOCHROME2"
    image.BitsAllocated = image.BitsStored = 16
    image.HighBit = 15
    image.PixelRepresentation = 0
    image.PixelData = bytes(range(256)) * 2
    for keyword, value in values.items():
        if value is None:
            delattr(image, keyword)
        else:
            setattr(image, keyword, value)
    image.file_meta = FileMetaDataset()
    image.file_meta.MediaStorageSOPClassUID = image.get("SOPClassUID") or CTImageStorage
    image.file_meta.MediaStorageSOPInstanceUID = UID(image.get("SOPInstanceUID") or "1.2.3")
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    out = BytesIO()
    image.save_as(out, enforce_file_format=True)
    return out.getvalue()
