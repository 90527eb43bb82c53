"""The trail on its way to the audit repository.

The trail itself is the queue: a record stands before anything is answered, ids have no gaps and
are given in the order of commits, and `ExportPosition` says which was the last to arrive. So
nothing is lost while the receiver or this application is down, the order is kept, and a batch that
may have arrived only in part is sent again: at least once, each with its id.

One process sends at a time: on PostgreSQL the one that holds an advisory lock, for as long as its
connection lives; SQLite has one process.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlmodel import col, select

from app.atna.messages import Reporter, audit_message
from app.atna.syslog import NotDelivered, Receiver, syslog_message
from app.audit.known import look_up
from app.db import Database, insert_if_absent, utcnow
from app.models import AuditRecord, ExportPosition
from app.settings import Settings

logger = logging.getLogger(__name__)

BATCH = 100
POLL_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0
_LOCK_KEY = int.from_bytes(b"atna-log")


class Feed:
    """Sends the trail. One per app; does nothing where no receiver is configured."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._database = database
        self._receiver = Receiver.from_settings(settings)
        self._reporter = Reporter(settings.api_base_url, settings.site)
        self._stopping = asyncio.Event()
        self.sink = f"syslog {settings.syslog_host}:{settings.syslog_port}"

    async def run(self) -> None:
        """Send what comes, until `stop`; a batch that is under way is finished first."""
        if self._receiver is None:
            return
        while not self._stopping.is_set():
            try:
                async with self._alone() as lock:
                    if lock is not None:
                        await self._send_all(lock)
            except (sa.exc.SQLAlchemyError, OSError, ValueError, TypeError, LookupError) as error:
                # Whatever it is: the records wait, none is left out.
                logger.error("audit messages were not sent", exc_info=error)
            await self._pause(POLL_SECONDS)

    def stop(self) -> None:
        self._stopping.set()

    async def _pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[AsyncConnection | None]:
        """The connection that holds the lock, or None while another process does."""
        async with self._database.engine.connect() as connection:
            if connection.dialect.name != "postgresql":
                yield connection
                return
            # The lock is the session's, not a transaction's, which would stay open for hours.
            alone = await connection.execution_options(isolation_level="AUTOCOMMIT")
            key = {"key": _LOCK_KEY}
            got = await alone.scalar(sa.text("SELECT pg_try_advisory_lock(:key)"), key)
            try:
                yield alone if got else None
            finally:
                if got:
                    await alone.scalar(sa.text("SELECT pg_advisory_unlock(:key)"), key)

    async def _send_all(self, lock: AsyncConnection) -> None:
        """Batch after batch. Raises SQLAlchemyError where the lock's connection is gone."""
        pause = POLL_SECONDS
        while not self._stopping.is_set():
            await lock.scalar(sa.text("SELECT 1"))
            await lock.commit()
            try:
                sent = await self._send_batch()
            except NotDelivered as error:
                logger.warning("audit messages wait: the syslog receiver: %s", error)
                await self._pause(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
                continue
            if pause > POLL_SECONDS:
                logger.warning("the syslog receiver takes audit messages again")
                pause = POLL_SECONDS
            if sent < BATCH:
                await self._pause(POLL_SECONDS)

    async def _send_batch(self) -> int:
        """Send the next records and write down that they have arrived; how many there were."""
        assert self._receiver is not None
        async with self._database.session() as session:
            position = await session.get(ExportPosition, self.sink)
            last = position.record_id if position else 0
            records = (
                await session.exec(
                    select(AuditRecord)
                    .where(col(AuditRecord.id) > last)
                    .order_by(col(AuditRecord.id))
                    .limit(BATCH)
                )
            ).all()
            if not records:
                return 0
            known = await look_up(session, records, count_instances=True)
        if position is None:
            await self._arrived(0)  # on record before anything is sent: a purge waits for it
        messages = [
            syslog_message(
                each.id or 0,
                each.at,
                self._reporter.host,
                audit_message(each, known, self._reporter),
            )
            for each in records
        ]
        await asyncio.to_thread(self._receiver.deliver, messages)
        await self._arrived(records[-1].id or 0)
        return len(records)

    async def _arrived(self, record_id: int) -> None:
        """Never backwards: another process may have taken over meanwhile."""
        async with self._database.writing_session() as session:
            await session.exec(
                insert_if_absent(session, ExportPosition, sink=self.sink, record_id=0, at=utcnow())
            )
            await session.exec(
                sa.update(ExportPosition)
                .where(
                    col(ExportPosition.sink) == self.sink,
                    col(ExportPosition.record_id) < record_id,
                )
                .values(record_id=record_id, at=utcnow())
            )
            await session.commit()
