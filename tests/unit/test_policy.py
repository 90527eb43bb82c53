"""The policy: each role's rights as the contract words them, and lists that agree with it."""

from dataclasses import replace
from datetime import date, datetime, timedelta
from itertools import product
from typing import Any
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.access.policy import (
    ANY_PATIENT,
    BREAK_THE_GLASS,
    OF_NO_PATIENT,
    POLICY,
    Reason,
    Relation,
    clauses,
    decide,
    decide_of_no_patient,
    visible,
)
from app.access.scopes import NEEDS, NEEDS_NONE
from app.audit import Action
from app.db import Database, utcnow
from app.dicom import new_uid
from app.identity import PatientContext, Principal, Role, Scope
from app.models import (
    BrokenGlass,
    CareTeamMember,
    Instance,
    NamedPerson,
    Order,
    OrderStatus,
    Patient,
    Restriction,
    Series,
    Study,
)

# What no grant is ever asked for: the trail's own words for sessions and tokens.
NO_RIGHTS = {Action.SESSION_END, Action.SESSION_OPEN, Action.SIGN_IN}
IMAGES = {Action.STUDY_LIST, Action.STUDY_READ, Action.STUDY_VIEW}
WRITES = {
    Action.CARE_TEAM_WRITE,
    Action.ORDER_CREATE,
    Action.ORDER_WRITE,
    Action.PATIENT_CREATE,
    Action.PATIENT_MERGE,
    Action.PATIENT_WRITE,
    Action.RESTRICTION_WRITE,
    Action.STUDY_COERCE,
    Action.STUDY_DELETE,
    Action.STUDY_LINK,
    Action.STUDY_UPLOAD,
    Action.TAGS_MODIFY,
}
IMPORTS = {Action.IMPORT_CANCEL, Action.IMPORT_READ, Action.IMPORT_WRITE}  # one's own, by file
# What shows no patient: one's own sessions, the way to a right, a file of the caller's own.
OWN = {
    Action.ACCESS_EXPLAIN,
    Action.GLASS_BREAK,
    *IMPORTS,
    Action.SESSION_LIST,
    Action.SESSION_REVOKE,
    Action.SIGN_OUT,
    Action.TAGS_MODIFY,
    Action.TAGS_READ,
}
SESSIONS = {Action.SESSION_LIST, Action.SESSION_REVOKE}
TRAIL = {Action.ACCESS_REPORT, Action.AUDIT_READ, Action.GLASS_REVIEW}
ADMITTED, GLASS = Relation.ADMITTED, Relation.BROKE_GLASS


def principal(*roles: Role, sub: str = "me", site: str = "main") -> Principal:
    return Principal(sub=sub, name=sub, roles=frozenset(roles), site=site)


# ------------------------------------------------------------------------------------ the table


def test_admin_and_auditor_see_no_patient() -> None:
    of_others = {Action.IMPORT_CANCEL, Action.IMPORT_READ}
    assert set(POLICY[Role.ADMIN]) == {Action.STATISTICS_READ, *SESSIONS, *of_others}
    assert set(POLICY[Role.AUDITOR]) == {*TRAIL, *SESSIONS}


def test_only_they_have_those() -> None:
    for role in set(Role) - {Role.ADMIN, Role.AUDITOR}:
        theirs = {Action.STATISTICS_READ, Action.AUDIT_READ, Action.GLASS_REVIEW}
        assert not POLICY[role].keys() & theirs


@pytest.mark.parametrize("role", [Role.CLINICIAN, Role.RADIOLOGIST, Role.TECHNOLOGIST])
def test_people_never_see_a_patient_without_a_relation(role: Role) -> None:
    for action in POLICY[role].keys() - OWN:
        assert POLICY[role][action] != ANY_PATIENT, action
        for none in ((), (ADMITTED,), (Relation.IN_CONTEXT, ADMITTED)):
            assert decide(principal(role), action, none).reason is Reason.NO_RELATIONSHIP


