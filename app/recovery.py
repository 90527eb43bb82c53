"""What became of what was cut off: it is finished, or taken back, and on record.

A process that dies leaves its open operations in the journal. The next start, or another process
within seconds, takes each of them over (exactly one does), looks at what there is of it in Orthanc
and in the tables, and writes its outcome. What was a change of the database alone was rolled back.

upload    an instance that was not there before, and that nobody linked, is taken back
deletion  where it had begun in Orthanc it is finished; where it had not, the study stays

Nobody was told anything of either. All of it may be done again, and stopped anywhere.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import timedelta

import sqlalchemy as sa
from sqlmodel import col, select

from app import journal
from app.access import Denial, Gate, Subject
from app.audit import AuditTrail, Entry, Operation, OperationState, Outcome
from app.audit.operations import entry_of_text
from app.db import utcnow
from app.deletion import delete_study
from app.errors import Unavailable
from app.identity import Principal, Role
from app.journal import Alive, Kind
from app.models import Instance, OpenOperation, Study
from app.orthanc import Orthanc
from app.settings import Settings
from app.viewer import Viewer

logger = logging.getLogger(__name__)

CUT_OFF = "cut-off"
LOOK_SECONDS = 1.0
MOST_AT_ONCE = 500


class Recovery:
    """One per app. `begin` before anything is granted, then `run` for as long as it lives."""

    def __init__(
        self,
        settings: Settings,
        gate: Gate,
        orthanc: Orthanc,
        viewer: Viewer,
        fulfilled: Callable[[], Awaitable[None]],
    ) -> None:
        self._gate = gate
        self._database = gate.database
        self._trail = gate.trail
        self._orthanc = orthanc
        self._viewer = viewer
        self._fulfilled = fulfilled
        self._process = gate.trail.process
        self._alive = Alive(settings.database_url, self._process)
        # What Orthanc was asked for just before may still come about.
        self._settle = timedelta(seconds=settings.orthanc_timeout_seconds)
        self._username = settings.orthanc_username
        self._principal = Principal(
            "lightbox", "Lightbox", frozenset({Role.SERVICE}), settings.site
        )
        self._looking = asyncio.Lock()
        self._said = ""

    async def begin(self) -> None:
        """Say that this process lives, and find out about those that don't."""
        await self._try_step()

    async def run(self) -> None:
        """Until cancelled. Nothing that goes wrong ends it."""
        try:
            while True:
                await asyncio.sleep(LOOK_SECONDS)
                await self._try_step()
        finally:
            await asyncio.shield(self._alive.end())

    async def _try_step(self) -> None:
        try:
            await self.step()
            self._said = ""
        except Exception as error:
            # Said once: it is tried again every second.
            if type(error).__name__ != self._said:
                logger.error("what was cut off can't be looked at yet", exc_info=error)
            self._said = type(error).__name__

    async def step(self) -> None:
        """Look once. Raises what the database raises."""
        async with self._looking:
            await self._step()

    async def _step(self) -> None:
        await self._leave_unsettled()
        async with self._database.session() as session:
            other = col(OpenOperation.process) != self._process
            names = select(OpenOperation.process).where(other).distinct()
            dead = await self._alive.dead(list(await session.exec(names)))
        if dead:
            await self._take_over(dead)
        for row in await self._mine():
            await self._settle_one(row)

    async def _leave_unsettled(self) -> None:
        for each in list(self._trail.unsettled):
            async with self._database.writing_session() as session:
                await session.exec(
                    sa.update(OpenOperation)
                    .where(journal.is_row(each))
                    .values(state=OperationState.LEFT.value)
                )
                await session.commit()
            self._trail.unsettled.discard(each)

    async def _take_over(self, dead: list[str]) -> None:
        """Each row is one process's: of two that try, one finds it changed."""
        async with self._database.writing_session() as session:
            await session.exec(
                sa.update(OpenOperation)
                .where(col(OpenOperation.process).in_(dead))
                .values(process=self._process, state=OperationState.LEFT.value)
            )
            await session.commit()

    async def _mine(self) -> list[OpenOperation]:
        async with self._database.session() as session:
            found = await session.exec(
                select(OpenOperation)
                .where(
                    OpenOperation.process == self._process,
                    OpenOperation.state == OperationState.LEFT.value,
                )
                .order_by(col(OpenOperation.started_at))
                .limit(MOST_AT_ONCE)
            )
            return list(found)

    async def _settle_one(self, row: OpenOperation) -> None:
        operation = Operation(row.id, self._process, OperationState.LEFT)
        asked = replace(entry_of_text(row.asked), operation=operation)
        try:
            if row.kind == Kind.STORE:
                found = await self._store(row)
            elif row.kind == Kind.DELETE:
                found = await self._delete(row, asked)
            else:
                found = "nothing was changed"
            if found:
                detail = {"found": found}
                await self._record(
                    replace(asked, outcome=Outcome.FAILED, reason=CUT_OFF, detail=detail)
                )
                logger.warning("request %s was cut off: %s", asked.origin.request_id, found)
        except Unavailable as error:
            logger.warning("what was cut off waits: %s", error.detail)
        except Exception as error:  # nobody foresaw it; the others go on
            logger.error("operation %s can't be settled yet", row.id, exc_info=error)

    async def _record(self, entry: Entry) -> None:
        """Its outcome, if nobody has written one: raises AuditUnavailable."""
        async with self._database.writing_session() as session:
            await AuditTrail.add(session, entry)
            await session.commit()

    async def _store(self, row: OpenOperation) -> str:
        """What was found of an upload, and done; empty: wait."""
        if row.there_before:
            return "the archive had the file before"
        if await self._has_company(row):
            return ""
        if not await self._orthanc.holds_instance(row.orthanc_id):
            if await self._may_still_come(row):
                return ""
            return "the archive did not store the file"
        if not await self._orthanc.came_from(row.orthanc_id, self._username):
            return "the archive has the file from somebody else"
        if not await journal.take_back(self._database, self._orthanc, row.orthanc_id):
            return "the file was linked by another request"
        return "the archive had stored the file; it was taken back"

    async def _has_company(self, row: OpenOperation) -> bool:
        """Is somebody at work on the same instance? Then it may be linked in a moment."""
        async with self._database.session() as session:
            other = select(OpenOperation.id).where(
                OpenOperation.orthanc_id == row.orthanc_id,
                OpenOperation.kind == Kind.STORE.value,
                OpenOperation.state == OperationState.OPEN.value,
            )
            return (await session.exec(other.limit(1))).first() is not None

    async def _may_still_come(self, row: OpenOperation) -> bool:
        if row.seen_at is None:
            async with self._database.writing_session() as session:
                await session.exec(
                    sa.update(OpenOperation)
                    .where(col(OpenOperation.id) == row.id)
                    .values(seen_at=utcnow())
                )
                await session.commit()
            return True
        return utcnow() - row.seen_at < self._settle

    async def _delete(self, row: OpenOperation, asked: Entry) -> str:
        """What was found of a deletion; empty: wait, or it was finished and is on record."""
        uid = asked.study_instance_uid
        async with self._database.session() as session:
            study = await session.get(Study, uid)
            linked = await session.exec(
                select(Instance.orthanc_id).where(Instance.study_instance_uid == uid)
            )
            ours = set(linked)
        if study is None or study.orthanc_id != row.orthanc_id:
            return "the study was no longer listed"
        if ours and ours <= await self._orthanc.study_instances(row.orthanc_id):
            if await self._may_still_come(row):
                return ""
            return "the archive had not begun to delete the study; it stays"
        return await self._finish_deletion(row, asked)

    async def _finish_deletion(self, row: OpenOperation, asked: Entry) -> str:
        """It was granted, and can't be taken back: recorded as done by who asked for it."""
        try:
            async with self._gate.transaction([]) as session:
                access = await self._gate.patient_access(
                    *(session, self._principal, asked.action, asked.origin),
                    *(Subject.STUDY, asked.study_instance_uid),
                    record_grant=False,
                )
                await delete_study(
                    access,
                    (self._trail, self._orthanc, self._viewer),
                    row.detail,
                    actor=asked.actor,
                    actor_roles=asked.actor_roles,
                    purpose_of_use=asked.purpose_of_use,
                    reason=CUT_OFF,
                    operation=asked.operation,
                )
        except Denial:
            return "the archive no longer had the study, which is still listed"
        await self._fulfilled()
        logger.warning("request %s was cut off: its deletion was finished", asked.origin.request_id)
        return ""
