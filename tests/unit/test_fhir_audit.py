"""AuditEvents: valid FHIR for every record that there can be, and true to the BALP profile that
they claim; and the dates of searches."""

import base64
import copy
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from fhir.resources.R4B.auditevent import AuditEvent
from fhir.resources.R4B.capabilitystatement import CapabilityStatement
from fhir.resources.R4B.operationoutcome import OperationOutcome
from hypothesis import given
from hypothesis import strategies as st

from app.audit import Action
from app.audit.known import Known, KnownStudy
from app.errors import Unprocessable
from app.fhir import (
    Server,
    audit_event,
    capability_statement,
    codes,
    operation_outcome,
    read_search,
)
from app.fhir.search import read_date
from app.models import AuditRecord
from tests.audit_schema import BASE, balp_faults
from tests.trail_records import ORDER, PATIENT, STUDY, WHOSE, every_record, known, record

SERVER = Server("https://lightbox.hospital.example", "main", "https://login.hospital.example")
RECORDS = list(every_record())


def event(made: AuditRecord, about: Known | None = None) -> dict[str, Any]:
    return audit_event(made, about or known(), SERVER)


def entity(found: dict[str, Any], code: str) -> dict[str, Any]:
    (one,) = [each for each in found["entity"] if each["type"]["code"] == code]
    return dict(one)


# ---------------------------------------------------------------------------------- the standard


@pytest.mark.parametrize("action", Action)
def test_every_record_is_a_valid_audit_event(action: Action) -> None:
    made = [each for each in RECORDS if each.action == action]
    assert len(made) == 4 * len(WHOSE)
    for each in made:
        for about in (known(), Known()):
            found = event(each, about)
            read = AuditEvent.model_validate(found)
            assert read.id == str(each.id)
            # Bindings that are required, which the library does not look at.
            assert read.action in tuple("CRUDE")
            assert read.outcome in ("0", "4", "8", "12")
            networks = {agent.network.type for agent in read.agent if agent.network}
            assert networks <= {"1", "2", "3", "4", "5"}
            assert balp_faults(found) == [], (each.outcome, found)


def test_the_check_of_fhir_sees_what_is_wrong() -> None:
    found = event(record("study:view", "granted", **WHOSE["a study's"]))
    for broken in ({"agent": None}, {"recorded": "yesterday"}, {"type": "rest"}, {"extra": "x"}):
        with pytest.raises(ValueError, match="validation error"):
            AuditEvent.model_validate({**found, **broken})


BREAKS: list[Callable[[dict[str, Any]], object]] = [
    lambda found: found.update(action="C"),
    lambda found: found.update(outcome="8"),
    lambda found: found["subtype"].pop(0),
    lambda found: found["agent"].pop(0),
    lambda found: found["agent"].pop(1),
    lambda found: found["agent"][0].pop("network"),
    lambda found: found["agent"][1].pop("who"),
    lambda found: found["agent"][2].update(network={"address": "x", "type": "1"}),
    lambda found: found["agent"][2].update(requestor=False),
    lambda found: found["entity"].pop(0) and found["entity"].pop(0),
    lambda found: found["entity"][1].pop("role"),
    lambda found: found["entity"][1]["what"].update(reference="Group/1"),
    lambda found: found["entity"][2].pop("what"),
    lambda found: found["entity"].append(found["entity"][2]),
    lambda found: found["source"].pop("observer"),
]


@pytest.mark.parametrize("at", range(len(BREAKS)))
def test_the_check_of_the_profiles_sees_what_is_wrong(at: int) -> None:
    found = copy.deepcopy(event(record("study:view", "granted", **WHOSE["a study's"])))
    assert balp_faults(found) == []
    BREAKS[at](found)
    assert balp_faults(found)


