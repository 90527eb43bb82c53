"""Imaging orders: the EHR's side."""

import secrets
from datetime import datetime
from typing import Annotated, Literal
from uuid import UUID

import sqlalchemy as sa
from fastapi import Depends, Query, Request, Response
from pydantic import BaseModel, Field, field_validator
from sqlmodel import col, select

from app.access import Caller, Grant, PatientAccess, RoleAccess, Subject, Visible, VisiblePatients
from app.audit import Action
from app.db import utcnow
from app.dicom import new_uid
from app.errors import Conflict, Unprocessable
from app.linking import order_studies
from app.models import Order, OrderStatus, Patient
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

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"  # no I, L, O, U: read aloud and typed by people


class NewOrder(BaseModel):
    """An order as the EHR places it."""

    patient_id: UUID
    order_type: Literal["IMAGING"] = "IMAGING"
    order_category: CodeText = Field(default="", description="Modality (0008,0060), `CT`.")
    description: LongText = ""
    status: OrderStatus = OrderStatus.SCHEDULED
    accession_number: ShortText = Field(default="", description="Made if absent.")
    accession_issuer: LongText = ""
    scheduled_at: UtcTime | None = None
    station_ae_title: ShortText = ""
    requested_by: Sub | None = Field(default=None, description="`sub` of who requested it.")
    attending: Sub | None = Field(default=None, description="`sub` of who attends it.")
    site: LongText = Field(default="", description="Empty: the configured site.")

    @field_validator(
        "order_category",
        "description",
        "accession_number",
        "accession_issuer",
        "station_ae_title",
        "site",
        mode="before",
    )
    @classmethod
    def _null_is_absent(cls, value: object) -> object:
        return "" if value is None else value

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

    model_config = {"extra": "forbid"}


class OrderOut(BaseModel):
    """`study_instance_uid` is the first linked study; null until images are linked."""

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
    created_at: datetime
    updated_at: datetime

    @classmethod
    def of(cls, order: Order, studies: list[str]) -> "OrderOut":
        return cls(
            **order.model_dump(),
            studies=studies,
            study_instance_uid=studies[0] if studies else None,
        )


@router.post("", status_code=201)
async def create_order(caller: CreateOrder, body: NewOrder, request: Request) -> OrderOut:
    """Place an order. 404 for an unknown patient, 409 for an accession number in use."""
    access = await caller.admit(Subject.PATIENT, body.patient_id)
    order = Order(
        **{
            **body.model_dump(),
            "accession_number": body.accession_number or _new_accession_number(),
            "site": body.site or request.app.state.settings.site,
        },
        planned_study_instance_uid=new_uid(),
    )
    access.session.add(order)
    try:
        await access.session.flush()
    except sa.exc.IntegrityError as error:
        raise Conflict("An order with this accession number and issuer exists already.") from error
    await access.done(order_id=order.id)
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
    query = query.where(window.condition)
    if patient_id is not None:
        query = query.where(Order.patient_id == patient_id)
    if accession_number:
        query = query.where(Order.accession_number == accession_number)
    if status is not None:
        query = query.where(Order.status == status)
    if cursor:
        query = query.where(col(Order.id) > uuid_cursor(cursor))
    found = (await window.session.exec(query.order_by(col(Order.id)).limit(limit + 1))).all()
    page = found[:limit]
    linked = await order_studies(window, page)
    link_next(request, response, str(page[-1].id) if len(found) > limit else None)
    await window.disclose(each.patient_id for each in page)
    return [OrderOut.of(each, linked[each.id]) for each in page]


@router.get("/{order_id}")
async def read_order(access: ReadOrder, order_id: UUID) -> OrderOut:
    """One order, with the studies that are linked to it."""
    return await _answer(access)


@router.patch("/{order_id}")
async def change_order(
    access: WriteOrder, order_id: UUID, body: OrderChange, request: Request
) -> OrderOut:
    """Change an order. "cancelled" ends its open viewers and cannot be taken back."""
    order = access.order
    viewer: Viewer = request.app.state.viewer
    assert order is not None
    changes = body.model_dump(exclude_unset=True)
    for name in ("status", "description", "order_category", "station_ae_title"):
        if name in changes and changes[name] is None:
            raise Unprocessable(f"`{name}` can't be null; leave it out to keep it.")
    ended = 0
    if (
        order.status == OrderStatus.CANCELLED
        and changes.get("status", order.status) != order.status
    ):
        raise Conflict("The order is cancelled; place a new one.")
    if changes.get("status") == OrderStatus.CANCELLED:
        ended = await viewer.end_order_sessions(access)
    before = {name: getattr(order, name) for name in changes}
    for name, value in changes.items():
        setattr(order, name, value)
    order.updated_at = utcnow()
    access.session.add(order)
    await access.session.flush()
    await access.done(
        detail={
            "before": {name: str(value) for name, value in before.items()},
            "after": {name: str(value) for name, value in changes.items()},
            "viewers_ended": ended,
        }
    )
    return await _answer(access)


async def _answer(access: PatientAccess) -> OrderOut:
    assert access.order is not None
    linked = await order_studies(access, [access.order])
    return OrderOut.of(access.order, linked[access.order.id])


def _new_accession_number() -> str:
    """16 characters (SH): a year and 65 random bits; the table keeps it unique with its issuer."""
    return f"{utcnow():%y}-" + "".join(secrets.choice(_ALPHABET) for _ in range(13))
