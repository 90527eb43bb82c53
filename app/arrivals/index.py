"""The rows of arrivals: what is in the archive, noted and looked up again."""

import json
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Any, NoReturn

import sqlalchemy as sa
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.arrivals import facts
from app.db import insert_if_absent, utcnow
from app.dicom import parse_uid
from app.errors import Conflict
from app.matching import ArrivedStudy, Match
from app.models import Arrival, ArrivalCandidate, ArrivalState, folded
from app.orthanc import Held

LONGEST_DELAY_SECONDS = 300.0
_MOST_REASONS = 64
_INSERTED_AT_ONCE = 50


async def note(
    session: AsyncSession, held: Held, *, stable: bool, new: bool = True, backlog: bool = False
) -> None:
    """Note that a study is in the archive, and that it has to be looked at. `new`: what was read of
    it before, if anything, was another one's under the same UIDs."""
    row = _noted(held, stable=stable, backlog=backlog)
    await session.exec(insert_if_absent(session, Arrival, **row))
    shown = {name: row[name] for name in (*_shown(facts.of_index(held)), "facts")}
    await session.exec(
        sa.update(Arrival)
        .where(col(Arrival.orthanc_id) == held.orthanc_id)
        .values(
            stable=stable,
            due_at=row["due_at"],
            attempts=0,
            series_count=len(held.series),
            **(shown if new else {}),
            state=sa.case(
                (col(Arrival.state) == ArrivalState.GONE.value, ArrivalState.ARRIVING.value),
                else_=col(Arrival.state),
            ),
        )
        .execution_options(synchronize_session=False)
    )
    # The same UID under another PatientID: neither may be shown before a human has decided.
    await session.exec(
        sa.update(Arrival)
        .where(
            col(Arrival.study_instance_uid) == row["study_instance_uid"],
            col(Arrival.study_instance_uid) != "",
            col(Arrival.orthanc_id) != held.orthanc_id,
            col(Arrival.state) != ArrivalState.GONE.value,
        )
        .values(due_at=row["due_at"])
        .execution_options(synchronize_session=False)
    )


async def note_all(session: AsyncSession, held: Sequence[Held]) -> None:
    """Note studies that were in the archive before; as `note` does, in few statements for those
    that are news and alone under their UIDs."""
    rows = {each.orthanc_id: _noted(each, stable=each.stable, backlog=each.stable) for each in held}
    uids = [row["study_instance_uid"] for row in rows.values()]
    known = await session.exec(
        select(Arrival.orthanc_id, Arrival.study_instance_uid).where(
            sa.or_(
                col(Arrival.orthanc_id).in_(list(rows)), col(Arrival.study_instance_uid).in_(uids)
            )
        )
    )
    there = {value for pair in known for value in pair}
    shared = {uid for uid, count in Counter(uids).items() if count > 1}
    plain = [
        row
        for row in rows.values()
        if row["orthanc_id"] not in there and row["study_instance_uid"] not in there | shared
    ]
    for start in range(0, len(plain), _INSERTED_AT_ONCE):
        some = plain[start : start + _INSERTED_AT_ONCE]
        await session.exec(insert_if_absent(session, Arrival, *some))
    done = {row["orthanc_id"] for row in plain}
    for each in held:
        if each.orthanc_id not in done:
            await note(session, each, stable=each.stable, backlog=each.stable)


def _noted(held: Held, *, stable: bool, backlog: bool) -> dict[str, Any]:
    """A study's new row."""
    said = facts.of_index(held)
    return {
        "orthanc_id": held.orthanc_id,
        "state": ArrivalState.ARRIVING.value,
        "facts": facts.as_json(said, from_files=False),
        "series_count": len(held.series),
        "stable": stable,
        "backlog": backlog,
        "study_description": _plain(held.tags.get("StudyDescription", ""), 256),
        "study_time": _plain(held.tags.get("StudyTime", ""), 32),
        "due_at": utcnow(),
        **_shown(said),
    }


async def due(session: AsyncSession, limit: int, *, backlog: bool) -> list[str]:
    """The Orthanc ids of what has to be looked at now: what just arrived first, then what is due
    for longest."""
    query = (
        select(Arrival.orthanc_id)
        .where(col(Arrival.due_at) <= utcnow(), col(Arrival.backlog) == backlog)
        .order_by(col(Arrival.state) != ArrivalState.ARRIVING.value, col(Arrival.due_at))
        .limit(limit)
    )
    return list(await session.exec(query))


