"""Of many patients at once: whom a list may show, and under which right and purpose of use
each."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, TypeVar
from uuid import UUID

import sqlalchemy as sa
from sqlmodel import col
from sqlmodel.ext.asyncio.session import AsyncSession

from app.access.ehr import EHR_SILENT, Question, narrow_all
from app.access.gate import Gate, carried, entry_of
from app.access.policy import BREAK_THE_GLASS, Decision, Reason, Relation, clauses, decide
from app.audit import Action, Entry, Origin
from app.db import utcnow
from app.errors import EhrUnavailable, Unprocessable
from app.identity import Principal
from app.models import Patient

MOST_CANDIDATES = 2000  # of a list that the EHR narrows
_AT_ONCE = 500  # values of one IN
_WHO = (col(Patient.id), col(Patient.mrn), col(Patient.mrn_issuer))
Query = TypeVar("Query", bound=sa.Select[Any])


@dataclass(frozen=True)
class VisiblePatients:
    """A caller's window on the patients: a list asks what `only` makes of its query, and nothing
    else. `condition` says over the columns of `Patient` whom our own policy shows, as of `at`; the
    EHR may narrow it, so by itself it is no list."""

    session: AsyncSession
    principal: Principal
    action: Action
    origin: Origin
    gate: Gate
    condition: sa.ColumnElement[bool]
    at: datetime
    _shown: dict[UUID, Decision] = field(default_factory=dict, repr=False, compare=False)

    async def only(self, query: Query) -> Query:
        """`query`, of the patients alone whom the caller may see. It has `Patient` among its tables
        and all its filters, and no page yet: so a count of it counts nobody else.

        Raises Unprocessable where the EHR would be asked about too many patients, EhrUnavailable.
        """
        seen: Query = query.where(self.condition)
        if self.gate.ehr is None:
            return seen
        holds = clauses(self.principal, self.at)
        candidates = (
            seen.with_only_columns(*_WHO, *holds.values(), maintain_column_froms=True)
            .order_by(None)
            .distinct()
            .limit(MOST_CANDIDATES + 1)
        )
        rows = (await (await self.session.connection()).execute(candidates)).all()
        await self.session.commit()  # only read so far
        if len(rows) > MOST_CANDIDATES:
            raise Unprocessable(
                f"This list is of more than {MOST_CANDIDATES} patients, and the EHR is asked about "
                "each: name a patient, or filter more closely."
            )
        decided = dict(_decided(self.principal, self.action, holds, row) for row in rows)
        narrowed = await narrow_all(
            self.gate.ehr, {key: (each.decision, each.question) for key, each in decided.items()}
        )
        if any(each.reason is Reason.EHR_UNAVAILABLE for each in narrowed.values()):
            raise EhrUnavailable(EHR_SILENT)
        shown = {key: each for key, each in narrowed.items() if each.allowed}
        self._shown.update(shown)
        return seen.where(col(Patient.id).in_(shown))

    async def disclose(self, patient_ids: Iterable[UUID]) -> None:
        """Record, before the answer leaves, whose data a list shows, each with its right and
        under its purpose of use: one patient a record."""
        shown = sorted(set(patient_ids))
        if not shown:
            return
        left = [each for each in shown if each not in self._shown]
        found = await _facts(self.session, self.principal, self.action, left, self.at)
        told = {key: each.told for key, each in found.items()} | self._shown
        entry = entry_of(self.principal, self.action, self.origin)
        await self.gate.trail.record(
            *(_disclosed(entry, each, told.get(each, _NOTHING)) for each in shown)
        )


_NOTHING = Decision(allowed=False)


def _disclosed(entry: Entry, patient_id: UUID, decision: Decision) -> Entry:
    return replace(
        entry,
        patient_id=patient_id,
        purpose_of_use=decision.purpose_of_use,
        detail=carried(decision.by),
    )


async def decisions(
    session: AsyncSession,
    gate: Gate,
    principal: Principal,
    action: Action,
    patient_ids: Iterable[UUID],
) -> dict[UUID, Decision]:
    """What the gate would decide of each patient now, with the EHR's say; nothing of unknown ones.
    The session has only read so far."""
    found = await _facts(session, principal, action, sorted(set(patient_ids)), utcnow())
    await session.commit()  # no connection is held while the EHR is asked
    return await narrow_all(
        gate.ehr, {key: (each.decision, each.question) for key, each in found.items()}
    )


@dataclass(frozen=True)
class _Decided:
    """Our own decision of one patient, and what the EHR would be asked."""

    decision: Decision
    question: Question
    broke: bool  # the glass is broken for them

    @property
    def told(self) -> Decision:
        """What was shown is marked. Right lost since it was read: as if the glass alone gave it."""
        if self.decision.allowed or not self.broke:
            return self.decision
        alone = frozenset({Relation.BROKE_GLASS})
        return replace(self.decision, by=alone, purpose_of_use=BREAK_THE_GLASS)


def _decided(
    principal: Principal,
    action: Action,
    holds: Mapping[Relation, sa.ColumnElement[bool]],
    row: Any,
) -> tuple[UUID, _Decided]:
    patient_id, mrn, mrn_issuer, *held = row
    relations = [each for each, is_held in zip(holds, held, strict=True) if is_held]
    decision = decide(principal, action, relations)
    purpose = decision.purpose_of_use
    question = Question.of(principal, action, patient_id, mrn, mrn_issuer, purpose)
    return patient_id, _Decided(decision, question, Relation.BROKE_GLASS in relations)


async def _facts(
    session: AsyncSession,
    principal: Principal,
    action: Action,
    patient_ids: Collection[UUID],
    now: datetime,
) -> dict[UUID, _Decided]:
    holds = clauses(principal, now)
    named = list(patient_ids)
    found: dict[UUID, _Decided] = {}
    for start in range(0, len(named), _AT_ONCE):
        query = sa.select(*_WHO, *holds.values()).select_from(Patient)
        query = query.where(col(Patient.id).in_(named[start : start + _AT_ONCE]))
        rows = await (await session.connection()).execute(query)
        found.update(_decided(principal, action, holds, row) for row in rows)
    return found
