"""What is said of pixels must fit the pixels: frames, their size, and other costs to Orthanc."""

import io
import struct
import zlib

import pytest

from app.dicom import Limits, Scan, scan
from app.errors import MalformedDicom, TooLarge

LIMITS = Limits(max_bytes=2**31)
EXPLICIT, IMPLICIT, BIG_ENDIAN = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2", "1.2.840.10008.1.2.2"
JPEG, RLE, DEFLATED = "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.1.99"
VIDEO = (
    *("1.2.840.10008.1.2.4.100", "1.2.840.10008.1.2.4.102", "1.2.840.10008.1.2.4.104.1"),
    *("1.2.840.10008.1.2.4.108", "1.2.840.10008.1.2.4.92"),
)
NAMES = {
    "samples": (0x00280002, "US"),
    "photometric": (0x00280004, "CS"),
    "frames": (0x00280008, "IS"),
    "rows": (0x00280010, "US"),
    "columns": (0x00280011, "US"),
    "bits": (0x00280100, "US"),
}
LONG_VRS = ("OB", "OW", "OF", "OD", "SQ", "UN", "UT", "UC")
UNDEFINED = 0xFFFFFFFF
ITEM_END, SEQUENCE_END = (struct.pack("<HHI", 0xFFFE, n, 0) for n in (0xE00D, 0xE0DD))


def element(
    tag: int, vr: str, value: bytes, *, length: int | None = None, order: str = "<"
) -> bytes:
    """One element in explicit VR; `vr` "" writes implicit VR."""
    size = len(value) if length is None else length
    numbers = (tag >> 16, tag & 0xFFFF)
    if not vr:
        return struct.pack(order + "HHI", *numbers, size) + value
    if vr in LONG_VRS:
        return struct.pack(order + "HH2sHI", *numbers, vr.encode(), 0, size) + value
    return struct.pack(order + "HH2sH", *numbers, vr.encode(), size) + value


def item(value: bytes) -> bytes:
    return struct.pack("<HHI", 0xFFFE, 0xE000, len(value)) + value


def file_of(dataset: bytes, syntax: str = EXPLICIT) -> bytes:
    uid = syntax.encode() + b"\0" * (len(syntax) % 2)
    return b"\0" * 128 + b"DICM" + element(0x00020010, "UI", uid) + dataset


def image(pixels: bytes = b"", syntax: str = EXPLICIT, **values: int | str) -> bytes:
    """A file with the attributes of NAMES, in the order of their tags, and `pixels` behind."""
    dataset, order = b"", ">" if syntax == BIG_ENDIAN else "<"
    for name, (tag, vr) in NAMES.items():
        if (value := values.get(name)) is None:
            continue
        raw = str(value).encode() if vr != "US" else struct.pack(order + "H", value)
        raw += b" " * (len(raw) % 2)
        dataset += element(tag, "" if syntax == IMPLICIT else vr, raw, order=order)
    return file_of(dataset + pixels, syntax)


def native(length: int, tag: int = 0x7FE00010, vr: str = "OW", order: str = "<") -> bytes:
    return element(tag, vr, bytes(length), order=order)


def fragments(*sizes: int) -> bytes:
    """Encapsulated pixel data: an empty offset table, and fragments of these sizes."""
    items = item(b"") + b"".join(item(bytes(size)) for size in sizes)
    return element(0x7FE00010, "OB", items + SEQUENCE_END, length=UNDEFINED)


def look(data: bytes, limits: Limits = LIMITS) -> Scan:
    return scan(io.BytesIO(data), limits)


def refused(data: bytes, limits: Limits = LIMITS) -> MalformedDicom:
    with pytest.raises(MalformedDicom) as caught:
        look(data, limits)
    return caught.value


@pytest.mark.parametrize("syntax", [JPEG, RLE])
@pytest.mark.parametrize(("frames", "sizes"), [(2_000_000_000, (4,)), (3, (4, 4)), (1, ())])
def test_more_frames_than_fragments_are_refused(
    syntax: str, frames: int, sizes: tuple[int, ...]
) -> None:
    error = refused(image(fragments(*sizes), syntax, rows=4, columns=4, bits=8, frames=frames))
    assert error.extra["errors"][0]["keyword"] == "NumberOfFrames"
    assert f"NumberOfFrames is {frames}" in error.detail


