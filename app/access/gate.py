"""Accesses, and the gate that makes them: decide, record, then hand out.

Nothing outside of this module can make a `PatientAccess`; every function that touches patient
data takes one first. The gate also is the edge of the request's one business transaction.
"""

from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from fastapi.exceptions import RequestValidationError
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.access.ehr import EHR_SILENT, Ehr, Question, narrow
from app.access.named import CALLER, NOW, caller_values
from app.access.policy import (
    Decision,
    Reason,
    Relation,
    clauses,
    decide,
    decide_of_no_patient,
    may_ask,
)
from app.aliases import survivor
from app.audit import Action, AuditTrail, Entry, Operation, Origin, Outcome, operations
from app.db import Database, utcnow
from app.dicom import parse_uid
from app.errors import (
    AuditUnavailable,
    EhrUnavailable,
    Forbidden,
    LightboxError,
    NotFound,
    Unavailable,
    Unprocessable,
)
from app.identity import Principal, TokenVerifier
from app.limits import FailedTries
from app.models import Order, Patient, Study

DENIAL_SENTENCES: Mapping[Reason, str] = {
    Reason.EHR: "The EHR does not allow this.",
    Reason.OUT_OF_CONTEXT: "You signed in for one patient; this is not about them.",
    Reason.ROLE: "Your role does not allow this.",
    Reason.SCOPE: "The scopes of your token do not cover this.",
    Reason.NO_RELATIONSHIP: "You have no relationship to this patient that allows this: you "
    "neither requested or attend one of their orders, nor are on their care team, nor is there "
    "an imaging order at your site that your role works on.",
    Reason.RESTRICTED: "This patient's record is restricted to named people, and you are not "
    "among them.",
}


class Denial(Forbidden):
    """Refused by the policy; `reason` is the word it was recorded with."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(DENIAL_SENTENCES[reason], extra={"reason": reason.value})
        self.reason = reason


class Subject(StrEnum):
    """What a patient is found behind; the value is the path parameter's name."""

    ORDER = "order_id"
    PATIENT = "patient_id"
    STUDY = "study_instance_uid"


SEAL = object()


def carried(by: Collection[Relation]) -> dict[str, Any]:
    """What a grant's record says of the relations that carried it: nothing, where none had to."""
    return {"by": sorted(by)} if by else {}


@dataclass(frozen=True)
class PatientAccess:
    """A granted, recorded access to one patient. Only this module can make one.

    Functions that touch patient data take it first. `order` and `study` are what the request
    named, where it named one.
    """

    session: AsyncSession
    principal: Principal
    action: Action
    origin: Origin
    patient: Patient
    order: Order | None = None
    study: Study | None = None
    ctx: str = ""
    purpose_of_use: str = ""  # see `policy.Decision`
    by: frozenset[Relation] = frozenset()  # as of `policy.Decision`
    operation: Operation | None = field(default=None, compare=False)
    seal: object = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.seal is not SEAL:
            raise TypeError("PatientAccess is made by the guards in app.access only")

    def entry(self, outcome: Outcome, **more: Any) -> Entry:
        """A record about this access."""
        subject = Entry(
            action=self.action,
            outcome=outcome,
            origin=self.origin,
            actor=self.principal.sub,
            actor_roles=self.principal.roles_text,
            patient_id=self.patient.id,
            order_id=self.order.id if self.order else None,
            study_instance_uid=self.study.study_instance_uid if self.study else "",
            ctx=self.ctx,
            purpose_of_use=self.purpose_of_use,
            operation=self.operation,
        )
        return replace(subject, **more)

    async def release(self) -> None:
        """End the reading so far: no database connection is held while Orthanc is asked."""
        await self.session.commit()

    async def done(self, **more: Any) -> None:
        """Add what was done to the transaction: the change and its record stand together."""
        await AuditTrail.add(self.session, self.entry(Outcome.DONE, **more))

    def within(self, session: AsyncSession) -> "PatientAccess":
        """The same access in another transaction, which several may share: what is `done` there
        is the outcome of all that this one's session has under way. Once it is committed, say so:
        `ended`."""
        for each in operations.under_way(self.session):
            operations.watch(session, each)
        return replace(self, session=session)

    def ended(self) -> None:
        """What this session had under way has its outcome."""
        operations.settled(self.session, operations.under_way(self.session))


