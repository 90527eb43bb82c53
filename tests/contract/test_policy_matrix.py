"""The matrix of docs/policy.md, which people wrote and people read, against what the code does.

Every role by every tie by every action in every state of restriction and glass: against `decide`,
against lists in the database, and through the API down to the frames.
"""

import re
import shutil
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa
from sqlmodel import col
from sqlmodel.ext.asyncio.session import AsyncSession

from app.access.policy import BREAK_THE_GLASS, Reason, Relation, clauses, decide, visible
from app.access.scopes import NEEDS, NEEDS_NONE
from app.audit import Action
from app.db import Database, utcnow
from app.identity import Principal, Role
from app.models import BrokenGlass, NamedPerson, Patient, Restriction
from tests.images import ct_image
from tests.lightbox import Lightbox
from tests.tables import change, moment, records
from tests.unit.test_policy import member, order, patient, stored

POLICY_PAGE = Path(__file__).resolve().parents[2] / "docs" / "policy.md"

# What is true of the caller and the patient, in the words of the page.
TIES: Mapping[str, frozenset[Relation]] = {
    "requested": frozenset({Relation.REQUESTED}),
    "attends": frozenset({Relation.ATTENDS}),
    "care team": frozenset({Relation.CARE_TEAM}),
    "order at own site, under way": frozenset({Relation.SITE_IMAGING, Relation.SITE_SCHEDULED}),
    "order at own site, done": frozenset({Relation.SITE_IMAGING}),
    "uploaded": frozenset({Relation.UPLOADED}),
    "none": frozenset(),
}
OTHER = "any other, or none"
ADMITTED, GLASS = Relation.ADMITTED, Relation.BROKE_GLASS


@dataclass(frozen=True)
class State:
    """How a patient is restricted, whether the caller is named, what glass they broke."""

    relations: frozenset[Relation]
    level: str = ""
    named: bool = False
    glass: str = ""  # before: until the patient was sealed; after: it opens a sealed patient


STATES: Mapping[str, State] = {
    "not restricted": State(frozenset({ADMITTED})),
    "vip": State(frozenset(), "vip"),
    "vip, named": State(frozenset({ADMITTED}), "vip", named=True),
    "sealed": State(frozenset(), "sealed"),
    "sealed, named": State(frozenset({ADMITTED}), "sealed", named=True),
    "not restricted, glass broken": State(frozenset({ADMITTED, GLASS}), glass="before"),
    "vip, glass broken": State(frozenset({GLASS}), "vip", glass="before"),
    "vip, named, glass broken": State(frozenset({ADMITTED, GLASS}), "vip", True, "before"),
    "sealed after the glass was broken": State(frozenset(), "sealed", glass="before"),
    "sealed, glass broken that opens it": State(frozenset({GLASS}), "sealed", glass="after"),
    "sealed, named, glass broken": State(frozenset({ADMITTED}), "sealed", True, "before"),
}


# ------------------------------------------------------------------------------ reading the page


def tables(section: str) -> Iterator[list[dict[str, str]]]:
    """The tables between two marks of the page, each row by its headings."""
    text = POLICY_PAGE.read_text(encoding="utf-8")
    found = re.search(rf"<!-- {section}: .*?-->(.*?)<!-- end of {section} -->", text, re.DOTALL)
    assert found, f"{POLICY_PAGE} lacks its marks of {section}"
    for block in re.findall(r"(?:^\|.*\n)+", found[1], re.MULTILINE):
        head, _, *body = (
            [cell.strip() for cell in line.strip().strip("|").split("|")]
            for line in block.splitlines()
        )
        yield [dict(zip(head, row, strict=True)) for row in body]


def words() -> dict[Role, dict[str, set[Action]]]:
    """What each role `sees` and `changes`, and does `whatever the patient`."""
    (table,) = tables("words")
    return {
        Role(row.pop("role")): {
            word: {Action(each) for each in re.findall(r"`([a-z:-]+)`", cell)}
            for word, cell in row.items()
        }
        for row in table
    }


def matrix() -> dict[tuple[Role, str, str], set[str]]:
    """The words of each cell: by role, tie and state; `sees*` as `sees` and `*`."""
    cells = {}
    for table in tables("matrix"):
        for row in table:
            role, tie = Role(row.pop("role")), row.pop("tie")
            for state, cell in row.items():
                assert re.fullmatch(r"–|(sees(\\\*)?)?(, )?(changes)?", cell), cell
                cells[role, tie, state] = set(re.findall(r"sees|changes|\*", cell))
    return cells


WORDS, MATRIX = words(), matrix()
OF_NO_PATIENT = "whatever the patient"


