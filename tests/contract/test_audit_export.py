"""What is handed to people: CSV that no spreadsheet runs, and a patient's report."""

import csv
import io
import json
from datetime import datetime, timedelta
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.access import Relation
from app.audit import Action
from app.disclosures import BY_ROLE, DOWNLOADED, EMERGENCY, RIGHTS, VIEWED, WAYS, WEIGHED
from app.routes import audit
from app.routes.tables import as_text, csv_rows
from tests.contract.test_break_glass import break_glass
from tests.contract.test_merge import WHY, merged, unmerge
from tests.contract.test_reconciliation import arrive, one, waiting
from tests.fake_orthanc import FakeOrthanc
from tests.images import ct_image
from tests.lightbox import Lightbox, Shared, World
from tests.tables import REFUSE_RECORDS, change, outcomes, records, rows

# ------------------------------------------------------------------------------------------- CSV


def read_csv(text: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text.decode("utf-8-sig"), newline="")))


async def test_the_trail_as_csv_is_what_the_json_says(shared: Shared) -> None:
    params = {"patient_id": shared.world.mine["id"]}
    answer = await shared.lightbox.ask("auditor", "GET", "/api/v1/audit.csv", params=params)
    assert answer.headers["content-type"] == "text/csv; charset=utf-8; header=present"
    assert answer.headers["content-disposition"] == 'attachment; filename="audit.csv"'
    assert answer.content.startswith(b"\xef\xbb\xbf")
    table = read_csv(answer.content)
    listed = await shared.lightbox.must(
        "auditor", "GET", "/audit", params={**params, "limit": "200"}
    )
    its_own, *listed = listed
    assert (its_own["action"], its_own["detail"]["query"]["limit"]) == ("audit:read", "200")
    assert [each["id"] for each in table] == [str(each["id"]) for each in listed]
    for line, said in zip(table, listed, strict=True):
        assert line.keys() == said.keys()
        assert line["actor"] == said["actor"]
        assert line["actor_roles"] == ",".join(said["actor_roles"])
        assert line["patient_id"] == said["patient_id"]
        assert json.loads(line["detail"]) == said["detail"]
    assert shared.world.their_study not in answer.text


