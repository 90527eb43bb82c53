"""`python -m app import PATH`: a folder, a file or a ZIP, over a line that may break.

A client of the API, and nothing else of Lightbox: it needs a token, no settings and no database.
Run again with the same files it goes on where it stopped, by their content.
"""

import asyncio
import base64
import hashlib
import json
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NoReturn
from uuid import UUID

import httpx
import typer
from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from app.cli.common import fail

CHUNK_BYTES = 1024 * 1024
AT_ONCE = 4
LONGEST_DELAY = 10.0  # seconds between tries
RETRY_SECONDS = 1.0
MOST_TRIES = 20  # that bring nothing, of one file
PATIENCE = 600.0  # seconds without any answer before it is given up
API = "/api/v1/dicom/imports"
REFUSED = 3  # the exit code where some files were refused
TUS = {"Tus-Resumable": "1.0.0"}
PIECE = {**TUS, "Content-Type": "application/offset+octet-stream"}


class Stopped(Exception):
    """It can't go on; the sentence says why."""


@dataclass(frozen=True)
class Found:
    """A file of the folder."""

    path: Path
    name: str  # below the folder
    size: int
    sha256: str


@dataclass
class Token:
    """The bearer token: of a file, which may be renewed meanwhile, or of the environment."""

    path: Path | None
    value: str = field(default="", repr=False)

    def read(self) -> str:
        """The token as it is now. Raises Stopped."""
        if self.path is None:
            self.value = os.environ.get("LIGHTBOX_TOKEN", "").strip()
        else:
            try:
                self.value = self.path.read_text(encoding="ascii").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise Stopped(f"The token can't be read from {self.path}.") from error
        if not self.value:
            raise Stopped("There is no token: set LIGHTBOX_TOKEN, or name a --token-file.")
        return self.value


def import_files(
    path: Annotated[Path, typer.Argument(help="A folder with all below it, a file or a ZIP.")],
    order: Annotated[UUID | None, typer.Option(help="The order that all files belong to.")] = None,
    patient: Annotated[
        UUID | None,
        typer.Option(help="The patient. Without order and patient each file's PatientID decides."),
    ] = None,
    url: Annotated[
        str, typer.Option(envvar="LIGHTBOX_API_BASE_URL", help="The API origin.")
    ] = "http://localhost:8000",
    token_file: Annotated[
        Path | None,
        typer.Option(help="File that holds the token; by default it is LIGHTBOX_TOKEN's."),
    ] = None,
) -> None:
    """Import a folder, a file or a ZIP. Ends with 0 where all is in, 3 where files were refused.

    Interrupted, it goes on where it was when it is run again with the same files.
    """
    console = Console(stderr=True)
    target = {"order_id": order, "patient_id": patient}
    body = {name: str(value) for name, value in target.items() if value is not None}
    try:
        refused = asyncio.run(_run(path, body, url.rstrip("/"), Token(token_file), console))
    except Stopped as error:
        fail(str(error))
    except KeyboardInterrupt:
        _interrupted(console)
    if refused:
        _say_refused(refused)
        raise typer.Exit(REFUSED)


def _interrupted(console: Console) -> NoReturn:
    console.print("Interrupted. Run the same command again to go on.")
    raise typer.Exit(130)


def _say_refused(refused: list[dict[str, Any]]) -> None:
    table = Table(title=f"{len(refused):,} files were not taken in")
    table.add_column("File", overflow="fold")
    table.add_column("Why", overflow="fold")
    for each in refused:
        why = each["error"] or f"It is {each['state']}."
        table.add_row(Text(each["filename"]), Text(why))
    Console().print(table)


async def _run(
    path: Path, body: dict[str, str], url: str, token: Token, console: Console
) -> list[dict[str, Any]]:
    """Import; what was not taken in."""
    token.read()
    bars = _Bars()
    timeout = httpx.Timeout(60.0, connect=10.0)
    shown = Live(Group(bars.bytes, bars.files), console=console)
    with shown if console.is_terminal else nullcontext():
        files = await asyncio.to_thread(_read, path, bars.bytes)
        async with httpx.AsyncClient(base_url=url, timeout=timeout) as client:
            return await _Import(client, token, files, bars, console).run(body)


