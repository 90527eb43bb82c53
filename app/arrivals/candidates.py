"""The orders and patients that a study may belong to, as the matcher takes them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from uuid import UUID

import anyio.to_thread
import sqlalchemy as sa
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.aliases import survivors
from app.dicom import person_name
from app.matching import (
    ArrivedStudy,
    Match,
    OrderCandidate,
    PatientCandidate,
    Verdict,
    family_keys,
    look_up,
    match,
)
from app.models import Order, OrderStudy, Patient, Study

MOST_NAMED = 1000  # by an identifier; more of them, and nothing is certain
MOST_SIMILAR = 200
# What follows from images alone, in the words that the matcher knows.
_STATUS = {"arriving": "in-progress", "available": "completed"}


@dataclass(frozen=True)
class Found:
    """All that an identifier names, unless `cut`; and some whose name and birth date come near."""

    orders: list[OrderCandidate]
    patients: list[PatientCandidate]
    cut: bool = False


async def judge(
    session: AsyncSession, study: ArrivedStudy, authority: str, *, shared: bool
) -> Match:
    """What the matcher says of a study. `shared`: its UID is in the archive under two patients."""
    asked, found = await _asked(session, study, shared=shared)
    await session.commit()  # only read so far
    return await _said(asked, found, authority)


async def judge_within(session: AsyncSession, study: ArrivedStudy, authority: str) -> Match:
    """As `judge`, in the transaction that links the study, of what it sees."""
    return await _said(*await _asked(session, study, shared=False), authority)


async def _asked(
    session: AsyncSession, study: ArrivedStudy, *, shared: bool
) -> tuple[ArrivedStudy, Found]:
    owner = await session.get(Study, study.study_instance_uid, populate_existing=True)
    asked = replace(
        study, under_two_patients=shared, owner=owner.patient_id if owner is not None else None
    )
    return asked, await find(session, asked)


async def _said(asked: ArrivedStudy, found: Found, authority: str) -> Match:
    said = await anyio.to_thread.run_sync(
        lambda: match(asked, found.orders, found.patients, authority=authority)
    )
    if found.cut and said.verdict is Verdict.CERTAIN:
        return replace(
            said, verdict=Verdict.PROPOSED, patient_id=None, order_id=None, rule=None, because=()
        )
    return said


async def find(session: AsyncSession, study: ArrivedStudy) -> Found:
    """The candidates of a study, by the keys that the matcher names."""
    keys = look_up(study)
    named = sa.or_(
        col(Order.planned_study_instance_uid).in_(keys.study_instance_uids),
        col(Order.accession_number).in_(keys.accession_numbers),
        col(Order.id).in_(
            select(OrderStudy.order_id).where(
                col(OrderStudy.study_instance_uid).in_(keys.study_instance_uids)
            )
        ),
        col(Patient.mrn).in_(keys.patient_ids),
    )
    both = (
        select(Order, Patient)
        .join(Patient, col(Patient.id) == col(Order.patient_id))
        .where(named)
        .order_by(col(Order.created_at).desc())
        .limit(MOST_NAMED + 1)
    )
    fresh = {"populate_existing": True}
    rows = list(await session.exec(both, execution_options=fresh))
    people = {patient.id: patient for _, patient in rows}
    numbered = select(Patient).where(
        sa.or_(
            col(Patient.mrn).in_(keys.patient_ids),
            *([col(Patient.id) == study.owner] if study.owner else []),
        )
    )
    numbered = numbered.limit(MOST_NAMED + 1)
    people |= {each.id: each for each in await session.exec(numbered, execution_options=fresh)}
    cut = max(len(rows), len(people)) > MOST_NAMED
    near, near_cut = await _of_same_birth(session, keys.birth_dates, set(keys.family_keys))
    people |= {each.id: each for each in near}
    missing = [each.id for each in near if each.id not in {p.id for _, p in rows}]
    # Those whose records were merged into another's are that other.
    whose = await survivors(session, list(people.values()))
    missing += [whose[each.id].id for each in people.values() if each.merged_into]
    rows += await _orders_of(session, missing)
    linked = await _linked(session, [order.id for order, _ in rows])
    candidates = {
        whose[each.id].id: _known_as(whose[each.id], each)
        # Of several records of one patient, the one whose number the study carries.
        for each in sorted(people.values(), key=lambda one: one.mrn in keys.patient_ids)
    }
    orders = {
        order.id: _order(order, candidates[patient.id], linked.get(order.id, set()))
        for order, patient in rows
    }
    return Found(list(orders.values()), list(candidates.values()), cut or near_cut)


async def _of_same_birth(
    session: AsyncSession, dates: Sequence[object], names: set[str]
) -> tuple[list[Patient], bool]:
    """Patients born on one of these days with one of these family names, and whether some may be
    missing: a namesake of the same birth date must not be overlooked."""
    if not dates or not names:
        return [], False
    born = select(Patient).where(col(Patient.dob).in_(dates)).limit(20 * MOST_SIMILAR + 1)
    found = list(await session.exec(born))
    named = [each for each in found if family_keys(_name(each)) & names]
    return named[:MOST_SIMILAR], len(found) > 20 * MOST_SIMILAR or len(named) > MOST_SIMILAR


async def _orders_of(
    session: AsyncSession, patient_ids: Sequence[UUID]
) -> list[tuple[Order, Patient]]:
    if not patient_ids:
        return []
    query = (
        select(Order, Patient)
        .join(Patient, col(Patient.id) == col(Order.patient_id))
        .where(col(Order.patient_id).in_(patient_ids))
        .order_by(col(Order.created_at).desc())
        .limit(MOST_SIMILAR)
    )
    return list(await session.exec(query))


async def _linked(session: AsyncSession, order_ids: Iterable[UUID]) -> dict[UUID, set[str]]:
    found: dict[UUID, set[str]] = {}
    rows = await session.exec(select(OrderStudy).where(col(OrderStudy.order_id).in_(order_ids)))
    for each in rows:
        found.setdefault(each.order_id, set()).add(each.study_instance_uid)
    return found


def _name(patient: Patient) -> str:
    return person_name(patient.last_name, patient.first_name)


def _known_as(patient: Patient, record: Patient) -> PatientCandidate:
    """A patient, under the number of a record that was merged into theirs, or their own."""
    return PatientCandidate(
        id=patient.id,
        mrn=record.mrn,
        mrn_issuer=record.mrn_issuer,
        name=_name(patient),
        birth_date=patient.dob,
        sex=patient.sex,
    )


def _order(order: Order, patient: PatientCandidate, linked: set[str]) -> OrderCandidate:
    return OrderCandidate(
        id=order.id,
        patient=patient,
        accession_number=order.accession_number,
        accession_issuer=order.accession_issuer,
        planned_study_instance_uid=order.planned_study_instance_uid,
        status=_STATUS.get(order.status.value, order.status.value),
        modality=order.order_category,
        description=order.description,
        scheduled_at=order.scheduled_at,
        ordered_at=order.created_at,
        station_ae_title=order.station_ae_title,
        site=order.site,
        linked=frozenset(linked),
    )