class Gate:
    """Decides, records, and makes accesses. One per app; `app.state.gate`."""

    def __init__(
        self,
        database: Database,
        trail: AuditTrail,
        verifier: TokenVerifier,
        ehr: Ehr | None = None,
        failed_tries_per_minute: int = 60,
    ) -> None:
        self.database = database
        self.trail = trail
        self.failed_tries = FailedTries(trail, failed_tries_per_minute)
        self.verifier = verifier
        self.ehr = ehr

    async def patient_access(
        self,
        session: AsyncSession,
        principal: Principal,
        action: Action,
        origin: Origin,
        subject: Subject,
        key: UUID | str,
        *,
        ctx: str = "",
        record_grant: bool = True,
    ) -> PatientAccess:
        """The access, with its record committed.

        `record_grant=False` is for the later requests of a viewer session, whose first access to
        a study is the record (PS3.15 A.5). Denials are always recorded.

        Raises NotFound for an unknown subject, Denial, EhrUnavailable, AuditUnavailable.
        """
        entry = Entry(
            action=action,
            outcome=Outcome.DENIED,
            origin=origin,
            actor=principal.sub,
            actor_roles=principal.roles_text,
            ctx=ctx,
        )
        # The role first: who may never do this learns nothing about what exists.
        asked = may_ask(principal, action)
        if not asked.allowed:
            raise await self._denied(asked, replace(entry, detail={subject.value: str(key)}))
        order, study, patient = await _resolve(session, subject, key)
        if patient is None:
            unknown = replace(entry, reason="unknown", detail={subject.value: str(key)})
            await self.trail.record(unknown)
            raise NotFound(_UNKNOWN[subject])
        entry = replace(
            entry,
            patient_id=patient.id,
            order_id=order.id if order else None,
            study_instance_uid=study.study_instance_uid if study else "",
        )
        decision = decide(principal, action, await _relations(session, principal, patient))
        if self.ehr is not None and decision.allowed:
            await session.commit()  # only read so far; no connection is held while the EHR is asked
            purpose = decision.purpose_of_use
            asked_of = (patient.id, patient.mrn, patient.mrn_issuer)
            question = Question.of(principal, action, *asked_of, purpose)
            decision = await narrow(self.ehr, decision, question)
        if not decision.allowed:
            raise await self._denied(decision, entry)
        entry = replace(entry, purpose_of_use=decision.purpose_of_use)
        if record_grant:
            entry = await self.grant(session, replace(entry, detail=carried(decision.by)))
        return PatientAccess(
            session=session,
            principal=principal,
            action=action,
            origin=origin,
            patient=patient,
            order=order,
            study=study,
            ctx=ctx,
            purpose_of_use=decision.purpose_of_use,
            by=decision.by,
            operation=entry.operation,
            seal=SEAL,
        )

    async def grant(self, session: AsyncSession, entry: Entry) -> Entry:
        """Commit the record of a grant, with its operation in the journal if it will have an
        outcome: `session` is where that comes about. The entry as it was written."""
        granted = replace(
            entry, outcome=Outcome.GRANTED, operation=self.trail.operation(entry.action)
        )
        await self.trail.record(granted)
        if granted.operation is not None:
            operations.watch(session, granted.operation)
        return granted

    async def role_check(
        self,
        principal: Principal,
        entry: Entry,
        *,
        record_grant: bool = True,
        of_no_patient: bool = False,
    ) -> None:
        """Raises Denial where no role of the caller knows the action, or no scope covers it; with
        `of_no_patient`, where this is all there is to decide, where a patient in context forbids it
        too."""
        ask = decide_of_no_patient if of_no_patient else may_ask
        decision = ask(principal, entry.action)
        if not decision.allowed:
            raise await self._denied(decision, entry)
        if record_grant:
            await self.trail.record(replace(entry, outcome=Outcome.GRANTED))

    async def _denied(self, decision: Decision, entry: Entry) -> Denial | EhrUnavailable:
        """The error to raise, on record."""
        assert decision.reason is not None
        await self.trail.record(
            replace(entry, outcome=Outcome.DENIED, reason=decision.reason.value)
        )
        if decision.reason is Reason.EHR_UNAVAILABLE:
            return EhrUnavailable(EHR_SILENT)
        return Denial(decision.reason)

    @asynccontextmanager
    async def transaction(
        self, grants: list[Entry], unread: Entry | None = None
    ) -> AsyncIterator[AsyncSession]:
        """The business transaction of one request, and the record of its failure.

        `unread` is recorded where a file was refused before it could be said whose it is.
        """
        async with self.database.session() as session:
            try:
                yield session
                operations.ending(session)
                await session.commit()
            except Exception as error:
                await session.rollback()
                reason = _failure(error)
                detail = {"problem": error.detail} if isinstance(error, LightboxError) else {}
                asked = grants
                ours = isinstance(error, LightboxError) and not isinstance(error, _RECORDED)
                if not grants and unread is not None and ours:
                    asked = [unread]
                # What was left to be found out about stays in the journal.
                still_open = operations.under_way(session)
                failed = [
                    replace(
                        entry,
                        outcome=Outcome.FAILED,
                        reason=reason,
                        detail=detail,
                        operation=entry.operation if entry.operation in still_open else None,
                    )
                    for entry in asked
                ]
                if failed:
                    await self.trail.record(*failed)
                    operations.settled(session, operations.closed_by(failed))
                await self._close(session)
                raise
            finally:
                self.trail.unsettled |= operations.under_way(session)

    async def _close(self, session: AsyncSession) -> None:
        """End what failed and is recorded by who tried it, the follower say."""
        if operations.under_way(session):
            # If it can't, it is left to be found out about.
            with suppress(AuditUnavailable, sa.exc.SQLAlchemyError, OSError):
                operations.ending(session)
                await session.commit()


