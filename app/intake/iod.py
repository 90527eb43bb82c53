"""Has a file what its IOD requires (PS3.3)? Asked of dciodvfy, in a process of its own.

dciodvfy reads untrusted bytes in C++, and ends itself at some of them. So it is given what `scan`
has bounded, without pixels, documents and private elements, under limits, and for a while only.
What it prints quotes the file: nothing of it is shown, logged or kept but tags, in our words.

Only attributes of type 1, 1C, 2 and 2C that are missing, or empty where they may not be, count. A
validator that breaks is no statement about the file: it could not be checked, then.
"""

import os
import re
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import asynccontextmanager, suppress
from logging import getLogger
from struct import pack, unpack
from tempfile import TemporaryFile
from typing import BinaryIO, NamedTuple

import anyio
import anyio.to_thread
from anyio.abc import Process
from anyio.lowlevel import RunVar
from pydicom import Dataset
from pydicom.datadict import keyword_for_tag, tag_for_keyword
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from app.dicom import Element, Scan
from app.errors import Nonconforming, NotValidated
from app.settings import Settings

SECONDS = 30.0  # of the clock
CPU_SECONDS = 20
MEMORY_BYTES = 512 * 1024 * 1024
MAX_GIVEN_BYTES = 32 * 1024 * 1024  # of a file, without its pixels
MAX_SAID_BYTES = 8 * 1024 * 1024
MAX_LACKING = 1000  # different ones
LINE_BYTES = 4096  # of a line, the rest is passed over
AT_ONCE = 4  # in one app process
NAMED = 20  # attributes in a message
STEPS = 3  # of a path in a message, from its end

_PIXELS = {
    tag_for_keyword("PixelData"): (b"OW", 2),
    tag_for_keyword("FloatPixelData"): (b"OF", 4),
    tag_for_keyword("DoubleFloatPixelData"): (b"OD", 8),
}
_SHORTENED = {**_PIXELS, tag_for_keyword("EncapsulatedDocument"): (b"OB", 2)}
_BITS_ALLOCATED = tag_for_keyword("BitsAllocated")
_LATERALITY = tag_for_keyword("Laterality")

_ERROR = re.compile(
    rb"^Error - (?:</([^<>\n]+)> - (Missing attribute|Empty attribute \(no value\)) for Type "
    rb"([12]C?) (?:Required|Conditional) - Module=<\w+>|"
    rb"(Information Object Not found)|(Dicom dataset read failed))$",
    re.MULTILINE,
)
_STEP = re.compile(rb"\w*\(([0-9a-f]{4}),([0-9a-f]{4})\)(?:\[[0-9]+\])?")
_IOD = re.compile(rb"^\w+$", re.MULTILINE)

_proven: set[str] = set()  # programs whose answers are what is read here
_limiter: RunVar[anyio.CapacityLimiter] = RunVar("dciodvfy")

logger = getLogger(__name__)


class Lacking(NamedTuple):
    """A required attribute that isn't there, or is there without a value."""

    kind: str  # "1", "1C", "2" or "2C"
    path: tuple[int, ...]  # tags, from the top level down
    empty: bool

    def __str__(self) -> str:
        names = [
            keyword_for_tag(tag) or f"({tag >> 16:04X},{tag & 0xFFFF:04X})"
            for tag in self.path[-STEPS:]
        ]
        return ".../" * (len(self.path) > STEPS) + "/".join(names)

    @property
    def problem(self) -> str:
        return f"type {self.kind}, {'empty' if self.empty else 'missing'}"


class NotCheckedError(Exception):
    """Why a file could not be checked: a clause about it, with nothing of its content."""