@pytest.mark.parametrize("action", sorted(Action))
def test_no_tie_holds_to_a_restricted_patient(action: Action) -> None:
    people = (Role.CLINICIAN, Role.RADIOLOGIST, Role.TECHNOLOGIST)
    ties = [each for each in Relation if each not in (ADMITTED, GLASS)]
    for role in people:
        if POLICY[role].get(action) in (None, ANY_PATIENT):
            continue
        assert decide(principal(role), action, ties).reason is Reason.RESTRICTED


def test_a_broken_glass_opens_what_is_read_and_nothing_that_changes() -> None:
    for role in (Role.CLINICIAN, Role.RADIOLOGIST, Role.TECHNOLOGIST):
        for action in POLICY[role].keys() - OWN:
            alone = decide(principal(role), action, [GLASS])
            among_ties = decide(principal(role), action, set(Relation) - {ADMITTED})
            reads = role is not Role.TECHNOLOGIST and action not in WRITES
            assert alone.allowed is among_ties.allowed is reads, (role, action)
            if reads:
                assert alone.purpose_of_use == among_ties.purpose_of_use == BREAK_THE_GLASS


def test_what_a_tie_carries_is_not_done_under_the_glass() -> None:
    tied = decide(principal(Role.CLINICIAN), Action.STUDY_VIEW, [REQUESTED, GLASS, ADMITTED])
    assert (tied.allowed, tied.purpose_of_use) == (True, "")