async def test_it_comes_in_parts_and_each_record_once(
    shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read_csv((await shared.lightbox.ask("auditor", "GET", "/api/v1/audit.csv")).content)
    monkeypatch.setattr(audit, "ROWS_AT_ONCE", 3)
    table = read_csv((await shared.lightbox.ask("auditor", "GET", "/api/v1/audit.csv")).content)
    assert len(whole) > 10
    assert [each["id"] for each in table[1:]] == [each["id"] for each in whole]


async def test_the_same_filters_and_refusals_as_of_the_list(untouched: Shared) -> None:
    path = "/api/v1/audit.csv"
    for params in ({"limit": "5"}, {"action": "everything"}, {"since": "2025"}, {"ctx": ""}):
        answer = await untouched.lightbox.ask("auditor", "GET", path, params=params)
        assert answer.status_code == 422, params
    params = {"actor": "technologist", "outcome": "done"}
    table = read_csv((await untouched.lightbox.ask("auditor", "GET", path, params=params)).content)
    assert table
    assert {(each["actor"], each["outcome"]) for each in table} == {("technologist", "done")}


async def test_a_name_that_is_a_formula_is_text(lightbox: Lightbox, world: World) -> None:
    evil = '=HYPERLINK("http://evil.example","x")'
    await lightbox.ask("clinician", "GET", f"/api/v1/patients/{world.mine['id']}", sub=evil)
    answer = await lightbox.ask("auditor", "GET", "/api/v1/audit.csv", params={"actor": evil})
    (line,) = read_csv(answer.content)
    assert line["actor"] == f"'{evil}"


@pytest.mark.parametrize(
    "cell",
    [
        *("=1+1", "+1", "-1", "@SUM(A1)", "＝1", "＋1", "－1", "＠x", "\t=1", "\r=1", "\n=1"),
        *(
            "  =1",
            "\u00a0=1",
            "\u200b=1",
            "\ufeff=1",
            "\u202e=1",
            '"=1',
            "'=1",
            "﹢1",
            "﹣1",
            "\x00=1",
        ),
    ],
)
def test_no_cell_is_a_formula(cell: str) -> None:
    assert as_text(cell) == f"'{cell}"


@pytest.mark.parametrize("cell", ["", "dr.lee", "a=1", "2026-11-21", "{}", "'a", "Ω", " x", "1-2"])
def test_what_is_none_stays_as_it_is(cell: str) -> None:
    assert as_text(cell) == cell


@given(st.lists(st.text(max_size=20), min_size=1, max_size=4))
def test_a_cell_stays_in_its_place(cells: list[str]) -> None:
    (line,) = csv.reader(io.StringIO(csv_rows([cells]).decode(), newline=""))
    assert len(line) == len(cells)
    for cell in line:
        assert cell.lstrip()[:1] not in tuple("=+-@＝＋－＠")


# --------------------------------------------------------------------------------- the report


async def report(lightbox: Lightbox, patient: Any, **params: str) -> Any:
    path = f"/patients/{patient['id']}/access-report"
    return await lightbox.must("auditor", "GET", path, params=params)


def of(said: Any, person: str) -> Any:
    (entry,) = [each for each in said["entries"] if each["person"] == person]
    return entry


async def test_it_says_who_saw_what_under_what_right(lightbox: Lightbox, world: World) -> None:
    opened = await lightbox.open(f"/{world.my_study}")
    for _ in range(2):
        assert (await opened.get(f"/studies/{world.my_study}/series")).status_code == 200
    for _ in range(3):
        await lightbox.ask(
            "clinician", "GET", f"/api/v1/patients/{world.mine['id']}", sub="stranger"
        )
    said = await report(lightbox, world.mine)
    assert (said["mrn"], said["patient_name"]) == ("MRN-MINE", "Jane Doe")
    viewer = of(said, "clinician")
    assert viewer["rights"] == ["requested one of your examinations"]
    assert viewer["roles"] == ["clinician"]
    listed = WAYS[Action.SESSION_OPEN]
    assert viewer["did"] == {"images viewed": 1, listed: 1}
    assert viewer["emergency"] is False
    (seen,) = viewer["studies"]
    assert (seen["StudyInstanceUID"], seen["how"]) == (world.my_study, ["images viewed"])
    assert (seen["StudyDate"], seen["StudyDescription"]) == ("20250102", "CT test")
    tried = of(said, "stranger")
    assert (tried["denied"], tried["did"], tried["studies"]) == (3, {}, [])
    assert tried["rights"] == []
    sender = of(said, "technologist")
    assert sender["did"] == {"added images": 1}
    assert sender["rights"] == ["works in imaging where you were examined"]


async def test_a_link_that_nobody_opened_showed_nothing(lightbox: Lightbox, world: World) -> None:
    await lightbox.must("clinician", "GET", f"/dicom/viewer/url/{world.my_study}")
    said = await report(lightbox, world.mine)
    assert [each for each in said["entries"] if each["person"] == "clinician"] == []
    await lightbox.ask("clinician", "GET", f"/dicom-web/studies/{world.my_study}/series")
    assert of(await report(lightbox, world.mine), "clinician")["did"] == {"images viewed": 1}


async def test_a_request_id_used_again_hides_nothing(lightbox: Lightbox, world: World) -> None:
    """The views of one caller, all under one request id, and then links that nobody opens."""
    headers = {"X-Request-ID": "x"}
    path = f"/studies/{world.my_study}/series"
    await lightbox.ask("clinician", "GET", f"/dicom-web{path}", headers=headers)
    viewer = await lightbox.open(f"/{world.my_study}")
    assert (await viewer.get(path, headers=headers)).status_code == 200
    assert of(await report(lightbox, world.mine), "clinician")["did"][VIEWED] == 2
    link = f"/api/v1/dicom/viewer/url/{world.my_study}"
    for _ in range(3):
        assert (await lightbox.ask("clinician", "GET", link, headers=headers)).status_code == 200
    assert of(await report(lightbox, world.mine), "clinician")["did"][VIEWED] == 2


async def test_a_candidate_that_was_shown_is_told(
    lightbox: Lightbox, fake_orthanc: FakeOrthanc
) -> None:
    patient = await lightbox.patient()
    await lightbox.order(patient)
    uid = await arrive(lightbox, fake_orthanc, ct_image(patient_id="MRN-l"))
    (waits,) = await waiting(lightbox)
    assert waits["candidates"]
    await one(lightbox, uid)
    did = of(await report(lightbox, patient), "radiologist")["did"]
    assert did[WAYS[Action.ARRIVAL_LIST]] >= 1
    assert did[WEIGHED] == 1


async def test_a_viewer_that_was_opened_showed_the_list(lightbox: Lightbox, world: World) -> None:
    viewer = await lightbox.open(f"/patient/{world.mine['id']}")
    assert (await viewer.get("/studies")).status_code == 200
    did = of(await report(lightbox, world.mine), "clinician")["did"]
    assert did == {WAYS[Action.SESSION_OPEN]: 1}


async def test_what_was_seen_while_merged_is_told_to_whose_it_was(
    lightbox: Lightbox, world: World
) -> None:
    await merged(lightbox, world.mine, world.theirs)
    viewer = await lightbox.open(f"/{world.my_study}", sub="other")
    assert (await viewer.get(f"/studies/{world.my_study}/series")).status_code == 200
    assert (await lightbox.open(f"/{world.their_study}", sub="other")) is not None
    together = of(await report(lightbox, world.theirs), "other")
    assert [each["StudyInstanceUID"] for each in together["studies"]] == [world.my_study]
    assert (await unmerge(lightbox, world.mine)).status_code == 200
    mine = of(await report(lightbox, world.mine), "other")
    (seen,) = mine["studies"]
    assert (seen["StudyInstanceUID"], seen["StudyDescription"]) == (world.my_study, "CT test")
    theirs = await report(lightbox, world.theirs)
    assert world.my_study not in str(theirs)
    assert of(theirs, "other")["did"][WAYS[Action.SESSION_OPEN]] == 2


async def test_an_emergency_is_named_as_one(lightbox: Lightbox, world: World) -> None:
    change(
        lightbox,
        "INSERT INTO broken_glass (id, patient_id, sub, name, roles, reason_code, reason_text,"
        " opens_sealed, broken_at, expires_at, reviewed_by, review_comment) VALUES ('1', ?,"
        " 'helper', '', 'clinician', 'emergency', 'x', 0, '2026-01-01 00:00:00',"
        " '2099-01-01 00:00:00', '', '')",
        world.mine["id"].replace("-", ""),
    )
    path = f"/dicom/studies/{world.my_study}"
    await lightbox.must("clinician", "GET", path, sub="helper")
    entry = of(await report(lightbox, world.mine), "helper")
    assert entry["emergency"] is True
    assert entry["rights"] == [EMERGENCY]


async def test_it_holds_nothing_of_another_patient(lightbox: Lightbox, world: World) -> None:
    await lightbox.ask("service", "GET", "/api/v1/patients")  # one list that shows both
    # A study that is filed under the other patient now, and was seen as mine.
    opened = await lightbox.open(f"/{world.my_study}")
    await opened.get(f"/studies/{world.my_study}/series")
    change(
        lightbox,
        "UPDATE study SET patient_id = ?, study_description = 'secret study', study_date = "
        "'20240404' WHERE study_instance_uid = ?",
        world.theirs["id"].replace("-", ""),
        world.my_study,
    )
    for accept in ("application/json", "text/html", "text/csv"):
        answer = await lightbox.ask(
            "auditor",
            "GET",
            f"/api/v1/patients/{world.mine['id']}/access-report",
            headers={"Accept": accept},
        )
        assert answer.status_code == 200
        for word in (*World.SECRET_WORDS, world.theirs["id"], world.their_study, "2024-04-04"):
            assert word not in answer.text, (accept, word)
    assert of(await report(lightbox, world.mine), "clinician")["studies"][0]["StudyDate"] == ""


async def test_a_time_is_from_and_before(shared: Shared) -> None:
    world = shared.world
    whole = await report(shared.lightbox, world.mine)
    assert len(whole["entries"]) >= 2
    early = await report(shared.lightbox, world.mine, to="2000-01-01T00:00:00Z")
    assert early["entries"] == []
    late = await report(shared.lightbox, world.mine, **{"from": "2099-01-01T00:00:00+02:00"})
    assert late["entries"] == []
    at = of(whole, "technologist")["first_at"]
    assert of(await report(shared.lightbox, world.mine, **{"from": at}), "technologist")
    before = await report(shared.lightbox, world.mine, to=at)
    assert [each for each in before["entries"] if each["person"] == "technologist"] == []


class Cells(HTMLParser):
    """The text of a page, and the names of its elements."""

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


async def test_the_page_to_hand_out_runs_nothing(lightbox: Lightbox) -> None:
    patient = await lightbox.patient("MRN-1", first_name="<img src>")
    evil = "=<script>alert(1)</script>"
    await lightbox.ask("clinician", "GET", f"/api/v1/patients/{patient['id']}", sub=evil)
    path = f"/api/v1/patients/{patient['id']}/access-report"
    answer = await lightbox.ask("service", "GET", path, headers={"Accept": "text/html"})
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["content-disposition"] == 'attachment; filename="access-report.html"'
    page = Cells()
    page.feed(answer.text)
    assert not page.tags & {"script", "img", "a", "form", "iframe"}
    assert evil in page.text
    assert any("<img src>" in each for each in page.text)
    answer = await lightbox.ask("service", "GET", path, headers={"Accept": "text/csv"})
    assert f"'{evil}" in [each["person"] for each in read_csv(answer.content)]


async def test_the_form_is_what_is_accepted(shared: Shared) -> None:
    path = f"/api/v1/patients/{shared.world.mine['id']}/access-report"
    for accept, kind in (
        ("*/*", "application/json"),
        ("text/html, */*;q=0.1", "text/html; charset=utf-8"),
        ("text/csv", "text/csv; charset=utf-8; header=present"),
    ):
        answer = await shared.lightbox.ask("auditor", "GET", path, headers={"Accept": accept})
        assert answer.headers["content-type"] == kind
        assert answer.headers["vary"] == "Accept"
    answer = await shared.lightbox.ask("auditor", "GET", path, headers={"Accept": "image/png"})
    assert answer.status_code == 406


async def test_making_it_is_recorded_and_needs_the_record(lightbox: Lightbox, world: World) -> None:
    path = f"/api/v1/patients/{world.mine['id']}/access-report"
    await lightbox.ask("auditor", "GET", path, headers={"X-Request-ID": "reports"})
    assert outcomes(lightbox, "reports") == [("access:report", "granted")]
    (record,) = records(lightbox, "reports")
    assert record["patient_id"] == world.mine["id"].replace("-", "")
    await lightbox.ask(
        "auditor", "GET", "/api/v1/audit.csv?actor=x", headers={"X-Request-ID": "exports"}
    )
    (record,) = records(lightbox, "exports")
    assert (record["action"], record["detail"]) == ("audit:read", {"query": {"actor": "x"}})
    change(lightbox, REFUSE_RECORDS)
    for each in (path, "/api/v1/audit.csv"):
        answer = await lightbox.ask("auditor", "GET", each)
        assert answer.status_code == 503
        assert "MRN-MINE" not in answer.text


def test_every_tie_has_its_words() -> None:
    said = set(RIGHTS) | {Relation.ADMITTED.value, Relation.IN_CONTEXT.value}
    assert said == {each.value for each in Relation}


async def test_what_was_done_to_a_patient_is_told(shared: Shared) -> None:
    """No record of a grant or a change about a patient is of an action without words, but those
    that end a viewer."""
    found = rows(
        shared.lightbox,
        "SELECT DISTINCT action FROM audit_record WHERE patient_id IS NOT NULL",
    )
    assert found
    assert {each["action"] for each in found} - set(WAYS) <= {"session:end"}


# ------------------------------------------------------------------------------- under what right


async def on_the_care_team(lightbox: Lightbox, patient: Any, sub: str) -> None:
    path = f"/patients/{patient['id']}/care-team/{sub}"
    await lightbox.must("service", "PUT", path, json={"role": "attending"})


ON_THE_TEAM = [RIGHTS[Relation.CARE_TEAM.value]]


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/dicom-web/studies/{0}/series", VIEWED),
        ("/dicom-web/studies/{0}", DOWNLOADED),
        ("/dicom-web/studies", WAYS[Action.STUDY_LIST]),
        ("/api/v1/patients", WAYS[Action.PATIENT_LIST]),
        ("/api/v1/orders", WAYS[Action.ORDER_LIST]),
        ("/api/v1/dicom/studies", WAYS[Action.STUDY_LIST]),
    ],
)
async def test_each_way_names_its_right(
    path: str, told: str, lightbox: Lightbox, world: World
) -> None:
    """Of who comes this one way only, and of nobody else in the list."""
    await on_the_care_team(lightbox, world.mine, "nurse")
    answer = await lightbox.ask("clinician", "GET", path.format(world.my_study), sub="nurse")
    assert answer.status_code == 200, answer.text
    entry = of(await report(lightbox, world.mine), "nurse")
    assert (entry["did"], entry["rights"]) == ({told: 1}, ON_THE_TEAM)
    assert entry["emergency"] is False
    theirs = await report(lightbox, world.theirs)
    assert [each for each in theirs["entries"] if each["person"] == "nurse"] == []