CLAIMS = [
    ("study:view", "granted", "a study's", "PatientRead"),
    ("study:view", "granted", "a study's, by DICOMweb", "PatientRead"),
    ("study:view", "granted", "a study's, of a link", ""),
    ("study:view", "granted", "an order's", ""),  # a link too
    ("study:view", "granted", "a patient's", ""),
    ("study:view", "done", "a study's", ""),
    ("study:retrieve", "granted", "a study's", "PatientRead"),
    ("study:retrieve", "granted", "in an emergency", "PatientRead"),
    ("patient:read", "granted", "a patient's", "PatientRead"),
    ("access:report", "granted", "a patient's", "PatientRead"),
    ("statistics:read", "granted", "nobody's", "Read"),
    ("audit:read", "granted", "a search's", "Query"),
    ("audit:read", "granted", "nobody's", ""),  # what was asked is not known
    ("study:list", "granted", "a search's", "Query"),
    ("study:list", "granted", "an empty search's", "Query"),
    ("patient:create", "done", "a patient's", "PatientCreate"),
    ("patient:create", "granted", "nobody's", ""),
    ("study:upload", "granted", "a study's", ""),  # a decision, no change yet
    ("study:upload", "done", "a study's", "PatientCreate"),
    ("study:upload", "failed", "a study's", ""),
    ("order:write", "done", "an order's", "PatientUpdate"),
    ("care-team:write", "done", "a patient's", "PatientUpdate"),
    ("study:delete", "done", "a study's", "PatientDelete"),
    ("study:delete", "denied", "a study's", ""),
    ("study:view", "denied", "a study's", ""),
    ("study:view", "failed", "a study's", ""),
    ("sign-in", "denied", "nobody's", ""),
    ("session:end", "done", "a session's", ""),
    ("glass:break", "done", "in an emergency", ""),
    ("glass:review", "granted", "a search's", "Read"),
    ("glass:review", "done", "a patient's", "PatientUpdate"),
    ("of:another-version", "done", "a patient's", ""),
]


@pytest.mark.parametrize(("action", "outcome", "about", "profile"), CLAIMS)
def test_a_profile_is_claimed_where_balp_has_one(
    action: str, outcome: str, about: str, profile: str
) -> None:
    found = event(record(action, outcome, **WHOSE[about]))
    assert found["meta"].get("profile", []) == ([BASE + profile] if profile else [])


def test_every_action_has_a_kind() -> None:
    assert set(codes.KINDS) == set(Action)


WHAT = [
    ("glass:break", "done", "in an emergency", "110127", "E", ""),
    ("glass:break", "granted", "in an emergency", "operation", "E", "granted; a glass that was"),
    ("glass:break", "failed", "in an emergency", "operation", "E", ""),
    ("glass:break", "denied", "refused", "operation", "E", "no-relationship: You may not."),
    ("glass:review", "granted", "a search's", "read", "R", ""),
    ("glass:review", "done", "a patient's", "update", "U", ""),
    ("study:view", "granted", "a study's", "read", "R", ""),
    ("study:view", "granted", "a study's, of a link", "operation", "E", "granted; what became"),
    ("study:view", "done", "a study's, of a link", "operation", "E", ""),
]


@pytest.mark.parametrize(("action", "outcome", "about", "subtype", "verb", "said"), WHAT)
def test_what_kind_of_event_a_record_is(
    action: str, outcome: str, about: str, subtype: str, verb: str, said: str
) -> None:
    found = event(record(action, outcome, **WHOSE[about]))
    assert (found["subtype"][0]["code"], found["action"]) == (subtype, verb)
    assert found.get("outcomeDesc", "").startswith(said)
    assert bool(said) is ("outcomeDesc" in found)


@pytest.mark.parametrize(
    ("action", "outcome", "code"),
    [
        ("study:view", "granted", "0"),
        ("study:upload", "done", "0"),
        ("study:upload", "failed", "4"),
        ("sign-in", "denied", "4"),
        ("study:view", "denied", "8"),
    ],
)
def test_outcomes(action: str, outcome: str, code: str) -> None:
    assert event(record(action, outcome))["outcome"] == code


# -------------------------------------------------------------------------------- what is in it


def test_a_viewing_says_who_what_whose_and_from_where() -> None:
    found = event(record("study:view", "granted", **WHOSE["a study's, of an order"]))
    client, server, user = found["agent"]
    assert client["network"] == {"address": "192.0.2.7", "type": "2"}
    assert server["network"] == {"address": SERVER.base_url, "type": "5"}
    assert [each["requestor"] for each in found["agent"]] == [False, False, True]
    assert user["who"] == {"identifier": {"system": SERVER.token_issuer, "value": "dr.novak"}}
    assert [each["coding"][0]["code"] for each in user["role"]] == ["clinician", "radiologist"]
    assert found["recorded"] == "2026-11-21T07:52:04.768063Z"
    assert entity(found, "1")["what"]["reference"] == f"Patient/{PATIENT}"
    assert entity(found, "1")["what"]["identifier"]["value"] == "DOC-1"
    study = {"system": "urn:dicom:uid", "value": f"urn:oid:{STUDY}"}
    assert entity(found, "2")["what"]["identifier"] == study
    assert entity(found, "ServiceRequest")["what"]["reference"] == f"ServiceRequest/{ORDER}"
    assert entity(found, "XrequestId")["what"]["identifier"]["value"].startswith("bb8825e6")
    assert "purposeOfEvent" not in found


