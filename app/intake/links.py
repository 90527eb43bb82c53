"""Files of a study that are to be linked at the same moment share a transaction (group commit).

While one is under way the next ones gather. Where one of several would fail alone, each is linked
by itself: what is wrong with one is nobody else's fault.
"""

import asyncio
from collections.abc import Hashable, Sequence
from dataclasses import replace

import sqlalchemy as sa

from app.db import Database
from app.errors import AuditUnavailable, Conflict, DatabaseUnavailable
from app.intake import records
from app.intake.records import Link
from app.orthanc import Orthanc, promptly

MOST_AT_ONCE = 50

_Batch = list[tuple[Link, asyncio.Future[None]]]


class Links:
    """Links what Orthanc has stored. One per app."""

    def __init__(self, orthanc: Orthanc) -> None:
        self._orthanc = orthanc
        self._waiting: dict[Hashable, _Batch] = {}  # those at work, and who waits for them
        self._tasks: set[asyncio.Task[None]] = set()

    async def link(self, database: Database, wanted: Link) -> None:
        """Return once it stands, with its record. Cancelled, it may stand all the same.

        Raises Conflict, AuditUnavailable, OrthancUnavailable, SQLAlchemyError: then it does not,
        unless the commit itself was not answered.
        """
        access = wanted.access
        order = access.order.id if access.order else None
        uid = wanted.file.header.study_instance_uid
        alike = (access.patient.id, order, access.principal.sub, uid)
        linked = asyncio.get_running_loop().create_future()
        if alike in self._waiting:
            self._waiting[alike].append((wanted, linked))
        else:
            self._waiting[alike] = [(wanted, linked)]
            task = asyncio.create_task(self._link_all(database, alike))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        await linked

    async def _link_all(self, database: Database, alike: Hashable) -> None:
        batch: _Batch = []
        try:
            while batch := self._next(alike):
                await self._link(database, batch)
        finally:
            # Only where this task itself was ended: nobody waits for what won't come.
            ended = DatabaseUnavailable("Lightbox is ending. Nothing was linked; send it again.")
            _settle([*batch, *self._waiting.pop(alike)], ended)

    def _next(self, alike: Hashable) -> _Batch:
        """Each instance once: of two the later one has to see what became of the first."""
        batch: dict[str, tuple[Link, asyncio.Future[None]]] = {}
        later: _Batch = []
        for wanted, linked in self._waiting[alike]:
            sop = wanted.file.header.sop_instance_uid
            if linked.done():
                continue  # it waits no longer, and what was stored of it is taken back
            if sop in batch or len(batch) == MOST_AT_ONCE:
                later.append((wanted, linked))
            else:
                batch[sop] = (wanted, linked)
        self._waiting[alike] = later
        return list(batch.values())

    async def _link(self, database: Database, batch: _Batch) -> None:
        try:
            await self._commit(database, [wanted for wanted, _ in batch])
        except Exception as error:  # noqa: BLE001  (raised where it is waited for)
            if len(batch) > 1 and _is_of_one(error):
                for each in batch:
                    await self._link(database, [each])
            else:
                _settle(batch, error)
        else:
            _settle(batch, None)

    async def _commit(self, database: Database, wanted: Sequence[Link]) -> None:
        async with database.writing_session() as session:
            shared = [replace(each, access=each.access.within(session)) for each in wanted]
            await records.link(shared)
            async with promptly():
                held = await asyncio.gather(
                    *(self._orthanc.holds_instance(each.file.stored.instance_id) for each in wanted)
                )
            if not all(held):
                # A deletion, or the undoing of another upload, was faster.
                raise Conflict("The study was deleted at the same moment; send the file again.")
            await session.commit()
        for each in wanted:
            each.access.ended()


def _is_of_one(error: Exception) -> bool:
    """May one file be alone to blame: UIDs that another was faster with, an operation that was
    given up, a row that is gone, a value that the database doesn't take? Not where the database
    does not answer."""
    silent = isinstance(error.__cause__, (sa.exc.OperationalError, OSError))
    of_one = (Conflict, AuditUnavailable, sa.exc.IntegrityError, sa.exc.DataError)
    return isinstance(error, of_one) and not silent


def _settle(batch: _Batch, error: Exception | None) -> None:
    for _, linked in batch:
        if linked.done():
            continue  # it waits no longer
        if error is None:
            linked.set_result(None)
        else:
            linked.set_exception(error)
