"""Writes a copy of a file with some top-level elements changed, in flat memory.

Everything else is copied byte for byte, by ranges: pixels are never held or parsed.
"""

import zlib
from collections.abc import Iterator, Mapping
from struct import pack
from typing import BinaryIO

from pydicom import Dataset
from pydicom.dataelem import DataElement
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_data_element

from ..errors import Unprocessable
from .charset import UTF_8, Charset
from .meta import GROUP_LENGTH, PREAMBLE, syntax
from .nested import charset_of
from .scan import Scan
from .tags import (
    CHARACTER_SET,
    ITEM,
    LONG_VRS,
    MEDIA_STORAGE_SOP_CLASS_UID,
    MEDIA_STORAGE_SOP_INSTANCE_UID,
    PIXEL_DATA,
    SOP_CLASS_UID,
    SOP_INSTANCE_UID,
    TEXT_VRS,
    meant_vr,
    name,
)
from .values import quoted
from .walk import Walker

_CHUNK = 65536
_NO_LIMIT = 1 << 62  # the file was scanned
_NOT_FOR_CHANGING = (PIXEL_DATA, CHARACTER_SET)
_IN_META = {
    SOP_CLASS_UID: MEDIA_STORAGE_SOP_CLASS_UID,
    SOP_INSTANCE_UID: MEDIA_STORAGE_SOP_INSTANCE_UID,
}


def rewrite(
    source: BinaryIO,
    target: BinaryIO,
    scan: Scan,
    changes: Dataset,
    encoded: Mapping[int, bytes] | None = None,
) -> None:
    """Write `source` to `target` with `changes` replacing or joining its top-level elements.

    `encoded` are further elements, by tag, header and value as the file writes them.

    `scan` is that of `source`. Values are encoded in the file's transfer syntax and character
    set; text that a file without one (or ISO_IR 6) can't hold makes it ISO_IR 192, as ASCII is
    a subset of UTF-8, unless other text of the file holds bytes above 127 that no character set
    explains. An empty value is written with length zero. The MediaStorage UIDs follow a changed
    SOPInstanceUID and SOPClassUID. Not copied: group lengths of changed groups (retired, PS3.5
    7.2), all of a replaced element's duplicates, padding behind the dataset.

    Raises Unprocessable for text that can't be encoded, values too long for their VR, and for
    elements that are not for changing: groups 0000 and 0002, PixelData, SpecificCharacterSet.
    """
    refused = [name(e.tag) for e in changes if e.tag >> 16 in (0, 2) or e.tag in _NOT_FOR_CHANGING]
    if refused:
        raise Unprocessable(f"These can't be changed: {', '.join(refused)}.")
    new = {**(encoded or {}), **_encoded(source, scan, changes)}
    _write_meta(source, target, scan, changes)
    parts = _dataset(source, scan, new)
    if syntax(scan.transfer_syntax_uid).deflated:
        parts = _deflated(parts)
    target.writelines(parts)


def _dataset(source: BinaryIO, scan: Scan, new: dict[int, bytes]) -> Iterator[bytes]:
    """The bytes of the changed dataset. New elements go before the first greater tag."""
    lengths = {tag & 0xFFFF0000 for tag in new}
    file = scan.source(source)
    waiting = sorted(new)
    copied = upto = scan.start
    for element in scan.elements:
        due = 0
        while due < len(waiting) and waiting[due] <= element.tag:
            due += 1
        replaced = element.tag in new or element.tag in lengths
        if due or replaced:
            yield from _range(file, copied, upto)
            copied = upto
            for tag in waiting[:due]:
                yield new[tag]
            del waiting[:due]
        upto = element.end
        if replaced:
            copied = upto
    yield from _range(file, copied, upto)
    for tag in waiting:
        yield new[tag]


def _range(file: BinaryIO, start: int, end: int) -> Iterator[bytes]:
    file.seek(start)
    while start < end:
        chunk = file.read(min(_CHUNK, end - start))
        if not chunk:
            raise OSError("The file became shorter while it was copied.")
        start += len(chunk)
        yield chunk


def _deflated(parts: Iterator[bytes]) -> Iterator[bytes]:
    """The parts as a raw deflated stream, padded to an even length (PS3.5 A.5)."""
    deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    written = 0
    for part in parts:
        packed = deflater.compress(part)
        written += len(packed)
        yield packed
    packed = deflater.flush()
    yield packed + b"\0" * ((written + len(packed)) % 2)