def test_an_emergency_is_said_of_the_event_and_of_the_person() -> None:
    found = event(record("study:view", "granted", **WHOSE["in an emergency"]))
    (purpose,) = found["purposeOfEvent"]
    assert purpose["coding"][0]["system"] == "http://terminology.hl7.org/CodeSystem/v3-ActReason"
    assert purpose["coding"][0]["code"] == "BTG"
    assert found["agent"][2]["purposeOfUse"] == [purpose]


def test_a_query_is_kept_as_it_was_asked() -> None:
    found = event(record("study:list", "granted", **WHOSE["a search's"]))
    query = base64.b64decode(entity(found, "2")["query"]).decode()
    assert query == "?mrn=MRN-1&modality=CT&modality=MR"


def test_a_list_says_of_each_patient_what_was_searched_by() -> None:
    shown = record("study:list", "done", patient_id=PATIENT)
    about = known()
    assert shown.id is not None
    about.queries[shown.id] = {"mrn": "DOC-1"}
    found = event(shown, about)
    assert found["meta"]["profile"] == [BASE + "PatientQuery"]
    assert base64.b64decode(entity(found, "2")["query"]).decode() == "?mrn=DOC-1"
    assert "profile" not in event(shown)["meta"]


def test_a_study_that_is_anothers_now_is_not_described() -> None:
    about = known()
    about.studies[STUDY] = KnownStudy(uuid4(), "20240404", "secret study", "SECRET", {})
    found = event(record("study:view", "granted", **WHOSE["a study's"]), about)
    assert "secret" not in str(found).lower()


def test_who_viewed_is_named_where_nobody_asked() -> None:
    found = event(record("session:end", "done", **WHOSE["a session's"]))
    client, _, user = found["agent"]
    assert client["requestor"] is True
    assert (user["who"]["identifier"]["value"], user["requestor"]) == ("dr.novak", False)


def test_the_other_resources_are_valid() -> None:
    base = "https://lightbox.hospital.example/fhir/R4"
    statement = capability_statement(base, "0.1.0")
    assert CapabilityStatement.model_validate(statement).fhirVersion == "4.0.1"
    (resource,) = statement["rest"][0]["resource"]
    assert len(resource["supportedProfile"]) == 10
    assert {"patient", "date", "agent", "entity", "action", "_id"} <= {
        each["name"] for each in resource["searchParam"]
    }
    for status in (400, 401, 403, 404, 405, 406, 500, 503):
        outcome = operation_outcome(status, "a-word", "A title", "What to do.")
        assert OperationOutcome.model_validate(outcome).issue[0].diagnostics == "What to do."


# ----------------------------------------------------------------------------------- the searches

SPANS = [
    ("2026", datetime(2026, 1, 1, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC)),
    ("2026-02", datetime(2026, 2, 1, tzinfo=UTC), datetime(2026, 3, 1, tzinfo=UTC)),
    ("2026-12", datetime(2026, 12, 1, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC)),
    ("2026-11-21", datetime(2026, 11, 21, tzinfo=UTC), datetime(2026, 11, 22, tzinfo=UTC)),
    (
        *("2026-11-21T08:30+01:00", datetime(2026, 11, 21, 7, 30, tzinfo=UTC)),
        datetime(2026, 11, 21, 7, 31, tzinfo=UTC),
    ),
    (
        *("2026-11-21T08:30:05Z", datetime(2026, 11, 21, 8, 30, 5, tzinfo=UTC)),
        datetime(2026, 11, 21, 8, 30, 6, tzinfo=UTC),
    ),
    (
        *("2026-11-21T08:30:05.25Z", datetime(2026, 11, 21, 8, 30, 5, 250000, tzinfo=UTC)),
        datetime(2026, 11, 21, 8, 30, 5, 260000, tzinfo=UTC),
    ),
]


@pytest.mark.parametrize(("text", "low", "high"), SPANS, ids=[each[0] for each in SPANS])
def test_a_date_is_a_span(text: str, low: datetime, high: datetime) -> None:
    assert read_date(text) == ("eq", low, high)
    assert read_date(f"ge{text}") == ("ge", low, high)


