"""The decision on a viewer's requests: session, right, study and instance in one statement.

It says only yes or nothing. Whatever is not in order goes the long way (`Viewer.study_access`),
which finds out what, records it, and ends the session where it has to.
"""

import hashlib
import hmac
from dataclasses import replace
from datetime import datetime
from functools import cache
from typing import Any, NamedTuple
from uuid import UUID

import sqlalchemy as sa
from sqlmodel import col

from app.access import Ehr, SessionAccess, StudyAccess
from app.access.glance import (
    UID,
    confirmed,
    parameters,
    relation_columns,
    session_access,
    study_access,
    study_columns,
    with_instance,
)
from app.access.named import Named
from app.access.policy import BREAK_THE_GLASS
from app.audit import Action
from app.db import Reader, utcnow
from app.identity import PatientContext, Principal, Role
from app.models import LaunchSession, LaunchStudy, Order, OrderStatus, Patient, Study
from app.viewer.closing import Limits
from app.viewer.usage import Usage


class Alive(NamedTuple):
    """A live session: until when, at the latest, and whether the glass was broken for it."""

    expires_at: datetime
    purpose_of_use: str


class Glances:
    """Asks what is committed now, and nothing that is remembered. One per app."""

    def __init__(self, reader: Reader, ehr: Ehr | None, usage: Usage, limits: Limits) -> None:
        self._reader = reader
        self._ehr = ehr
        self._usage = usage
        self._limits = limits
        self._study = reader.prepare(_study_statement())
        self._patient = reader.prepare(_patient_statement())

    async def at_study(
        self, ctx: str, cookie: str | None, study_uid: str, series_uid: str, sop_uid: str
    ) -> StudyAccess | None:
        """The session's access to one of its studies, where everything is in order and its first
        request is on record. None: ask `study_access`, which says what is not in order.

        Raises DatabaseUnavailable.
        """
        values = parameters(study_uid, series_uid, sop_uid, utcnow())
        row = await self._reader.first(self._study, {**values, "ctx": ctx})
        if row is None:
            return None
        launch, (first_accessed_at, *rest) = _Launch(*row[: len(_LAUNCH)]), row[len(_LAUNCH) :]
        if first_accessed_at is None or not self._is_in_order(launch, cookie, values["now"]):
            return None
        access = study_access(launch.principal, Action.STUDY_VIEW, rest, ctx)
        if access is None or access.patient_id != launch.patient_id:
            return None
        if access.purpose_of_use != launch.purpose_of_use:
            if not continues(launch.purpose_of_use, access.purpose_of_use):
                return None
            access = replace(access, purpose_of_use=launch.purpose_of_use)
        if not await confirmed(self._ehr, access, launch.purpose_of_use):
            return None
        self._usage.count(ctx, study_uid, values["now"])
        return access

    async def at_search(self, ctx: str, cookie: str | None) -> SessionAccess | None:
        """As `at_study`, for a search among the session's studies; None: ask `patient_access`."""
        found = await self._at_patient(ctx, cookie)
        return None if found is None else found[1]

    async def alive(self, ctx: str, cookie: str | None) -> Alive | None:
        """Until when the session lives, where everything is in order; it counts as a use."""
        found = await self._at_patient(ctx, cookie)
        if found is None:
            return None
        launch, _ = found
        self._usage.touch(ctx, utcnow())
        return Alive(launch.expires_at, launch.purpose_of_use)

    async def _at_patient(
        self, ctx: str, cookie: str | None
    ) -> tuple["_Launch", SessionAccess] | None:
        now = utcnow()
        row = await self._reader.first(self._patient, {"ctx": ctx, "now": now})
        if row is None:
            return None
        launch, rest = _Launch(*row[: len(_LAUNCH)]), row[len(_LAUNCH) :]
        if not self._is_in_order(launch, cookie, now):
            return None
        access = session_access(launch.principal, Action.STUDY_VIEW, launch.patient_id, rest, ctx)
        if access is None or not continues(launch.purpose_of_use, access.purpose_of_use):
            return None
        if not await confirmed(self._ehr, access, launch.purpose_of_use):
            return None
        return launch, access

    def _is_in_order(self, launch: "_Launch", cookie: str | None, now: datetime) -> bool:
        """Is it this browser's, and alive? It says only yes where `open_session` would."""
        return (
            launch.cookie_sha256 is not None
            and cookie is not None
            and hmac.compare_digest(launch.cookie_sha256, sha256(cookie))
            and launch.ended_at is None
            and launch.expires_at > now
            and not self._limits.is_idle(launch.ctx, launch.last_used_at, now)
            and (launch.order_id is None or launch.order_status not in (None, _CANCELLED))
            and not launch.strayed
        )


