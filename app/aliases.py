"""Patients who were merged: who survives, and under which numbers they are known besides.

A merge retires one patient into another, who may be retired into a third later: a chain that ends
with somebody who is not, and never in a circle (`app.patients.merging`).
"""

from collections.abc import Collection
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.orm import aliased
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.errors import Conflict
from app.models import Patient

RETIRED = "patient-retired"
"""What the database says of a row for a retired patient (migration 0007)."""


def is_of_retired(error: sa.exc.IntegrityError) -> bool:
    """Was a row refused because its patient was merged into another meanwhile?"""
    return RETIRED in str(error.orig)


def refuse_retired(patient: Patient, named: UUID) -> None:
    """Raises Conflict with the survivor's id where a request to change something named a patient
    who was merged: its sender doesn't know yet whose record it would change."""
    if patient.id != named:
        raise Conflict(
            "This patient was merged into another, `merged_into`; write to that one.",
            extra={"merged_into": str(patient.id)},
        )


async def survivor(session: AsyncSession, patient_id: UUID) -> Patient | None:
    """The patient whose record is that one's now: themselves for most; None for nobody."""
    found = await session.get(Patient, patient_id, populate_existing=True)
    while found is not None and found.merged_into is not None:
        found = await session.get(Patient, found.merged_into, populate_existing=True)
    return found


def surviving(patient_id: UUID) -> sa.ScalarSelect[UUID]:
    """The id of the patient whose record is that one's now, as a part of a statement."""
    chain = (
        sa.select(col(Patient.id).label("id"), col(Patient.merged_into).label("merged_into"))
        .where(col(Patient.id) == patient_id)
        .cte("chain", recursive=True)
    )
    link = aliased(Patient)
    chain = chain.union_all(
        sa.select(col(link.id), col(link.merged_into)).join(
            chain, col(link.id) == chain.c.merged_into
        )
    )
    return sa.select(chain.c.id).where(chain.c.merged_into.is_(None)).scalar_subquery()


async def lock(session: AsyncSession, patient_ids: Collection[UUID]) -> None:
    """These patients are the transaction's; whoever files something under one of them waits. On
    SQLite, which locks no row, the write takes the one turn to write."""
    for statement in (
        sa.select(col(Patient.id))
        .where(col(Patient.id).in_(patient_ids))
        .order_by(col(Patient.id))
        .with_for_update(),
        sa.update(Patient)
        .where(col(Patient.id).in_(patient_ids))
        .values(sex=Patient.sex)
        .execution_options(synchronize_session=False),
    ):
        await (await session.connection()).execute(statement)


async def retired_into(session: AsyncSession, patient_id: UUID) -> list[Patient]:
    """All patients whose records are this one's now, the nearest first; empty for most."""
    found: list[Patient] = []
    last: list[UUID] = [patient_id]
    while last:
        rows = await session.exec(
            select(Patient).where(col(Patient.merged_into).in_(last)).order_by(col(Patient.id))
        )
        nearer = list(rows)
        found += nearer
        last = [each.id for each in nearer]
    return found


async def survivors(session: AsyncSession, patients: Collection[Patient]) -> dict[UUID, Patient]:
    """The survivor of each, by the id of each."""
    found: dict[UUID, Patient] = {}
    for each in patients:
        last = each if each.merged_into is None else await survivor(session, each.id)
        if last is not None:
            found[each.id] = last
    return found
