"""Follows Orthanc for as long as the app lives, if no other process of it does.

Three tasks side by side: the log of changes with what waits for an order, the work that they make,
and the slow sweep. Each goes on where it was, whatever ended the one before.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

import sqlalchemy as sa
from sqlmodel import col

from app.access import Gate
from app.arrivals import index
from app.arrivals.backlog import Backlog
from app.arrivals.changes import NAME, Changes, NotOursError
from app.arrivals.coercion import Coercion
from app.arrivals.files import Examiner
from app.arrivals.gone import Gone
from app.arrivals.leftovers import Leftovers
from app.arrivals.linker import Linker, Ready
from app.arrivals.lock import Leadership
from app.arrivals.reconciliation import Reconciliation
from app.arrivals.reopen import Reopen
from app.arrivals.sweep import Sweep
from app.arrivals.work import Work
from app.db import Database
from app.errors import AuditUnavailable, LightboxError, Unavailable
from app.intake import Intake
from app.models import WAITING, Arrival, ArrivalState, FollowerPosition
from app.orthanc import Orthanc
from app.settings import Settings

logger = logging.getLogger(__name__)

BUSY_SECONDS = 0.25
IDLE_SECONDS = 0.5
STANDBY_SECONDS = 1.0
AGAIN_SECONDS = 2.0
WORKERS = 2
SWEEP_EVERY_SECONDS = 1.0
BACKLOG_PAUSE_SECONDS = 0.02


@dataclass(frozen=True)
class Progress:
    """How far the archive is followed; numbers, and no patient's data."""

    following: bool  # this process is the one that does
    position: int
    listed: int
    to_list: int
    to_look_at: int
    waiting: int
    problem: str