class _Rate(ProgressColumn):
    """Files a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f}/s")


class _Bars:
    """What is counted in bytes, and what in files."""

    def __init__(self) -> None:
        both = (TextColumn("{task.description:>9}"), BarColumn())
        self.bytes = Progress(*both, DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        self.files = Progress(*both, MofNCompleteColumn(), _Rate(), TimeRemainingColumn())


def _read(path: Path, bars: Progress) -> list[Found]:
    """The files below a folder, or one; each content once. Raises Stopped."""
    if not path.exists():
        raise Stopped(f"{path} is not there.")
    root = path if path.is_dir() else path.parent
    paths = sorted(path.rglob("*")) if path.is_dir() else [path]
    regular = [each for each in paths if each.is_file() and not each.is_symlink()]
    # The index of a DICOM medium (PS3.3 F) is no image.
    wanted = [each for each in regular if each.name != "DICOMDIR"]
    if not wanted:
        raise Stopped(f"There are no files in {path}.")
    task = bars.add_task("Reading", total=sum(each.stat().st_size for each in wanted))
    found: dict[str, Found] = {}
    for each in wanted:
        digest, size = hashlib.sha256(), 0
        try:
            with each.open("rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    digest.update(chunk)
                    size += len(chunk)
                    bars.advance(task, len(chunk))
        except OSError as error:
            raise Stopped(f"{each} can't be read: {error.strerror}.") from error
        name = each.relative_to(root).as_posix()
        found.setdefault(digest.hexdigest(), Found(each, name, size, digest.hexdigest()))
    return list(found.values())


class _Import:
    """One import, by one client."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        token: Token,
        files: list[Found],
        bars: _Bars,
        console: Console,
    ) -> None:
        self._client = client
        self._token = token
        self._files = files
        self._bars = bars
        self._console = console
        self._answered = time.monotonic()

    async def run(self, body: dict[str, str]) -> list[dict[str, Any]]:
        """Send what is not there yet, and wait until all is taken in; what was not. Raises
        Stopped."""
        named = json.dumps([body, sorted(each.sha256 for each in self._files)])
        key = hashlib.sha256(named.encode()).hexdigest()
        wanted = {**body, "file_count": len(self._files), "key": key}
        made = (await self._ask("POST", API, json=wanted)).json()
        url = f"{API}/{made['id']}"
        there = {each["sha256"] async for each in self._listed(url) if each["state"] != "receiving"}
        total = sum(each.size for each in self._files)
        sent = sum(each.size for each in self._files if each.sha256 in there)
        if there:
            self._console.print(f"Going on: {len(there):,} of {len(self._files):,} were sent.")
        self._sending = self._bars.bytes.add_task("Sending", total=total, completed=sent)
        self._filing = self._bars.files.add_task("Taking in", total=len(self._files))
        waiting = [each for each in self._files if each.sha256 not in there]
        try:
            async with asyncio.TaskGroup() as group:
                watching = group.create_task(self._watch(url))
                queue = iter(waiting)
                for _ in range(AT_ONCE):
                    group.create_task(self._send_each(url, queue))
        except* Stopped as several:
            raise several.exceptions[0] from None
        over = watching.result()
        if over["state"] != "done":
            raise Stopped(f"The import was {over['state']}. {over['reason']}")
        counts = over["counts"]
        taken = counts.get("linked", 0)
        self._console.print(f"{taken:,} files are in; {counts.get('refused', 0):,} were refused.")
        return [each async for each in self._listed(f"{url}?state=refused")]

    async def _send_each(self, url: str, queue: Iterator[Found]) -> None:
        for each in queue:
            await self._send(url, each)

    async def _send(self, url: str, file: Found) -> None:
        """One file, from where it broke off."""
        said = {"filename": file.name[-255:], "sha256": file.sha256}
        pairs = [f"{k} {base64.b64encode(v.encode()).decode()}" for k, v in said.items()]
        announce = {"Upload-Length": str(file.size), "Upload-Metadata": ",".join(pairs)}
        content = file.path.read_bytes() if file.size <= CHUNK_BYTES else None
        headers = {**(TUS if content is None else PIECE), **announce}
        told = await self._ask("POST", f"{url}/files", headers=headers, content=content)
        offset = int(told.headers["upload-offset"])
        # Of the address only the number: the token goes nowhere else.
        await self._send_pieces(f"{url}/files/{_number(told)}", file, offset)

    async def _send_pieces(self, url: str, file: Found, offset: int) -> None:
        self._sent(offset)
        tries = 0
        while offset < file.size:
            headers = {**PIECE, "Upload-Offset": str(offset)}
            content = _chunks(file.path, offset, file.size)
            try:
                told = await self._ask("PATCH", url, headers=headers, content=content, once=True)
            except (httpx.TransportError, _AskAgain):
                await asyncio.sleep(RETRY_SECONDS)
                told = await self._ask("HEAD", url)
            here = int(told.headers["upload-offset"])
            tries = tries + 1 if here <= offset else 0
            if tries > MOST_TRIES:
                raise Stopped(f"{file.path} can't be sent whole; was it changed meanwhile?")
            self._sent(here - offset)
            offset = here

    async def _watch(self, url: str) -> Any:
        """Show how much is taken in, until the import is over; how it ended."""
        last = "0"
        while True:
            try:
                headers = {"Last-Event-ID": last, **self._signed()}
                async with self._client.stream("GET", f"{url}/events", headers=headers) as answer:
                    if answer.status_code != 200:
                        await answer.aread()
                        self._judge(answer)
                    async for event in _events(answer):
                        self._answered = time.monotonic()
                        last = event.get("id", last)
                        data = json.loads(event["data"])
                        if event["event"] == "progress":
                            self._took(data["counts"])
                        if event["event"] == "done":
                            return data
            except (httpx.TransportError, _AskAgain):
                self._patience()
                await asyncio.sleep(1.0)

    def _sent(self, count: int) -> None:
        self._bars.bytes.advance(self._sending, count)

    def _took(self, counts: dict[str, int]) -> None:
        # Of archives the files are counted as they come out.
        total = max(len(self._files), sum(counts.values()))
        self._bars.files.update(self._filing, completed=_ended(counts), total=total)

    async def _listed(self, url: str) -> AsyncIterator[dict[str, Any]]:
        """The files of the import."""
        path: str | None = f"{url}{'&' if '?' in url else '?'}limit=200"
        while path:
            answer = await self._ask("GET", path)
            for each in answer.json()["files"]:
                yield each
            path = answer.links.get("next", {}).get("url")
            if path is not None and not path.startswith(f"{API}/"):
                raise Stopped("What answers there is not Lightbox.")

    async def _ask(
        self, method: str, path: str, *, once: bool = False, **more: Any
    ) -> httpx.Response:
        """A request, again and again until it is answered; with `once`, only once. Raises Stopped,
        and with `once` httpx.TransportError and _AskAgain."""
        delay = 0.5
        headers = more.pop("headers", {})
        while True:
            try:
                signed = {**headers, **self._signed()}
                answer = await self._client.request(method, path, headers=signed, **more)
                self._judge(answer)
            except (httpx.TransportError, _AskAgain):
                if once:
                    raise
                self._patience()
                await asyncio.sleep(delay)
                delay = min(delay * 2, LONGEST_DELAY)
                continue
            self._answered = time.monotonic()
            return answer

    def _signed(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._token.value}"}

    def _patience(self) -> None:
        if time.monotonic() - self._answered > PATIENCE:
            raise Stopped("Lightbox does not answer. Run the same command again to go on.")

    def _judge(self, answer: httpx.Response) -> None:
        """Raises _AskAgain for what may go well the next time, Stopped for what will not."""
        if answer.is_success:
            return
        if answer.status_code == 401:
            before = self._token.value
            if self._token.read() != before:
                raise _AskAgain
            raise Stopped("The token does not hold any more. Run it again with a new one.")
        if answer.status_code in (409, 422) and answer.request.method == "PATCH":
            raise _AskAgain
        if answer.status_code in (429, 502, 503, 504):
            raise _AskAgain
        try:
            said = answer.json()["detail"]
        except (ValueError, KeyError, TypeError):
            said = f"The answer was {answer.status_code}."
        raise Stopped(str(said))


class _AskAgain(Exception):
    """It may go well the next time."""


def _ended(counts: dict[str, int]) -> int:
    ended = ("linked", "refused", "unpacked", "cancelled")
    return sum(counts.get(each, 0) for each in ended)


def _number(told: httpx.Response) -> int:
    """Which file of the import it is. Raises Stopped."""
    number = told.headers.get("location", "").rpartition("/")[2]
    if not number.isdecimal():
        raise Stopped("What answers there is not Lightbox.")
    return int(number)


async def _chunks(path: Path, offset: int, end: int) -> AsyncIterator[bytes]:
    with path.open("rb") as file:
        file.seek(offset)
        while chunk := await asyncio.to_thread(file.read, min(CHUNK_BYTES, end - offset)):
            offset += len(chunk)
            yield chunk


async def _events(answer: httpx.Response) -> AsyncIterator[dict[str, str]]:
    """Server-sent events: their fields."""
    event: dict[str, str] = {}
    async for line in answer.aiter_lines():
        if line == "":
            if "data" in event and "event" in event:
                yield event
            event = {}
        elif not line.startswith(":"):
            name, _, value = line.partition(":")
            event[name] = value.removeprefix(" ")
