"""Attributes from a request's JSON to a pydicom Dataset, each checked before it is believed."""

import math
import re
from collections.abc import Mapping
from typing import Any

from pydicom import Dataset, config
from pydicom.datadict import dictionary_VM, dictionary_VR, tag_for_keyword
from pydicom.dataelem import DataElement
from pydicom.valuerep import format_number_as_ds, validate_value

from ..errors import Unprocessable
from .tags import CHARACTER_SET, ONE_TEXT_VRS, PIXEL_DATA
from .values import PatientIdentifier, control_character, parse_date, parse_uid, quoted

_INTEGERS = {
    "US": (0, 2**16 - 1),
    "UL": (0, 2**32 - 1),
    "UV": (0, 2**64 - 1),
    "SS": (-(2**15), 2**15 - 1),
    "SL": (-(2**31), 2**31 - 1),
    "SV": (-(2**63), 2**63 - 1),
    "IS": (-(2**31), 2**31 - 1),
}
_REALS = {"FL": 3.4028235e38, "FD": math.inf, "DS": math.inf}
_TEXTS = frozenset(
    {"AE", "AS", "CS", "DA", "DT", "LO", "LT", "PN", "SH", "ST", "TM", "UC", "UI", "UR", "UT"}
)
_IDENTIFIERS = frozenset({"PatientID", "IssuerOfPatientID"})
_DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
# Attributes that say how the pixels are to be read (PS3.3 C.7.6.3): pixels stay, so do they.
_STRUCTURAL = frozenset(
    {
        *("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
        *("SamplesPerPixel", "PlanarConfiguration", "PhotometricInterpretation"),
        *("NumberOfFrames", "PixelAspectRatio", "SmallestImagePixelValue"),
        *("LargestImagePixelValue", "PixelPaddingValue", "PixelPaddingRangeLimit"),
        *("ExtendedOffsetTable", "ExtendedOffsetTableLengths", "FrameIncrementPointer"),
        *("EncapsulatedPixelDataValueTotalLength", "SOPClassUID"),
    }
)


def changes_from_json(tags: Mapping[str, object]) -> Dataset:
    """A Dataset for `rewrite`, from attributes such as `{"PatientName": "Doe^Jane",
    "SeriesNumber": 3, "ImageType": ["DERIVED", "SECONDARY"], "StudyDate": null}`.

    null, "" and [] empty the attribute. A list is for attributes of several values. Raises
    Unprocessable naming every bad one, with `extra["errors"]` as
    `[{"keyword": ..., "problem": ...}]`.
    """
    dataset = Dataset()
    problems: list[dict[str, str]] = []
    for keyword, value in tags.items():
        try:
            dataset.add(_element(keyword, value))
        except (TypeError, ValueError) as error:
            problems.append({"keyword": keyword, "problem": str(error).rstrip(".")})
    if problems:
        said = "; ".join(f"{_shown(p['keyword'])}: {p['problem']}" for p in problems)
        raise Unprocessable(f"These attributes can't be set: {said}.", extra={"errors": problems})
    return dataset


def _element(keyword: str, value: object) -> DataElement:
    """The checked element. Raises ValueError, or TypeError for what JSON type it is."""
    tag = tag_for_keyword(keyword)
    if tag is None:
        raise ValueError("no attribute of DICOM has this keyword")
    vr, vm = dictionary_VR(tag), dictionary_VM(tag)
    if tag >> 16 in (0, 2):
        raise ValueError("it belongs to the file, not to the data")
    if tag == CHARACTER_SET:
        raise ValueError("it says how all text of the file is encoded, and follows it")
    if tag == PIXEL_DATA or tag >> 16 in (0x7FE0, 0xFFFE):
        raise ValueError("it holds the pixels or their frame")
    if keyword in _STRUCTURAL or len(vr) != 2:
        raise ValueError("it says how the content is to be read, so it stays")
    if vr == "SQ":
        raise ValueError("sequences can't be set")
    if vr not in _TEXTS and vr not in _INTEGERS and vr not in _REALS:
        raise ValueError(f"binary values ({vr}) can't be set")
    if value is None or value == "" or value == []:
        return DataElement(tag, vr, None)
    several = isinstance(value, list)
    values: list[Any] = value if isinstance(value, list) else [value]
    _check_multiplicity(vm, len(values), several)
    checked = [_value(keyword, vr, one) for one in values]
    return DataElement(tag, vr, checked if several else checked[0], validation_mode=config.RAISE)


def _check_multiplicity(vm: str, count: int, several: bool) -> None:
    """Compare with a VM of the dictionary: "1", "3", "1-3", "1-n", "2-2n" (PS3.5 6.4)."""
    least_text, _, most = vm.partition("-")
    least = int(least_text)
    if vm == "1" and several:
        raise ValueError("takes one value, not a list")
    if count < least or (not most and count != least):
        raise ValueError(f"takes {vm} values, not {count}")
    if most.isdigit() and count > int(most):
        raise ValueError(f"takes {vm} values, not {count}")
    if most.endswith("n") and most != "n" and count % int(most[:-1]):
        raise ValueError(f"takes {vm} values, not {count}")


def _value(keyword: str, vr: str, value: object) -> str | int | float:
    """One value in the type that pydicom wants for the VR. Raises ValueError or TypeError."""
    if vr in _INTEGERS:
        return _integer(vr, value)
    if vr in _REALS:
        return _real(vr, value)
    if not isinstance(value, str):
        raise TypeError(f"takes text, not {_type(value)}")
    if vr == "DA":
        return parse_date(value)
    if vr == "UI":
        return parse_uid(value)
    if keyword in _IDENTIFIERS:
        return PatientIdentifier(value).value
    if vr not in ONE_TEXT_VRS and "\\" in value:
        raise ValueError("a backslash separates values in DICOM: use a list")
    layout = "\r\n\t\f" if vr in ("ST", "LT", "UT") else ""  # PS3.5 6.1.3
    if control := control_character("".join(c for c in value if c not in layout)):
        raise ValueError(f"holds the control character {control}")
    if vr in ("TM", "DT") and "-" in (value if vr == "TM" else value[:-5]):
        raise ValueError("takes one moment, not a range")
    try:
        validate_value(vr, value, config.RAISE)
    except ValueError as error:
        said = str(error).split(" Please see")[0]
        raise ValueError(
            f"{quoted(value)} is no value of VR {vr}" if repr(value) in said else said
        ) from None
    return value


def _integer(vr: str, value: object) -> int:
    if vr == "IS" and isinstance(value, str) and re.fullmatch(r" *[+-]?[0-9]{1,12} *", value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"takes a whole number, not {_type(value)}")
    least, most = _INTEGERS[vr]
    if not least <= value <= most:
        raise ValueError(f"takes a number from {least} to {most}")
    return value


def _real(vr: str, value: object) -> str | float:
    if vr == "DS" and isinstance(value, str):
        if len(value) > 16 or not _DECIMAL.fullmatch(value):
            raise ValueError(f"{quoted(value)} is no decimal number of at most 16 characters")
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"takes a number, not {_type(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or abs(number) > _REALS[vr]:
        raise ValueError("takes a finite number within the range of its VR")
    if vr == "DS":
        plain = str(value)
        return plain if len(plain) <= 16 else str(format_number_as_ds(number))
    return number


def _type(value: object) -> str:
    """JSON's name of a value's type."""
    if isinstance(value, str):
        return f"the text {quoted(value)}"
    names = {bool: "true or false", dict: "an object", list: "a list", type(None): "null"}
    return names.get(type(value), "a number")


def _shown(keyword: str) -> str:
    return keyword if keyword.isascii() and keyword.isalnum() else quoted(keyword)
