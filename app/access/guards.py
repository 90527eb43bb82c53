"""Guards: FastAPI dependencies that decide, record, and return what a handler needs.

Every route declares exactly one (`app.routing.AccessRouter` refuses it otherwise):

Grant(action, of=Subject.ORDER)   the patient behind a path parameter  -> PatientAccess
Caller(action)                    no patient, or one named in the body -> RoleAccess
Visible(action)                   a list                               -> VisiblePatients
Public("why")                     open to everyone                     -> None

The decision is committed to the audit trail before the handler runs. The guard also is the edge
of the request's one business transaction: it commits when the handler returns, before the answer
is sent, and rolls back when it raises, adding a `failed` record under the same request id.
"""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Annotated, Any
from uuid import UUID

import sqlalchemy as sa
from fastapi import Depends, Request
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.access.policy import Decision, Reason, clauses, decide, visible
from app.audit import Action, AuditTrail, Entry, Origin, Outcome
from app.db import Database, utcnow
from app.dicom import parse_uid
from app.errors import Forbidden, LightboxError, NotFound, Unauthenticated, Unprocessable
from app.identity import Principal, TokenVerifier
from app.models import Order, Patient, Study

DENIAL_SENTENCES: Mapping[Reason, str] = {
    Reason.ROLE: "Your role does not allow this.",
    Reason.NO_RELATIONSHIP: "You have no relationship to this patient that allows this: you "
    "neither requested or attend one of their orders, nor are on their care team, nor is there "
    "an imaging order at your site that your role works on.",
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


_SEAL = object()


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
    seal: object = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.seal is not _SEAL:
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
        )
        return replace(subject, **more)

    async def release(self) -> None:
        """End the reading so far: no database connection is held while Orthanc is asked."""
        await self.session.commit()

    async def done(self, **more: Any) -> None:
        """Add what was done to the transaction: the change and its record stand together."""
        await AuditTrail.add(self.session, self.entry(Outcome.DONE, **more))


class Gate:
    """Decides, records, and makes accesses. One per app; `app.state.gate`."""

    def __init__(self, database: Database, trail: AuditTrail, verifier: TokenVerifier) -> None:
        self.database = database
        self.trail = trail
        self.verifier = verifier

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

        Raises NotFound for an unknown subject, Denial, AuditUnavailable.
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
        by_role = decide(principal, action)
        if by_role.reason is Reason.ROLE:
            raise await self._denied(by_role, replace(entry, detail={subject.value: str(key)}))
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
        if not decision.allowed:
            raise await self._denied(decision, entry)
        if record_grant:
            by = {"by": sorted(decision.by)} if decision.by else {}
            await self.trail.record(replace(entry, outcome=Outcome.GRANTED, detail=by))
        return PatientAccess(
            session=session,
            principal=principal,
            action=action,
            origin=origin,
            patient=patient,
            order=order,
            study=study,
            ctx=ctx,
            seal=_SEAL,
        )

    async def role_check(
        self, principal: Principal, entry: Entry, *, record_grant: bool = True
    ) -> None:
        """Raises Denial where no role of the caller knows the action."""
        decision = decide(principal, entry.action)
        if decision.reason is Reason.ROLE:
            raise await self._denied(decision, entry)
        if record_grant:
            await self.trail.record(replace(entry, outcome=Outcome.GRANTED))

    async def _denied(self, decision: Decision, entry: Entry) -> Denial:
        assert decision.reason is not None
        await self.trail.record(
            replace(entry, outcome=Outcome.DENIED, reason=decision.reason.value)
        )
        return Denial(decision.reason)

    @asynccontextmanager
    async def transaction(self, grants: list[Entry]) -> AsyncIterator[AsyncSession]:
        """The business transaction of one request, and the record of its failure."""
        async with self.database.session() as session:
            try:
                yield session
                await session.commit()
            except Exception as error:
                await session.rollback()
                reason = _failure(error)
                detail = {"problem": error.detail} if isinstance(error, LightboxError) else {}
                failed = [
                    replace(entry, outcome=Outcome.FAILED, reason=reason, detail=detail)
                    for entry in grants
                ]
                if failed:
                    await self.trail.record(*failed)
                raise


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
        entry = _entry_of(self.principal, self.action, self.origin)
        await self.gate.trail.record(
            replace(entry, outcome=Outcome.DENIED, reason="unknown", detail=named)
        )

    @asynccontextmanager
    async def apart(self) -> AsyncIterator["RoleAccess"]:
        """The same caller in a transaction of its own: one of many files, say."""
        grants: list[Entry] = []
        async with self.gate.transaction(grants) as session:
            yield replace(self, session=session, grants=grants)

    async def done(self, **more: Any) -> None:
        """Add what was done to the transaction."""
        await AuditTrail.add(
            self.session, replace(_entry_of(self.principal, self.action, self.origin), **more)
        )


