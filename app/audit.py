"""The trail: what may be asked, and the record that somebody asked it.

Records are only ever added. The decision is committed before the handler runs; what became of
it is a second record under the same request id. If a record can't be written, nothing is shown.
DICOM PS3.15 A.5 gives the events; `Action` is our one vocabulary for rights and records alike.
"""

import json
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlmodel.ext.asyncio.session import AsyncSession

from app.db import Database
from app.errors import AuditUnavailable
from app.models import AuditRecord

logger = logging.getLogger(__name__)


class Action(StrEnum):
    """What a caller may ask for, `subject:verb`. Rights and audit records use the same words."""

    ACCESS_EXPLAIN = "access:explain"
    ACCESS_REPORT = "access:report"
    AUDIT_READ = "audit:read"
    CARE_TEAM_READ = "care-team:read"
    CARE_TEAM_WRITE = "care-team:write"
    GLASS_BREAK = "glass:break"
    GLASS_REVIEW = "glass:review"
    ORDER_CREATE = "order:create"
    ORDER_LIST = "order:list"
    ORDER_READ = "order:read"
    ORDER_WRITE = "order:write"
    PATIENT_CREATE = "patient:create"
    PATIENT_LIST = "patient:list"
    PATIENT_READ = "patient:read"
    RESTRICTION_READ = "restriction:read"
    RESTRICTION_WRITE = "restriction:write"
    SESSION_END = "session:end"
    SESSION_LIST = "session:list"
    SESSION_OPEN = "session:open"
    SESSION_REVOKE = "session:revoke"
    SIGN_IN = "sign-in"
    SIGN_OUT = "sign-out"
    STATISTICS_READ = "statistics:read"
    STUDY_COERCE = "study:coerce"
    STUDY_DELETE = "study:delete"
    STUDY_LIST = "study:list"
    STUDY_READ = "study:read"
    STUDY_RETRIEVE = "study:retrieve"
    STUDY_UPLOAD = "study:upload"
    STUDY_VIEW = "study:view"
    TAGS_MODIFY = "tags:modify"
    TAGS_READ = "tags:read"


class Outcome(StrEnum):
    """`granted` and `denied` are decisions, `done` and `failed` what became of a grant."""

    DENIED = "denied"
    DONE = "done"
    FAILED = "failed"
    GRANTED = "granted"


@dataclass(frozen=True)
class Origin:
    """Where a request came from: its id, and the address of the client as the edge saw it."""

    request_id: str
    client_address: str = ""


@dataclass(frozen=True)
class Entry:
    """What one record says; the trail adds the time."""

    action: Action
    outcome: Outcome
    origin: Origin
    actor: str = ""
    actor_roles: str = ""
    reason: str = ""
    patient_id: UUID | None = None
    order_id: UUID | None = None
    study_instance_uid: str = ""
    ctx: str = ""
    purpose_of_use: str = ""
    detail: Mapping[str, Any] = field(default_factory=dict)

    def as_record(self) -> AuditRecord:
        return AuditRecord(
            request_id=self.origin.request_id,
            client_address=self.origin.client_address,
            action=self.action.value,
            outcome=self.outcome.value,
            reason=self.reason,
            actor=self.actor,
            actor_roles=self.actor_roles,
            patient_id=self.patient_id,
            order_id=self.order_id,
            study_instance_uid=self.study_instance_uid,
            ctx=self.ctx,
            purpose_of_use=self.purpose_of_use,
            detail=json.dumps(
                self.detail, sort_keys=True, separators=(",", ":"), ensure_ascii=False
            ),
        )


class AuditTrail:
    """Writes records in a transaction of their own, or inside the business's."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def record(self, *entries: Entry) -> None:
        """Commit records now. Raises AuditUnavailable: then nothing may be shown."""
        async with self._transaction() as session:
            session.add_all([entry.as_record() for entry in entries])

    async def record_if_first(self, claim: sa.Update, entry: Entry) -> None:
        """Commit a record if, and together with, `claim` changing a row: of many requests at
        once exactly one writes it, and all return after it stands. Raises AuditUnavailable."""
        async with self._transaction() as session:
            claimed = await session.exec(claim)
            if claimed.rowcount == 1:
                session.add(entry.as_record())

    @asynccontextmanager
    async def _transaction(self) -> AsyncIterator[AsyncSession]:
        try:
            async with self._database.writing(), self._database.session() as session:
                yield session
                await session.commit()
        except (sa.exc.SQLAlchemyError, OSError) as error:
            raise _unavailable(error) from error

    @staticmethod
    async def add(session: AsyncSession, *entries: Entry) -> None:
        """Add records to the caller's transaction: they stand exactly if the change stands.

        Raises AuditUnavailable; what the change itself raises comes through as it is.
        """
        await session.flush()
        session.add_all([entry.as_record() for entry in entries])
        try:
            await session.flush()
        except (sa.exc.SQLAlchemyError, OSError) as error:
            raise _unavailable(error) from error


def _unavailable(error: Exception) -> AuditUnavailable:
    logger.error("audit record not written", exc_info=error)
    return AuditUnavailable(
        "The audit trail can't be written, so nothing is done and nothing shown. Try again soon."
    )
