"""New and changed orders and patients: waiting studies that they concern are looked at again."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

import sqlalchemy as sa
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.arrivals.changes import NAME
from app.db import Database, utcnow
from app.dicom import person_name
from app.matching import family_keys
from app.models import Arrival, ArrivalState, FollowerPosition, Order, Patient

_OVERLAP = timedelta(seconds=60)
"""A row becomes visible when its transaction ends, and says when it was written."""
_MOST = 500
_QUESTIONS = (
    ArrivalState.ARRIVING.value,
    ArrivalState.PROPOSED.value,
    ArrivalState.UNMATCHED.value,
    ArrivalState.CONFLICTING.value,
)


class Reopen:
    """Looks for changes since the last time. The time is kept with the position."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._seen: dict[tuple[str, UUID], datetime] = {}

    async def step(self) -> int:
        """How many studies are to be looked at again."""
        async with self._database.session() as session:
            position = await session.get(FollowerPosition, NAME)
            if position is None:
                return 0
            now = utcnow()
            since = position.orders_seen_at - _OVERLAP
            orders = await session.exec(
                select(Order, Patient)
                .join(Patient, col(Patient.id) == col(Order.patient_id))
                .where(col(Order.updated_at) > since)
                .order_by(col(Order.updated_at))
                .limit(_MOST)
            )
            patients = await session.exec(
                select(Patient)
                .where(col(Patient.created_at) > since)
                .order_by(col(Patient.created_at))
                .limit(_MOST)
            )
            changed = [
                *((("order", o.id), o.updated_at, _Concerned(p, o)) for o, p in orders),
                *((("patient", p.id), p.created_at, _Concerned(p)) for p in patients),
            ]
        fresh = [each for each in changed if self._seen.get(each[0]) != each[1]]
        if not fresh and now - position.orders_seen_at < _OVERLAP:
            return 0  # the one writer of SQLite is not kept busy by nothing
        # Where there were more than fit, go on from the last of these.
        full = len(changed) >= _MOST
        reached = max(at for _, at, _ in changed) if full else now
        count = await self._open([where for _, _, where in fresh], reached)
        self._seen = {
            **({} if not full else self._seen),
            **{key: at for key, at, _ in changed if at > reached - _OVERLAP * 2},
        }
        return count

    async def _open(self, concerned: list["_Concerned"], reached: datetime) -> int:
        async with self._database.session() as session:
            found = [each for one in concerned for each in await one.waiting(session)]
        async with self._database.writing_session() as session:
            for start in range(0, len(found), _MOST):
                await session.exec(
                    sa.update(Arrival)
                    .where(col(Arrival.orthanc_id).in_(found[start : start + _MOST]))
                    .values(due_at=utcnow(), attempts=0, backlog=False)
                    .execution_options(synchronize_session=False)
                )
            await session.exec(
                sa.update(FollowerPosition)
                .where(col(FollowerPosition.name) == NAME)
                .values(orders_seen_at=reached)
                .execution_options(synchronize_session=False)
            )
            await session.commit()
        return len(found)


@dataclass(frozen=True)
class _Concerned:
    """A patient, and mostly an order of theirs, that is new or was changed."""

    patient: Patient
    order: Order | None = None

    async def waiting(self, session: AsyncSession) -> list[str]:
        """The studies that it may concern: by a number of theirs, or by the birth date with one of
        the family names."""
        patient, order = self.patient, self.order
        born = patient.dob.strftime("%Y%m%d")
        numbers = [
            col(Arrival.dicom_patient_id) == patient.mrn,
            col(Arrival.patient_id) == patient.id,
        ]
        if order is not None:
            numbers += [
                col(Arrival.study_instance_uid) == order.planned_study_instance_uid,
                col(Arrival.accession_number) == order.accession_number,
            ]
        by_number = sa.or_(*numbers)
        rows = await session.exec(
            select(Arrival.orthanc_id, Arrival.patient_name, by_number.label("by_number"))
            .where(
                sa.or_(by_number, col(Arrival.patient_birth_date) == born),
                col(Arrival.state).in_(_QUESTIONS),
                sa.not_(col(Arrival.held)),
            )
            .limit(_MOST)
        )
        names = family_keys(person_name(patient.last_name, patient.first_name))
        return [key for key, name, numbered in rows if numbered or family_keys(name) & names]
