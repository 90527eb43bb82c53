"""All attributes of a file as JSON-friendly values, for people and programs to look at."""

import math
import re
from struct import iter_unpack
from typing import BinaryIO

from pydicom.datadict import keyword_for_tag

from .charset import Charset
from .nested import Item, charset_of, has_items, read_items, value_bytes
from .scan import Scan
from .tags import CHARACTER_SET, ONE_TEXT_VRS, TEXT_VRS, meant_vr

_LONGEST_VALUE = 65536  # bytes; UT alone may be longer
_LONGEST_SEQUENCE = 1024 * 1024
_MOST_BYTES = 4 * 1024 * 1024  # of one file
_STRINGS = frozenset({"AE", "AS", "CS", "DA", "DT", "TM", "UI", "UR"}) | TEXT_VRS
_NUMBERS = {
    "US": "H",
    "SS": "h",
    "UL": "I",
    "SL": "i",
    "UV": "Q",
    "SV": "q",
    "FL": "f",
    "FD": "d",
    "AT": "HH",
}
_WHOLE = re.compile(r"[+-]?[0-9]{1,18}")
_DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")


def read_tags(file: BinaryIO, scan: Scan) -> dict[str, object]:
    """Every top-level element of the dataset under its keyword, in the file's order.

    Elements without a keyword (private, unknown) are under "gggg,eeee" in hexadecimal. A value
    is text, a number, a list of those where there are several, None where empty; a sequence is a
    list of such dicts. IS and DS are numbers if they are well formed, else the text that is
    there; infinite and undefined numbers are "Infinity", "-Infinity", "NaN". AT is "gggg,eeee".
    A known tag written as UN is read in the dictionary's VR, as pydicom does.
    Nothing is cut silently: what is binary (OB, OW, UN, ...), beyond 64 KiB (a sequence: 1 MiB),
    or beyond 4 MiB in all is `{"bytes": its length}`. Group lengths are left out. Of an element
    that is there twice, the first counts.
    """
    charset = charset_of(file, scan)
    left = _MOST_BYTES
    tags: dict[str, object] = {}
    for element in scan.elements:
        key = _key(element.tag)
        if element.tag & 0xFFFF == 0 or key in tags:
            continue
        length = element.end - element.value
        vr = meant_vr(element.tag, element.vr)
        sequence = has_items(file, scan, element)
        if length > min(left, _LONGEST_SEQUENCE if sequence else _LONGEST_VALUE):
            tags[key] = {"bytes": length}
            continue
        if sequence:
            left -= length
            tags[key] = [_item(i, charset) for i in read_items(file, scan, element)]
        elif _is_shown(vr):
            left -= length
            raw = value_bytes(file, scan, element)
            tags[key] = _value(vr, raw, charset, scan.little_endian)
        else:
            tags[key] = {"bytes": length}
    return tags


def _item(item: Item, charset: Charset) -> dict[str, object]:
    for tag, _, raw, _ in item:
        if tag == CHARACTER_SET and isinstance(raw, bytes):
            charset = Charset.of(raw)  # PS3.5 7.5.3: else inherited
    shown: dict[str, object] = {}
    for tag, written_vr, raw, little in item:
        key, vr = _key(tag), meant_vr(tag, written_vr)
        if tag & 0xFFFF == 0 or key in shown:
            continue
        if isinstance(raw, list):
            shown[key] = [_item(inner, charset) for inner in raw]
        elif len(raw) <= _LONGEST_VALUE and _is_shown(vr):
            shown[key] = _value(vr, raw, charset, little)
        else:
            shown[key] = {"bytes": len(raw)}
    return shown


def _key(tag: int) -> str:
    return keyword_for_tag(tag) or f"{tag >> 16:04X},{tag & 0xFFFF:04X}"


def _is_shown(vr: str) -> bool:
    # "US or SS" of implicit VR is left as bytes: which one it is, the pixels say.
    return vr in _STRINGS or vr in _NUMBERS or vr in ("IS", "DS")


def _value(vr: str, raw: bytes, charset: Charset, little: bool) -> object:
    if vr in _NUMBERS:
        return _numbers(vr, raw, little)
    if vr in ONE_TEXT_VRS:
        return charset.decode_loosely(raw.rstrip(b"\0 "), vr) or None
    if vr in TEXT_VRS:
        text = charset.decode_loosely(raw.rstrip(b"\0 "), vr)
    else:
        text = raw.decode("latin-1")
    values: list[object] = []
    for padded in text.split("\\"):
        part = padded.strip("\0 ").rstrip("=") if vr == "PN" else padded.strip("\0 ")
        if vr == "IS" and _WHOLE.fullmatch(part):
            values.append(int(part))
        elif vr in ("IS", "DS") and _DECIMAL.fullmatch(part):
            values.append(_finite(float(part)))
        else:
            values.append(part or None)
    return values[0] if len(values) == 1 else values


def _numbers(vr: str, raw: bytes, little: bool) -> object:
    code = ("<" if little else ">") + _NUMBERS[vr]
    size = 4 if vr in ("AT", "UL", "SL", "FL") else 2 if vr in ("US", "SS") else 8
    if len(raw) % size:
        return {"bytes": len(raw)}
    values: list[object] = []
    for numbers in iter_unpack(code, raw):
        if vr == "AT":
            values.append(f"{numbers[0]:04X},{numbers[1]:04X}")
        else:
            values.append(_finite(numbers[0]))
    return None if not values else values[0] if len(values) == 1 else values


def _finite(number: float) -> float | str:
    """The number, or its name where JSON has none."""
    if isinstance(number, int) or math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"