def cell(role: Role, tie: str, state: str) -> set[str]:
    return MATRIX[role, tie if (role, tie, state) in MATRIX else OTHER, state]


@dataclass(frozen=True)
class Expected:
    """What the page says of one case."""

    allowed: bool
    reason: Reason | None = None
    purpose_of_use: str = ""


def expected(role: Role, tie: str, state: str, action: Action) -> Expected:
    does = WORDS[role]
    if action in does[OF_NO_PATIENT]:
        return Expected(allowed=True)
    kind = next((each for each in ("sees", "changes") if action in does[each]), "")
    if not kind:
        return Expected(allowed=False, reason=Reason.ROLE)
    here = cell(role, tie, state)
    if kind in here:
        under_glass = kind == "sees" and "*" in here
        return Expected(allowed=True, purpose_of_use=BREAK_THE_GLASS if under_glass else "")
    tied = kind in cell(role, tie, "not restricted")
    return Expected(False, Reason.RESTRICTED if tied else Reason.NO_RELATIONSHIP)


def test_the_page_has_a_cell_for_everything() -> None:
    assert set(WORDS) == set(Role)
    assert {state for _, _, state in MATRIX} == set(STATES)
    assert {tie for _, tie, _ in MATRIX} - {OTHER} == set(TIES) - {"none"}
    for role, state in product(Role, STATES):
        assert (role, OTHER, state) in MATRIX
    for _, tie, state in MATRIX:
        # A row stands in both tables, or in none.
        assert {(r, t) for r, t, s in MATRIX if s == state} == {(r, t) for r, t, _ in MATRIX}, tie


def test_the_page_says_which_scope_is_needed() -> None:
    (table,) = tables("scopes")
    said: dict[Action, tuple[str, ...]] = {}
    for row in table:
        scope = row["scope needed"].strip("`")
        for action in re.findall(r"`([a-z:-]+)`", row["for"]):
            assert action not in said, action
            said[Action(action)] = () if scope == "none" else tuple(scope.split("."))
    assert said == {**NEEDS, **dict.fromkeys(NEEDS_NONE, ())}


# ---------------------------------------------------------------------------------- the decision


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("tie", TIES)
@pytest.mark.parametrize("role", sorted(Role))
def test_the_decision_is_the_page(role: Role, tie: str, state: str) -> None:
    who = Principal("me", "me", frozenset({role}), "main")
    held = TIES[tie] | STATES[state].relations
    for action in Action:
        decision = decide(who, action, held)
        said = expected(role, tie, state, action)
        found = Expected(decision.allowed, decision.reason, decision.purpose_of_use)
        assert found == said, f"{role}, {tie}, {state}: {action}"


# ------------------------------------------------------------------------------------- the lists


ROWS: Mapping[str, Any] = {
    "requested": lambda p: [order(p, requested_by="me", site="north", status="completed")],
    "attends": lambda p: [order(p, attending="me", site="north", status="completed")],
    "care team": lambda p: [member(p, "me")],
    "order at own site, under way": lambda p: [order(p)],
    "order at own site, done": lambda p: [order(p, status="completed")],
    "uploaded": lambda p: stored(p, "me"),
    "none": lambda p: [order(p, requested_by="me", attending="me", status="cancelled")],
}


def restriction_rows(of: UUID, state: State, sub: str = "me") -> list[Any]:
    """The rows that put a patient in a state for somebody."""
    rows: list[Any] = []
    if state.level:
        rows.append(Restriction(patient_id=of, level=state.level, set_by="ehr"))
    if state.named:
        rows.append(NamedPerson(patient_id=of, sub=sub))
    if state.glass:
        rows.append(
            BrokenGlass(
                patient_id=of,
                sub=sub,
                roles="clinician",
                reason_code="ETREAT",
                reason_text="unconscious",
                opens_sealed=state.glass == "after",
                expires_at=utcnow() + timedelta(hours=1),
            )
        )
    return rows


CASES = list(product(TIES, STATES))


