"""The decision on the way of every image: one statement, nothing remembered.

A viewer asks for hundreds of frames. Each request is decided anew, by the facts as they are
committed at that moment: session or caller, study, patient, relations and instance come in one
row, and `decide` judges them. So a right that ends ends at the next request, in every process.

A grant is recorded before it counts. For a caller with a token: one record for each study within
`RECORD_SECONDS`, and one for each transfer of whole files; for a launch session: one a study
(PS3.15 A.5). Whoever is refused is recorded each time.

Where the EHR has a say (`app.access.ehr`), it is asked after the row: `confirmed`.

`study_columns` is the part of the statement that is the same for a caller with a token and for a
launch session; `study_access` reads it, and seals what was granted.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlmodel import col

from app.access.ehr import EHR_SILENT, Ehr, Question, Verdict, narrow
from app.access.gate import SEAL, Denial, carried
from app.access.named import CALLER, NOW, caller_values
from app.access.policy import (
    Decision,
    Reason,
    Relation,
    Tied,
    clauses,
    decide,
    may_ask,
)
from app.audit import Action, AuditTrail, Entry, Origin, Outcome
from app.db import Reader, utcnow
from app.errors import EhrUnavailable, NotFound
from app.identity import Principal
from app.models import Instance, Patient, Study

UID, SERIES_UID, SOP_UID = "study_uid", "series_uid", "sop_uid"
RECORD_SECONDS = 300.0
_MOST_REMEMBERED = 10_000
_WITH_A_TOKEN = {"access": "dicom-web"}
"""In the detail of each grant: a viewer link that is made, which shows nothing, has none."""
NO_SUCH_STUDY = "There is no such study among those you may see."


@dataclass(frozen=True, slots=True)
class InstanceFacts:
    """What is known of one instance; `rows` is 0 without pixels, None where that isn't known."""

    sop_instance_uid: str
    orthanc_id: str
    sop_class_uid: str
    transfer_syntax_uid: str
    number_of_frames: int
    rows: int | None


@dataclass(frozen=True, slots=True)
class StudyAccess:
    """A granted access to the bytes of one study, on record. Only `app.access` can make one.

    `instance` is what the request named by all three UIDs, if the study has it. `instance_count`
    is that of the study; the files of the same study can change only together with it, or with
    `generation`.
    """

    principal: Principal
    patient_id: UUID
    study_instance_uid: str
    orthanc_id: str
    dicom_patient_id: str
    generation: str
    instance_count: int
    instance: InstanceFacts | None
    question: Question  # what the EHR is asked, where it has a say
    ctx: str = ""
    purpose_of_use: str = ""  # see `policy.Decision`
    broke: bool = False  # the glass stands broken, whatever else ties the caller
    seal: object = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.seal is not SEAL:
            raise TypeError("StudyAccess is made by the guards in app.access only")


@dataclass(frozen=True, slots=True)
class SessionAccess:
    """A granted access to the studies of one launch session, for a search."""

    principal: Principal
    patient_id: UUID
    question: Question
    ctx: str
    broke: bool = False  # as of StudyAccess
    seal: object = field(default=None, repr=False, compare=False)

    @property
    def purpose_of_use(self) -> str:
        """See `policy.Decision`."""
        return self.question.purpose_of_use

    def __post_init__(self) -> None:
        if self.seal is not SEAL:
            raise TypeError("SessionAccess is made by the guards in app.access only")


def relation_columns(caller: Tied) -> list[Any]:
    """Who the row of `Patient` is, and which relations hold, in the order of `Relation`."""
    holds = clauses(caller, NOW)
    relations = [holds[relation].label(relation.name.lower()) for relation in Relation]
    return [col(Patient.mrn), col(Patient.mrn_issuer), *relations]


def _decided(
    principal: Principal, action: Action, patient_id: UUID, row: Sequence[Any]
) -> tuple[Decision, Question]:
    """What the policy says by a row of `relation_columns`, and what the EHR would be asked."""
    mrn, issuer, *holding = row
    held = [relation for relation, holds in zip(Relation, holding, strict=True) if holds]
    decision = decide(principal, action, held)
    return decision, Question.of(
        principal, action, patient_id, mrn, issuer, decision.purpose_of_use
    )


