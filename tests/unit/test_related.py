"""The reader of multipart bodies: what is a part, what is none, and how much is ever held."""

import random
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from app.errors import LightboxError, TooLarge, Unprocessable
from app.routes import related
from app.routes.related import boundary_of, related_parts, single_part

TEMPORARY = Path(gettempdir())
PART = b"--x\r\nContent-Type: application/dicom\r\n\r\n"
TWO = PART + b"one\r\n" + PART + b"two\r\n--x--"
READ = [("application/dicom", b"one"), ("application/dicom", b"two")]


async def chunks(*sent: bytes | Exception) -> Any:
    for each in sent:
        if isinstance(each, Exception):
            raise each
        yield each


async def read_from(
    body: Any, boundary: bytes = b"x", *, max_parts: int = 100, spool: Path = TEMPORARY
) -> tuple[list[tuple[str, bytes]], LightboxError | None]:
    """The parts that were handed out, and what was wrong after them."""
    parts: list[tuple[str, bytes]] = []
    try:
        async for part in related_parts(body, boundary, max_parts=max_parts, spool_dir=spool):
            assert part.number == len(parts) + 1
            parts.append((part.media_type, part.file.read()))
    except LightboxError as error:
        return parts, error
    return parts, None


async def read(
    *sent: bytes | Exception, **more: Any
) -> tuple[list[tuple[str, bytes]], LightboxError | None]:
    return await read_from(chunks(*sent), **more)


@pytest.mark.parametrize(
    "body",
    [
        TWO,
        TWO + b"\r\n",
        TWO + b"\r\nan epilogue\r\nof lines",
        b"\r\n" + TWO,
        b"a preamble\r\nof lines\r\n" + TWO,
        b"--y\r\n--\r\n" + TWO,
        TWO.replace(b"--x\r\n", b"--x \t\r\n"),
        TWO.replace(b"Content-Type: a", b"CONTENT-type:a"),
        TWO.replace(b"application/dicom", b"Application/DICOM; transfer-syntax=1.2.840.10008.1.2"),
        TWO.replace(b"Content-Type", b"Content-Length: 999999\r\nX-Any: y\r\nContent-Type"),
    ],
)
async def test_two_parts_however_they_are_framed_and_cut(body: bytes) -> None:
    assert await read(body) == (READ, None)
    assert await read(*(bytes([each]) for each in body)) == (READ, None)
    for at in range(len(body)):
        assert await read(body[:at], body[at:]) == (READ, None), at


async def test_bytes_that_look_like_a_boundary_are_kept() -> None:
    """Random data of the pieces that boundaries are made of, cut at random."""
    chance = random.Random(7)
    pieces = [
        b"\r",
        b"\n",
        b"\r\n",
        b"-",
        b"--",
        b"x",
        b"bound",
        b"\r\n--bound",
        b"\0",
        b" ",
        b"\t",
    ]
    for _ in range(300):
        parts: list[bytes] = []
        while len(parts) < 3:
            data = b"".join(chance.choices(pieces, k=chance.randrange(40)))
            if b"\r\n--boundary" not in b"\r\n" + data + b"\r\n":
                parts.append(data)
        body = b"".join(b"--boundary\r\n\r\n" + each + b"\r\n" for each in parts) + b"--boundary--"
        cuts = sorted(chance.sample(range(len(body)), 5))
        sent = [body[a:b] for a, b in zip([0, *cuts], [*cuts, len(body)], strict=True)]
        assert await read(*sent, boundary=b"boundary") == ([("", each) for each in parts], None)


