"""Patients, who treats them, and who may see those whom not everybody may."""

from datetime import date, datetime
from enum import StrEnum
from uuid import UUID, uuid4

import sqlalchemy as sa
from sqlmodel import Field, SQLModel

from app.db import utcnow
from app.models.columns import UtcDateTime


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


class RestrictionLevel(StrEnum):
    """`vip`: only named people, or who breaks the glass. `sealed`: only named people."""

    SEALED = "sealed"
    VIP = "vip"


class Restriction(SQLModel, table=True):
    """A patient whom only named people may see, whatever else ties somebody to them."""

    __tablename__ = "patient_restriction"

    patient_id: UUID = Field(primary_key=True, foreign_key="patient.id")
    level: str = Field(max_length=16)  # a RestrictionLevel
    reason: str = ""
    set_at: datetime = Field(default_factory=utcnow, sa_type=UtcDateTime)
    set_by: str


class NamedPerson(SQLModel, table=True):
    """Somebody whom a restriction lets through: `sub` in the identity provider."""

    __tablename__ = "named_person"

    patient_id: UUID = Field(primary_key=True, foreign_key="patient.id")
    sub: str = Field(primary_key=True, max_length=255)


class BrokenGlass(SQLModel, table=True):
    """Somebody took the right to a patient in an emergency, for a while; an auditor reviews it."""

    __tablename__ = "broken_glass"

    id: UUID = Field(default_factory=uuid4, primary_key=True)
    patient_id: UUID = Field(foreign_key="patient.id", index=True)
    sub: str = Field(max_length=255, index=True)
    name: str = ""
    roles: str  # comma-separated
    reason_code: str = Field(max_length=64)
    reason_text: str
    opens_sealed: bool  # the patient was sealed, and the settings allow it
    broken_at: datetime = Field(default_factory=utcnow, sa_type=UtcDateTime, index=True)
    expires_at: datetime = Field(sa_type=UtcDateTime)
    reviewed_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    reviewed_by: str = ""
    review_comment: str = ""
