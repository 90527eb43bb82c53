"""ZIP files on their way in: opened without trusting a word they say of themselves.

Nothing is ever unpacked to a name from the archive; each entry goes through one temporary file
and is bounded by the bytes that really come out.
"""

import re
import struct
import zipfile
import zlib
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryFile
from typing import BinaryIO

from app.errors import LightboxError, TooLarge, Unprocessable

CHUNK_BYTES = 256 * 1024
ZIP_MAGIC = b"PK\x03\x04"
EMPTY_ZIP_MAGIC = b"PK\x05\x06"
_END_RECORD_REACH = 22 + 65535 + 20 + 56  # with the longest comment, and the zip64 records
_BYTES_PER_ENTRY = 1024


@dataclass(frozen=True)
class ZipLimits:
    """`max_bytes` of everything unpacked, `max_files` entries, `max_ratio` unpacked to packed."""

    max_bytes: int
    max_files: int
    max_ratio: int


@dataclass(frozen=True)
class Entry:
    """One file of an archive: its bytes at the start, or why it was refused."""

    name: str
    file: BinaryIO | None
    refusal: LightboxError | None = None


def is_zip(file: BinaryIO) -> bool:
    """Does the file begin as a ZIP does? Leaves it at the start."""
    file.seek(0)
    magic = file.read(4)
    file.seek(0)
    return magic in (ZIP_MAGIC, EMPTY_ZIP_MAGIC)


def entries(archive: BinaryIO, limits: ZipLimits, spool_dir: Path) -> Generator[Entry, None, None]:
    """The files of an archive, one at a time; each is closed when the next is asked for.

    Directories and the resource forks of macOS are passed over. An entry with a name that climbs
    out, a nested ZIP, an encrypted or a broken entry is refused alone. Raises Unprocessable for a
    file that is no readable ZIP or has too many entries, TooLarge for one that unpacks beyond the
    limits.
    """
    _refuse_large_directory(archive, limits)
    try:
        with zipfile.ZipFile(archive) as opened:
            infos = [info for info in opened.infolist() if not _passed_over(info)]
            if len(infos) > limits.max_files:
                raise Unprocessable(
                    f"The ZIP has {len(infos)} files; at most {limits.max_files} are taken."
                )
            _refuse_bomb(sum(info.file_size for info in infos), archive, limits)
            unpacked = 0
            for info in infos:
                refusal = _refusal(info)
                if refusal is not None:
                    yield Entry(_shown(info), None, refusal)
                    continue
                with TemporaryFile(dir=spool_dir) as file:
                    try:
                        with opened.open(info) as source:
                            while chunk := source.read(CHUNK_BYTES):
                                unpacked += len(chunk)
                                _refuse_bomb(unpacked, archive, limits)
                                file.write(chunk)
                    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
                        # The entries behind it may be whole.
                        broken = Unprocessable(f"This ZIP entry is broken: {_said(error)}.")
                        yield Entry(_shown(info), None, broken)
                        continue
                    if is_zip(file):
                        nested = Unprocessable("A ZIP inside a ZIP is not taken: unpack it first.")
                        yield Entry(_shown(info), None, nested)
                    else:
                        yield Entry(_shown(info), file)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError) as error:
        raise Unprocessable("The ZIP can't be read: it is broken or cut off.") from error
    except (RuntimeError, ValueError) as error:
        raise Unprocessable("The ZIP can't be read: it is encrypted or broken.") from error


def _refuse_large_directory(archive: BinaryIO, limits: ZipLimits) -> None:
    """Bound the list of entries before zipfile reads it, all of it, into memory.

    The list stands before the end record (APPNOTE 4.3.16) and is no longer than the file; an
    entry of it takes 46 bytes and its name. Raises Unprocessable.
    """
    size = archive.seek(0, 2)
    archive.seek(max(0, size - _END_RECORD_REACH))
    tail = archive.read(_END_RECORD_REACH)
    archive.seek(0)
    # Any of them: which one zipfile believes depends on comments.
    starts = [each.start() for each in re.finditer(re.escape(b"PK\x05\x06"), tail)]
    for start in starts:
        if len(tail) < start + 22:
            continue
        count, length = struct.unpack_from("<HL", tail, start + 10)
        if count == 0xFFFF or length == 0xFFFFFFFF:
            zip64 = tail.rfind(b"PK\x06\x06", 0, start)
            if zip64 < 0 or len(tail) < zip64 + 56:
                continue
            count, length = struct.unpack_from("<QQ", tail, zip64 + 32)
        if count > limits.max_files * 2 or length > limits.max_files * _BYTES_PER_ENTRY:
            raise Unprocessable(
                f"The ZIP lists more files than are taken; at most {limits.max_files} are."
            )


def _refuse_bomb(unpacked: int, archive: BinaryIO, limits: ZipLimits) -> None:
    here = archive.tell()
    packed = archive.seek(0, 2)
    archive.seek(here)
    # Small archives of blank images pack very well: the ratio counts from 1 MB on.
    if unpacked > max(packed, 1) * limits.max_ratio and unpacked > 1024 * 1024:
        raise TooLarge(
            f"The ZIP unpacks to more than {limits.max_ratio} times its size, as a ZIP bomb does. "
            "Nothing more of it was taken."
        )
    if unpacked > limits.max_bytes:
        raise TooLarge(
            f"The ZIP unpacks to more than the limit of {limits.max_bytes} bytes. Nothing more of "
            "it was taken."
        )


def _passed_over(info: zipfile.ZipInfo) -> bool:
    return info.filename.endswith("/") or info.filename.startswith("__MACOSX/")


def _refusal(info: zipfile.ZipInfo) -> LightboxError | None:
    path = PurePosixPath(info.filename.replace("\\", "/"))
    if not path.parts or path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
        return Unprocessable("The name of this ZIP entry leads out of the archive.")
    if info.flag_bits & 0x1:
        return Unprocessable("This ZIP entry is encrypted.")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        # PS3.10 and PS3.18 know no other; LZMA may ask for gigabytes of memory to unpack.
        return Unprocessable("This ZIP entry is packed by another method than deflate.")
    if info.filename.lower().endswith(".zip"):
        return Unprocessable("A ZIP inside a ZIP is not taken: unpack it first.")
    return None


def _said(error: Exception) -> str:
    return "its checksum differs" if "CRC" in str(error) else "it can't be unpacked"


def _shown(info: zipfile.ZipInfo) -> str:
    """The entry's name, safe to show."""
    return "".join(
        each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in info.filename
    )[:255]