@pytest.fixture(scope="module")
async def everybody(
    migrated_sqlite: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[AsyncSession]:
    """A patient for each tie in each state; their MRN is the number of the case."""
    path = tmp_path_factory.mktemp("matrix") / "matrix.sqlite"
    shutil.copy(migrated_sqlite, path)
    database = Database(f"sqlite+aiosqlite:///{path}")
    async with database.session() as session:
        for number, (tie, state) in enumerate(CASES):
            person = patient(str(number))
            session.add(person)
            await session.flush()
            for row in [*ROWS[tie](person), *restriction_rows(person.id, STATES[state])]:
                session.add(row)
                await session.flush()
        yield session
    await database.close()


async def test_the_facts_of_each_case_are_those_of_the_page(everybody: AsyncSession) -> None:
    holds = clauses(Principal("me", "me", frozenset(), "main"), utcnow())
    found = await (await everybody.connection()).execute(
        sa.select(col(Patient.mrn), *(clause.label(each.name) for each, clause in holds.items()))
    )
    for mrn, *held in found:
        tie, state = CASES[int(mrn)]
        relations = {each for each, is_held in zip(holds, held, strict=True) if is_held}
        said = TIES[tie] | STATES[state].relations | {Relation.IN_CONTEXT}
        assert relations == said, (tie, state)


@pytest.mark.parametrize("role", sorted(Role))
async def test_a_list_is_the_page(role: Role, everybody: AsyncSession) -> None:
    who = Principal("me", "me", frozenset({role}), "main")
    connection = await everybody.connection()
    for action in Action:
        query = sa.select(col(Patient.mrn)).where(visible(who, action, utcnow()))
        listed = {CASES[int(mrn)] for mrn in (await connection.execute(query)).scalars()}
        assert listed == {case for case in CASES if expected(role, *case, action).allowed}, action


# --------------------------------------------------------------------------------------- the API


@dataclass(frozen=True)
class Caller:
    """Somebody, and what ties them to the one patient."""

    role: Role
    tie: str
    site: str = "main"


# The patient has one order, at `main`, under way; `requested` asked for it, `uploaded` sent images.
CALLERS: Mapping[str, Caller] = {
    "carl": Caller(Role.CLINICIAN, "requested"),
    "cora": Caller(Role.CLINICIAN, "care team"),
    "stranger": Caller(Role.CLINICIAN, "none"),
    "rita": Caller(Role.RADIOLOGIST, "order at own site, under way"),
    "ralf": Caller(Role.RADIOLOGIST, "none", "north"),
    "tina": Caller(Role.TECHNOLOGIST, "order at own site, under way"),
    "tom": Caller(Role.TECHNOLOGIST, "uploaded", "north"),
    "theo": Caller(Role.TECHNOLOGIST, "none", "north"),
    "ehr": Caller(Role.SERVICE, "none"),
    "ada": Caller(Role.ADMIN, "none"),
    "otto": Caller(Role.AUDITOR, "none"),
}


async def fill(lightbox: Lightbox) -> tuple[Any, Any]:
    """The patient, and an image of theirs, as upload answered it."""
    person = await lightbox.patient("MRN-MATRIX")
    asked = await lightbox.order(person, requested_by="carl")
    await lightbox.must("service", "PUT", f"/patients/{person['id']}/care-team/cora")
    for sub in ("tina", "tom"):
        image = ct_image(patient_id="MRN-MATRIX", study_uid="2.25.1", series_uid="2.25.2")
        sent = await lightbox.upload(image, sub=sub, order_id=asked["id"])
        assert sent.status_code == 200, sent.text
    return person, sent.json()


async def put_into(lightbox: Lightbox, patient_id: str, state: State) -> None:
    """Restrict the patient as the EHR does; for all callers alike. Glasses are rows."""
    change(lightbox, "DELETE FROM broken_glass")
    path = f"/patients/{patient_id}/restriction"
    if state.glass:
        for sub in CALLERS:
            change(
                lightbox,
                "INSERT INTO broken_glass (id, patient_id, sub, name, roles, reason_code,"
                " reason_text, opens_sealed, broken_at, expires_at, reviewed_by, review_comment)"
                " VALUES (?, ?, ?, '', 'clinician', 'ETREAT', 'unconscious', ?, ?, ?, '', '')",
                *(uuid4().hex, UUID(patient_id).hex, sub, state.glass == "after"),
                *(moment(minutes=-1), moment(hours=1)),
            )
    if not state.level:
        await lightbox.must("service", "DELETE", path)
        return
    named = sorted(CALLERS) if state.named else []
    await lightbox.must("service", "PUT", path, json={"level": state.level, "named": named})


@pytest.mark.parametrize("state", STATES)
async def test_the_api_is_the_page(state: str, lightbox: Lightbox) -> None:
    person, image = await fill(lightbox)
    await put_into(lightbox, person["id"], STATES[state])
    for sub, caller in CALLERS.items():
        await ask_everything(lightbox, person["id"], image, sub, caller, state)


async def ask_everything(
    lightbox: Lightbox, patient_id: str, image: Any, sub: str, caller: Caller, state: str
) -> None:
    claims = {"sub": sub, "roles": [caller.role.value], "site": caller.site}
    study = image["study_instance_uid"]
    series = f"/dicom-web/studies/{study}/series/{image['series_instance_uid']}"
    frame = f"{series}/instances/{image['sop_instance_uid']}/frames/1"
    single: list[tuple[Action, str, int]] = [
        (Action.PATIENT_READ, f"/api/v1/patients/{patient_id}", 403),
        (Action.STUDY_READ, f"/api/v1/dicom/studies/{study}", 403),
        (Action.STUDY_READ, f"/api/v1/dicom/studies/patient/{patient_id}", 403),
        (Action.STUDY_VIEW, f"/api/v1/dicom/viewer/url/{study}", 403),
        (Action.STUDY_VIEW, frame, 404),
        (Action.STUDY_VIEW, f"{series}/metadata", 404),
        (Action.STUDY_RETRIEVE, f"/dicom-web/studies/{study}", 404),
    ]
    for action, path, hidden in single:
        said = expected(caller.role, caller.tie, state, action)
        request_id = uuid4().hex
        answer = await lightbox.ask(
            None, "GET", path, claims=claims, headers={"X-Request-ID": request_id}
        )
        asked = f"{sub}, {state}: {path}: {answer.status_code} {answer.text}"
        refused = 403 if said.reason is Reason.ROLE else hidden
        assert answer.status_code == (200 if said.allowed else refused), asked
        recorded = [each for each in records(lightbox, request_id) if each["outcome"] != "done"]
        if said.allowed and path in (frame, f"{series}/metadata") and not recorded:
            continue  # the study is on record of five minutes ago
        (record,) = recorded
        assert record["action"] == action.value, asked
        assert record["outcome"] == ("granted" if said.allowed else "denied"), asked
        assert record["reason"] == (said.reason.value if said.reason else ""), asked
        assert record["purpose_of_use"] == said.purpose_of_use, asked
    lists: list[tuple[Action, str]] = [
        (Action.PATIENT_LIST, "/api/v1/patients?mrn=MRN-MATRIX"),
        (Action.ORDER_LIST, f"/api/v1/orders?patient_id={patient_id}"),
        (Action.STUDY_LIST, f"/api/v1/dicom/studies?patient_id={patient_id}"),
        (Action.STUDY_LIST, "/dicom-web/studies?PatientID=MRN-MATRIX"),
    ]
    for action, path in lists:
        said = expected(caller.role, caller.tie, state, action)
        answer = await lightbox.ask(None, "GET", path, claims=claims)
        asked = f"{sub}, {state}: {path}: {answer.status_code} {answer.text}"
        if said.reason is Reason.ROLE:
            assert answer.status_code == 403, asked
        else:
            found = answer.json()
            assert len(found) == (1 if said.allowed else 0), asked
            assert answer.headers.get("X-Total-Count", str(len(found))) == str(len(found)), asked


async def test_an_open_viewer_follows_the_page(lightbox: Lightbox) -> None:
    """The cookie's way: opened while nothing stands against it, then the patient is restricted."""
    person, image = await fill(lightbox)
    study = image["study_instance_uid"]
    frame = (
        f"/studies/{study}/series/{image['series_instance_uid']}"
        f"/instances/{image['sop_instance_uid']}/frames/1"
    )
    for state in ("vip", "sealed", "vip, named", "sealed, named"):
        await put_into(lightbox, person["id"], STATES["not restricted"])
        for sub in ("carl", "cora"):
            caller = CALLERS[sub]
            viewer = await lightbox.open(f"/{study}", role=caller.role.value, sub=sub)
            assert (await viewer.get(frame)).status_code == 200
            assert (await viewer.get("/studies")).status_code == 200
            await put_into(lightbox, person["id"], STATES[state])
            said = expected(caller.role, caller.tie, state, Action.STUDY_VIEW)
            answer = await viewer.get(frame)
            assert answer.status_code == (200 if said.allowed else 403), (sub, state)
            if not said.allowed:
                (ended,) = await lightbox.audit(ctx=viewer.ctx, action="session:end")
                assert ended["reason"] == answer.json()["reason"] == "restricted"
                assert ended["patient_id"] == person["id"]
                (denied,) = await lightbox.audit(ctx=viewer.ctx, outcome="denied")
                assert (denied["action"], denied["reason"]) == ("study:view", "restricted")
                # And it stays ended when the restriction is lifted.
                await put_into(lightbox, person["id"], STATES["not restricted"])
                assert (await viewer.get(frame)).status_code == 403
                assert (await viewer.get("/studies")).status_code == 403
            await put_into(lightbox, person["id"], STATES["not restricted"])
