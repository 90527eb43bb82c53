"""What viewers ask for, counted: one number a study a session, not one record a frame."""

import asyncio
import logging
from datetime import datetime

import sqlalchemy as sa
from sqlmodel import col

from app.db import Database
from app.models import LaunchSession, LaunchStudy

logger = logging.getLogger(__name__)


class Usage:
    """Requests by session and study, and when each session was used, until they are written.

    Each process keeps its own and adds it to what is stored. One per app.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._counts: dict[tuple[str, str], tuple[int, datetime]] = {}
        self._used: dict[str, datetime] = {}
        self._writing = asyncio.Lock()

    def count(self, ctx: str, study_uid: str, now: datetime) -> None:
        """One request of a session to a study."""
        count, _ = self._counts.get((ctx, study_uid), (0, now))
        self._counts[ctx, study_uid] = (count + 1, now)
        self._used[ctx] = now

    def touch(self, ctx: str, now: datetime) -> None:
        """Somebody is there, though nothing is fetched."""
        self._used[ctx] = now

    def last_used(self, ctx: str, stored: datetime) -> datetime:
        """When the session was used last, as far as this process knows."""
        return max(stored, self._used.get(ctx, stored))

    async def flush(self) -> None:
        """Write what came since the last time. What can't be written now is kept for the next.

        Call it before your own transaction writes: this is another.
        """
        async with self._writing:
            counts, self._counts = self._counts, {}
            used = dict(self._used)
            if not used:
                return
            try:
                await self._write(counts, used)
            except BaseException:
                for key, (count, last) in counts.items():
                    since, later = self._counts.get(key, (0, last))
                    self._counts[key] = (since + count, later)
                raise
            # A session that was used again meanwhile stays.
            self._used = {
                ctx: last for ctx, last in self._used.items() if ctx not in used or last > used[ctx]
            }

    async def flush_if_possible(self) -> None:
        """As `flush`, before a session ends: an end doesn't wait for its counts."""
        try:
            await self.flush()
        except (sa.exc.SQLAlchemyError, OSError) as error:
            logger.error("counts are not written, will try again: %s", type(error).__name__)

    async def _write(
        self, counts: dict[tuple[str, str], tuple[int, datetime]], used: dict[str, datetime]
    ) -> None:
        async with self._database.session() as session:
            # In one order in every process: two that write the same rows then don't block each
            # other for good.
            for (ctx, uid), (count, last) in sorted(counts.items()):
                await session.exec(
                    sa.update(LaunchStudy)
                    .where(col(LaunchStudy.ctx) == ctx, col(LaunchStudy.study_instance_uid) == uid)
                    .values(
                        request_count=col(LaunchStudy.request_count) + count, last_accessed_at=last
                    )
                )
            for ctx, last in sorted(used.items()):
                await session.exec(
                    sa.update(LaunchSession)
                    .where(col(LaunchSession.ctx) == ctx, col(LaunchSession.last_used_at) < last)
                    .values(last_used_at=last)
                )
            await session.commit()
