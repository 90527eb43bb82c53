"""The images that are measured with: made up, of a fixed seed, and as incompressible as real ones.

Two images of the same series differ in their UIDs, numbers and pixels only.
"""

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pydicom
from pydicom import Dataset
from pydicom.data import get_testdata_file
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import get_frame
from pydicom.uid import UID, ExplicitVRLittleEndian, generate_uid

SIZE = 512
FRAME_BYTES = SIZE * SIZE * 2
SEED = 20250115


def uid(*parts: object) -> str:
    """A UID that follows from its parts: the same in each run."""
    return generate_uid(entropy_srcs=["lightbox benchmark", *map(str, parts)])


def header(
    *, mrn: str, study_uid: str, series_uid: str, number: int, size: int, study_date: str
) -> Dataset:
    """A CT image without its pixels, with the header that a scanner wrote: pydicom's CT sample,
    of more than 200 elements. A made-up one of a few dozen would flatter whoever reads it."""
    path = get_testdata_file("CT_small.dcm", download=False)
    assert isinstance(path, str), "pydicom no longer ships its CT sample"
    image = pydicom.dcmread(path)
    for keyword in ("PixelData", "DataSetTrailingPadding", "IssuerOfPatientID", "OtherPatientIDs"):
        if keyword in image:
            delattr(image, keyword)
    image.SpecificCharacterSet = "ISO_IR 192"
    image.SOPInstanceUID = uid(series_uid, number)
    image.StudyDate = image.SeriesDate = image.ContentDate = study_date
    image.AccessionNumber = ""
    image.StudyDescription = "CT for measuring"
    image.SeriesDescription = "Noise, 1 mm"
    image.PatientName = "Bench^Mark"
    image.PatientID = mrn
    image.PatientBirthDate = "19800101"
    image.PatientSex = "F"
    image.StudyInstanceUID = study_uid
    image.SeriesInstanceUID = series_uid
    image.SeriesNumber = 1
    image.InstanceNumber = number
    image.ImagePositionPatient = [-250, -250, number]
    image.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    image.FrameOfReferenceUID = uid(study_uid, "frame of reference")
    image.SliceLocation = number
    image.SliceThickness = 1
    image.Rows = image.Columns = size
    image.PixelSpacing = [0.976562, 0.976562]
    image.BitsAllocated = 16
    image.BitsStored, image.HighBit = 12, 11
    image.PixelRepresentation = 0
    image.WindowCenter, image.WindowWidth = 20, 300
    image.RescaleIntercept, image.RescaleSlope = -1024, 1
    return image


def pixels(number: int, size: int = SIZE) -> bytes:
    """A disc that wanders with the slice's number, under the noise of a low dose."""
    random = np.random.default_rng([SEED, number])
    y, x = np.mgrid[0:size, 0:size] / size
    disc = (x - 0.5) ** 2 + (y - 0.4 - 0.2 * (number % 50) / 50) ** 2 < 0.09
    stored = 1000 + 90 * disc + random.normal(0, 45, (size, size))
    return bytes(np.clip(stored, 0, 4095).astype("<u2").tobytes())


def as_file(image: Dataset, syntax: UID = ExplicitVRLittleEndian) -> bytes:
    """A DICOM file (PS3.10)."""
    image.file_meta = FileMetaDataset()
    image.file_meta.MediaStorageSOPClassUID = image.SOPClassUID
    image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
    image.file_meta.TransferSyntaxUID = syntax
    out = BytesIO()
    image.save_as(out, enforce_file_format=True)
    return out.getvalue()


def ct_files(
    count: int,
    *,
    mrn: str,
    study_uid: str,
    series_uid: str,
    size: int = SIZE,
    study_date: str = "20250115",
) -> Iterator[bytes]:
    """The files of an uncompressed CT series, first slice first."""
    for number in range(1, count + 1):
        image = header(
            mrn=mrn,
            study_uid=study_uid,
            series_uid=series_uid,
            number=number,
            size=size,
            study_date=study_date,
        )
        image.PixelData = pixels(number, size)
        image["PixelData"].VR = "OW"
        yield as_file(image)


def compressed_files(count: int, *, mrn: str, study_uid: str, series_uid: str) -> Iterator[bytes]:
    """The files of a JPEG 2000 series: pydicom's own CT slice, again and again."""
    path = get_testdata_file("693_J2KI.dcm", download=False)
    assert isinstance(path, str), "pydicom no longer ships its JPEG 2000 sample"
    source = pydicom.dcmread(BytesIO(Path(path).read_bytes()))
    for number in range(1, count + 1):
        image = header(
            mrn=mrn,
            study_uid=study_uid,
            series_uid=series_uid,
            number=number,
            size=source.Rows,
            study_date="20250116",
        )
        for keyword in ("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"):
            setattr(image, keyword, source[keyword].value)
        image.LossyImageCompression = "01"
        image.PixelData = source.PixelData
        image["PixelData"].VR = "OB"
        image["PixelData"].is_undefined_length = True
        yield as_file(image, source.file_meta.TransferSyntaxUID)


def first_frame(content: bytes) -> bytes:
    """The frame of a single-frame file, as it is stored."""
    image = pydicom.dcmread(BytesIO(content))
    if image.file_meta.TransferSyntaxUID.is_encapsulated:
        return get_frame(image.PixelData, 0, number_of_frames=1)
    return bytes(image.PixelData)
