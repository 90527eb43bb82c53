"""The tables. Names are the field's own: FHIR for people and orders, DICOM for images.

An empty string means that the value is absent, as in DICOM type 2; None only where the absence
of a time or a person matters. All times are UTC.
"""

import unicodedata
from datetime import UTC, date, datetime
from enum import StrEnum
from secrets import token_hex
from typing import Any
from uuid import UUID, uuid4

import sqlalchemy as sa
from sqlmodel import Field, SQLModel

from app.db import utcnow


class UtcDateTime(sa.types.TypeDecorator[datetime]):
    """A point in time: kept in UTC, and aware on the way out of either database."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Any) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a time without a zone can't be stored")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Any) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def new_generation() -> str:
    """A name that was never used before."""
    return token_hex(8)


def folded(text: str) -> str:
    """Text as searches compare it: without case, accents composed, no padding at the end."""
    return unicodedata.normalize("NFC", text).casefold().rstrip("^ ")


class OrderStatus(StrEnum):
    """Where an order stands, as the EHR says."""

    SCHEDULED = "scheduled"
    IN_PROGRESS = "in-progress"
    COMPLETED = "completed"
    CANCELLED = "cancelled"


# By its value, as text: a new state needs no change of a type in the database.
_STATUS_TYPE: Any = sa.Enum(
    OrderStatus,
    native_enum=False,
    length=16,
    values_callable=lambda states: [each.value for each in states],
)


# For rows that were there before the column was.
EMPTY = {"server_default": sa.text("''")}
# DICOM JSON of what else a search shows of a study, series or instance.
ATTRIBUTES: Any = Field(default="{}", sa_column_kwargs={"server_default": "{}"})


class Patient(SQLModel, table=True):
    """A patient as the EHR knows them; `mrn` + `mrn_issuer` is DICOM's PatientID + issuer."""

    __table_args__ = (sa.UniqueConstraint("mrn", "mrn_issuer", name="uq_patient_identifier"),)

    id: UUID = Field(default_factory=uuid4, primary_key=True)
    mrn: str = Field(max_length=64)
    mrn_issuer: str = Field(default="", max_length=64)
    first_name: str
    last_name: str
    dob: date
    sex: str = Field(default="", max_length=1)
    created_at: datetime = Field(default_factory=utcnow, sa_type=UtcDateTime)


class CareTeamMember(SQLModel, table=True):
    """Somebody treats a patient: `sub` is their subject in the identity provider."""

    __tablename__ = "care_team_member"

    patient_id: UUID = Field(primary_key=True, foreign_key="patient.id")
    sub: str = Field(primary_key=True, max_length=255, index=True)
    role: str = ""
    expires_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    added_at: datetime = Field(default_factory=utcnow, sa_type=UtcDateTime)
    added_by: str


class Order(SQLModel, table=True):
    """An imaging order (FHIR ServiceRequest, DICOM Imaging Service Request)."""

    __tablename__ = "imaging_order"
    __table_args__ = (
        sa.UniqueConstraint("accession_number", "accession_issuer", name="uq_order_accession"),
    )

    id: UUID = Field(default_factory=uuid4, primary_key=True)
    patient_id: UUID = Field(foreign_key="patient.id", index=True)
    order_type: str
    order_category: str
    description: str = ""
    status: OrderStatus = Field(default=OrderStatus.SCHEDULED, sa_type=_STATUS_TYPE)
    accession_number: str = Field(max_length=16)
    accession_issuer: str = Field(default="", max_length=64)
    planned_study_instance_uid: str = Field(max_length=64, unique=True)
    scheduled_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    station_ae_title: str = Field(default="", max_length=16)
    requested_by: str | None = Field(default=None, max_length=255, index=True)
    attending: str | None = Field(default=None, max_length=255, index=True)
    site: str
    created_at: datetime = Field(default_factory=utcnow, sa_type=UtcDateTime)
    updated_at: datetime = Field(default_factory=utcnow, sa_type=UtcDateTime)


