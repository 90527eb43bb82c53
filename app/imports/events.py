"""Progress as server-sent events (WHATWG HTML, 9.2): each file at its newest state, in order.

An event's id is the number of the change. Whoever comes back with `Last-Event-ID` is told of what
has changed since, by whichever process, and of nothing twice.
"""

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlmodel import col, select

from app.db import Database
from app.errors import TooManyRequests
from app.imports.rows import counts
from app.models import Import, ImportFile, ImportState

POLL_SECONDS = 0.25
PING_SECONDS = 15.0  # so that nothing on the way takes the connection for dead
STREAM_SECONDS = 300.0  # then the client comes back, and shows its token again
BATCH = 500

MOST_OF_ONE = 8  # streams of one person at once, in each process
MOST_OF_ALL = 100

_END = 2**31 - 1
_ORDER = (col(ImportFile.seq), col(ImportFile.number), col(ImportFile.entry))


class Streams:
    """How many are open now: each asks the database again and again. One per app."""

    def __init__(self) -> None:
        self._open: Counter[str] = Counter()

    @contextmanager
    def one(self, sub: str) -> Iterator[None]:
        """One more stream of this person. Raises TooManyRequests."""
        if self._open[sub] >= MOST_OF_ONE or self._open.total() >= MOST_OF_ALL:
            raise TooManyRequests(
                "Too many imports are being watched. Close one, or try again soon.", 10
            )
        self._open[sub] += 1
        try:
            yield
        finally:
            self._open[sub] -= 1
            self._open += Counter()  # forgets those who have none


async def watch(database: Database, import_id: UUID, last: int) -> AsyncIterator[str]:
    """What has changed after the change `last`, as it changes, until the import is over.

    `file`: a file's new state. `progress`: how many files are in each state. `done`: the import is
    over, and the stream with it; without it, it is to be asked for again.
    """
    yield "retry: 1000\n\n"
    until, spoken = time.monotonic() + STREAM_SECONDS, time.monotonic()
    at = (last, _END, _END)  # of the file that was told of last
    while True:
        async with database.session() as session:
            # First how far, then what: all up to there is committed (see Import.seq).
            found = await session.get(Import, import_id)
            if found is None:
                return
            query = select(ImportFile).where(
                ImportFile.import_id == import_id, sa.tuple_(*_ORDER) > at
            )
            query = query.where(col(ImportFile.seq) <= found.seq).order_by(*_ORDER).limit(BATCH)
            files = (await session.exec(query)).all()
            in_each = (await counts(session, [import_id])).get(import_id, {})
        whole = len(files) < BATCH
        following = [each.seq for each in files[1:]] + [found.seq + 1 if whole else files[-1].seq]
        for each, next_seq in zip(files, following, strict=False):
            at = (each.seq, each.number, each.entry)
            # Files that changed together have one number, and the last of them says it.
            yield _event("file", each.seq if next_seq > each.seq else None, shown(each))
        if whole and found.seq > last:
            last = found.seq
            progress = {"counts": in_each, "file_count": found.file_count}
            yield _event("progress", last, progress)
            spoken = time.monotonic()
        if not whole:
            continue
        if found.state != ImportState.OPEN and not _unfinished(in_each):
            yield _event(
                "done",
                max(last, found.seq),
                {"state": found.state, "reason": found.reason, "counts": in_each},
            )
            return
        if time.monotonic() > until:
            return
        if time.monotonic() - spoken > PING_SECONDS:
            spoken = time.monotonic()
            yield ": still here\n\n"
        await asyncio.sleep(POLL_SECONDS)


def shown(file: ImportFile) -> dict[str, Any]:
    """A file as its import's owner sees it."""
    return {
        "number": file.number,
        "entry": file.entry,
        "filename": file.name,
        "size": file.size,
        "sha256": file.sha256,
        "state": file.state,
        "duplicate": file.duplicate,
        "study_instance_uid": file.study_instance_uid,
        "sop_instance_uid": file.sop_instance_uid,
        "warnings": json.loads(file.warnings),
        "error": file.error or None,
        "error_status": file.error_status or None,
        "error_type": file.error_type or None,
        "changed_at": file.changed_at.isoformat(),
    }


def _unfinished(in_each: Mapping[str, int]) -> bool:
    """What was about to be stored when the import ended is still finished."""
    return bool(in_each.get("validated") or in_each.get("stored"))


def _event(kind: str, number: int | None, data: Mapping[str, Any]) -> str:
    named = "" if number is None else f"id: {number}\n"
    return f"{named}event: {kind}\ndata: {json.dumps(data)}\n\n"
