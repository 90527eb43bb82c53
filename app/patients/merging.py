"""Two records of one patient become one, and are taken apart again (HL7 ADT^A40, A37).

All that was the retired patient's is the survivor's from then on, and who may see it is decided by
the survivor's facts: the ties of both, and the stricter restriction. Each row that moved is noted
(`MergedRow`), so that taking apart restores what was there. What came since stays with the
survivor, but for studies under the retired patient's own number. Nothing in the archive changes.

The trail keeps its records under the ids that they were written with.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app import aliases
from app.access import PatientAccess
from app.aliases import refuse_retired
from app.db import insert_if_absent, utcnow
from app.errors import Conflict, Unprocessable
from app.models import (
    Arrival,
    ArrivalCandidate,
    ArrivalState,
    BrokenGlass,
    LaunchSession,
    MergedRow,
    Order,
    OrderStudy,
    Patient,
    PatientMerge,
    Study,
)
from app.orderlife import images_changed
from app.patients.rights import join_rights, part_rights

_AT_ONCE = 500  # values of one IN
_MOVED: Sequence[tuple[str, Any, Any]] = (
    ("study", Study, Study.study_instance_uid),
    ("order", Order, Order.id),
    ("session", LaunchSession, LaunchSession.ctx),
    ("glass", BrokenGlass, BrokenGlass.id),
    ("arrival", Arrival, Arrival.orthanc_id),
)
_WAITING = (
    ArrivalState.ARRIVING.value,
    ArrivalState.PROPOSED.value,
    ArrivalState.UNMATCHED.value,
    ArrivalState.CONFLICTING.value,
)


@dataclass(frozen=True)
class Merged:
    """What a merge did. `under_other_number`: studies whose files carry another PatientID than the
    survivor's, which a viewer shows: UID and PatientID."""

    merge: PatientMerge
    moved: dict[str, int]
    under_other_number: list[tuple[str, str]]
    restriction: str | None  # the level that holds now


@dataclass(frozen=True)
class Decisions:
    """What the EHR says of things that came after the merge: True for those that are the retired
    patient's; and which links between the two records are wrong."""

    orders: dict[UUID, bool] = field(default_factory=dict)
    studies: dict[str, bool] = field(default_factory=dict)
    unlink: frozenset[tuple[UUID, str]] = frozenset()


async def merge(
    source: PatientAccess, target: PatientAccess, source_id: UUID, target_id: UUID, reason: str
) -> Merged:
    """Retire one patient into another, in the accesses' transaction, on record under both.

    Raises Unprocessable for a patient and themselves, Conflict where either is retired already.
    """
    if source_id == target_id:
        raise Unprocessable("A patient can't be merged into themselves.")
    session = target.session
    await aliases.lock(session, [source_id, target_id])
    for access, named in ((source, source_id), (target, target_id)):
        current = await aliases.survivor(session, named)
        refuse_retired(current or access.patient, named)
    done = PatientMerge(
        patient_id=source_id, into_id=target_id, reason=reason, merged_by=target.principal.sub
    )
    session.add(done)
    await session.flush()
    rights = await join_rights(session, done, target.principal.sub)
    moved = {}
    for kind, table, key in _MOVED:
        moved[kind] = await _move(session, done, kind, table, key)
    await session.exec(
        sa.update(Patient)
        .where(col(Patient.id) == source_id)
        .values(merged_into=target_id)
        .execution_options(synchronize_session=False)
    )
    await _show_to_survivor(session, done)
    await look_again(session, source_id, target_id)
    told: dict[str, Any] = dict(rights, merge_id=str(done.id), moved=moved)
    told["reason"] = reason
    await source.done(patient_id=source_id, detail={**told, "merged_into": str(target_id)})
    await target.done(patient_id=target_id, detail={**told, "merged": str(source_id)})
    after = rights["restriction"]["after"]
    return Merged(
        done, moved, await _under_other_number(session, target_id), after and after["level"]
    )


