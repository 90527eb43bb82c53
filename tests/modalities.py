"""DICOM files of the kinds that a viewer has to show.

What pydicom ships is used as it is; what it lacks is made here, small and valid. Larger real ones
are no part of the repository: they are looked for in LIGHTBOX_DICOM_SAMPLES, else in
`shared/dicom` beside it.
"""

import os
from collections.abc import Iterable, Sequence
from datetime import datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.data import get_testdata_file
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.multival import MultiValue
from pydicom.uid import (
    MPEG4HP41,
    UID,
    ComprehensiveSRStorage,
    EncapsulatedPDFStorage,
    ExplicitVRLittleEndian,
    RTStructureSetStorage,
    SegmentationStorage,
    UltrasoundMultiFrameImageStorage,
    VideoEndoscopicImageStorage,
    generate_uid,
)

from app.demo.stack import REPOSITORY
from app.demo.synthetic import ct_series

SAMPLES = Path(os.environ.get("LIGHTBOX_DICOM_SAMPLES") or REPOSITORY.parent / "shared" / "dicom")


def shipped(name: str) -> bytes:
    """A sample that ships inside pydicom's wheel; never downloaded."""
    path = get_testdata_file(name, download=False)
    assert isinstance(path, str), f"pydicom no longer ships {name}"
    return Path(path).read_bytes()


def found(pattern: str) -> list[bytes]:
    """The files of the samples folder with this name; none where the folder isn't there."""
    return [path.read_bytes() for path in sorted(SAMPLES.glob(pattern)) if path.is_file()]


def to_bytes(image: Dataset, syntax: UID = ExplicitVRLittleEndian) -> bytes:
    """A dataset as a DICOM file (PS3.10)."""
    image.file_meta = FileMetaDataset()
    image.file_meta.MediaStorageSOPClassUID = image.SOPClassUID
    image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
    image.file_meta.TransferSyntaxUID = syntax
    out = BytesIO()
    image.save_as(out, enforce_file_format=True)
    return out.getvalue()


def beginning(sop_class: UID, modality: str, **values: Any) -> Dataset:
    """Patient, study, series and equipment of a new instance; `values` by keyword."""
    image = Dataset()
    image.SpecificCharacterSet = "ISO_IR 192"
    image.SOPClassUID = sop_class
    image.SOPInstanceUID = generate_uid(None)
    image.StudyInstanceUID = generate_uid(None)
    image.SeriesInstanceUID = generate_uid(None)
    image.PatientID = "MODALITIES"
    image.PatientName = "Doe^Jane"
    image.PatientBirthDate = "19800101"
    image.PatientSex = "F"
    image.StudyDate = image.SeriesDate = image.ContentDate = "20250102"
    image.StudyTime = image.SeriesTime = image.ContentTime = "101500"
    image.StudyID = "1"
    image.AccessionNumber = ""
    image.ReferringPhysicianName = ""
    image.Modality = modality
    image.SeriesNumber = 1
    image.InstanceNumber = 1
    image.Manufacturer = "Lightbox"
    image.ManufacturerModelName = "Test"
    image.DeviceSerialNumber = "1"
    image.SoftwareVersions = "1"
    for keyword, value in values.items():
        setattr(image, keyword, value)
    return image


# --------------------------------------------------------------------------------- images


def ct_slices(count: int = 8, size: int = 256) -> list[Dataset]:
    """A CT series of a made-up chest, of a study of its own."""
    images = ct_series(
        patient_id="MODALITIES",
        patient_name="Doe^Jane",
        study_instance_uid=generate_uid(None),
        accession_number="",
        birth_date="19800101",
        sex="F",
        acquired=datetime(2025, 1, 2, 10, 15),
        slices=count,
        size=size,
        seed=7,
    )
    return list(images)


def cine_pictures(frames: int = 12, rows: int = 240, columns: int = 320) -> NDArray[np.uint8]:
    """RGB frames of a grey sector with a bright ring that grows from frame to frame."""
    y, x = np.mgrid[0:rows, 0:columns]
    distance = np.hypot(x - columns / 2, y)
    sector = np.abs(x - columns / 2) < y * 0.8
    speckle = np.random.default_rng(3).integers(30, 90, (rows, columns))
    pictures = np.zeros((frames, rows, columns, 3), dtype=np.uint8)
    for number in range(frames):
        ring = np.abs(distance - (40 + 12 * number)) < 6
        grey = np.where(sector, np.where(ring, 230, speckle), 0)
        pictures[number] = grey[..., np.newaxis]
        pictures[number, 10:30, 10:30] = (200, 40, 40)
    return pictures


