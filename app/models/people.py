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
    # The patient whose this one's record is now; then nothing can be this one's any more.
    merged_into: UUID | None = Field(default=None, foreign_key="patient.id", index=True)


class PatientMerge(SQLModel, table=True):
    """A patient's record was joined to another's (HL7 ADT^A40), until it is taken apart again."""

    __tablename__ = "patient_merge"

    id: UUID = Field(default_factory=uuid4, primary_key=True)
    patient_id: UUID = Field(foreign_key="patient.id", index=True)  # the retired one
    into_id: UUID = Field(foreign_key="patient.id", index=True)  # the surviving one
    reason: str
    merged_at: datetime = Field(default_factory=utcnow, sa_type=UtcDateTime)
    merged_by: str = Field(max_length=255)
    unmerged_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    unmerged_by: str = Field(default="", max_length=255)
    unmerge_reason: str = ""


class MergedRow(SQLModel, table=True):
    """Something that was the retired patient's before a merge; `detail` is JSON of how it was."""

    __tablename__ = "merged_row"

    merge_id: UUID = Field(primary_key=True, foreign_key="patient_merge.id")
    kind: str = Field(primary_key=True, max_length=16)
    key: str = Field(primary_key=True, max_length=255)
    detail: str = "{}"


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
