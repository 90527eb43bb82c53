"""The policy, readable in one sitting: which role may do what, and to whose patients.

`decide` is pure. The facts it needs about a patient are relations; `clauses` says in SQL when
each holds, and serves both one patient ("does it hold?") and lists ("for whom does it hold?"),
so that a list can never show more than a single request would.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Protocol

import sqlalchemy as sa
from sqlmodel import col

from app.audit import Action
from app.identity import Principal, Role
from app.models import (
    BrokenGlass,
    CareTeamMember,
    Instance,
    NamedPerson,
    Order,
    OrderStatus,
    Patient,
    Restriction,
    RestrictionLevel,
    Study,
)


class Relation(StrEnum):
    """What stands between a caller and a patient. An order that was cancelled ties nobody.

    `ADMITTED` ties nobody by itself; without it no tie holds, unless the glass was broken.
    """

    ADMITTED = "the patient is not restricted, or the caller is named among those admitted"
    ATTENDS = "attends an order of the patient"
    BROKE_GLASS = "broke the glass for the patient"
    CARE_TEAM = "is on the patient's care team"
    REQUESTED = "requested an order of the patient"
    SITE_IMAGING = "the patient has an imaging order at the caller's site"
    SITE_SCHEDULED = "the patient has an imaging order under way at the caller's site"
    UPLOADED = "uploaded images of the patient"


class Reason(StrEnum):
    """Why not. The words a denial is recorded and explained with."""

    NO_RELATIONSHIP = "no-relationship"
    RESTRICTED = "restricted"
    ROLE = "role"


BREAK_THE_GLASS = "BTG"


@dataclass(frozen=True)
class Decision:
    """Allowed, or denied with the reason. `by` are the relations that carried it;
    `purpose_of_use` is `BTG` (HL7 v3 PurposeOfUse) where it is so only because the glass was
    broken, and else empty."""

    allowed: bool
    reason: Reason | None = None
    by: frozenset[Relation] = frozenset()
    purpose_of_use: str = ""


ANY_PATIENT: frozenset[Relation] = frozenset()
"""The role may do it to every patient, restricted or not, or it concerns no single patient."""

TREATS = frozenset({Relation.REQUESTED, Relation.ATTENDS, Relation.CARE_TEAM, Relation.BROKE_GLASS})
READS = frozenset({Relation.SITE_IMAGING, Relation.BROKE_GLASS})
WRITES = frozenset({Relation.SITE_IMAGING})
WORKS_ON = frozenset({Relation.SITE_SCHEDULED, Relation.UPLOADED})

POLICY: Mapping[Role, Mapping[Action, frozenset[Relation]]] = {
    Role.CLINICIAN: {
        Action.ACCESS_EXPLAIN: ANY_PATIENT,
        Action.GLASS_BREAK: ANY_PATIENT,
        Action.SESSION_LIST: ANY_PATIENT,
        Action.SESSION_REVOKE: ANY_PATIENT,
        Action.SIGN_OUT: ANY_PATIENT,
        Action.PATIENT_LIST: TREATS,
        Action.PATIENT_READ: TREATS,
        Action.CARE_TEAM_READ: TREATS,
        Action.ORDER_LIST: TREATS,
        Action.ORDER_READ: TREATS,
        Action.STUDY_LIST: TREATS,
        Action.STUDY_READ: TREATS,
        Action.STUDY_RETRIEVE: TREATS,
        Action.STUDY_VIEW: TREATS,
    },
    Role.RADIOLOGIST: {
        Action.ACCESS_EXPLAIN: ANY_PATIENT,
        Action.GLASS_BREAK: ANY_PATIENT,
        Action.SESSION_LIST: ANY_PATIENT,
        Action.SESSION_REVOKE: ANY_PATIENT,
        Action.SIGN_OUT: ANY_PATIENT,
        Action.PATIENT_LIST: READS,
        Action.PATIENT_READ: READS,
        Action.ORDER_LIST: READS,
        Action.ORDER_READ: READS,
        Action.STUDY_LIST: READS,
        Action.STUDY_READ: READS,
        Action.STUDY_RETRIEVE: READS,
        Action.STUDY_VIEW: READS,
        Action.STUDY_UPLOAD: WRITES,
        Action.STUDY_COERCE: WRITES,
        Action.STUDY_DELETE: WRITES,
        Action.TAGS_READ: ANY_PATIENT,
        Action.TAGS_MODIFY: ANY_PATIENT,
    },
    Role.TECHNOLOGIST: {
        Action.ACCESS_EXPLAIN: ANY_PATIENT,
        Action.SESSION_LIST: ANY_PATIENT,
        Action.SESSION_REVOKE: ANY_PATIENT,
        Action.SIGN_OUT: ANY_PATIENT,
        Action.PATIENT_LIST: WORKS_ON,
        Action.PATIENT_READ: WORKS_ON,
        Action.ORDER_LIST: WORKS_ON,
        Action.ORDER_READ: WORKS_ON,
        Action.STUDY_LIST: WORKS_ON,
        Action.STUDY_READ: WORKS_ON,
        Action.STUDY_RETRIEVE: WORKS_ON,
        Action.STUDY_VIEW: WORKS_ON,
        Action.STUDY_UPLOAD: WRITES,
        Action.STUDY_COERCE: WRITES,
        Action.TAGS_READ: ANY_PATIENT,
        Action.TAGS_MODIFY: ANY_PATIENT,
    },
    Role.SERVICE: {
        Action.ACCESS_EXPLAIN: ANY_PATIENT,
        Action.ACCESS_REPORT: ANY_PATIENT,
        Action.RESTRICTION_READ: ANY_PATIENT,
        Action.RESTRICTION_WRITE: ANY_PATIENT,
        Action.SESSION_LIST: ANY_PATIENT,
        Action.SESSION_REVOKE: ANY_PATIENT,
        Action.SIGN_OUT: ANY_PATIENT,
        Action.PATIENT_CREATE: ANY_PATIENT,
        Action.PATIENT_LIST: ANY_PATIENT,
        Action.PATIENT_READ: ANY_PATIENT,
        Action.CARE_TEAM_READ: ANY_PATIENT,
        Action.CARE_TEAM_WRITE: ANY_PATIENT,
        Action.ORDER_CREATE: ANY_PATIENT,
        Action.ORDER_LIST: ANY_PATIENT,
        Action.ORDER_READ: ANY_PATIENT,
        Action.ORDER_WRITE: ANY_PATIENT,
        Action.STUDY_LIST: ANY_PATIENT,
        Action.STUDY_READ: ANY_PATIENT,
        Action.STUDY_RETRIEVE: ANY_PATIENT,
        Action.STUDY_VIEW: ANY_PATIENT,
        Action.STUDY_UPLOAD: ANY_PATIENT,
        Action.STUDY_DELETE: ANY_PATIENT,
        Action.TAGS_READ: ANY_PATIENT,
    },
    Role.ADMIN: {
        Action.SESSION_LIST: ANY_PATIENT,
        Action.SESSION_REVOKE: ANY_PATIENT,
        Action.STATISTICS_READ: ANY_PATIENT,
    },
    Role.AUDITOR: {
        Action.ACCESS_REPORT: ANY_PATIENT,
        Action.AUDIT_READ: ANY_PATIENT,
        Action.GLASS_REVIEW: ANY_PATIENT,
        Action.SESSION_LIST: ANY_PATIENT,
        Action.SESSION_REVOKE: ANY_PATIENT,
    },
}


def sufficing(principal: Principal, action: Action) -> list[frozenset[Relation]]:
    """The relations that suffice, a set for each of the caller's roles that knows the action."""
    return [
        POLICY[role][action] for role in sorted(principal.roles) if action in POLICY.get(role, {})
    ]


