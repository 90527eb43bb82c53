"""WADO-RS bytes (PS3.18 10.4.1): files, frames, renderings, thumbnails, bulk data.

What is one body is sent by the edge: here only Orthanc's own route is named, built from the ids
of an instance that came in through our checks. With the study's stamp in it, the edge may keep
the answer. What has to be wrapped in parts is streamed through the app, a part after the other.
"""

import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass
from typing import TypeVar

from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.access import InstanceFacts, StudyAccess
from app.dicomweb.media import DICOM, VIDEO_TYPES, Choice
from app.errors import NotFound, Unprocessable
from app.models import Instance

Value = TypeVar("Value")

_ENCAPSULATED_PDF = "1.2.840.10008.5.1.4.1.1.104.1"
_MOST_FRAMES = 1_000_000
_MOST_LISTED = 1000
_FEW_FILES = 256
Chunks = AbstractAsyncContextManager[AsyncIterator[bytes]]


@dataclass(frozen=True)
class SendFile:
    """Bytes for the edge to send: the internal location, and the type to send them as. With a
    `boundary` the edge wraps them as the one part of an answer in parts."""

    location: str
    media_type: str
    boundary: str = ""


@dataclass(frozen=True)
class Part:
    """One part of an answer: its Content-Type, and how to get its bytes."""

    media_type: str
    open: Callable[[], Chunks]


def instance_of(access: StudyAccess) -> InstanceFacts:
    """The instance that the request named. Raises NotFound unless all three UIDs belong
    together."""
    if access.instance is None:
        raise NotFound("The study has no such instance.")
    return access.instance


async def instances_of(
    session: AsyncSession, access: StudyAccess, series_uid: str = ""
) -> list[Instance]:
    """The instances of the access's study, or of one of its series, in order. Raises NotFound."""
    query = select(Instance).where(Instance.study_instance_uid == access.study_instance_uid)
    if series_uid:
        query = query.where(Instance.series_instance_uid == series_uid)
    found = await session.exec(
        query.order_by(
            col(Instance.series_instance_uid),
            col(Instance.instance_number),
            col(Instance.sop_instance_uid),
        )
    )
    instances = list(found)
    if not instances:
        raise NotFound("The study has no such series.")
    return instances


# ----------------------------------------------------------------------------------- frames


def frame_numbers(text: str, instance: InstanceFacts) -> Sequence[int]:
    """The frames of `1` or `1,2,3`, numbered from 1 (PS3.18 10.4.1.1.6); all, where none is
    named. A video is one file, as its frame 1. Raises NotFound."""
    is_video = instance.transfer_syntax_uid in VIDEO_TYPES
    frames = range(1, 2 if is_video else instance.number_of_frames + 1)
    if not text:
        return frames
    numbers = text.split(",")
    if len(numbers) > _MOST_LISTED or not all(_is_number(each, _MOST_FRAMES) for each in numbers):
        raise NotFound("The instance has no such frame.")
    found = [int(each) for each in numbers]
    if not all(each in frames for each in found):
        raise NotFound("The instance has no such frame.")
    return found


def frame(instance: InstanceFacts, number: int, choice: Choice, stamp: str) -> SendFile:
    """One frame as it is stored. Video, which is one file for all frames, is not kept."""
    kept = "" if instance.transfer_syntax_uid in VIDEO_TYPES else f"-kept/{stamp}"
    return sent(choice, f"{kept}/instances/{instance.orthanc_id}/frames/{number - 1}/raw")


def sent(choice: Choice, path: str) -> SendFile:
    """What the edge gets from Orthanc by a path, alone or as a part."""
    if not choice.multipart:
        return SendFile(f"/_orthanc{path}", choice.part_type)
    boundary = new_boundary()
    return SendFile(f"/_orthanc-part/{boundary}{path}", choice.part_type, boundary)


# -------------------------------------------------------------------- renderings, thumbnails


