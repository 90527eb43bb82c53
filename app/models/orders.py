"""Imaging orders, and the studies that answer them."""

from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID, uuid4

import sqlalchemy as sa
from sqlmodel import Field, SQLModel

from app.db import utcnow
from app.models.columns import UtcDateTime


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


class OrderStudy(SQLModel, table=True):
    """An order is answered by a study. Several of each may belong together."""

    __tablename__ = "order_study"

    order_id: UUID = Field(primary_key=True, foreign_key="imaging_order.id")
    study_instance_uid: str = Field(
        primary_key=True, foreign_key="study.study_instance_uid", index=True, max_length=64
    )
    linked_at: datetime = Field(default_factory=utcnow, sa_type=UtcDateTime)
    linked_by: str