class Validator:
    """Holds files against their IODs, as `iod_validation` says."""

    def __init__(self, settings: Settings) -> None:
        self._mode = settings.iod_validation
        self._program = settings.dciodvfy or "dciodvfy"
        self._spool_dir = settings.spool_dir

    async def check(self, file: BinaryIO, scanned: Scan, changes: Dataset) -> list[str]:
        """Warnings about a file that `changes` will be written to, in at most one sentence.

        Raises Nonconforming and NotValidated instead, where the setting is to refuse.
        """
        if self._mode == "off":
            return []
        try:
            await self._prove()
            lacking = await self.lacking(file, scanned, {int(each.tag) for each in changes})
        except (NotCheckedError, OSError) as error:
            ours = isinstance(error, NotCheckedError)
            reason = str(error) if ours else "there is no room for what dciodvfy would be given"
            logger.warning("a file could not be held against its IOD: %s", reason)
            said = f"Whether the file has what its IOD requires could not be checked: {reason}."
            if self._mode == "refuse":
                raise NotValidated(f"{said} Nothing was stored.") from error
            return [said]
        if not lacking:
            return []
        named = ", ".join(f"{each} ({each.problem})" for each in lacking[:NAMED])
        more = f" and {len(lacking) - NAMED} more" if len(lacking) > NAMED else ""
        said = f"The file lacks what its IOD requires (PS3.3): {named}{more}."
        if self._mode == "refuse":
            errors = [{"keyword": str(each), "problem": each.problem} for each in lacking[:NAMED]]
            raise Nonconforming(f"{said} Nothing was stored.", extra={"errors": errors})
        return [said]

    async def lacking(
        self, file: BinaryIO, scanned: Scan, filled: Collection[int] = ()
    ) -> list[Lacking]:
        """What a file lacks, type 1 first; an attribute of several items once. `filled` are the
        tags that it will have. Raises NotCheckedError."""
        with TemporaryFile(dir=self._spool_dir) as given:
            await anyio.to_thread.run_sync(excerpt, file, scanned, given)
            found = await self._ask(given, _syntax(scanned))
        there = {each.tag for each in scanned.elements} | set(filled)
        return sorted(each for each in found if _counts(each, there, filled))

    async def _prove(self) -> None:
        """A program that says nothing would pass every file: before the first, a CT image
        without anything else must be found to lack its PatientID."""
        if self._program in _proven:
            return
        uid = CTImageStorage.encode() + b"\0"
        with TemporaryFile(dir=self._spool_dir) as given:
            given.write(pack("<HH2sH", 0x0008, 0x0016, b"UI", len(uid)) + uid)
            given.seek(0)
            found = await self._ask(given, ExplicitVRLittleEndian)
        if Lacking("2", (0x00100020,), empty=False) not in found:
            raise NotCheckedError("dciodvfy does not answer as the one that Lightbox knows")
        _proven.add(self._program)

    async def _ask(self, given: BinaryIO, syntax: str) -> set[Lacking]:
        """What dciodvfy says of a dataset. Raises NotCheckedError."""
        said = _Said()
        async with _slots():
            try:
                with anyio.fail_after(SECONDS):
                    async with _running(_command(self._program, syntax), given) as process:
                        assert process.stderr is not None
                        async for chunk in process.stderr:
                            said.more(chunk)
                        status = await process.wait()
            except TimeoutError:
                raise NotCheckedError(f"dciodvfy took longer than {SECONDS:g} s") from None
            except OSError as error:
                raise NotCheckedError("dciodvfy could not be started") from error
        said.end(status)
        return said.lacking


class _Said:
    """What dciodvfy says on standard error, read as it comes and not kept."""

    def __init__(self) -> None:
        self.lacking: set[Lacking] = set()
        self._bytes = 0
        self._line = b""
        self._named = self._unknown = self._unread = False

    def more(self, chunk: bytes) -> None:
        """Raises NotCheckedError beyond MAX_SAID_BYTES."""
        self._bytes += len(chunk)
        if self._bytes > MAX_SAID_BYTES:
            raise NotCheckedError(f"dciodvfy said more than {MAX_SAID_BYTES >> 20} MiB about it")
        lines, _, self._line = (self._line + chunk).rpartition(b"\n")
        self._line = self._line[:LINE_BYTES]
        self._read(lines)

    def end(self, status: int) -> None:
        """Raises NotCheckedError unless the file was looked at to its end."""
        self._read(self._line)
        if status not in (0, 1):
            raise NotCheckedError(f"dciodvfy ended with status {status}")
        if self._unknown:
            raise NotCheckedError("dciodvfy does not know its SOP class")
        if self._unread:
            raise NotCheckedError("dciodvfy could not read it to its end")
        if not self._named:
            raise NotCheckedError("dciodvfy did not say which IOD it is of")

    def _read(self, lines: bytes) -> None:
        # A value that is quoted may hold line breaks, and so any line: what it can do is to
        # make its own file lack something.
        self._named = self._named or _IOD.search(lines) is not None
        for found in _ERROR.finditer(lines):
            where, what, kind, unknown, unread = found.groups()
            self._unknown = self._unknown or unknown is not None
            self._unread = self._unread or unread is not None
            if where is not None and len(self.lacking) < MAX_LACKING:
                steps = [_STEP.fullmatch(step) for step in where.split(b"/")]
                path = tuple(int(step[1] + step[2], 16) for step in steps if step is not None)
                if len(path) == len(steps):
                    self.lacking.add(Lacking(kind.decode(), path, what.startswith(b"Empty")))


