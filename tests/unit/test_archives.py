"""ZIPs: what comes out, and what is refused before it can do harm."""

import io
import struct
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path
from tempfile import gettempdir
from typing import Any
from zipfile import ZIP_BZIP2, ZIP_DEFLATED, ZIP_LZMA, ZIP_STORED

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import TooLarge, Unprocessable
from app.intake import archives
from app.intake.archives import ZipLimits

MEGABYTE = 1024 * 1024
LIMITS = ZipLimits(max_bytes=8 * MEGABYTE, max_files=20, max_ratio=200)


def zipped(*files: tuple[str, bytes], method: int = ZIP_DEFLATED) -> bytes:
    """A ZIP of `(name, content)`; names may be there twice."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, content in files:
            info = zipfile.ZipInfo(name)
            info.filename = name  # ZipInfo would have tidied it
            info.compress_type = method
            with warnings.catch_warnings(action="ignore"):  # a name that is there twice
                archive.writestr(info, content)
    return out.getvalue()


def unpacked(
    content: bytes, folder: Path, limits: ZipLimits = LIMITS
) -> list[tuple[str, bytes | None, str]]:
    """`(name, content, refusal)` of each entry."""
    found: list[tuple[str, bytes | None, str]] = []
    for entry in archives.entries(io.BytesIO(content), limits, folder):
        if entry.file is None:
            assert entry.refusal is not None
            found.append((entry.name, None, entry.refusal.detail))
            continue
        entry.file.seek(0)
        found.append((entry.name, entry.file.read(), ""))
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    """The spool folder; whatever happens, nothing is left in it."""
    spool = tmp_path / "spool"
    spool.mkdir()
    yield spool
    assert list(tmp_path.rglob("*")) == [spool]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (zipped(("a", b"1")), True),
        (zipped(), True),
        (b"PK\x03\x04", True),
        (b"PK", False),
        (b"", False),
        (b"\0" * 128 + b"DICM", False),
        (b"\x1f\x8b\x08\x00", False),
    ],
)
def test_a_zip_is_known_by_its_first_bytes(content: bytes, expected: bool) -> None:
    file = io.BytesIO(content)
    file.seek(0, 2)
    assert archives.is_zip(file) is expected
    assert file.tell() == 0


@pytest.mark.parametrize("method", [ZIP_STORED, ZIP_DEFLATED])
def test_files_come_out_in_their_order(method: int, folder: Path) -> None:
    files = [
        ("one.dcm", b"1" * 300_000),
        ("folder/two", b""),
        ("folder/", b""),
        ("__MACOSX/._one.dcm", b"fork"),
        ("höhe/ß.dcm", b"3"),
        ("one.dcm", b"again"),
    ]
    assert unpacked(zipped(*files, method=method), folder) == [
        (name, content, "") for name, content in files if name[-1] != "/" and name[0] != "_"
    ]


def test_an_empty_zip_has_no_files(folder: Path) -> None:
    assert unpacked(zipped(), folder) == []


OUT, NESTED = "leads out", "ZIP inside a ZIP"


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("../up.dcm", b"1", OUT),
        ("a/../../up.dcm", b"1", OUT),
        ("a/..", b"1", OUT),
        ("..\\up.dcm", b"1", OUT),
        ("/etc/passwd", b"1", OUT),
        ("\\\\host\\share", b"1", OUT),
        ("C:\\windows.dcm", b"1", OUT),
        ("c:windows.dcm", b"1", OUT),
        (".", b"1", OUT),
        ("./", b"1", ""),  # a folder, passed over
        ("inner.zip", b"1", NESTED),
        ("inner.ZIP", b"1", NESTED),
        ("innocent.dcm", zipped(("a", b"1")), NESTED),
        ("innocent.dcm", zipped(), NESTED),
    ],
)
def test_a_bad_entry_is_refused_alone(name: str, content: bytes, why: str, folder: Path) -> None:
    found = unpacked(zipped(("first", b"1"), (name, content), ("last", b"2")), folder)
    refused = [each for each in found if each[1] is None]
    assert [each for each in found if each[1] is not None] == [
        ("first", b"1", ""),
        ("last", b"2", ""),
    ]
    assert len(refused) == bool(why)
    assert all(why in reason for _, _, reason in refused)


def test_a_name_is_shown_without_control_characters(folder: Path) -> None:
    ((name, content, _),) = unpacked(zipped(("a\x1b[31m\n\u202eb", b"1")), folder)
    assert content == b"1"
    assert name.isprintable()
    ((name, _, _),) = unpacked(zipped(("a" * 5000, b"1")), folder)
    assert name == "a" * 255


@pytest.mark.parametrize("method", [ZIP_BZIP2, ZIP_LZMA])
def test_other_methods_are_refused(method: int, folder: Path) -> None:
    content = zipped(("a", b"1" * 1000), method=method)
    assert [each[1] for each in unpacked(content, folder)] == [None]


def with_flag(content: bytes, flag: int) -> bytes:
    """The ZIP with a bit of the general purpose flag set, in both headers of each entry."""
    changed = bytearray(content)
    for magic, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        position = content.find(magic)
        while position >= 0:
            (flags,) = struct.unpack_from("<H", changed, position + offset)
            struct.pack_into("<H", changed, position + offset, flags | flag)
            position = content.find(magic, position + 4)
    return bytes(changed)


def test_an_encrypted_entry_is_refused(folder: Path) -> None:
    ((_, content, why),) = unpacked(with_flag(zipped(("a", b"1" * 100)), 1), folder)
    assert content is None
    assert "encrypted" in why


def test_a_broken_entry_stops_no_other(folder: Path) -> None:
    good = zipped(("first", b"1"), ("broken", b"to be changed"), ("last", b"2"), method=ZIP_STORED)
    broken = good.replace(b"to be changed", b"has been bent")
    found = unpacked(broken, folder)
    assert [(name, content) for name, content, _ in found] == [
        ("first", b"1"),
        ("broken", None),
        ("last", b"2"),
    ]
    assert "checksum" in found[1][2]


@pytest.mark.parametrize("cut", [4, 20, 60, -30, -10, -1])
def test_a_zip_cut_off_is_refused(cut: int, folder: Path) -> None:
    with pytest.raises(Unprocessable, match="broken or cut off"):
        unpacked(zipped(("a", b"1" * 100))[:cut], folder)


def test_too_many_files_are_refused_before_any_comes_out(folder: Path) -> None:
    many = zipped(*((f"{n}.dcm", b"") for n in range(21)))
    with pytest.raises(Unprocessable, match="21 files; at most 20"):
        unpacked(many, folder)


def test_a_bomb_is_refused_before_it_is_unpacked(folder: Path) -> None:
    with pytest.raises(TooLarge, match="200 times"):
        unpacked(zipped(("bomb", b"\0" * 4 * MEGABYTE)), folder)
    with pytest.raises(TooLarge, match=f"{8 * MEGABYTE} bytes"):
        unpacked(zipped(("big", b"\0" * (8 * MEGABYTE + 1)), method=ZIP_STORED), folder)


def test_small_blank_images_are_no_bomb(folder: Path) -> None:
    ((_, content, _),) = unpacked(zipped(("blank", b"\0" * MEGABYTE)), folder)
    assert content == b"\0" * MEGABYTE


def understated(content: bytes, size: int) -> bytes:
    """The ZIP saying that each entry unpacks to `size` bytes."""
    changed = bytearray(content)
    for magic, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        position = content.find(magic)
        while position >= 0:
            struct.pack_into("<L", changed, position + offset, size)
            position = content.find(magic, position + 4)
    return bytes(changed)


def test_a_bomb_that_lies_about_its_size_does_no_harm(folder: Path) -> None:
    """No more comes out than the entry says; then its checksum is wrong."""
    lying = understated(zipped(("bomb", b"\0" * 4 * MEGABYTE)), 1000)
    ((_, content, why),) = unpacked(lying, folder)
    assert content is None
    assert "broken" in why


def test_entries_that_share_their_bytes_do_no_harm(folder: Path) -> None:
    """Three names for one packed stream: what comes out is counted, not what is stored."""
    limits = ZipLimits(max_bytes=2 * MEGABYTE, max_files=20, max_ratio=100_000)
    blank = ("blank", b"\0" * MEGABYTE)
    shared = bytearray(zipped(blank, blank, blank))
    position = shared.find(b"PK\x01\x02")
    while position >= 0:
        struct.pack_into("<L", shared, position + 42, 0)  # where the entry's bytes begin
        position = shared.find(b"PK\x01\x02", position + 4)
    with pytest.raises(TooLarge):
        unpacked(bytes(shared), folder, limits)
    allowed = ZipLimits(max_bytes=8 * MEGABYTE, max_files=20, max_ratio=100_000)
    contents = [content for _, content, _ in unpacked(bytes(shared), folder, allowed)]
    assert set(contents) <= {None, blank[1]}


SAMPLE = zipped(("one.dcm", b"1" * 500), ("folder/two", bytes(range(256))), ("three", b"3"))


def read_bent(changes: list[tuple[int, int]]) -> None:
    """Read the sample with bytes changed: entries, refusals, or one of our own errors."""
    bent = bytearray(SAMPLE)
    for position, value in changes:
        bent[position] = value
    with suppress(TooLarge, Unprocessable):
        for entry in archives.entries(io.BytesIO(bent), LIMITS, Path(gettempdir())):
            assert (entry.file is None) is (entry.refusal is not None)


@given(
    st.lists(
        st.tuples(st.integers(0, len(SAMPLE) - 1), st.integers(0, 255)), min_size=2, max_size=6
    )
)
def test_no_damage_raises_anything_else(changes: list[tuple[int, int]]) -> None:
    read_bent(changes)


def test_no_single_byte_raises_anything_else() -> None:
    for position, was in enumerate(SAMPLE):
        for value in {0x00, 0xFF, was ^ 0x01, was ^ 0x80}:
            read_bent([(position, value)])