class Follower:
    """One per app. `run` for as long as it lives."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        gate: Gate,
        orthanc: Orthanc,
        intake: Intake,
        ready: Ready,
        fulfilled: Callable[[], Awaitable[None]],
    ) -> None:
        self._enabled = settings.follow_orthanc
        self._database = database
        self._leadership = Leadership(settings.database_url)
        self._changes = Changes(database, orthanc)
        self._reopen = Reopen(database)
        self._sweep = Sweep(database, orthanc, seconds=settings.sweep_seconds)
        self._per_second = settings.sweep_studies_per_second
        examiner = Examiner(intake, orthanc, str(settings.spool_dir))
        self._leftovers = Leftovers(database, orthanc, examiner)
        linker = Linker(gate, orthanc, settings.site, ready)
        self._work = Work(
            database,
            orthanc,
            examiner,
            linker,
            Gone(gate, settings.site),
            settings.assigning_authority,
        )
        self.reconciliation = Reconciliation(
            database,
            orthanc,
            examiner,
            linker,
            Coercion(
                *(database, orthanc, intake, examiner, linker, self._leftovers),
                remove_original=settings.reconciliation_original == "remove",
                spool_dir=str(settings.spool_dir),
            ),
            settings.assigning_authority,
        )
        self._backlog = Backlog(database, orthanc, settings.assigning_authority)
        self._to_look_at: list[str] = []  # of the backlog, one by one
        self._fulfilled = fulfilled
        self._following = False
        self._said: dict[str, str] = {}
        self._under_way: set[str] = set()

    async def run(self) -> None:
        """Until it is cancelled."""
        if not self._enabled:
            return
        try:
            while True:
                if await self._lead():
                    await self._follow()
                await asyncio.sleep(STANDBY_SECONDS)
        finally:
            with suppress(asyncio.CancelledError):
                await asyncio.shield(self._leadership.give_up())

    async def _lead(self) -> bool:
        try:
            self._following = await self._leadership.held()
        except (sa.exc.SQLAlchemyError, OSError) as error:
            self._following = False
            self._say("the lock", f"the database does not answer ({type(error).__name__})")
            return False
        self._say("the lock", "")
        return self._following

    async def _follow(self) -> None:
        """While the lock is ours."""
        logger.info("this process follows the image archive")
        tasks = [
            asyncio.create_task(each)
            for each in (
                self._keep("the changes", self._step, BUSY_SECONDS, IDLE_SECONDS),
                *(self._keep("the work", self._do, 0.0, IDLE_SECONDS) for _ in range(WORKERS)),
                self._keep("the backlog", self._do_backlog, BACKLOG_PAUSE_SECONDS, IDLE_SECONDS),
                self._keep("the sweep", self._look_around, 0.0, SWEEP_EVERY_SECONDS),
            )
        ]
        try:
            while await self._lead():  # noqa: ASYNC110  (the database is asked, nobody tells)
                await asyncio.sleep(STANDBY_SECONDS)
        finally:
            self._following = False
            for each in tasks:
                each.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            logger.info("this process no longer follows the image archive")

    async def _keep(
        self, name: str, step: Callable[[], Awaitable[bool]], busy: float, idle: float
    ) -> None:
        """One step after the other; what goes wrong is said once, and tried again."""
        failures = 0
        while True:
            try:
                pause = busy if await step() else idle
                self._say(name, "")
                failures = 0
            except (Unavailable, AuditUnavailable, sa.exc.SQLAlchemyError, OSError) as error:
                if isinstance(error, LightboxError):
                    self._changes.distrust()
                self._say(name, error.detail if isinstance(error, LightboxError) else _kind(error))
                failures += 1
                pause = min(AGAIN_SECONDS, BUSY_SECONDS * 2.0**failures)
            except NotOursError:
                pause = AGAIN_SECONDS
            except Exception as error:  # whatever it was: the archive has to be followed
                logger.error("following the archive (%s) failed", name, exc_info=error)
                pause = AGAIN_SECONDS
            await asyncio.sleep(pause)

    async def _step(self) -> bool:
        more = await self._changes.follow()
        await self._reopen.step()
        return more

    async def _do(self) -> bool:
        """Look at the next study that is due; was there one?"""
        async with self._database.session() as session:
            found = await index.due(session, WORKERS + len(self._under_way), backlog=False)
        mine = [each for each in found if each not in self._under_way]
        if mine:
            await self._look_at(mine[0])
        return bool(mine)

    async def _do_backlog(self) -> bool:
        if self._to_look_at:
            await self._look_at(self._to_look_at.pop())
            return True
        settled, self._to_look_at = await self._backlog.step()
        return bool(settled or self._to_look_at)

    async def _look_at(self, orthanc_id: str) -> None:
        self._under_way.add(orthanc_id)
        try:
            await self._work.look(orthanc_id)
        finally:
            self._under_way.discard(orthanc_id)
        await self._fulfilled()

    async def tidy(self) -> None:
        """Delete what coercions have left; see `Leftovers`."""
        await self._leftovers.step()

    async def _look_around(self) -> bool:
        await self.tidy()
        await self._sweep.whole_if_due()
        await self._sweep.some(max(1, round(self._per_second * SWEEP_EVERY_SECONDS)))
        return False

    async def look(self, orthanc_id: str) -> None:
        """Look at one study now; see `Work.look`."""
        await self._work.look(orthanc_id)

    def _say(self, what: str, problem: str) -> None:
        """What goes wrong, once; and that it goes on again."""
        before = self._said.get(what, "")
        self._said[what] = problem
        if problem and problem != before:
            logger.warning("%s of the image archive are not followed: %s", what, problem)
        elif before and not problem:
            logger.info("%s of the image archive are followed again", what)

    async def progress(self) -> Progress:
        """How far it is; whichever process follows."""
        async with self._database.session() as session:
            position = await session.get(FollowerPosition, NAME)

            async def count(*where: sa.ColumnElement[bool]) -> int:
                query = sa.select(sa.func.count()).select_from(Arrival).where(*where)
                return int(await session.scalar(query) or 0)

            return Progress(
                following=self._following,
                position=position.position if position else 0,
                listed=position.listed if position else 0,
                to_list=position.to_list if position else 0,
                to_look_at=await count(
                    col(Arrival.due_at).is_not(None),
                    col(Arrival.state) != ArrivalState.GONE.value,
                ),
                waiting=await count(col(Arrival.state).in_([each.value for each in WAITING])),
                problem=self._sweep.problem or next(filter(None, self._said.values()), ""),
            )


def _kind(error: BaseException) -> str:
    return type(error).__name__
