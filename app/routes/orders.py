"""Imaging orders: the EHR's side."""

import secrets
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Literal, Self
from uuid import UUID

import sqlalchemy as sa
from fastapi import BackgroundTasks, Depends, Query, Request, Response
from pydantic import AfterValidator, BaseModel, Field, field_validator, model_validator
from sqlmodel import col, select

from app.access import Caller, Grant, PatientAccess, RoleAccess, Subject, Visible, VisiblePatients
from app.aliases import is_of_retired, refuse_retired
from app.arrivals.waiting import arriving
from app.audit import Action
from app.db import utcnow
from app.dicom import new_uid
from app.errors import Conflict, Unprocessable
from app.linking import order_studies
from app.models import Arrival, Order, OrderStatus, Patient
from app.orderlife import BY_EHR, set_status
from app.routes.paging import Cursor, Limit, link_next, uuid_cursor
from app.routes.times import UtcTime
from app.routing import AccessRouter
from app.viewer import Viewer

router = AccessRouter(prefix="/api/v1/orders", tags=["orders"])

CreateOrder = Annotated[
    RoleAccess, Depends(Caller(Action.ORDER_CREATE, patient_in_body=True), scope="function")
]
ListOrders = Annotated[VisiblePatients, Depends(Visible(Action.ORDER_LIST), scope="function")]
ReadOrder = Annotated[
    PatientAccess, Depends(Grant(Action.ORDER_READ, of=Subject.ORDER), scope="function")
]
WriteOrder = Annotated[
    PatientAccess, Depends(Grant(Action.ORDER_WRITE, of=Subject.ORDER), scope="function")
]

Sub = Annotated[str, Field(min_length=1, max_length=255, pattern=r"^[^\x00-\x1f]+$")]
# PS3.5 6.2: no backslash, no control characters; AE and SH at most 16 characters, LO 64.
ShortText = Annotated[str, Field(max_length=16, pattern=r"^[^\\\x00-\x1f\x7f]*$")]
LongText = Annotated[str, Field(max_length=64, pattern=r"^[^\\\x00-\x1f\x7f]*$")]
CodeText = Annotated[str, Field(max_length=16, pattern=r"^[A-Z0-9 _]*$")]

# PN of one component group: family^given^middle^prefix^suffix.
Name = Annotated[
    str,
    Field(
        max_length=64,
        pattern=r"^[^\\=^\x00-\x1f\x7f]*(\^[^\\=^\x00-\x1f\x7f]*){0,4}$",
        description="As DICOM writes a name: `Novak^Jana`.",
    ),
]
Kilograms = Annotated[float, Field(gt=0, lt=1000, allow_inf_nan=False)]
Pregnancy = Annotated[int, Field(ge=1, le=4, description="1 no, 2 maybe, 3 yes, 4 unknown.")]


def _by_ehr(status: OrderStatus) -> OrderStatus:
    if status.value not in BY_EHR:
        raise ValueError(f"only images bring that about; place it as one of {', '.join(BY_EHR)}")
    return status


Said = Annotated[OrderStatus, AfterValidator(_by_ehr)]

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"  # no I, L, O, U: read aloud and typed by people


_CODES = ("procedure_code", "protocol_code")
_WORKLIST_TEXTS = (
    *(f"{code}{part}" for code in _CODES for part in ("", "_system", "_meaning")),
    "performing_physician",
    "referring_physician",
    "requesting_physician",
    "procedure_location",
    "patient_location",
    "patient_state",
    "medical_alerts",
    "allergies",
    "special_needs",
)

# Of these the trail, which is kept for years, says that they changed and not to what.
_CLINICAL = {
    "allergies",
    "medical_alerts",
    "patient_state",
    "patient_weight_kg",
    "pregnancy_status",
    "special_needs",
}


def _refuse_half_codes(values: Mapping[str, object]) -> None:
    """PS3.3 table 8.8-1: a code's value, system and meaning go together. Raises ValueError."""
    for code in _CODES:
        parts = [str(values[f"{code}{part}"]).strip(" ") for part in ("", "_system", "_meaning")]
        if any(parts) and not all(parts):
            raise ValueError(f"{code} needs {code}_system and {code}_meaning, and they need it")