@dataclass(frozen=True)
class Rendering:
    """How a frame is to be drawn (PS3.18 8.3.5); None: as it is."""

    viewport: tuple[int, int] | None = None  # width, height in pixels
    window: tuple[float, float] | None = None  # center, width, as PS3.3 C.11.2.1.2.1
    quality: int | None = None  # of JPEG, 1 to 100

    @property
    def query(self) -> str:
        """The arguments of Orthanc's `/rendered`."""
        found = []
        if self.viewport:
            found += [f"width={self.viewport[0]}", f"height={self.viewport[1]}"]
        if self.window:
            found += [f"window-center={self.window[0]:g}", f"window-width={self.window[1]:g}"]
        if self.quality:
            found.append(f"quality={self.quality}")
        return "?" + "&".join(found) if found else ""


def parse_rendering(parameters: Sequence[tuple[str, str]], allowed: Sequence[str]) -> Rendering:
    """Read `viewport`, `window` and `quality` (PS3.18 8.3.5.1). Raises Unprocessable."""
    given = dict(parameters)
    if len(given) < len(parameters) or not given.keys() <= set(allowed):
        takes = f"{', '.join(allowed)}, each once" if allowed else "no parameters"
        raise Unprocessable(f"This address takes {takes}.")
    return Rendering(
        viewport=_read(given, "viewport", "`width,height` in pixels, each 1 to 4096", _viewport),
        window=_read(given, "window", "`center,width` or `center,width,linear`", _window),
        quality=_read(given, "quality", "a number from 1 to 100", _quality),
    )


def rendered(
    instance: InstanceFacts | Instance,
    number: int,
    rendering: Rendering,
    media_type: str,
    stamp: str,
) -> SendFile:
    """A frame as a picture, fitted into the viewport; a video or a PDF as what it is."""
    if media_type.startswith("video/"):
        return SendFile(f"/_orthanc/instances/{instance.orthanc_id}/frames/0/raw", media_type)
    if media_type == "application/pdf":
        return SendFile(f"/_orthanc/instances/{instance.orthanc_id}/content/0042-0011", media_type)
    return SendFile(
        f"/_orthanc-image-kept/{stamp}/instances/{instance.orthanc_id}/frames/{number - 1}"
        f"/rendered{rendering.query}",
        media_type,
    )


def rendered_types(instance: InstanceFacts | Instance) -> list[str]:
    """What an instance can be rendered as, the usual one first. Raises NotFound."""
    if instance.transfer_syntax_uid in VIDEO_TYPES:
        return [VIDEO_TYPES[instance.transfer_syntax_uid]]
    if instance.sop_class_uid == _ENCAPSULATED_PDF:
        return ["application/pdf"]
    if not has_picture(instance):
        raise NotFound("The instance has no pixels that could be rendered.")
    return ["image/jpeg", "image/png"]


