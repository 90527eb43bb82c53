"""What Orthanc does not tell: deletions, and whatever its log of changes has lost.

A study that is gone shows in the list of all studies alone, a file that is gone in the study's
statistics alone (neither in /changes nor in LastUpdate). So both are asked for, slowly.
"""

import logging
from datetime import datetime

import sqlalchemy as sa
from sqlmodel import col, select

from app.arrivals import index
from app.arrivals.changes import NAME
from app.db import Database, utcnow
from app.errors import NotFound
from app.models import Arrival, ArrivalState, FollowerPosition
from app.orthanc import Orthanc

logger = logging.getLogger(__name__)

_CHUNK = 500
FEW = 20
"""So many may vanish at once; more, and more than a tenth of all, is no deletion by hand."""


class Sweep:
    """Compares the archive with what we know of it."""

    def __init__(self, database: Database, orthanc: Orthanc, *, seconds: float) -> None:
        self._database = database
        self._orthanc = orthanc
        self._seconds = seconds
        self.problem = ""

    async def whole_if_due(self) -> None:
        """Compare all ids, if it is time. Raises OrthancUnavailable."""
        async with self._database.session() as session:
            position = await session.get(FollowerPosition, NAME)
        if position is None or position.listing:
            return
        last = position.swept_at
        if last is None or (utcnow() - last).total_seconds() >= self._seconds:
            await self.whole()

    async def whole(self) -> None:
        """Compare all ids: those that we don't know are noted, those that have gone looked at."""
        began = utcnow()
        there = await self._orthanc.study_ids()
        async with self._database.session() as session:
            known = set(
                await session.exec(
                    select(Arrival.orthanc_id).where(Arrival.state != ArrivalState.GONE.value)
                )
            )
            recent = set(
                await session.exec(
                    select(Arrival.orthanc_id).where(col(Arrival.arrived_at) > began)
                )
            )
        gone = sorted(known - there - recent)
        if len(gone) > max(FEW, len(known) // 10):
            self._say(
                f"{len(gone)} of {len(known)} studies are missing in the image archive at once; "
                "nothing is unlinked. Is it the right archive, and whole?"
            )
            gone = []
        else:
            self._say("")
        for start in range(0, len(gone), _CHUNK):
            await self._look_at(gone[start : start + _CHUNK])
        for orthanc_id in sorted(there - known):
            held = await self._orthanc.held(orthanc_id)
            if held is None:
                continue
            async with self._database.writing_session() as session:
                await index.note(session, held, stable=held.stable, backlog=held.stable)
                await session.commit()
        async with self._database.writing_session() as session:
            await session.exec(
                sa.update(FollowerPosition)
                .where(col(FollowerPosition.name) == NAME)
                .values(swept_at=began)
                .execution_options(synchronize_session=False)
            )
            await session.commit()

    async def some(self, count: int) -> None:
        """Compare the counts of those that were not asked about for longest."""
        async with self._database.session() as session:
            rows = (
                await session.exec(
                    select(Arrival)
                    .where(Arrival.state != ArrivalState.GONE.value, col(Arrival.due_at).is_(None))
                    .order_by(col(Arrival.checked_at))
                    .limit(count)
                )
            ).all()
        changed: list[str] = []
        for row in rows:
            try:
                state = await self._orthanc.study_state(row.orthanc_id)
            except NotFound:
                state = (0, "")
            if state != (row.instance_count, row.disk_size):
                changed.append(row.orthanc_id)
        if self.problem and len(changed) > count // 2:
            changed = []
        if rows:
            await self._look_at(changed, checked=[each.orthanc_id for each in rows])

    async def _look_at(self, due: list[str], *, checked: list[str] | None = None) -> None:
        now: datetime = utcnow()
        async with self._database.writing_session() as session:
            for ids, values in ((due, {"due_at": now}), (checked or [], {"checked_at": now})):
                if ids:
                    await session.exec(
                        sa.update(Arrival)
                        .where(col(Arrival.orthanc_id).in_(ids))
                        .values(**values)
                        .execution_options(synchronize_session=False)
                    )
            await session.commit()

    def _say(self, problem: str) -> None:
        if problem and problem != self.problem:
            logger.error("%s", problem)
        self.problem = problem
