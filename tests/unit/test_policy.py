"""The policy: each role's rights as the contract words them, and lists that agree with it."""

from dataclasses import replace
from datetime import date, datetime, timedelta
from itertools import product
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.access.policy import (
    ANY_PATIENT,
    POLICY,
    Reason,
    Relation,
    clauses,
    decide,
    visible,
)
from app.audit import Action
from app.db import Database, utcnow
from app.dicom import new_uid
from app.identity import Principal, Role
from app.models import CareTeamMember, Instance, Order, OrderStatus, Patient, Series, Study

# What no grant is ever asked for: the trail's own words for sessions and tokens.
NO_RIGHTS = {Action.SESSION_END, Action.SESSION_OPEN, Action.SIGN_IN}
IMAGES = {Action.STUDY_LIST, Action.STUDY_READ, Action.STUDY_VIEW}
WRITES = {
    Action.CARE_TEAM_WRITE,
    Action.ORDER_CREATE,
    Action.ORDER_WRITE,
    Action.PATIENT_CREATE,
    Action.STUDY_COERCE,
    Action.STUDY_DELETE,
    Action.STUDY_UPLOAD,
    Action.TAGS_MODIFY,
}


def principal(*roles: Role, sub: str = "me", site: str = "main") -> Principal:
    return Principal(sub=sub, name=sub, roles=frozenset(roles), site=site)


# ------------------------------------------------------------------------------------ the table


def test_admin_and_auditor_have_one_right_each() -> None:
    assert set(POLICY[Role.ADMIN]) == {Action.STATISTICS_READ}
    assert set(POLICY[Role.AUDITOR]) == {Action.AUDIT_READ}


def test_only_they_have_those() -> None:
    for role in set(Role) - {Role.ADMIN, Role.AUDITOR}:
        assert not POLICY[role].keys() & {Action.STATISTICS_READ, Action.AUDIT_READ}


@pytest.mark.parametrize("role", [Role.CLINICIAN, Role.RADIOLOGIST, Role.TECHNOLOGIST])
def test_people_never_see_a_patient_without_a_relation(role: Role) -> None:
    tools = {Action.TAGS_READ, Action.TAGS_MODIFY}  # on a file of the caller's own
    for action in POLICY[role].keys() - tools:
        assert POLICY[role][action] != ANY_PATIENT, action
        assert decide(principal(role), action).reason is Reason.NO_RELATIONSHIP


@pytest.mark.parametrize(
    ("role", "writes"),
    [
        (Role.CLINICIAN, set()),
        (
            Role.RADIOLOGIST,
            {Action.STUDY_COERCE, Action.STUDY_DELETE, Action.STUDY_UPLOAD, Action.TAGS_MODIFY},
        ),
        (Role.TECHNOLOGIST, {Action.STUDY_COERCE, Action.STUDY_UPLOAD, Action.TAGS_MODIFY}),
        (Role.SERVICE, WRITES - {Action.STUDY_COERCE, Action.TAGS_MODIFY}),
        (Role.ADMIN, set()),
        (Role.AUDITOR, set()),
    ],
)
def test_who_may_change_what(role: Role, writes: set[Action]) -> None:
    assert POLICY[role].keys() & WRITES == writes


@pytest.mark.parametrize("action", sorted(NO_RIGHTS))
def test_nobody_is_granted_what_is_only_recorded(action: Action) -> None:
    assert decide(principal(*Role), action, Relation).reason is Reason.ROLE


@pytest.mark.parametrize("action", sorted(IMAGES))
def test_each_relation_carries_the_roles_it_is_meant_for(action: Action) -> None:
    carries = {
        Relation.ATTENDS: {Role.CLINICIAN},
        Relation.CARE_TEAM: {Role.CLINICIAN},
        Relation.REQUESTED: {Role.CLINICIAN},
        Relation.SITE_IMAGING: {Role.RADIOLOGIST},
        Relation.SITE_SCHEDULED: {Role.TECHNOLOGIST},
        Relation.UPLOADED: {Role.TECHNOLOGIST},
    }
    assert set(carries) == set(Relation)
    people = (Role.CLINICIAN, Role.RADIOLOGIST, Role.TECHNOLOGIST)
    for (relation, roles), role in product(carries.items(), people):
        decision = decide(principal(role), action, [relation])
        assert decision.allowed is (role in roles), (role, relation)
        if decision.allowed:
            assert decision.by == {relation}


def test_an_unknown_caller_may_nothing() -> None:
    for action in Action:
        assert decide(principal(), action, Relation).reason is Reason.ROLE


@given(
    roles=st.frozensets(st.sampled_from(Role)),
    action=st.sampled_from(Action),
    relations=st.frozensets(st.sampled_from(Relation)),
)
def test_two_roles_may_what_either_may_and_no_more(
    roles: frozenset[Role], action: Action, relations: frozenset[Relation]
) -> None:
    together = decide(principal(*roles), action, relations)
    alone = [decide(principal(role), action, relations) for role in roles]
    assert together.allowed is any(each.allowed for each in alone)
    if not together.allowed:
        by_role = all(each.reason is Reason.ROLE for each in alone)
        assert together.reason is (Reason.ROLE if by_role else Reason.NO_RELATIONSHIP)


# ------------------------------------------------------- the relations, and lists that follow them


def patient(mrn: str) -> Patient:
    return Patient(mrn=mrn, first_name="P", last_name=mrn, dob=date(1980, 1, 1))


