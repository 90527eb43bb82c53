"""The audit trail, and what is still on its way to others."""

from datetime import datetime
from uuid import UUID, uuid4

import sqlalchemy as sa
from sqlmodel import Field, SQLModel

from app.db import utcnow
from app.models.columns import EMPTY, UtcDateTime


class AuditRecord(SQLModel, table=True):
    """One line of the trail; see `app.audit`. Insert and read only, held by triggers.

    No foreign keys: the trail outlives what it speaks of. The chain alone gives ids; a new column
    has to be written into it (`app.audit.chain.COLUMNS`).
    """

    __tablename__ = "audit_record"

    id: int | None = Field(
        default=None,
        primary_key=True,
        sa_type=sa.BigInteger().with_variant(sa.Integer, "sqlite"),
        sa_column_kwargs={"autoincrement": False},
    )
    at: datetime = Field(default_factory=utcnow, sa_type=UtcDateTime, index=True)
    request_id: str = Field(max_length=64, index=True)
    action: str = Field(max_length=64)
    outcome: str = Field(max_length=16)
    reason: str = ""
    actor: str = Field(default="", max_length=255, index=True)
    actor_roles: str = ""
    client_address: str = ""
    patient_id: UUID | None = Field(default=None, index=True)
    order_id: UUID | None = None
    study_instance_uid: str = Field(default="", max_length=64, index=True)
    ctx: str = Field(default="", max_length=64)
    detail: str = "{}"  # canonical JSON
    # HL7 v3 PurposeOfUse: `BTG` for what was done only because the glass was broken.
    purpose_of_use: str = Field(default="", max_length=16, sa_column_kwargs=EMPTY)
    # Of the record before and this one's canonical text: see `app.audit.chain`.
    sha256: str = Field(default="", max_length=64, sa_column_kwargs=EMPTY)


class ExportPosition(SQLModel, table=True):
    """How far a sink outside has got: the last record that it has."""

    __tablename__ = "export_position"

    sink: str = Field(primary_key=True, max_length=255)
    record_id: int = Field(sa_type=sa.BigInteger)
    at: datetime = Field(default_factory=utcnow, sa_type=UtcDateTime)


class Notification(SQLModel, table=True):
    """An event that the hospital's webhook is told of, until it has answered or we gave up."""

    id: UUID = Field(default_factory=uuid4, primary_key=True)
    event: str = Field(max_length=64)
    body: str  # JSON, as it is sent
    created_at: datetime = Field(default_factory=utcnow, sa_type=UtcDateTime, index=True)
    attempts: int = 0
    next_attempt_at: datetime | None = Field(
        default_factory=utcnow, sa_type=UtcDateTime, index=True
    )  # None: delivered, or given up
    delivered_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    last_error: str = ""