async def test_each_record_of_a_viewer_names_its_right(lightbox: Lightbox, world: World) -> None:
    """Each by itself, as where midnight is between them: that of the link is not there to help."""
    await on_the_care_team(lightbox, world.mine, "nurse")
    viewer = await lightbox.open(f"/{world.my_study}", sub="nurse")
    assert (await viewer.get(f"/studies/{world.my_study}/series")).status_code == 200
    await lightbox.must("clinician", "GET", "/viewer/sessions", sub="nurse")
    found = [each for each in await lightbox.audit(actor="nurse") if each["patient_id"]]
    listed, looked, opened, made, _ = found
    assert (listed["action"], made["outcome"]) == ("session:list", "done")
    for record, told in (
        (listed, WAYS[Action.SESSION_LIST]),
        (looked, VIEWED),
        (opened, WAYS[Action.SESSION_OPEN]),
    ):
        at = datetime.fromisoformat(record["at"])
        just_then = {"from": at.isoformat(), "to": (at + timedelta(microseconds=1)).isoformat()}
        entry = of(await report(lightbox, world.mine, **just_then), "nurse")
        assert (entry["did"], entry["rights"]) == ({told: 1}, ON_THE_TEAM)


async def test_a_right_that_was_not_used_is_not_told(lightbox: Lightbox, world: World) -> None:
    """A link of a right that is lost meanwhile, and a view by another."""
    await on_the_care_team(lightbox, world.mine, "clinician")
    await lightbox.must("clinician", "GET", f"/dicom/viewer/url/{world.my_study}")
    path = f"/patients/{world.mine['id']}/care-team/clinician"
    await lightbox.must("service", "DELETE", path)
    await lightbox.ask("clinician", "GET", f"/dicom-web/studies/{world.my_study}/series")
    entry = of(await report(lightbox, world.mine), "clinician")
    assert entry["rights"] == [RIGHTS[Relation.REQUESTED.value]]


