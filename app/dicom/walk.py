"""Walks over the headers of a dataset without parsing a value, and without recursion.

What pydicom or Orthanc would recurse into, the walk counts: sequences of defined and undefined
length, items, fragments (PS3.5 7.5, A.4), UN of undefined length (implicit VR inside, PS3.5
6.2.2). A value of any other VR that starts with an Item tag may be taken for a sequence by some
parser or other, so it is walked as well, as a guess: a guess that goes wrong leaves the value
opaque, but depth and count hold inside it, so nothing can hide there.
"""

from collections.abc import Callable
from struct import Struct
from typing import BinaryIO, Final, NamedTuple

from ..errors import MalformedDicom
from .tags import (
    ITEM,
    ITEM_END,
    LONG_VRS,
    PIXEL_DATA,
    SEQUENCE_END,
    SHORT_VRS,
    VR_OF_TAG,
    meant_vr,
    name,
    other_vr,
)

UNDEFINED = 0xFFFFFFFF
# A dataset has a few hundred elements at its top level; the table of them is kept in memory.
MOST_TOP_LEVEL = 20_000
# Parsers hold text and numbers in memory, often several times. Values up to 64 KiB, all that the
# short VRs of explicit VR can hold, are bounded by max_elements alone.
MOST_OF_A_VALUE = 16 * 1024 * 1024
MOST_OF_LONG_VALUES = 64 * 1024 * 1024
_LONG_VALUE = 65536
_BULK_VRS = frozenset(
    {"OB", "OW", "OF", "OD", "OL", "OV", "UN", "SQ", "OB or OW", "US or OW", "US or SS or OW"}
)
_DATASET, _SEQUENCE, _FRAGMENTS = range(3)
_STRICT, _GUESS_IMPLICIT, _GUESS_SWITCHING = range(3)
_ITEM_MARKS = frozenset({b"\xfe\xff\x00\xe0", b"\xff\xfe\xe0\x00"})  # little, big endian
_SMALL_WINDOW, _LARGE_WINDOW = 4096, 65536
_VR_CODES = frozenset(SHORT_VRS) | frozenset(LONG_VRS)
_HEADER = 16  # the longest header, and the first bytes of its value
_EXPLICIT = (Struct(">HH2sH").unpack_from, Struct("<HH2sH").unpack_from)  # by little_endian
_IMPLICIT = (Struct(">HHI").unpack_from, Struct("<HHI").unpack_from)
_LENGTH = (Struct(">I").unpack_from, Struct("<I").unpack_from)

Row = tuple[int, str, int, int, int]  # tag, VR, header offset, value offset, end offset


class _Frame(NamedTuple):
    kind: int  # _DATASET, _SEQUENCE or _FRAGMENTS
    end: int  # own end, or where the nearest enclosing defined length ends
    defined: bool
    implicit: bool
    little: bool
    mode: int  # _STRICT, or how a guess reads items
    tag: int  # whose value it is; 0 for the whole dataset


class _Guess(NamedTuple):
    height: int  # of the stack below it
    start: int
    end: int
    little: bool
    once_more: bool  # a second pass, in the other encoding, is due


class _StructureError(Exception):
    """The structure is wrong: the file is malformed, or a guess was."""


