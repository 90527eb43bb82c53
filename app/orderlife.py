"""The life of an order: what the EHR says of it, and what really arrived.

`LIFE` is the whole of it, pure. The EHR schedules, starts, completes and cancels; `arriving` and
`available` follow from the images that are linked, and nobody else sets them. Whoever links or
unlinks images calls `images_changed`, in the transaction of the change.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, cast
from uuid import UUID

import sqlalchemy as sa
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.db import utcnow
from app.errors import Conflict
from app.models import Arrival, ArrivalState, Instance, Order, OrderStatus, OrderStudy
from app.notifications import Event, Notifications

_TRIES = 10


class OrderEvent(StrEnum):
    """What happens to an order. The first four are what the EHR sets a status to."""

    SCHEDULE = "scheduled"
    START = "in-progress"
    COMPLETE = "completed"
    CANCEL = "cancelled"
    IMAGES_ARRIVING = "images-arriving"  # some are linked, and more may come
    IMAGES_COMPLETE = "images-complete"  # the archive says that all have come
    IMAGES_GONE = "images-gone"  # none are linked (any more)


BY_EHR = (OrderEvent.SCHEDULE, OrderEvent.START, OrderEvent.COMPLETE, OrderEvent.CANCEL)
BY_IMAGES = (OrderEvent.IMAGES_ARRIVING, OrderEvent.IMAGES_COMPLETE, OrderEvent.IMAGES_GONE)

_BACK = None
"""To what the EHR said last."""

_EHR = {
    OrderEvent.SCHEDULE: OrderStatus.SCHEDULED,
    OrderEvent.START: OrderStatus.IN_PROGRESS,
    OrderEvent.COMPLETE: OrderStatus.COMPLETED,
    OrderEvent.CANCEL: OrderStatus.CANCELLED,
}
_IMAGES = {
    OrderEvent.IMAGES_ARRIVING: OrderStatus.ARRIVING,
    OrderEvent.IMAGES_COMPLETE: OrderStatus.AVAILABLE,
}

LIFE: Mapping[OrderStatus, Mapping[OrderEvent, OrderStatus | None]] = {
    OrderStatus.SCHEDULED: {**_EHR, **_IMAGES, OrderEvent.IMAGES_GONE: OrderStatus.SCHEDULED},
    OrderStatus.IN_PROGRESS: {**_EHR, **_IMAGES, OrderEvent.IMAGES_GONE: OrderStatus.IN_PROGRESS},
    # It has begun: it can't be scheduled, and is under way whether the EHR says so or not.
    OrderStatus.ARRIVING: {
        OrderEvent.START: OrderStatus.ARRIVING,
        OrderEvent.COMPLETE: OrderStatus.COMPLETED,
        OrderEvent.CANCEL: OrderStatus.CANCELLED,
        **_IMAGES,
        OrderEvent.IMAGES_GONE: _BACK,
    },
    # Images that are added later don't take it back; to want more of them is the EHR's to say.
    OrderStatus.AVAILABLE: {
        **_EHR,
        OrderEvent.IMAGES_ARRIVING: OrderStatus.AVAILABLE,
        OrderEvent.IMAGES_COMPLETE: OrderStatus.AVAILABLE,
        OrderEvent.IMAGES_GONE: _BACK,
    },
    # The EHR's last words: no image changes them, and nothing revives what was cancelled.
    OrderStatus.COMPLETED: {**_EHR, **dict.fromkeys(BY_IMAGES, OrderStatus.COMPLETED)},
    OrderStatus.CANCELLED: dict.fromkeys((OrderEvent.CANCEL, *BY_IMAGES), OrderStatus.CANCELLED),
}
"""What becomes of an order in a state, at an event. An event that is not there is refused."""


@dataclass(frozen=True)
class Stand:
    """Where an order stands, and what the EHR said last: one of `BY_EHR`'s values."""

    status: OrderStatus = OrderStatus.SCHEDULED
    said: OrderStatus = OrderStatus.SCHEDULED


def after(stand: Stand, event: OrderEvent) -> Stand:
    """Where an order stands after an event. Raises Conflict with what would be allowed."""
    row = LIFE[stand.status]
    if event not in row:
        raise _refusal(stand.status, event.value)
    status = row[event]
    said = OrderStatus(event.value) if event in BY_EHR else stand.said
    return Stand(said if status is _BACK else status, said)


