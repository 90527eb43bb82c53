"""The one who writes: what many requests ask at once goes into one transaction, records and notes
of what operations are about to do.

A process has one writer, a thread with a connection of its own. Whoever wants a record waits for
the commit that holds it; while that is under way the next batch gathers (group commit).
"""

import asyncio
import logging
import sqlite3
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
from sqlalchemy.engine import URL

from app.audit import operations
from app.audit.chain import DIALECTS, GENESIS, LOCK_SECONDS, Dialect, Head, Row, follow
from app.audit.entries import Entry
from app.audit.operations import Change, GivenUpError, Note
from app.db import SQLITE_PRAGMAS, Database
from app.errors import AuditUnavailable

logger = logging.getLogger(__name__)

WAIT_SECONDS = 20.0
"""Longer than any database keeps the writer waiting."""
MOST_IN_A_BATCH = 500
MOST_WAITING = 20_000

Group = Sequence[Entry | Note]
Noting = tuple[str, tuple[Any, ...]]


def unavailable(error: BaseException) -> AuditUnavailable:
    """What the caller hears where the trail is to blame; the log hears why."""
    logger.error("audit record not written", exc_info=error)
    return _refusal()


def _refusal() -> AuditUnavailable:
    return AuditUnavailable(
        "The audit trail can't be written, so nothing is done and nothing shown. Try again soon."
    )


def _refuse_given_up(changed: Iterable[int]) -> None:
    if any(count != 1 for count in changed):
        raise GivenUpError("an operation was given up meanwhile")


def _given_up() -> AuditUnavailable:
    return AuditUnavailable(
        "This took so long that it was given up meanwhile. Nothing was done; send it again."
    )


class Store(ABC):
    """A connection that appends to the chain. Blocking; for one thread."""

    dialect_name = "sqlite"

    @property
    def dialect(self) -> Dialect:
        return DIALECTS[self.dialect_name]

    def append(self, group: Group) -> None:
        """Append and commit all of them or none. Raises what the driver raises, and GivenUpError
        for a note to an operation that is no longer its process's."""
        entries = [each for each in group if isinstance(each, Entry)]
        notes = [each for each in group if isinstance(each, Note)]
        try:
            head = self._lock([operations.noting(self.dialect_name, each) for each in notes])
            linked = follow(head, entries)
            self._insert_and_commit(
                self.dialect.values(linked), operations.changes(self.dialect_name, entries)
            )
        except BaseException:
            self._rollback()
            raise

    @abstractmethod
    def is_broken(self) -> bool:
        """Has the connection ended?"""

    @abstractmethod
    def close(self) -> None:
        """End the connection; the next `append` makes another."""

    @abstractmethod
    def _lock(self, notes: list[Noting]) -> Head:
        """Begin, write the notes, take the chain and say where it ends. Raises GivenUpError."""

    @abstractmethod
    def _insert_and_commit(self, values: list[Row], journal: list[Change]) -> None: ...

    @abstractmethod
    def _rollback(self) -> None: ...


class PostgresStore(Store):
    """Two round trips a batch: the lock and the head; the records and the commit."""

    dialect_name = "postgresql"

    def __init__(self, url: URL) -> None:
        plain = url.set(drivername="postgresql")
        self._conninfo = plain.render_as_string(hide_password=False)
        self._connection: psycopg.Connection[Any] | None = None

    def is_broken(self) -> bool:
        return self._connection is None or self._connection.closed

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def _connected(self) -> psycopg.Connection[Any]:
        if self._connection is None or self._connection.closed:
            self._connection = psycopg.connect(
                self._conninfo,
                connect_timeout=5,
                prepare_threshold=1,
                keepalives_idle=5,
                keepalives_interval=2,
                keepalives_count=3,
                tcp_user_timeout=LOCK_SECONDS * 1000,
            )
        return self._connection

    def _lock(self, notes: list[Noting]) -> Head:
        fresh = self.is_broken()
        try:
            return self._begin(notes)
        except psycopg.OperationalError:
            # A connection that the server has closed meanwhile is met here, before anything
            # was written: once more, by a new one.
            if fresh or not self.is_broken():
                raise
            return self._begin(notes)

    def _begin(self, notes: list[Noting]) -> Head:
        connection = self._connected()
        with connection.pipeline():
            noted = [connection.execute(statement, values) for statement, values in notes]
            # Not in one statement with the lock: that would see the head as it was before it.
            connection.execute(self.dialect.lock)
            row = connection.execute(self.dialect.head).fetchone()
        _refuse_given_up(each.rowcount for each in noted)
        return GENESIS if row is None else Head(*row)

    def _insert_and_commit(self, values: list[Row], journal: list[Change]) -> None:
        connection = self._connected()
        with connection.pipeline():
            connection.cursor().executemany(self.dialect.insert, values)
            for statement, each in journal:
                connection.cursor().executemany(statement, each)
            connection.commit()

    def _rollback(self) -> None:
        if self._connection is None:
            return
        try:
            self._connection.rollback()
        except psycopg.Error:
            self.close()


