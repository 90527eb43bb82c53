"""Does what a dataset says of its pixels fit the pixels that are there?

Decoders and frame indexes allocate by what is said: Orthanc 1.10 takes 16 bytes a frame and three
times Rows x Columns, however short the pixel data is. So what is said is compared with what is
there before any of them sees the file. The codestreams of frames are not looked into.
"""

import re
from collections.abc import Mapping
from typing import BinaryIO

from ..errors import MalformedDicom
from .meta import Element
from .tags import (
    BITS_ALLOCATED,
    COLUMNS,
    NUMBER_OF_FRAMES,
    PHOTOMETRIC_INTERPRETATION,
    PIXEL_DATA,
    PIXEL_TAGS,
    ROWS,
    SAMPLES_PER_PIXEL,
    name,
)
from .values import quoted

MOST_FRAMES = 1_000_000
_LONGEST_CODE = 64  # bytes of an IS (12) or a CS (16), and some padding
_WHOLE_NUMBER = re.compile(r"[+-]?[0-9]{1,11}")
# Video (PS3.5 8.2.5-8, .100 to .108 and their fragmentable variants) and JPEG 2000 Part 2
# multi-component (8.2.4) put many frames into one fragment.
_MANY_FRAMES_IN_ONE = re.compile(r"1\.2\.840\.10008\.1\.2\.4\.(10[0-8](\.1)?|92|93)")
_DICOM_ROOT = "1.2.840.10008."
# Chrominance of fewer pixels than luminance: of 12 bits per 8 x 3 (PS3.3 C.7.6.3.1.2), and 16.
_SUBSAMPLED = {
    "YBR_FULL_422": (2, 3),
    "YBR_PARTIAL_422": (2, 3),
    "YBR_PARTIAL_420": (1, 2),
}
_VRS = frozenset({"OB", "OW", "OB or OW", "OF", "OD", "UN"})


def check_pixels(
    source: BinaryIO,
    elements: Mapping[int, Element],
    *,
    syntax_uid: str,
    little: bool,
    fragments: int | None,
    max_frame_bytes: int,
) -> int:
    """The number of frames of a dataset, after it and the size of a frame were checked.

    `fragments` is that of PixelData without its offset table, None if it is not encapsulated.
    Raises MalformedDicom with the attribute in `extra["errors"]`, as `read_header` does.
    """
    frames = _frames(source, elements.get(NUMBER_OF_FRAMES))
    for tag in PIXEL_TAGS:
        if (pixels := elements.get(tag)) is None:
            continue
        if pixels.vr not in _VRS:
            raise _refused(tag, f"has the VR {pixels.vr}")
        rows, columns, samples, bits = (
            _number(source, elements.get(number), little)
            for number in (ROWS, COLUMNS, SAMPLES_PER_PIXEL, BITS_ALLOCATED)
        )
        frame = rows * columns * samples * ((bits + 7) // 8)
        if frame > max_frame_bytes:
            raise _refused(
                ROWS,
                f"is {rows} and Columns {columns}: a frame has {frame} bytes uncompressed; the "
                f"limit is {max_frame_bytes}",
            )
        length = pixels.end - pixels.value
        if tag == PIXEL_DATA and fragments is not None:
            _check_encapsulated(frames, fragments, length, syntax_uid)
            continue
        needed = (frames * rows * columns * samples * bits + 7) // 8
        if length < needed:
            part, whole = _SUBSAMPLED.get(
                _code(source, elements.get(PHOTOMETRIC_INTERPRETATION)), (1, 1)
            )
            needed = needed * part // whole
        if length < needed:
            raise _refused(
                tag,
                f"is truncated: it has {length} bytes, but {_count(frames, 'frame')} of {rows} x "
                f"{columns} pixels need {needed}",
            )
    return frames


def _check_encapsulated(frames: int, fragments: int, length: int, syntax_uid: str) -> None:
    """A fragment holds one frame or a part of one (PS3.5 A.4), but for video. What private
    transfer syntaxes do is not known."""
    if _MANY_FRAMES_IN_ONE.fullmatch(syntax_uid) or not syntax_uid.startswith(_DICOM_ROOT):
        if frames > length:
            raise _refused(NUMBER_OF_FRAMES, f"is {frames}, but PixelData has {length} bytes")
    elif frames > fragments:
        raise _refused(
            NUMBER_OF_FRAMES,
            f"is {frames}, but PixelData has {_count(fragments, 'fragment')} behind its offset "
            "table",
        )


def _frames(source: BinaryIO, element: Element | None) -> int:
    """NumberOfFrames; 1 if it is absent or empty."""
    if element is None:
        return 1
    if element.vr not in ("IS", "UN"):
        raise _refused(NUMBER_OF_FRAMES, f"has the VR {element.vr} instead of IS")
    text = _code(source, element)
    if not text:
        return 1
    count = int(text) if _WHOLE_NUMBER.fullmatch(text) else 0
    if count < 1:
        raise _refused(NUMBER_OF_FRAMES, f"is {quoted(text)}, not a number of frames")
    if count > MOST_FRAMES:
        raise _refused(NUMBER_OF_FRAMES, f"is {count}; the limit is {MOST_FRAMES}")
    return count


def _number(source: BinaryIO, element: Element | None, little: bool) -> int:
    """A US value; 1, so that it has no say, if it is absent, empty or 0."""
    if element is None or element.end == element.value:
        return 1
    length = element.end - element.value
    if element.vr not in ("US", "UN") or length != 2:
        raise _refused(
            element.tag, f"has {length} bytes of VR {element.vr} instead of one value of VR US"
        )
    source.seek(element.value)
    return int.from_bytes(source.read(2), "little" if little else "big") or 1


def _code(source: BinaryIO, element: Element | None) -> str:
    """A short text of ASCII; "" if it is absent."""
    if element is None:
        return ""
    length = element.end - element.value
    if length > _LONGEST_CODE:
        raise _refused(element.tag, f"is {length} bytes long")
    source.seek(element.value)
    return source.read(length).rstrip(b"\0 ").decode("latin-1").strip(" ")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _refused(tag: int, problem: str) -> MalformedDicom:
    keyword = name(tag).split(" ")[0]
    return MalformedDicom(
        f"The DICOM file can't be accepted: {keyword} {problem}.",
        extra={"errors": [{"keyword": keyword, "problem": problem}]},
    )
