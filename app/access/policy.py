"""The policy, readable in one sitting: which role may do what, and to whose patients.

`decide` is pure. The facts it needs about a patient are relations; `clauses` says in SQL when
each holds, and serves both one patient ("does it hold?") and lists ("for whom does it hold?"),
so that a list can never show more than a single request would.

Four limits follow each other, and none can be made up for by another: a role that knows the action,
the token's own limits (scopes, the patient in context), a tie between caller and patient, and the
patient's restriction. What the EHR says (`app.access.ehr`) can take a right away and give none.
docs/policy.md has the whole of it for people to read, and a test holds the two together.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Protocol

import sqlalchemy as sa
from sqlmodel import col

from app.access.scopes import covers
from app.audit import Action
from app.identity import PatientContext, Principal, Role
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
    `IN_CONTEXT` ties nobody either; it is asked for where the token is limited to one patient.
    The performing physician of an order is a name, not somebody who signs in, and ties nobody.
    """

    ADMITTED = "the patient is not restricted, or the caller is named among those admitted"
    ATTENDS = "attends an order of the patient"
    BROKE_GLASS = "broke the glass for the patient"
    CARE_TEAM = "is on the patient's care team"
    IN_CONTEXT = "the token is limited to no patient, or to this one"
    REQUESTED = "requested an order of the patient"
    SITE_IMAGING = "the patient has an imaging order at the caller's site"
    SITE_SCHEDULED = "the patient has an imaging order under way at the caller's site"
    UPLOADED = "uploaded images of the patient"