@dataclass
class RoleAccess:
    """A caller whose role may do this; the patient, if any, is named in the body.

    `admit` decides about that patient, and is the only way from here to patient data.
    """

    session: AsyncSession
    principal: Principal
    action: Action
    origin: Origin
    gate: Gate
    grants: list[Entry]

    async def admit(
        self, subject: Subject, key: UUID | str, action: Action | None = None
    ) -> PatientAccess:
        """See `Gate.patient_access`; what fails from here on is recorded under it."""
        access = await self.gate.patient_access(
            self.session, self.principal, action or self.action, self.origin, subject, key
        )
        self.grants.append(access.entry(Outcome.GRANTED))
        return access

    async def unknown(self, named: Mapping[str, str]) -> None:
        """Record that there is no patient of that name: guessing leaves its traces too."""
        entry = entry_of(self.principal, self.action, self.origin)
        await self.gate.trail.record(
            replace(entry, outcome=Outcome.DENIED, reason="unknown", detail=named)
        )

    @asynccontextmanager
    async def apart(self) -> AsyncIterator["RoleAccess"]:
        """The same caller in a transaction of its own: one of many files, say."""
        grants: list[Entry] = []
        unread = entry_of(self.principal, self.action, self.origin)
        async with self.gate.transaction(grants, unread) as session:
            yield replace(self, session=session, grants=grants)

    async def done(self, **more: Any) -> None:
        """Add what was done to the transaction."""
        await AuditTrail.add(
            self.session, replace(entry_of(self.principal, self.action, self.origin), **more)
        )


_RECORDED = (Forbidden, NotFound, Unavailable)  # as denied; or nothing can be recorded now
_UNKNOWN: Mapping[Subject, str] = {
    Subject.ORDER: "No order has this id.",
    Subject.PATIENT: "No patient has this id.",
    Subject.STUDY: "No study here has this StudyInstanceUID.",
}


def _failure(error: Exception) -> str:
    """The word an error is recorded with."""
    if isinstance(error, LightboxError):
        return error.slug
    return "invalid-request" if isinstance(error, RequestValidationError) else type(error).__name__


def entry_of(principal: Principal, action: Action, origin: Origin) -> Entry:
    """A record that names who, what and whence; to be completed by `replace`."""
    return Entry(
        action=action,
        outcome=Outcome.DONE,
        origin=origin,
        actor=principal.sub,
        actor_roles=principal.roles_text,
    )


async def _resolve(
    session: AsyncSession, subject: Subject, key: UUID | str
) -> tuple[Order | None, Study | None, Patient | None]:
    """The patient behind a subject's key, and the order or study itself."""
    if subject is Subject.STUDY:
        try:
            uid = parse_uid(str(key))
        except ValueError as error:
            raise Unprocessable(f"The study's UID in the path is not valid: {error}") from error
        found = (
            await session.exec(
                select(Study, Patient)
                .join(Patient, col(Patient.id) == col(Study.patient_id))
                .where(Study.study_instance_uid == uid)
            )
        ).first()
        return (None, found[0], found[1]) if found else (None, None, None)
    try:
        identifier = key if isinstance(key, UUID) else UUID(key)
    except ValueError as error:
        raise Unprocessable(f"`{subject.value}` must be a UUID.") from error
    if subject is Subject.PATIENT:
        # Of a patient who was merged into another: that one, whose the record is now.
        return None, None, await survivor(session, identifier)
    found_order = (
        await session.exec(
            select(Order, Patient)
            .join(Patient, col(Patient.id) == col(Order.patient_id))
            .where(Order.id == identifier)
        )
    ).first()
    return (found_order[0], None, found_order[1]) if found_order else (None, None, None)


_HOLDING = clauses(CALLER, NOW)
_RELATIONS = (
    sa.select(*(clause.label(relation.name) for relation, clause in _HOLDING.items()))
    .select_from(Patient)
    .where(col(Patient.id) == sa.bindparam("whose", type_=sa.Uuid()))
)


async def _relations(session: AsyncSession, principal: Principal, patient: Patient) -> list[Any]:
    """The relations that hold between caller and patient now: one query."""
    values = {**caller_values(principal), "whose": patient.id, "now": utcnow()}
    row = (await (await session.connection()).execute(_RELATIONS, values)).one()
    return [relation for relation, held in zip(_HOLDING, row, strict=True) if held]
