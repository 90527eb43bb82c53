"""The file meta information: group 0002, always explicit VR little endian (PS3.10 7.1)."""

from dataclasses import dataclass
from struct import unpack
from typing import BinaryIO, NamedTuple

from pydicom import config
from pydicom.uid import UID

from ..errors import MalformedDicom, NotDicom
from .tags import (
    LONG_VRS,
    MEDIA_STORAGE_SOP_CLASS_UID,
    MEDIA_STORAGE_SOP_INSTANCE_UID,
    SHORT_VRS,
    TRANSFER_SYNTAX_UID,
    name,
)
from .values import parse_uid, quoted

PREAMBLE = 128
GROUP_LENGTH = 0x00020000
_MOST_ELEMENTS = 100  # PS3.10 defines 16
_LONGEST_UID = 64 + 1  # and its padding
_UIDS = (MEDIA_STORAGE_SOP_CLASS_UID, MEDIA_STORAGE_SOP_INSTANCE_UID, TRANSFER_SYNTAX_UID)
_IMPLICIT = "1.2.840.10008.1.2"
_BIG_ENDIAN = "1.2.840.10008.1.2.2"
# The whole dataset is deflated in these; in Deflated Image Frame Compression only frames are.
_DEFLATED = frozenset(
    {"1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.4.95", "1.2.840.10008.1.2.4.205"}
)


class Element(NamedTuple):
    """Where one element lies. Offsets are bytes; `end` is one past its last byte, delimiters
    included. `vr` is the dictionary's in implicit VR files ("US or SS" is possible)."""

    tag: int
    vr: str
    header: int
    value: int
    end: int


class Syntax(NamedTuple):
    """How a transfer syntax writes a dataset (PS3.5 A)."""

    implicit: bool
    little_endian: bool
    deflated: bool


@dataclass(frozen=True)
class Meta:
    """Group 0002 of a file; a UID that it lacks is ""."""

    elements: tuple[Element, ...]
    end: int  # where the dataset, or its deflated form, starts
    transfer_syntax_uid: str
    sop_class_uid: str
    sop_instance_uid: str


def syntax(transfer_syntax_uid: str) -> Syntax:
    """The encoding of a known transfer syntax; private ones count as explicit little endian.

    Raises MalformedDicom for a UID of DICOM's own root that is no transfer syntax.
    """
    uid = UID(transfer_syntax_uid, validation_mode=config.IGNORE)  # parse_uid was stricter
    if not uid.is_private and not uid.is_transfer_syntax:
        raise MalformedDicom(f"TransferSyntaxUID {quoted(uid)} is not a known transfer syntax.")
    return Syntax(uid == _IMPLICIT, uid != _BIG_ENDIAN, uid in _DEFLATED)


def read_meta(file: BinaryIO, size: int) -> Meta:
    """Read the file meta information of a file of `size` bytes.

    Raises NotDicom without preamble and prefix, MalformedDicom for everything else. Strict
    where parsers differ: a wrong group length, sequences and unknown VRs are refused.
    """
    file.seek(0)
    if file.read(PREAMBLE + 4)[PREAMBLE:] != b"DICM":
        raise NotDicom('This is not a DICOM file: "DICM" is missing behind its first 128 bytes.')
    elements: list[Element] = []
    uids: dict[int, str] = {}
    said_end: int | None = None
    position = PREAMBLE + 4
    while position < size:
        file.seek(position)
        header = file.read(12)
        if len(header) < 8:
            raise _malformed(f"the file is truncated at byte {position}")
        group, number, code, length = unpack("<HH2sH", header[:8])
        if group != 2:
            break
        tag = group << 16 | number
        value = position + 8
        if code in LONG_VRS:
            if len(header) < 12:
                raise _malformed(f"the file is truncated within {name(tag)} at byte {position}")
            length = int.from_bytes(header[8:12], "little")
            value = position + 12
        elif code not in SHORT_VRS:
            raise _malformed(f"{name(tag)} at byte {position} has an unknown VR")
        if code == b"SQ" or length == 0xFFFFFFFF:
            raise _malformed(f"{name(tag)} at byte {position} is a sequence")
        if value + length > size:
            raise _malformed(
                f"{name(tag)} at byte {position} says it is {length} bytes long, but the file "
                f"has {size - value}: it is truncated"
            )
        if len(elements) == _MOST_ELEMENTS:
            raise _malformed(f"it has more than {_MOST_ELEMENTS} elements")
        if tag in _UIDS:
            if tag in uids:
                raise _malformed(f"{name(tag)} is there twice")
            uids[tag] = _uid(file, tag, value, length)
        elif tag == GROUP_LENGTH:
            if elements or length != 4:
                raise _malformed(f"{name(tag)} is misplaced at byte {position}")
            file.seek(value)
            said_end = value + 4 + int.from_bytes(file.read(4), "little")
        elements.append(Element(tag, code.decode(), position, value, value + length))
        position = value + length
    if said_end not in (None, position):
        raise _malformed(f"its group length points to byte {said_end}, but it ends at {position}")
    if not uids.get(TRANSFER_SYNTAX_UID):
        raise _malformed("TransferSyntaxUID (0002,0010) is missing")
    return Meta(
        elements=tuple(elements),
        end=position,
        transfer_syntax_uid=uids[TRANSFER_SYNTAX_UID],
        sop_class_uid=uids.get(MEDIA_STORAGE_SOP_CLASS_UID, ""),
        sop_instance_uid=uids.get(MEDIA_STORAGE_SOP_INSTANCE_UID, ""),
    )


def _uid(file: BinaryIO, tag: int, value: int, length: int) -> str:
    """A UID of the file meta information, without its padding; "" if empty."""
    if length > _LONGEST_UID:
        raise _malformed(f"{name(tag)} is {length} bytes long; a UID has at most 64")
    file.seek(value)
    text = file.read(length).rstrip(b"\0 ").decode("latin-1")
    try:
        return parse_uid(text) if text else ""
    except ValueError as error:
        raise _malformed(f"{name(tag)}: {str(error).rstrip('.')}") from None


def _malformed(what: str) -> MalformedDicom:
    return MalformedDicom(f"The file meta information is malformed: {what}.")
