"""What the gateway asks of Orthanc: frames by number, bulk data by path, pictures by numbers."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.access import InstanceFacts
from app.dicomweb import files
from app.dicomweb.files import Part, Rendering, SendFile
from app.dicomweb.media import Choice
from app.errors import NotFound, OrthancUnavailable, Unprocessable

ORTHANC_ID = "0123abcd-0123abcd-0123abcd-0123abcd-0123abcd"
STAMP = "0123456789abcdef"
CT, PDF = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.104.1"
EXPLICIT, JPEG, MP4 = (
    "1.2.840.10008.1.2.1",
    "1.2.840.10008.1.2.4.50",
    "1.2.840.10008.1.2.4.102",
)


def instance(**values: Any) -> InstanceFacts:
    sane: dict[str, Any] = {
        "sop_instance_uid": "1.2.3",
        "orthanc_id": ORTHANC_ID,
        "sop_class_uid": CT,
        "transfer_syntax_uid": EXPLICIT,
        "number_of_frames": 3,
        "rows": 16,
    }
    return InstanceFacts(**{**sane, **values})


# ------------------------------------------------------------------------------------- frames


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1", [1]), ("3", [3]), ("1,2,3", [1, 2, 3]), ("3,1,3", [3, 1, 3]), ("01", [1])],
)
def test_frames_are_counted_from_one(text: str, expected: list[int]) -> None:
    assert files.frame_numbers(text, instance()) == expected


def test_where_none_is_named_all_are_meant() -> None:
    assert list(files.frame_numbers("", instance())) == [1, 2, 3]


def test_a_million_frames_cost_nothing_until_they_are_sent() -> None:
    numbers = files.frame_numbers("", instance(number_of_frames=1_000_000))
    assert (len(numbers), isinstance(numbers, list)) == (1_000_000, False)


def test_a_video_is_one_file() -> None:
    video = instance(transfer_syntax_uid=MP4, number_of_frames=120)
    assert list(files.frame_numbers("", video)) == [1]
    with pytest.raises(NotFound):
        files.frame_numbers("2", video)


@pytest.mark.parametrize(
    "text",
    [
        *("0", "4", "-1", "+1", "1.0", " 1", "1 ", "x"),
        *("1,", ",1", "1,,2", "1,4", "0,1", "1;2"),
        *("1-2", "٣", "１", "1" * 8, "1000001", "1\n", ",".join(["1"] * 1001)),
    ],
)
def test_what_is_no_frame_of_the_instance_is_not_there(text: str) -> None:
    with pytest.raises(NotFound):
        files.frame_numbers(text, instance())


@given(st.text(max_size=12))
def test_every_frame_that_is_read_is_one_of_the_instance(text: str) -> None:
    try:
        numbers = files.frame_numbers(text, instance())
    except NotFound:
        return
    assert numbers
    assert set(numbers) <= {1, 2, 3}


def test_a_frame_is_kept_under_the_stamp_and_a_video_is_not() -> None:
    choice = Choice("application/octet-stream", False, EXPLICIT)
    assert files.frame(instance(), 3, choice, STAMP) == SendFile(
        f"/_orthanc-kept/{STAMP}/instances/{ORTHANC_ID}/frames/2/raw",
        f"application/octet-stream; transfer-syntax={EXPLICIT}",
    )
    video = files.frame(instance(transfer_syntax_uid=MP4), 1, choice, STAMP)
    assert video.location == f"/_orthanc/instances/{ORTHANC_ID}/frames/0/raw"


def test_a_part_has_a_boundary_of_its_own() -> None:
    choice = Choice("application/octet-stream", True, EXPLICIT)
    first, second = (files.frame(instance(), 1, choice, STAMP) for _ in range(2))
    assert re.fullmatch("[0-9a-f]{32}", first.boundary)
    assert first.boundary != second.boundary
    where = f"-kept/{STAMP}/instances/{ORTHANC_ID}/frames/0/raw"
    assert first.location == f"/_orthanc-part/{first.boundary}{where}"


# -------------------------------------------------------------------------------- renderings

ALL = ("viewport", "window", "quality")


@pytest.mark.parametrize(
    ("query", "expected", "sent"),
    [
        ([], Rendering(), ""),
        ([("viewport", "")], Rendering(), ""),
        ([("viewport", "256,128")], Rendering((256, 128)), "?width=256&height=128"),
        ([("viewport", "4096,1")], Rendering((4096, 1)), "?width=4096&height=1"),
        (
            [("window", "40,400")],
            Rendering(window=(40, 400)),
            "?window-center=40&window-width=400",
        ),
        (
            [("window", "-600.5,1500,linear")],
            Rendering(window=(-600.5, 1500)),
            "?window-center=-600.5&window-width=1500",
        ),
        ([("quality", "1")], Rendering(quality=1), "?quality=1"),
        (
            [("quality", "100"), ("window", "1,2"), ("viewport", "3,4")],
            Rendering((3, 4), (1, 2), 100),
            "?width=3&height=4&window-center=1&window-width=2&quality=100",
        ),
    ],
    ids=str,
)
def test_a_rendering_is_read(query: list[tuple[str, str]], expected: Rendering, sent: str) -> None:
    assert files.parse_rendering(query, ALL) == expected
    assert expected.query == sent


@pytest.mark.parametrize(
    "query",
    [
        *(
            [("viewport", each)]
            for each in ("0,0", "4097,1", "1,4097", "1", "1,2,3", "a,b", "-1,2")
        ),
        *([("viewport", each)] for each in ("1.5,2", "1,2,,", " 1,2", "٣,٣", "1;2", ",", "1,")),
        *([("window", each)] for each in ("1", "a,b", "1,0", "1,-1", "nan,1", "1,nan", "inf,1")),
        *([("window", each)] for each in ("1,inf", "1e7,1", "1,2,sigmoid", "1,2,linear,x", ",")),
        *([("quality", each)] for each in ("0", "101", "-1", "1.5", "x", "1e1", "٣")),
        [("viewport", "1,1"), ("viewport", "1,1")],
        [("rows", "1")],
        [("Viewport", "1,1")],
        [("iccprofile", "yes")],
        [("annotation", "patient")],
    ],
    ids=str,
)
def test_a_rendering_that_can_not_be_drawn_is_refused(query: list[tuple[str, str]]) -> None:
    with pytest.raises(Unprocessable):
        files.parse_rendering(query, ALL)


def test_what_takes_no_parameters_says_so() -> None:
    assert files.parse_rendering([], ()) == Rendering()
    with pytest.raises(Unprocessable, match="takes no parameters"):
        files.parse_rendering([("frame", "1")], ())


@given(st.dictionaries(st.sampled_from(ALL), st.text(max_size=16)))
def test_what_is_sent_to_orthanc_holds_nothing_but_numbers(query: dict[str, str]) -> None:
    try:
        rendering = files.parse_rendering(list(query.items()), ALL)
    except Unprocessable:
        return
    number = r"-?[0-9]+(\.[0-9]+)?(e[+-][0-9]+)?"
    one = f"(width|height|window-center|window-width|quality)={number}"
    assert re.fullmatch(rf"(\?{one}(&{one})*)?", rendering.query)


@pytest.mark.parametrize(
    ("values", "types"),
    [
        ({}, ["image/jpeg", "image/png"]),
        ({"rows": None}, ["image/jpeg", "image/png"]),  # came in before that was kept
        ({"transfer_syntax_uid": JPEG}, ["image/jpeg", "image/png"]),
        ({"transfer_syntax_uid": MP4}, ["video/mp4"]),
        ({"sop_class_uid": PDF, "rows": 0}, ["application/pdf"]),
    ],
    ids=str,
)
def test_what_an_instance_can_be_rendered_as(values: dict[str, Any], types: list[str]) -> None:
    assert files.rendered_types(instance(**values)) == types


def test_what_has_no_pixels_is_not_rendered() -> None:
    with pytest.raises(NotFound):
        files.rendered_types(instance(rows=0))


@pytest.mark.parametrize(
    ("media_type", "location"),
    [
        ("video/mp4", f"/_orthanc/instances/{ORTHANC_ID}/frames/0/raw"),
        ("application/pdf", f"/_orthanc/instances/{ORTHANC_ID}/content/0042-0011"),
        (
            "image/png",
            f"/_orthanc-image-kept/{STAMP}/instances/{ORTHANC_ID}/frames/1/rendered?quality=9",
        ),
    ],
)
def test_where_a_rendering_is(media_type: str, location: str) -> None:
    rendering = Rendering(quality=9)
    found = files.rendered(instance(), 2, rendering, media_type, STAMP)
    assert found == SendFile(location, media_type)


# --------------------------------------------------------------------------------- bulk paths


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("00420011", ["0042-0011"]),
        ("7FE00010", ["7fe0-0010"]),
        ("54000100/1/54001010", ["5400-0100", "0", "5400-1010"]),
        ("54000100/12/54001010", ["5400-0100", "11", "5400-1010"]),
        ("", None),
        ("00420011/", None),
        ("/00420011", None),
        ("54000100/1", None),
        ("54000100/0/54001010", None),
        ("54000100/-1/54001010", None),
        ("54000100/٣/54001010", None),
        ("54000100/1234567/54001010", None),
        ("0042001", None),
        ("004200110", None),
        ("0042001g", None),
        ("００４２００１１", None),
        ("00420011\n", None),
        ("../../sys", None),
        ("../..", None),
        ("00420011/../00420011", None),
        ("/".join(["00420011", "1"] * 17 + ["00420011"]), None),
    ],
)
def test_a_path_of_bulk_data_is_taken_whole_or_not(path: str, expected: list[str] | None) -> None:
    assert files.bulk_tags(path) == expected


@given(st.text(max_size=40))
def test_a_path_that_is_sent_to_orthanc_holds_nothing_but_tags(path: str) -> None:
    tags = files.bulk_tags(path)
    assert tags is None or set("/".join(tags)) <= set("0123456789abcdef-/")


@pytest.mark.parametrize("path", ["7FE00010", "7fe00010", "7FE00010/1/00420011", "system", ""])
def test_pixels_and_nonsense_are_no_bulk_data(path: str) -> None:
    with pytest.raises(NotFound):
        files.bulk_path(path)


def test_a_document_is_named_as_what_it_is() -> None:
    document = instance(sop_class_uid=PDF, rows=0)
    assert files.bulk_type(document, ["0042-0011"]) == "application/pdf"
    assert files.bulk_type(document, ["5400-0100", "0", "0042-0011"]) == "application/octet-stream"
    assert files.bulk_type(instance(), ["0042-0011"]) == "application/octet-stream"


# -------------------------------------------------------------------------------------- parts


@asynccontextmanager
async def opening(*chunks: bytes, fails: bool = False) -> AsyncIterator[AsyncIterator[bytes]]:
    async def each() -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield chunk
        if fails:
            raise OrthancUnavailable("gone")

    yield each()


async def test_parts_stand_one_after_the_other() -> None:
    parts = [Part("a/b", partial(opening, b"1", b"2")), Part("c/d; e=f", partial(opening))]
    body = b"".join([chunk async for chunk in await files.begun(files.in_parts(parts, "x"))])
    assert body == (
        b"--x\r\nContent-Type: a/b\r\n\r\n12\r\n--x\r\nContent-Type: c/d; e=f\r\n\r\n\r\n--x--\r\n"
    )


async def test_what_fails_on_the_way_has_no_last_boundary() -> None:
    parts = [Part("a/b", partial(opening, b"1")), Part("a/b", partial(opening, b"2", fails=True))]
    seen = []
    with pytest.raises(OrthancUnavailable):  # noqa: PT012  (what came before it is the point)
        async for chunk in await files.begun(files.in_parts(parts, "x")):
            seen.append(chunk)  # noqa: PERF401  (what it had is looked at after it failed)
    assert seen[-1] == b"2"
    assert b"--x--" not in b"".join(seen)


async def test_what_can_not_be_opened_is_refused_before_it_begins() -> None:
    @asynccontextmanager
    async def gone() -> AsyncIterator[AsyncIterator[bytes]]:
        raise NotFound("gone")
        yield

    with pytest.raises(NotFound):
        await files.begun(files.in_parts([Part("a/b", gone)], "x"))