@dataclass(frozen=True)
class VisiblePatients:
    """A caller's window on the patients: lists start from `condition`, never without it."""

    session: AsyncSession
    principal: Principal
    action: Action
    origin: Origin
    gate: Gate
    condition: sa.ColumnElement[bool]  # over the columns of `Patient`

    async def disclose(self, patient_ids: Iterable[UUID]) -> None:
        """Record, before the answer leaves, whose data a list shows: one patient a record."""
        entry = _entry_of(self.principal, self.action, self.origin)
        records = [replace(entry, patient_id=each) for each in sorted(set(patient_ids))]
        if records:
            await self.gate.trail.record(*records)


class Guard(ABC):
    """What `AccessRouter` looks for among a route's dependencies."""

    @abstractmethod
    def describe(self) -> dict[str, str]:
        """What OpenAPI says of it under `x-access`."""

    async def before_body(self, request: Request) -> None:
        """Refuse who may not ask at all. FastAPI reads a body before it runs a guard: where that
        fails, `AccessRouter` calls this, so that only an entitled caller hears why."""
        return


class Public(Guard):
    """Open to everyone, for a reason."""

    def __init__(self, why: str) -> None:
        self.why = why

    async def __call__(self) -> None:
        return None

    def describe(self) -> dict[str, str]:
        return {"guard": "public", "why": self.why}


_bearer = HTTPBearer(auto_error=False, description="JWT: issuer, audience and expiry checked.")


def origin_of(request: Request) -> Origin:
    """The request's id (from `app.problems`' middleware) and the client's address."""
    return Origin(
        request_id=request.state.request_id,
        client_address=request.client.host if request.client else "",
    )