async def test_who_ends_an_emergency_had_none(lightbox: Lightbox, world: World) -> None:
    """The EHR that cancels the order of a viewer of a broken glass, and an auditor who revokes
    one: their records are marked too, and tell of no access of theirs."""
    await break_glass(lightbox, world.theirs["id"])
    revoked = await lightbox.open(f"/{world.their_study}")
    await lightbox.open(f"/order/{world.their_order['id']}")
    await lightbox.must("auditor", "DELETE", f"/viewer/sessions/{revoked.ctx}")
    path = f"/orders/{world.their_order['id']}"
    await lightbox.must("service", "PATCH", path, json={"status": "cancelled"})
    ended = rows(
        lightbox,
        "SELECT actor FROM audit_record WHERE action = 'session:end' AND purpose_of_use = 'BTG'",
    )
    assert {each["actor"] for each in ended} == {"auditor", "service"}
    said = await report(lightbox, world.theirs)
    for person in ("auditor", "service"):
        entry = of(said, person)
        assert (entry["emergency"], entry["rights"]) == (False, [BY_ROLE]), person
    helper = of(said, "clinician")
    assert (helper["emergency"], helper["rights"]) == (True, [EMERGENCY])


async def test_who_reads_and_reviews_the_trail_is_told(lightbox: Lightbox, world: World) -> None:
    grant = (await break_glass(lightbox, world.theirs["id"])).json()
    await lightbox.must(
        *("auditor", "POST", f"/audit/break-glass/{grant['id']}/review"),
        json={"comment": "As it should be."},
    )
    for form in ("", ".csv"):
        params = {"patient_id": world.theirs["id"]}
        answer = await lightbox.ask("auditor", "GET", f"/api/v1/audit{form}", params=params)
        assert answer.status_code == 200
    await lightbox.must("auditor", "GET", "/audit")  # of everybody: of nobody in particular
    answer = await lightbox.ask("auditor", "GET", "/api/v1/audit?patient_id=nobody")
    assert answer.status_code == 422
    did = of(await report(lightbox, world.theirs), "auditor")["did"]
    assert did[WAYS[Action.GLASS_REVIEW]] == 1
    assert did[WAYS[Action.AUDIT_READ]] == 2
    mine = await report(lightbox, world.mine)
    assert WAYS[Action.AUDIT_READ] not in of(mine, "auditor")["did"]