@pytest.mark.parametrize(
    ("role", "writes"),
    [
        (Role.CLINICIAN, set()),
        (
            Role.RADIOLOGIST,
            {
                Action.STUDY_COERCE,
                Action.STUDY_DELETE,
                Action.STUDY_LINK,
                Action.STUDY_UPLOAD,
                Action.TAGS_MODIFY,
            },
        ),
        (
            Role.TECHNOLOGIST,
            {Action.STUDY_COERCE, Action.STUDY_LINK, Action.STUDY_UPLOAD, Action.TAGS_MODIFY},
        ),
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


# ------------------------------------------------------------------------- what a token limits


EVERYTHING = frozenset({Scope("user", "*", frozenset("cruds"))})
THIS = PatientContext(mrn="M")


@pytest.mark.parametrize("role", sorted(Role))
def test_scopes_only_take_away(role: Role) -> None:
    unlimited = principal(role)
    for action in Action:
        free = decide(unlimited, action, Relation)
        assert decide(replace(unlimited, scopes=EVERYTHING), action, Relation) == free
        none = decide(replace(unlimited, scopes=frozenset()), action, Relation)
        if free.allowed and action not in NEEDS_NONE:
            assert none.reason is Reason.SCOPE, action
        else:
            assert none == free


def test_every_right_has_its_scope_or_needs_none() -> None:
    rights = {action for actions in POLICY.values() for action in actions}
    assert NEEDS.keys() | NEEDS_NONE == rights
    assert not NEEDS.keys() & NEEDS_NONE


@pytest.mark.parametrize(
    ("given_scope", "allowed"),
    [
        (("user", "ImagingStudy", "rs"), True),
        (("user", "*", "rs"), True),
        (("system", "ImagingStudy", "cruds"), True),
        (("user", "ImagingStudy", "r"), False),  # a viewer searches too
        (("user", "Patient", "cruds"), False),
        (("patient", "ImagingStudy", "rs"), False),  # for the patient in context; there is none
    ],
)
def test_a_scope_covers_its_resource(given_scope: tuple[str, str, str], allowed: bool) -> None:
    level, resource, letters = given_scope
    scope = Scope(level, resource, frozenset(letters))
    who = replace(principal(Role.CLINICIAN), scopes=frozenset({scope}))
    assert decide(who, Action.STUDY_VIEW, [REQUESTED, ADMITTED]).allowed is allowed
    in_context = replace(who, patient=THIS)
    relations = [REQUESTED, ADMITTED, Relation.IN_CONTEXT]
    seen = decide(in_context, Action.STUDY_VIEW, relations).allowed
    assert seen is (allowed or level == "patient")


def test_scopes_add_up() -> None:
    scopes = frozenset(Scope("user", "ImagingStudy", frozenset(each)) for each in "rs")
    who = replace(principal(Role.CLINICIAN), scopes=scopes)
    assert decide(who, Action.STUDY_VIEW, [REQUESTED, ADMITTED]).allowed


@pytest.mark.parametrize("role", sorted(Role))
def test_a_token_for_one_patient_shows_no_other(role: Role) -> None:
    who = replace(principal(role), patient=THIS)
    others = set(Relation) - {Relation.IN_CONTEXT}
    for action in POLICY[role]:
        assert decide(who, action, others).reason is Reason.OUT_OF_CONTEXT, action
        assert decide(who, action, Relation) == decide(principal(role), action, Relation)
        alone = decide_of_no_patient(who, action)
        assert alone.allowed is (action in OF_NO_PATIENT), action


# ------------------------------------------------------------------------------------ relations


@pytest.mark.parametrize("action", sorted(IMAGES))
def test_each_relation_carries_the_roles_it_is_meant_for(action: Action) -> None:
    carries = {
        Relation.ADMITTED: set(),
        Relation.ATTENDS: {Role.CLINICIAN},
        Relation.BROKE_GLASS: {Role.CLINICIAN, Role.RADIOLOGIST},
        Relation.CARE_TEAM: {Role.CLINICIAN},
        Relation.IN_CONTEXT: set(),
        Relation.REQUESTED: {Role.CLINICIAN},
        Relation.SITE_IMAGING: {Role.RADIOLOGIST},
        Relation.SITE_SCHEDULED: {Role.TECHNOLOGIST},
        Relation.UPLOADED: {Role.TECHNOLOGIST},
    }
    assert set(carries) == set(Relation)
    people = (Role.CLINICIAN, Role.RADIOLOGIST, Role.TECHNOLOGIST)
    for (relation, roles), role in product(carries.items(), people):
        decision = decide(principal(role), action, [relation, ADMITTED])
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
        # The one that says most: a tie that does not help, before none; any, before no right.
        reasons = {each.reason for each in alone}
        told = [Reason.RESTRICTED, Reason.NO_RELATIONSHIP, Reason.ROLE]
        assert together.reason is next((each for each in told if each in reasons), Reason.ROLE)


# ------------------------------------------------------- the relations, and lists that follow them


def patient(mrn: str) -> Patient:
    return Patient(mrn=mrn, first_name="P", last_name=mrn, dob=date(1980, 1, 1))


def order(of: Patient, **values: Any) -> Order:
    sane = {
        "order_type": "IMAGING",
        "order_category": "CT",
        "site": "main",
        "accession_number": new_uid()[-16:],
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
SECOND, HOUR = timedelta(seconds=1), timedelta(hours=1)
CANCELLED, DONE = OrderStatus.CANCELLED, OrderStatus.COMPLETED
FAR = {"site": "north", "status": DONE}  # an order that ties nobody at `main`

# mrn of a patient, the rows that tie `me` at `main` to them, and the relations that then hold
CASES: dict[str, tuple[list[Any], set[Relation]]] = {}


def case(mrn: str, *rows: Any, holds: set[Relation] | None = None) -> None:
    CASES[mrn] = (list(rows), FREE | (holds or set()))


def restricted(
    mrn: str, level: str, *rows: Any, named: str = "", holds: set[Relation] | None = None
) -> None:
    """A patient whom `me` requested an order of, restricted; `holds` beside that."""
    rules: list[Any] = [lambda p: Restriction(patient_id=p.id, level=level, set_by="ehr")]
    if named:
        rules.append(lambda p: NamedPerson(patient_id=p.id, sub=named))
    case(mrn, lambda p: order(p, requested_by="me", **FAR), *rules, *rows)
    CASES[mrn] = (CASES[mrn][0], {REQUESTED, Relation.IN_CONTEXT} | (holds or set()))


def broken(of: Patient, sub: str = "me", until: datetime | None = None, **more: Any) -> BrokenGlass:
    return BrokenGlass(
        **{"opens_sealed": False, **more},
        patient_id=of.id,
        sub=sub,
        roles="clinician",
        reason_code="ETREAT",
        reason_text="unconscious",
        expires_at=until or NOW + HOUR,
    )


FREE = {Relation.ADMITTED, Relation.IN_CONTEXT}  # what everybody holds to who isn't restricted
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
case("glass broken", broken, holds={GLASS})
case("glass broken by another", lambda p: broken(p, "you"))
case("glass broken until now", lambda p: broken(p, until=NOW))
case("glass broken until soon", lambda p: broken(p, until=NOW + SECOND), holds={GLASS})
case("named, without need", lambda p: NamedPerson(patient_id=p.id, sub="me"))
restricted("vip", "vip")
restricted("vip, named", "vip", named="me", holds={ADMITTED})
restricted("vip, another named", "vip", named="you")
restricted("vip, ME named", "vip", named="ME")
restricted("vip, glass broken", "vip", broken, holds={GLASS})
restricted("vip, glass broken by another", "vip", lambda p: broken(p, "you"))
restricted("vip, glass broken until now", "vip", lambda p: broken(p, until=NOW))
restricted("sealed", "sealed")
restricted("sealed, named", "sealed", named="me", holds={ADMITTED})
restricted("sealed, another named", "sealed", named="you")
restricted("sealed, glass broken", "sealed", broken)
restricted(
    "sealed, glass that opens it",
    "sealed",
    lambda p: broken(p, opens_sealed=True),
    holds={GLASS},
)
restricted(
    "sealed, glass of another that opens it",
    "sealed",
    lambda p: broken(p, "you", opens_sealed=True),
)


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
        restricted = mrn.startswith(("vip", "sealed"))
        assert relations == FREE - ({ADMITTED} if restricted else set()), mrn


ROLES = [(role,) for role in Role] + [(Role.CLINICIAN, Role.TECHNOLOGIST), ()]
CONTEXTS = {
    "any patient": None,
    "one": PatientContext(mrn="vip, glass broken"),
    "one by id": PatientContext(patient_id=UUID(int=7)),
    "one of another issuer": PatientContext(mrn="requested", mrn_issuer="elsewhere"),
    "nobody": PatientContext(),
}
SCOPES: dict[str, frozenset[Scope] | None] = {
    "no scopes": None,
    "reading": frozenset({Scope("user", "ImagingStudy", frozenset("rs"))}),
    "of the patient in context": frozenset({Scope("patient", "*", frozenset("cruds"))}),
    "nothing": frozenset(),
}


@pytest.mark.parametrize("roles", ROLES, ids=lambda roles: "+".join(roles) or "none")
async def test_a_list_shows_exactly_whom_one_request_would(
    roles: tuple[Role, ...], cases: AsyncSession
) -> None:
    me = principal(*roles)
    callers = [me, replace(me, sub="you", site="north")]
    callers += [
        replace(me, patient=context, scopes=scopes)
        for context, scopes in product(CONTEXTS.values(), SCOPES.values())
    ]
    for who in callers:
        holds = await holding(cases, who)
        for action in Action:
            listed = await cases.exec(select(Patient.mrn).where(visible(who, action, NOW)))
            single = {mrn for mrn, held in holds.items() if decide(who, action, held).allowed}
            assert set(listed) == single, (who, action)


async def test_one_patient_is_in_context_by_id_or_identifier(cases: AsyncSession) -> None:
    of_issuer = namesake("requested", mrn_issuer="hospital")
    cases.add(of_issuer)
    await cases.flush()
    for context, mrns in (
        (PatientContext(mrn="requested"), ["requested"]),
        (PatientContext(mrn="requested", mrn_issuer="hospital"), ["requested"]),
        (PatientContext(patient_id=of_issuer.id), ["requested"]),
        (PatientContext(mrn="requested", mrn_issuer="Hospital"), []),
        (PatientContext(mrn="REQUESTED"), []),
        (PatientContext(mrn="reques%"), []),
        (PatientContext(mrn_issuer="hospital"), []),
        (PatientContext(patient_id=uuid4()), []),
        (PatientContext(), []),
    ):
        clause = clauses(replace(principal(), patient=context), NOW)[Relation.IN_CONTEXT]
        assert list(await cases.exec(select(Patient.mrn).where(clause))) == mrns, context


def namesake(mrn: str, **more: Any) -> Patient:
    """Another patient of that mrn."""
    return Patient(**{**patient(mrn).model_dump(exclude={"id"}), **more})
