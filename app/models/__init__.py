"""The tables. Names are the field's own: FHIR for people and orders, DICOM for images.

An empty string means that the value is absent, as in DICOM type 2; None only where the absence
of a time or a person matters. All times are UTC.
"""

from app.models.columns import UtcDateTime, folded, new_generation
from app.models.images import Instance, Series, SeriesMetadata, Study
from app.models.launches import LaunchSession, LaunchStudy
from app.models.orders import Order, OrderStatus, OrderStudy
from app.models.people import (
    BrokenGlass,
    CareTeamMember,
    NamedPerson,
    Patient,
    Restriction,
    RestrictionLevel,
)
from app.models.trail import AuditRecord, ExportPosition, Notification

__all__ = [
    "AuditRecord",
    "BrokenGlass",
    "CareTeamMember",
    "ExportPosition",
    "Instance",
    "LaunchSession",
    "LaunchStudy",
    "NamedPerson",
    "Notification",
    "Order",
    "OrderStatus",
    "OrderStudy",
    "Patient",
    "Restriction",
    "RestrictionLevel",
    "Series",
    "SeriesMetadata",
    "Study",
    "UtcDateTime",
    "folded",
    "new_generation",
]