@pytest.mark.parametrize(
    "text",
    [
        *("", "yesterday", "2026-13", "2026-02-30", "2026-11-21T25:00:00Z", "ne2026", "0000"),
        *("2026-11-21T08:00:00", "20261121", "2026-1-1", "ge", "9999", "9999-12-31", "٢٠٢٦"),
    ],
)
def test_what_is_no_date_is_refused(text: str) -> None:
    with pytest.raises(Unprocessable):
        read_date(text)


@given(st.datetimes(datetime(1900, 1, 1), datetime(2900, 1, 1), timezones=st.just(UTC)))
def test_a_whole_time_is_read_to_the_microsecond(moment: datetime) -> None:
    text = moment.replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"
    assert read_date(text) == ("eq", moment, moment + timedelta(microseconds=1))


@given(st.lists(st.tuples(st.text(max_size=20), st.text(max_size=40)), max_size=4))
def test_no_search_breaks_the_reader(parameters: list[tuple[str, str]]) -> None:
    known_names = ["patient", "date", "agent", "entity", "action", "_id", "_count", "outcome"]
    for given_parameters in (
        parameters,
        [(known_names[len(name) % 8], value) for name, value in parameters],
    ):
        try:
            search = read_search(given_parameters)
        except Unprocessable:
            continue
        assert 0 < search.count <= 200
        assert search.used == given_parameters


def test_a_comma_that_belongs_to_the_value_is_written_with_a_backslash() -> None:
    (condition,) = read_search([("agent", r"dr.lee,o\,neil")]).conditions
    values = condition.compile().params.values()
    assert list(values) == ["dr.lee", "o,neil"]


ISSUER = "https://login.hospital.example"
AGENTS = [
    ("dr.lee", "", ["dr.lee"]),
    ("Practitioner/dr.lee", "", ["dr.lee"]),
    (r"auth0\|123", "", ["auth0|123"]),
    (r"auth0\|123", ISSUER, ["auth0|123"]),
    (rf"{ISSUER}|auth0\|123", ISSUER, ["auth0|123"]),
    (rf"{ISSUER}|auth0\|123", "", None),
    ("https://other.example|dr.lee", ISSUER, None),
    ("|dr.lee", ISSUER, None),  # FHIR: without a system
    ("|dr.lee", "", ["dr.lee"]),
    (f"{ISSUER}|", ISSUER, [""]),  # anybody
    ("auth0|123", "", None),  # a system that nobody here has
    (r"a\\,b", "", ["a\\", "b"]),  # a backslash of the value, and then "or"
]


@pytest.mark.parametrize(("value", "issuer", "subs"), AGENTS)
@pytest.mark.parametrize("name", ["agent", "agent:identifier"])
def test_a_bar_divides_system_and_sub_unless_it_is_written_with_a_backslash(
    name: str, value: str, issuer: str, subs: list[str] | None
) -> None:
    (condition,) = read_search([(name, value)], token_issuer=issuer).conditions
    assert list(condition.compile().params.values()) == (subs or [])
    assert (str(condition) in ("false", "0 = 1")) is (subs is None)
    assert ("!=" in str(condition)) is (subs == [""])


def test_what_the_resource_says_of_a_person_finds_them() -> None:
    found = event(record("study:view", "granted", actor="auth0|123"))
    who = found["agent"][2]["who"]["identifier"]
    value = "|".join(re.sub(r"([\\,|$])", r"\\\1", who[each]) for each in ("system", "value"))
    (condition,) = read_search(
        [("agent:identifier", value)], token_issuer=SERVER.token_issuer
    ).conditions
    assert list(condition.compile().params.values()) == ["auth0|123"]


def test_more_bars_than_one_are_refused() -> None:
    with pytest.raises(Unprocessable, match=r"More than one"):
        read_search([("agent", "https://login.hospital.example|auth0|123")])


@pytest.mark.parametrize(
    ("value", "is_found"),
    [("urn:oid:1.2", True), ("urn:dicom:uid|urn:oid:1.2", True), ("urn:other|1.2", False)],
)
def test_a_study_is_found_by_the_system_of_uids(value: str, is_found: bool) -> None:
    (condition,) = read_search([("entity:identifier", value)]).conditions
    assert list(condition.compile().params.values()) == (["1.2"] if is_found else [])


def test_lenient_leaves_out_what_it_does_not_know_and_says_so() -> None:
    search = read_search([("colour", "red"), ("action", "R")], lenient=True)
    assert search.used == [("action", "R")]
    with pytest.raises(Unprocessable):
        read_search([("colour", "red"), ("action", "R")])
    with pytest.raises(Unprocessable):  # what it knows and can't read is never left out
        read_search([("action", "X")], lenient=True)
