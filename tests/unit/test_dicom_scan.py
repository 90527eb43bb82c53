"""The bounded scan: what it passes, what it refuses, and that nothing gets by it."""

import io
import struct
import tracemalloc
import zlib
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import Dataset, dcmread
from pydicom.data import get_testdata_file

from app.dicom.rewrite import rewrite
from app.dicom.scan import Limits, Scan, scan
from app.errors import LightboxError, MalformedDicom, NotDicom, TooLarge

LIMITS = Limits(max_bytes=64 * 1024 * 1024)
IMPLICIT, EXPLICIT = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1"
BIG_ENDIAN, DEFLATED = "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"
JPEG = "1.2.840.10008.1.2.4.50"
SAMPLES = (
    *("CT_small.dcm", "MR_small_implicit.dcm", "MR_small_bigendian.dcm", "image_dfl.dcm"),
    *("JPEG2000.dcm", "SC_rgb_rle_2frame.dcm", "rtplan.dcm", "test-SR.dcm", "MR_small_padded.dcm"),
    *("waveform_ecg.dcm", "693_J2KI.dcm", "priv_SQ.dcm", "nested_priv_SQ.dcm", "UN_sequence.dcm"),
)


def sample(name: str) -> bytes:
    """A sample that ships inside pydicom's wheel; never downloaded."""
    path = get_testdata_file(name, download=False)
    assert isinstance(path, str), f"pydicom no longer ships {name}"
    return Path(path).read_bytes()


def ui(tag: int, uid: str) -> bytes:
    value = uid.encode() + b"\0" * (len(uid) % 2)
    return struct.pack("<HH2sH", tag >> 16, tag & 0xFFFF, b"UI", len(value)) + value


def file_of(dataset: bytes, syntax: str = EXPLICIT, meta: bytes = b"") -> bytes:
    """A file with preamble, the shortest file meta information, and `dataset` as it is."""
    return b"\0" * 128 + b"DICM" + ui(0x00020010, syntax) + meta + dataset


def element(
    tag: int, vr: str, value: bytes, *, length: int | None = None, big: bool = False
) -> bytes:
    """One element in explicit VR; `vr` "" writes implicit VR."""
    order = ">" if big else "<"
    size = len(value) if length is None else length
    numbers = (tag >> 16, tag & 0xFFFF)
    if not vr:
        return struct.pack(order + "HHI", *numbers, size) + value
    if vr in ("OB", "OW", "SQ", "UN", "UT", "UC"):
        return struct.pack(order + "HH2sHI", *numbers, vr.encode(), 0, size) + value
    return struct.pack(order + "HH2sH", *numbers, vr.encode(), size) + value


def item(value: bytes, *, undefined: bool = False, big: bool = False) -> bytes:
    order = ">" if big else "<"
    if undefined:
        end = struct.pack(order + "HHI", 0xFFFE, 0xE00D, 0)
        return struct.pack(order + "HHI", 0xFFFE, 0xE000, 0xFFFFFFFF) + value + end
    return struct.pack(order + "HHI", 0xFFFE, 0xE000, len(value)) + value


def nest(depth: int, tag: int, vr: str, *, undefined: bool = False, big: bool = False) -> bytes:
    """`depth` sequences inside each other, in explicit VR, or implicit where `vr` is ""."""
    inside = b""
    for _ in range(depth):
        value = item(inside, undefined=undefined, big=big)
        if undefined:
            value += struct.pack(">HHI" if big else "<HHI", 0xFFFE, 0xE0DD, 0)
        inside = element(tag, vr, value, length=0xFFFFFFFF if undefined else None, big=big)
    return inside


def look(data: bytes, limits: Limits = LIMITS) -> Scan:
    return scan(io.BytesIO(data), limits)


SEQUENCE_END = struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
PUBLIC_SQ, PRIVATE, UNKNOWN = 0x00081140, 0x00091001, 0x00080FFF


def deflated(dataset: bytes) -> bytes:
    packer = zlib.compressobj(9, wbits=-15)
    return packer.compress(dataset) + packer.flush()


