"""The tables. Names are the field's own: FHIR for people and orders, DICOM for images.

An empty string means that the value is absent, as in DICOM type 2; None only where the absence
of a time or a person matters. All times are UTC.
"""

from app.models.arrivals import (
    WAITING,
    Arrival,
    ArrivalCandidate,
    ArrivalState,
    FollowerPosition,
    StudyCopy,
)
from app.models.columns import UtcDateTime, folded, new_generation
from app.models.images import Instance, Series, SeriesMetadata, Study
from app.models.imports import PENDING, SPOOLED, FileState, Import, ImportFile, ImportState
from app.models.journal import OpenOperation
from app.models.launches import EndedSignIn, LaunchSession, LaunchStudy, SpentToken
from app.models.orders import Order, OrderStatus, OrderStudy
from app.models.people import (
    BrokenGlass,
    CareTeamMember,
    MergedRow,
    NamedPerson,
    Patient,
    PatientMerge,
    Restriction,
    RestrictionLevel,
)
from app.models.requests import IdempotencyKey
from app.models.trail import AuditRecord, ExportPosition, Notification

__all__ = [
    "PENDING",
    "SPOOLED",
    "WAITING",
    "Arrival",
    "ArrivalCandidate",
    "ArrivalState",
    "AuditRecord",
    "BrokenGlass",
    "CareTeamMember",
    "EndedSignIn",
    "ExportPosition",
    "FileState",
    "FollowerPosition",
    "IdempotencyKey",
    "Import",
    "ImportFile",
    "ImportState",
    "Instance",
    "LaunchSession",
    "LaunchStudy",
    "MergedRow",
    "NamedPerson",
    "Notification",
    "OpenOperation",
    "Order",
    "OrderStatus",
    "OrderStudy",
    "Patient",
    "PatientMerge",
    "Restriction",
    "RestrictionLevel",
    "Series",
    "SeriesMetadata",
    "SpentToken",
    "Study",
    "StudyCopy",
    "UtcDateTime",
    "folded",
    "new_generation",
]
