"""What is in Orthanc, as it was found there: whether it came through our checks or not.

Nothing here is ever shown as a patient's image. A study is served from `study`, `series` and
`instance` alone; an arrival says that something is in the archive, and why it waits.
"""

from datetime import datetime
from enum import StrEnum
from uuid import UUID

import sqlalchemy as sa
from sqlmodel import Field, SQLModel

from app.db import utcnow
from app.models.columns import UtcDateTime
from app.models.orders import Order
from app.models.people import Patient


class ArrivalState(StrEnum):
    """Where a study in the archive stands.

    `arriving`: found, and not yet looked at whole. `quarantined`: a file of it did not pass.
    `rejected`: somebody said that it belongs to nobody here. `gone`: no longer in the archive.
    """

    ARRIVING = "arriving"
    CONFLICTING = "conflicting"
    GONE = "gone"
    LINKED = "linked"
    PROPOSED = "proposed"
    QUARANTINED = "quarantined"
    REJECTED = "rejected"
    UNMATCHED = "unmatched"


WAITING = (
    ArrivalState.PROPOSED,
    ArrivalState.UNMATCHED,
    ArrivalState.CONFLICTING,
    ArrivalState.QUARANTINED,
)
"""A human has to look at these."""


class Arrival(SQLModel, table=True):
    """A study of Orthanc's: one StudyInstanceUID under one PatientID."""

    orthanc_id: str = Field(primary_key=True, max_length=44)
    study_instance_uid: str = Field(index=True, max_length=64)  # empty: it is no UID
    state: str = Field(max_length=16, index=True)  # an ArrivalState
    # As the files say; cut to what a list shows.
    dicom_patient_id: str = Field(default="", max_length=64, index=True)
    patient_name: str = Field(default="", max_length=256)
    folded_name: str = Field(default="", max_length=256)
    patient_birth_date: str = Field(default="", max_length=16, index=True)
    patient_sex: str = Field(default="", max_length=16)
    accession_number: str = Field(default="", max_length=64, index=True)
    study_date: str = Field(default="", max_length=16)
    study_time: str = Field(default="", max_length=32)
    study_description: str = Field(default="", max_length=256)
    modalities: str = Field(default="", max_length=256)  # joined by a backslash
    facts: str = "{}"  # JSON of what the matcher was told; see app.arrivals.facts
    series_count: int = 0
    instance_count: int = 0
    disk_size: str = Field(default="", max_length=24)
    reasons: str = "[]"  # JSON: findings, as code and words
    candidates: str = "[]"  # JSON: proposals
    # Whose it is, once that is certain: while it grows, and when it is linked.
    patient_id: UUID | None = Field(default=None, foreign_key="patient.id", index=True)
    order_id: UUID | None = Field(default=None, foreign_key="imaging_order.id", index=True)
    rule: str = Field(default="", max_length=32)
    stable: bool = False
    backlog: bool = False  # was there before we followed: those that arrive go first
    held: bool = False  # a human undid or rejected a link: only a human links it again
    decided_by: str = Field(default="", max_length=255)
    decided_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    decision: str = ""  # what they did, and why
    version: int = 1
    due_at: datetime | None = Field(default_factory=utcnow, sa_type=UtcDateTime, index=True)
    attempts: int = 0
    told: bool = False  # `study-unmatched` was sent
    arrived_at: datetime = Field(default_factory=utcnow, sa_type=UtcDateTime, index=True)
    changed_at: datetime = Field(default_factory=utcnow, sa_type=UtcDateTime)
    checked_at: datetime = Field(default_factory=utcnow, sa_type=UtcDateTime, index=True)


class ArrivalCandidate(SQLModel, table=True):
    """A patient to whom a waiting study may belong: decides who is shown that it waits."""

    __tablename__ = "arrival_candidate"

    orthanc_id: str = Field(
        primary_key=True, foreign_key="arrival.orthanc_id", ondelete="CASCADE", max_length=44
    )
    patient_id: UUID = Field(primary_key=True, foreign_key="patient.id", index=True)


class StudyCopy(SQLModel, table=True):
    """A study that Lightbox made of another, with a patient's identifiers. Ids are Orthanc's."""

    __tablename__ = "study_copy"

    orthanc_id: str = Field(primary_key=True, max_length=44)
    original_id: str = Field(max_length=44)
    root_id: str = Field(max_length=44, index=True)  # where the original is a copy, of what
    operation: str = Field(max_length=32)  # who makes it; empty: it was whole, and was linked
    original_goes: bool = False  # the original is still to be removed


class FollowerPosition(SQLModel, table=True):
    """How far Orthanc's changes have been followed. One row."""

    __tablename__ = "follower_position"

    name: str = Field(primary_key=True, max_length=16)
    position: int = Field(default=0, sa_type=sa.BigInteger)
    # The change at that position: another one there, and it is another database.
    mark: str = Field(default="", max_length=128)
    # While the studies that were there before are listed: how many of how many.
    listing: bool = True
    listed: int = 0
    to_list: int = 0
    orders_seen_at: datetime = Field(default_factory=utcnow, sa_type=UtcDateTime)
    swept_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    followed_at: datetime = Field(default_factory=utcnow, sa_type=UtcDateTime)


# What a new or changed order or patient is found by, and a patient by their birth date.
_orders: sa.Table = Order.__table__  # type: ignore[attr-defined]
_patients: sa.Table = Patient.__table__  # type: ignore[attr-defined]
sa.Index("ix_imaging_order_updated_at", _orders.c.updated_at)
sa.Index("ix_patient_created_at", _patients.c.created_at)
sa.Index("ix_patient_dob", _patients.c.dob)
