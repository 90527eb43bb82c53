"""Openings of the viewer."""

from datetime import datetime
from uuid import UUID

from sqlmodel import Field, SQLModel

from app.db import utcnow
from app.models.columns import EMPTY, UtcDateTime


class LaunchSession(SQLModel, table=True):
    """One launch of the viewer: who, which patient, until when. Secrets are kept as SHA-256."""

    __tablename__ = "launch_session"

    ctx: str = Field(primary_key=True, max_length=64)
    code_sha256: str = Field(max_length=64, unique=True)
    cookie_sha256: str | None = Field(default=None, max_length=64)
    actor: str = Field(max_length=255, index=True)
    actor_name: str = ""
    actor_roles: str  # comma-separated
    actor_site: str
    # The `sid` of the token it was made with: the sign-in that a back-channel logout ends.
    actor_sid: str = Field(default="", max_length=255, index=True, sa_column_kwargs=EMPTY)
    # When that token was issued; null: it did not say.
    actor_since: datetime | None = Field(default=None, sa_type=UtcDateTime)
    purpose_of_use: str = Field(default="", max_length=16, sa_column_kwargs=EMPTY)
    # The one patient that the token was limited to; null: to none. It stays where a merge moves
    # the launch, as the token does.
    context_patient_id: UUID | None = None
    patient_id: UUID = Field(foreign_key="patient.id", index=True)
    order_id: UUID | None = Field(default=None, foreign_key="imaging_order.id", index=True)
    opens: str  # the StudyInstanceUIDs that the viewer opens with, comma-separated
    layout: str = ""  # OHIF's hangingProtocolId; empty: OHIF chooses
    created_at: datetime = Field(default_factory=utcnow, sa_type=UtcDateTime)
    code_expires_at: datetime = Field(sa_type=UtcDateTime)
    expires_at: datetime = Field(sa_type=UtcDateTime)
    last_used_at: datetime = Field(default_factory=utcnow, sa_type=UtcDateTime)
    redeemed_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    ended_at: datetime | None = Field(default=None, sa_type=UtcDateTime, index=True)
    ended_because: str = ""


class LaunchStudy(SQLModel, table=True):
    """A study that a launch may show, and how much of it was fetched."""

    __tablename__ = "launch_study"

    ctx: str = Field(primary_key=True, foreign_key="launch_session.ctx", max_length=64)
    # No foreign key: what was looked at outlives the study's deletion.
    study_instance_uid: str = Field(primary_key=True, max_length=64, index=True)
    first_accessed_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    last_accessed_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    request_count: int = 0


class EndedSignIn(SQLModel, table=True):
    """A sign-out: tokens from before open no viewer. `actor` or `sid` may be empty: whoever, or
    all of their sign-ins."""

    __tablename__ = "ended_sign_in"

    actor: str = Field(primary_key=True, max_length=255)
    sid: str = Field(primary_key=True, max_length=255)
    ended_at: datetime = Field(default_factory=utcnow, sa_type=UtcDateTime, index=True)


class SpentToken(SQLModel, table=True):
    """A logout token that was used: a `jti` is good for one use."""

    __tablename__ = "spent_token"

    jti_sha256: str = Field(primary_key=True, max_length=64)
    spent_at: datetime = Field(default_factory=utcnow, sa_type=UtcDateTime, index=True)
