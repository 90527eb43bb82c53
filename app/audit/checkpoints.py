"""Checkpoints: where the chain is, signed and sent out of the database's reach.

Who owns the database can compute a whole chain anew, or cut off its end; neither can change what
was signed and is kept elsewhere. Every app process looks at the chain once a second, and writes a
checkpoint after so many records or so many seconds, where there is anything new.
"""

import asyncio
import fcntl
import logging
import os
import time
from abc import ABC, abstractmethod
from collections import deque
from contextlib import suppress
from pathlib import Path

import anyio.to_thread
import httpx
import sqlalchemy as sa

from app.audit.chain import GENESIS, Head
from app.audit.signing import BadStatement, Signer, read_line
from app.db import AUDIT_TABLE, Database
from app.settings import TrailSettings

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
SEND_SECONDS = 5.0
ENDING_SECONDS = 10.0
MOST_KEPT = 1000
_TAIL_BYTES = 4096

_HEAD = sa.text(f"SELECT id, sha256 FROM {AUDIT_TABLE} ORDER BY id DESC LIMIT 1")  # noqa: S608
_HASH = sa.text(f"SELECT sha256 FROM {AUDIT_TABLE} WHERE id = :id")  # noqa: S608


class Sink(ABC):
    """Where lines go."""

    def last(self) -> Head:
        """What the last line kept there says; GENESIS where that can't be known. Blocking."""
        return GENESIS

    @abstractmethod
    async def send(self, line: str) -> None:
        """Keep a line. Raises OSError or httpx.HTTPError, and may be asked again."""


class FileSink(Sink):
    """A file that lines are added to; several processes may share it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def send(self, line: str) -> None:
        await anyio.to_thread.run_sync(self.append, line)

    def append(self, line: str) -> None:
        """Add a line, whole and on the disk, or nothing. Blocking; raises OSError."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            end = _end_of_lines(descriptor)
            content = f"{line}\n".encode()
            try:
                if os.pwrite(descriptor, content, end) != len(content):
                    raise OSError("the disk took a part of the line only")
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, end)
                raise
        finally:
            os.close(descriptor)

    def last(self) -> Head:
        try:
            with self._path.open("rb") as file:
                file.seek(-min(_TAIL_BYTES, file.seek(0, os.SEEK_END)), os.SEEK_END)
                lines = file.read().decode("utf-8", "replace").splitlines()
            statement = read_line(lines[-1])
        except (OSError, IndexError, BadStatement):
            return GENESIS
        return Head(statement.count, statement.head)


class HttpSink(Sink):
    """A service that takes each line as the body of a POST and answers 2xx once it keeps it."""

    def __init__(self, url: str) -> None:
        self._url = url

    async def send(self, line: str) -> None:
        async with httpx.AsyncClient(timeout=SEND_SECONDS) as client:
            answer = await client.post(
                self._url, content=line, headers={"Content-Type": "application/json"}
            )
        if not answer.is_success:
            raise httpx.HTTPError(f"the sink answered {answer.status_code}")


def sink_of(settings: TrailSettings) -> Sink | None:
    """Where the settings want checkpoints; None: nowhere."""
    if settings.audit_checkpoint_file is not None:
        return FileSink(settings.audit_checkpoint_file)
    if settings.audit_checkpoint_url is not None:
        return HttpSink(settings.audit_checkpoint_url)
    return None


class Checkpoints:
    """Writes them while the app runs. One per app process.

    Raises ValueError with a sentence where the configured key can't be read.
    """

    def __init__(self, settings: TrailSettings, database: Database) -> None:
        self._database = database
        self._sink = sink_of(settings)
        key_file = settings.audit_key_file
        self._signer = None if key_file is None else Signer.from_file(key_file)
        self._records = settings.audit_checkpoint_records
        self._seconds = settings.audit_checkpoint_seconds
        self._last = GENESIS
        self._due = time.monotonic()
        self._unsent: deque[str] = deque()
        self._again = time.monotonic()
        self._failures = 0
        self._alarmed = GENESIS

    async def run(self) -> None:
        """Until cancelled; then once more, for what is new."""
        if self._sink is None or self._signer is None:
            logger.warning(
                "the audit trail has no checkpoints: whoever owns the database could compute it "
                "anew unseen. Set LIGHTBOX_AUDIT_KEY_FILE and LIGHTBOX_AUDIT_CHECKPOINT_FILE or "
                "LIGHTBOX_AUDIT_CHECKPOINT_URL."
            )
            return
        self._last = await anyio.to_thread.run_sync(self._sink.last)
        try:
            while True:
                await self._look(self._sink, self._signer, ending=False)
                await asyncio.sleep(LOOK_SECONDS)
        finally:
            with suppress(TimeoutError):
                async with asyncio.timeout(ENDING_SECONDS):
                    await self._look(self._sink, self._signer, ending=True)

    async def _look(self, sink: Sink, signer: Signer, *, ending: bool) -> None:
        try:
            head = await self._head()
            grown = head.id - self._last.id
            late = time.monotonic() >= self._due
            if head != self._last and (ending or late or grown >= self._records):
                self._keep(signer.checkpoint(head))
                self._last = head
                self._due = time.monotonic() + self._seconds
        except (sa.exc.SQLAlchemyError, OSError) as error:
            # The record of each request fails too, and says so.
            logger.warning("no checkpoint of the audit trail: %s", type(error).__name__)
        await self._send(sink, ending=ending)

    async def _head(self) -> Head:
        """Where the chain is. What was signed must still be there: else the log cries out."""
        async with self._database.engine.connect() as connection:
            row = (await connection.execute(_HEAD)).first()
            head = GENESIS if row is None else Head(*row)
            if head != self._last and self._last != GENESIS:
                before = await connection.scalar(_HASH, {"id": self._last.id})
                purged = before is None and head.id > self._last.id
                if before != self._last.sha256 and not purged and self._alarmed != self._last:
                    self._alarmed = self._last
                    logger.critical(
                        "the audit trail is not the one that was signed at record %d: it was "
                        "changed, or an older one restored. Run `python -m app audit verify`.",
                        self._last.id,
                    )
        return head

    def _keep(self, line: str) -> None:
        if len(self._unsent) >= MOST_KEPT:
            # The latest vouch for the earlier ones.
            self._unsent.popleft()
            logger.error("a checkpoint of the audit trail is given up: too many wait to be sent")
        self._unsent.append(line)

    async def _send(self, sink: Sink, *, ending: bool) -> None:
        if time.monotonic() < self._again and not ending:
            return
        try:
            while self._unsent:
                await sink.send(self._unsent[0])
                self._unsent.popleft()
                self._failures = 0
        except (OSError, httpx.HTTPError) as error:
            self._failures += 1
            self._again = time.monotonic() + min(60.0, 2.0**self._failures)
            logger.error(
                "%d checkpoints of the audit trail wait to be sent: %s",
                len(self._unsent),
                type(error).__name__,
            )


def _end_of_lines(descriptor: int) -> int:
    """Where the next line goes: after the last line feed. A power cut may leave half a line."""
    size = os.fstat(descriptor).st_size
    tail = os.pread(descriptor, _TAIL_BYTES, max(0, size - _TAIL_BYTES))
    if not tail or tail.endswith(b"\n"):
        return size
    end = size - len(tail) + tail.rfind(b"\n") + 1
    logger.warning("half a line was at the end of the checkpoints; it is written over")
    os.ftruncate(descriptor, end)
    return end
