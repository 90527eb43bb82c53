"""What else a search shows of a file: the describing attributes of study, series and instance.

Read once, when the file comes in, and kept as DICOM JSON (PS3.18 F.2). The lists are those of
PS3.18 10.6.3 and of Orthanc's main DICOM tags, without what `Header` already has.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from struct import unpack_from
from typing import Any, BinaryIO

from pydicom.datadict import dictionary_VR, tag_for_keyword

from .header import shown
from .nested import charset_of, value_bytes
from .scan import Scan

_LONGEST_VALUE = 1024  # bytes; a longer one describes nothing in a list

STUDY = (
    *("TimezoneOffsetFromUTC", "ReferringPhysicianName", "StudyID", "InstitutionName"),
    *("RequestingPhysician", "RequestedProcedureDescription"),
)
SERIES = (
    *("SeriesDate", "SeriesTime", "Manufacturer", "StationName", "OperatorsName"),
    *("BodyPartExamined", "Laterality", "ProtocolName", "SequenceName", "ContrastBolusAgent"),
    *("PerformedProcedureStepStartDate", "PerformedProcedureStepStartTime"),
    *("PerformedProcedureStepDescription", "AcquisitionDeviceProcessingDescription"),
    *("ImagesInAcquisition", "NumberOfTemporalPositions", "NumberOfSlices"),
)
INSTANCE = (
    *("InstanceCreationDate", "InstanceCreationTime", "AcquisitionNumber", "ImageIndex"),
    *("TemporalPositionIdentifier", "ImagePositionPatient", "ImageOrientationPatient"),
    *("ImageComments", "BitsAllocated"),
)


_ABSENT: dict[str, Any] = {"Value": [None]}


@dataclass(frozen=True)
class Described:
    """DICOM JSON by level: `{"00081030": {"vr": "LO", "Value": [...]}}`; what is absent, or can't
    be read, is not in it. `rows` and `columns` are 0 where there are no pixels."""

    study: dict[str, Any]
    series: dict[str, Any]
    instance: dict[str, Any]
    rows: int
    columns: int

    @property
    def study_id(self) -> str:
        """StudyID (0020,0010); empty if absent."""
        return str(self.study.get("00200010", _ABSENT)["Value"][0] or "")

    @property
    def referring_physician(self) -> str:
        """ReferringPhysicianName (0008,0090), its alphabetic group; empty if absent."""
        name = self.study.get("00080090", _ABSENT)["Value"][0]
        return str(name.get("Alphabetic", "")) if name else ""


def describe(file: BinaryIO, scan: Scan) -> Described:
    """Read the describing attributes of a scanned file."""
    return Described(
        study=_read(file, scan, STUDY),
        series=_read(file, scan, SERIES),
        instance=_read(file, scan, INSTANCE),
        rows=_size(_read(file, scan, ("Rows",))),
        columns=_size(_read(file, scan, ("Columns",))),
    )


def _size(read: dict[str, Any]) -> int:
    return int(next(iter(read.values()))["Value"][0]) if read else 0


def _read(file: BinaryIO, scan: Scan, keywords: Sequence[str]) -> dict[str, Any]:
    charset = charset_of(file, scan)
    found: dict[str, Any] = {}
    for keyword in keywords:
        tag = tag_for_keyword(keyword) or 0
        element = scan.element(tag)
        if element is None or not 0 < element.end - element.value <= _LONGEST_VALUE:
            continue
        vr, raw = dictionary_VR(tag), value_bytes(file, scan, element)
        values: list[Any]
        if vr == "US":
            order = "<" if scan.little_endian else ">"
            values = [unpack_from(f"{order}H", raw)[0]] if len(raw) >= 2 else []
        else:
            text = shown(charset.decode_loosely(raw.rstrip(b"\0 "), vr))
            values = [text] if vr in ("LT", "ST", "UT") else text.split("\\")
            values = [_value(each.strip(" "), vr) for each in values]
        if any(each is not None for each in values):
            found[f"{tag:08X}"] = {"vr": vr, "Value": values}
    return found


def _value(text: str, vr: str) -> Any:
    """One value as PS3.18 F.2.3 has it; None for an empty one, or a number that is none."""
    if not text:
        return None
    if vr == "PN":
        groups = zip(("Alphabetic", "Ideographic", "Phonetic"), text.split("="), strict=False)
        return {name: group for name, group in groups if group} or None
    if vr in ("IS", "DS"):
        try:
            number = int(text) if vr == "IS" else float(text)
        except ValueError:
            return None
        return number if math.isfinite(number) else None
    return text