@cache
def bombs(depth: int) -> dict[str, bytes]:
    """Nested sequences, hidden in every way."""
    implicit = nest(depth, PUBLIC_SQ, "")
    implicit_undefined = nest(depth, PUBLIC_SQ, "", undefined=True)
    explicit = nest(depth, PUBLIC_SQ, "SQ")
    return {
        "explicit defined": file_of(explicit),
        "explicit undefined": file_of(nest(depth, PUBLIC_SQ, "SQ", undefined=True)),
        "explicit private": file_of(nest(depth, PRIVATE, "SQ")),
        "implicit defined": file_of(implicit, IMPLICIT),
        "implicit undefined": file_of(implicit_undefined, IMPLICIT),
        "implicit private defined": file_of(nest(depth, PRIVATE, ""), IMPLICIT),
        "implicit private undefined": file_of(nest(depth, PRIVATE, "", undefined=True), IMPLICIT),
        "implicit unknown public": file_of(nest(depth, UNKNOWN, ""), IMPLICIT),
        "big endian defined": file_of(nest(depth, PUBLIC_SQ, "SQ", big=True), BIG_ENDIAN),
        "big endian undefined": file_of(
            nest(depth, PUBLIC_SQ, "SQ", big=True, undefined=True), BIG_ENDIAN
        ),
        "big endian UN": file_of(nest(depth, PUBLIC_SQ, "UN", big=True), BIG_ENDIAN),
        "UN defined, implicit": file_of(element(PUBLIC_SQ, "UN", item(implicit))),
        "UN defined, explicit": file_of(element(PUBLIC_SQ, "UN", item(explicit))),
        "UN in UN": file_of(nest(depth, PUBLIC_SQ, "UN")),
        "UN in UN, private": file_of(nest(depth, PRIVATE, "UN")),
        "UN undefined": file_of(
            element(
                PUBLIC_SQ,
                "UN",
                item(implicit_undefined, undefined=True) + SEQUENCE_END,
                length=0xFFFFFFFF,
            )
        ),
        "OB that starts as a sequence": file_of(element(PRIVATE, "OB", item(explicit))),
        "text that starts as a sequence": file_of(element(0x00081030, "UT", item(implicit))),
        "implicit items in an explicit UN": file_of(
            element(PRIVATE, "UN", item(element(PUBLIC_SQ, "SQ", item(implicit))))
        ),
        "behind a value": file_of(element(0x00080060, "CS", b"CT") + explicit),
        "in the second item": file_of(element(PUBLIC_SQ, "SQ", item(b"") + item(explicit))),
        "behind a wrong guess": file_of(
            element(PRIVATE, "UN", item(b"\xff" * 40) + b"junk") + explicit
        ),
        "deflated": file_of(deflated(explicit), DEFLATED),
        "deflated UN": file_of(deflated(element(PRIVATE, "UN", item(implicit))), DEFLATED),
        "JPEG": file_of(explicit, JPEG),
        "file meta": file_of(b"", meta=nest(depth, 0x00020102, "SQ")),
        "file meta, undefined": file_of(b"", meta=nest(depth, 0x00020102, "UN", undefined=True)),
    }


@pytest.mark.parametrize("depth", [17, 48, 300, 5000])
@pytest.mark.parametrize("hidden", bombs(1))
def test_nested_sequences_are_found_wherever_they_hide(hidden: str, depth: int) -> None:
    with pytest.raises(MalformedDicom):
        look(bombs(depth)[hidden])


@pytest.mark.parametrize("hidden", [h for h in bombs(1) if "meta" not in h])
def test_few_nested_sequences_pass(hidden: str) -> None:
    with look(bombs(14)[hidden]) as scanned:
        assert 14 <= scanned.depth <= 16


def test_the_limit_of_depth_is_exact() -> None:
    assert look(file_of(nest(16, PUBLIC_SQ, "SQ"))).depth == 16
    with pytest.raises(MalformedDicom, match="limit of 16"):
        look(file_of(nest(17, PUBLIC_SQ, "SQ")))


@pytest.mark.parametrize(
    "dataset",
    [
        element(PUBLIC_SQ, "SQ", item(b"") * 2000),
        element(0x7FE00010, "OB", item(b"") * 2000, length=0xFFFFFFFF),
        element(PRIVATE, "UN", item(b"") * 2000),
        element(0x00081030, "LO", b"") * 2000,
    ],
)
def test_elements_items_and_fragments_are_counted(dataset: bytes) -> None:
    with pytest.raises(MalformedDicom, match="more than 1000 elements"):
        look(file_of(dataset), Limits(LIMITS.max_bytes, max_elements=1000))