def _write_meta(source: BinaryIO, target: BinaryIO, scan: Scan, changes: Dataset) -> None:
    """Preamble, prefix and group 0002: verbatim, but for UIDs that follow the dataset's."""
    follow = {_IN_META[int(e.tag)]: str(e.value or "") for e in changes if int(e.tag) in _IN_META}
    if not follow:
        target.writelines(_range(source, 0, scan.meta.end))
        return
    kept: dict[int, bytes] = {}
    for element in scan.meta.elements:
        kept[element.tag] = b"".join(_range(source, element.header, element.end))
    for tag, uid in follow.items():
        value = uid.encode("ascii")
        value += b"\0" * (len(value) % 2)
        kept[tag] = pack("<HH2sH", tag >> 16, tag & 0xFFFF, b"UI", len(value)) + value
    had_length = kept.pop(GROUP_LENGTH, None)
    group = b"".join(kept[tag] for tag in sorted(kept))
    if had_length is not None:
        group = pack("<HH2sHI", 2, 0, b"UL", 4, len(group)) + group
    target.writelines(_range(source, 0, PREAMBLE + 4))
    target.write(group)


def _encoded(source: BinaryIO, scan: Scan, changes: Dataset) -> dict[int, bytes]:
    """The changed elements, header and value, as the file writes them."""
    charset = charset_of(source, scan)
    lacking = [name(e.tag) for e in changes if not _fits(e, charset)]
    new: dict[int, bytes] = {}
    if lacking:
        if not charset.is_default:
            raise Unprocessable(
                f"{', '.join(lacking)}: the file's character set "
                f"{quoted('/'.join(charset.terms))} lacks some of these characters."
            )
        if _has_unexplained_text(source, scan, {int(e.tag) for e in changes}):
            raise Unprocessable(
                f"{', '.join(lacking)}: the file declares no character set that holds these "
                "characters, and can't be made UTF-8, as its other text isn't ASCII."
            )
        charset = Charset((UTF_8,))
        new[CHARACTER_SET] = _element(DataElement(CHARACTER_SET, "CS", UTF_8), charset, scan)
    for changed in changes:
        new[int(changed.tag)] = _element(changed, charset, scan)
    return new


def _has_unexplained_text(source: BinaryIO, scan: Scan, replaced: set[int]) -> bool:
    """Does text that stays hold bytes other than ASCII? UTF-8 would give them another meaning.

    UN of unknown tags and private elements of implicit VR are not looked at: nothing says that
    they hold text.
    """
    file = scan.source(source)
    skipped = {e.value for e in scan.elements if e.tag in replaced}
    found = False

    def visit(tag: int, vr: str, value: int, end: int) -> None:
        nonlocal found
        if not found and value not in skipped and meant_vr(tag, vr) in TEXT_VRS:
            found = not all(chunk.isascii() for chunk in _range(file, value, end))

    end = scan.elements[-1].end if scan.elements else scan.start
    Walker(file, end, _NO_LIMIT, _NO_LIMIT, _NO_LIMIT, visit).dataset(
        scan.start, end, implicit=scan.implicit, little=scan.little_endian
    )
    return found


def _texts(element: DataElement) -> Iterator[tuple[str, str]]:
    """(text, VR) of everything in `element`, items included, that is written in the set."""
    if element.VR == "SQ":
        for item in element.value or ():
            for inner in item:
                yield from _texts(inner)
    elif element.VR in TEXT_VRS:
        yield _joined(element), element.VR


def _fits(element: DataElement, charset: Charset) -> bool:
    try:
        for text, vr in _texts(element):
            charset.encode(text, vr)
    except ValueError:
        return False
    return True


def _joined(element: DataElement) -> str:
    """The text of an element, several values joined by a backslash."""
    if element.is_empty:
        return ""
    if element.VM > 1:
        return "\\".join(str(one) for one in element.value)
    return str(element.value)


def _element(element: DataElement, charset: Charset, scan: Scan) -> bytes:
    """One element in the file's transfer syntax. Raises Unprocessable if its VR can't hold it."""
    order = "<" if scan.little_endian else ">"
    tag, vr = int(element.tag), str(element.VR)
    if vr == "SQ":
        value = b""
        for item in element.value or ():
            inside = b"".join(_element(inner, charset, scan) for inner in item)
            value += pack(order + "HHI", ITEM >> 16, ITEM & 0xFFFF, len(inside)) + inside
    elif vr in TEXT_VRS:
        # Not by pydicom, which replaces characters that it can't encode.
        value = charset.encode(_joined(element), vr)
        value += b" " * (len(value) % 2)
    elif len(vr) != 2:
        raise Unprocessable(f"{name(tag)} can't be changed: its VR depends on the pixels.")
    else:
        out = DicomBytesIO()
        out.is_implicit_VR = True  # so that the value follows 8 bytes, whatever its VR
        out.is_little_endian = scan.little_endian
        write_data_element(out, element)
        value = out.getvalue()[8:]
    numbers = (tag >> 16, tag & 0xFFFF)
    if scan.implicit:
        return pack(order + "HHI", *numbers, len(value)) + value
    if vr.encode() in LONG_VRS:
        return pack(order + "HH2sHI", *numbers, vr.encode(), 0, len(value)) + value
    if len(value) > 0xFFFF:
        raise Unprocessable(f"{name(tag)}: {len(value)} bytes are too long for its VR {vr}.")
    return pack(order + "HH2sH", *numbers, vr.encode(), len(value)) + value