class Study(SQLModel, table=True):
    """A study in Orthanc that belongs to one patient of ours, and to no other."""

    study_instance_uid: str = Field(primary_key=True, max_length=64)
    patient_id: UUID = Field(foreign_key="patient.id", index=True)
    orthanc_id: str = Field(max_length=44)
    dicom_patient_id: str = Field(max_length=64)  # PatientID (0010,0020) as stored
    patient_name: str = ""
    patient_birth_date: str = ""
    patient_sex: str = ""
    study_date: str = Field(default="", index=True)
    study_time: str = ""
    study_description: str = ""
    accession_number: str = Field(default="", index=True)
    # Names and StudyDescription as searches compare them: case folded (PS3.4 C.2.2.2.1).
    folded_name: str = Field(default="", index=True, sa_column_kwargs=EMPTY)
    folded_description: str = Field(default="", sa_column_kwargs=EMPTY)
    folded_referring_physician: str = Field(default="", sa_column_kwargs=EMPTY)
    study_id: str = Field(default="", sa_column_kwargs=EMPTY)
    attributes: str = ATTRIBUTES
    # Another study under the same UID, after a deletion say, has another.
    generation: str = Field(default_factory=new_generation, max_length=32, sa_column_kwargs=EMPTY)
    created_at: datetime = Field(default_factory=utcnow, sa_type=UtcDateTime, index=True)


class Series(SQLModel, table=True):
    """A series of a study of ours."""

    series_instance_uid: str = Field(primary_key=True, max_length=64)
    study_instance_uid: str = Field(
        foreign_key="study.study_instance_uid", index=True, max_length=64
    )
    modality: str = ""
    series_number: int | None = None
    series_description: str = ""
    attributes: str = ATTRIBUTES


class SeriesMetadata(SQLModel, table=True):
    """The DICOM JSON of a series as Orthanc made it, checked, and good while `stamp` holds."""

    __tablename__ = "series_metadata"

    series_instance_uid: str = Field(
        primary_key=True, foreign_key="series.series_instance_uid", max_length=64
    )
    study_instance_uid: str = Field(
        foreign_key="study.study_instance_uid", index=True, max_length=64
    )
    stamp: str = Field(max_length=64)
    body: bytes  # gzip


class Instance(SQLModel, table=True):
    """An instance that came in through our checks; nothing else of a study is ever served."""

    sop_instance_uid: str = Field(primary_key=True, max_length=64)
    series_instance_uid: str = Field(
        foreign_key="series.series_instance_uid", index=True, max_length=64
    )
    study_instance_uid: str = Field(
        foreign_key="study.study_instance_uid", index=True, max_length=64
    )
    orthanc_id: str = Field(max_length=44)
    sop_class_uid: str = Field(max_length=64)
    transfer_syntax_uid: str = Field(max_length=64)
    number_of_frames: int = 1
    instance_number: int | None = None
    rows: int | None = None  # 0: no pixels; None: taken in before this was kept
    columns: int | None = None
    attributes: str = ATTRIBUTES
    received_sha256: str = Field(max_length=64)  # of the file as the sender sent it
    received_by: str
    received_at: datetime = Field(default_factory=utcnow, sa_type=UtcDateTime)


class OrderStudy(SQLModel, table=True):
    """An order is answered by a study. Several of each may belong together."""

    __tablename__ = "order_study"

    order_id: UUID = Field(primary_key=True, foreign_key="imaging_order.id")
    study_instance_uid: str = Field(
        primary_key=True, foreign_key="study.study_instance_uid", index=True, max_length=64
    )
    linked_at: datetime = Field(default_factory=utcnow, sa_type=UtcDateTime)
    linked_by: str


class LaunchSession(SQLModel, table=True):
    """One launch of the viewer: who, which patient, until when. Secrets are kept as SHA-256."""

    __tablename__ = "launch_session"

    ctx: str = Field(primary_key=True, max_length=64)
    code_sha256: str = Field(max_length=64, unique=True)
    cookie_sha256: str | None = Field(default=None, max_length=64)
    actor: str = Field(max_length=255)
    actor_name: str = ""
    actor_roles: str  # comma-separated
    actor_site: str
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


class AuditRecord(SQLModel, table=True):
    """One line of the trail; see `app.audit`. Insert and read only, held by triggers.

    No foreign keys: the trail outlives what it speaks of.
    """

    __tablename__ = "audit_record"

    id: int | None = Field(
        default=None,
        primary_key=True,
        sa_type=sa.BigInteger().with_variant(sa.Integer, "sqlite"),
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
