"""Who is shown a study that waits: by the patients whose it may be, or is.

A study is shown to whoever may see one of them, unless another of them is restricted and does not
admit the caller, or is one whom the EHR refuses them: it may be that one's. A study that comes near
nobody is shown to all whose role knows the list and whose token is not limited to one patient.
"""

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from uuid import UUID

import sqlalchemy as sa
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.access import Denial, PatientAccess, Reason, Relation, RoleAccess, Subject, VisiblePatients
from app.access.gate import entry_of
from app.access.policy import ANY_PATIENT, clauses, sufficing, visible
from app.audit import Action, Outcome
from app.db import utcnow
from app.dicom import parse_uid
from app.errors import NotFound, Unprocessable
from app.identity import Principal
from app.models import WAITING, Arrival, ArrivalCandidate, ArrivalState, Patient, Study

LISTED = (*WAITING, ArrivalState.REJECTED)
NOTHING_WAITS = "No study of this StudyInstanceUID waits here."
_LINKED = ArrivalState.LINKED.value
_TOLD_OF = frozenset({*(each.value for each in LISTED), _LINKED})


def shown_to(principal: Principal, action: Action, now: datetime) -> sa.ColumnElement[bool]:
    """Which rows of `Arrival` our own policy shows the caller for this action. The EHR may narrow
    it: see `confirmed`."""
    closed = _concerns(sa.not_(_admits(principal, action, now)))
    seen = _concerns(visible(principal, action, now))
    if principal.patient is not None:
        return sa.and_(sa.not_(closed), seen)
    nobodys = sa.and_(col(Arrival.state) != _LINKED, sa.not_(_concerns(sa.true())))
    return sa.and_(sa.not_(closed), sa.or_(seen, nobodys))


def _admits(principal: Principal, action: Action, now: datetime) -> sa.ColumnElement[bool]:
    """Which rows of `Patient` no restriction closes to the caller: a broken glass opens them for
    what it suffices for, which is to read."""
    ways = sufficing(principal, action)
    if ANY_PATIENT in ways:
        return sa.true()
    holds = clauses(principal, now)
    if Relation.BROKE_GLASS not in frozenset().union(*ways):
        return holds[Relation.ADMITTED]
    return sa.or_(holds[Relation.ADMITTED], holds[Relation.BROKE_GLASS])


def _concerns(condition: sa.ColumnElement[bool]) -> sa.ColumnElement[bool]:
    """Is the row of `Arrival` concerned with a patient of whom `condition` holds? See `concerned`,
    which says the same of rows."""
    one = sa.select(sa.literal(1)).where(condition)
    proposed = one.join_from(
        ArrivalCandidate, Patient, col(Patient.id) == col(ArrivalCandidate.patient_id)
    ).where(
        col(ArrivalCandidate.orthanc_id) == col(Arrival.orthanc_id), col(Arrival.state) != _LINKED
    )
    decided = one.select_from(Patient).where(col(Patient.id) == col(Arrival.patient_id))
    owned = one.join_from(Study, Patient, col(Patient.id) == col(Study.patient_id)).where(
        col(Study.study_instance_uid) == col(Arrival.study_instance_uid)
    )
    return sa.or_(*(each.correlate(Arrival).exists() for each in (proposed, decided, owned)))


async def concerned(session: AsyncSession, rows: Sequence[Arrival]) -> dict[str, set[UUID]]:
    """By Orthanc id, the patients whose each study may be: the candidates, unless it is linked;
    whose it certainly is; and whose images of the same StudyInstanceUID are linked already."""
    found = {each.orthanc_id: {each.patient_id} - {None} for each in rows}
    waiting = [each.orthanc_id for each in rows if each.state != _LINKED]
    proposed = await session.exec(
        select(ArrivalCandidate).where(col(ArrivalCandidate.orthanc_id).in_(waiting))
    )
    for candidate in proposed:
        found[candidate.orthanc_id].add(candidate.patient_id)
    owners = await session.exec(
        select(Arrival.orthanc_id, Study.patient_id)
        .join(Study, col(Study.study_instance_uid) == col(Arrival.study_instance_uid))
        .where(col(Arrival.orthanc_id).in_(found))
    )
    for orthanc_id, patient_id in owners:
        found[orthanc_id].add(patient_id)
    return {key: {each for each in ids if each is not None} for key, ids in found.items()}