class Walker:
    """One walk over `file`, whose size is `size` bytes.

    `elements` and `deepest` are running totals over all datasets walked, guesses included: a
    sequence in the dataset is at depth 1, one in an item of that at 2. `fragments` is how many
    the top-level PixelData has behind its offset table, None if it is not encapsulated.
    `visit(tag, vr, value, end)` is called for each element that holds no items, at any depth,
    outside guesses.
    """

    def __init__(
        self,
        file: BinaryIO,
        size: int,
        max_depth: int,
        max_elements: int,
        max_items: int,
        visit: Callable[[int, str, int, int], None] | None = None,
    ) -> None:
        self.file: Final = file
        self.size: Final = size
        self.max_depth: Final = max_depth
        self.max_elements: Final = max_elements
        self.max_items: Final = max_items
        self.visit: Final = visit
        self.elements = 0
        self.deepest = 0
        self.fragments: int | None = None
        self._elements_before = 0  # the top-level PixelData and its fragments
        self._long_values = 0  # bytes
        self._items: dict[int, int] = {}  # so far, of the sequence that is this high in the stack
        self._file_implicit = False
        self._position = 0
        self._stack: list[_Frame] = []
        self._guesses: list[_Guess] = []
        self._rows: list[Row] = []

    def dataset(self, start: int, end: int, *, implicit: bool, little: bool) -> list[Row]:
        """The top-level elements of the dataset from `start` to `end`, in the file's order.

        Raises MalformedDicom.
        """
        self._file_implicit = implicit
        self._position = start
        self._stack = [_Frame(_DATASET, end, True, implicit, little, _STRICT, 0)]
        self._guesses = []
        self._rows = []
        while self._stack:
            try:
                self._walk()
            except _StructureError as error:
                if not self._guesses:
                    raise MalformedDicom(f"The DICOM file is malformed: {error}.") from None
                self._end_guess()
        return self._rows

    def _walk(self) -> None:
        """Go on from the stack until it is empty. Hot: everything in it is a local name."""
        file, size, visit, stack, rows = self.file, self.size, self.visit, self._stack, self._rows
        max_elements, max_items, items = self.max_elements, self.max_items, self._items
        short_vr, long_vr, vr_of_tag = SHORT_VRS.get, LONG_VRS.get, VR_OF_TAG.get
        kind, end, defined, implicit, little, mode, _ = stack[-1]
        unpack = (_IMPLICIT if implicit or kind != _DATASET else _EXPLICIT)[little]
        position = self._position
        buffer, base, filled, window = b"", 0, 0, _SMALL_WINDOW
        vr: str | None
        while True:
            if position >= end:
                if not defined:
                    raise _StructureError(self._unfinished(end))
                frame = stack.pop()
                if self._guesses and len(stack) == self._guesses[-1].height:
                    stack.append(frame)  # _end_guess wants the stack as it was
                    self._end_guess()
                    position = self._position
                if not stack:
                    return
                kind, end, defined, implicit, little, mode, _ = stack[-1]
                unpack = (_IMPLICIT if implicit or kind != _DATASET else _EXPLICIT)[little]
                continue
            at = position - base
            if at < 0 or (at + _HEADER > filled and base + filled < size):
                # Small after a jump, so that skipping over values doesn't read them after all.
                window = _LARGE_WINDOW if 0 <= at <= filled else _SMALL_WINDOW
                file.seek(position)
                buffer = file.read(window)
                base, at, filled = position, 0, len(buffer)
            if end - position < 8:
                raise _StructureError(self._cut("an element's header", position, end))
            self.elements += 1
            if self.elements > max_elements:
                raise MalformedDicom(f"The DICOM file has more than {max_elements} elements.")

            if kind == _DATASET:
                if implicit:
                    group, number, length = unpack(buffer, at)
                    tag = group << 16 | number
                    vr = vr_of_tag(tag) or other_vr(tag)
                    value = position + 8
                else:
                    group, number, code, length = unpack(buffer, at)
                    tag = group << 16 | number
                    vr = short_vr(code)
                    value = position + 8
                if not 0 < group < 0xFFFE:
                    if tag == ITEM_END and not defined:
                        self._must_be_empty(tag, buffer, at, little, position)
                        position = value
                        stack.pop()
                        kind, end, defined, implicit, little, mode, _ = stack[-1]
                        unpack = _IMPLICIT[little]
                        continue
                    if tag == 0 and len(stack) == 1:
                        self._zeros_only(position, end)
                        stack.clear()
                        return
                    raise _StructureError(f"{name(tag)} has no place at byte {position}")
                if vr is None:
                    vr = long_vr(code)
                    if vr is None:
                        raise _StructureError(
                            f"{name(tag)} at byte {position} has the unknown VR {_shown(code)}"
                        )
                    if end - position < 12:
                        raise _StructureError(self._cut(name(tag), position, end))
                    length = _LENGTH[little](buffer, at + 8)[0]
                    value = position + 12
                if len(stack) == 1:
                    if len(rows) >= MOST_TOP_LEVEL:
                        raise MalformedDicom(
                            f"The DICOM file has more than {MOST_TOP_LEVEL} top-level elements."
                        )
                    if not rows and implicit and _looks_explicit(buffer, at):
                        raise _StructureError(
                            f"{name(tag)} at byte {position} is in explicit VR, against the "
                            "transfer syntax"
                        )
                    rows.append((tag, vr, position, value, value + length))
                if length == UNDEFINED:
                    inner = self._undefined(tag, vr, implicit, position)
                    self._note_depth(inner)
                    if len(stack) == 1:
                        self._elements_before = self.elements
                    items[len(stack)] = 0
                    if vr == "UN" and not implicit and mode == _STRICT:
                        implicit, little = True, True  # PS3.5 6.2.2
                    stack.append(_Frame(inner, end, False, implicit, little, mode, tag))
                    kind, defined, unpack = inner, False, _IMPLICIT[little]
                    position = value
                    continue
                stop = value + length
                if stop > end:
                    raise _StructureError(self._lying(tag, position, length, end))
                if length >= 8:
                    if length > _LONG_VALUE:
                        self._note_long_value(tag, vr, position, length)
                    first = at + value - position
                    if vr == "SQ":
                        self._note_depth(_SEQUENCE)
                        items[len(stack)] = 0
                        stack.append(_Frame(_SEQUENCE, stop, True, implicit, little, mode, tag))
                        kind, end, defined, unpack = _SEQUENCE, stop, True, _IMPLICIT[little]
                        position = value
                        continue
                    if buffer[first : first + 4] in _ITEM_MARKS:
                        if visit is not None and mode == _STRICT:
                            visit(tag, vr, value, stop)
                        self._begin_guess(tag, value, stop, buffer[first] == 0xFE, mode)
                        kind, end, defined, implicit, little, mode, _ = stack[-1]
                        unpack = _IMPLICIT[little]
                        position = value
                        continue
                elif vr == "SQ" and length:
                    raise _StructureError(
                        f"{name(tag)} at byte {position} is too short for a sequence"
                    )
                if visit is not None and mode == _STRICT:
                    visit(tag, vr, value, stop)
                position = stop
                continue

            group, number, length = unpack(buffer, at)
            tag = group << 16 | number
            value = position + 8
            if tag == ITEM:
                if length != UNDEFINED:
                    stop = value + length
                    if stop > end:
                        raise _StructureError(self._lying(tag, position, length, end))
                    if kind == _FRAGMENTS:
                        position = stop
                        continue
                elif kind == _FRAGMENTS:
                    raise _StructureError(f"a fragment of undefined length at byte {position}")
                else:
                    stop = end
                height = len(stack) - 1
                items[height] += 1
                if items[height] > max_items:
                    raise MalformedDicom(
                        f"The DICOM file has a sequence of more than {max_items} items: "
                        f"{name(stack[-1].tag)}."
                    )
                defined = length != UNDEFINED
                if stop - value >= 8:
                    if mode == _GUESS_SWITCHING:
                        # As pydicom: an item that doesn't look explicit is read as implicit.
                        implicit = implicit or not _looks_explicit(buffer, at + 8)
                    elif (
                        (mode == _STRICT and implicit and not self._file_implicit)
                        and buffer[at + 12 : at + 14] in _VR_CODES  # parsers would differ
                    ):
                        raise _StructureError(
                            f"the item at byte {position} of a UN sequence is in explicit VR"
                        )
                end, kind = stop, _DATASET
                stack.append(_Frame(kind, end, defined, implicit, little, mode, tag))
                unpack = (_IMPLICIT if implicit else _EXPLICIT)[little]
                position = value
            elif tag == SEQUENCE_END and (not defined or value == end):
                # Some writers end a sequence of defined length with a delimiter; all take that.
                self._must_be_empty(tag, buffer, at, little, position)
                position = value
                if not defined:
                    ended = stack.pop()
                    kind, end, defined, implicit, little, mode, _ = stack[-1]
                    unpack = (_IMPLICIT if implicit else _EXPLICIT)[little]
                    if len(stack) == 1:
                        if ended.kind == _FRAGMENTS and ended.tag == PIXEL_DATA:
                            # Neither the offset table nor the delimiter is a fragment.
                            self.fragments = max(0, self.elements - self._elements_before - 2)
                        rows[-1] = (*rows[-1][:4], position)
            else:
                raise _StructureError(f"{name(tag)} at byte {position} where an item should begin")

    def _undefined(self, tag: int, vr: str, implicit: bool, position: int) -> int:
        """What an element of undefined length holds (PS3.5 7.5, A.4, 6.2.2)."""
        if vr in ("OB", "OW", "OB or OW") and (tag == PIXEL_DATA or not implicit):
            return _FRAGMENTS
        if vr in ("SQ", "UN"):
            return _SEQUENCE
        raise _StructureError(f"{name(tag)} at byte {position} has VR {vr} and an undefined length")

    def _note_depth(self, kind: int) -> None:
        if kind == _SEQUENCE:
            depth = (len(self._stack) + 1) // 2
            if depth > self.max_depth:
                raise MalformedDicom(
                    f"The DICOM file nests sequences deeper than the limit of {self.max_depth}."
                )
            self.deepest = max(self.deepest, depth)

    def _note_long_value(self, tag: int, vr: str, position: int, length: int) -> None:
        if meant_vr(tag, vr) in _BULK_VRS:
            return
        self._long_values += length
        if length > MOST_OF_A_VALUE or self._long_values > MOST_OF_LONG_VALUES:
            which = f"{name(tag)} at byte {position} of VR {vr} is {length} bytes long"
            raise MalformedDicom(
                f"The DICOM file is malformed: {which}; the limit is {MOST_OF_A_VALUE} bytes, and "
                f"{MOST_OF_LONG_VALUES} for all values beyond {_LONG_VALUE}."
            )

    def _begin_guess(self, tag: int, start: int, end: int, little: bool, mode: int) -> None:
        """Walk a value as if it were a sequence: in implicit VR, and in an explicit file once
        more as pydicom reads it. A guess within a guess stays in its encoding."""
        self._note_depth(_SEQUENCE)
        once_more = mode == _STRICT and not self._file_implicit
        implicit = self._stack[-1].implicit if mode == _GUESS_SWITCHING else True
        mode = mode or _GUESS_IMPLICIT
        self._items[len(self._stack)] = 0
        self._guesses.append(_Guess(len(self._stack), start, end, little, once_more))
        self._stack.append(_Frame(_SEQUENCE, end, True, implicit, little, mode, tag))

    def _end_guess(self) -> None:
        """The current guess is over, right or wrong: its second pass, or on behind the value."""
        guess = self._guesses.pop()
        first = self._stack[guess.height]
        del self._stack[guess.height :]
        self._position = guess.end
        if guess.once_more:
            self._items[guess.height] = 0
            self._guesses.append(guess._replace(once_more=False))
            self._stack.append(first._replace(implicit=False, mode=_GUESS_SWITCHING))
            self._position = guess.start

    def _must_be_empty(self, tag: int, buffer: bytes, at: int, little: bool, position: int) -> None:
        if _LENGTH[little](buffer, at + 4)[0]:
            raise _StructureError(f"the delimiter {name(tag)} at byte {position} has a length")

    def _zeros_only(self, position: int, end: int) -> None:
        """Trailing zeros in whole headers (8 bytes) are padding, as Orthanc takes them."""
        if (end - position) % 8:
            raise _StructureError(f"{end - position} bytes follow the dataset at byte {position}")
        self.file.seek(position)
        while position < end:
            chunk = self.file.read(min(_LARGE_WINDOW, end - position))
            if not chunk or chunk.strip(b"\0"):
                raise _StructureError(
                    f"data that is not DICOM follows the dataset at byte {position}"
                )
            position += len(chunk)

    def _unfinished(self, end: int) -> str:
        frame = self._stack[-1]
        tag = next((f.tag for f in reversed(self._stack) if f.tag not in (0, ITEM)), frame.tag)
        cut = ": the file is truncated" if end == self._stack[0].end else ""
        return f"{name(tag)} has no delimiter before byte {end}{cut}"

    def _cut(self, what: str, position: int, end: int) -> str:
        if end == self._stack[0].end:
            return f"the file is truncated within {what} at byte {position}"
        return f"{what} at byte {position} does not fit into what holds it, which ends at {end}"

    def _lying(self, tag: int, position: int, length: int, end: int) -> str:
        which = f"{name(tag)} at byte {position} says it is {length} bytes long"
        if end == self._stack[0].end:
            return f"{which}, but the file has {end - position}: it is truncated"
        return f"{which}, more than what holds it, which ends at byte {end}"


def _looks_explicit(buffer: bytes, at: int) -> bool:
    """Do the two bytes behind the tag look like a VR, in the way pydicom asks it?"""
    code = buffer[at + 4 : at + 6]
    return len(code) == 2 and all(0x40 < byte < 0x5B for byte in code)


def _shown(code: bytes) -> str:
    text = code.decode("ascii", "replace")
    return text if text.isascii() and text.isalnum() else f"0x{code.hex()}"