def test_frames_and_fragments_are_counted() -> None:
    for frames, sizes in ((1, (4,)), (1, (4, 4, 0)), (3, (4, 4, 4))):
        scanned = look(image(fragments(*sizes), JPEG, rows=4, columns=4, bits=8, frames=frames))
        assert (scanned.frames, scanned.fragments) == (frames, len(sizes))
    scanned = look(image(native(16), rows=4, columns=4, bits=8))
    assert (scanned.frames, scanned.fragments) == (1, None)


def test_an_icon_s_fragments_do_not_count() -> None:
    icon = element(0x00880200, "SQ", item(fragments(4, 4, 4)))
    with_icon = image(icon + fragments(4), JPEG, rows=4, columns=4, bits=8, frames=1)
    assert look(with_icon).fragments == 1
    refused(image(icon + fragments(4), JPEG, rows=4, columns=4, bits=8, frames=3))


@pytest.mark.parametrize("syntax", [*VIDEO, "1.3.6.1.4.1.99999.1"])
def test_video_has_many_frames_in_a_fragment(syntax: str) -> None:
    shape: dict[str, int | str] = {"rows": 4, "columns": 4, "bits": 8}
    assert look(image(fragments(5000), syntax, frames=4000, **shape)).frames == 4000
    assert "bytes" in refused(image(fragments(4), syntax, frames=4000, **shape)).detail
    refused(image(fragments(2_000_000), syntax, frames=1_000_001, **shape))


@pytest.mark.parametrize("frames", [1_000_001, 2**31 - 1, 2**31, 99_999_999_999])
def test_frames_without_pixels_are_bounded(frames: int) -> None:
    assert "limit is 1000000" in refused(image(frames=frames)).detail
    assert look(image(frames=1_000_000)).frames == 1_000_000


@pytest.mark.parametrize(
    ("values", "needed"),
    [
        ({"rows": 5, "columns": 7, "bits": 16, "samples": 1}, 70),
        ({"rows": 5, "columns": 7, "bits": 16}, 70),
        ({"rows": 5, "columns": 7, "bits": 8, "samples": 3, "frames": 4}, 420),
        ({"rows": 4, "columns": 8, "bits": 8, "samples": 3, "photometric": "YBR_FULL_422"}, 64),
        ({"rows": 4, "columns": 8, "bits": 8, "samples": 3, "photometric": "YBR_PARTIAL_420"}, 48),
        ({"rows": 3, "columns": 3, "bits": 1, "frames": 5}, 6),  # 45 bits
        ({"rows": 4, "columns": 4, "bits": 12}, 24),
    ],
)
def test_native_pixels_must_be_there(values: dict[str, int | str], needed: int) -> None:
    for length in (needed, needed + 1, needed + 1000):
        look(image(native(length), EXPLICIT, **values))
        look(image(native(length, vr=""), IMPLICIT, **values))
        look(image(native(length, order=">"), BIG_ENDIAN, **values))
    for length in (0, needed - 1):
        said = f"PixelData is truncated: it has {length} bytes, but .* need {needed}"
        with pytest.raises(MalformedDicom, match=said):
            look(image(native(length), EXPLICIT, **values))