def test_a_deflated_bomb_is_cut_off(tmp_path: Path) -> None:
    data = file_of(deflated(element(0x7FE00010, "OB", b"\0" * 20_000_000)), DEFLATED)
    assert len(data) < 40_000
    with pytest.raises(TooLarge):
        scan(io.BytesIO(data), Limits(1_000_000), spool_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_large_file_is_refused_by_size() -> None:
    with pytest.raises(TooLarge):
        look(sample("CT_small.dcm"), Limits(max_bytes=1000))


@pytest.mark.parametrize(
    "data", [b"", b"DICM", b"\0" * 132, b"\0" * 128 + b"DICX", b"PK\3\4" * 100]
)
def test_other_files_are_not_dicom(data: bytes) -> None:
    with pytest.raises(NotDicom):
        look(data)


LYING = {
    "longer than the file": (element(0x00100020, "LO", b"1234", length=400), "PatientID"),
    "long VR": (element(0x7FE00010, "OW", b"1234", length=2**31), "PixelData"),
    "undefined text": (element(0x00081030, "UT", b"1234", length=0xFFFFFFFF), "undefined length"),
    "longer than its item": (
        element(PUBLIC_SQ, "SQ", item(element(0x00100020, "LO", b"12", length=20)))
        + element(0x7FE00010, "OW", b"\0" * 64),
        "PatientID",
    ),
    "item longer than its sequence": (
        element(PUBLIC_SQ, "SQ", item(b"\0" * 8)[:4] + b"\x40\0\0\0")
        + element(0x7FE00010, "OW", b"\0" * 99),
        "Item",
    ),
    "half a sequence": (element(PUBLIC_SQ, "SQ", b"1234"), "too short"),
    "no item": (element(PUBLIC_SQ, "SQ", b"12345678"), "item should begin"),
    "no delimiter": (element(PUBLIC_SQ, "SQ", item(b""), length=0xFFFFFFFF), "no delimiter"),
    "unknown VR": (element(0x00100020, "ZZ", b"12"), "unknown VR ZZ"),
    "blank VR": (element(0x00280120, "  ", b"12"), "unknown VR"),
    "implicit in explicit": (element(0x00100020, "", b"12"), "unknown VR"),
    "a stray delimiter": (element(0xFFFEE00D, "", b""), "no place"),
    "a second file meta": (ui(0x00080018, "1.2") + ui(0x00020010, "1.2"), "TransferSyntaxUID"),
    "garbage behind": (element(0x00100020, "LO", b"12") + b"garbage", "truncated"),
    "seven zeros behind": (element(0x00100020, "LO", b"12") + b"\0" * 7, "truncated"),
    "mixed tail": (element(0x00100020, "LO", b"12") + b"\0" * 15 + b"1", "follows"),
}


@pytest.mark.parametrize("case", LYING)
def test_what_is_wrong_is_named(case: str) -> None:
    dataset, said = LYING[case]
    with pytest.raises(MalformedDicom, match=said):
        look(file_of(dataset))


def test_explicit_vr_under_an_implicit_transfer_syntax_is_refused() -> None:
    with pytest.raises(MalformedDicom):
        look(file_of(element(0x00080060, "CS", b"CT"), IMPLICIT))


@pytest.mark.parametrize("syntax", ["", "1.2.840.10008.5.1.4.1.1.2", "1..2", "1.2\n", "a"])
def test_a_bad_transfer_syntax_is_refused(syntax: str) -> None:
    with pytest.raises(MalformedDicom, match="TransferSyntaxUID"):
        look(file_of(b"", syntax))


def test_a_private_transfer_syntax_is_read_as_explicit() -> None:
    scanned = look(file_of(element(0x00080060, "CS", b"CT"), "1.3.6.1.4.1.99999.1"))
    assert not scanned.implicit
    assert scanned.little_endian


@pytest.mark.parametrize("tag", [0x00080005, 0x00080018, 0x00100020, 0x0020000D, 0x00080050])
def test_a_doubled_identifier_is_refused(tag: int) -> None:
    dataset = element(tag, "LO", b"12") + element(0x00181030, "LO", b"") + element(tag, "LO", b"34")
    with pytest.raises(MalformedDicom, match="twice"):
        look(file_of(dataset))


def test_order_is_recorded_and_zero_padding_passed() -> None:
    dataset = element(0x00180015, "CS", b"HEAD") + element(0x00080060, "CS", b"CT")
    scanned = look(file_of(dataset + b"\0" * 512))
    assert not scanned.in_order
    assert [e.tag for e in scanned.elements] == [0x00180015, 0x00080060]
    assert scanned.elements[-1].end == len(file_of(dataset))


@pytest.mark.parametrize("delta", [-2, 2, 200])
def test_a_wrong_group_length_is_refused(delta: int) -> None:
    data = bytearray(sample("CT_small.dcm"))
    (length,) = struct.unpack_from("<I", data, 140)
    struct.pack_into("<I", data, 140, length + delta)
    with pytest.raises(MalformedDicom, match="group length"):
        look(bytes(data))


@pytest.mark.parametrize("name", SAMPLES)
def test_the_table_is_pydicoms(name: str) -> None:
    data = sample(name)
    dataset = dcmread(io.BytesIO(data), force=True)
    with look(data) as scanned:
        assert scanned.transfer_syntax_uid == dataset.file_meta.TransferSyntaxUID
        assert [e.tag for e in scanned.elements] == list(map(int, dataset._dict))
        assert scanned.elements[0].header == scanned.start
        for before, after in zip(scanned.elements, scanned.elements[1:], strict=False):
            assert before.end == after.header


@pytest.mark.parametrize(
    "name",
    [
        "MR_small_implicit.dcm",
        "image_dfl.dcm",
        "JPEG2000.dcm",
        "rtplan.dcm",
        "test-SR.dcm",
        "MR_small_bigendian.dcm",
        "SC_rgb_rle_2frame.dcm",
        "UN_sequence.dcm",
    ],
)
def test_cut_anywhere_a_file_is_refused(name: str) -> None:
    data = sample(name)
    with look(data) as whole:
        boundaries = {e.end for e in whole.elements} | {whole.start}
        if whole.inflated is not None:
            boundaries = set()
    for length in range(len(data)):
        try:
            with look(data[:length]):
                # A file that ends behind an element is whole, as far as anyone can tell; that
                # includes the trailer that image_dfl has behind its deflated stream.
                assert length in boundaries or (name == "image_dfl.dcm" and length == len(data) - 8)
        except (MalformedDicom, NotDicom):
            assert length not in boundaries or length == 0


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(SAMPLES),
    st.lists(st.tuples(st.integers(0), st.binary(min_size=1, max_size=8)), min_size=1, max_size=6),
)
def test_no_damage_raises_anything_else(name: str, damage: list[tuple[int, bytes]]) -> None:
    data = bytearray(sample(name)[:20000])
    for place, junk in damage:
        at = place % len(data)
        data[at : at + len(junk)] = junk
    with suppress(LightboxError):
        look(bytes(data)).close()


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400), st.sampled_from([IMPLICIT, EXPLICIT, BIG_ENDIAN, DEFLATED]))
def test_no_dataset_raises_anything_else(dataset: bytes, syntax: str) -> None:
    with suppress(LightboxError):
        look(file_of(dataset, syntax)).close()


def sparse(path: Path, size: int) -> None:
    """A CT header with `size` bytes of pixels that take no room on the disk."""
    header = element(0x00100020, "LO", b"12") + element(0x7FE00010, "OW", b"", length=size)
    with path.open("wb") as file:
        file.write(file_of(header))
        file.truncate(file.tell() + size)


def peak(path: Path) -> int:
    class Nowhere(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, data: object) -> int:
            return len(data)  # type: ignore[arg-type]

    changes = Dataset()
    changes.PatientID = "34"
    sink: BinaryIO = Nowhere()  # type: ignore[assignment]
    tracemalloc.start()
    with path.open("rb") as file, scan(file, Limits(10**9)) as scanned:
        rewrite(file, sink, scanned, changes)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    sparse(tmp_path / "small", 1_000_000)
    sparse(tmp_path / "large", 300_000_000)
    peak(tmp_path / "small")  # what is imported and cached counts for neither
    assert peak(tmp_path / "large") - peak(tmp_path / "small") < 8_000_000
