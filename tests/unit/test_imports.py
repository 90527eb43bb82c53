"""The parts of imports: tus's headers, the spool folder, who it is for, the client's own checks."""

import base64
import hashlib
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from app.cli import imports as command
from app.errors import Conflict, Unprocessable, UnsupportedMediaType
from app.identity import Principal, Role, Scope
from app.imports import Spool, principal_json, tus
from app.imports.rows import read_principal

DIGEST = hashlib.sha256(b"x").hexdigest()
URL = "sqlite+aiosqlite:///lightbox.sqlite"


def said(**metadata: str) -> dict[str, str]:
    pairs = [f"{k} {base64.b64encode(v.encode()).decode()}" for k, v in metadata.items()]
    return {"upload-length": "9", "upload-metadata": ", ".join(pairs)}


# ----------------------------------------------------------------------------------------- tus


@given(st.text(min_size=1, max_size=300), st.integers(0, 10**14))
def test_what_is_announced_is_read(name: str, size: int) -> None:
    headers = {**said(filename=name.encode("utf-8", "replace").decode(), sha256=DIGEST)}
    found = tus.announced({**headers, "upload-length": str(size)})
    assert (found.size, found.sha256) == (size, DIGEST)
    assert found.name.isprintable()
    assert len(found.name) == min(len(name), 255)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"upload-length": "9"},
        said(filename="a"),
        said(sha256=DIGEST.upper()),
        said(sha256=DIGEST[:-1]),
        said(sha256=DIGEST) | {"upload-length": "-9"},
        said(sha256=DIGEST) | {"upload-length": "9.0"},
        said(sha256=DIGEST) | {"upload-length": "9" * 16},
        {"upload-length": "9", "upload-metadata": f"sha256 {DIGEST}!"},
        {"upload-length": "9", "upload-metadata": "sha256 /w=="},
    ],
)
def test_what_is_announced_badly_is_refused(headers: dict[str, str]) -> None:
    with pytest.raises(Unprocessable):
        tus.announced(headers)


def test_an_offset_needs_its_type_of_content() -> None:
    kind = {"content-type": tus.CONTENT_TYPE}
    assert tus.offset({**kind, "upload-offset": "12"}) == 12
    with pytest.raises(UnsupportedMediaType):
        tus.offset({"upload-offset": "12"})
    with pytest.raises(Unprocessable):
        tus.offset({**kind, "upload-offset": "twelve"})


# --------------------------------------------------------------------------------------- spool


def test_the_folder_is_ones_own(tmp_path: Path) -> None:
    spool = Spool(tmp_path, URL)
    spool.open()
    spool.open()
    assert spool.folder.stat().st_mode & 0o777 == 0o700
    other = Spool(tmp_path, URL + "2")
    assert other.folder != spool.folder, "another Lightbox's"
    other.folder.symlink_to(spool.folder)
    with pytest.raises(RuntimeError, match="0700"):
        other.open()
    secret = "postgresql+psycopg://lightbox:{}@localhost/lightbox"
    folders = {Spool(tmp_path, secret.format(each)).folder for each in ("one", "two")}
    assert len(folders) == 1, "a new password is not another database"


def test_one_connection_writes_a_file_at_a_time(tmp_path: Path) -> None:
    spool, import_id = Spool(tmp_path, URL), uuid4()
    spool.open()
    with spool.writing(import_id, 1) as file:
        file.write(b"abc")
        with pytest.raises(Conflict), spool.writing(import_id, 1):
            pass
        with spool.writing(import_id, 2):
            pass
    with spool.writing(import_id, 1) as file:
        file.write(b"def")
    assert spool.offset(import_id, 1) == 6
    assert spool.digest(import_id, 1) == hashlib.sha256(b"abcdef").hexdigest()
    assert spool.path(import_id, 1).stat().st_mode & 0o777 == 0o600
    assert sorted(spool.held()) == [(import_id, 1), (import_id, 2)]
    spool.remove(import_id, 1)
    spool.remove(import_id, 1)
    assert (spool.offset(import_id, 1), spool.reading(import_id, 1)) == (0, None)