async def confirmed(
    ehr: Ehr | None, access: StudyAccess | SessionAccess, launched_with: str
) -> bool:
    """Does the EHR, where it has a say, allow it too, if need be under the purpose that the session
    was launched with? False where it doesn't answer: ask the gate, which records why."""
    if ehr is None:
        return True
    question = access.question
    verdict = await ehr.ask(question)
    if verdict is Verdict.DENIED and access.broke and launched_with != question.purpose_of_use:
        verdict = await ehr.ask(replace(question, purpose_of_use=launched_with))
    return verdict is Verdict.ALLOWED


def session_access(
    principal: Principal, action: Action, patient_id: UUID, row: Sequence[Any], ctx: str
) -> SessionAccess | None:
    """The access, if the policy allows it by the relations in the row."""
    decision, question = _decided(principal, action, patient_id, row)
    if not decision.allowed:
        return None
    broke = Relation.BROKE_GLASS in decision.by
    return SessionAccess(principal, patient_id, question, ctx, broke, SEAL)


def study_columns(caller: Tied) -> list[Any]:
    """What is asked about study, instance and relations; see `with_instance`."""
    count = (
        sa.select(sa.func.count())
        .select_from(Instance)
        .where(col(Instance.study_instance_uid) == col(Study.study_instance_uid))
        .correlate(Study)
        .scalar_subquery()
    )
    return [
        col(Study.patient_id),
        col(Study.study_instance_uid),
        col(Study.orthanc_id),
        col(Study.dicom_patient_id),
        col(Study.generation),
        count.label("instance_count"),
        col(Instance.sop_instance_uid),
        col(Instance.orthanc_id).label("instance_orthanc_id"),
        col(Instance.sop_class_uid),
        col(Instance.transfer_syntax_uid),
        col(Instance.number_of_frames),
        col(Instance.rows),
        *relation_columns(caller),
    ]


def with_instance(study: sa.FromClause) -> sa.FromClause:
    """`study` joined with its patient, and with the instance that the parameters name."""
    return study.outerjoin(
        Patient.__table__,  # type: ignore[attr-defined]
        col(Patient.id) == col(Study.patient_id),
    ).outerjoin(
        Instance.__table__,  # type: ignore[attr-defined]
        sa.and_(
            col(Instance.sop_instance_uid) == sa.bindparam(SOP_UID, type_=sa.String()),
            col(Instance.series_instance_uid) == sa.bindparam(SERIES_UID, type_=sa.String()),
            col(Instance.study_instance_uid) == col(Study.study_instance_uid),
        ),
    )


def parameters(study_uid: str, series_uid: str, sop_uid: str, now: datetime) -> dict[str, Any]:
    """The values of the statement's parameters; empty UIDs name no instance."""
    return {UID: study_uid, SERIES_UID: series_uid, SOP_UID: sop_uid, "now": now}


def study_decision(
    principal: Principal, action: Action, row: Sequence[Any]
) -> tuple[Decision, Question]:
    """What the policy says by a row of `study_columns` that names a study."""
    return _decided(principal, action, row[0], row[12:])


def study_access(
    principal: Principal, action: Action, row: Sequence[Any], ctx: str = ""
) -> StudyAccess | None:
    """The access, if the row of `study_columns` names a study and the policy allows it."""
    if row[0] is None:
        return None
    decision, question = study_decision(principal, action, row)
    if not decision.allowed:
        return None
    return _sealed(principal, row, question, ctx, broke=Relation.BROKE_GLASS in decision.by)


def _sealed(
    principal: Principal,
    row: Sequence[Any],
    question: Question,
    ctx: str = "",
    *,
    broke: bool = False,
) -> StudyAccess:
    patient_id, uid, orthanc_id, dicom_patient_id, generation, count = row[:6]
    instance = row[6:12]
    return StudyAccess(
        principal=principal,
        patient_id=patient_id,
        study_instance_uid=uid,
        orthanc_id=orthanc_id,
        dicom_patient_id=dicom_patient_id,
        generation=generation,
        instance_count=count,
        instance=None if instance[0] is None else InstanceFacts(*instance),
        question=question,
        ctx=ctx,
        purpose_of_use=question.purpose_of_use,
        broke=broke,
        seal=SEAL,
    )


