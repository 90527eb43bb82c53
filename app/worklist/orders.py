"""Which orders stand on the worklist, asked of the database as it is now."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlmodel import col
from sqlmodel.ext.asyncio.session import AsyncSession

from app.db import utcnow
from app.models import Order, OrderStatus, OrderStudy, Patient, Restriction
from app.worklist.entry import Listed

# What becomes of an order doesn't change its entry.
_NOT_SAID = ("worklist_published_at", "worklist_problem", "updated_at")
_ORDER = [each for each in sa.inspect(Order).columns if each.key not in _NOT_SAID]
_ORDER_ID = next(i for i, each in enumerate(_ORDER) if each.key == "id")
_PATIENT = list(sa.inspect(Patient).columns)
_OPEN = (OrderStatus.SCHEDULED, OrderStatus.IN_PROGRESS, OrderStatus.ARRIVING)


@dataclass(frozen=True)
class Found:
    """An order that is to stand: what its entry is made of, and what was made of it so far."""

    order_id: UUID
    made_of: tuple[Any, ...]
    published: bool
    problem: str

    def listed(self) -> Listed:
        """As what an entry is made of."""
        of_order, rest = self.made_of[: len(_ORDER)], self.made_of[len(_ORDER) :]
        order = {column.key: value for column, value in zip(_ORDER, of_order, strict=True)}
        patient = {column.key: value for column, value in zip(_PATIENT, rest[:-1], strict=True)}
        return Listed(Order(**order), Patient(**patient), rest[-1])


async def wanted_orders(session: AsyncSession, days: int) -> list[Found]:
    """The orders that a modality is to be told of, with their patients: scheduled or under way,
    not fulfilled, and due less than `days` ago."""
    since = utcnow() - timedelta(days=days)
    due_late_enough = sa.or_(
        col(Order.scheduled_at) > since,
        sa.and_(col(Order.scheduled_at).is_(None), col(Order.created_at) > since),
    )
    query = (
        sa.select(
            *_ORDER,
            *_PATIENT,
            sa.func.coalesce(Restriction.level, ""),
            col(Order.worklist_published_at).is_not(None),
            col(Order.worklist_problem),
        )
        .join(Patient, col(Patient.id) == col(Order.patient_id))
        .outerjoin(Restriction, col(Restriction.patient_id) == col(Patient.id))
        .where(
            col(Order.status).in_(_OPEN),
            col(Order.order_type) == "IMAGING",
            col(Order.fulfilled_at).is_(None),
            due_late_enough,
        )
    )
    connection = await session.connection()
    return [
        Found(made_of[_ORDER_ID], made_of, published, problem)
        for *row, published, problem in await connection.execute(query)
        for made_of in (tuple(row),)
    ]


async def order_fulfilled(session: AsyncSession, order_id: UUID) -> bool:
    """The images of an order are complete in the archive: it leaves the worklist.

    For whoever follows Orthanc's changes: call it when a linked study is stable, in the
    transaction that knows it, then `Worklist.wake`. False: no study is linked, it is cancelled or
    fulfilled already. The EHR may put it back: `PATCH /orders/{id}` with status `scheduled`.
    """
    linked = sa.exists().where(col(OrderStudy.order_id) == order_id)
    changed = await session.exec(
        sa.update(Order)
        .where(
            col(Order.id) == order_id,
            col(Order.fulfilled_at).is_(None),
            col(Order.status) != OrderStatus.CANCELLED,
            linked,
        )
        .values(fulfilled_at=utcnow())
    )
    return changed.rowcount == 1


def publication(order_id: UUID) -> sa.Update:
    """Marks an order as published; changes a row once in the order's life."""
    return (
        sa.update(Order)
        .where(col(Order.id) == order_id, col(Order.worklist_published_at).is_(None))
        .values(worklist_published_at=utcnow())
    )


def problem_of(order_id: UUID, problem: str) -> sa.Update:
    """Says on the order why it is not on the worklist; empty: it is, or need not be."""
    return sa.update(Order).where(col(Order.id) == order_id).values(worklist_problem=problem[:512])