async def unmerge(
    access: PatientAccess, retired_id: UUID, reason: str, decisions: Decisions
) -> PatientMerge:
    """Give the retired patient back what was theirs, on record under both.

    Raises Conflict: not merged; the survivor was merged in turn, which has to be taken apart
    first; or `undecided`, links between what would be of two patients, and studies of whom nobody
    can tell. Unprocessable for decisions about what is not to be decided.
    """
    session, survivor_id = access.session, access.patient.id
    done = await _standing(session, retired_id)
    await aliases.lock(session, [retired_id, survivor_id])
    done = await _standing(session, retired_id)
    current = await aliases.survivor(session, retired_id)
    if done.into_id != survivor_id or current is None or current.id != survivor_id:
        raise Conflict(
            "The patient that this one was merged into was merged in turn; take that apart first.",
            extra={"first": str(done.into_id)},
        )
    split = await _split(session, done, decisions)
    for order_id, uid in sorted(decisions.unlink):
        await session.exec(
            sa.delete(OrderStudy).where(
                col(OrderStudy.order_id) == order_id, col(OrderStudy.study_instance_uid) == uid
            )
        )
    await session.exec(
        sa.update(Patient)
        .where(col(Patient.id) == retired_id)
        .values(merged_into=None)
        .execution_options(synchronize_session=False)
    )
    back = {
        "study": await _give_back(session, done, Study, Study.study_instance_uid, split.studies),
        "order": await _give_back(session, done, Order, Order.id, split.orders),
    }
    for kind, table, key in _MOVED[2:]:
        keys = [_key(kind, each) for each in (await _noted(session, done, kind))]
        back[kind] = await _give_back(session, done, table, key, keys)
    await _arrivals_follow(session, done)
    rights = await part_rights(session, done, access.principal.sub)
    await images_changed(session, [order_id for order_id, _ in decisions.unlink])
    done.unmerged_at, done.unmerged_by = utcnow(), access.principal.sub
    done.unmerge_reason = reason
    session.add(done)
    await session.flush()
    await look_again(session, retired_id, survivor_id)
    told: dict[str, Any] = dict(rights, merge_id=str(done.id), moved=back)
    told["reason"] = reason
    unlinked = [{"order_id": str(o), "study_instance_uid": uid} for o, uid in decisions.unlink]
    for patient_id in (retired_id, survivor_id):
        detail = {**told, "unmerged": str(retired_id), "unlinked": unlinked}
        await access.done(patient_id=patient_id, detail=detail)
    return done


# ------------------------------------------------------------------------------- together


async def _move(session: AsyncSession, done: PatientMerge, kind: str, table: Any, key: Any) -> int:
    """Move all rows of a table, and note each. How many."""
    theirs = table.patient_id == done.patient_id
    generation: Any = Study.generation if kind == "study" else sa.literal("")
    rows = (
        await (await session.connection()).execute(sa.select(key, generation).where(theirs))
    ).all()
    session.add_all(
        [
            MergedRow(
                merge_id=done.id,
                kind=kind,
                key=str(each),
                detail=json.dumps({"generation": made}) if made else "{}",
            )
            for each, made in rows
        ]
    )
    await session.flush()
    values: dict[str, Any] = {"patient_id": done.into_id}
    if kind == "order":
        values["updated_at"] = utcnow()  # what waits in the archive for it is looked at again
    await session.exec(
        sa.update(table).where(theirs).values(**values).execution_options(synchronize_session=False)
    )
    return len(rows)


async def _under_other_number(session: AsyncSession, patient_id: UUID) -> list[tuple[str, str]]:
    rows = await (await session.connection()).execute(
        sa.select(col(Study.study_instance_uid), col(Study.dicom_patient_id))
        .join(Patient, col(Patient.id) == col(Study.patient_id))
        .where(col(Patient.id) == patient_id, col(Study.dicom_patient_id) != col(Patient.mrn))
        .order_by(col(Study.study_instance_uid))
    )
    return [(uid, number) for uid, number in rows]


