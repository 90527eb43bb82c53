"""The bounded first look at a file: no other parser sees it before this one has passed it.

A 2.9 KB file with 48 nested sequences crashes Orthanc 1.10, and 300 overflow pydicom's stack; one
that claims 2,000,000,000 frames makes Orthanc allocate 23 GB. So `scan` checks size, sequence depth
and the numbers of elements, items and frames by reading headers and a few numbers, in memory that
does not grow with the file. It is strict where parsers would read different things (unknown VRs,
wrong lengths, doubled identifiers): what one of them sees, all see.

After the dataset, zeros in a multiple of 8 bytes are padding, as Orthanc has it; anything else
is refused. Data Set Trailing Padding (FFFC,FFFC) is an element like others.
"""

import zlib
from dataclasses import dataclass, field
from pathlib import Path
from struct import pack
from tempfile import TemporaryFile
from types import TracebackType
from typing import BinaryIO, Self, cast

from ..errors import MalformedDicom, TooLarge
from .meta import Element, Meta, read_meta, syntax
from .pixels import check_pixels
from .tags import SINGLE_TAGS, name
from .walk import Walker

_CHUNK = 65536
_FREE_INFLATION = 16 * 1024 * 1024


@dataclass(frozen=True)
class Limits:
    """What a file may ask of its parsers. `max_depth` counts sequences inside sequences; for a
    deflated file `max_bytes` also bounds what it inflates to."""

    max_bytes: int
    max_depth: int = 16
    max_elements: int = 500_000
    max_items: int = 20_000  # of one sequence: Orthanc's time grows with their square
    max_frame_bytes: int = 512 * 1024 * 1024  # uncompressed
    max_deflate_ratio: int = 200  # beyond the first 16 MiB


@dataclass(frozen=True)
class Scan:
    """A file that passed, and where its top-level elements lie.

    Use it as a context manager, or `close` it: for a deflated file it owns a temporary file.
    """

    meta: Meta
    implicit: bool
    little_endian: bool
    start: int  # where the dataset starts, in `source(file)`
    elements: tuple[Element, ...]  # top level, in the file's order
    in_order: bool  # tags ascend, as PS3.5 7.1 asks
    element_count: int  # at all levels, with items and fragments
    depth: int  # of the deepest sequence; 0 if there is none
    frames: int  # NumberOfFrames, which fits the pixel data; 1 if absent
    fragments: int | None  # of PixelData, without its offset table; None: not encapsulated
    inflated: BinaryIO | None = None  # the inflated dataset alone, of a deflated file
    _by_tag: dict[int, Element] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_tag", {e.tag: e for e in reversed(self.elements)})

    @property
    def transfer_syntax_uid(self) -> str:
        return self.meta.transfer_syntax_uid

    def source(self, file: BinaryIO) -> BinaryIO:
        """The stream that all offsets refer to: `file`, or what it inflated to."""
        return self.inflated or file

    def element(self, tag: int) -> Element | None:
        """The first top-level element with that tag, if any."""
        return self._by_tag.get(tag)

    def close(self) -> None:
        if self.inflated is not None:
            self.inflated.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def scan(file: BinaryIO, limits: Limits, *, spool_dir: Path | str | None = None) -> Scan:
    """Walk over a seekable `file` from its start to its end.

    `spool_dir` is where a deflated dataset is inflated to (None: the system's folder).
    Raises NotDicom (415), TooLarge (413), MalformedDicom (422) naming the tag and the byte.
    """
    size = file.seek(0, 2)
    if size > limits.max_bytes:
        raise TooLarge(f"The file has {size} bytes; the limit is {limits.max_bytes}.")
    meta = read_meta(file, size)
    encoding = syntax(meta.transfer_syntax_uid)
    if not encoding.deflated:
        return _walk(file, meta.end, size, meta, limits)
    inflated = cast(BinaryIO, TemporaryFile(dir=spool_dir))  # noqa: SIM115 - the Scan owns it
    try:
        inflate(file, meta.end, inflated, limits.max_bytes, limits.max_deflate_ratio)
        return _walk(inflated, 0, inflated.tell(), meta, limits, inflated)
    except MalformedDicom as error:
        inflated.close()
        raise MalformedDicom(
            f"{error.detail} (Bytes are counted in the inflated dataset.)", extra=error.extra
        ) from None
    except BaseException:
        inflated.close()
        raise