def event_of(stand: Stand, wanted: OrderStatus) -> OrderEvent | None:
    """What the EHR does by setting a status; None where it only repeats what is so. Raises
    Conflict for one that only images bring about."""
    if wanted in (OrderStatus.ARRIVING, OrderStatus.AVAILABLE):
        if wanted is not stand.status:
            raise _refusal(stand.status, wanted.value)
        return None
    return OrderEvent(wanted.value)


def allowed(status: OrderStatus) -> list[str]:
    """What the EHR may set an order to that stands there."""
    return [event.value for event in BY_EHR if event in LIFE[status]]


def _refusal(status: OrderStatus, wanted: str) -> Conflict:
    may = allowed(status)
    extra: dict[str, Any] = {"order_status": status.value, "allowed": may}
    if status is OrderStatus.CANCELLED:
        return Conflict("The order is cancelled; place a new one.", extra=extra)
    why = (
        "only the images that arrive bring that about"
        if wanted in (OrderStatus.ARRIVING, OrderStatus.AVAILABLE)
        else "images of it are arriving"
    )
    return Conflict(
        f"The order is {status.value} and can't be set to {wanted}: {why}. "
        f"It may be set to {', '.join(may)}.",
        extra=extra,
    )


@dataclass(frozen=True)
class Moved:
    """An order whose status changed, or whose images are complete for the first time."""

    order_id: UUID
    before: OrderStatus
    after: OrderStatus
    available: bool = False  # all its images have arrived, which was told just now
    reopened: bool = False  # they had, and none of them is linked any more

    @property
    def told(self) -> str:
        """For a record."""
        return f"{self.before.value} -> {self.after.value}"


async def images_changed(
    session: AsyncSession,
    order_ids: Iterable[UUID],
    *,
    complete: bool | None = None,
    study_instance_uid: str = "",
) -> list[Moved]:
    """Bring orders to where the images that are linked to them are now.

    Call it in the transaction that linked or unlinked them, after it has written, for all orders
    concerned. `complete`: True when the study that changed, `study_instance_uid`, is stable in the
    archive, False while it grows, None where it isn't known (an unlinking, a deletion). An order
    is complete when no other of its studies is known to be growing. The EHR is told
    `order-available` once each time; wake the worklist after the commit. Orders that are cancelled
    stay so.
    """
    changed = _Changed(complete, study_instance_uid)
    moved = [await _move(session, order_id, changed) for order_id in sorted(set(order_ids))]
    return [each for each in moved if each is not None]


async def orders_of(session: AsyncSession, study_instance_uid: str) -> list[UUID]:
    """The orders that a study answers."""
    found = await session.exec(
        select(OrderStudy.order_id).where(OrderStudy.study_instance_uid == study_instance_uid)
    )
    return list(found)


async def set_status(session: AsyncSession, order_id: UUID, wanted: OrderStatus) -> Moved:
    """What the EHR says, whatever happens at the same moment. Raises Conflict."""
    for _ in range(_TRIES):
        row = await _row(session, order_id)
        if row is None:
            break
        event = event_of(row.stand, wanted)
        stand = row.stand if event is None else after(row.stand, event)
        values: dict[str, Any] = {"worklist_problem": ""}  # said again, where it still holds
        reopened = stand.status in (OrderStatus.SCHEDULED, OrderStatus.IN_PROGRESS)
        if event is OrderEvent.SCHEDULE or (reopened and stand.status != row.stand.status):
            values["fulfilled_at"] = None
            if await _newest(session, order_id) is not None:
                values["reopened_at"] = utcnow()
        if await _write(session, order_id, row, stand, values):
            return Moved(order_id, row.stand.status, stand.status)
    raise Conflict("The order was changed at the same moment; read it and try again.")


@dataclass(frozen=True)
class _Row:
    stand: Stand
    fulfilled_at: datetime | None
    reopened_at: datetime | None


async def _row(session: AsyncSession, order_id: UUID) -> _Row | None:
    """The order as it is committed, or as this transaction has changed it; on PostgreSQL nobody
    else changes it then."""
    columns: list[Any] = [Order.status, Order.ehr_status, Order.fulfilled_at, Order.reopened_at]
    found = (
        await (await session.connection()).execute(
            sa.select(*columns).where(col(Order.id) == order_id).with_for_update()
        )
    ).first()
    if found is None:
        return None
    status, said, fulfilled_at, reopened_at = found
    return _Row(Stand(status, OrderStatus(said)), fulfilled_at, reopened_at)