async def look_again(session: AsyncSession, *patient_ids: UUID) -> None:
    """Studies that wait in the archive and may be one of these patients' are judged anew."""
    numbers = select(Patient.mrn).where(col(Patient.id).in_(patient_ids))
    days = {f"{each.dob:%Y%m%d}" for each in await _patients(session, patient_ids)}
    await session.exec(
        sa.update(Arrival)
        .where(
            sa.or_(
                col(Arrival.orthanc_id).in_(_proposed(patient_ids)),
                col(Arrival.dicom_patient_id).in_(numbers),
                col(Arrival.patient_birth_date).in_(days),
            ),
            col(Arrival.state).in_(_WAITING),
            sa.not_(col(Arrival.held)),
        )
        .values(due_at=utcnow(), attempts=0)
        .execution_options(synchronize_session=False)
    )


async def _patients(session: AsyncSession, patient_ids: Sequence[UUID]) -> Sequence[Patient]:
    return (await session.exec(select(Patient).where(col(Patient.id).in_(patient_ids)))).all()


def _proposed(patient_ids: Sequence[UUID]) -> Any:
    return select(ArrivalCandidate.orthanc_id).where(
        col(ArrivalCandidate.patient_id).in_(patient_ids)
    )


async def _show_to_survivor(session: AsyncSession, done: PatientMerge) -> None:
    """What waits, and may be the retired one's, is shown to whoever may see the survivor."""
    for orthanc_id in (await session.exec(_proposed([done.patient_id]))).all():
        await session.exec(
            insert_if_absent(
                session, ArrivalCandidate, orthanc_id=orthanc_id, patient_id=done.into_id
            )
        )


# ---------------------------------------------------------------------------------- apart


async def _standing(session: AsyncSession, retired_id: UUID) -> PatientMerge:
    found = (
        await session.exec(
            select(PatientMerge)
            .where(PatientMerge.patient_id == retired_id, col(PatientMerge.unmerged_at).is_(None))
            .execution_options(populate_existing=True)
        )
    ).first()
    if found is None:
        raise Conflict("This patient is not merged into another.")
    return found


@dataclass(frozen=True)
class _Split:
    """The retired patient's share."""

    studies: list[str]
    orders: list[UUID]


async def _split(session: AsyncSession, done: PatientMerge, decisions: Decisions) -> _Split:
    """Which studies and orders go back. Raises Conflict with what has to be decided."""
    undecided: list[dict[str, Any]] = []
    studies = await _studies(session, done, decisions, undecided)
    orders = await _orders(session, done, decisions)
    links = await (await session.connection()).execute(
        sa.select(col(OrderStudy.order_id), col(OrderStudy.study_instance_uid))
        .join(Order, col(Order.id) == col(OrderStudy.order_id))
        .where(col(Order.patient_id) == done.into_id)
    )
    crossing = {
        (order_id, uid) for order_id, uid in links if (order_id in orders) != (uid in studies)
    }
    if unknown := decisions.unlink - crossing:
        order_id, uid = min(unknown, key=str)
        raise Unprocessable(
            f"`unlink` names order {order_id} and study {uid}, which would not be parted."
        )
    sides = ("survivor", "retired")
    undecided += [
        {
            "order_id": str(order_id),
            "order": sides[order_id in orders],
            "study_instance_uid": uid,
            "study": sides[uid in studies],
        }
        for order_id, uid in sorted(crossing - decisions.unlink, key=str)
    ]
    if undecided:
        raise Conflict(
            "Some of what the survivor has can't be taken apart without you; `undecided` says "
            "what. Name in `orders` and `studies` whose each is that came after the merge, or in "
            "`unlink` the links that are wrong.",
            extra={"undecided": undecided},
        )
    return _Split(sorted(studies), sorted(orders))


