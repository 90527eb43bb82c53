"""The list of the studies that wait, as the caller may see them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlmodel import col, select

from app.access import PatientAccess, RoleAccess, VisiblePatients
from app.access.gate import entry_of
from app.arrivals.sight import admitted, confirmed, row_of, shown_to
from app.db import utcnow
from app.errors import Unprocessable
from app.matching import Code
from app.matching.codes import MEANING
from app.models import WAITING, Arrival, ArrivalState, Order, Patient

SORTS: Mapping[str, Any] = {
    "arrived_at": col(Arrival.arrived_at),
    "name": col(Arrival.folded_name),
    "state": col(Arrival.state),
    "study_date": col(Arrival.study_date),
}
_BATCH = 100  # rows about whose patients the EHR is asked at once
_MOST_BATCHES = 20


@dataclass(frozen=True)
class Shown:
    """A candidate whom the caller may see. `order` is None for the patient without one."""

    patient: Patient
    order: Order | None
    score: int
    speaks_for: list[dict[str, str]]
    speaks_against: list[dict[str, str]]


@dataclass(frozen=True)
class Waiting:
    """A row, its reasons, and its candidates, best first."""

    row: Arrival
    reasons: list[dict[str, str]]
    candidates: list[Shown]


@dataclass(frozen=True)
class Wanted:
    """What a list asks: empty states mean all that wait. `after` is the Orthanc id of the
    last row of the page before, `-` before the sort means the other way round."""

    states: tuple[ArrivalState, ...] = ()
    sort: str = "arrived_at"
    after: str = ""
    limit: int = 50


async def find(window: VisiblePatients, wanted: Wanted) -> tuple[list[Waiting], str | None]:
    """A page, and the key of its last row where there are more. On record.

    Raises Unprocessable for a key that is no row's which the caller may see, and where the EHR
    takes away so many rows that none is found within `_MOST_BATCHES`; EhrUnavailable.
    """
    column = SORTS[wanted.sort.removeprefix("-")]
    down = wanted.sort.startswith("-")
    states = [each.value for each in wanted.states or WAITING]
    shown = shown_to(window.principal, window.action, utcnow())
    key = (column, col(Arrival.orthanc_id))
    query = (
        select(Arrival)
        .where(col(Arrival.state).in_(states), shown)
        .order_by(*((each.desc() for each in key) if down else key))
    )
    size = wanted.limit + 1 if window.gate.ehr is None else max(wanted.limit + 1, _BATCH)
    last = await _reached(window, wanted.after, shown) if wanted.after else None
    found: list[Arrival] = []
    for _ in range(_MOST_BATCHES):
        rest = query if last is None else query.where(_beyond(last, wanted.sort))
        batch = (await window.session.exec(rest.limit(size))).all()
        found += await confirmed(window, batch)
        more = len(batch) == size
        if len(found) > wanted.limit or not more:
            break
        last = batch[-1]
    if more and not found:
        raise Unprocessable(
            "The EHR shows you none of the studies that come first here: filter more closely, or "
            "sort otherwise."
        )
    page = found[: wanted.limit]
    there_is_more = len(found) > wanted.limit or more
    return await _shown(window, page), page[-1].orthanc_id if page and there_is_more else None


async def _reached(window: VisiblePatients, key: str, shown: sa.ColumnElement[bool]) -> Arrival:
    """The row that the page before ended with. Who may not see it learns nothing of where it
    stands. Raises Unprocessable."""
    query = select(Arrival).where(Arrival.orthanc_id == key, shown)
    found = await confirmed(window, (await window.session.exec(query)).all())
    if not found:
        raise Unprocessable("`cursor` is not one that this API gave; start from the first page.")
    return found[0]


def _beyond(last: Arrival, sort: str) -> sa.ColumnElement[bool]:
    """Which rows come after this one."""
    column = SORTS[sort.removeprefix("-")]
    here = sa.tuple_(column, col(Arrival.orthanc_id))
    there = sa.tuple_(
        sa.literal(getattr(last, column.key), column.type), sa.literal(last.orthanc_id)
    )
    return here < there if sort.startswith("-") else here > there


async def one(caller: RoleAccess, uid: str) -> Waiting:
    """A study that waits, was rejected, or is linked, for who may decide about it. Each candidate
    that is shown is recorded. Raises NotFound, Denial."""
    row = await row_of(caller, uid)
    patients = {each.patient.id: each.patient for each in await admitted(caller, row)}
    return await _whole(caller, row, _proposals(row), patients)


async def _shown(window: VisiblePatients, rows: Sequence[Arrival]) -> list[Waiting]:
    """With the candidates whom the caller may see; each of them is recorded."""
    proposals = {each.orthanc_id: _proposals(each) for each in rows}
    named = {UUID(p["patient_id"]) for these in proposals.values() for p in these}
    asked = await window.only(select(Patient).where(col(Patient.id).in_(named)))
    patients = {each.id: each for each in await window.session.exec(asked)}
    shown, disclosed = [], set()
    for row in rows:
        whole = await _whole(window, row, proposals[row.orthanc_id], patients)
        disclosed |= {each.patient.id for each in whole.candidates}
        shown.append(whole)
    if shown:
        entry = entry_of(window.principal, window.action, window.origin)
        studies = [each.row.study_instance_uid for each in shown]
        await window.gate.trail.record(replace(entry, detail={"studies": studies}))
    await window.disclose(disclosed)
    return shown


async def _whole(
    window: VisiblePatients | RoleAccess,
    row: Arrival,
    proposals: Sequence[Mapping[str, Any]],
    patients: Mapping[UUID, Patient],
) -> Waiting:
    """Of these patients alone, and their orders."""
    seen = [each for each in proposals if UUID(each["patient_id"]) in patients]
    named = [UUID(each["order_id"]) for each in seen if each["order_id"]]
    query = select(Order).where(col(Order.id).in_(named), col(Order.patient_id).in_(patients))
    orders = {each.id: each for each in await window.session.exec(query)}
    candidates = [
        Shown(
            patients[UUID(each["patient_id"])],
            orders.get(UUID(each["order_id"])) if each["order_id"] else None,
            each["score"],
            each["for"],
            each["against"],
        )
        for each in seen
    ]
    return Waiting(row, _reasons(row, whole=len(seen) == len(proposals)), candidates)


def _proposals(row: Arrival) -> list[dict[str, Any]]:
    if row.state == ArrivalState.LINKED.value and row.patient_id is not None:
        return _link_of(row)
    found: list[dict[str, Any]] = json.loads(row.candidates)
    return found


def _link_of(row: Arrival) -> list[dict[str, Any]]:
    """Whose a linked study is, as a candidate."""
    order = str(row.order_id) if row.order_id else None
    return [
        {
            "patient_id": str(row.patient_id),
            "order_id": order,
            "score": 100,
            "for": json.loads(row.reasons),
            "against": [],
        }
    ]


def _reasons(row: Arrival, *, whole: bool) -> list[dict[str, str]]:
    """The words may quote any candidate: only for who may see them all."""
    found: list[dict[str, str]] = json.loads(row.reasons)
    return found if whole else [{**each, "words": _plainly(each["code"])} for each in found]


def _plainly(code: str) -> str:
    try:
        words = MEANING[Code(code)].words
    except ValueError:
        return ""
    return "" if "{" in words else words


async def arriving(
    window: PatientAccess | VisiblePatients, orders: Sequence[Order]
) -> dict[UUID, Arrival]:
    """The studies that certainly answer these orders and still grow: none for most."""
    rows = await window.session.exec(
        select(Arrival).where(
            col(Arrival.order_id).in_([each.id for each in orders]),
            Arrival.state == ArrivalState.ARRIVING.value,
            col(Arrival.rule) != "",
        )
    )
    return {each.order_id: each for each in rows if each.order_id is not None}
