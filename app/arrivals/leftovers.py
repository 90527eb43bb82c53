"""What a coercion leaves where its process dies or the archive fails in the middle.

Before the link: a part of a copy in the archive, which is deleted. After it: an original that was
to be removed, which is removed, image by image, once the copy of each is linked and there.
"""

import logging

import sqlalchemy as sa
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.arrivals import copies
from app.arrivals.copies import Making
from app.arrivals.files import DidNotPassError, Examiner
from app.arrivals.references import renumbered
from app.db import Database, utcnow
from app.errors import NotFound
from app.models import Arrival, ArrivalState, Instance, Study, StudyCopy
from app.orthanc import Orthanc, promptly

logger = logging.getLogger(__name__)


class Leftovers:
    """Tidies up; all of it may be done again, and stopped anywhere. One per app."""

    def __init__(self, database: Database, orthanc: Orthanc, examiner: Examiner) -> None:
        self._database = database
        self._orthanc = orthanc
        self._examiner = examiner

    async def step(self) -> None:
        """Raises OrthancUnavailable."""
        async with self._database.session() as session:
            left = await copies.left_behind(session)
            going = await copies.whose_original_goes(session)
        for each in left:
            await self._delete(each, abandoned=True)
            logger.warning("a copy that was not finished was deleted")
        for each in going:
            await self._finish_removal(each)

    async def take_back(self, making: Making) -> None:
        """Delete what there is of a copy that could not be finished. Raises OrthancUnavailable:
        then `step` does it later."""
        async with self._database.session() as session:
            copy = await session.get(StudyCopy, making.orthanc_id)
        if copy is not None and copy.operation == making.operation.id:
            await self._delete(copy, abandoned=False)

    async def removed(self, orthanc_id: str) -> None:
        """Nothing is left to remove of what this is a copy of."""
        async with self._database.writing_session() as session:
            copy = await session.get(StudyCopy, orthanc_id)
            if copy is not None:
                copy.original_goes = False
                session.add(copy)
                await _look_again(session, copy.original_id)
            await session.commit()

    async def _delete(self, copy: StudyCopy, *, abandoned: bool) -> None:
        """While the row is held, nobody else begins to make this copy."""
        async with self._database.writing_session() as session:
            if not await copies.take_over(session, copy, abandoned=abandoned):
                return
            async with promptly():
                await self._orthanc.delete_study(copy.orthanc_id)
            await session.exec(
                sa.update(Arrival)
                .where(col(Arrival.orthanc_id) == copy.orthanc_id)
                .values(state=ArrivalState.GONE.value, due_at=None, version=Arrival.version + 1)
                .execution_options(synchronize_session=False)
            )
            await session.commit()

    async def _finish_removal(self, copy: StudyCopy) -> None:
        async with self._database.session() as session:
            owned = await session.exec(select(Study).where(Study.orthanc_id == copy.orthanc_id))
            study = owned.first()
            uid = study.study_instance_uid if study is not None else ""
            linked = await session.exec(
                select(Instance.sop_instance_uid, Instance.orthanc_id).where(
                    Instance.study_instance_uid == uid
                )
            )
            twins = {sop: orthanc_id for sop, orthanc_id in linked}  # noqa: C416  (rows)
        if study is not None:  # where its link was undone, the original stays
            there = await self._orthanc.study_instances(copy.orthanc_id)
            for each in sorted(await self._orthanc.study_instances(copy.original_id)):
                sop = await self._sop_uid(copy.original_id, each)
                if sop and twins.get(renumbered(str(study.patient_id), sop)) in there:
                    await self._orthanc.delete_instance(each)
        await self.removed(copy.orthanc_id)

    async def _sop_uid(self, study_id: str, instance_id: str) -> str:
        """Empty for a file that has gone, or that nobody copied as it does not pass."""
        try:
            return (await self._examiner.one(study_id, instance_id)).header.sop_instance_uid
        except (DidNotPassError, NotFound):
            return ""


async def _look_again(session: AsyncSession, orthanc_id: str) -> None:
    await session.exec(
        sa.update(Arrival)
        .where(col(Arrival.orthanc_id) == orthanc_id)
        .values(due_at=utcnow())
        .execution_options(synchronize_session=False)
    )
