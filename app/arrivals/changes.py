"""Orthanc's log of changes, followed from a durable position.

The position moves in the transaction of what was noted at it, and only from where it was read: so
nothing is missed or noted twice, whoever dies in the middle.
"""

import asyncio
import logging
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.arrivals import index
from app.audit import Action, AuditTrail, Entry, Origin, Outcome
from app.db import Database, insert_if_absent, utcnow
from app.models import Arrival, FollowerPosition, Instance
from app.orthanc import Change, Held, Orthanc

logger = logging.getLogger(__name__)

NAME = "orthanc"
PAGE = 500
LIST_PAGE = 200
_AT_ONCE = 4
_CLOCKS_APART = timedelta(seconds=5)
ORIGIN = Origin(request_id="follower")


class NotOursError(Exception):
    """The position was moved by another process."""


class Changes:
    """Where we are in Orthanc's log, and what to do with what it says."""

    def __init__(self, database: Database, orthanc: Orthanc) -> None:
        self._database = database
        self._orthanc = orthanc
        self._reached_end_at: datetime | None = None
        self._checked = False

    def distrust(self) -> None:
        """Orthanc was away: ask whether it still has the database that we know."""
        self._checked = False

    async def follow(self) -> bool:
        """One step; is there more to do? Raises OrthancUnavailable, NotOursError."""
        position = await self._position()
        if not self._checked:
            if not await self._is_the_same(position):
                await self._start_over(position, "holds another database than before")
                return True
            self._checked = True
        if position.listing:
            return await self._list(position)
        asked_at = utcnow()
        changes, last = await self._orthanc.changes(position.position, PAGE)
        if not changes:
            if last < position.position:
                await self._start_over(position, "counts its changes from the start again")
                return True
            self._reached_end_at = asked_at
            return False
        await self._note(position, changes, asked_at)
        if len(changes) < PAGE:
            self._reached_end_at = asked_at
        return len(changes) >= PAGE

    async def _position(self) -> FollowerPosition:
        async with self._database.session() as session:
            found = await session.get(FollowerPosition, NAME)
        if found is not None:
            return found
        # From before the studies are listed: what comes in meanwhile is seen twice, not missed.
        now = utcnow()
        changes, last = await self._last()
        mark = changes[-1].mark if changes else ""
        async with self._database.writing_session() as session:
            await session.exec(
                insert_if_absent(
                    session,
                    FollowerPosition,
                    name=NAME,
                    position=last,
                    mark=mark,
                    followed_at=now,
                )
            )
            await session.commit()
            return (
                await session.exec(select(FollowerPosition).where(FollowerPosition.name == NAME))
            ).one()

    async def _last(self) -> tuple[list[Change], int]:
        """The last change of all, and its number."""
        _, last = await self._orthanc.changes(2**31 - 1, 1)
        changes, _ = await self._orthanc.changes(max(last - 1, 0), 1)
        return changes, last

    async def _is_the_same(self, position: FollowerPosition) -> bool:
        """Is the change that we were at still there? One whose study was deleted tells nothing."""
        if position.position == 0 or not position.mark:
            return True
        changes, _ = await self._orthanc.changes(position.position - 1, 1)
        there = [each for each in changes if each.seq == position.position]
        return not there or there[0].mark == position.mark

    async def _start_over(self, position: FollowerPosition, why: str) -> None:
        logger.error("the image archive %s: all its studies are listed anew", why)
        now = utcnow()
        changes, last = await self._last()
        async with self._database.writing_session() as session:
            await self._move(
                session,
                position,
                followed_at=now,
                position=last,
                mark=changes[-1].mark if changes else "",
                listing=True,
                listed=0,
                to_list=0,
            )
            await AuditTrail.add(session, _record("archive-replaced", {"why": why}))
            await session.commit()
        self._checked = True

    async def _list(self, position: FollowerPosition) -> bool:
        """Note a page of the studies that were there before."""
        held = await self._orthanc.all_held(position.listed, LIST_PAGE)
        total = position.to_list
        if position.listed == 0:
            total = (await self._orthanc.statistics()).studies
            logger.info("the image archive holds %d studies, which are listed now", total)
        listed = position.listed + len(held)
        async with self._database.writing_session() as session:
            await self._move(
                session, position, listed=listed, to_list=max(total, listed), listing=bool(held)
            )
            await index.note_all(session, held)
            await session.commit()
        if listed // 5000 > position.listed // 5000 or not held:
            logger.info("%d of %d studies of the image archive are listed", listed, total)
        return True

    async def _note(
        self, position: FollowerPosition, changes: Sequence[Change], asked_at: datetime
    ) -> None:
        stable: dict[str, bool] = {}
        new = {each.orthanc_id for each in changes if each.kind == "NewStudy"}
        for each in changes:
            if each.kind in ("NewStudy", "StableStudy"):
                stable[each.orthanc_id] = each.kind == "StableStudy"
        places = asyncio.Semaphore(_AT_ONCE)

        async def ask(orthanc_id: str) -> Held | None:
            async with places:
                return await self._orthanc.held(orthanc_id)

        found = await asyncio.gather(*(ask(each) for each in stable))
        stored = [each.orthanc_id for each in changes if each.kind == "NewInstance"]
        async with self._database.writing_session() as session:
            await self._move(
                session,
                position,
                position=changes[-1].seq,
                mark=changes[-1].mark,
                # All that is later than this in the log was done later than this.
                followed_at=asked_at if len(changes) < PAGE else position.followed_at,
            )
            await self._forget_replaced(session, position, stored)
            for held in found:
                if held is not None:
                    await index.note(
                        session,
                        held,
                        stable=stable[held.orthanc_id],
                        new=held.orthanc_id in new,
                    )
            await session.commit()

    async def _forget_replaced(
        self, session: AsyncSession, position: FollowerPosition, stored: Sequence[str]
    ) -> None:
        """An instance that we had looked at, and that was stored since, was deleted in between:
        what is under its UIDs now was not looked at."""
        before = (self._reached_end_at or position.followed_at) - _CLOCKS_APART
        known = select(Instance).where(
            col(Instance.orthanc_id).in_(stored), col(Instance.received_at) < before
        )
        replaced = (await session.exec(known)).all()
        for uid in sorted({each.study_instance_uid for each in replaced}):
            these = sorted(x.sop_instance_uid for x in replaced if x.study_instance_uid == uid)
            await session.exec(sa.delete(Instance).where(col(Instance.sop_instance_uid).in_(these)))
            detail = {"sop_instance_uids": these}
            await AuditTrail.add(session, _record("stored-anew", detail, study_instance_uid=uid))
            await session.exec(
                sa.update(Arrival)
                .where(col(Arrival.study_instance_uid) == uid)
                .values(due_at=utcnow())
                .execution_options(synchronize_session=False)
            )

    async def _move(self, session: AsyncSession, from_: FollowerPosition, **values: Any) -> None:
        """First in each transaction: it also keeps a second follower out."""
        moved = await session.exec(
            sa.update(FollowerPosition)
            .where(
                col(FollowerPosition.name) == NAME,
                col(FollowerPosition.position) == from_.position,
                col(FollowerPosition.listing) == from_.listing,
                col(FollowerPosition.listed) == from_.listed,
            )
            .values(**values)
            .execution_options(synchronize_session=False)
        )
        if moved.rowcount != 1:
            raise NotOursError


def _record(reason: str, detail: dict[str, Any], **more: Any) -> Entry:
    return Entry(
        action=Action.ARCHIVE_CHANGE,
        outcome=Outcome.DONE,
        origin=ORIGIN,
        actor="lightbox",
        reason=reason,
        detail=detail,
        **more,
    )