@pytest.mark.parametrize(("tag", "vr", "bits"), [(0x7FE00008, "OF", 32), (0x7FE00009, "OD", 64)])
def test_real_pixels_must_be_there(tag: int, vr: str, bits: int) -> None:
    look(image(native(16 * bits // 8, tag, vr), rows=4, columns=4, bits=bits))
    error = refused(image(native(16 * bits // 8 - 1, tag, vr), rows=4, columns=4, bits=bits))
    assert "FloatPixelData is truncated" in error.detail


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (element(0x00280008, "UL", b"1   "), "NumberOfFrames has the VR UL"),
        (element(0x00280008, "IS", b"1\0 2"), "NumberOfFrames is"),
        (element(0x00280008, "IS", b"1" + b" " * 99), "NumberOfFrames is 100 bytes long"),
        (element(0x00280010, "IS", b"16"), "Rows has 2 bytes of VR IS"),
        (element(0x00280010, "US", b"\4\0\4\0"), "Rows has 4 bytes"),
        (element(0x00280010, "US", b"\4\0") * 2, "Rows .* twice"),
        (native(16), "PixelData .* twice"),
    ],
)
def test_what_parsers_would_read_differently_is_refused(wrong: bytes, said: str) -> None:
    with pytest.raises(MalformedDicom, match=said):
        look(file_of(wrong + native(16)))


@pytest.mark.parametrize("syntax", [JPEG, RLE])
def test_a_frame_may_not_be_huge(syntax: str) -> None:
    huge = image(fragments(64), syntax, rows=30000, columns=30000, bits=8, samples=1)
    assert len(huge) < 1024
    assert "900000000 bytes uncompressed; the limit is 536870912" in refused(huge).detail
    look(huge, Limits(LIMITS.max_bytes, max_frame_bytes=900_000_000))
    look(image(fragments(64), syntax, rows=16384, columns=16384, bits=16, samples=1))
    refused(image(fragments(64), syntax, rows=16384, columns=16385, bits=12, samples=1))
    look(image(rows=30000, columns=30000, bits=8))  # no pixels, no frame


def many_items(count: int) -> dict[str, bytes]:
    items = item(b"") * count
    open_items = (struct.pack("<HHI", 0xFFFE, 0xE000, UNDEFINED) + ITEM_END) * count
    return {
        "defined": element(0x00081140, "SQ", items),
        "undefined": element(0x00081140, "SQ", items + SEQUENCE_END, length=UNDEFINED),
        "open items": element(0x00081140, "SQ", open_items),
        "UN": element(0x00091001, "UN", items),
        "UN undefined": element(0x00091001, "UN", items + SEQUENCE_END, length=UNDEFINED),
        "nested": element(0x00081140, "SQ", item(element(0x00081140, "SQ", items)) + item(b"")),
        "behind nested": element(
            0x00081140, "SQ", item(element(0x00081140, "SQ", item(b""))) + item(b"") * (count - 1)
        ),
    }


@pytest.mark.parametrize("hidden", many_items(1))
def test_the_items_of_a_sequence_are_bounded(hidden: str) -> None:
    look(file_of(many_items(20_000)[hidden]))
    assert "more than 20000 items" in refused(file_of(many_items(20_001)[hidden])).detail


def test_several_sequences_and_fragments_have_their_own_number() -> None:
    limits = Limits(LIMITS.max_bytes, max_items=10)
    rows = element(0x00081140, "SQ", item(b"") * 10) + element(0x00081115, "SQ", item(b"") * 10)
    look(file_of(rows + fragments(*[4] * 20), JPEG), limits)


@pytest.mark.parametrize(
    ("tag", "vr", "syntax"),
    [
        (0x00081030, "UT", EXPLICIT),
        (0x00091001, "UC", EXPLICIT),
        (0x00081030, "UN", EXPLICIT),  # text, by its tag
        (0x00081030, "", IMPLICIT),
        (0x00280010, "", IMPLICIT),
    ],
)
def test_a_text_may_not_be_huge(tag: int, vr: str, syntax: str) -> None:
    most = 16 * 1024 * 1024
    look(file_of(element(tag, vr, bytes(most)), syntax))
    assert "bytes long; the limit is 16777216" in (
        refused(file_of(element(tag, vr, bytes(most + 2)), syntax)).detail
    )
    inside = element(0x00081140, "SQ" if vr else "", item(element(tag, vr, bytes(most + 2))))
    refused(file_of(inside, syntax))
    refused(file_of(element(tag, vr, bytes(most)) * 5, syntax))


@pytest.mark.parametrize(("tag", "vr"), [(0x00091001, "UN"), (0x00420011, "OB"), (0x7FE00010, "")])
def test_binary_values_may_be_large(tag: int, vr: str) -> None:
    look(file_of(element(tag, vr, bytes(20_000_000)), EXPLICIT if vr else IMPLICIT))


def test_an_inflation_beyond_the_ratio_is_cut_off() -> None:
    def file(length: int) -> bytes:
        packer = zlib.compressobj(9, wbits=-15)
        pixels = packer.compress(element(0x00420011, "OB", bytes(length))) + packer.flush()
        return file_of(pixels + b"\0" * (len(pixels) % 2), DEFLATED)

    look(file(16_000_000)).close()  # its ratio is 1000, but it is small
    with pytest.raises(TooLarge, match="more than 200 times"):
        look(file(20_000_000))
    with pytest.raises(TooLarge, match="more than 200 times"):
        look(file(20_000_000) + b"\0" * 1_000_000)  # padding doesn't count
    look(file(20_000_000), Limits(LIMITS.max_bytes, max_deflate_ratio=2000)).close()
