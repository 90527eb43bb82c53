"""Tags by number: their names in messages, and the VR that implicit VR files leave out."""

from functools import lru_cache

from pydicom._dicom_dict import DicomDictionary
from pydicom.datadict import dictionary_VR, keyword_for_tag, tag_for_keyword

ITEM = 0xFFFEE000  # PS3.5 7.5
ITEM_END = 0xFFFEE00D
SEQUENCE_END = 0xFFFEE0DD
PIXEL_DATA = 0x7FE00010
PIXEL_TAGS = (PIXEL_DATA, 0x7FE00008, 0x7FE00009)  # and FloatPixelData, DoubleFloatPixelData
SAMPLES_PER_PIXEL = 0x00280002
PHOTOMETRIC_INTERPRETATION = 0x00280004
NUMBER_OF_FRAMES = 0x00280008
ROWS = 0x00280010
COLUMNS = 0x00280011
BITS_ALLOCATED = 0x00280100
CHARACTER_SET = 0x00080005
SOP_CLASS_UID = 0x00080016
SOP_INSTANCE_UID = 0x00080018
TRANSFER_SYNTAX_UID = 0x00020010
MEDIA_STORAGE_SOP_CLASS_UID = 0x00020002
MEDIA_STORAGE_SOP_INSTANCE_UID = 0x00020003

# PS3.5 7.1.2: after these VRs come two reserved bytes and a length of 32 bits.
LONG_VRS = {
    vr.encode(): vr
    for vr in ("OB", "OD", "OF", "OL", "OV", "OW", "SQ", "SV", "UC", "UN", "UR", "UT", "UV")
}
SHORT_VRS = {
    vr.encode(): vr
    for vr in (
        *("AE", "AS", "AT", "CS", "DA", "DS", "DT", "FD", "FL", "IS", "LO", "LT"),
        *("PN", "SH", "SL", "SS", "ST", "TM", "UI", "UL", "US"),
    )
}
# VRs whose text is written in SpecificCharacterSet (PS3.5 6.1.2.2).
TEXT_VRS = frozenset({"SH", "LO", "ST", "PN", "LT", "UC", "UT"})
# Those of them in which a backslash is text and not a separator of values (PS3.5 6.2).
ONE_TEXT_VRS = frozenset({"ST", "LT", "UT", "UR"})

VR_OF_TAG = {tag: entry[0] for tag, entry in DicomDictionary.items()}


@lru_cache(maxsize=4096)
def other_vr(tag: int) -> str:
    """The VR of a tag that is not in VR_OF_TAG: a repeating group's, UL of a length, else UN."""
    if tag & 0xFFFF == 0:
        return "UL"  # group length, PS3.5 7.2
    if tag >> 16 & 1:
        return "LO" if 0x10 <= tag & 0xFFFF <= 0xFF else "UN"  # private creators, PS3.5 7.8.1
    try:
        return dictionary_VR(tag)
    except KeyError:
        return "UN"


def meant_vr(tag: int, vr: str) -> str:
    """The dictionary's VR for a known tag written as UN of defined length (PS3.5 6.2.2).

    Some converters write UN for all they don't know. Sequences stay UN: what is inside is not
    said. As "US or SS" and the like, the answer may have more than two letters.
    """
    known = VR_OF_TAG.get(tag, vr) if vr == "UN" else vr
    return vr if known == "SQ" else known


def name(tag: int) -> str:
    """`PatientID (0010,0020)`, or the numbers alone where there is no keyword."""
    numbers = f"({tag >> 16:04X},{tag & 0xFFFF:04X})"
    keyword = keyword_for_tag(tag)
    return f"{keyword} {numbers}" if keyword else numbers


# What says whose images these are, and how their pixels are to be read. A second one at the top
# level is refused: see scan.
SINGLE_TAGS = frozenset(
    {*PIXEL_TAGS, SAMPLES_PER_PIXEL, PHOTOMETRIC_INTERPRETATION, ROWS, COLUMNS, BITS_ALLOCATED}
) | frozenset(
    tag_for_keyword(keyword)
    for keyword in (
        *("SpecificCharacterSet", "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID"),
        *("SeriesInstanceUID", "PatientID", "IssuerOfPatientID", "PatientName"),
        *("PatientBirthDate", "PatientSex", "AccessionNumber", "Modality", "StudyDate"),
        *("IssuerOfAccessionNumberSequence", "StudyTime", "StudyDescription", "NumberOfFrames"),
        *("SeriesNumber", "SeriesDescription", "InstanceNumber"),
        *("IssuerOfPatientIDQualifiersSequence", "OtherPatientIDsSequence", "StudyID"),
    )
)
