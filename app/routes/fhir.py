"""The trail in FHIR R4, for auditors: AuditEvent after IHE BALP."""

import re
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import Depends, Path, Request, Response
from sqlmodel import col, select

from app import __version__
from app.access import Caller, Public, RoleAccess
from app.audit import Action
from app.audit.known import look_up
from app.dicomweb.media import accepted
from app.errors import NotAcceptable, NotFound
from app.fhir import (
    BASE_PATH,
    MEDIA_TYPE,
    PARAMETERS,
    Server,
    audit_event,
    capability_statement,
    read_search,
    searchset,
)
from app.inert import inert_json
from app.models import AuditRecord
from app.routing import AccessRouter
from app.settings import Settings

router = AccessRouter(prefix=BASE_PATH, tags=["fhir"])

_LENIENT = re.compile(r"(?:^|[,;\s])handling\s*=\s*\"?lenient\"?(?:$|[,;\s])", re.IGNORECASE)


class ReadOne(Caller):
    """As `Caller`; the record says which one was read."""

    def asked(self, request: Request) -> dict[str, Any]:
        return {"query": {**request.query_params, "_id": request.path_params["record_id"]}}


Searching = Annotated[
    RoleAccess, Depends(Caller(Action.AUDIT_READ, parses_query=True), scope="function")
]
ReadingOne = Annotated[RoleAccess, Depends(ReadOne(Action.AUDIT_READ), scope="function")]

_DOCUMENTED: dict[str, Any] = {
    "parameters": [
        {
            "name": each.name,
            "in": "query",
            "required": False,
            "description": each.documentation or "See FHIR R4, search.",
            "schema": {"type": "string"},
        }
        for each in PARAMETERS
    ]
}
_FHIR: dict[int | str, dict[str, Any]] = {200: {"content": {MEDIA_TYPE: {}}}}


@router.get("/metadata", dependencies=[Depends(Public("Says what the FHIR API can do; no data."))])
async def metadata(request: Request) -> Response:
    """The CapabilityStatement."""
    settings: Settings = request.app.state.settings
    return _fhir(request, capability_statement(_base(settings), __version__))


@router.get(
    "/AuditEvent", response_class=Response, responses=_FHIR, openapi_extra=dict(_DOCUMENTED)
)
async def search_audit_events(access: Searching, request: Request) -> Response:
    """AuditEvents, newest first. Searching them is recorded too."""
    settings: Settings = request.app.state.settings
    prefer = ",".join(request.headers.getlist("prefer"))
    server = _server(settings)
    search = read_search(
        request.query_params.multi_items(),
        lenient=_LENIENT.search(prefer) is not None,
        token_issuer=server.token_issuer,
    )
    query = select(AuditRecord).where(*search.conditions)
    found = (
        await access.session.exec(
            query.order_by(col(AuditRecord.id).desc()).limit(search.count + 1)
        )
    ).all()
    page = found[: search.count]
    known = await look_up(access.session, page)
    events = [audit_event(each, known, server) for each in page]
    self_url, next_url = f"{_base(settings)}/AuditEvent", None
    if len(found) > search.count:
        onward = [(name, value) for name, value in search.used if name != "_before"]
        next_url = f"{self_url}?{urlencode([*onward, ('_before', str(page[-1].id))])}"
    if search.used:
        self_url += f"?{urlencode(search.used)}"
    return _fhir(request, searchset(events, _base(settings), self_url, next_url))


@router.get("/AuditEvent/{record_id}", response_class=Response, responses=_FHIR)
async def read_audit_event(
    access: ReadingOne, request: Request, record_id: Annotated[str, Path(max_length=64)]
) -> Response:
    """One AuditEvent. Reading it is recorded too."""
    record = None
    if record_id.isascii() and record_id.isdigit() and len(record_id) <= 18:
        record = await access.session.get(AuditRecord, int(record_id))
    if record is None or str(record.id) != record_id:
        raise NotFound("The trail has no record of this id.")
    known = await look_up(access.session, [record])
    return _fhir(request, audit_event(record, known, _server(request.app.state.settings)))


def _base(settings: Settings) -> str:
    return f"{settings.api_base_url}{BASE_PATH}"


def _server(settings: Settings) -> Server:
    issuer = settings.oidc_issuer or ""
    return Server(settings.api_base_url, settings.site, issuer)


def _fhir(request: Request, resource: dict[str, Any]) -> Response:
    """The resource as JSON. Raises NotAcceptable where neither FHIR's JSON nor any is accepted."""
    ranges = accepted(request.headers.get("accept", ""))
    if not any(each.takes(MEDIA_TYPE) or each.takes("application/json") for each in ranges):
        raise NotAcceptable(f"This is sent as {MEDIA_TYPE}; there is no XML here.")
    return Response(inert_json(resource), media_type=MEDIA_TYPE)
