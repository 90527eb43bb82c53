"""Files in a body, one after the other: multipart/related (RFC 2387), or the body itself.

A part is handed out as soon as it is whole, and the next is read when the caller comes back: at
most one file is held, on disk past 1 MiB, however many there are. What stands before the first
boundary and after the last is passed over (RFC 2046 5.1.1); line ends are CRLF.
"""

import re
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import BinaryIO, cast

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect

from app.errors import LightboxError, TooLarge, Unprocessable
from app.settings import MEBIBYTE

MAX_HEADERS = 16  # of one part
MAX_HEADER_BYTES = 4096  # of one header
_PIECE_BYTES = 64 * 1024  # what is split before any of it is written
# RFC 2046 5.1.1: 1 to 70 of these, no space at the end.
_BOUNDARY = re.compile(rb"[0-9A-Za-z'()+_,\-./:=? ]{0,69}[0-9A-Za-z'()+_,\-./:=?]")


@dataclass(frozen=True)
class Part:
    """One file of a body; closed when the next is asked for. It stands at its start."""

    number: int  # from 1
    media_type: str  # in lower case, without parameters; "" where the part names none
    file: BinaryIO


def boundary_of(parameters: dict[bytes, bytes]) -> bytes:
    """The boundary among a Content-Type's parameters. Raises Unprocessable."""
    boundary = parameters.get(b"boundary", b"")
    if not _BOUNDARY.fullmatch(boundary):
        raise Unprocessable(
            "The Content-Type of a multipart body names its `boundary`: 1 to 70 characters "
            "(RFC 2046 5.1.1)."
        )
    return boundary


async def related_parts(
    body: AsyncGenerator[bytes, None], boundary: bytes, *, max_parts: int, spool_dir: Path
) -> AsyncGenerator[Part, None]:
    """The parts of a multipart body, each when it is whole.

    What is wrong with the body is raised after the parts before it were handed out: TooLarge
    beyond `max_parts`, Unprocessable where it is malformed, breaks off or has no part, and what
    `body` raises.
    """
    splitter = _Splitter(boundary, max_parts)
    file: UploadFile | None = None
    try:
        async with aclosing(_pieces(body)) as pieces:
            async for piece in pieces:
                splitter.feed(piece)
                while splitter.events:
                    event = splitter.events.popleft()
                    if isinstance(event, _Begins):
                        file = _spooled(spool_dir)
                    elif file is not None and isinstance(event, bytes):
                        await file.write(event)
                    elif file is not None and isinstance(event, _Ends):
                        await file.seek(0)
                        yield Part(event.number, event.media_type, file.file)
                        await file.close()
                        file = None
                if splitter.error is not None:
                    raise splitter.error
        splitter.finish()
    finally:
        if file is not None:
            file.file.close()


async def single_part(
    body: AsyncGenerator[bytes, None], media_type: str, *, spool_dir: Path
) -> AsyncGenerator[Part, None]:
    """A body that is one file. Raises Unprocessable where it breaks off, and what `body` raises."""
    file = _spooled(spool_dir)
    try:
        async with aclosing(_pieces(body)) as pieces:
            async for piece in pieces:
                await file.write(piece)
        await file.seek(0)
        yield Part(1, media_type, file.file)
    finally:
        file.file.close()


async def _pieces(body: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """The body in pieces of bounded size, as whoever sends it may choose others."""
    try:
        async with aclosing(body):
            async for chunk in body:
                for start in range(0, len(chunk), _PIECE_BYTES):
                    yield chunk[start : start + _PIECE_BYTES]
    except ClientDisconnect as error:
        raise Unprocessable("The upload broke off before its end.") from error


def _spooled(spool_dir: Path) -> UploadFile:
    # Closed by who reads the parts. UploadFile writes to disk in a thread.
    file = SpooledTemporaryFile(max_size=MEBIBYTE, dir=str(spool_dir))  # noqa: SIM115
    return UploadFile(cast(BinaryIO, file), size=0)


@dataclass(frozen=True)
class _Begins:
    """The headers of a part are over; its bytes follow."""


@dataclass(frozen=True)
class _Ends:
    number: int
    media_type: str


class _Splitter:
    """What the parser says of the bytes, as events in their order."""

    def __init__(self, boundary: bytes, max_parts: int) -> None:
        self.events: deque[_Begins | bytes | _Ends] = deque()
        self.error: LightboxError | None = None
        self._max_parts = max_parts
        self._number = -1
        self._media_type = ""
        self._field = bytearray()
        self._value = bytearray()
        self._ended = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._part_begins,
                "on_header_field": self._header_field,
                "on_header_value": self._header_value,
                "on_header_end": self._header_ends,
                "on_headers_finished": self._headers_end,
                "on_part_data": self._part_data,
                "on_part_end": self._part_ends,
                "on_end": self._all_ends,
            },
            max_header_count=MAX_HEADERS,
            max_header_size=MAX_HEADER_BYTES,
        )
        # The parser knows no preamble: here it is a part number 0, which is passed over. The
        # second CRLF lets the first boundary stand at the very start of the body.
        self.feed(b"--" + boundary + b"\r\n\r\n\r\n")

    def feed(self, data: bytes) -> None:
        """Split what came. What is wrong with it becomes `error`; what came before, `events`."""
        try:
            self._parser.write(data)
        except LightboxError as error:
            self.error = error
        except FormParserError:
            self.error = Unprocessable(
                f"The multipart body can't be read: part {self._number} has malformed headers, or "
                "more or longer ones than are taken."
            )

    def finish(self) -> None:
        """Nothing more will come. Raises Unprocessable where something is missing."""
        if self._number <= 0:
            raise Unprocessable(
                "The body has no part: no line of it begins one with the boundary that its "
                "Content-Type names. Lines end with CRLF."
            )
        if not self._ended:
            raise Unprocessable(
                f"The body breaks off in part {self._number}: the closing boundary is missing."
            )

    def _part_begins(self) -> None:
        self._number += 1
        self._media_type = ""
        if self._number > self._max_parts:
            raise TooLarge(f"A request has at most {self._max_parts} parts.")

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_ends(self) -> None:
        if self._field.lower() == b"content-type":
            media_type, _ = parse_options_header(self._value.decode("latin-1"))
            self._media_type = media_type.decode("latin-1")
        self._field.clear()
        self._value.clear()

    def _headers_end(self) -> None:
        if self._number > 0:
            self.events.append(_Begins())

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._number > 0:
            self.events.append(data[start:end])

    def _part_ends(self) -> None:
        if self._number > 0:
            self.events.append(_Ends(self._number, self._media_type))

    def _all_ends(self) -> None:
        self._ended = True
