"""Who saw a patient's data, when, and under what right: the trail told to the patient.

One entry for each person and day (UTC). A right is named in words. A record that names none (the
outcome of a change: its grant does) has those that its person was granted for the same action that
day, or for any other.
Only records of this patient are read (and of those who were merged into them), and only studies
that are still this patient's are described. What was seen of a patient's studies and orders while
their record was merged is theirs, once it is taken apart again, and not the other one's.
"""

import json
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.access import PatientAccess, Relation
from app.aliases import retired_into
from app.audit import Action, Outcome
from app.audit.known import Known, look_up
from app.models import AuditRecord, LaunchSession, MergedRow, Order, PatientMerge, Study

ROWS_AT_ONCE = 500
_AFTERWARDS = timedelta(
    minutes=1
)  # what was decided before a merge was taken apart, and kept after
_LIGHTBOX = ("lightbox", "")  # the actor of what no person asked for, who has no address

RIGHTS: Mapping[str, str] = {
    Relation.ATTENDS.value: "attends one of your examinations",
    Relation.BROKE_GLASS.value: "emergency access (break the glass)",
    Relation.CARE_TEAM.value: "on your care team",
    Relation.REQUESTED.value: "requested one of your examinations",
    Relation.SITE_IMAGING.value: "works in imaging where you were examined",
    Relation.SITE_SCHEDULED.value: "works in imaging where an examination of yours was under way",
    Relation.UPLOADED.value: "recorded images of you",
}
EMERGENCY = RIGHTS[Relation.BROKE_GLASS.value]
ROLES: Mapping[str, str] = {
    "admin": "administrator",
    "auditor": "auditor",
    "clinician": "clinician",
    "radiologist": "radiologist",
    "service": "the hospital's own system",
    "technologist": "technologist",
}
BY_ROLE = "by role"
UNKNOWN = "somebody unknown"

VIEWED, DOWNLOADED = "images viewed", "images downloaded"
LINKED, WEIGHED = "put images to an order, or took them off", "looked at whose images they may be"
WAYS: Mapping[str, str] = {
    Action.ACCESS_EXPLAIN: "asked who may see your images",
    Action.ACCESS_REPORT: "made this report",
    Action.ARRIVAL_LIST: "saw your name beside images whose patient was not known yet",
    Action.AUDIT_READ: "read the record of who saw what",
    Action.CARE_TEAM_READ: "read your care team",
    Action.CARE_TEAM_WRITE: "changed your care team",
    Action.GLASS_BREAK: "declared an emergency",
    Action.GLASS_REVIEW: "reviewed an emergency access",
    Action.ORDER_CREATE: "placed an order",
    Action.ORDER_LIST: "saw an order in a list",
    Action.ORDER_READ: "read an order",
    Action.ORDER_WRITE: "changed an order",
    Action.PATIENT_CREATE: "registered you",
    Action.PATIENT_LIST: "saw your name in a list",
    Action.PATIENT_MERGE: "joined two records of you, or took them apart",
    Action.PATIENT_READ: "read your name and date of birth",
    Action.PATIENT_WRITE: "corrected your name or date of birth",
    Action.RESTRICTION_READ: "read who may see your record",
    Action.RESTRICTION_WRITE: "changed who may see your record",
    Action.SESSION_LIST: "saw a viewer of your images in a list",
    Action.SESSION_OPEN: "opened a viewer, with your name and the list of your studies",
    Action.STUDY_COERCE: "corrected whose images they are",
    Action.STUDY_DELETE: "deleted images",
    Action.STUDY_LINK: LINKED,
    Action.STUDY_LIST: "saw a study of yours in a list",
    Action.STUDY_READ: "read what studies there are",
    Action.STUDY_RETRIEVE: DOWNLOADED,
    Action.STUDY_UPLOAD: "added images",
    Action.STUDY_VIEW: VIEWED,
}
"""What was done, in words. Actions that are not here showed nobody anything of a patient, or are
part of one that is."""


@dataclass
class Seen:
    """A study that was seen: `study_date` (YYYYMMDD) and `description` as far as still known."""

    study_instance_uid: str
    study_date: str
    description: str
    how: set[str]
    first_at: datetime
    last_at: datetime


@dataclass
class Entry:
    """What one person did on one day. `rights` are in words; `emergency`: the glass was broken."""

    person: str
    day: date
    name: str = ""
    roles: set[str] = field(default_factory=set)
    rights: set[str] = field(default_factory=set)
    lent: dict[str, set[str]] = field(default_factory=dict)  # by action: of what is told elsewhere
    owing: set[str] = field(default_factory=set)  # actions that are told without their right
    emergency: bool = False
    studies: dict[str, Seen] = field(default_factory=dict)
    ways: dict[str, int] = field(default_factory=dict)
    denied: int = 0
    first_at: datetime | None = None
    last_at: datetime | None = None


