"""Which study of the archive is a copy of which, who makes it, and that one of them is linked.

A copy and what it was made of are the same images: of the original and all its copies at most one
is linked. A copy that is made belongs to an operation of the journal; once that is closed without
a link, the copy is what somebody who died or failed has left.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.arrivals import index
from app.audit import Operation
from app.audit.operations import entry_of_text
from app.db import insert_if_absent
from app.errors import Conflict
from app.models import Arrival, ArrivalState, OpenOperation, Study, StudyCopy

NOT_FINISHED = "a copy that was not finished"


@dataclass(frozen=True)
class Making:
    """A copy that this operation makes. `orthanc_id` and `study_instance_uid` are the copy's."""

    orthanc_id: str
    study_instance_uid: str
    operation: Operation
    original_goes: bool


async def claim(session: AsyncSession, original: Arrival, making: Making) -> None:
    """From here on the copy is known, told of to nobody, and linked by who makes it alone; what is
    already of it in the archive is nobody's. In the caller's transaction. `original.version` moves.

    Raises Conflict where the original was changed, another copy is being made, or one is linked.
    """
    await _bump(session, original, {})
    original.version += 1
    root = await _root_of(session, original.orthanc_id)
    await _refuse_under_way(session, root)
    await refuse_second(session, making.orthanc_id, root)
    if await session.get(Study, making.study_instance_uid) is not None:
        raise _linked_already(making.study_instance_uid)
    values = {
        "original_id": original.orthanc_id,
        "root_id": root,
        "operation": making.operation.id,
        "original_goes": making.original_goes,
    }
    await _put(session, StudyCopy, making.orthanc_id, values)
    hidden = {
        "study_instance_uid": making.study_instance_uid,
        "state": ArrivalState.ARRIVING.value,
        "held": True,
        "due_at": None,
        "decision": NOT_FINISHED,
        "patient_id": None,
        "order_id": None,
    }
    # Whoever has seen an earlier copy has not seen this one.
    await _put(session, Arrival, making.orthanc_id, hidden, version=Arrival.version + 1)


async def finish(
    session: AsyncSession, original: Arrival, making: Making, columns: dict[str, Any]
) -> None:
    """The copy is whole, and the original waits no longer; `columns` are its new ones. In the
    transaction that links the copy. Raises Conflict where either was changed meanwhile."""
    mine = await session.exec(
        sa.update(StudyCopy)
        .where(
            col(StudyCopy.orthanc_id) == making.orthanc_id,
            col(StudyCopy.operation) == making.operation.id,
        )
        .values(operation="")
        .execution_options(synchronize_session=False)
    )
    if mine.rowcount != 1:
        raise Conflict("This took so long that it was given up meanwhile. Nothing was linked.")
    closed = {"state": ArrivalState.REJECTED.value, "held": True, "due_at": None}
    await _bump(session, original, {**columns, **closed})
    # What the archive has said of the copy since is not news.
    await session.exec(
        sa.update(Arrival)
        .where(col(Arrival.orthanc_id) == making.orthanc_id)
        .values(due_at=None)
        .execution_options(synchronize_session=False)
    )


async def refuse_second(session: AsyncSession, orthanc_id: str, root: str = "") -> None:
    """Of the same images one study is linked. Until the transaction ends nobody links another.
    `root`: of what it is a copy, if that is not on record yet. Raises Conflict."""
    root = root or await _root_of(session, orthanc_id)
    # An update that changes nothing holds the rows, on either database.
    await session.exec(
        sa.update(StudyCopy)
        .where(col(StudyCopy.root_id) == root)
        .values(root_id=root)
        .execution_options(synchronize_session=False)
    )
    await refuse_linked(session, orthanc_id, root)


async def refuse_linked(session: AsyncSession, orthanc_id: str, root: str = "") -> None:
    """As `refuse_second`, of this moment only."""
    root = root or await _root_of(session, orthanc_id)
    copies = select(StudyCopy.orthanc_id).where(StudyCopy.root_id == root)
    linked = await session.exec(
        select(Study.study_instance_uid).where(
            sa.or_(col(Study.orthanc_id) == root, col(Study.orthanc_id).in_(copies)),
            col(Study.orthanc_id) != orthanc_id,
        )
    )
    uid = linked.first()
    if uid is not None:
        raise _linked_already(uid)


async def left_behind(session: AsyncSession) -> Sequence[StudyCopy]:
    """Copies that nobody makes any more, and that the archive may hold something of."""
    found = await session.exec(
        select(StudyCopy)
        .join(Arrival, col(Arrival.orthanc_id) == col(StudyCopy.orthanc_id))
        .where(
            StudyCopy.operation != "",
            col(StudyCopy.operation).not_in(select(OpenOperation.id)),
            Arrival.state != ArrivalState.GONE.value,
        )
        .order_by(col(StudyCopy.orthanc_id))
        .limit(100)
    )
    return found.all()


async def take_over(session: AsyncSession, copy: StudyCopy, *, abandoned: bool) -> bool:
    """Until the transaction ends nobody else makes this copy. False: it was finished, somebody has
    begun anew or, where it has to be `abandoned`, its operation is open."""
    nobodys = col(StudyCopy.operation).not_in(select(OpenOperation.id))
    held = await session.exec(
        sa.update(StudyCopy)
        .where(
            col(StudyCopy.orthanc_id) == copy.orthanc_id,
            col(StudyCopy.operation) == copy.operation,
            nobodys if abandoned else sa.true(),
        )
        .values(operation=copy.operation)
        .execution_options(synchronize_session=False)
    )
    return bool(held.rowcount)


async def whose_original_goes(session: AsyncSession) -> Sequence[StudyCopy]:
    """Copies that are linked, or were, whose originals are still to be removed."""
    found = await session.exec(
        select(StudyCopy)
        .where(col(StudyCopy.original_goes), StudyCopy.operation == "")
        .order_by(col(StudyCopy.orthanc_id))
        .limit(100)
    )
    return found.all()


async def _root_of(session: AsyncSession, orthanc_id: str) -> str:
    row = await session.get(StudyCopy, orthanc_id, populate_existing=True)
    return row.root_id if row is not None else orthanc_id


async def _refuse_under_way(session: AsyncSession, root: str) -> None:
    asked = await session.exec(
        select(OpenOperation.asked)
        .join(StudyCopy, col(StudyCopy.operation) == col(OpenOperation.id))
        .where(StudyCopy.root_id == root)
    )
    text = asked.first()
    if text is not None:
        raise Conflict(
            f"{entry_of_text(text).actor} is making a copy of this study at this moment. Look at "
            "it again soon."
        )


async def _bump(session: AsyncSession, row: Arrival, values: dict[str, Any]) -> None:
    changed = await session.exec(
        sa.update(Arrival)
        .where(col(Arrival.orthanc_id) == row.orthanc_id, col(Arrival.version) == row.version)
        .values(**values, version=row.version + 1)
        .execution_options(synchronize_session=False)
    )
    if changed.rowcount != 1:
        await index.refuse_changed(session, row)


async def _put(
    session: AsyncSession,
    table: type[Arrival] | type[StudyCopy],
    orthanc_id: str,
    values: dict[str, Any],
    **more: Any,
) -> None:
    await session.exec(insert_if_absent(session, table, orthanc_id=orthanc_id, **values))
    await session.exec(
        sa.update(table)
        .where(col(table.orthanc_id) == orthanc_id)
        .values(**values, **more)
        .execution_options(synchronize_session=False)
    )


def _linked_already(uid: str) -> Conflict:
    return Conflict(
        f"The same images are linked already, as the study {uid}. Undo that link first."
    )