def inflate(source: BinaryIO, start: int, target: BinaryIO, max_bytes: int, max_ratio: int) -> None:
    """Write what the deflated stream (RFC 1951, PS3.5 A.5) from `start` on holds to `target`.

    Raises MalformedDicom if it is cut or broken, TooLarge beyond `max_bytes`, and beyond 16 MiB if
    that is more than `max_ratio` times what was read.
    """
    source.seek(start)
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    written = checksum = taken = 0
    while not inflater.eof:
        packed = inflater.unconsumed_tail
        if not packed:
            packed = source.read(_CHUNK)
            taken += len(packed)
        try:
            plain = inflater.decompress(packed, _CHUNK)
        except zlib.error:
            raise MalformedDicom("The deflated dataset is damaged.") from None
        if not packed and not plain and not inflater.eof:
            raise MalformedDicom("The deflated dataset is truncated.")
        written += len(plain)
        if written > max_bytes:
            raise TooLarge(f"The deflated dataset inflates beyond the limit of {max_bytes} bytes.")
        used = taken - len(inflater.unconsumed_tail) - len(inflater.unused_data)
        if written > _FREE_INFLATION and written > max_ratio * used:
            raise TooLarge(
                f"The deflated dataset inflates to more than {max_ratio} times its size."
            )
        target.write(plain)
        checksum = zlib.crc32(plain, checksum)
    # Besides padding, some writers leave the trailer of a gzip file (RFC 1952).
    trailer = pack("<II", checksum, written & 0xFFFFFFFF)
    rest = inflater.unused_data + source.read(len(trailer))
    rest = rest.removeprefix(trailer)
    while rest:
        if rest.strip(b"\0"):
            raise MalformedDicom("Data that is not DICOM follows the deflated dataset.")
        rest = source.read(_CHUNK)


def _walk(
    file: BinaryIO,
    start: int,
    end: int,
    meta: Meta,
    limits: Limits,
    inflated: BinaryIO | None = None,
) -> Scan:
    encoding = syntax(meta.transfer_syntax_uid)
    walker = Walker(file, end, limits.max_depth, limits.max_elements, limits.max_items)
    rows = walker.dataset(start, end, implicit=encoding.implicit, little=encoding.little_endian)
    in_order, previous, seen = True, -1, set()
    for tag, _, header, _, _ in rows:
        if tag <= previous:
            in_order = False
        if tag >> 16 == 2:
            raise MalformedDicom(
                f"The DICOM file is malformed: {name(tag)} of the file meta information is in "
                f"the dataset, at byte {header}."
            )
        if tag in SINGLE_TAGS:
            # pydicom takes the last one, DCMTK and Orthanc the first.
            if tag in seen:
                raise MalformedDicom(
                    f"The DICOM file is malformed: {name(tag)} is there twice, again at byte "
                    f"{header}."
                )
            seen.add(tag)
        previous = tag
    elements = tuple(map(Element._make, rows))
    frames = check_pixels(
        file,
        {element.tag: element for element in reversed(elements)},
        syntax_uid=meta.transfer_syntax_uid,
        little=encoding.little_endian,
        fragments=walker.fragments,
        max_frame_bytes=limits.max_frame_bytes,
    )
    return Scan(
        meta=meta,
        implicit=encoding.implicit,
        little_endian=encoding.little_endian,
        start=start,
        elements=elements,
        in_order=in_order,
        element_count=walker.elements + len(meta.elements),
        depth=walker.deepest,
        frames=frames,
        fragments=walker.fragments,
        inflated=inflated,
    )