async def test_each_sentence_stands_in_a_report(
    lightbox: Lightbox, fake_orthanc: FakeOrthanc
) -> None:
    """One patient to whom everything is done: no sentence is one that never comes."""
    patient, again = await lightbox.patient(), await lightbox.patient("MRN-2")
    order = await lightbox.order(patient)
    await on_the_care_team(lightbox, patient, "nurse")
    sent = await lightbox.upload(
        ct_image(patient_id="MRN-WRONG"), order_id=order["id"], coerce_patient="true"
    )
    assert sent.status_code == 200, sent.text
    sent = await lightbox.upload(ct_image(patient_id="MRN-1"), order_id=order["id"])
    assert sent.status_code == 200, sent.text
    uid = sent.json()["study_instance_uid"]
    viewer = await lightbox.open(f"/{uid}", sub="nurse")
    assert (await viewer.get(f"/studies/{uid}/series")).status_code == 200
    grant = (await break_glass(lightbox, patient["id"], sub="helper")).json()
    arrived = await arrive(lightbox, fake_orthanc, ct_image(patient_id="MRN-l"))
    (waits,) = await waiting(lightbox)
    assert waits["StudyInstanceUID"] == arrived
    await one(lightbox, arrived)
    planned = await lightbox.order(patient)
    certain = ct_image(
        study_uid=planned["planned_study_instance_uid"], AccessionNumber=planned["accession_number"]
    )
    linked = await arrive(lightbox, fake_orthanc, certain)
    await lightbox.must("service", "GET", f"/dicom/studies/{linked}")
    own = f"/patients/{patient['id']}"
    secret = {"level": "vip", "named": ["nurse"], "reason": "privacy"}
    review = f"/audit/break-glass/{grant['id']}/review"
    asked: list[tuple[str, str, str, Any]] = [
        ("clinician", "GET", "/viewer/sessions", {}),
        ("clinician", "GET", f"/dicom/viewer/why/patient/{patient['id']}", {}),
        ("service", "GET", f"{own}/care-team", {}),
        ("service", "GET", "/orders", {}),
        ("service", "GET", f"/orders/{order['id']}", {}),
        ("service", "PATCH", f"/orders/{order['id']}", {"json": {"attending": "nurse"}}),
        ("service", "GET", "/patients", {}),
        ("service", "GET", own, {}),
        ("service", "PATCH", own, {"json": {"first_name": "Janet"}}),
        ("service", "PUT", f"{own}/restriction", {"json": secret}),
        ("service", "GET", f"{own}/restriction", {}),
        ("service", "DELETE", f"{own}/restriction", {}),
        ("service", "GET", "/dicom/studies", {}),
        ("service", "GET", f"/dicom/studies/{uid}", {}),
        ("service", "DELETE", f"/dicom/studies/{uid}", {"params": {"reason": "a wrong study"}}),
        (
            "service",
            "POST",
            f"/patients/{again['id']}/merge",
            {"json": {**WHY, "into": patient["id"]}},
        ),
        ("auditor", "POST", review, {"json": {"comment": "As it should be."}}),
        ("auditor", "GET", "/audit", {"params": {"patient_id": patient["id"]}}),
        ("auditor", "GET", f"{own}/access-report", {}),
    ]
    answer = await lightbox.ask("service", "GET", f"/dicom-web/studies/{uid}")
    assert answer.status_code == 200
    for role, method, path, more in asked:
        await lightbox.must(
            role, method, path, sub="nurse" if role == "clinician" else None, **more
        )
    said = await report(lightbox, patient)
    assert {way for each in said["entries"] for way in each["did"]} == {*WAYS.values(), WEIGHED}