def decide(principal: Principal, action: Action, relations: Iterable[Relation] = ()) -> Decision:
    """May this caller do this, tied to the patient by these relations?"""
    ways = sufficing(principal, action)
    if not ways:
        return Decision(allowed=False, reason=Reason.ROLE)
    held = frozenset(relations)
    if ANY_PATIENT in ways:
        return Decision(allowed=True)
    by = held & frozenset().union(*ways)
    if not by:
        return Decision(allowed=False, reason=Reason.NO_RELATIONSHIP)
    broke = held & {Relation.BROKE_GLASS}
    if Relation.ADMITTED not in held:
        if not broke:
            return Decision(allowed=False, reason=Reason.RESTRICTED)
        return Decision(allowed=True, by=by | broke, purpose_of_use=BREAK_THE_GLASS)
    return Decision(allowed=True, by=by, purpose_of_use=BREAK_THE_GLASS if by == broke else "")


class Tied(Protocol):
    """Who may be tied to a patient: a `Principal`, or columns that name one."""

    @property
    def sub(self) -> Any: ...
    @property
    def site(self) -> Any: ...


def clauses(
    caller: Tied, now: datetime | sa.ColumnElement[datetime]
) -> dict[Relation, sa.ColumnElement[bool]]:
    """When each relation holds for the row of `Patient` in the surrounding query.

    The caller may be columns of that query too: each subquery has only its own tables, or it
    would ask about anybody's.
    """
    live_order = (
        sa.select(sa.literal(1))
        .where(col(Order.patient_id) == Patient.id, col(Order.status) != OrderStatus.CANCELLED)
        .correlate_except(Order)
    )
    at_site = live_order.where(col(Order.order_type) == "IMAGING", col(Order.site) == caller.site)
    member = (
        sa.select(sa.literal(1))
        .where(
            col(CareTeamMember.patient_id) == Patient.id,
            col(CareTeamMember.sub) == caller.sub,
            sa.or_(col(CareTeamMember.expires_at).is_(None), col(CareTeamMember.expires_at) > now),
        )
        .correlate_except(CareTeamMember)
    )
    uploaded = (
        sa.select(sa.literal(1))
        .select_from(Instance)
        .join(Study, col(Study.study_instance_uid) == col(Instance.study_instance_uid))
        .where(col(Study.patient_id) == Patient.id, col(Instance.received_by) == caller.sub)
        .correlate_except(Instance, Study)
    )
    restricted = (
        sa.select(sa.literal(1))
        .where(col(Restriction.patient_id) == Patient.id)
        .correlate_except(Restriction)
    )
    named = (
        sa.select(sa.literal(1))
        .where(col(NamedPerson.patient_id) == Patient.id, col(NamedPerson.sub) == caller.sub)
        .correlate_except(NamedPerson)
    )
    sealed = restricted.where(col(Restriction.level) == RestrictionLevel.SEALED.value)
    broke_glass = (
        sa.select(sa.literal(1))
        .where(
            col(BrokenGlass.patient_id) == Patient.id,
            col(BrokenGlass.sub) == caller.sub,
            col(BrokenGlass.expires_at) > now,
            sa.or_(col(BrokenGlass.opens_sealed), sa.not_(sealed.exists())),
        )
        .correlate_except(BrokenGlass)
    )
    return {
        Relation.ADMITTED: sa.or_(sa.not_(restricted.exists()), named.exists()),
        Relation.BROKE_GLASS: broke_glass.exists(),
        Relation.REQUESTED: live_order.where(col(Order.requested_by) == caller.sub).exists(),
        Relation.ATTENDS: live_order.where(col(Order.attending) == caller.sub).exists(),
        Relation.CARE_TEAM: member.exists(),
        Relation.SITE_IMAGING: at_site.exists(),
        Relation.SITE_SCHEDULED: at_site.where(
            sa.or_(
                col(Order.status) == OrderStatus.SCHEDULED,
                col(Order.status) == OrderStatus.IN_PROGRESS,
            )
        ).exists(),
        Relation.UPLOADED: uploaded.exists(),
    }


def visible(principal: Principal, action: Action, now: datetime) -> sa.ColumnElement[bool]:
    """For which rows of `Patient` would `decide` say yes?"""
    ways = sufficing(principal, action)
    if ANY_PATIENT in ways:
        return sa.true()
    holds = clauses(principal, now)
    tied = sa.or_(sa.false(), *(holds[each] for each in sorted(frozenset().union(*ways))))
    return sa.and_(tied, sa.or_(holds[Relation.ADMITTED], holds[Relation.BROKE_GLASS]))