class NewOrder(BaseModel):
    """An order as the EHR places it."""

    patient_id: UUID
    order_type: Literal["IMAGING"] = "IMAGING"
    order_category: CodeText = Field(default="", description="Modality (0008,0060), `CT`.")
    description: LongText = ""
    status: Said = OrderStatus.SCHEDULED
    accession_number: ShortText = Field(default="", description="Made if absent.")
    accession_issuer: LongText = ""
    scheduled_at: UtcTime | None = None
    station_ae_title: ShortText = ""
    requested_by: Sub | None = Field(default=None, description="`sub` of who requested it.")
    attending: Sub | None = Field(default=None, description="`sub` of who attends it.")
    site: LongText = Field(default="", description="Empty: the configured site.")
    # What the modality's worklist says besides.
    procedure_code: ShortText = Field(default="", description="With its system and meaning.")
    procedure_code_system: ShortText = ""
    procedure_code_meaning: LongText = ""
    protocol_code: ShortText = Field(default="", description="With its system and meaning.")
    protocol_code_system: ShortText = ""
    protocol_code_meaning: LongText = ""
    performing_physician: Name = ""
    referring_physician: Name = ""
    requesting_physician: Name = ""
    procedure_location: ShortText = ""
    patient_location: LongText = ""
    patient_state: LongText = ""
    medical_alerts: LongText = ""
    allergies: LongText = ""
    special_needs: LongText = ""
    patient_weight_kg: Kilograms | None = None
    pregnancy_status: Pregnancy | None = None

    @field_validator(
        "order_category",
        "description",
        "accession_number",
        "accession_issuer",
        "station_ae_title",
        "site",
        *_WORKLIST_TEXTS,
        mode="before",
    )
    @classmethod
    def _null_is_absent(cls, value: object) -> object:
        return "" if value is None else value

    @model_validator(mode="after")
    def _whole_codes(self) -> Self:
        _refuse_half_codes(self.model_dump())
        return self

    @field_validator("accession_number", "accession_issuer", mode="after")
    @classmethod
    def _stripped(cls, value: str) -> str:
        return value.strip(" ")


class OrderChange(BaseModel):
    """What may change; what is left out stays."""

    status: OrderStatus | None = None
    description: LongText | None = None
    order_category: CodeText | None = None
    scheduled_at: UtcTime | None = None
    station_ae_title: ShortText | None = None
    requested_by: Sub | None = None
    attending: Sub | None = None
    procedure_code: ShortText | None = None
    procedure_code_system: ShortText | None = None
    procedure_code_meaning: LongText | None = None
    protocol_code: ShortText | None = None
    protocol_code_system: ShortText | None = None
    protocol_code_meaning: LongText | None = None
    performing_physician: Name | None = None
    referring_physician: Name | None = None
    requesting_physician: Name | None = None
    procedure_location: ShortText | None = None
    patient_location: LongText | None = None
    patient_state: LongText | None = None
    medical_alerts: LongText | None = None
    allergies: LongText | None = None
    special_needs: LongText | None = None
    patient_weight_kg: Kilograms | None = None
    pregnancy_status: Pregnancy | None = None

    model_config = {"extra": "forbid"}


class Arriving(BaseModel):
    """A study that certainly answers the order, and still grows in the archive."""

    study_instance_uid: str
    instance_count: int
    series_count: int


class OrderOut(BaseModel):
    """`study_instance_uid` is the first linked study; null until images are linked.
    `arriving` is a study that is on its way: it is shown when it is in.
    `worklist_problem` says why a modality is not told of the order; empty for most."""

    id: UUID
    patient_id: UUID
    order_type: str
    order_category: str
    description: str
    status: OrderStatus
    accession_number: str
    accession_issuer: str
    planned_study_instance_uid: str
    study_instance_uid: str | None
    studies: list[str]
    scheduled_at: datetime | None
    station_ae_title: str
    requested_by: str | None
    attending: str | None
    site: str
    procedure_code: str
    procedure_code_system: str
    procedure_code_meaning: str
    protocol_code: str
    protocol_code_system: str
    protocol_code_meaning: str
    performing_physician: str
    referring_physician: str
    requesting_physician: str
    procedure_location: str
    patient_location: str
    patient_state: str
    medical_alerts: str
    allergies: str
    special_needs: str
    patient_weight_kg: float | None
    pregnancy_status: int | None
    fulfilled_at: datetime | None
    worklist_problem: str
    arriving: Arriving | None
    created_at: datetime
    updated_at: datetime

    @classmethod
    def of(cls, order: Order, studies: list[str], growing: Arrival | None = None) -> "OrderOut":
        arriving = None
        if growing is not None:
            arriving = Arriving(
                study_instance_uid=growing.study_instance_uid,
                instance_count=growing.instance_count,
                series_count=growing.series_count,
            )
        return cls(
            **order.model_dump(),
            arriving=arriving,
            studies=studies,
            study_instance_uid=studies[0] if studies else None,
        )


