"""A synthetic chest and upper abdomen CT: good to scroll, and plainly nobody's.

The body is drawn from formulas, slice by slice, so that a series of any length needs the memory
of a few slices only. Lengths are millimetres in the patient's coordinates (x to the left, y to
the back, z to the head, PS3.3 C.7.6.2.1.1), grey values are Hounsfield units. Everything
follows from the seed: the same seed gives the same bytes with the same numpy.
"""

import hashlib
import uuid
from collections.abc import Iterator
from datetime import datetime
from io import BytesIO

import numpy as np
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian

from app.demo.body import Body
from app.demo.canvas import FIELD_MM, HEIGHT_MM

RESCALE_INTERCEPT = -1024
SYNTHETIC = "SYNTHETIC IMAGE. Drawn by a program for demonstrations; shows no real person."
# Written into every file as what made it (PS3.10 7.1): a fixed UID of this module.
_IMPLEMENTATION = UID(f"2.25.{uuid.uuid5(uuid.NAMESPACE_DNS, 'lightbox.synthetic').int}")


def ct_series(
    *,
    patient_id: str,
    patient_name: str,
    study_instance_uid: str,
    accession_number: str,
    birth_date: str = "",
    sex: str = "",
    issuer_of_patient_id: str = "",
    series_instance_uid: str | None = None,
    study_description: str = "CT Thorax",
    referring_physician_name: str = "",
    acquired: datetime = datetime(2025, 1, 15, 10, 30),  # noqa: DTZ001  (DICOM's local time)
    slices: int = 80,
    size: int = 512,
    seed: int | None = None,
) -> Iterator[FileDataset]:
    """Yield the CT images of one series, head first, each ready to be written.

    `birth_date` is a DICOM date, `sex` M, F, O or empty, `acquired` the local time of the study.
    Fewer `slices` are thicker, not fewer millimetres. UIDs that aren't given, and the seed,
    follow from `study_instance_uid`. Values are written as given: check them first. Raises
    ValueError, at the first image, where there is nothing to draw.
    """
    if slices < 1 or size < 16:
        raise ValueError("A synthetic series needs at least one slice of 16 by 16 pixels.")
    if seed is None:
        digest = hashlib.sha256(study_instance_uid.encode()).digest()
        seed = int.from_bytes(digest[:8], "big")
    body = Body(seed, size)
    series_uid = series_instance_uid or _derived_uid(study_instance_uid, "series")
    frame_uid = _derived_uid(study_instance_uid, "frame of reference")
    thickness = HEIGHT_MM / slices
    # A decimal string has at most 16 characters (PS3.5 6.2).
    spacing = round(FIELD_MM / size, 6)
    corner = round((FIELD_MM / size - FIELD_MM) / 2, 6)  # centre of the first pixel
    for index in range(slices):
        z = HEIGHT_MM - (index + 0.5) * thickness
        table = round(z - HEIGHT_MM / 2, 6)
        stored = np.clip(np.rint(body.slice_hu(z, index)) - RESCALE_INTERCEPT, 0, 4095)

        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = UID(_derived_uid(series_uid, f"image {index + 1}"))
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        meta.ImplementationClassUID = _IMPLEMENTATION
        image = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)

        # Patient (PS3.3 C.7.1.1)
        image.PatientName = patient_name
        image.PatientID = patient_id
        if issuer_of_patient_id:
            image.IssuerOfPatientID = issuer_of_patient_id
        image.PatientBirthDate = birth_date
        image.PatientSex = sex
        image.QualityControlSubject = "YES"  # a phantom, not a person
        image.PatientComments = SYNTHETIC
        # General Study (C.7.2.1), General Series (C.7.3.1)
        image.StudyInstanceUID = study_instance_uid
        image.StudyDate = image.SeriesDate = image.AcquisitionDate = image.ContentDate = (
            acquired.strftime("%Y%m%d")
        )
        image.StudyTime = image.SeriesTime = image.AcquisitionTime = image.ContentTime = (
            acquired.strftime("%H%M%S")
        )
        image.ReferringPhysicianName = referring_physician_name
        image.StudyID = "1"
        image.AccessionNumber = accession_number
        image.StudyDescription = study_description
        image.Modality = "CT"
        image.SeriesInstanceUID = series_uid
        image.SeriesNumber = 1
        image.SeriesDescription = f"SYNTHETIC {thickness:.1f} mm"
        image.ProtocolName = "SYNTHETIC"
        image.BodyPartExamined = "CHEST"
        image.PatientPosition = "HFS"
        # Frame of Reference (C.7.4.1), General Equipment (C.7.5.1)
        image.FrameOfReferenceUID = frame_uid
        image.PositionReferenceIndicator = ""
        image.Manufacturer = "Lightbox"
        image.ManufacturerModelName = "Synthetic CT"
        # General Image (C.7.6.1), Image Plane (C.7.6.2), Contrast/Bolus (C.7.6.4)
        image.SpecificCharacterSet = "ISO_IR 192"
        image.InstanceNumber = index + 1
        image.ImageType = ["DERIVED", "SECONDARY", "AXIAL"]
        image.DerivationDescription = "Computed from formulas; not acquired."
        image.ImageComments = SYNTHETIC
        image.BurnedInAnnotation = "NO"
        image.LossyImageCompression = "00"
        image.PixelSpacing = [spacing, spacing]
        image.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        image.ImagePositionPatient = [corner, corner, table]
        image.SliceThickness = image.SpacingBetweenSlices = round(thickness, 6)
        image.SliceLocation = table
        image.ContrastBolusAgent = "Simulated"
        # CT Image (C.8.2.1) and Image Pixel (C.7.6.3)
        image.KVP = 120
        image.AcquisitionNumber = 1
        image.SamplesPerPixel = 1
        image.PhotometricInterpretation = "MONOCHROME2"
        image.Rows = image.Columns = size
        image.BitsAllocated, image.BitsStored, image.HighBit = 16, 12, 11
        image.PixelRepresentation = 0
        image.RescaleIntercept = RESCALE_INTERCEPT
        image.RescaleSlope = 1
        image.RescaleType = "HU"
        image.WindowCenter = [40, -550]
        image.WindowWidth = [400, 1500]
        image.WindowCenterWidthExplanation = ["SOFT TISSUE", "LUNG"]
        image.PixelData = stored.astype("<u2").tobytes()
        # SOP Common (C.12.1)
        image.SOPClassUID = CTImageStorage
        image.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
        yield image


def to_bytes(image: FileDataset) -> bytes:
    """`image` as a DICOM file (PS3.10)."""
    buffer = BytesIO()
    image.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def _derived_uid(parent: str, what: str) -> str:
    """A UID under 2.25 that follows from another (PS3.5 B.2)."""
    return f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, f'{parent}/{what}').int}"
