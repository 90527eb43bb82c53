"""The FHIR API: searches that find what fits and nothing else, pages, refusals as
OperationOutcome, and its own reading on record."""

import base64
from typing import Any
from uuid import UUID

import httpx
import pytest
from fhir.resources.R4B.auditevent import AuditEvent
from fhir.resources.R4B.bundle import Bundle
from fhir.resources.R4B.capabilitystatement import CapabilityStatement
from fhir.resources.R4B.operationoutcome import OperationOutcome

from tests.audit_schema import balp_faults
from tests.fake_orthanc import FakeOrthanc
from tests.lightbox import Lightbox, Shared, World
from tests.tables import REFUSE_RECORDS, change, records

BASE = "/fhir/R4/AuditEvent"


async def search(lightbox: Lightbox, *params: tuple[str, str], **headers: str) -> Any:
    """The Bundle of a search that has to succeed, read as FHIR."""
    answer = await lightbox.ask("auditor", "GET", BASE, params=list(params), headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/fhir+json"
    bundle = answer.json()
    assert Bundle.model_validate(bundle).type == "searchset"
    return bundle


async def found(lightbox: Lightbox, *params: tuple[str, str]) -> list[dict[str, Any]]:
    """The events, without those of auditors, whose searches add some."""
    bundle = await search(lightbox, ("_count", "200"), *params)
    events = [each["resource"] for each in bundle.get("entry", [])]
    return [each for each in events if "auditor" not in str(each["agent"])]


def actions(events: list[dict[str, Any]]) -> list[str]:
    return [each["subtype"][1]["code"] for each in events]


def refused(answer: Any, status: int) -> OperationOutcome:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/fhir+json"
    return OperationOutcome.model_validate(answer.json())


# ---------------------------------------------------------------------------------- what is found


async def test_what_the_app_does_is_valid_and_true_to_balp(shared: Shared) -> None:
    await shared.mine.get(f"/studies/{shared.world.my_study}/series")
    events = await found(shared.lightbox)
    assert len(events) > 15
    for each in events:
        AuditEvent.model_validate(each)
        assert balp_faults(each) == []
    (viewed,) = [
        each
        for each in events
        if "PatientRead" in str(each["meta"])
        and (each["subtype"][1]["code"], each["subtype"][2]["code"]) == ("study:view", "granted")
        and shared.mine.ctx in str(each["entity"])
    ]
    named = str(viewed["entity"])
    assert f"Patient/{shared.world.mine['id']}" in named
    assert f"urn:oid:{shared.world.my_study}" in named
    assert "MRN-MINE" in named
    assert "Victim" not in named


async def test_a_patients_events_are_theirs_alone(shared: Shared) -> None:
    world = shared.world
    for value in (world.mine["id"], f"Patient/{world.mine['id']}"):
        events = await found(shared.lightbox, ("patient", value))
        assert events
        for each in events:
            (patient,) = [e for e in each["entity"] if e["type"]["code"] == "1"]
            assert patient["what"]["reference"] == f"Patient/{world.mine['id']}"
        said = str(events)
        for word in (*World.SECRET_WORDS, world.theirs["id"], world.their_study):
            assert word not in said


async def test_by_agent_entity_action_outcome_and_id(shared: Shared) -> None:
    lightbox, world = shared.lightbox, shared.world
    everything = await found(lightbox)
    for name, value in (
        ("agent", "technologist"),
        ("agent", "Practitioner/technologist"),
        ("agent:identifier", "|technologist"),
    ):
        mine = await found(lightbox, (name, value))
        assert set(actions(mine)) == {"study:upload"}
    for value in (f"urn:oid:{world.my_study}", world.my_study):
        of_study = await found(lightbox, ("entity", value))
        assert of_study
        assert all(world.my_study in str(each) for each in of_study)
        assert world.their_study not in str(of_study)
    of_order = await found(lightbox, ("entity", f"ServiceRequest/{world.my_order['id']}"))
    assert "order:create" in actions(of_order)
    assert all(f"ServiceRequest/{world.my_order['id']}" in str(each) for each in of_order)
    created = await found(lightbox, ("action", "C"))
    assert {each["action"] for each in created} == {"C"}
    both = await found(lightbox, ("action", "C,R"))
    assert len(both) == len([each for each in everything if each["action"] in "CR"])
    assert all(each["outcome"] == "8" for each in await found(lightbox, ("outcome", "8")))
    first, second = everything[0]["id"], everything[-1]["id"]
    assert {each["id"] for each in await found(lightbox, ("_id", f"{first},{second}"))} == {
        *(first, second),
    }
    assert await found(lightbox, ("_id", "99999999999999999999999")) == []
    assert await found(lightbox, ("agent", "technologist"), ("agent", "clinician")) == []


async def test_a_link_is_no_look(lightbox: Lightbox, world: World) -> None:
    """Whoever makes it, for whatever. A look by DICOMweb with a token is one, before and after,
    under a request id that the caller chose."""
    study, order, patient = world.my_study, world.my_order["id"], world.mine["id"]
    look = f"/dicom-web/studies/{study}/series"
    for role in ("clinician", "service"):
        headers = {"X-Request-ID": f"of-{role}"}
        assert (await lightbox.ask(role, "GET", look, headers=headers)).is_success
        for what in (study, f"order/{order}", f"patient/{patient}"):
            link = f"/api/v1/dicom/viewer/url/{what}"
            assert (await lightbox.ask(role, "GET", link, headers=headers)).is_success
    headers = {"X-Request-ID": "of-service"}
    assert (await lightbox.ask("service", "GET", look, headers=headers, sub="ris")).is_success
    of_patient = await found(lightbox, ("patient", patient))
    views = [each for each in of_patient if actions([each]) == ["study:view"]]
    looks = [each for each in views if each["meta"].get("profile")]
    assert {each["subtype"][0]["code"] for each in looks} == {"read"}
    assert [each["agent"][2]["name"] for each in looks] == ["ris", "service", "clinician"]
    assert all(f"urn:oid:{study}" in str(each["entity"]) for each in looks)
    links = [each for each in views if each not in looks]
    assert len(links) == 2 * 3 * 2  # a grant and its outcome each
    assert {(each["subtype"][0]["code"], each["action"]) for each in links} == {("operation", "E")}
    for action, wanted in (("R", looks), ("E", links), ("C,R,U,D", looks)):
        by_action = await found(lightbox, ("patient", patient), ("action", action))
        assert [each for each in by_action if actions([each]) == ["study:view"]] == wanted


async def test_a_link_that_could_not_be_made_is_no_look(
    lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    fake_orthanc.faults[:] = [httpx.ConnectError("")] * 9
    link = f"/api/v1/dicom/viewer/url/{world.my_study}"
    answer = await lightbox.ask("service", "GET", link, headers={"X-Request-ID": "fails"})
    assert answer.status_code == 503
    views = [
        each
        for each in await found(lightbox, ("patient", world.mine["id"]))
        if actions([each]) == ["study:view"] and "fails" in str(each["entity"])
    ]
    assert [each["outcome"] for each in views] == ["4", "0"]
    assert all("profile" not in each["meta"] for each in views)


async def test_a_glass_that_was_not_broken_is_no_emergency(
    lightbox: Lightbox, world: World
) -> None:
    body = {"reason_code": "emergency-treatment", "reason_text": "She is unconscious."}
    for whose in (world.mine, world.theirs):
        path = f"/api/v1/patients/{whose['id']}/break-glass"
        assert (await lightbox.ask("clinician", "POST", path, json=body)).is_success
    (grant,) = await lightbox.must("auditor", "GET", "/audit/break-glass")
    path = f"/audit/break-glass/{grant['id']}/review"
    await lightbox.must("auditor", "POST", path, json={"comment": "As it should be."})
    broken = [each for each in await found(lightbox) if each["subtype"][0]["code"] == "110127"]
    assert [f"Patient/{world.theirs['id']}" in str(each["entity"]) for each in broken] == [True]
    bundle = await search(lightbox, ("agent", "auditor"), ("_count", "200"))
    reviews = [
        (each["resource"]["action"], each["resource"]["subtype"][2]["code"])
        for each in bundle["entry"]
        if actions([each["resource"]]) == ["glass:review"]
    ]
    assert reviews == [("U", "done"), ("R", "granted"), ("R", "granted")]
    for action, outcomes in (("U", ["done"]), ("R", ["granted", "granted"])):
        bundle = await search(lightbox, ("agent", "auditor"), ("action", action))
        said = [each["resource"] for each in bundle["entry"]]
        said = [each for each in said if actions([each]) == ["glass:review"]]
        assert [each["subtype"][2]["code"] for each in said] == outcomes


async def test_a_sub_with_a_bar_is_found(lightbox: Lightbox, world: World) -> None:
    for sub in ("auth0|123", "123"):
        await lightbox.ask("clinician", "GET", f"/api/v1/patients/{world.mine['id']}", sub=sub)
    for name in ("agent", "agent:identifier"):
        for value, wanted in (
            (r"auth0\|123", {"auth0|123"}),
            ("123", {"123"}),
            ("auth0|123", set()),
        ):
            events = await found(lightbox, (name, value))
            assert {each["agent"][2]["name"] for each in events} == wanted


async def test_repeated_dates_must_all_hold(shared: Shared) -> None:
    everything = await found(shared.lightbox)
    at = everything[len(everything) // 2]["recorded"]
    by = {
        prefix: {each["id"] for each in await found(shared.lightbox, ("date", prefix + at))}
        for prefix in ("", "eq", "ge", "le", "gt", "lt")
    }
    times = {each["id"]: each["recorded"] for each in everything}
    assert by["eq"] == by[""] == {key for key, when in times.items() if when == at}
    assert by["ge"] == {key for key, when in times.items() if when >= at}
    assert by["le"] == {key for key, when in times.items() if when <= at}
    assert by["gt"] == by["ge"] - by["eq"]
    assert by["lt"] == by["le"] - by["eq"]
    between = await found(shared.lightbox, ("date", f"ge{at}"), ("date", f"le{at}"))
    assert {each["id"] for each in between} == by["eq"]
    assert await found(shared.lightbox, ("date", "gt2099"), ("date", "ge2000")) == []
    day = at[:10]
    for prefix, fits in (("gt", day.__lt__), ("lt", day.__gt__), ("eq", day.__eq__)):
        of_day = await found(shared.lightbox, ("date", prefix + day))
        assert {each["id"] for each in of_day} == {
            key for key, when in times.items() if fits(when[:10])
        }


async def test_pages_show_each_event_once_while_more_are_written(shared: Shared) -> None:
    everything = [each["id"] for each in await found(shared.lightbox, ("date", "ge2020"))]
    bundle = await search(shared.lightbox, ("date", "ge2020"), ("_count", "7"))
    seen: list[str] = []
    while True:
        events = [each["resource"] for each in bundle["entry"]]
        assert len(events) <= 7
        seen += [each["id"] for each in events if "auditor" not in str(each["agent"])]
        links = {each["relation"]: each["url"] for each in bundle["link"]}
        assert links["self"].startswith(f"{shared.lightbox.settings.api_base_url}{BASE}?")
        if "next" not in links:
            break
        onward = links["next"].removeprefix(shared.lightbox.settings.api_base_url)
        answer = await shared.lightbox.ask("auditor", "GET", onward)
        bundle = answer.json()
    assert seen == everything


async def test_one_is_read_by_its_address(shared: Shared) -> None:
    bundle = await search(shared.lightbox, ("_count", "1"))
    (entry,) = bundle["entry"]
    path = entry["fullUrl"].removeprefix(shared.lightbox.settings.api_base_url)
    answer = await shared.lightbox.ask("auditor", "GET", path)
    assert answer.json() == entry["resource"]


async def test_the_capability_statement_is_for_everybody(shared: Shared) -> None:
    answer = await shared.lightbox.ask(None, "GET", "/fhir/R4/metadata")
    assert answer.status_code == 200
    statement = CapabilityStatement.model_validate(answer.json())
    assert statement.fhirVersion == "4.0.1"
    (resource,) = answer.json()["rest"][0]["resource"]
    assert resource["type"] == "AuditEvent"
    said = {each["name"] for each in resource["searchParam"]}
    for name in said:
        value = {"action": "R", "outcome": "0", "_id": "1", "date": "2026"}.get(name, "x")
        if name in ("patient", "entity"):
            value = f"Patient/{shared.world.mine['id']}"
        await search(shared.lightbox, (name, value))


# --------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "params",
    [
        [("colour", "red")],
        [("patient", "MRN-MINE")],
        [("patient", "Group/83f66213-0412-4df3-a4cc-43cb50b1ffa3")],
        [("patient.name", "x")],
        [("date", "yesterday")],
        [("date", "2026-11-21T08:00:00")],
        [("date", "")],
        [("action", "X")],
        [("entity", "Observation/1")],
        [("outcome", "1")],
        [("_count", "0")],
        [("_count", "5"), ("_count", "6")],
        [("_format", "xml")],
        [("_before", "x")],
        [("agent", "a\nb")],
        [("date", "2026")] * 13,
        [("_id", "0" * 20 + "9" * 5000)],
        [("patient", ",".join(str(UUID(int=each)) for each in range(101)))],
        [("_id", ",".join(map(str, range(2000))))],
    ],
    ids=str,
)
async def test_a_search_that_makes_no_sense_is_refused(
    params: list[tuple[str, str]], untouched: Shared
) -> None:
    answer = await untouched.lightbox.ask("auditor", "GET", BASE, params=params)
    outcome = refused(answer, 400)
    assert outcome.issue[0].code == "invalid"
    assert "red" not in answer.text


@pytest.mark.parametrize("name", ["_id", "agent", "entity", "outcome", "action"])
async def test_the_longest_search_is_answered(name: str, untouched: Shared) -> None:
    values = {"outcome": "0,4,8,12", "action": "C,R,U,D,E"}
    value = values.get(name, ",".join(f"1.{each}" for each in range(100)))
    await search(untouched.lightbox, *[(name, value)] * 12)
    assert await found(untouched.lightbox, ("_id", "0" * 20 + "9" * 30)) == []


async def test_a_list_is_of_the_search_of_the_same_person(lightbox: Lightbox, world: World) -> None:
    """Two of them, under one request id."""
    headers = {"X-Request-ID": "shared"}
    for mrn, sub in (("MRN-MINE", "clinician"), ("MRN-VICTIM", "other"), ("MRN-9", "clinician")):
        path = f"/api/v1/patients?mrn={mrn}"
        await lightbox.ask("clinician", "GET", path, sub=sub, headers=headers)
    for patient, mrn in ((world.mine, "MRN-MINE"), (world.theirs, "MRN-VICTIM")):
        events = await found(lightbox, ("patient", patient["id"]), ("action", "E"))
        asked = [
            base64.b64decode(entity["query"]).decode()
            for event in events
            for entity in event["entity"]
            if "query" in entity
        ]
        assert [each for each in asked if "mrn=" in each] == [f"?mrn={mrn}"]


async def test_lenient_handling_is_honoured(shared: Shared) -> None:
    params = [("colour", "red"), ("action", "C")]
    for prefer in ("handling=lenient", "return=minimal, handling=lenient"):
        bundle = await search(shared.lightbox, *params, Prefer=prefer)
        (link,) = [each["url"] for each in bundle["link"] if each["relation"] == "self"]
        assert "colour" not in link
        assert "action=C" in link
        assert {each["resource"]["action"] for each in bundle["entry"]} == {"C"}
    for prefer in ("handling=strict", "handling=lenientish", "respond-async"):
        answer = await shared.lightbox.ask(
            "auditor", "GET", BASE, params=params, headers={"Prefer": prefer}
        )
        refused(answer, 400)


@pytest.mark.parametrize("path", ["0", "999999999", "01", "1.5", "x", "-1", "9" * 60])
async def test_what_is_not_there_is_not_found(path: str, untouched: Shared) -> None:
    answer = await untouched.lightbox.ask("auditor", "GET", f"{BASE}/{path}")
    assert refused(answer, 404).issue[0].code == "not-found"


async def test_every_error_below_fhir_is_an_operation_outcome(shared: Shared) -> None:
    lightbox = shared.lightbox
    nobody = await lightbox.ask(None, "GET", BASE)
    assert refused(nobody, 401).issue[0].code == "login"
    assert nobody.headers["www-authenticate"].startswith("Bearer")
    for role in ("clinician", "radiologist", "technologist", "service", "admin"):
        answer = await lightbox.ask(role, "GET", BASE, params={"patient": "no sense"})
        assert refused(answer, 403).issue[0].code == "forbidden"
        refused(await lightbox.ask(role, "GET", f"{BASE}/1"), 403)
    refused(await lightbox.ask("auditor", "GET", "/fhir/R4/Observation"), 404)
    refused(await lightbox.ask("auditor", "POST", BASE, json={}), 405)
    refused(await lightbox.ask("auditor", "PUT", f"{BASE}/1", json={}), 405)
    refused(await lightbox.ask("auditor", "DELETE", f"{BASE}/1"), 405)
    xml = {"Accept": "application/fhir+xml"}
    refused(await lightbox.ask("auditor", "GET", BASE, headers=xml), 406)
    elsewhere = await lightbox.ask("clinician", "GET", "/api/v1/audit")
    assert elsewhere.headers["content-type"] == "application/problem+json"


# ----------------------------------------------------------------------------------- on record


async def test_searching_is_recorded_with_what_was_asked(lightbox: Lightbox, world: World) -> None:
    params = [("patient", world.mine["id"]), ("date", "ge2020"), ("date", "lt2099")]
    headers = {"X-Request-ID": "asks"}
    await lightbox.ask("auditor", "GET", BASE, params=params, headers=headers)
    (record,) = records(lightbox, "asks")
    assert (record["action"], record["outcome"]) == ("audit:read", "granted")
    asked = {"patient": world.mine["id"], "date": ["ge2020", "lt2099"]}
    assert record["detail"] == {"query": asked}
    await lightbox.ask("auditor", "GET", f"{BASE}/1", headers={"X-Request-ID": "reads"})
    (record,) = records(lightbox, "reads")
    assert record["detail"] == {"query": {"_id": "1"}}
    await lightbox.ask("auditor", "GET", BASE, params={"x": "y"}, headers={"X-Request-ID": "errs"})
    assert [each["outcome"] for each in records(lightbox, "errs")] == ["granted", "failed"]


async def test_no_record_no_answer(lightbox: Lightbox, world: World) -> None:
    change(lightbox, REFUSE_RECORDS)
    for path in (BASE, f"{BASE}/1"):
        answer = await lightbox.ask("auditor", "GET", path)
        assert refused(answer, 503).issue[0].code == "transient"
        assert "MRN-MINE" not in answer.text