def continues(launched_with: str, purpose_of_use: str) -> bool:
    """May a session go on under this purpose? One that was opened without breaking the glass ends
    with the right that it had: what is seen under broken glass is marked from its launch on."""
    return purpose_of_use != BREAK_THE_GLASS or launched_with == BREAK_THE_GLASS


def principal_of(launch: "LaunchSession | _Launch") -> Principal:
    """The person behind a session, as their token described them at its launch."""
    return Principal(
        sub=launch.actor,
        name=launch.actor_name,
        roles=_roles(launch.actor_roles),
        site=launch.actor_site,
        patient=None
        if launch.context_patient_id is None
        else PatientContext(patient_id=launch.context_patient_id),
    )


def sha256(secret: str) -> str:
    """How secrets are kept."""
    return hashlib.sha256(secret.encode()).hexdigest()


@cache
def _roles(text: str) -> frozenset[Role]:
    return frozenset(Role(role) for role in text.split(",") if role)


_CANCELLED = OrderStatus.CANCELLED


class _Launch(NamedTuple):
    """What is asked about the session; in the order of `_LAUNCH`."""

    ctx: str
    cookie_sha256: str | None
    ended_at: datetime | None
    expires_at: datetime
    last_used_at: datetime
    actor: str
    actor_name: str
    actor_roles: str
    actor_site: str
    purpose_of_use: str
    context_patient_id: UUID | None
    patient_id: UUID
    order_id: UUID | None
    order_status: OrderStatus | None
    strayed: bool

    @property
    def principal(self) -> Principal:
        return principal_of(self)


def strayed() -> sa.ColumnElement[bool]:
    """Does a study that the session in the surrounding query looked at belong to another patient
    by now?"""
    looked_at = sa.alias(_table(LaunchStudy))
    study = sa.alias(_table(Study))
    return (
        sa.select(sa.literal(1))
        .select_from(
            looked_at.join(study, study.c.study_instance_uid == looked_at.c.study_instance_uid)
        )
        .where(
            looked_at.c.ctx == col(LaunchSession.ctx),
            looked_at.c.first_accessed_at.is_not(None),
            study.c.patient_id != col(LaunchSession.patient_id),
        )
        .correlate(_table(LaunchSession))
        .exists()
    )


def _table(model: Any) -> sa.FromClause:
    table: sa.FromClause = model.__table__
    return table


_LAUNCH: tuple[Any, ...] = (
    col(LaunchSession.ctx),
    col(LaunchSession.cookie_sha256),
    col(LaunchSession.ended_at),
    col(LaunchSession.expires_at),
    col(LaunchSession.last_used_at),
    col(LaunchSession.actor),
    col(LaunchSession.actor_name),
    col(LaunchSession.actor_roles),
    col(LaunchSession.actor_site),
    col(LaunchSession.purpose_of_use),
    col(LaunchSession.context_patient_id),
    col(LaunchSession.patient_id).label("launch_patient_id"),
    col(LaunchSession.order_id),
    col(Order.status),
    strayed().label("strayed"),
)
_ACTOR = Named(
    col(LaunchSession.actor),
    col(LaunchSession.actor_site),
    sa.or_(
        col(LaunchSession.context_patient_id).is_(None),
        col(LaunchSession.context_patient_id) == col(Patient.id),
    ),
)
_CTX = sa.bindparam("ctx", type_=sa.String())


def _study_statement() -> sa.Select[Any]:
    """Session, study and instance in one row; see `app.access.glance`."""
    uid = sa.bindparam(UID, type_=sa.String())
    tables = (
        _table(LaunchSession)
        .join(
            _table(LaunchStudy),
            sa.and_(
                col(LaunchStudy.ctx) == col(LaunchSession.ctx),
                col(LaunchStudy.study_instance_uid) == uid,
            ),
        )
        .join(_table(Study), col(Study.study_instance_uid) == uid)
        .outerjoin(_table(Order), col(Order.id) == col(LaunchSession.order_id))
    )
    columns = (*_LAUNCH, col(LaunchStudy.first_accessed_at), *study_columns(_ACTOR))
    return (
        sa.select(*columns).select_from(with_instance(tables)).where(col(LaunchSession.ctx) == _CTX)
    )


def _patient_statement() -> sa.Select[Any]:
    """Session and patient in one row."""
    tables = (
        _table(LaunchSession)
        .join(_table(Patient), col(Patient.id) == col(LaunchSession.patient_id))
        .outerjoin(_table(Order), col(Order.id) == col(LaunchSession.order_id))
    )
    columns = (*_LAUNCH, *relation_columns(_ACTOR))
    return sa.select(*columns).select_from(tables).where(col(LaunchSession.ctx) == _CTX)