async def change(session: AsyncSession, row: Arrival, **values: Any) -> bool:
    """Write values to a row, if nobody changed it since it was read; was it so?

    A new state, or another reason for it, makes a new version: whoever decides by an old one is
    told.
    """
    seen = ("state", "reasons", "candidates", "patient_id", "order_id", "held")
    is_new = any(name in values and values[name] != getattr(row, name) for name in seen)
    version = row.version + 1 if is_new else row.version
    changed = await session.exec(
        sa.update(Arrival)
        .where(
            col(Arrival.orthanc_id) == row.orthanc_id,
            col(Arrival.version) == row.version,
            # Something arrived since: it has to be looked at again.
            col(Arrival.due_at).is_not_distinct_from(row.due_at),
        )
        .values(**values, version=version, **({"changed_at": utcnow()} if is_new else {}))
        .execution_options(synchronize_session=False)
    )
    return changed.rowcount == 1


def stale(row: Arrival) -> Conflict:
    """What to say to whoever decided by what is no longer so: what has happened."""
    by = f" by {row.decided_by}" if row.decided_by else ""
    return Conflict(
        f"The study was changed meanwhile{by}: it is {row.state} now. Look at it again.",
        extra={
            "state": row.state,
            "version": row.version,
            "decided_by": row.decided_by,
            "decision": row.decision,
        },
    )


async def refuse_changed(session: AsyncSession, row: Arrival) -> NoReturn:
    """A row is not as it was read: take back what the transaction did, and raise Conflict."""
    orthanc_id = row.orthanc_id
    await session.rollback()  # after which no object of the session may be asked
    raise stale(await _as_it_is(session, orthanc_id))


@asynccontextmanager
async def told(session: AsyncSession, row: Arrival) -> AsyncIterator[None]:
    """Whatever refuses a decision about a row that somebody else changed meanwhile, say what they
    did: their change is the reason."""
    orthanc_id, version = row.orthanc_id, row.version
    try:
        yield
    except Conflict as error:
        await session.rollback()
        now = await _as_it_is(session, orthanc_id)
        if now.version == version:
            raise
        raise stale(now) from error


async def _as_it_is(session: AsyncSession, orthanc_id: str) -> Arrival:
    query = select(Arrival).where(Arrival.orthanc_id == orthanc_id)
    return (await session.exec(query, execution_options={"populate_existing": True})).one()


async def propose(session: AsyncSession, row: Arrival, said: Match) -> None:
    """Keep who may be shown that the study waits: who may see one of these patients."""
    await session.exec(
        sa.delete(ArrivalCandidate).where(col(ArrivalCandidate.orthanc_id) == row.orthanc_id)
    )
    for patient_id in sorted({each.patient_id for each in said.candidates}):
        await session.exec(
            insert_if_absent(
                session, ArrivalCandidate, orthanc_id=row.orthanc_id, patient_id=patient_id
            )
        )


def later(attempts: int) -> datetime:
    """When to try again: doubled each time."""
    return utcnow() + timedelta(seconds=min(2.0 ** min(attempts, 16), LONGEST_DELAY_SECONDS))


def shown_of(study: ArrivedStudy, modalities: Iterable[str]) -> dict[str, Any]:
    """The columns of what was read in files."""
    return {**_shown(study), "modalities": "\\".join(sorted(set(modalities)))[:256]}


def said_of(said: Match) -> dict[str, str]:
    """The columns of what the matcher said."""
    return {
        "reasons": json.dumps([each.as_json() for each in said.because[:_MOST_REASONS]]),
        "candidates": json.dumps([each.as_json() for each in said.candidates]),
    }


def reason(code: str, words: str) -> str:
    """One reason, as the column has it."""
    return json.dumps([{"code": code, "words": words}])


def _shown(study: ArrivedStudy) -> dict[str, Any]:
    try:
        uid = parse_uid(study.study_instance_uid)
    except ValueError:
        uid = ""
    name = _plain(study.patient_name, 256)
    return {
        "study_instance_uid": uid,
        "dicom_patient_id": _plain(study.patient.value, 64),
        "patient_name": name,
        "folded_name": folded(name)[:256],
        "patient_birth_date": _plain(study.birth_date, 16),
        "patient_sex": _plain(study.sex, 16),
        "accession_number": _plain(study.accession.value, 64),
        "study_date": _plain(study.study_date, 16),
    }


def _plain(text: str, longest: int) -> str:
    """What a modality wrote, fit for a row and a list: no controls, no half of a character."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)[:longest]


def soon(seconds: float) -> datetime:
    """That many seconds from now."""
    return utcnow() + timedelta(seconds=seconds)
