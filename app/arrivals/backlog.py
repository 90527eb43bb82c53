"""Many studies at a time, of those that were in the archive before: the first start has thousands.

Most of them come near nobody whom Lightbox knows. That is asked of many at once, in a few queries,
and then they wait as unmatched, as looking at each would have it; the others are looked at one by
one. No file is read for those that nobody comes near.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.arrivals import facts, index
from app.db import Database, utcnow
from app.dicom import person_name
from app.errors import NotFound
from app.matching import ArrivedStudy, Lookup, Verdict, family_keys, look_up, match
from app.models import Arrival, ArrivalCandidate, ArrivalState, Order, OrderStudy, Patient, Study
from app.orthanc import Orthanc

AT_ONCE = 100
_ASKED_AT_ONCE = 4  # of Orthanc
_MOST_OF_A_DAY = 4000  # patients; of more, nobody says that none of them is meant


class Backlog:
    """Settles what nobody comes near. One per app."""

    def __init__(self, database: Database, orthanc: Orthanc, authority: str) -> None:
        self._database = database
        self._orthanc = orthanc
        self._authority = authority

    async def step(self) -> tuple[int, list[str]]:
        """How many of those that are due were settled, and the Orthanc ids of the others, which are
        to be looked at. Raises OrthancUnavailable."""
        async with self._database.session() as session:
            ids = await index.due(session, AT_ONCE, backlog=True)
            found = await session.exec(select(Arrival).where(col(Arrival.orthanc_id).in_(ids)))
            rows = {each.orthanc_id: each for each in found}
            simple = [each for each in rows.values() if _is_simple(each)]
            studies = {each.orthanc_id: facts.from_json(each.facts)[0] for each in simple}
            near = await _near(session, studies)
        nobodys = [each for each in simple if each.orthanc_id not in near]
        states = await self._states(nobodys)
        settled = [
            _settled(each, *states[each.orthanc_id], reasons)
            for each in nobodys
            if each.orthanc_id in states
            and (reasons := self._reasons(studies[each.orthanc_id])) is not None
        ]
        if settled:
            await self._write(settled)
        done = {each["of"] for each in settled}
        return len(done), [each for each in ids if each not in done]

    def _reasons(self, study: ArrivedStudy) -> str | None:
        """What the matcher says where there is nobody; None: something else than that."""
        said = match(study, [], [], authority=self._authority)
        return index.said_of(said)["reasons"] if said.verdict is Verdict.UNMATCHED else None

    async def _states(self, rows: Sequence[Arrival]) -> dict[str, tuple[int, str]]:
        """Count and size of each; without those that have gone."""
        places = asyncio.Semaphore(_ASKED_AT_ONCE)
        found: dict[str, tuple[int, str]] = {}

        async def ask(orthanc_id: str) -> None:
            async with places:
                try:
                    found[orthanc_id] = await self._orthanc.study_state(orthanc_id)
                except NotFound:
                    return

        async with asyncio.TaskGroup() as group:
            for each in rows:
                group.create_task(ask(each.orthanc_id))
        return found

    async def _write(self, settled: Sequence[dict[str, Any]]) -> None:
        """Each as long as nobody changed it since it was read; all in one transaction."""
        table: Any = Arrival.__table__  # type: ignore[attr-defined]
        values: dict[str, Any] = {name: sa.bindparam(f"new_{name}") for name in _CHANGED}
        change = (
            sa.update(table)
            .where(
                table.c.orthanc_id == sa.bindparam("of"),
                table.c.version == sa.bindparam("seen_version"),
                table.c.due_at == sa.bindparam("seen_due_at"),
            )
            .values(
                **values,
                due_at=None,
                attempts=0,
                patient_id=None,
                order_id=None,
                rule="",
                candidates="[]",
                version=table.c.version + 1,
            )
        )
        async with self._database.writing_session() as session:
            connection = await session.connection()
            await connection.execute(change, list(settled))
            await session.commit()


_CHANGED = ("state", "reasons", "instance_count", "disk_size", "changed_at")


def _is_simple(row: Arrival) -> bool:
    """Not linked, not decided about by a human, and all in."""
    return (
        row.state in (ArrivalState.ARRIVING.value, ArrivalState.UNMATCHED.value)
        and row.stable
        and not row.held
        and bool(row.study_instance_uid)
    )


def _settled(row: Arrival, count: int, size: str, reasons: str) -> dict[str, Any]:
    return {
        "of": row.orthanc_id,
        "seen_version": row.version,
        "seen_due_at": row.due_at,
        "new_state": ArrivalState.UNMATCHED.value,
        "new_reasons": reasons,
        "new_instance_count": count,
        "new_disk_size": size,
        "new_changed_at": utcnow(),
    }


async def _near(session: AsyncSession, studies: Mapping[str, ArrivedStudy]) -> set[str]:
    """Which of these studies somebody, some order, or another study of the same UID comes near: at
    least all for which `candidates.find` would find one."""
    keys = {orthanc_id: look_up(study) for orthanc_id, study in studies.items()}
    by_uid = _where(keys, "study_instance_uids")
    by_accession = _where(keys, "accession_numbers")
    by_number = _where(keys, "patient_ids")
    by_day = _where(keys, "birth_dates")
    near: set[str] = set()
    for where, query in (
        (by_uid, select(Order.planned_study_instance_uid)),
        (by_uid, select(OrderStudy.study_instance_uid)),
        (by_uid, select(Study.study_instance_uid)),
        (by_accession, select(Order.accession_number)),
        (by_number, select(Patient.mrn)),
    ):
        column = query.selected_columns[0]
        for each in await session.exec(query.where(column.in_(list(where))).distinct()):
            near |= where[each]
    same = (
        select(Arrival.study_instance_uid)
        .where(
            col(Arrival.study_instance_uid).in_(list(by_uid)),
            Arrival.state != ArrivalState.GONE.value,
        )
        .group_by(col(Arrival.study_instance_uid))
        .having(sa.func.count() > 1)
    )
    for each in await session.exec(same):
        near |= by_uid[each]
    # Those who were proposed before are taken away where each is looked at.
    proposed = select(ArrivalCandidate.orthanc_id).where(
        col(ArrivalCandidate.orthanc_id).in_(list(studies))
    )
    near |= set(await session.exec(proposed))
    return near | await _of_a_day(session, keys, by_day)


async def _of_a_day(
    session: AsyncSession, keys: Mapping[str, Lookup], by_day: Mapping[Any, set[str]]
) -> set[str]:
    """Those for whom somebody is known who was born on one of their days, with one of their family
    names."""
    born = (
        sa.select(col(Patient.dob), col(Patient.last_name), col(Patient.first_name))
        .where(col(Patient.dob).in_(list(by_day)))
        .limit(_MOST_OF_A_DAY + 1)
    )
    people = (await (await session.connection()).execute(born)).all()
    if len(people) > _MOST_OF_A_DAY:
        return set().union(*by_day.values())
    near: set[str] = set()
    for day, last_name, first_name in people:
        names = family_keys(person_name(last_name, first_name))
        near |= {each for each in by_day[day] if names & set(keys[each].family_keys)}
    return near


def _where(keys: Mapping[str, Lookup], name: str) -> dict[Any, set[str]]:
    """By the value of a key, the studies that have it."""
    found: dict[Any, set[str]] = {}
    for orthanc_id, each in keys.items():
        for value in getattr(each, name):
            found.setdefault(value, set()).add(orthanc_id)
    return found
