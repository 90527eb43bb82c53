"""The trail, for auditors."""

import json
from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

from fastapi import Depends, Query, Request, Response
from pydantic import BaseModel
from sqlmodel import col, select

from app.access import Caller, RoleAccess
from app.audit import Action, Outcome
from app.errors import Unprocessable
from app.models import AuditRecord
from app.routes.paging import Cursor, Limit, link_next, read_cursor
from app.routes.times import UtcTime
from app.routing import AccessRouter

router = AccessRouter(prefix="/api/v1/audit", tags=["audit"])

ReadAudit = Annotated[RoleAccess, Depends(Caller(Action.AUDIT_READ), scope="function")]


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
    detail: dict[str, Any]

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
    study_instance_uid: Annotated[str, Query(max_length=64)] = "",
    order_id: UUID | None = None,
    ctx: Annotated[str, Query(max_length=64, description="A viewer's session.")] = "",
    request_id: Annotated[str, Query(max_length=64)] = "",
    actor: Annotated[str, Query(max_length=255)] = "",
    action: Action | None = None,
    outcome: Outcome | None = None,
    time_from: Annotated[UtcTime | None, Query(alias="from")] = None,
    time_to: Annotated[UtcTime | None, Query(alias="to")] = None,
    limit: Limit = 50,
    cursor: Cursor = "",
) -> list[AuditOut]:
    """Records, newest first. Reading them is recorded too."""
    query = select(AuditRecord)
    if patient_id is not None:
        query = query.where(AuditRecord.patient_id == patient_id)
    if study_instance_uid:
        query = query.where(AuditRecord.study_instance_uid == study_instance_uid)
    if order_id is not None:
        query = query.where(AuditRecord.order_id == order_id)
    if ctx:
        query = query.where(AuditRecord.ctx == ctx)
    if request_id:
        query = query.where(AuditRecord.request_id == request_id)
    if actor:
        query = query.where(AuditRecord.actor == actor)
    if action is not None:
        query = query.where(AuditRecord.action == action.value)
    if outcome is not None:
        query = query.where(AuditRecord.outcome == outcome.value)
    if time_from is not None:
        query = query.where(AuditRecord.at >= time_from)
    if time_to is not None:
        query = query.where(AuditRecord.at < time_to)
    if cursor:
        key = read_cursor(cursor)
        if not (key.isascii() and key.isdigit() and len(key) <= 18):
            raise Unprocessable("`cursor` is not one that this API gave.")
        query = query.where(col(AuditRecord.id) < int(key))
    found = (
        await access.session.exec(query.order_by(col(AuditRecord.id).desc()).limit(limit + 1))
    ).all()
    page = found[:limit]
    link_next(request, response, str(page[-1].id) if len(found) > limit else None)
    return [AuditOut.of(each) for each in page]