class SqliteStore(Store):
    """The write lock of the file is the chain's."""

    def __init__(self, url: URL) -> None:
        self._path = url.database or ""
        self._connection: sqlite3.Connection | None = None

    def is_broken(self) -> bool:
        return self._connection is None

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def _connected(self) -> sqlite3.Connection:
        if self._connection is None:
            connection = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
            for pragma in SQLITE_PRAGMAS:
                connection.execute(f"PRAGMA {pragma}")
            self._connection = connection
        return self._connection

    def _lock(self, notes: list[Noting]) -> Head:
        connection = self._connected()
        connection.execute(self.dialect.lock)
        noted = [connection.execute(statement, values) for statement, values in notes]
        _refuse_given_up(each.rowcount for each in noted)
        row = connection.execute(self.dialect.head).fetchone()
        return GENESIS if row is None else Head(*row)

    def _insert_and_commit(self, values: list[Row], journal: list[Change]) -> None:
        connection = self._connected()
        connection.executemany(self.dialect.insert, values)
        for statement, each in journal:
            connection.executemany(statement, each)
        connection.execute("COMMIT")

    def _rollback(self) -> None:
        if self._connection is None:
            return
        try:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
        except sqlite3.Error:
            self.close()


def store_of(url: URL) -> Store:
    """The store of a SQLAlchemy URL."""
    return PostgresStore(url) if url.get_backend_name() == "postgresql" else SqliteStore(url)


class Writer:
    """Queues groups of entries and writes them. One per app process."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._store = store_of(database.engine.url)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="trail")
        self._waiting: deque[tuple[Group, asyncio.Future[None]]] = deque()
        self._writing: asyncio.Task[None] | None = None
        self._closed = False

    async def write(self, group: Group) -> None:
        """Return once all of the group stands; none of it does if this raises AuditUnavailable,
        unless the commit itself was not answered. Cancelled, it may be written all the same."""
        if self._closed:
            raise unavailable(RuntimeError("the app is ending"))
        if len(self._waiting) >= MOST_WAITING:
            raise unavailable(OverflowError(f"{MOST_WAITING} records are waiting"))
        written = asyncio.get_running_loop().create_future()
        self._waiting.append((group, written))
        if self._writing is None:
            self._writing = asyncio.create_task(self._write_all())
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                await written
        except TimeoutError as error:
            raise unavailable(error) from error

    async def close(self) -> None:
        """Write what is queued, and end. For the end of the app; once more is no harm."""
        while self._writing is not None:
            await asyncio.wait([self._writing])
        if not self._closed:
            self._closed = True
            await asyncio.get_running_loop().run_in_executor(self._thread, self._store.close)
            self._thread.shutdown(wait=False)

    async def _write_all(self) -> None:
        batch: list[tuple[Group, asyncio.Future[None]]] = []
        loop = asyncio.get_running_loop()
        try:
            while self._waiting:
                async with self._database.writing():
                    batch = self._next()
                    groups = [group for group, _ in batch]
                    errors = await loop.run_in_executor(self._thread, self._append, groups)
                for (_, written), error in zip(batch, errors, strict=True):
                    _settle(written, error)
                batch = []
        finally:
            # Only where this task itself was ended: nobody waits for what won't come.
            for _, written in (*batch, *self._waiting):
                _settle(written, ConnectionAbortedError("the writer of the trail was ended"))
            self._waiting.clear()
            self._writing = None

    def _next(self) -> list[tuple[Group, asyncio.Future[None]]]:
        batch: list[tuple[Group, asyncio.Future[None]]] = []
        count = 0
        while self._waiting and count < MOST_IN_A_BATCH:
            batch.append(self._waiting.popleft())
            count += len(batch[-1][0])
        return batch

    def _append(self, groups: list[Group]) -> list[Exception | None]:
        """What became of each group. In the writer's thread."""
        try:
            self._store.append([each for group in groups for each in group])
            return [None] * len(groups)
        except Exception as error:
            if len(groups) == 1 or self._store.is_broken() or _is_of_all(error):
                logger.error("%d groups of audit records failed", len(groups), exc_info=error)
                return [error] * len(groups)
        # One that the database doesn't take (a character, a length) must not fail the others.
        errors: list[Exception | None] = []
        for group in groups:
            errors += self._append([group])
        return errors


def _is_of_all(error: Exception) -> bool:
    """Would it meet every record alike: no room, no lock, no connection?"""
    return isinstance(error, psycopg.OperationalError | sqlite3.OperationalError | OSError)


def _settle(written: asyncio.Future[None], error: Exception | None) -> None:
    if written.done():
        return
    if error is None:
        written.set_result(None)
    else:
        refusal = _given_up() if isinstance(error, GivenUpError) else _refusal()
        refusal.__cause__ = error
        written.set_exception(refusal)