async def _write(
    session: AsyncSession, order_id: UUID, row: _Row, stand: Stand, values: Mapping[str, Any]
) -> bool:
    """Write where the order stands now, if it still stands where it did. (SQLite locks no row.)"""
    changed = await session.exec(
        sa.update(Order)
        .where(
            col(Order.id) == order_id,
            col(Order.status) == row.stand.status,
            col(Order.ehr_status) == row.stand.said.value,
            col(Order.fulfilled_at).is_not_distinct_from(row.fulfilled_at),
        )
        .values(status=stand.status, ehr_status=stand.said.value, updated_at=utcnow(), **values)
        .execution_options(synchronize_session=False)
    )
    return changed.rowcount == 1


@dataclass(frozen=True)
class _Changed:
    complete: bool | None
    study_instance_uid: str


async def _move(session: AsyncSession, order_id: UUID, changed: _Changed) -> Moved | None:
    for _ in range(_TRIES):
        row = await _row(session, order_id)
        if row is None:
            return None
        event = await _event(session, order_id, row, changed)
        if event is None:
            return None
        stand = after(row.stand, event)
        cancelled = stand.status is OrderStatus.CANCELLED
        available = (
            event is OrderEvent.IMAGES_COMPLETE and row.fulfilled_at is None and not cancelled
        )
        fulfilled = utcnow() if available else row.fulfilled_at
        if event is OrderEvent.IMAGES_GONE:
            fulfilled = None
        if stand == row.stand and fulfilled == row.fulfilled_at:
            return None
        if not await _write(session, order_id, row, stand, {"fulfilled_at": fulfilled}):
            continue
        if available:
            await _tell(session, order_id)
        reopened = row.fulfilled_at is not None and fulfilled is None
        return Moved(order_id, row.stand.status, stand.status, available, reopened)
    raise Conflict("The order was changed at the same moment; try again.")


async def _event(
    session: AsyncSession, order_id: UUID, row: _Row, changed: _Changed
) -> OrderEvent | None:
    """What the images say; None: nothing that the EHR, which wants more of them, doesn't know."""
    linked = (
        await session.exec(
            select(OrderStudy.study_instance_uid).where(OrderStudy.order_id == order_id)
        )
    ).all()
    if not linked:
        return OrderEvent.IMAGES_GONE
    if row.reopened_at is not None and row.fulfilled_at is None:
        newest = await _newest(session, order_id)
        if newest is None or newest <= row.reopened_at:
            return None
    known = dict(
        iter(
            await session.exec(
                select(col(Arrival.study_instance_uid), sa.func.min(_number(Arrival.stable)))
                .where(
                    col(Arrival.study_instance_uid).in_(linked),
                    Arrival.state != ArrivalState.GONE.value,
                )
                .group_by(col(Arrival.study_instance_uid))
            )
        )
    )
    if changed.complete is None:
        whole = len(known) == len(linked) and all(known.values())
    else:
        known.pop(changed.study_instance_uid, None)
        whole = changed.complete and all(known.values())
    return OrderEvent.IMAGES_COMPLETE if whole else OrderEvent.IMAGES_ARRIVING


def _number(flag: Any) -> sa.Case[Any]:
    return sa.case((col(flag), 1), else_=0)


async def _newest(session: AsyncSession, order_id: UUID) -> datetime | None:
    """When the last image was taken in that is linked to an order; None without images."""
    newest: Any = sa.func.max(col(Instance.received_at))
    found = await (await session.connection()).execute(
        sa.select(newest)
        .select_from(OrderStudy)
        .join(Instance, col(Instance.study_instance_uid) == col(OrderStudy.study_instance_uid))
        .where(col(OrderStudy.order_id) == order_id)
    )
    return cast(datetime | None, found.scalar())


async def _tell(session: AsyncSession, order_id: UUID) -> None:
    """Ids only: what an order holds is asked for, by whoever may see it."""
    first = (
        await session.exec(
            select(OrderStudy.study_instance_uid)
            .where(OrderStudy.order_id == order_id)
            .order_by(col(OrderStudy.linked_at), col(OrderStudy.study_instance_uid))
            .limit(1)
        )
    ).one()
    body = {"order_id": order_id, "study_instance_uid": first, "at": utcnow()}
    await Notifications.add(session, Event.ORDER_AVAILABLE, body)