async def disclosures(
    access: PatientAccess, time_from: datetime | None, time_to: datetime | None
) -> list[Entry]:
    """The entries of the access's patient, newest day first; `time_to` is exclusive."""
    entries: dict[tuple[str, date], Entry] = {}
    ended: _Ended = Counter()
    retired = await retired_into(access.session, access.patient.id)
    ids = [access.patient.id, *(each.id for each in retired)]
    parted = await _parted(access.session, ids)
    async for page in _records(access.session, ids, parted, time_from, time_to):
        known = await look_up(access.session, page)
        for record in page:
            if _whose(record, parted) not in ids:
                continue
            person = record.actor or UNKNOWN
            day = record.at.astimezone(UTC).date()
            entry = entries.setdefault((person, day), Entry(person, day))
            _add(entry, record, known, ended, ids)
    names = await _names(access.session, [*ids, *(each.into_id for each in parted)])
    told = [each for each in entries.values() if each.ways or each.denied]
    for entry in told:
        entry.name = names.get(entry.person, "")
        if entry.ways:
            _settle(entry)
    return sorted(told, key=lambda each: (-each.day.toordinal(), each.person))


async def _records(
    session: AsyncSession,
    patient_ids: Sequence[UUID],
    parted: Sequence["_Parted"],
    time_from: datetime | None,
    time_to: datetime | None,
) -> AsyncIterator[list[AuditRecord]]:
    """The patient's records, and those of whom they were merged into, of that time; newest first,
    some hundred at a time."""
    while_merged = [
        sa.and_(
            col(AuditRecord.patient_id) == each.into_id,
            col(AuditRecord.at) >= each.since,
            col(AuditRecord.at) < each.until,
        )
        for each in parted
    ]
    query = select(AuditRecord).where(
        sa.or_(col(AuditRecord.patient_id).in_(patient_ids), *while_merged)
    )
    if time_from is not None:
        query = query.where(AuditRecord.at >= time_from)
    if time_to is not None:
        query = query.where(AuditRecord.at < time_to)
    query = query.order_by(col(AuditRecord.id).desc()).limit(ROWS_AT_ONCE)
    page = list((await session.exec(query)).all())
    while page:
        yield page
        page = list((await session.exec(query.where(col(AuditRecord.id) < page[-1].id))).all())


@dataclass(frozen=True)
class _Parted:
    """A merge that was taken apart again: whose, from when until when, and what went back."""

    patient_id: UUID
    into_id: UUID
    since: datetime
    until: datetime
    theirs: frozenset[str]  # StudyInstanceUIDs and ids of orders


async def _parted(session: AsyncSession, patient_ids: Sequence[UUID]) -> list[_Parted]:
    """The merges of these patients that were taken apart again, both of them into others and of
    others into them; and so on, of those whom they were merged into."""
    found: dict[UUID, _Parted] = {}
    last = set(patient_ids)
    seen = set(last)
    while last:
        merges = await session.exec(
            select(PatientMerge).where(
                sa.or_(col(PatientMerge.patient_id).in_(last), col(PatientMerge.into_id).in_(last)),
                col(PatientMerge.unmerged_at).is_not(None),
            )
        )
        last = set()
        for each in merges.all():
            if each.id not in found and each.unmerged_at is not None:
                until = each.unmerged_at + _AFTERWARDS
                theirs = await _went_back(session, each)
                found[each.id] = _Parted(
                    each.patient_id, each.into_id, each.merged_at, until, theirs
                )
                if each.patient_id in seen:
                    last.add(each.into_id)
        last -= seen
        seen |= last
    return list(found.values())


async def _went_back(session: AsyncSession, merge: PatientMerge) -> frozenset[str]:
    """What was the retired patient's before and is not the other's now, and what came while they
    were merged and is the retired patient's now."""
    noted = await session.exec(
        select(MergedRow.key).where(
            MergedRow.merge_id == merge.id, col(MergedRow.kind).in_(("order", "study"))
        )
    )
    theirs = set(noted.all())
    for table, key in ((Study, col(Study.study_instance_uid)), (Order, col(Order.id))):
        columns: Any = table
        rows = await (await session.connection()).execute(
            sa.select(key, columns.patient_id, columns.created_at).where(
                columns.patient_id.in_((merge.patient_id, merge.into_id))
            )
        )
        for each, patient_id, created_at in rows:
            if patient_id == merge.into_id:
                theirs.discard(str(each))
            elif merge.unmerged_at and merge.merged_at <= created_at <= merge.unmerged_at:
                theirs.add(str(each))
    return frozenset(theirs)


def _whose(record: AuditRecord, parted: Sequence[_Parted]) -> UUID | None:
    """Whose data a record is about. By its study, else by its order, it may be one who was merged
    at the time into the patient whom it names."""
    about = record.study_instance_uid or str(record.order_id or "")
    whose, left = record.patient_id, list(parted) if about else []
    while step := next((each for each in left if _leads(each, record, whose, about)), None):
        whose = step.patient_id
        left.remove(step)
    return whose