@pytest.mark.parametrize(
    ("body", "read_before", "word"),
    [
        (b"", 0, "no part"),
        (b"--x--", 0, "no part"),
        (b"--x--\r\n" + TWO, 0, "no part"),
        (b"neither", 0, "no part"),
        (TWO.replace(b"--x", b"--y"), 0, "no part"),
        (TWO.replace(b"\r\n", b"\n"), 0, "no part"),
        (PART.replace(b"\r\n", b"\n").replace(b"--x\n", b"--x\r\n", 1) + b"one\r\n--x--", 0, ""),
        (b"--x\r\nno colon\r\n\r\none\r\n--x--", 0, "malformed"),
        (b"--x\r\n: no name\r\n\r\none\r\n--x--", 0, "malformed"),
        (b"--x\r\nA: b\r\n folded\r\n\r\none\r\n--x--", 0, "malformed"),
        (b"--x\r\nA: " + b"b" * 5000 + b"\r\n\r\none\r\n--x--", 0, "malformed"),
        (b"--x\r\n" + b"A" * 5000 + b": b\r\n\r\none\r\n--x--", 0, "malformed"),
        (b"--x\r\n" + b"A: b\r\n" * 17 + b"\r\none\r\n--x--", 0, "malformed"),
        (b"--x\r\nA: " + b"b" * 1_000_000, 0, "malformed"),
        (PART, 0, "part 1"),
        (PART + b"one", 0, "part 1"),
        (PART + b"one\r\n--x", 0, "part 1"),
        (PART + b"one\r\n--x\r\n", 1, "part 2"),
        (PART + b"one\r\n--x-", 0, "part 1"),
        (TWO[:-1], 1, "part 2"),
        (TWO[:-5], 1, "part 2"),
        (TWO.replace(b"two", b"t\r\n--x\r\nwo"), 2, "malformed"),
    ],
)
async def test_what_is_wrong_is_said_after_the_parts_before_it(
    body: bytes, read_before: int, word: str
) -> None:
    for sent in ([body], [bytes([each]) for each in body[:6000]]):
        parts, error = await read(*sent)
        assert len(parts) == read_before, parts
        assert isinstance(error, Unprocessable)
        assert word in error.detail


async def test_a_sender_that_goes_away_and_a_limit_come_after_the_parts_before_them() -> None:
    whole = PART + b"one\r\n"
    parts, error = await read(whole + PART + b"tw", ClientDisconnect())
    assert (parts, type(error)) == (READ[:1], Unprocessable)
    parts, error = await read(whole + PART + b"tw", TooLarge("too much"))
    assert (parts, type(error)) == (READ[:1], TooLarge)


async def test_parts_beyond_the_limit_are_not_read() -> None:
    sent = 0

    async def endless() -> Any:
        nonlocal sent
        while sent < 1_000_000:
            sent += 1000
            yield b"--x\r\n\r\n\r\n" * 1000

    parts, error = await read_from(endless(), max_parts=50)
    assert (len(parts), sent) == (50, 1000)
    assert isinstance(error, TooLarge)
    assert "at most 50 parts" in error.detail


async def test_one_file_is_held_and_closed_when_the_next_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []
    make = related._spooled

    def counted(spool_dir: Path) -> Any:
        assert all(each.file.closed for each in opened)
        opened.append(make(spool_dir))
        return opened[-1]

    monkeypatch.setattr(related, "_spooled", counted)
    big = bytes(3 * 1024 * 1024)
    parts, error = await read(
        (PART + big + b"\r\n") * 4 + PART + big, boundary=b"x", spool=tmp_path
    )
    assert [len(data) for _, data in parts] == [len(big)] * 4
    assert error is not None
    assert len(opened) == 5
    assert all(each.file.closed for each in opened)
    reader = related_parts(chunks(TWO), b"x", max_parts=9, spool_dir=tmp_path)
    await anext(reader)
    await reader.aclose()
    assert opened[-1].file.closed, "given up in the middle"


async def test_a_body_of_one_file(tmp_path: Path) -> None:
    async def read_single(*sent: bytes | Exception) -> list[bytes]:
        parts = single_part(chunks(*sent), "application/dicom", spool_dir=tmp_path)
        return [part.file.read() async for part in parts]

    assert await read_single(b"o", b"ne") == [b"one"]
    assert await read_single() == [b""]
    with pytest.raises(Unprocessable, match="broke off"):
        await read_single(b"o", ClientDisconnect())


@pytest.mark.parametrize(
    "boundary", [b"", b"x" * 71, b"ends with a space ", b"a\r\nb", b"\xe4", b'"']
)
def test_a_boundary_that_is_none(boundary: bytes) -> None:
    with pytest.raises(Unprocessable, match="boundary"):
        boundary_of({b"boundary": boundary})


def test_a_boundary() -> None:
    for boundary in (b"x", b"x" * 70, b"with a space'()+_,-./:=?"):
        assert boundary_of({b"boundary": boundary, b"type": b"any"}) == boundary
    with pytest.raises(Unprocessable):
        boundary_of({})