async def current_principal(
    request: Request,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> Principal:
    """The caller behind the bearer token. Raises Unauthenticated, which is recorded."""
    gate: Gate = request.app.state.gate
    try:
        if credentials is None:
            raise Unauthenticated("Send a bearer token: `Authorization: Bearer <token>`.")
        return await gate.verifier.principal(credentials.credentials)
    except Unauthenticated as error:
        await gate.trail.record(
            Entry(
                action=Action.SIGN_IN,
                outcome=Outcome.DENIED,
                origin=origin_of(request),
                reason="no-token" if credentials is None else "bad-token",
                detail={"path": request.url.path[:256]},
            )
        )
        raise error


Signed = Annotated[Principal, Depends(current_principal)]


def refuse_ignored_parameters(request: Request) -> None:
    """A filter that is misspelt, doubled or empty would be ignored, and the answer would show
    more than was asked for: better none. Raises Unprocessable."""
    known = {field.alias for field in request.scope["route"].dependant.query_params}
    given = [name for name, _ in request.query_params.multi_items()]
    for name, value in request.query_params.multi_items():
        shown = name if name.isidentifier() and len(name) <= 64 else "a parameter"
        if name not in known:
            takes = f"it takes {', '.join(sorted(known))}" if known else "it takes none"
            raise Unprocessable(f"This address does not know the parameter `{shown}`; {takes}.")
        if given.count(name) > 1:
            raise Unprocessable(f"`{shown}` is given more than once.")
        if not value.isprintable():
            raise Unprocessable(f"`{shown}` holds control characters.")
        if not value:
            raise Unprocessable(f"`{shown}` is empty; leave it out to not filter by it.")


async def _refuse_by_role(request: Request, action: Action) -> None:
    gate: Gate = request.app.state.gate
    principal = await current_principal(request, await _bearer(request))
    await gate.role_check(
        principal, _entry_of(principal, action, origin_of(request)), record_grant=False
    )


class Grant(Guard):
    """The caller may do `action` to the patient behind the path parameter `of`."""

    def __init__(self, action: Action, *, of: Subject) -> None:
        self.action = action
        self.of = of

    async def __call__(self, request: Request, principal: Signed) -> AsyncIterator[PatientAccess]:
        gate: Gate = request.app.state.gate
        grants: list[Entry] = []
        async with gate.transaction(grants) as session:
            access = await gate.patient_access(
                session,
                principal,
                self.action,
                origin_of(request),
                self.of,
                request.path_params[self.of.value],
            )
            grants.append(access.entry(Outcome.GRANTED))
            refuse_ignored_parameters(request)
            yield access

    async def before_body(self, request: Request) -> None:
        await _refuse_by_role(request, self.action)

    def describe(self) -> dict[str, str]:
        return {"guard": "patient", "action": self.action.value, "of": self.of.value}


class Caller(Guard):
    """The caller's role knows `action`. With `patient_in_body`, the handler `admit`s the patient
    and that is the record; otherwise the role's grant is."""

    def __init__(self, action: Action, *, patient_in_body: bool = False) -> None:
        self.action = action
        self.patient_in_body = patient_in_body

    async def __call__(self, request: Request, principal: Signed) -> AsyncIterator[RoleAccess]:
        gate: Gate = request.app.state.gate
        origin = origin_of(request)
        entry = _entry_of(principal, self.action, origin)
        await gate.role_check(principal, entry, record_grant=not self.patient_in_body)
        grants: list[Entry] = [] if self.patient_in_body else [entry]
        async with gate.transaction(grants) as session:
            refuse_ignored_parameters(request)
            yield RoleAccess(session, principal, self.action, origin, gate, grants)

    async def before_body(self, request: Request) -> None:
        await _refuse_by_role(request, self.action)

    def describe(self) -> dict[str, str]:
        guard = "patient-in-body" if self.patient_in_body else "role"
        return {"guard": guard, "action": self.action.value}


class Visible(Guard):
    """A list: whatever is asked, only patients for whom `action` would be granted."""

    def __init__(self, action: Action) -> None:
        self.action = action

    async def __call__(self, request: Request, principal: Signed) -> AsyncIterator[VisiblePatients]:
        gate: Gate = request.app.state.gate
        origin = origin_of(request)
        entry = replace(
            _entry_of(principal, self.action, origin), detail={"query": dict(request.query_params)}
        )
        await gate.role_check(principal, entry)
        async with gate.transaction([entry]) as session:
            refuse_ignored_parameters(request)
            condition = visible(principal, self.action, utcnow())
            yield VisiblePatients(session, principal, self.action, origin, gate, condition)

    def describe(self) -> dict[str, str]:
        return {"guard": "visible-patients", "action": self.action.value}


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


def _entry_of(principal: Principal, action: Action, origin: Origin) -> Entry:
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
        return None, None, await session.get(Patient, identifier)
    found_order = (
        await session.exec(
            select(Order, Patient)
            .join(Patient, col(Patient.id) == col(Order.patient_id))
            .where(Order.id == identifier)
        )
    ).first()
    return (found_order[0], None, found_order[1]) if found_order else (None, None, None)


async def _relations(session: AsyncSession, principal: Principal, patient: Patient) -> list[Any]:
    """The relations that hold between caller and patient now: one query."""
    holds = clauses(principal, utcnow())
    connection = await session.connection()
    row = (
        await connection.execute(
            sa.select(*(clause.label(relation.name) for relation, clause in holds.items()))
            .select_from(Patient)
            .where(col(Patient.id) == patient.id)
        )
    ).one()
    return [relation for relation, held in zip(holds, row, strict=True) if held]