def representative(instances: Sequence[Instance]) -> Instance | None:
    """The one in the middle of those with a picture; None if there is none."""
    pictures = [each for each in instances if has_picture(each)]
    return pictures[len(pictures) // 2] if pictures else None


def has_picture(instance: InstanceFacts | Instance) -> bool:
    """Can a picture be drawn of it?"""
    return instance.rows != 0 and instance.transfer_syntax_uid not in VIDEO_TYPES


# -------------------------------------------------------------------------------- bulk data


def bulk_type(instance: InstanceFacts, tags: Sequence[str]) -> str:
    """The media type of an element's bytes."""
    pdf = list(tags) == ["0042-0011"] and instance.sop_class_uid == _ENCAPSULATED_PDF
    return "application/pdf" if pdf else "application/octet-stream"


def bulk_path(path: str) -> list[str]:
    """Orthanc's names on the way to an element that is asked for as `ggggeeee` or
    `ggggeeee/item/ggggeeee`, items from 1 (PS3.18 10.4.1.1.5). Raises NotFound."""
    tags = bulk_tags(path)
    if tags is None or tags[0] == "7fe0-0010":
        # Pixels are asked for by the frame; Orthanc would list their fragments here.
        raise NotFound("The instance has no such bulk data.")
    return tags


def bulk_tags(path: str) -> list[str] | None:
    """`54000100/1/54001010` as Orthanc's `/content` names it: `5400-0100/0/5400-1010`."""
    parts = path.split("/")
    if len(parts) % 2 == 0 or len(parts) > 2 * 16 + 1:
        return None
    tags = []
    for index, part in enumerate(parts):
        if index % 2:
            if not _is_number(part, 999_999):
                return None
            tags.append(str(int(part) - 1))
        else:
            if len(part) != 8 or any(digit not in "0123456789abcdefABCDEF" for digit in part):
                return None
            tags.append(f"{part[:4]}-{part[4:]}".lower())
    return tags


# ------------------------------------------------------------------------------------ parts


def multipart_type(part_type: str, boundary: str) -> str:
    """The Content-Type of an answer in parts (PS3.18 8.6.1.2)."""
    return f'multipart/related; type="{part_type.partition(";")[0]}"; boundary={boundary}'


def new_boundary() -> str:
    """One that nobody could have written into a file (RFC 2046 5.1.1)."""
    return secrets.token_hex(16)


def assembled(instances: Sequence[Instance], boundary: str) -> Iterator[bytes]:
    """The body of an answer whose parts are files: the edge puts them in their places.

    Four at a time are got from Orthanc, so that one is ready when the one before it has gone.
    """
    place = "whole" if len(instances) <= _FEW_FILES else "many"
    for number, each in enumerate(instances):
        wait = ' wait="yes"' if number % 4 == 3 else ""
        yield (
            f"--{boundary}\r\n"
            f"Content-Type: {DICOM}; transfer-syntax={each.transfer_syntax_uid}\r\n\r\n"
            f'<!--# include virtual="/_orthanc-{place}/instances/{each.orthanc_id}/file"{wait} -->'
            "\r\n"
        ).encode()
    yield f"--{boundary}--\r\n".encode()


async def in_parts(parts: Iterable[Part], boundary: str) -> AsyncIterator[bytes]:
    """The body of an answer in parts, one after the other, with memory that does not grow.

    What fails after the first byte ends the answer without its last boundary.
    """
    for part in parts:
        async with part.open() as chunks:
            yield f"--{boundary}\r\nContent-Type: {part.media_type}\r\n\r\n".encode()
            async for chunk in chunks:
                yield chunk
        yield b"\r\n"
    yield f"--{boundary}--\r\n".encode()


async def begun(body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same body, after its first bytes have come: what is refused is refused with a status."""
    first = await anext(body)

    async def whole() -> AsyncIterator[bytes]:
        async with aclosing(body):  # type: ignore[type-var]
            yield first
            async for chunk in body:
                yield chunk

    return whole()


# ---------------------------------------------------------------------------------- reading


def _is_number(text: str, most: int) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 7 and 1 <= int(text) <= most


def _read(
    given: dict[str, str], name: str, form: str, read: Callable[[str], Value | None]
) -> Value | None:
    if not given.get(name):
        return None
    value = read(given[name])
    if value is None:
        raise Unprocessable(f"`{name}` must be {form}.")
    return value


def _viewport(text: str) -> tuple[int, int] | None:
    width, comma, height = text.partition(",")
    if not comma or not _is_number(width, 4096) or not _is_number(height, 4096):
        return None
    return int(width), int(height)


def _window(text: str) -> tuple[float, float] | None:
    # The archive's only function is the linear one.
    center, width, *function = text.split(",")[:4] if "," in text else ("", "")
    try:
        found = float(center), float(width)
    except ValueError:
        return None
    sane = all(abs(each) <= 1e6 for each in found) and found[1] > 0  # NaN is not
    return found if sane and function in ([], ["linear"]) else None


def _quality(text: str) -> int | None:
    return int(text) if _is_number(text, 100) else None