def order(of: Patient, **values: Any) -> Order:
    sane = {
        "order_type": "IMAGING",
        "order_category": "CT",
        "site": "main",
        "accession_number": f"A-{of.mrn}"[:16],
        "planned_study_instance_uid": new_uid(),
    }
    return Order(patient_id=of.id, **{**sane, **values})


def stored(of: Patient, received_by: str) -> list[Study | Series | Instance]:
    study, series, instance = new_uid(), new_uid(), new_uid()
    return [
        Study(study_instance_uid=study, patient_id=of.id, orthanc_id="-", dicom_patient_id=of.mrn),
        Series(series_instance_uid=series, study_instance_uid=study),
        Instance(
            sop_instance_uid=instance,
            series_instance_uid=series,
            study_instance_uid=study,
            orthanc_id="-",
            sop_class_uid="1.2",
            transfer_syntax_uid="1.2",
            received_sha256="-",
            received_by=received_by,
        ),
    ]


def member(of: Patient, sub: str, expires_at: datetime | None = None) -> CareTeamMember:
    return CareTeamMember(patient_id=of.id, sub=sub, added_by="ehr", expires_at=expires_at)


NOW = utcnow()
SECOND = timedelta(seconds=1)
CANCELLED, DONE = OrderStatus.CANCELLED, OrderStatus.COMPLETED
FAR = {"site": "north", "status": DONE}  # an order that ties nobody at `main`

# mrn of a patient, the rows that tie `me` at `main` to them, and the relations that then hold
CASES: dict[str, tuple[list[Any], set[Relation]]] = {}


def case(mrn: str, *rows: Any, holds: set[Relation] | None = None) -> None:
    CASES[mrn] = (list(rows), holds or set())


REQUESTED, ATTENDS, CARE = Relation.REQUESTED, Relation.ATTENDS, Relation.CARE_TEAM
IMAGING, SCHEDULED = Relation.SITE_IMAGING, Relation.SITE_SCHEDULED
case("nothing")
case("requested", lambda p: order(p, requested_by="me", **FAR), holds={REQUESTED})
case("requested by another", lambda p: order(p, requested_by="you", **FAR))
case("requested by ME", lambda p: order(p, requested_by="ME", **FAR))
case("requested by me and a space", lambda p: order(p, requested_by="me ", **FAR))
case(
    "requested, cancelled",
    lambda p: order(p, requested_by="me", attending="me", site="main", status=CANCELLED),
)
case("attends", lambda p: order(p, attending="me", **FAR), holds={ATTENDS})
case("care team", lambda p: member(p, "me"), holds={CARE})
case("care team until soon", lambda p: member(p, "me", NOW + SECOND), holds={CARE})
case("care team until now", lambda p: member(p, "me", NOW))
case("care team until just before", lambda p: member(p, "me", NOW - SECOND))
case("care team of another", lambda p: member(p, "you"))
case("care team of m_", lambda p: member(p, "m_"))
case("care team of %", lambda p: member(p, "%"))
case("scheduled here", order, holds={IMAGING, SCHEDULED})
case(
    "under way here",
    lambda p: order(p, status=OrderStatus.IN_PROGRESS),
    holds={IMAGING, SCHEDULED},
)
case("completed here", lambda p: order(p, status=DONE), holds={IMAGING})
case("scheduled elsewhere", lambda p: order(p, site="north"))
case("scheduled at MAIN", lambda p: order(p, site="MAIN"))
case("an order of the laboratory", lambda p: order(p, order_type="LAB"))
case("uploaded by me", lambda p: stored(p, "me"), holds={Relation.UPLOADED})
case("uploaded by another", lambda p: stored(p, "you"))


@pytest.fixture
async def cases(sqlite_url: str) -> Any:
    """Each case's patient in a database of its own, by mrn."""
    database = Database(sqlite_url)
    async with database.session() as session:
        patients = {mrn: patient(mrn) for mrn in CASES}
        session.add_all(patients.values())
        await session.flush()
        for mrn, (makers, _) in CASES.items():
            for make in makers:
                made = make(patients[mrn])
                for row in made if isinstance(made, list) else [made]:
                    session.add(row)
                    await session.flush()
        yield session
    await database.close()


async def holding(session: AsyncSession, who: Principal) -> dict[str, set[Relation]]:
    """Which relations hold to each patient, by mrn."""
    holds = clauses(who, NOW)
    found = await (await session.connection()).execute(
        sa.select(col(Patient.mrn), *(clause.label(each.name) for each, clause in holds.items()))
    )
    return {
        mrn: {relation for relation, held in zip(holds, row, strict=True) if held}
        for mrn, *row in found
    }


async def test_each_relation_holds_exactly_where_it_should(cases: AsyncSession) -> None:
    assert await holding(cases, principal()) == {mrn: holds for mrn, (_, holds) in CASES.items()}


async def test_somebody_else_has_none_of_my_relations(cases: AsyncSession) -> None:
    for mrn, relations in (await holding(cases, principal(sub="x", site="south"))).items():
        assert relations == set(), mrn


ROLES = [(role,) for role in Role] + [(Role.CLINICIAN, Role.TECHNOLOGIST), ()]


@pytest.mark.parametrize("roles", ROLES, ids=lambda roles: "+".join(roles) or "none")
async def test_a_list_shows_exactly_whom_one_request_would(
    roles: tuple[Role, ...], cases: AsyncSession
) -> None:
    for who in (principal(*roles), replace(principal(*roles), sub="you", site="north")):
        holds = await holding(cases, who)
        for action in Action:
            listed = await cases.exec(select(Patient.mrn).where(visible(who, action, NOW)))
            single = {mrn for mrn, held in holds.items() if decide(who, action, held).allowed}
            assert set(listed) == single, action
