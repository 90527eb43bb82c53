"""Imaging orders, and the studies that answer them."""

from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID, uuid4

import sqlalchemy as sa
from sqlmodel import Field, SQLModel

from app.db import utcnow
from app.models.columns import EMPTY, UtcDateTime


class OrderStatus(StrEnum):
    """Where an order stands: what the EHR says of it, and what arrived; see `app.orderlife`.

    `arriving` and `available` (FHIR ImagingStudy.status) follow from images alone.
    """

    SCHEDULED = "scheduled"
    IN_PROGRESS = "in-progress"
    ARRIVING = "arriving"
    AVAILABLE = "available"
    COMPLETED = "completed"
    CANCELLED = "cancelled"


# By its value, as text: a new state needs no change of a type in the database.
_STATUS_TYPE: Any = sa.Enum(
    OrderStatus,
    native_enum=False,
    length=16,
    values_callable=lambda states: [each.value for each in states],
)


def _text(longest: int) -> Any:
    """A column for text; empty in rows that were there before it."""
    return Field(default="", max_length=longest, sa_column_kwargs=EMPTY)


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
    # What the EHR said last: where the order stands again once no images are linked any more.
    ehr_status: str = Field(
        default="scheduled", max_length=16, sa_column_kwargs={"server_default": "scheduled"}
    )
    accession_number: str = Field(max_length=16)
    accession_issuer: str = Field(default="", max_length=64)
    planned_study_instance_uid: str = Field(max_length=64, unique=True)
    scheduled_at: datetime | None = Field(default=None, sa_type=UtcDateTime, index=True)
    station_ae_title: str = Field(default="", max_length=16)
    requested_by: str | None = Field(default=None, max_length=255, index=True)
    attending: str | None = Field(default=None, max_length=255, index=True)
    site: str
    # What a modality's worklist says, under the limits of the attributes it becomes.
    procedure_code: str = _text(16)
    procedure_code_system: str = _text(16)
    procedure_code_meaning: str = _text(64)
    protocol_code: str = _text(16)
    protocol_code_system: str = _text(16)
    protocol_code_meaning: str = _text(64)
    performing_physician: str = _text(64)  # PN, as are the two below
    referring_physician: str = _text(64)
    requesting_physician: str = _text(64)
    procedure_location: str = _text(16)
    patient_location: str = _text(64)
    patient_state: str = _text(64)
    medical_alerts: str = _text(64)
    allergies: str = _text(64)
    special_needs: str = _text(64)
    patient_weight_kg: float | None = None
    pregnancy_status: int | None = None  # (0010,21C0): 1 not, 2 possibly, 3 definitely, 4 unknown
    # All its images are in the archive.
    fulfilled_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    # The EHR wants more images than those that had arrived by then.
    reopened_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    # First put on the worklist; why it can't be, for whoever may read the order.
    worklist_published_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    worklist_problem: str = _text(512)
    created_at: datetime = Field(default_factory=utcnow, sa_type=UtcDateTime, index=True)
    updated_at: datetime = Field(default_factory=utcnow, sa_type=UtcDateTime)


class OrderStudy(SQLModel, table=True):
    """An order is answered by a study. Several of each may belong together."""

    __tablename__ = "order_study"

    order_id: UUID = Field(primary_key=True, foreign_key="imaging_order.id")
    study_instance_uid: str = Field(
        primary_key=True, foreign_key="study.study_instance_uid", index=True, max_length=64
    )
    linked_at: datetime = Field(default_factory=utcnow, sa_type=UtcDateTime)
    linked_by: str
