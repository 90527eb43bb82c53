"""Requests that are safe to repeat."""

from datetime import datetime

from sqlmodel import Field, SQLModel

from app.db import utcnow
from app.models.columns import UtcDateTime


class IdempotencyKey(SQLModel, table=True):
    """A caller's key, the request that it stands for, and what was answered; see
    `app.idempotency`."""

    __tablename__ = "idempotency_key"

    actor: str = Field(primary_key=True, max_length=255)
    key: str = Field(primary_key=True, max_length=255)
    request_sha256: str = Field(max_length=64)  # of method, address and body
    request_id: str = Field(max_length=64)
    claim: str = Field(max_length=32)  # of the request that is at work on it
    claimed_at: datetime = Field(default_factory=utcnow, sa_type=UtcDateTime)
    created_at: datetime = Field(default_factory=utcnow, sa_type=UtcDateTime, index=True)
    answered_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    status: int = 0
    body: str = ""  # JSON, as it was sent
    patient_ids: str = ""  # comma-separated: whom it was about
