"""Keeps the folder what the database says: at once after a change here, and every second.

Each process of the application does, in turns (a lock in the folder itself), and each makes the
same bytes of the same rows; whoever is late finds nothing left to do. A hook only makes it
quicker: a change by another process, or past the application, is seen within a second.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from uuid import UUID
from zoneinfo import ZoneInfo

import sqlalchemy as sa

from app.audit import Action, AuditTrail, Origin, Outcome
from app.audit import Entry as Record
from app.db import Database
from app.errors import AuditUnavailable, LightboxError, OrthancUnavailable
from app.orthanc import Orthanc, promptly
from app.settings import Settings
from app.worklist.charsets import ASCII, orthanc_answers_in
from app.worklist.entry import Entry, Listed, Site, Withheld, make_entry
from app.worklist.folder import Busy, Changes, Folder
from app.worklist.orders import Found, problem_of, publication, wanted_orders

logger = logging.getLogger(__name__)

EVERY_SECONDS = 1.0
ENCODING_SECONDS = 5.0
TURN_SECONDS = 10.0
_TURN_AGAIN_SECONDS = 0.02


@dataclass(frozen=True)
class Report:
    """What one pass found: entries in the folder, what was changed, and who is not there and why
    (order to sentence; the sentences may quote an order's own values)."""

    listed: int = 0
    changes: Changes = field(default_factory=Changes)
    withheld: Mapping[UUID, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Made:
    """What became of an order: an entry, or why there is none."""

    found: Found
    listed: Listed
    entry: Entry | None
    problem: str = ""
    keyword: str = ""


class Worklist:
    """The worklist of one app. `run` for as long as the app lives; `wake` after a change."""

    def __init__(
        self, settings: Settings, database: Database, trail: AuditTrail, orthanc: Orthanc
    ) -> None:
        self._site = Site(
            settings.worklist_station_ae_title,
            ZoneInfo(settings.worklist_time_zone),
            settings.worklist_character_set,
        )
        self._days = settings.worklist_days
        self._database = database
        self._trail = trail
        self._orthanc = orthanc
        self._folder = Folder(settings.worklist_dir) if settings.worklist_dir else None
        self._made: dict[UUID, _Made] = {}
        self._answered_in: str | None = None  # not known yet
        self._woken = asyncio.Event()
        self._said = ""

    async def wake(self) -> None:
        """Look now. After the change is committed; a background task of the answer is."""
        self._woken.set()

    async def run(self) -> None:
        """Until it is cancelled. Without a folder there is nothing to do."""
        if self._folder is None:
            return
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._keep_asking_orthanc())
            tasks.create_task(self._keep())

    async def _keep(self) -> None:
        while True:
            self._woken.clear()
            try:
                await self.reconcile()
                self._say("")
            except (sa.exc.SQLAlchemyError, LightboxError, OSError) as error:
                sentence = str(error) if isinstance(error, OSError) else type(error).__name__
                self._say(sentence)
            with suppress(TimeoutError):
                async with asyncio.timeout(EVERY_SECONDS):
                    await self._woken.wait()

    async def _keep_asking_orthanc(self) -> None:
        while True:
            with suppress(OrthancUnavailable):
                before = self._answered_in
                if await self.ask_orthanc() != before:
                    await self.wake()
            known = self._answered_in is not None
            await asyncio.sleep(ENCODING_SECONDS if known else EVERY_SECONDS)

    async def ask_orthanc(self) -> str:
        """The character set that Orthanc answers in. Raises OrthancUnavailable."""
        async with promptly():
            encoding = await self._orthanc.default_encoding()
        self._answered_in = orthanc_answers_in(encoding)
        return self._answered_in

    async def reconcile(self, *, read_all: bool = False) -> Report:
        """One pass: ask, record, write. `read_all` compares every file, byte by byte.

        Raises OSError where the folder can't be used, SQLAlchemyError, AuditUnavailable.
        """
        if self._folder is None:
            return Report()
        await asyncio.to_thread(self._folder.prepare)
        async with self._turn(self._folder):
            async with self._database.session() as session:
                found = await wanted_orders(session, self._days)
            await asyncio.to_thread(self._make, found)
            await self._say_problems()
            wanted, unrecorded = await self._record(
                {key: made for key, made in self._made.items() if self._can_stand(made)}
            )
            changes = await asyncio.to_thread(self._folder.apply, wanted, read_all=read_all)
        if unrecorded is not None:
            raise unrecorded
        withheld = {key: made.problem for key, made in self._made.items() if made.problem}
        return Report(len(wanted), changes, withheld)

    @asynccontextmanager
    async def _turn(self, folder: Folder) -> AsyncIterator[None]:
        """Rows are read in one's turn: nobody then writes what another has just taken away."""
        deadline = asyncio.get_running_loop().time() + TURN_SECONDS
        turn = folder.turn()
        while True:
            try:
                turn.__enter__()
                break
            except Busy:
                if asyncio.get_running_loop().time() > deadline:
                    raise
                await asyncio.sleep(_TURN_AGAIN_SECONDS)
                turn = folder.turn()
        try:
            yield
        finally:
            turn.__exit__(None, None, None)

    def _make(self, found: Sequence[Found]) -> None:
        """Entries of the orders that changed; the others are kept."""
        made: dict[UUID, _Made] = {}
        for each in found:
            before = self._made.get(each.order_id)
            if before is not None and before.found.made_of == each.made_of:
                made[each.order_id] = self._judged(replace(before, found=each))
            else:
                made[each.order_id] = self._judged(self._make_one(each))
        self._made = made

    def _make_one(self, found: Found) -> _Made:
        listed = found.listed()
        try:
            return _Made(found, listed, make_entry(listed, self._site))
        except Withheld as why:
            return _Made(found, listed, None, str(why), why.keyword)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            # Nobody foresaw it; the other orders' entries stand all the same.
            kind = type(error).__name__
            return _Made(found, listed, None, f"The entry can't be made ({kind}).", kind)

    def _judged(self, made: _Made) -> _Made:
        """With the problem that Orthanc couldn't say it, or without it."""
        if made.entry is None or self._answered_in is None:
            return made
        if made.entry.can_be_said_in(self._answered_in):
            return replace(made, problem="", keyword="")
        problem = (
            f"SpecificCharacterSet: Orthanc answers in {self._answered_in} (its DefaultEncoding), "
            "which lacks a character of this entry."
        )
        return replace(made, problem=problem, keyword="SpecificCharacterSet")

    def _can_stand(self, made: _Made) -> bool:
        """What Orthanc couldn't say, or until it has told what it can, is not there."""
        if made.entry is None or made.problem:
            return False
        return made.entry.can_be_said_in(self._answered_in or ASCII)

    async def _say_problems(self) -> None:
        """On the orders, for whoever may read them, and in the log, without their values."""
        changed = [
            (key, made)
            for key, made in self._made.items()
            if made.problem[:512] != made.found.problem
        ]
        if not changed:
            return
        async with self._database.writing_session() as session:
            for key, made in changed:
                await session.exec(problem_of(key, made.problem))
            await session.commit()
        for key, made in changed:
            if made.problem:
                logger.error("order %s is not on the worklist: its %s", key, made.keyword)
            else:
                logger.info("order %s can stand on the worklist", key)

    async def _record(
        self, standing: Mapping[UUID, _Made]
    ) -> tuple[dict[UUID, bytes], AuditUnavailable | None]:
        """What may be written: no record, no entry. The record of an order is made once."""
        contents: dict[UUID, bytes] = {}
        unrecorded: AuditUnavailable | None = None
        for key, made in standing.items():
            assert made.entry is not None
            if not made.found.published:
                try:
                    await self._trail.record_if_first(publication(key), _record(made))
                except AuditUnavailable as error:
                    unrecorded = error
                    continue
            contents[key] = made.entry.content
        return contents, unrecorded

    def _say(self, sentence: str) -> None:
        """What goes wrong, once; and that it goes on again."""
        if sentence != self._said:
            if sentence:
                logger.error("the worklist is not kept up, will try again: %s", sentence)
            else:
                logger.info("the worklist is kept up again")
        self._said = sentence


def _record(made: _Made) -> Record:
    order = made.listed.order
    return Record(
        action=Action.WORKLIST_PUBLISH,
        outcome=Outcome.DONE,
        origin=Origin(request_id="upkeep"),
        patient_id=order.patient_id,
        order_id=order.id,
        study_instance_uid=order.planned_study_instance_uid,
        detail={"modality": order.order_category, "station_ae_title": order.station_ae_title},
    )