@router.post("", status_code=201)
async def create_order(
    caller: CreateOrder, body: NewOrder, request: Request, after: BackgroundTasks
) -> OrderOut:
    """Place an order. 404 for an unknown patient, 409 for an accession number in use, and for a
    patient who was merged into another."""
    access = await caller.admit(Subject.PATIENT, body.patient_id)
    refuse_retired(access.patient, body.patient_id)
    order = Order(
        **{
            **body.model_dump(),
            "accession_number": body.accession_number or _new_accession_number(),
            "site": body.site or request.app.state.settings.site,
            "ehr_status": body.status.value,
        },
        planned_study_instance_uid=new_uid(),
    )
    access.session.add(order)
    try:
        await access.session.flush()
    except sa.exc.IntegrityError as error:
        if is_of_retired(error):
            raise
        raise Conflict("An order with this accession number and issuer exists already.") from error
    await access.done(order_id=order.id)
    after.add_task(request.app.state.worklist.wake)  # once it is committed
    return OrderOut.of(order, [])


@router.get("")
async def list_orders(
    window: ListOrders,
    request: Request,
    response: Response,
    patient_id: UUID | None = None,
    accession_number: Annotated[str, Query(max_length=16)] = "",
    status: OrderStatus | None = None,
    limit: Limit = 50,
    cursor: Cursor = "",
) -> list[OrderOut]:
    """The orders of patients that the caller may see."""
    query = select(Order).join(Patient, col(Patient.id) == col(Order.patient_id))
    if patient_id is not None:
        query = query.where(Order.patient_id == patient_id)
    if accession_number:
        query = query.where(Order.accession_number == accession_number)
    if status is not None:
        query = query.where(Order.status == status)
    query = await window.only(query)
    if cursor:
        query = query.where(col(Order.id) > uuid_cursor(cursor))
    found = (await window.session.exec(query.order_by(col(Order.id)).limit(limit + 1))).all()
    page = found[:limit]
    linked = await order_studies(window, page)
    link_next(request, response, str(page[-1].id) if len(found) > limit else None)
    await window.disclose(each.patient_id for each in page)
    growing = await arriving(window, page)
    return [OrderOut.of(each, linked[each.id], growing.get(each.id)) for each in page]


@router.get("/{order_id}")
async def read_order(access: ReadOrder, order_id: UUID) -> OrderOut:
    """One order, with the studies that are linked to it."""
    return await _answer(access)


@router.patch("/{order_id}")
async def change_order(
    access: WriteOrder,
    order_id: UUID,
    body: OrderChange,
    request: Request,
    after: BackgroundTasks,
) -> OrderOut:
    """Change an order. "cancelled" ends its open viewers and cannot be taken back; "scheduled"
    puts an order whose images were complete back on the worklist. 409, with what is allowed, for
    a status that the order can't have now."""
    order = access.order
    viewer: Viewer = request.app.state.viewer
    assert order is not None
    changes = body.model_dump(exclude_unset=True)
    for name in (
        "status",
        "description",
        "order_category",
        "station_ae_title",
        *_WORKLIST_TEXTS,
    ):
        if name in changes and changes[name] is None:
            raise Unprocessable(f"`{name}` can't be null; leave it out to keep it.")
    ended = 0
    wanted = changes.pop("status", None)
    if wanted == OrderStatus.CANCELLED:
        ended = await viewer.end_order_sessions(access)
    before = {name: getattr(order, name) for name in changes if name not in _CLINICAL}
    now = {name: value for name, value in changes.items() if name not in _CLINICAL}
    if wanted is not None:
        moved = await set_status(access.session, order.id, wanted)
        before["status"], now["status"] = moved.before.value, moved.after.value
        await access.session.refresh(order)
    for name, value in changes.items():
        setattr(order, name, value)
    try:
        _refuse_half_codes(order.model_dump())
    except ValueError as error:
        raise Unprocessable(f"{error}.") from error
    order.updated_at = utcnow()
    access.session.add(order)
    await access.session.flush()
    await access.done(
        detail={
            "before": {name: str(value) for name, value in before.items()},
            "after": {name: str(value) for name, value in now.items()},
            "viewers_ended": ended,
            **({"clinical": clinical} if (clinical := sorted(changes.keys() & _CLINICAL)) else {}),
        }
    )
    after.add_task(request.app.state.worklist.wake)
    return await _answer(access)


async def _answer(access: PatientAccess) -> OrderOut:
    assert access.order is not None
    linked = await order_studies(access, [access.order])
    growing = await arriving(access, [access.order])
    return OrderOut.of(access.order, linked[access.order.id], growing.get(access.order.id))


def _new_accession_number() -> str:
    """16 characters (SH): a year and 65 random bits; the table keeps it unique with its issuer."""
    return f"{utcnow():%y}-" + "".join(secrets.choice(_ALPHABET) for _ in range(13))
