"""What a client accepts, and what it therefore gets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.dicomweb import media
from app.dicomweb.media import Choice, MediaRange
from app.errors import NotAcceptable

EXPLICIT, IMPLICIT, BIG = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2", "1.2.840.10008.1.2.2"
JPEG, JP2, RLE = "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.5"
MP4 = "1.2.840.10008.1.2.4.102"
OCTETS, DICOM = "application/octet-stream", "application/dicom"
OHIF = f"multipart/related; type={OCTETS}; transfer-syntax=*"
"""As OHIF 3.13 asks for frames."""


# ---------------------------------------------------------------------------------- the header


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("", [("*/*", False, "")]),
        ("  ", [("*/*", False, "")]),
        ("*/*", [("*/*", False, "")]),
        ("image/png", [("image/png", False, "")]),
        ("IMAGE/PNG", [("image/png", False, "")]),
        (OHIF, [(OCTETS, True, "*")]),
        (f'multipart/related; type="{OCTETS}"', [(OCTETS, True, "")]),
        (f'Multipart/Related;TYPE="{OCTETS}";Transfer-Syntax={JPEG}', [(OCTETS, True, JPEG)]),
        ("multipart/related", [("*/*", True, "")]),
        ("multipart/*", [("*/*", True, "")]),
        ("image/png;q=0.5, image/jpeg", [("image/jpeg", False, ""), ("image/png", False, "")]),
        ("image/png;q=0, image/jpeg", [("image/jpeg", False, "")]),
        ("image/png;q=0.0", []),
        ("image/png;q=2", []),
        ("image/png;q=x", []),
        ("image/png;q=-1", []),
        ("image/png;q=1.0000", []),
        ("image/png;q=nan", []),
        (
            'multipart/related; type="a/b,c/d", image/png',
            [("a/b,c/d", True, ""), ("image/png", False, "")],
        ),
        (",,image/png,,", [("image/png", False, "")]),
    ],
)
def test_ranges_are_read_best_first(header: str, expected: list[tuple[str, bool, str]]) -> None:
    assert media.accepted(header) == [MediaRange(*each) for each in expected]


@given(st.text(max_size=80))
def test_no_header_raises(header: str) -> None:
    assert len(media.accepted(header)) <= max(1, len(header))


def test_a_header_of_a_thousand_ranges_is_cut() -> None:
    header = ", ".join(f"a/{n}" for n in range(1000))
    assert len(media.accepted(header)) <= 64


# -------------------------------------------------------------------------------------- frames


@pytest.mark.parametrize(
    ("header", "stored", "expected"),
    [
        # Uncompressed frames are in Explicit VR Little Endian, however the file is written.
        *((OHIF, each, Choice(OCTETS, True, EXPLICIT)) for each in (EXPLICIT, IMPLICIT, BIG)),
        *(("*/*", each, Choice(OCTETS, False, EXPLICIT)) for each in (EXPLICIT, IMPLICIT, BIG)),
        ("", EXPLICIT, Choice(OCTETS, False, EXPLICIT)),
        (OCTETS, EXPLICIT, Choice(OCTETS, False, EXPLICIT)),
        ("application/*", EXPLICIT, Choice(OCTETS, False, EXPLICIT)),
        (f"multipart/related; type={OCTETS}", EXPLICIT, Choice(OCTETS, True, EXPLICIT)),
        ("multipart/related", EXPLICIT, Choice(OCTETS, True, EXPLICIT)),
        (f"{OCTETS}; transfer-syntax={EXPLICIT}", BIG, Choice(OCTETS, False, EXPLICIT)),
        # Compressed ones go as they are where that is asked for, or nothing else is said.
        (OHIF, JPEG, Choice(OCTETS, True, JPEG)),
        ("*/*", JPEG, Choice(OCTETS, False, JPEG)),
        ("", JP2, Choice(OCTETS, False, JP2)),
        ("multipart/related", JP2, Choice(OCTETS, True, JP2)),
        (f"{OCTETS}; transfer-syntax=*", JPEG, Choice(OCTETS, False, JPEG)),
        (f"{OCTETS}; transfer-syntax={JPEG}", JPEG, Choice(OCTETS, False, JPEG)),
        ("image/jpeg", JPEG, Choice("image/jpeg", False, JPEG)),
        ("image/*", JP2, Choice("image/jp2", False, JP2)),
        ("multipart/related; type=image/jp2", JP2, Choice("image/jp2", True, JP2)),
        (
            f"multipart/related; type=image/dicom-rle; transfer-syntax={RLE}",
            RLE,
            Choice("image/dicom-rle", True, RLE),
        ),
        ("image/png, image/jpeg", JPEG, Choice("image/jpeg", False, JPEG)),
        # PS3.18 8.7.3.3.2: octets alone are uncompressed octets.
        (OCTETS, JPEG, Choice(OCTETS, False, EXPLICIT, True)),
        (f"multipart/related; type={OCTETS}", JPEG, Choice(OCTETS, True, EXPLICIT, True)),
        (f"*/*; transfer-syntax={EXPLICIT}", JP2, Choice(OCTETS, False, EXPLICIT, True)),
        # What is preferred, and can be had, is given.
        (f"{OCTETS};q=0.1, image/jpeg", JPEG, Choice("image/jpeg", False, JPEG)),
        ("image/jp2, */*;q=0.1", JPEG, Choice(OCTETS, False, JPEG)),
        (f"{OHIF}, */*;q=0.1", JPEG, Choice(OCTETS, True, JPEG)),
    ],
)
def test_how_frames_are_sent(header: str, stored: str, expected: Choice) -> None:
    assert media.for_frames(header, stored) == expected


@pytest.mark.parametrize(
    ("header", "stored"),
    [
        ("image/jpeg", EXPLICIT),
        ("image/png", JPEG),
        ("image/jp2", JPEG),
        ("text/html", EXPLICIT),
        (f"{OCTETS};q=0", EXPLICIT),
        (f"{OCTETS}; transfer-syntax={JPEG}", EXPLICIT),
        (f"{OCTETS}; transfer-syntax={BIG}", BIG),
        (f"{OCTETS}; transfer-syntax={JP2}", JPEG),
        (f"image/jpeg; transfer-syntax={JP2}", JPEG),
        (f"*/*; transfer-syntax={JP2}", JPEG),
        ("multipart/related; type=image/jpeg", EXPLICIT),
        ("x", EXPLICIT),
    ],
)
def test_frames_that_can_not_be_had_are_refused(header: str, stored: str) -> None:
    with pytest.raises(NotAcceptable):
        media.for_frames(header, stored)


@given(st.text(max_size=60), st.sampled_from([EXPLICIT, BIG, JPEG, MP4]))
def test_frames_are_never_named_as_what_they_are_not(header: str, stored: str) -> None:
    """A wrong name shows a plausible, wrong picture."""
    try:
        choice = media.for_frames(header, stored)
    except NotAcceptable:
        return
    own = EXPLICIT if stored == BIG else stored
    assert choice.transfer_syntax == (EXPLICIT if choice.transcode else own)


def test_the_type_of_a_part_names_the_transfer_syntax() -> None:
    assert Choice(OCTETS, True, JPEG).part_type == f"{OCTETS}; transfer-syntax={JPEG}"
    assert Choice("application/pdf").part_type == "application/pdf"


# --------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("header", "stored", "one", "expected"),
    [
        ("", [EXPLICIT], True, Choice(DICOM, True)),
        ("*/*", [EXPLICIT, JPEG], False, Choice(DICOM, True)),
        (f"multipart/related; type={DICOM}", [JPEG], False, Choice(DICOM, True)),
        (f"multipart/related; type={DICOM}; transfer-syntax=*", [JPEG], True, Choice(DICOM, True)),
        (
            f"multipart/related; type={DICOM}; transfer-syntax={JPEG}",
            [JPEG, JPEG],
            False,
            Choice(DICOM, True),
        ),
        ("multipart/related", [JPEG, EXPLICIT], False, Choice(DICOM, True)),
        (DICOM, [JPEG], True, Choice(DICOM, False, JPEG)),
        (f"{DICOM}; transfer-syntax=*", [EXPLICIT], True, Choice(DICOM, False, EXPLICIT)),
        (f"{DICOM}, */*;q=0.1", [EXPLICIT, JPEG], False, Choice(DICOM, True)),
    ],
)
def test_how_files_are_sent(header: str, stored: list[str], one: bool, expected: Choice) -> None:
    assert media.for_files(header, stored, one=one) == expected


@pytest.mark.parametrize(
    ("header", "stored", "one"),
    [
        (DICOM, [EXPLICIT], False),
        (f"{DICOM}; transfer-syntax={EXPLICIT}", [JPEG], True),
        (f"multipart/related; type={DICOM}; transfer-syntax={EXPLICIT}", [JPEG], False),
        (f"multipart/related; type={DICOM}; transfer-syntax={EXPLICIT}", [EXPLICIT, JPEG], False),
        (f"multipart/related; type={OCTETS}", [EXPLICIT], True),
        ("application/dicom+json", [EXPLICIT], True),
        ("application/zip", [EXPLICIT], False),
        (f"{DICOM};q=0", [EXPLICIT], True),
    ],
)
def test_files_that_can_not_be_had_are_refused(header: str, stored: list[str], one: bool) -> None:
    """Nothing is rewritten: what is sent is what is stored."""
    with pytest.raises(NotAcceptable):
        media.for_files(header, stored, one=one)


# -------------------------------------------------------------------- JSON, bytes and pictures


@pytest.mark.parametrize(
    ("header", "taken"),
    [
        ("", True),
        ("*/*", True),
        ("application/*", True),
        ("application/dicom+json", True),
        ("application/json", True),
        ("application/dicom+xml, application/json;q=0.1", True),
        ("application/dicom+xml", False),
        ('multipart/related; type="application/dicom+xml"', False),
        ("multipart/related", False),
        ("text/html", False),
        ("application/json;q=0", False),
    ],
)
def test_metadata_is_json(header: str, taken: bool) -> None:
    if taken:
        media.for_json(header)
        return
    with pytest.raises(NotAcceptable):
        media.for_json(header)


@pytest.mark.parametrize(
    ("header", "media_type", "expected"),
    [
        ("", OCTETS, Choice(OCTETS)),
        ("*/*", "application/pdf", Choice("application/pdf")),
        (OCTETS, "application/pdf", Choice(OCTETS)),
        ("application/*", "application/pdf", Choice("application/pdf")),
        (f"multipart/related; type={OCTETS}", OCTETS, Choice(OCTETS, True)),
        ("multipart/related", "application/pdf", Choice("application/pdf", True)),
        (
            f"multipart/related; type={OCTETS}, application/pdf;q=0.9",
            "application/pdf",
            Choice(OCTETS, True),
        ),
    ],
)
def test_how_bulk_data_is_sent(header: str, media_type: str, expected: Choice) -> None:
    assert media.for_bytes(header, media_type) == expected


@pytest.mark.parametrize("header", ["text/html", "image/*", "application/pdf", f"{OCTETS};q=0"])
def test_bulk_data_that_can_not_be_had_is_refused(header: str) -> None:
    with pytest.raises(NotAcceptable):
        media.for_bytes(header, OCTETS)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("", "image/jpeg"),
        ("*/*", "image/jpeg"),
        ("image/*", "image/jpeg"),
        ("image/png", "image/png"),
        ("image/webp, image/png;q=0.5, image/jpeg;q=0.4", "image/png"),
        # As a browser's <img> asks.
        ("image/avif,image/webp,image/png,image/svg+xml,image/*;q=0.8,*/*;q=0.5", "image/png"),
    ],
)
def test_how_a_picture_is_sent(header: str, expected: str) -> None:
    assert media.for_rendered(header, ["image/jpeg", "image/png"]) == expected


@pytest.mark.parametrize("header", ["image/gif", "video/mp4", "multipart/related", "*/*;q=0"])
def test_pictures_that_can_not_be_had_are_refused(header: str) -> None:
    with pytest.raises(NotAcceptable):
        media.for_rendered(header, ["image/jpeg", "image/png"])