def _counts(lacking: Lacking, there: Collection[int], filled: Collection[int]) -> bool:
    """Is it so, as far as can be seen here?"""
    if len(lacking.path) > 1:
        return True
    (tag,) = lacking.path
    if lacking.empty:
        return tag not in filled
    # Without a known BodyPartExamined, dciodvfy takes every part for one of a pair.
    return tag not in there and tag != _LATERALITY


def excerpt(file: BinaryIO, scanned: Scan, target: BinaryIO) -> None:
    """Write the dataset without what says nothing about required attributes, in the order of its
    tags: without private elements and group lengths, with two bytes or so instead of pixels.

    More than 16 bits allocated become 16: dciodvfy ends itself at more. Raises NotCheckedError
    beyond MAX_GIVEN_BYTES.
    """
    source = scanned.source(file)
    size = 0
    for element in _kept(scanned):
        content = _replaced(element, scanned)
        size += len(content) if content is not None else element.end - element.header
        if size > MAX_GIVEN_BYTES:
            raise NotCheckedError(
                f"without its pixels it is larger than {MAX_GIVEN_BYTES >> 20} MiB"
            )
        if content is None:
            source.seek(element.header)
            content = source.read(element.end - element.header)
        if element.tag == _BITS_ALLOCATED and element.end - element.value == 2:
            form = "<H" if scanned.little_endian else ">H"
            (bits,) = unpack(form, content[-2:])
            content = content[:-2] + pack(form, min(bits, 16))
        target.write(content)
    target.seek(0)


def _kept(scanned: Scan) -> Iterator[Element]:
    previous = None
    for element in sorted(scanned.elements, key=lambda each: each.tag):
        group, number = element.tag >> 16, element.tag & 0xFFFF
        pixels = group == 0x7FE0 and element.tag not in _PIXELS
        if element.tag != previous and group % 2 == 0 and number != 0 and not pixels:
            yield element
        previous = element.tag


def _replaced(element: Element, scanned: Scan) -> bytes | None:
    """What is written instead of an element; None: itself."""
    if element.tag not in _SHORTENED:
        return None
    order = "<" if scanned.little_endian else ">"
    tag = pack(f"{order}HH", element.tag >> 16, element.tag & 0xFFFF)
    vr, size = _SHORTENED[element.tag]
    if element.tag in _PIXELS and scanned.fragments is not None:
        # Encapsulated (PS3.5 A.4): an empty offset table, and no fragment.
        items = pack("<HHIHHI", 0xFFFE, 0xE000, 0, 0xFFFE, 0xE0DD, 0)
        return tag + b"OB" + pack("<HI", 0, 0xFFFFFFFF) + items
    if scanned.implicit:
        return tag + pack("<I", size) + bytes(size)
    return tag + vr + pack(f"{order}HI", 0, size) + bytes(size)


def _syntax(scanned: Scan) -> str:
    """How the excerpt is encoded; any encapsulated transfer syntax stands for all of them."""
    if scanned.fragments is not None:
        return RLELossless
    if scanned.implicit:
        return ImplicitVRLittleEndian
    return ExplicitVRLittleEndian if scanned.little_endian else ExplicitVRBigEndian


def _command(program: str, syntax: str) -> list[str]:
    """The limits are set by prlimit (util-linux) before the program is. The soft limit of CPU time
    ends it by a signal."""
    limits = {"as": MEMORY_BYTES, "core": 0, "cpu": CPU_SECONDS, "fsize": 0, "nofile": 64}
    return [
        shutil.which("prlimit") or "prlimit",
        *(f"--{name}={value}" for name, value in limits.items()),
        "--",
        shutil.which(program) or program,
        *("-new", "-input-nometa", "-input-ts", syntax),
    ]


@asynccontextmanager
async def _running(command: list[str], given: BinaryIO) -> AsyncIterator[Process]:
    """A process that reads `given`, in a session of its own: all of it is killed where it isn't
    waited for to its end. Raises OSError."""
    process = await anyio.open_process(
        command,
        stdin=given,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd="/",
        env={"PATH": "/usr/bin:/bin", "LC_ALL": "C"},
        start_new_session=True,
    )
    try:
        yield process
    except BaseException:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with anyio.move_on_after(5, shield=True):
            await process.wait()
            if process.stderr is not None:
                async for _ in process.stderr:  # to its end, which closes it
                    pass
        raise


def _slots() -> anyio.CapacityLimiter:
    """Of this event loop, for all intakes together."""
    try:
        return _limiter.get()
    except LookupError:
        limiter = anyio.CapacityLimiter(AT_ONCE)
        _limiter.set(limiter)
        return limiter