async def _studies(
    session: AsyncSession, done: PatientMerge, decisions: Decisions, undecided: list[dict[str, Any]]
) -> set[str]:
    """Those that moved, and those that came since under a number of the retired patient alone."""
    noted = await _noted(session, done, "study")
    retired = {
        done.patient_id,
        *(e.id for e in await aliases.retired_into(session, done.patient_id)),
    }
    known = {done.into_id, *(e.id for e in await aliases.retired_into(session, done.into_id))}
    patients = await session.exec(select(Patient).where(col(Patient.id).in_(retired | known)))
    numbers: dict[bool, set[str]] = {True: set(), False: set()}
    for each in patients:
        numbers[each.id in retired].add(each.mrn)
    theirs, asked = set(), set(decisions.studies)
    rows = await session.exec(select(Study).where(Study.patient_id == done.into_id))
    for study in rows:
        uid = study.study_instance_uid
        before = noted.get(uid)
        if before is not None and before.get("generation") == study.generation:
            theirs.add(uid)
        elif study.created_at <= done.merged_at or study.dicom_patient_id not in numbers[True]:
            continue
        elif study.dicom_patient_id not in numbers[False]:
            theirs.add(uid)
        elif uid not in decisions.studies:
            undecided.append(
                {"study_instance_uid": uid, "why": "Both patients have had its PatientID."}
            )
        else:
            asked.discard(uid)
            if decisions.studies[uid]:
                theirs.add(uid)
    if asked:
        raise Unprocessable(
            f"`studies` names {min(asked)}: whose it is follows from the merge, or its PatientID."
        )
    return theirs


async def _orders(session: AsyncSession, done: PatientMerge, decisions: Decisions) -> set[UUID]:
    """Those that moved, and those placed since that the EHR says are the retired patient's."""
    noted = {UUID(each) for each in await _noted(session, done, "order")}
    rows = await session.exec(
        select(col(Order.id), col(Order.created_at)).where(Order.patient_id == done.into_id)
    )
    placed = dict(iter(rows.all()))
    since = {each for each, at in placed.items() if at > done.merged_at} - noted
    if unknown := decisions.orders.keys() - since:
        raise Unprocessable(f"`orders` names {min(unknown)}, which was not placed since the merge.")
    return (noted & placed.keys()) | {each for each in since if decisions.orders.get(each)}


async def _noted(session: AsyncSession, done: PatientMerge, kind: str) -> dict[str, dict[str, Any]]:
    rows = await session.exec(
        select(MergedRow).where(MergedRow.merge_id == done.id, MergedRow.kind == kind)
    )
    return {each.key: json.loads(each.detail) for each in rows}


def _key(kind: str, text: str) -> Any:
    return UUID(text) if kind in ("glass", "order") else text


async def _give_back(
    session: AsyncSession, done: PatientMerge, table: Any, key: Any, keys: Sequence[Any]
) -> int:
    """Rows that are still the survivor's, of those named. How many."""
    count = 0
    for start in range(0, len(keys), _AT_ONCE):
        moved = await session.exec(
            sa.update(table)
            .where(key.in_(keys[start : start + _AT_ONCE]), table.patient_id == done.into_id)
            .values(patient_id=done.patient_id)
            .execution_options(synchronize_session=False)
        )
        count += moved.rowcount
    return count


async def _arrivals_follow(session: AsyncSession, done: PatientMerge) -> None:
    """What is linked is said to be whose its study is: also what came since, of which no row was
    noted. Else the survivor would be shown it, and more of it would be another's."""
    for whose, other in ((done.patient_id, done.into_id), (done.into_id, done.patient_id)):
        theirs = select(Study.orthanc_id).where(Study.patient_id == whose)
        await session.exec(
            sa.update(Arrival)
            .where(
                col(Arrival.state) == ArrivalState.LINKED.value,
                col(Arrival.patient_id) == other,
                col(Arrival.orthanc_id).in_(theirs),
            )
            .values(patient_id=whose, version=Arrival.version + 1)
            .execution_options(synchronize_session=False)
        )
