"""Guards: FastAPI dependencies that decide, record, and return what a handler needs.

Every route declares exactly one (`app.routing.AccessRouter` refuses it otherwise):

Grant(action, of=Subject.ORDER)   the patient behind a path parameter  -> PatientAccess
Caller(action)                    no patient, or one named in the body -> RoleAccess
Visible(action)                   a list                               -> VisiblePatients
StudyGrant(action)                the study in a DICOMweb path         -> StudyAccess
Nothing()                         what stands at no address            -> None
Public("why")                     open to everyone                     -> None

The decision is committed to the audit trail before the handler runs. The guard also is the edge
of the request's one business transaction: it commits when the handler returns, before the answer
is sent, and rolls back when it raises, adding a `failed` record under the same request id.
"""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar
from uuid import UUID

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from app.access.gate import Gate, PatientAccess, RoleAccess, Subject, entry_of
from app.access.glance import NO_SUCH_STUDY, StudyAccess, StudyGate
from app.access.policy import visible
from app.access.window import VisiblePatients
from app.aliases import refuse_retired
from app.audit import Action, Entry, Origin, Outcome
from app.db import utcnow
from app.errors import NotFound, Unauthenticated, Unprocessable
from app.identity import Principal


class Guard(ABC):
    """What `AccessRouter` looks for among a route's dependencies."""

    @abstractmethod
    def describe(self) -> dict[str, str]:
        """What OpenAPI says of it under `x-access`."""

    async def before_body(self, request: Request) -> None:
        """Refuse who may not ask at all. FastAPI reads a body before it runs a guard: where that
        fails, `AccessRouter` calls this, so that only an entitled caller hears why."""
        return


class DirectGuard(Guard):
    """A guard that `AccessRouter.direct` asks itself, past FastAPI's dependencies: on the way of
    every image their machinery would take longer than the decision."""

    security: ClassVar[Sequence[Mapping[str, Sequence[str]]]] = ()
    """What OpenAPI says a caller has to bring."""

    @abstractmethod
    async def enter(self, request: Request) -> Any:
        """What the handler gets as `access`, or one of our errors."""

    async def __call__(self, request: Request) -> Any:
        return await self.enter(request)


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
    """The caller behind the bearer token. Raises Unauthenticated, which is recorded, and
    TooManyRequests after too many of those."""
    gate: Gate = request.app.state.gate
    try:
        if credentials is None:
            raise Unauthenticated("Send a bearer token: `Authorization: Bearer <token>`.")
        return await gate.verifier.principal(credentials.credentials)
    except Unauthenticated as error:
        await gate.failed_tries.record(
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
        principal, entry_of(principal, action, origin_of(request)), record_grant=False
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
            if self.of is Subject.PATIENT and request.method not in ("GET", "HEAD"):
                refuse_retired(access.patient, UUID(request.path_params[self.of.value]))
            yield access

    async def before_body(self, request: Request) -> None:
        await _refuse_by_role(request, self.action)

    def describe(self) -> dict[str, str]:
        return {"guard": "patient", "action": self.action.value, "of": self.of.value}


class Caller(Guard):
    """The caller's role knows `action`. With `patient_in_body`, the handler `admit`s the patient
    and that is the record; otherwise the role's grant is, with what was asked.

    `parses_query`: the handler reads the query itself, and refuses what it does not know."""

    def __init__(
        self, action: Action, *, patient_in_body: bool = False, parses_query: bool = False
    ) -> None:
        self.action = action
        self.patient_in_body = patient_in_body
        self.parses_query = parses_query

    def asked(self, request: Request) -> dict[str, Any]:
        """What the record says of the request: a parameter that was repeated is a list."""
        query = request.query_params
        given = {name: query.getlist(name) for name in query}
        said = {name: each[0] if len(each) == 1 else each for name, each in given.items()}
        return {"query": said} if said else {}

    def whose(self, request: Request) -> UUID | None:
        """The patient whom the record names, where the request is about one and no more."""
        return None

    async def __call__(self, request: Request, principal: Signed) -> AsyncIterator[RoleAccess]:
        gate: Gate = request.app.state.gate
        origin = origin_of(request)
        alone = not self.patient_in_body
        entry = entry_of(principal, self.action, origin)
        if alone:
            entry = replace(entry, detail=self.asked(request), patient_id=self.whose(request))
        await gate.role_check(principal, entry, record_grant=False, of_no_patient=alone)
        grants: list[Entry] = []
        async with gate.transaction(grants, unread=entry) as session:
            if alone:
                grants.append(await gate.grant(session, entry))
            if not self.parses_query:
                refuse_ignored_parameters(request)
            yield RoleAccess(session, principal, self.action, origin, gate, grants)

    async def before_body(self, request: Request) -> None:
        await _refuse_by_role(request, self.action)

    def describe(self) -> dict[str, str]:
        guard = "patient-in-body" if self.patient_in_body else "role"
        return {"guard": guard, "action": self.action.value}


class StudyGrant(DirectGuard):
    """The caller may do `action` to the study in the path. A study of others, and one that isn't
    there, are the same to them: 404."""

    security = ({"HTTPBearer": ()},)

    def __init__(self, action: Action) -> None:
        self.action = action

    async def enter(self, request: Request) -> StudyAccess:
        studies: StudyGate = request.app.state.studies
        principal = await current_principal(request, await _bearer(request))
        origin = origin_of(request)
        if not is_plain(request):
            await studies.refuse(principal, self.action, origin, "not-plain")
            raise NotFound(NO_SUCH_STUDY)
        path = request.path_params
        return await studies.access(
            principal,
            self.action,
            origin,
            path[Subject.STUDY.value],
            path.get("series_instance_uid", ""),
            path.get("sop_instance_uid", ""),
        )

    def describe(self) -> dict[str, str]:
        return {"guard": "study", "action": self.action.value, "of": Subject.STUDY.value}


class Nothing(DirectGuard):
    """What stands at no address: refused to everybody, and recorded under who asked."""

    async def enter(self, request: Request) -> None:
        studies: StudyGate = request.app.state.studies
        principal = await current_principal(request, await _bearer(request))
        await studies.refuse(principal, Action.STUDY_VIEW, origin_of(request), "not-enumerated")

    def describe(self) -> dict[str, str]:
        return {"guard": "nothing"}


def is_plain(request: Request) -> bool:
    """No route of the gateway needs a percent sign: one is a try to be read in two ways."""
    raw: bytes = request.scope.get("raw_path", b"")
    return b"%" not in raw and b"\\" not in raw and b"//" not in raw


class Visible(Guard):
    """A list: whatever is asked, only patients for whom `action` would be granted.

    `parses_query`: the handler reads the query itself, and refuses what it does not know."""

    def __init__(self, action: Action, *, parses_query: bool = False) -> None:
        self.action = action
        self.parses_query = parses_query

    async def __call__(self, request: Request, principal: Signed) -> AsyncIterator[VisiblePatients]:
        gate: Gate = request.app.state.gate
        origin = origin_of(request)
        entry = replace(
            entry_of(principal, self.action, origin), detail={"query": dict(request.query_params)}
        )
        await gate.role_check(principal, entry)
        async with gate.transaction([entry]) as session:
            if not self.parses_query:
                refuse_ignored_parameters(request)
            now = utcnow()
            condition = visible(principal, self.action, now)
            yield VisiblePatients(session, principal, self.action, origin, gate, condition, now)

    def describe(self) -> dict[str, str]:
        return {"guard": "visible-patients", "action": self.action.value}