class StudyGate:
    """Decides and records what callers with a token ask of a study. One per app."""

    def __init__(self, reader: Reader, trail: AuditTrail, ehr: Ehr | None = None) -> None:
        self._reader = reader
        self._trail = trail
        self._ehr = ehr
        study: sa.FromClause = Study.__table__  # type: ignore[attr-defined]
        self._statement = reader.prepare(
            sa.select(*study_columns(CALLER))
            .select_from(with_instance(study))
            .where(col(Study.study_instance_uid) == sa.bindparam(UID, type_=sa.String()))
        )
        self._recorded: dict[tuple[str, ...], float] = {}
        self._recording = asyncio.Lock()

    async def access(
        self,
        principal: Principal,
        action: Action,
        origin: Origin,
        study_uid: str,
        series_uid: str = "",
        sop_uid: str = "",
    ) -> StudyAccess:
        """The access, on record.

        Raises NotFound, in the same words and after the same work, for a study that isn't there
        and for one that isn't the caller's (the record has the true reason); Denial where no role
        of theirs knows the action, or no scope covers it; EhrUnavailable.
        """
        entry = Entry(
            action=action,
            outcome=Outcome.DENIED,
            origin=origin,
            actor=principal.sub,
            actor_roles=principal.roles_text,
        )
        asked = may_ask(principal, action)
        if asked.reason is not None:
            await self._trail.record(replace(entry, reason=asked.reason.value))
            raise Denial(asked.reason)
        values = parameters(study_uid, series_uid, sop_uid, utcnow())
        row = await self._reader.first(self._statement, {**values, **caller_values(principal)})
        if row is None:
            await self._trail.record(
                replace(entry, reason="unknown", detail={"requested": study_uid})
            )
            raise NotFound(NO_SUCH_STUDY)
        decision, question = study_decision(principal, action, row)
        decision = await narrow(self._ehr, decision, question)
        if decision.reason is not None:
            about = replace(entry, patient_id=row[0], study_instance_uid=row[1])
            await self._trail.record(replace(about, reason=decision.reason.value))
            if decision.reason is Reason.EHR_UNAVAILABLE:
                raise EhrUnavailable(EHR_SILENT)
            raise NotFound(NO_SUCH_STUDY)
        question = replace(question, purpose_of_use=decision.purpose_of_use)
        access = _sealed(principal, row, question)
        await self._record(
            replace(
                entry,
                outcome=Outcome.GRANTED,
                patient_id=access.patient_id,
                study_instance_uid=access.study_instance_uid,
                purpose_of_use=access.purpose_of_use,
            ),
            decision.by,
        )
        return access

    async def refuse(self, principal: Principal, action: Action, origin: Origin, why: str) -> None:
        """Record a request that no rule allows, whoever asks."""
        await self._trail.record(
            Entry(
                action=action,
                outcome=Outcome.DENIED,
                origin=origin,
                actor=principal.sub,
                actor_roles=principal.roles_text,
                reason=why,
            )
        )

    async def _record(self, entry: Entry, by: frozenset[Relation]) -> None:
        key = (
            *(entry.actor, entry.actor_roles, entry.origin.client_address),
            *(entry.action.value, entry.study_instance_uid, str(entry.patient_id)),
            entry.purpose_of_use,
        )
        if entry.action is Action.STUDY_RETRIEVE:
            await self._trail.record(replace(entry, detail={**_WITH_A_TOKEN, **carried(by)}))
            return
        if self._recorded.get(key, 0.0) > time.monotonic():
            return
        async with self._recording:
            # Of many requests at once, the first one writes, and the others wait for it.
            if self._recorded.get(key, 0.0) > time.monotonic():
                return
            await self._trail.record(replace(entry, detail={**_WITH_A_TOKEN, **carried(by)}))
            if len(self._recorded) >= _MOST_REMEMBERED:
                self._recorded.clear()
            self._recorded[key] = time.monotonic() + RECORD_SECONDS
