"""Writes records in a transaction of their own, or as the last of the business's."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from secrets import token_hex

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import SessionTransaction
from sqlmodel import Session
from sqlmodel.ext.asyncio.session import AsyncSession

from app.audit import operations
from app.audit.chain import DIALECTS, GENESIS, Head, follow
from app.audit.entries import UNDERTAKEN, Action, Entry, Operation
from app.audit.operations import Note
from app.audit.writer import Writer, unavailable
from app.db import Database
from app.errors import AuditUnavailable

_PENDING = "audit entries"


class AuditTrail:
    """Writes records in a transaction of their own, or inside the business's. One per app.

    `database` has a pool of its own: a request that holds a business connection never waits,
    for its record, on another request that does the same.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._writer = Writer(database)
        self.process = token_hex(16)
        self.unsettled: set[Operation] = set()
        """What this process began and could not close: `app.recovery` finds out about it."""

    def operation(self, action: Action) -> Operation | None:
        """A new operation of this process; None for what has no outcome."""
        return Operation(token_hex(16), self.process) if action in UNDERTAKEN else None

    async def record(self, *entries: Entry) -> None:
        """Commit records now. Raises AuditUnavailable: then nothing may be shown."""
        if entries:
            await self._writer.write(entries)

    async def note(self, note: Note) -> None:
        """Commit what an operation is about to do. Raises AuditUnavailable: then it may not do it,
        for one because it was given up meanwhile."""
        await self._writer.write([note])

    async def record_if_first(self, claim: sa.Update, entry: Entry) -> None:
        """Commit a record if, and together with, `claim` changing a row: of many requests at
        once exactly one writes it, and all return after it stands. Raises AuditUnavailable."""
        async with self._transaction() as session:
            claimed = await session.exec(claim)
            if claimed.rowcount == 1:
                await self.add(session, entry)

    @asynccontextmanager
    async def _transaction(self) -> AsyncIterator[AsyncSession]:
        try:
            async with self._database.writing_session() as session:
                yield session
                await session.commit()
        except (sa.exc.SQLAlchemyError, OSError) as error:
            raise unavailable(error) from error

    async def close(self) -> None:
        """End the writer, once what is queued is written."""
        await self._writer.close()

    @staticmethod
    async def add(session: AsyncSession, *entries: Entry) -> None:
        """Add records to the caller's transaction: they stand exactly if the change stands.

        They are written as the last thing before its commit, which then raises AuditUnavailable
        where the trail is to blame. What the change itself raises comes through as it is.
        """
        await session.flush()
        if session.in_nested_transaction():
            raise RuntimeError("a record belongs to the transaction, not to a part of it")
        if not session.in_transaction():
            session.sync_session.begin()
        session.sync_session.info.setdefault(_PENDING, []).extend(entries)


@event.listens_for(Session, "before_commit")
def _write_pending(session: Session) -> None:
    """Whoever commits: the chain is taken last, so that nobody who holds it waits for a row."""
    if session.in_nested_transaction():
        return
    entries: list[Entry] = session.info.pop(_PENDING, [])
    _close(session, operations.to_close(session.info, entries))
    if not entries:
        return
    session.flush()
    connection = session.connection()
    dialect = DIALECTS[connection.dialect.name]
    try:
        if not _has_the_lock(connection):
            connection.exec_driver_sql(dialect.lock)
        row = connection.exec_driver_sql(dialect.head).first()
        linked = follow(GENESIS if row is None else Head(*row), entries)
        connection.exec_driver_sql(dialect.insert, dialect.values(linked))
    except (sa.exc.SQLAlchemyError, OSError, ValueError) as error:
        raise unavailable(error) from error


def _close(session: Session, closed: set[Operation]) -> None:
    """Take operations out of the journal with the change that was their end. Raises
    AuditUnavailable where one was given up for dead meanwhile: then the change can't stand."""
    if not closed:
        return
    session.flush()
    connection = session.connection()
    for statement, values in operations.closing(connection.dialect.name, closed):
        for each in values:
            if connection.exec_driver_sql(statement, each).rowcount != 1:
                raise AuditUnavailable(
                    "This took so long that it was given up meanwhile, and nothing of it was "
                    "done. Send it again."
                )


@event.listens_for(Session, "after_commit")
def _forget_closed(session: Session) -> None:
    operations.committed(session.info)


def _has_the_lock(connection: sa.Connection) -> bool:
    """On SQLite a transaction that has changed something is the only one that does."""
    driver = connection.connection.driver_connection
    return connection.dialect.name == "sqlite" and bool(driver and driver.in_transaction)


@event.listens_for(Session, "after_transaction_end")
def _forget_pending(session: Session, transaction: SessionTransaction) -> None:
    if transaction.parent is None:
        session.info.pop(_PENDING, None)
