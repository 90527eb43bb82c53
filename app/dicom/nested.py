"""Sequences read out of bytes in memory, after `scan` has bounded and checked them.

Recursion goes as deep as `Limits.max_depth` let the file nest, so it can't overflow.
"""

from struct import unpack_from
from typing import BinaryIO

from .charset import Charset
from .meta import Element
from .scan import Scan
from .tags import CHARACTER_SET, ITEM, ITEM_END, LONG_VRS, SEQUENCE_END, VR_OF_TAG, other_vr
from .walk import UNDEFINED

_LONGEST_CHARSET = 1024
# Tag, VR, and the raw value or the items; with the byte order of a raw value (little endian?).
Piece = tuple[int, str, "bytes | list[Item]", bool]
Item = list[Piece]


def value_bytes(file: BinaryIO, scan: Scan, element: Element) -> bytes:
    """The value as it lies in the file; a sequence's with its items and delimiters.

    All of it is read: look at its size first.
    """
    source = scan.source(file)
    source.seek(element.value)
    return source.read(element.end - element.value)


def charset_of(file: BinaryIO, scan: Scan) -> Charset:
    """The dataset's SpecificCharacterSet; a value of absurd length is cut, and so unknown."""
    element = scan.element(CHARACTER_SET)
    if element is None:
        return Charset()
    end = min(element.end, element.value + _LONGEST_CHARSET)
    return Charset.of(value_bytes(file, scan, element._replace(end=end)))


def has_items(file: BinaryIO, scan: Scan, element: Element) -> bool:
    """Is the top-level `element` a sequence: SQ, or UN of undefined length (PS3.5 6.2.2)?"""
    if element.vr != "UN":
        return element.vr == "SQ"
    if element.end - element.value < 8:
        return False
    source = scan.source(file)
    source.seek(element.value - 4)
    return source.read(4) == b"\xff\xff\xff\xff"


def read_items(file: BinaryIO, scan: Scan, element: Element) -> list[Item]:
    """The items of a top-level sequence. Reads the whole value: look at its size first."""
    as_un = element.vr == "UN"
    implicit, little = scan.implicit or as_un, scan.little_endian or as_un
    return _items(value_bytes(file, scan, element), 0, implicit, little)[0]


def _items(data: bytes, at: int, implicit: bool, little: bool) -> tuple[list[Item], int]:
    """The items from `at` to the delimiter or the end of `data`, and where they end."""
    header = "<HHI" if little else ">HHI"
    items: list[Item] = []
    while at < len(data):
        group, number, length = unpack_from(header, data, at)
        at += 8
        if group << 16 | number == SEQUENCE_END:
            break
        if length == UNDEFINED:
            item, at = _elements(data, at, implicit, little)
        else:
            item, _ = _elements(data[at : at + length], 0, implicit, little)
            at += length
        items.append(item)
    return items, at


def _elements(data: bytes, at: int, implicit: bool, little: bool) -> tuple[Item, int]:
    """The elements from `at` to the delimiter or the end of `data`, and where they end."""
    order = "<" if little else ">"
    item: Item = []
    while at < len(data):
        group, number, length = unpack_from(order + "HHI", data, at)
        tag = group << 16 | number
        if tag == ITEM_END:
            return item, at + 8
        if implicit:
            vr = VR_OF_TAG.get(tag) or other_vr(tag)
            at += 8
        elif (code := data[at + 4 : at + 6]) in LONG_VRS:
            vr = LONG_VRS[code]
            (length,) = unpack_from(order + "I", data, at + 8)
            at += 12
        else:
            vr = code.decode("ascii")
            (length,) = unpack_from(order + "H", data, at + 6)
            at += 8
        value: bytes | list[Item]
        if length != UNDEFINED:
            raw = data[at : at + length]
            at += length
            value = _items(raw, 0, implicit, little)[0] if vr == "SQ" else raw
        elif vr in ("OB", "OW", "OB or OW"):
            start, at = at, _behind_fragments(data, at, order)
            value = data[start:at]
        else:
            as_un = vr == "UN" and not implicit
            value, at = _items(data, at, implicit or as_un, little or as_un)
        item.append((tag, vr, value, little))
    return item, at


def _behind_fragments(data: bytes, at: int, order: str) -> int:
    """Where the encapsulated pixel data that starts at `at` ends (an icon's; PS3.5 A.4)."""
    while True:
        group, number, length = unpack_from(order + "HHI", data, at)
        at += 8
        if group << 16 | number != ITEM:
            return at
        at += length