class Reason(StrEnum):
    """Why not. The words a denial is recorded and explained with."""

    EHR = "ehr"
    EHR_UNAVAILABLE = "ehr-unavailable"
    NO_RELATIONSHIP = "no-relationship"
    OUT_OF_CONTEXT = "out-of-context"
    RESTRICTED = "restricted"
    ROLE = "role"
    SCOPE = "scope"


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
        Action.ARRIVAL_LIST: READS,
        Action.GLASS_BREAK: ANY_PATIENT,
        Action.IMPORT_CANCEL: ANY_PATIENT,
        Action.IMPORT_READ: ANY_PATIENT,
        Action.IMPORT_WRITE: ANY_PATIENT,
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
        Action.STUDY_LINK: WRITES,
        Action.STUDY_DELETE: WRITES,
        Action.TAGS_READ: ANY_PATIENT,
        Action.TAGS_MODIFY: ANY_PATIENT,
    },
    Role.TECHNOLOGIST: {
        Action.ACCESS_EXPLAIN: ANY_PATIENT,
        Action.ARRIVAL_LIST: WORKS_ON,
        Action.IMPORT_CANCEL: ANY_PATIENT,
        Action.IMPORT_READ: ANY_PATIENT,
        Action.IMPORT_WRITE: ANY_PATIENT,
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
        Action.STUDY_LINK: WRITES,
        Action.TAGS_READ: ANY_PATIENT,
        Action.TAGS_MODIFY: ANY_PATIENT,
    },
    Role.SERVICE: {
        Action.ACCESS_EXPLAIN: ANY_PATIENT,
        Action.ACCESS_REPORT: ANY_PATIENT,
        Action.RESTRICTION_READ: ANY_PATIENT,
        Action.RESTRICTION_WRITE: ANY_PATIENT,
        Action.IMPORT_CANCEL: ANY_PATIENT,
        Action.IMPORT_READ: ANY_PATIENT,
        Action.IMPORT_WRITE: ANY_PATIENT,
        Action.SESSION_LIST: ANY_PATIENT,
        Action.SESSION_REVOKE: ANY_PATIENT,
        Action.SIGN_OUT: ANY_PATIENT,
        Action.PATIENT_CREATE: ANY_PATIENT,
        Action.PATIENT_LIST: ANY_PATIENT,
        Action.PATIENT_MERGE: ANY_PATIENT,
        Action.PATIENT_READ: ANY_PATIENT,
        Action.PATIENT_WRITE: ANY_PATIENT,
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
        Action.STUDY_LINK: ANY_PATIENT,
        Action.STUDY_UPLOAD: ANY_PATIENT,
        Action.STUDY_DELETE: ANY_PATIENT,
        Action.TAGS_READ: ANY_PATIENT,
    },
    Role.ADMIN: {
        Action.IMPORT_CANCEL: ANY_PATIENT,
        Action.IMPORT_READ: ANY_PATIENT,
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


OF_NO_PATIENT = frozenset({Action.SIGN_OUT, Action.TAGS_MODIFY, Action.TAGS_READ})
"""What a token for one patient is good for beside that patient: a file of the caller's own."""


def may_ask(principal: Principal, action: Action) -> Decision:
    """Before it is looked at whom it is about: does a role of the caller know the action, and do
    the token's scopes cover it?"""
    if not sufficing(principal, action):
        return Decision(allowed=False, reason=Reason.ROLE)
    if not covers(principal, action):
        return Decision(allowed=False, reason=Reason.SCOPE)
    return Decision(allowed=True)


def decide_of_no_patient(principal: Principal, action: Action) -> Decision:
    """May this caller do this, which is about no single patient?"""
    asked = may_ask(principal, action)
    if asked.allowed and principal.patient is not None and action not in OF_NO_PATIENT:
        return Decision(allowed=False, reason=Reason.OUT_OF_CONTEXT)
    return asked


def decide(principal: Principal, action: Action, relations: Iterable[Relation] = ()) -> Decision:
    """May this caller do this, tied to the patient by these relations?"""
    asked = may_ask(principal, action)
    if not asked.allowed:
        return asked
    held = frozenset(relations)
    if principal.patient is not None and Relation.IN_CONTEXT not in held:
        return Decision(allowed=False, reason=Reason.OUT_OF_CONTEXT)
    ways = sufficing(principal, action)
    if ANY_PATIENT in ways:
        return Decision(allowed=True)
    by = held & frozenset().union(*ways)
    if not by:
        return Decision(allowed=False, reason=Reason.NO_RELATIONSHIP)
    if Relation.ADMITTED not in held:
        # A broken glass opens what it would open by itself: to read, never to change.
        if Relation.BROKE_GLASS not in by:
            return Decision(allowed=False, reason=Reason.RESTRICTED)
        return Decision(allowed=True, by=by, purpose_of_use=BREAK_THE_GLASS)
    alone = by == {Relation.BROKE_GLASS}
    return Decision(allowed=True, by=by, purpose_of_use=BREAK_THE_GLASS if alone else "")


class Tied(Protocol):
    """Who may be tied to a patient: a `Principal`, or columns that name one."""

    @property
    def sub(self) -> Any: ...
    @property
    def site(self) -> Any: ...
    @property
    def patient(self) -> PatientContext | sa.ColumnElement[bool] | None: ...


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
        Relation.IN_CONTEXT: _in_context(caller.patient),
        Relation.REQUESTED: live_order.where(col(Order.requested_by) == caller.sub).exists(),
        Relation.ATTENDS: live_order.where(col(Order.attending) == caller.sub).exists(),
        Relation.CARE_TEAM: member.exists(),
        Relation.SITE_IMAGING: at_site.exists(),
        Relation.SITE_SCHEDULED: at_site.where(
            sa.or_(
                col(Order.status) == OrderStatus.SCHEDULED,
                col(Order.status) == OrderStatus.IN_PROGRESS,
                col(Order.status) == OrderStatus.ARRIVING,
            )
        ).exists(),
        Relation.UPLOADED: uploaded.exists(),
    }


def _in_context(
    context: PatientContext | sa.ColumnElement[bool] | None,
) -> sa.ColumnElement[bool]:
    """Is the row of `Patient` the one in context? Without a context, each is."""
    if context is None:
        return sa.true()
    if isinstance(context, sa.ColumnElement):
        return context
    if context.patient_id is not None:
        return col(Patient.id) == context.patient_id
    if not context.mrn:
        return sa.false()
    return sa.and_(col(Patient.mrn) == context.mrn, col(Patient.mrn_issuer) == context.mrn_issuer)


def visible(principal: Principal, action: Action, now: datetime) -> sa.ColumnElement[bool]:
    """For which rows of `Patient` would `decide` say yes?"""
    if not may_ask(principal, action).allowed:
        return sa.false()
    ways = sufficing(principal, action)
    holds = clauses(principal, now)
    if ANY_PATIENT in ways:
        return holds[Relation.IN_CONTEXT]
    suffices = frozenset().union(*ways)
    tied = sa.or_(*(holds[each] for each in sorted(suffices)))
    admitted = [holds[Relation.ADMITTED]]
    if Relation.BROKE_GLASS in suffices:
        admitted.append(holds[Relation.BROKE_GLASS])
    return sa.and_(holds[Relation.IN_CONTEXT], tied, sa.or_(*admitted))