def _leads(merge: _Parted, record: AuditRecord, whose: UUID | None, about: str) -> bool:
    then = merge.since <= record.at < merge.until
    return then and merge.into_id == whose and about in merge.theirs


_Ended = Counter[tuple[Any, ...]]
"""How many outcomes still want their grant. Newest first, so each grant that comes is the nearest
before; and a caller who uses a request id again hides nothing, since each outcome takes one."""


def _asked(record: AuditRecord) -> tuple[Any, ...]:
    """What a grant and its outcome have in common. A link's outcome names the study that its
    grant, of a patient or an order, does not."""
    about = (record.study_instance_uid, record.order_id)
    return (
        *(record.action, record.request_id, record.actor, record.client_address),
        *(record.patient_id, about if record.action == Action.STUDY_VIEW else None),
    )


def _add(
    entry: Entry, record: AuditRecord, known: Known, ended: _Ended, patient_ids: Sequence[UUID]
) -> None:
    entry.roles |= {each for each in record.actor_roles.split(",") if each}
    if record.outcome == Outcome.DENIED:
        entry.denied += 1
        _at(entry, record)
        return
    rights = _rights(json.loads(record.detail))
    way = _way(record, ended)
    if not way:
        entry.lent.setdefault(record.action, set()).update(rights)
        return
    if record.purpose_of_use:
        entry.emergency = True
        rights.add(EMERGENCY)
    entry.rights |= rights
    if not rights:
        entry.owing.add(record.action)
    entry.ways[way] = entry.ways.get(way, 0) + 1
    _at(entry, record)
    if uid := record.study_instance_uid:
        _saw(entry, record, known, uid, way, patient_ids)


def _rights(detail: Mapping[str, Any]) -> set[str]:
    by = detail.get("by", [])
    return {RIGHTS.get(each, str(each)) for each in by} if isinstance(by, list) else set()


def _settle(entry: Entry) -> None:
    """Give what is told without its right the one that was granted for it."""
    for action in entry.owing:
        entry.rights |= entry.lent.get(action, set())
    entry.rights = entry.rights or set().union(*entry.lent.values()) or {BY_ROLE}


def _way(record: AuditRecord, ended: _Ended) -> str:
    """What to tell of it; empty for nothing, and for the other half of something that is told."""
    if record.action not in WAYS or record.outcome == Outcome.FAILED:
        return ""
    way = WAYS[record.action]
    if record.action in (Action.STUDY_VIEW, Action.STUDY_LINK):
        # A viewer's link that was made showed nothing yet; the grants of a viewer have its `ctx`.
        viewing = record.action == Action.STUDY_VIEW
        if record.outcome == Outcome.DONE:
            ended[_asked(record)] += 1
            return "" if viewing else way
        if not (viewing and record.ctx) and ended[_asked(record)] > 0:
            ended[_asked(record)] -= 1
            return ""
        if viewing:
            return way
        return "" if (record.actor, record.client_address) == _LIGHTBOX else WEIGHED
    # What leaves a record when it is done is told then. Lists are, for each patient they showed.
    verb = record.action.rpartition(":")[2]
    done = record.outcome == Outcome.DONE
    return way if done == (verb in _TOLD_WHEN_DONE) else ""


_TOLD_WHEN_DONE = {
    "break",
    "coerce",
    "create",
    "delete",
    "link",
    "list",
    "merge",
    "review",
    "upload",
    "write",
}


def _at(entry: Entry, record: AuditRecord) -> None:
    entry.first_at = min(entry.first_at or record.at, record.at)
    entry.last_at = max(entry.last_at or record.at, record.at)


def _saw(
    entry: Entry,
    record: AuditRecord,
    known: Known,
    uid: str,
    way: str,
    patient_ids: Sequence[UUID],
) -> None:
    seen = entry.studies.get(uid)
    if seen is None:
        study = known.studies.get(uid)
        if study is not None and study.patient_id not in patient_ids:
            study = None  # somebody else's by now
        seen = Seen(
            study_instance_uid=uid,
            study_date=study.study_date if study else "",
            description=study.description if study else "",
            how=set(),
            first_at=record.at,
            last_at=record.at,
        )
        entry.studies[uid] = seen
    seen.how.add(way)
    seen.first_at, seen.last_at = min(seen.first_at, record.at), max(seen.last_at, record.at)


async def _names(session: AsyncSession, patient_ids: Sequence[UUID]) -> dict[str, str]:
    """Names of people, as their tokens had them when they opened this patient's images."""
    query = (
        select(col(LaunchSession.actor), col(LaunchSession.actor_name))
        .where(col(LaunchSession.patient_id).in_(patient_ids), LaunchSession.actor_name != "")
        .order_by(col(LaunchSession.created_at))
    )
    found: Any = (await session.exec(query)).all()
    return dict(iter(found))