def ultrasound_cine(pictures: NDArray[np.uint8], **values: Any) -> bytes:
    """An uncompressed multi-frame ultrasound of these RGB frames (PS3.3 A.7), 25 a second."""
    frames, rows, columns, samples = pictures.shape
    image = beginning(UltrasoundMultiFrameImageStorage, "US", **values)
    image.ImageType = ["ORIGINAL", "PRIMARY"]
    image.PatientOrientation = ""
    image.SeriesDescription = "Cine"
    image.NumberOfFrames = frames
    image.FrameTime = "40"
    image.FrameIncrementPointer = 0x00181063
    image.CineRate = 25
    image.RecommendedDisplayFrameRate = 25
    image.LossyImageCompression = "00"
    image.SamplesPerPixel = samples
    image.PhotometricInterpretation = "RGB"
    image.PlanarConfiguration = 0
    image.Rows, image.Columns = rows, columns
    image.BitsAllocated = image.BitsStored = 8
    image.HighBit = 7
    image.PixelRepresentation = 0
    image.PixelData = pictures.tobytes()
    return to_bytes(image)


def video(content: bytes, frames: int = 25) -> bytes:
    """A video of which `content` is the whole stream, in one fragment (PS3.5 8.2.7)."""
    image = beginning(VideoEndoscopicImageStorage, "ES")
    image.NumberOfFrames = frames
    image.FrameTime = "40"
    image.FrameIncrementPointer = 0x00181063
    image.CineRate = 25
    image.SamplesPerPixel = 3
    image.PhotometricInterpretation = "YBR_PARTIAL_420"
    image.PlanarConfiguration = 0
    image.Rows, image.Columns = 1080, 1920
    image.BitsAllocated = image.BitsStored = 8
    image.HighBit = 7
    image.PixelRepresentation = 0
    image.LossyImageCompression = "01"
    image.PixelData = encapsulate([content], has_bot=False)
    image["PixelData"].is_undefined_length = True
    return to_bytes(image, MPEG4HP41)


# --------------------------------------------------------------------------------- documents