def test_a_link_in_the_folder_is_not_followed(tmp_path: Path) -> None:
    spool, import_id = Spool(tmp_path, URL), uuid4()
    spool.open()
    target = tmp_path / "target"
    target.write_bytes(b"whatever")
    spool.path(import_id, 1).symlink_to(target)
    with pytest.raises(OSError, match="symbolic"), spool.writing(import_id, 1):
        pass
    assert target.read_bytes() == b"whatever"


# ----------------------------------------------------------------------------------- principal


@pytest.mark.parametrize(
    "scopes",
    [None, frozenset(), frozenset({Scope("user", "ImagingStudy", frozenset("cr"))})],
)
def test_whoever_is_written_down_is_read(scopes: Any) -> None:
    roles = frozenset({Role.TECHNOLOGIST, Role.RADIOLOGIST})
    principal = Principal("sub|1", 'Näme "x"', roles, "north", "sid", None, scopes)
    assert read_principal(principal_json(principal)) == principal


# ------------------------------------------------------------------------------------ the client


def test_the_client_reads_each_content_once(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1").write_bytes(b"one")
    (tmp_path / "a" / "2").write_bytes(b"one")
    (tmp_path / "3").write_bytes(b"three")
    (tmp_path / "DICOMDIR").write_bytes(b"index")
    (tmp_path / "link").symlink_to("/etc/passwd")
    found = command._read(tmp_path, command._Bars().bytes)
    assert [(each.name, each.size) for each in found] == [("3", 5), ("a/1", 3)]
    (one,) = command._read(tmp_path / "3", command._Bars().bytes)
    assert (one.name, one.sha256) == ("3", hashlib.sha256(b"three").hexdigest())


async def test_the_token_goes_nowhere_else_and_a_new_one_is_read(tmp_path: Path) -> None:
    """A server that answers 401 once, then names another host: it is not asked."""
    (tmp_path / "token").write_text("old\n")
    (tmp_path / "1").write_bytes(b"x")
    asked: list[tuple[str, str]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append((request.url.host, request.headers["authorization"]))
        if request.headers["authorization"] == "Bearer old":
            (tmp_path / "token").write_text("new\n")
            return httpx.Response(401)
        if request.method == "POST" and request.url.path == command.API:
            return httpx.Response(202, json={"id": "1"})
        if request.url.path.endswith("/events"):
            return httpx.Response(503)
        if request.method == "POST":
            headers = {"location": "http://evil.example/x", "upload-offset": "0"}
            return httpx.Response(201, headers=headers)
        link = {"link": '<http://evil.example/next>; rel="next"'}
        return httpx.Response(200, json={"files": []}, headers=link)

    token = command.Token(tmp_path / "token")
    token.read()
    transport = httpx.MockTransport(answer)
    async with httpx.AsyncClient(transport=transport, base_url="http://lightbox.example") as client:
        bars, console = command._Bars(), Console(quiet=True)
        files = command._read(tmp_path / "1", bars.bytes)
        with pytest.raises(command.Stopped, match="not Lightbox"):
            await command._Import(client, token, files, bars, console).run({})
    assert {host for host, _ in asked} == {"lightbox.example"}
    assert [each for _, each in asked][:2] == ["Bearer old", "Bearer new"]


async def test_a_server_that_is_gone_is_given_up_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "PATIENCE", 0.0)
    monkeypatch.setenv("LIGHTBOX_TOKEN", "token")
    (tmp_path / "1").write_bytes(b"x")

    def gone(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("gone", request=request)

    token = command.Token(None)
    token.read()
    async with httpx.AsyncClient(
        transport=httpx.MockTransport(gone), base_url="http://lightbox.example"
    ) as client:
        bars = command._Bars()
        files = command._read(tmp_path, bars.bytes)
        with pytest.raises(command.Stopped, match="Run the same command again"):
            await command._Import(client, token, files, bars, Console(quiet=True)).run({})