async def confirmed(window: VisiblePatients, rows: Sequence[Arrival]) -> list[Arrival]:
    """Of rows that our policy shows, those that the EHR, where it has a say, does not take away."""
    if window.gate.ehr is None or not rows:
        return list(rows)
    whose = await concerned(window.session, rows)
    every = set().union(*whose.values())
    named = select(Patient).where(col(Patient.id).in_(every))
    tied = {each.id for each in await window.session.exec(named.where(window.condition))}
    asked = await window.only(named)
    refused = tied - {each.id for each in await window.session.exec(asked)}
    return [
        each
        for each in rows
        if not whose[each.orthanc_id]
        or (whose[each.orthanc_id] & tied and not whose[each.orthanc_id] & refused)
    ]


async def row_of(caller: RoleAccess, uid: str) -> Arrival:
    """The row of a study. Who may see it is not decided yet: see `admitted`. Raises NotFound, which
    is recorded; Conflict for a UID under two patients."""
    try:
        parse_uid(uid)
    except ValueError as error:
        raise Unprocessable(f"The study's UID in the path is not valid: {error}") from error
    rows = await caller.session.exec(
        select(Arrival)
        .where(Arrival.study_instance_uid == uid, Arrival.state != ArrivalState.GONE.value)
        .order_by(col(Arrival.orthanc_id))
    )
    found = rows.all()
    await caller.session.commit()  # only read so far
    if found:
        caller.session.expunge(found[0])  # what is noted in it is not written by the way
        return found[0]
    if await caller.session.get(Study, uid) is not None:
        await caller.admit(Subject.STUDY, uid)
    else:
        await caller.unknown({"study_instance_uid": uid})
    raise NotFound(NOTHING_WAITS)


async def admitted(
    caller: RoleAccess, row: Arrival, *, record_grant: bool = True
) -> list[PatientAccess]:
    """The accesses to those patients whose the study may be, or is, and whom the caller may see.
    Empty where it comes near nobody, which a role is enough for.

    Raises NotFound where one of them is restricted and does not admit the caller, which is recorded
    under that patient, and for a study that nobody is told of yet; Denial where the EHR refuses one
    of them, or the caller may see none; EhrUnavailable.
    """
    if row.state not in _TOLD_OF:
        await caller.unknown({"study_instance_uid": row.study_instance_uid})
        raise NotFound(NOTHING_WAITS)
    named = (await concerned(caller.session, [row]))[row.orthanc_id]
    await _refuse_closed(caller, row, named)
    if not named:
        entry = replace(
            entry_of(caller.principal, caller.action, caller.origin),
            study_instance_uid=row.study_instance_uid,
        )
        await caller.gate.role_check(
            caller.principal, entry, record_grant=record_grant, of_no_patient=True
        )
        return []
    found: list[PatientAccess] = []
    denials: list[Denial] = []
    for patient_id in sorted(named):
        try:
            found.append(await _admit(caller, patient_id, record_grant=record_grant))
        except Denial as denial:
            denials.append(denial)
    refused = [each for each in denials if each.reason is Reason.EHR]
    if refused or not found:
        raise (refused or denials)[0]
    return found


async def _admit(caller: RoleAccess, patient_id: UUID, *, record_grant: bool) -> PatientAccess:
    if record_grant:
        return await caller.admit(Subject.PATIENT, patient_id)
    return await caller.gate.patient_access(
        caller.session,
        caller.principal,
        caller.action,
        caller.origin,
        Subject.PATIENT,
        patient_id,
        record_grant=False,
    )


async def _refuse_closed(caller: RoleAccess, row: Arrival, named: set[UUID]) -> None:
    admits = _admits(caller.principal, caller.action, utcnow())
    closed = select(Patient.id).where(col(Patient.id).in_(named), sa.not_(admits))
    found = (await caller.session.exec(closed.order_by(col(Patient.id)))).all()
    await caller.session.commit()  # only read so far
    if not found:
        return
    entry = replace(
        entry_of(caller.principal, caller.action, caller.origin),
        outcome=Outcome.DENIED,
        reason=Reason.RESTRICTED.value,
        study_instance_uid=row.study_instance_uid,
    )
    await caller.gate.trail.record(*(replace(entry, patient_id=each) for each in found))
    raise NotFound(NOTHING_WAITS)
