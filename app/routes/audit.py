"""The trail, for auditors."""

import json
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

from fastapi import Depends, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from sqlmodel import col, func, select

from app.access import Caller, RoleAccess
from app.audit import Action, Outcome
from app.db import Database
from app.errors import Unprocessable
from app.models import AuditRecord
from app.routes.paging import Cursor, Limit, link_next, read_cursor
from app.routes.tables import CSV_HEADERS, CSV_MEDIA_TYPE, csv_head, csv_rows
from app.routes.times import UtcTime
from app.routing import AccessRouter

router = AccessRouter(prefix="/api/v1/audit", tags=["audit"])


class ReadTrail(Caller):
    """As `Caller`; the record is about the patient whose records alone are asked for."""

    def whose(self, request: Request) -> UUID | None:
        named = request.query_params.getlist("patient_id")
        try:
            return UUID(named[0]) if len(named) == 1 else None
        except ValueError:
            return None  # refused, once it is recorded


ReadAudit = Annotated[RoleAccess, Depends(ReadTrail(Action.AUDIT_READ), scope="function")]
Ctx = Annotated[str, Query(max_length=64, description="A viewer's session.")]
From = Annotated[UtcTime | None, Query(alias="from")]
To = Annotated[UtcTime | None, Query(alias="to")]
Text64 = Annotated[str, Query(max_length=64)]
Text255 = Annotated[str, Query(max_length=255)]
ROWS_AT_ONCE = 500


class AuditOut(BaseModel):
    """One record. `detail` depends on the action; docs/audit.md lists it."""

    id: int
    at: datetime
    request_id: str
    action: str
    outcome: str
    reason: str
    actor: str
    actor_roles: list[str]
    client_address: str
    patient_id: UUID | None
    order_id: UUID | None
    study_instance_uid: str
    ctx: str
    purpose_of_use: str
    detail: dict[str, Any]
    sha256: str

    @classmethod
    def of(cls, record: AuditRecord) -> "AuditOut":
        fields = record.model_dump()
        fields["actor_roles"] = [each for each in record.actor_roles.split(",") if each]
        fields["detail"] = json.loads(record.detail)
        return cls(**fields)


@router.get("")
async def read_audit(
    access: ReadAudit,
    request: Request,
    response: Response,
    patient_id: UUID | None = None,
    study_instance_uid: Text64 = "",
    order_id: UUID | None = None,
    ctx: Ctx = "",
    request_id: Text64 = "",
    actor: Text255 = "",
    action: Action | None = None,
    outcome: Outcome | None = None,
    time_from: From = None,
    time_to: To = None,
    limit: Limit = 50,
    cursor: Cursor = "",
) -> list[AuditOut]:
    """Records, newest first. Reading them is recorded too."""
    conditions = _matching(
        patient_id=patient_id,
        study_instance_uid=study_instance_uid,
        order_id=order_id,
        ctx=ctx,
        request_id=request_id,
        actor=actor,
        action=action,
        outcome=outcome,
    )
    conditions += _between(time_from, time_to)
    if cursor:
        key = read_cursor(cursor)
        if not (key.isascii() and key.isdigit() and len(key) <= 18):
            raise Unprocessable("`cursor` is not one that this API gave.")
        conditions.append(col(AuditRecord.id) < int(key))
    query = select(AuditRecord).where(*conditions).order_by(col(AuditRecord.id).desc())
    found = (await access.session.exec(query.limit(limit + 1))).all()
    page = found[:limit]
    link_next(request, response, str(page[-1].id) if len(found) > limit else None)
    return [AuditOut.of(each) for each in page]


@router.get(".csv", response_class=Response, responses={200: {"content": {CSV_MEDIA_TYPE: {}}}})
async def read_audit_as_csv(
    access: ReadAudit,
    request: Request,
    patient_id: UUID | None = None,
    study_instance_uid: Text64 = "",
    order_id: UUID | None = None,
    ctx: Ctx = "",
    request_id: Text64 = "",
    actor: Text255 = "",
    action: Action | None = None,
    outcome: Outcome | None = None,
    time_from: From = None,
    time_to: To = None,
) -> Response:
    """All records that fit, newest first, for a spreadsheet. Reading them is recorded too."""
    conditions = _matching(
        patient_id=patient_id,
        study_instance_uid=study_instance_uid,
        order_id=order_id,
        ctx=ctx,
        request_id=request_id,
        actor=actor,
        action=action,
        outcome=outcome,
    )
    conditions += _between(time_from, time_to)
    # What is written while this is read comes after it, and is not in it.
    newest = (await access.session.exec(select(func.max(AuditRecord.id)))).one()
    database: Database = request.app.state.database
    return StreamingResponse(
        _csv(database, conditions, newest or 0),
        media_type=CSV_MEDIA_TYPE,
        headers={**CSV_HEADERS, "Content-Disposition": 'attachment; filename="audit.csv"'},
    )


def _matching(**wanted: Any) -> list[Any]:
    """Conditions on the columns of these names; None and empty filter nothing."""
    return [
        getattr(AuditRecord, name) == value
        for name, value in wanted.items()
        if value not in (None, "")
    ]


def _between(time_from: datetime | None, time_to: datetime | None) -> list[Any]:
    since = [] if time_from is None else [AuditRecord.at >= time_from]
    return since if time_to is None else [*since, AuditRecord.at < time_to]


_COLUMNS = list(AuditOut.model_fields)


async def _csv(database: Database, conditions: list[Any], newest: int) -> AsyncIterator[bytes]:
    """The lines, some hundred at a time: no transaction stays open as long as somebody reads."""
    yield csv_head(_COLUMNS)
    before = newest + 1
    while True:
        query = select(AuditRecord).where(*conditions, col(AuditRecord.id) < before)
        async with database.session() as session:
            page = (
                await session.exec(query.order_by(col(AuditRecord.id).desc()).limit(ROWS_AT_ONCE))
            ).all()
        yield csv_rows([_text(getattr(each, name)) for name in _COLUMNS] for each in page)
        if len(page) < ROWS_AT_ONCE:
            return
        before = page[-1].id or 0


def _text(value: Any) -> str:
    if value is None:
        return ""
    return value.isoformat() if isinstance(value, datetime) else str(value)