def tiny_pdf(text: str) -> bytes:
    """A page with one line of large text."""
    drawing = f"BT /F1 36 Tf 72 700 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R /Resources %s >>"
        % b"<< /Font << /F1 5 0 R >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(drawing), drawing),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    out, places = bytearray(b"%PDF-1.4\n"), []
    for number, content in enumerate(objects, start=1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = len(out)
    out += b"xref\n0 6\n0000000000 65535 f \n"
    out += b"".join(b"%010d 00000 n \n" % place for place in places)
    out += b"trailer\n<< /Size 6 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % table
    return bytes(out)


def encapsulated_pdf(pdf: bytes, **values: Any) -> bytes:
    """A PDF as DICOM (PS3.3 A.45.1). An odd length is padded, and the true one stated."""
    image = beginning(EncapsulatedPDFStorage, "DOC", **values)
    image.ConversionType = "WSD"
    image.SeriesDescription = image.DocumentTitle = "Letter"
    image.BurnedInAnnotation = "YES"
    image.ConceptNameCodeSequence = []
    image.MIMETypeOfEncapsulatedDocument = "application/pdf"
    image.EncapsulatedDocument = pdf + b"\0" * (len(pdf) % 2)
    image.EncapsulatedDocumentLength = len(pdf)
    return to_bytes(image)


def measurement_report(image: Dataset, first: int, last: int) -> bytes:
    """A TID 1500 report (PS3.16) of one length, measured in row 100 of `image` between two
    columns."""
    millimetres = (last - first) * float(image.PixelSpacing[1])
    report = beginning(ComprehensiveSRStorage, "SR")
    copy_identity(image, report)
    report.SeriesNumber = 90
    report.SeriesDescription = "Measurements"
    report.ReferencedPerformedProcedureStepSequence = []
    report.PerformedProcedureCodeSequence = []
    report.CompletionFlag = "COMPLETE"
    report.VerificationFlag = "UNVERIFIED"
    report.PreliminaryFlag = "PRELIMINARY"
    report.CurrentRequestedProcedureEvidenceSequence = [evidence([image])]
    report.ValueType = "CONTAINER"
    report.ContinuityOfContent = "SEPARATE"
    report.ConceptNameCodeSequence = [code("126000", "DCM", "Imaging Measurement Report")]
    template = Dataset()
    template.MappingResource = "DCMR"
    template.TemplateIdentifier = "1500"
    report.ContentTemplateSequence = [template]

    picture = Dataset()
    picture.ReferencedSOPClassUID = image.SOPClassUID
    picture.ReferencedSOPInstanceUID = image.SOPInstanceUID
    selected = item("SELECTED FROM", "IMAGE", None, ReferencedSOPSequence=[picture])
    line = item(
        "INFERRED FROM",
        "SCOORD",
        None,
        GraphicType="POLYLINE",
        GraphicData=[first, 100, last, 100],
        ContentSequence=[selected],
    )
    value = Dataset()
    value.MeasurementUnitsCodeSequence = [code("mm", "UCUM", "millimeter")]
    value.NumericValue = f"{millimetres:.1f}"
    group = item(
        "CONTAINS",
        "CONTAINER",
        code("125007", "DCM", "Measurement Group"),
        ContinuityOfContent="SEPARATE",
        ContentSequence=[
            item(
                "HAS OBS CONTEXT",
                "TEXT",
                code("112039", "DCM", "Tracking Identifier"),
                TextValue="Cornerstone3DTools@^0.1.0:Length",
            ),
            item(
                "HAS OBS CONTEXT",
                "UIDREF",
                code("112040", "DCM", "Tracking Unique Identifier"),
                UID=generate_uid(None),
            ),
            item(
                "CONTAINS",
                "CODE",
                code("121071", "DCM", "Finding"),
                ConceptCodeSequence=[code("27925004", "SCT", "Nodule")],
            ),
            item(
                "CONTAINS",
                "NUM",
                code("410668003", "SCT", "Length"),
                MeasuredValueSequence=[value],
                ContentSequence=[line],
            ),
        ],
    )
    report.ContentSequence = [
        item(
            "HAS CONCEPT MOD",
            "CODE",
            code("121049", "DCM", "Language of Content Item and Descendants"),
            ConceptCodeSequence=[code("en-US", "RFC5646", "English (United States)")],
        ),
        item(
            "HAS OBS CONTEXT",
            "PNAME",
            code("121008", "DCM", "Person Observer Name"),
            PersonName="Reader^Rita",
        ),
        item(
            "HAS CONCEPT MOD",
            "CODE",
            code("121058", "DCM", "Procedure Reported"),
            ConceptCodeSequence=[code("363679005", "SCT", "Imaging procedure")],
        ),
        item(
            "CONTAINS",
            "CONTAINER",
            code("126010", "DCM", "Imaging Measurements"),
            ContinuityOfContent="SEPARATE",
            ContentSequence=[group],
        ),
    ]
    return to_bytes(report)


def segmentation(images: Sequence[Dataset], label: str) -> bytes:
    """A binary segmentation of a box in the middle of each image of a series (PS3.3 A.51)."""
    first = images[0]
    rows, columns = first.Rows, first.Columns
    seg = beginning(SegmentationStorage, "SEG")
    copy_identity(first, seg)
    seg.SeriesNumber = 80
    seg.SeriesDescription = "Segmentation"
    seg.FrameOfReferenceUID = first.FrameOfReferenceUID
    seg.PositionReferenceIndicator = ""
    seg.ImageType = ["DERIVED", "PRIMARY"]
    seg.ContentLabel = "TEST"
    seg.ContentDescription = ""
    seg.ContentCreatorName = "Reader^Rita"
    seg.LossyImageCompression = "00"
    seg.SamplesPerPixel = 1
    seg.PhotometricInterpretation = "MONOCHROME2"
    seg.PixelRepresentation = 0
    seg.Rows, seg.Columns = rows, columns
    seg.BitsAllocated = seg.BitsStored = 1
    seg.HighBit = 0
    seg.NumberOfFrames = len(images)
    seg.SegmentationType = "BINARY"

    segment = Dataset()
    segment.SegmentNumber = 1
    segment.SegmentLabel = label
    segment.SegmentAlgorithmType = "MANUAL"
    segment.SegmentedPropertyCategoryCodeSequence = [code("123037004", "SCT", "Body structure")]
    segment.SegmentedPropertyTypeCodeSequence = [code("39607008", "SCT", "Lung")]
    segment.RecommendedDisplayCIELabValue = [34885, 53485, 50171]  # red
    seg.SegmentSequence = [segment]

    organization = Dataset()
    organization.DimensionOrganizationUID = generate_uid(None)
    seg.DimensionOrganizationSequence = [organization]
    seg.DimensionOrganizationType = "3D"
    seg.DimensionIndexSequence = [
        dimension(organization.DimensionOrganizationUID, 0x0062000B, 0x0062000A),
        dimension(organization.DimensionOrganizationUID, 0x00200032, 0x00209113),
    ]
    referenced = evidence(images).ReferencedSeriesSequence[0]
    series = Dataset()
    series.SeriesInstanceUID = referenced.SeriesInstanceUID
    series.ReferencedInstanceSequence = referenced.ReferencedSOPSequence
    seg.ReferencedSeriesSequence = [series]

    measures = Dataset()
    measures.SliceThickness = first.SliceThickness
    measures.SpacingBetweenSlices = first.SliceThickness
    measures.PixelSpacing = first.PixelSpacing
    orientation = Dataset()
    orientation.ImageOrientationPatient = first.ImageOrientationPatient
    identification = Dataset()
    identification.ReferencedSegmentNumber = 1
    common = Dataset()
    common.PixelMeasuresSequence = [measures]
    common.PlaneOrientationSequence = [orientation]
    common.SegmentIdentificationSequence = [identification]
    seg.SharedFunctionalGroupsSequence = [common]
    seg.PerFrameFunctionalGroupsSequence = [
        functional_groups(image, number) for number, image in enumerate(images, start=1)
    ]
    box = np.zeros((rows, columns), dtype=np.uint8)
    box[rows // 4 : 3 * rows // 4, columns // 4 : 3 * columns // 4] = 1
    # Frames follow each other bit by bit, the least significant first (PS3.5 8.1.1, annex D).
    bits = np.packbits(np.stack([box] * len(images)), bitorder="little").tobytes()
    seg.PixelData = bits + b"\0" * (len(bits) % 2)
    return to_bytes(seg)


def structure_set(images: Sequence[Dataset], name: str) -> bytes:
    """A radiotherapy structure set (PS3.3 A.19): a square on each image of a series."""
    first = images[0]
    rois = beginning(RTStructureSetStorage, "RTSTRUCT")
    copy_identity(first, rois)
    rois.SeriesNumber = 70
    rois.SeriesDescription = "Structures"
    rois.StructureSetLabel = "TEST"
    rois.StructureSetDate, rois.StructureSetTime = "20250102", "101500"
    rois.FrameOfReferenceUID = first.FrameOfReferenceUID
    referenced = evidence(images)
    of_series = referenced.ReferencedSeriesSequence[0]
    series = Dataset()
    series.SeriesInstanceUID = of_series.SeriesInstanceUID
    series.ContourImageSequence = of_series.ReferencedSOPSequence
    study = Dataset()
    study.ReferencedSOPClassUID = "1.2.840.10008.3.1.2.3.1"
    study.ReferencedSOPInstanceUID = first.StudyInstanceUID
    study.RTReferencedSeriesSequence = [series]
    frame = Dataset()
    frame.FrameOfReferenceUID = first.FrameOfReferenceUID
    frame.RTReferencedStudySequence = [study]
    rois.ReferencedFrameOfReferenceSequence = [frame]
    roi = Dataset()
    roi.ROINumber = 1
    roi.ReferencedFrameOfReferenceUID = first.FrameOfReferenceUID
    roi.ROIName = name
    roi.ROIGenerationAlgorithm = "MANUAL"
    rois.StructureSetROISequence = [roi]
    contours = []
    for image in images:
        z = float(image.ImagePositionPatient[2])
        contour = Dataset()
        source = Dataset()
        source.ReferencedSOPClassUID = image.SOPClassUID
        source.ReferencedSOPInstanceUID = image.SOPInstanceUID
        contour.ContourImageSequence = [source]
        contour.ContourGeometricType = "CLOSED_PLANAR"
        contour.NumberOfContourPoints = 4
        contour.ContourData = [-80, -60, z, 80, -60, z, 80, 60, z, -80, 60, z]
        contours.append(contour)
    drawn = Dataset()
    drawn.ROIDisplayColor = [255, 0, 0]
    drawn.ReferencedROINumber = 1
    drawn.ContourSequence = contours
    rois.ROIContourSequence = [drawn]
    observed = Dataset()
    observed.ObservationNumber = 1
    observed.ReferencedROINumber = 1
    observed.RTROIInterpretedType = "ORGAN"
    observed.ROIInterpreter = ""
    rois.RTROIObservationsSequence = [observed]
    return to_bytes(rois)


def functional_groups(image: Dataset, number: int) -> Dataset:
    """What differs from frame to frame of a segmentation: where it lies, and of which image."""
    position = Dataset()
    position.ImagePositionPatient = image.ImagePositionPatient
    content = Dataset()
    content.DimensionIndexValues = [1, number]
    source = Dataset()
    source.ReferencedSOPClassUID = image.SOPClassUID
    source.ReferencedSOPInstanceUID = image.SOPInstanceUID
    source.PurposeOfReferenceCodeSequence = [
        code("121322", "DCM", "Source image for image processing operation")
    ]
    derivation = Dataset()
    derivation.SourceImageSequence = [source]
    derivation.DerivationCodeSequence = [code("113076", "DCM", "Segmentation")]
    groups = Dataset()
    groups.PlanePositionSequence = [position]
    groups.FrameContentSequence = [content]
    groups.DerivationImageSequence = [derivation]
    return groups


def dimension(organization: str, pointer: int, group: int) -> Dataset:
    index = Dataset()
    index.DimensionOrganizationUID = organization
    index.DimensionIndexPointer = pointer
    index.FunctionalGroupPointer = group
    return index


def evidence(images: Iterable[Dataset]) -> Dataset:
    """These images of one series as SR and SEG refer to them (PS3.3 C.17.2.1)."""
    referenced, first = [], None
    for image in images:
        first = first or image
        each = Dataset()
        each.ReferencedSOPClassUID = image.SOPClassUID
        each.ReferencedSOPInstanceUID = image.SOPInstanceUID
        referenced.append(each)
    assert first is not None
    series = Dataset()
    series.SeriesInstanceUID = first.SeriesInstanceUID
    series.ReferencedSOPSequence = referenced
    study = Dataset()
    study.StudyInstanceUID = first.StudyInstanceUID
    study.ReferencedSeriesSequence = [series]
    return study


def copy_identity(source: Dataset, target: Dataset) -> None:
    """Make `target` one of the same patient and study."""
    for keyword in (
        "PatientID PatientName PatientBirthDate PatientSex StudyInstanceUID StudyDate StudyTime "
        "StudyID StudyDescription AccessionNumber ReferringPhysicianName"
    ).split():
        if keyword in source:
            setattr(target, keyword, source[keyword].value)


def code(value: str, scheme: str, meaning: str) -> Dataset:
    """A coded entry (PS3.3 8.8)."""
    entry = Dataset()
    entry.CodeValue = value
    entry.CodingSchemeDesignator = scheme
    entry.CodeMeaning = meaning
    return entry


def item(relationship: str, value_type: str, name: Dataset | None, **values: Any) -> Dataset:
    """A content item of a structured report (PS3.3 C.17.3)."""
    each = Dataset()
    each.RelationshipType = relationship
    each.ValueType = value_type
    if name is not None:
        each.ConceptNameCodeSequence = [name]
    for keyword, value in values.items():
        setattr(each, keyword, value)
    return each


# --------------------------------------------------------------------------------- identity


def of_order(files: Sequence[bytes], patient: Any, order: Any) -> list[bytes]:
    """The same files as if taken for this order: the patient's identity, and UIDs of their own
    that still refer to each other as before. Pixels, waveforms and documents stay as they are."""
    uids: dict[str, UID] = {}

    def renew(dataset: Dataset) -> None:
        for element in dataset:
            if element.VR == "SQ":
                for each in element.value:
                    renew(each)
            elif element.VR == "UI" and element.value:
                several = isinstance(element.value, MultiValue)
                old = [str(each) for each in (element.value if several else [element.value])]
                new = [
                    # What DICOM itself registers names a class, a syntax, a well-known frame...
                    UID(each)
                    if each.startswith("1.2.840.10008.")
                    else uids.setdefault(each, generate_uid(None))
                    for each in old
                ]
                element.value = new if several else new[0]

    renewed = []
    for content in files:
        image = pydicom.dcmread(BytesIO(content))
        renew(image)
        renew(image.file_meta)
        image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
        image.PatientID = patient["mrn"]
        image.PatientName = f"{patient['last_name']}^{patient['first_name']}"
        image.PatientBirthDate = patient["dob"].replace("-", "")
        image.PatientSex = patient["sex"]
        image.AccessionNumber = order["accession_number"]
        out = BytesIO()
        image.save_as(out, enforce_file_format=True)
        renewed.append(out.getvalue())
    return renewed
