"""Breaking the glass: what it opens, what it never opens, and that nobody can do it unseen."""

import asyncio
import json
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
import sqlalchemy as sa

from app.access.ehr import Question, Verdict
from app.access.glass import GlassReason
from tests.contract.test_sessions import reason, seal
from tests.contract.test_viewer import assert_refused, redeem, sign_of_life
from tests.fake_orthanc import URL, FakeOrthanc
from tests.lightbox import Lightbox, World, make_settings, make_world, running
from tests.tables import REFUSE_RECORDS, change, moment, outcomes, records, rows

WHY = {"reason_code": "emergency-treatment", "reason_text": "Unconscious in the emergency room."}


async def break_glass(
    lightbox: Lightbox,
    patient: str,
    *,
    role: str = "clinician",
    sub: str | None = None,
    body: Any = None,
    **headers: str,
) -> httpx.Response:
    return await lightbox.ask(
        role,
        "POST",
        f"/api/v1/patients/{patient}/break-glass",
        sub=sub,
        json=WHY if body is None else body,
        headers=headers,
    )


async def link(lightbox: Lightbox, study: str, role: str = "clinician") -> httpx.Response:
    return await lightbox.ask(role, "GET", f"/api/v1/dicom/viewer/url/{study}")


def grants(lightbox: Lightbox) -> list[dict[str, Any]]:
    return rows(lightbox, "SELECT * FROM broken_glass ORDER BY broken_at")


def alerts(lightbox: Lightbox) -> list[dict[str, Any]]:
    found = rows(lightbox, "SELECT * FROM notification WHERE event = 'break-glass'")
    return [json.loads(each["body"])["data"] for each in found]


def restrict(lightbox: Lightbox, patient: str, level: str) -> None:
    seal(lightbox, patient, named="somebody", level=level)


# ------------------------------------------------------------------------------- what it opens


async def test_it_opens_a_patient_for_a_while_on_record_and_with_an_alert(
    lightbox: Lightbox, world: World
) -> None:
    assert (await link(lightbox, world.their_study)).status_code == 403
    answer = await break_glass(lightbox, world.theirs["id"], **{"X-Request-ID": "breaks"})
    assert answer.status_code == 200, answer.text
    said = answer.json()
    assert said["broken"] is True
    assert said["patient_id"] == world.theirs["id"]
    assert moment(minutes=59) < said["expires_at"].replace("T", " ") < moment(minutes=61)
    # Nothing about the patient but what was sent.
    assert said.keys() == {
        *("broken", "id", "patient_id", "reason_code", "broken_at", "expires_at", "detail")
    }
    assert not [word for word in World.SECRET_WORDS if word in answer.text]
    granted, done = records(lightbox, "breaks")
    assert (granted["action"], granted["outcome"]) == ("glass:break", "granted")
    assert (done["outcome"], done["purpose_of_use"]) == ("done", "BTG")
    assert done["patient_id"] == UUID(world.theirs["id"]).hex
    assert done["detail"] == {
        **WHY,
        "grant_id": said["id"],
        "expires_at": done["detail"]["expires_at"],
    }
    (alert,) = alerts(lightbox)
    assert (alert["id"], alert["sub"]) == (said["id"], "clinician")
    assert (alert["patient_id"], alert["reason_code"]) == (world.theirs["id"], WHY["reason_code"])
    assert "Unconscious" not in str(alert), "free text stays inside"
    view = await lightbox.open(f"/{world.their_study}")
    assert await reason(view, world.their_image) == ""


async def test_everything_done_under_it_is_marked(lightbox: Lightbox, world: World) -> None:
    """From the launch to the end; and nothing else is."""
    mine = await lightbox.open(f"/{world.my_study}")
    assert await reason(mine, world.my_image) == ""
    grant = (await break_glass(lightbox, world.theirs["id"])).json()
    for path in (f"/patients/{world.theirs['id']}", f"/dicom/studies/{world.their_study}"):
        await lightbox.must("clinician", "GET", path)
    view = await lightbox.open(f"/{world.their_study}")
    assert await reason(view, world.their_image) == ""
    for path in ("/studies", f"/studies/{world.their_study}/series"):
        assert (await view.get(path)).is_success
    assert (await view.get("/studies/1.2.3/series")).status_code == 404  # a denial under it
    for each in (mine, view):
        await lightbox.must("clinician", "DELETE", f"/viewer/sessions/{each.ctx}")
    assert await reason(view, world.their_image) == "revoked"
    theirs = UUID(world.theirs["id"]).hex
    found = rows(lightbox, "SELECT * FROM audit_record WHERE actor = 'clinician' ORDER BY id")
    marked = {(each["action"], each["outcome"]) for each in found if each["purpose_of_use"]}
    assert marked == {
        ("glass:break", "granted"),
        ("glass:break", "done"),
        ("patient:read", "granted"),
        ("study:read", "granted"),
        ("study:view", "granted"),  # the link, and the first access
        ("study:view", "done"),  # the launch
        ("study:view", "denied"),
        ("session:open", "granted"),
        ("session:end", "done"),
        ("session:revoke", "done"),
    }
    for row in found:
        assert (row["purpose_of_use"] == "BTG") is (row["patient_id"] == theirs), row
    assert {each["ctx"] for each in found if each["action"] == "study:view" and each["ctx"]} > {
        view.ctx
    }
    assert grant["broken"]


async def test_a_viewer_made_under_it_ends_with_it(lightbox: Lightbox, world: World) -> None:
    grant = (await break_glass(lightbox, world.theirs["id"])).json()
    view = await lightbox.open(f"/{world.their_study}")
    assert view.link["session_expires_at"][:26] == grant["expires_at"][:26]
    assert await reason(view, world.their_image) == ""
    said = (await sign_of_life(view)).json()
    assert said["purpose_of_use"] == "BTG"
    assert said["seconds_left"] <= 3600
    # The grant's time is over, whatever the session believes.
    change(lightbox, "UPDATE broken_glass SET expires_at = ?", moment(seconds=-1))
    assert await reason(view, world.their_image) == "glass-ended"
    assert (await link(lightbox, world.their_study)).status_code == 403
    (ended,) = await lightbox.audit(action="session:end")
    assert ended["reason"] == "glass-ended"
    own = await lightbox.client.get(f"/s/{view.ctx}/ended", headers={"Cookie": view.cookie})
    assert_refused(own, 200, "The emergency access under which these images were open is over.")


async def test_a_link_made_under_it_opens_nothing_afterwards(
    lightbox: Lightbox, world: World
) -> None:
    await break_glass(lightbox, world.theirs["id"])
    made = (await link(lightbox, world.their_study)).json()
    await lightbox.app.state.metadata.settled()
    change(lightbox, "UPDATE broken_glass SET expires_at = ?", moment(seconds=-1))
    answer = await redeem(lightbox, made["url"].partition("launch=")[2])
    assert_refused(answer, 403, "emergency access")


async def test_a_viewer_from_before_does_not_go_on_under_it(
    lightbox: Lightbox, world: World
) -> None:
    """It was opened by a right that is lost: its records have no mark. So it ends, and a new one,
    which is marked, can be opened."""
    view = await lightbox.open(f"/{world.my_study}")
    assert await reason(view, world.my_image) == ""
    change(lightbox, "UPDATE imaging_order SET requested_by = 'x' WHERE requested_by = 'clinician'")
    assert (await break_glass(lightbox, world.mine["id"])).json()["broken"] is True
    assert await reason(view, world.my_image) == "right-lost"
    again = await lightbox.open(f"/{world.my_study}")
    assert await reason(again, world.my_image) == ""


async def test_it_opens_no_more_than_the_role_does(lightbox: Lightbox, world: World) -> None:
    for role in ("clinician", "radiologist"):
        change(lightbox, "UPDATE imaging_order SET site = 'north'")
        assert (await break_glass(lightbox, world.theirs["id"], role=role)).json()["broken"]
        for method, path, more in (
            ("DELETE", f"/dicom/studies/{world.their_study}", {"params": {"reason": "because"}}),
            ("PATCH", f"/orders/{world.their_order['id']}", {"json": {"attending": role}}),
            ("PUT", f"/patients/{world.theirs['id']}/care-team/{role}", {"json": {}}),
        ):
            answer = await lightbox.ask(role, method, f"/api/v1{path}", **more)
            assert answer.status_code == 403, (role, path, answer.text)
    # And for nobody else, and for no other patient.
    path = f"/api/v1/dicom/viewer/url/{world.their_study}"
    assert (await lightbox.ask("technologist", "GET", path, sub="tom")).status_code == 403
    answer = await lightbox.ask(
        "clinician", "GET", f"/api/v1/dicom/viewer/url/{world.their_study}", sub="third"
    )
    assert answer.status_code == 403
    another = await lightbox.patient("MRN-ANOTHER")
    path = f"/api/v1/patients/{another['id']}"
    assert (await lightbox.ask("clinician", "GET", path)).status_code == 403


@pytest.mark.parametrize("role", ["technologist", "service", "admin", "auditor"])
async def test_not_every_role_may(role: str, lightbox: Lightbox, world: World) -> None:
    for patient in (world.theirs["id"], str(uuid4())):
        answer = await break_glass(
            lightbox, patient, role=role, **{"X-Request-ID": f"tries-{patient}"}
        )
        assert (answer.status_code, answer.json()["reason"]) == (403, "role")
        assert outcomes(lightbox, f"tries-{patient}") == [("glass:break", "denied")]
    assert grants(lightbox) == alerts(lightbox) == []


async def test_without_need_nothing_is_broken(lightbox: Lightbox, world: World) -> None:
    for role, sub in (("clinician", None), ("radiologist", None)):
        answer = await break_glass(
            lightbox, world.mine["id"], role=role, sub=sub, **{"X-Request-ID": f"needs-{role}"}
        )
        assert answer.status_code == 200
        assert (answer.json()["broken"], answer.json()["id"]) == (False, None)
        (record,) = records(lightbox, f"needs-{role}")
        assert (record["outcome"], record["purpose_of_use"]) == ("granted", "")
    assert grants(lightbox) == alerts(lightbox) == []


async def test_it_is_broken_anew_only_near_its_end(lightbox: Lightbox, world: World) -> None:
    first = (await break_glass(lightbox, world.theirs["id"])).json()
    again = await break_glass(lightbox, world.theirs["id"])
    assert again.status_code == 409
    assert again.json()["expires_at"][:26] == first["expires_at"][:26]
    assert len(grants(lightbox)) == len(alerts(lightbox)) == 1
    change(lightbox, "UPDATE broken_glass SET expires_at = ?", moment(minutes=9))
    assert (await break_glass(lightbox, world.theirs["id"])).json()["broken"] is True
    assert len(grants(lightbox)) == len(alerts(lightbox)) == 2


async def test_an_unknown_patient_is_404(lightbox: Lightbox, world: World) -> None:
    answer = await break_glass(lightbox, str(uuid4()), **{"X-Request-ID": "guesses"})
    assert answer.status_code == 404
    (record,) = records(lightbox, "guesses")
    assert (record["outcome"], record["reason"]) == ("denied", "unknown")
    assert (await break_glass(lightbox, "not-a-uuid")).status_code == 422


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"reason_code": "emergency-treatment"},
        {"reason_text": "Unconscious in the emergency room."},
        {**WHY, "reason_code": "curiosity"},
        {**WHY, "reason_code": ""},
        {**WHY, "reason_text": ""},
        {**WHY, "reason_text": "short"},
        {**WHY, "reason_text": " " * 40},
        {**WHY, "reason_text": "x" * 1001},
        {**WHY, "reason_text": "a reason with\u0000 in it"},
        [],
        None,
    ],
    ids=str,
)
async def test_a_reason_is_needed(body: Any, lightbox: Lightbox, world: World) -> None:
    answer = await lightbox.ask(
        "clinician", "POST", f"/api/v1/patients/{world.theirs['id']}/break-glass", json=body
    )
    assert answer.status_code == 422, answer.text
    assert grants(lightbox) == alerts(lightbox) == []
    assert (await link(lightbox, world.their_study)).status_code == 403


@pytest.mark.parametrize("code", [each.value for each in GlassReason])
async def test_each_code_is_taken(code: str, lightbox: Lightbox, world: World) -> None:
    body = {"reason_code": code, "reason_text": "Ärztlicher Notdienst,\nzweite Zeile."}
    assert (await break_glass(lightbox, world.theirs["id"], body=body)).json()["broken"] is True
    assert grants(lightbox)[0]["reason_text"] == body["reason_text"]


async def test_no_record_no_grant_and_no_alert(lightbox: Lightbox, world: World) -> None:
    change(lightbox, REFUSE_RECORDS)
    answer = await break_glass(lightbox, world.theirs["id"])
    assert answer.status_code == 503
    assert grants(lightbox) == alerts(lightbox) == []


async def test_no_alert_no_grant(lightbox: Lightbox, world: World) -> None:
    change(
        lightbox,
        "CREATE TRIGGER no_alerts BEFORE INSERT ON notification "
        "BEGIN SELECT RAISE(ABORT, 'the disk is full'); END",
    )
    with pytest.raises(sa.exc.IntegrityError, match="disk is full"):
        await break_glass(lightbox, world.theirs["id"], **{"X-Request-ID": "fails"})
    assert outcomes(lightbox, "fails") == [("glass:break", "granted"), ("glass:break", "failed")]
    assert grants(lightbox) == []
    assert (await link(lightbox, world.their_study)).status_code == 403


# ---------------------------------------------------------------------- restricted and sealed


async def test_a_restricted_patient_is_opened_and_a_sealed_one_is_not(
    lightbox: Lightbox, world: World
) -> None:
    restrict(lightbox, world.theirs["id"], "vip")
    assert (await break_glass(lightbox, world.theirs["id"])).json()["broken"] is True
    view = await lightbox.open(f"/{world.their_study}")
    assert await reason(view, world.their_image) == ""
    change(lightbox, "UPDATE patient_restriction SET level = 'sealed'")
    assert await reason(view, world.their_image) == "glass-ended", "sealed since"


async def test_a_sealed_patient_stays_sealed(lightbox: Lightbox, world: World) -> None:
    restrict(lightbox, world.theirs["id"], "sealed")
    answer = await break_glass(lightbox, world.theirs["id"], **{"X-Request-ID": "tries"})
    assert answer.status_code == 403
    assert "sealed" not in answer.text
    assert "restricted" not in answer.text
    (record,) = records(lightbox, "tries")
    assert (record["outcome"], record["reason"]) == ("denied", "restricted")
    assert record["detail"] == WHY, "the try is reviewed as well"
    assert grants(lightbox) == alerts(lightbox) == []
    assert (await link(lightbox, world.their_study)).status_code == 403


async def test_where_the_settings_say_so_a_sealed_patient_is_opened(
    sqlite_url: str, fake_orthanc: FakeOrthanc
) -> None:
    settings = make_settings(sqlite_url, URL, break_glass_sealed=True, break_glass_minutes=5)
    async with running(settings) as lightbox:
        world = await make_world(lightbox)
        restrict(lightbox, world.theirs["id"], "sealed")
        said = (await break_glass(lightbox, world.theirs["id"])).json()
        assert moment(minutes=4) < said["expires_at"].replace("T", " ") < moment(minutes=6)
        assert grants(lightbox)[0]["opens_sealed"] == 1
        view = await lightbox.open(f"/{world.their_study}")
        assert await reason(view, world.their_image) == ""


async def test_who_is_tied_to_a_restricted_patient_needs_the_glass_too(
    lightbox: Lightbox, world: World
) -> None:
    restrict(lightbox, world.mine["id"], "vip")
    assert (await link(lightbox, world.my_study)).json()["reason"] == "restricted"
    assert (await break_glass(lightbox, world.mine["id"])).json()["broken"] is True
    view = await lightbox.open(f"/{world.my_study}")
    assert await reason(view, world.my_image) == ""


# --------------------------------------------------------------------------------- the review


async def review(
    lightbox: Lightbox, grant: str, comment: str = "Justified.", **more: Any
) -> httpx.Response:
    path = f"/api/v1/audit/break-glass/{grant}/review"
    return await lightbox.ask("auditor", "POST", path, json={"comment": comment}, **more)


async def queue(lightbox: Lightbox, query: str = "?reviewed=false") -> list[Any]:
    answer = await lightbox.ask("auditor", "GET", f"/api/v1/audit/break-glass{query}")
    assert answer.status_code == 200, answer.text
    found: list[Any] = answer.json()
    return found


async def test_an_auditor_reviews_it_once(lightbox: Lightbox, world: World) -> None:
    grant = (await break_glass(lightbox, world.theirs["id"])).json()
    (waits,) = await queue(lightbox)
    assert (waits["id"], waits["sub"], waits["roles"]) == (grant["id"], "clinician", ["clinician"])
    assert (waits["reason_code"], waits["reason_text"]) == (WHY["reason_code"], WHY["reason_text"])
    assert waits["reviewed_at"] is None
    await lightbox.open(f"/{world.their_study}")
    trail = (await lightbox.ask("auditor", "GET", waits["trail"])).json()
    assert {"glass:break", "study:view", "session:open"} <= {each["action"] for each in trail}
    answer = await review(lightbox, grant["id"], headers={"X-Request-ID": "reviews"})
    assert answer.status_code == 200, answer.text
    assert (answer.json()["reviewed_by"], answer.json()["review_comment"]) == (
        *("auditor", "Justified."),
    )
    assert outcomes(lightbox, "reviews") == [("glass:review", "granted"), ("glass:review", "done")]
    assert await queue(lightbox) == []
    assert [each["id"] for each in await queue(lightbox, "?reviewed=true")] == [grant["id"]]
    assert len(await queue(lightbox, "")) == 1
    again = await review(lightbox, grant["id"], "Changed my mind.")
    assert again.status_code == 409
    assert grants(lightbox)[0]["review_comment"] == "Justified."


async def test_nobody_reviews_their_own(lightbox: Lightbox, world: World) -> None:
    grant = (await break_glass(lightbox, world.theirs["id"], sub="both")).json()
    claims = {"sub": "both", "roles": ["auditor", "clinician"]}
    path = f"/api/v1/audit/break-glass/{grant['id']}/review"
    answer = await lightbox.ask(None, "POST", path, claims=claims, json={"comment": "Fine by me."})
    assert answer.status_code == 403
    assert grants(lightbox)[0]["reviewed_at"] is None


@pytest.mark.parametrize("role", ["clinician", "radiologist", "technologist", "service", "admin"])
async def test_nobody_else_reviews_or_reads_them(
    role: str, lightbox: Lightbox, world: World
) -> None:
    grant = (await break_glass(lightbox, world.theirs["id"])).json()
    path = f"/api/v1/audit/break-glass/{grant['id']}/review"
    answer = await lightbox.ask(role, "POST", path, sub="somebody", json={"comment": "Fine."})
    assert answer.status_code == 403
    answer = await lightbox.ask(role, "GET", "/api/v1/audit/break-glass")
    assert answer.status_code == 403
    assert "Unconscious" not in answer.text


async def test_the_review_says_what_it_found(lightbox: Lightbox, world: World) -> None:
    grant = (await break_glass(lightbox, world.theirs["id"])).json()
    for comment in ("", "  ", "ok", "x" * 2001):
        assert (await review(lightbox, grant["id"], comment)).status_code == 422
    assert (await review(lightbox, str(uuid4()))).status_code == 404
    assert len(await queue(lightbox)) == 1


async def test_pages_of_the_queue(lightbox: Lightbox, world: World) -> None:
    made = [
        (await break_glass(lightbox, world.theirs["id"], sub=f"person-{n}")).json()["id"]
        for n in range(3)
    ]
    seen, url = [], "/api/v1/audit/break-glass?limit=2&reviewed=false"
    while url:
        answer = await lightbox.ask("auditor", "GET", url)
        seen += [each["id"] for each in answer.json()]
        url = answer.links.get("next", {}).get("url", "")
    assert seen == made, "the oldest waits longest, and comes first"
    for cursor in ("x", "MjAyNQ==", "MjAyNS0wMS0wMVQwMDowMDowMCBh"):
        bad = await lightbox.ask("auditor", "GET", f"/api/v1/audit/break-glass?cursor={cursor}")
        assert bad.status_code == 422


async def test_of_many_requests_at_once_one_breaks_it(lightbox: Lightbox, world: World) -> None:
    answers = await asyncio.gather(*(break_glass(lightbox, world.theirs["id"]) for _ in range(6)))
    assert sorted(each.status_code for each in answers) == [200] + [409] * 5
    assert len(grants(lightbox)) == len(alerts(lightbox)) == 1


async def test_lists_and_explanations_under_it_are_marked(lightbox: Lightbox, world: World) -> None:
    await break_glass(lightbox, world.theirs["id"])
    for number, path in enumerate(
        (
            *("/api/v1/patients", "/api/v1/orders", "/api/v1/dicom/studies", "/dicom-web/studies"),
            f"/api/v1/dicom/viewer/why/study/{world.their_study}",
        )
    ):
        headers = {"X-Request-ID": f"shows-{number}"}
        assert (await lightbox.ask("clinician", "GET", path, headers=headers)).status_code == 200
        found = records(lightbox, f"shows-{number}")
        marks = {each["patient_id"]: each["purpose_of_use"] for each in found}
        assert marks[UUID(world.theirs["id"]).hex] == "BTG", path
        assert marks.get(UUID(world.mine["id"]).hex, "") == "", path


@pytest.mark.parametrize("in_an_emergency", [True, False])
async def test_where_the_ehr_says_no_to_who_is_tied(
    in_an_emergency: bool,
    lightbox: Lightbox,
    world: World,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is asked anew as an emergency; where it says no to that too, nothing is broken."""
    gate, viewer = lightbox.app.state.gate, lightbox.app.state.viewer
    ehr = SaysNo(in_an_emergency=in_an_emergency)
    for each, name in ((gate, "ehr"), (viewer._glances, "_ehr")):
        monkeypatch.setattr(each, name, ehr)
    assert (await link(lightbox, world.my_study)).json()["reason"] == "ehr"
    answer = await break_glass(lightbox, world.mine["id"])
    if not in_an_emergency:
        assert answer.status_code == 403
        assert "EHR" in answer.json()["detail"]
        assert grants(lightbox) == alerts(lightbox) == []
        return
    assert answer.json()["broken"] is True
    view = await lightbox.open(f"/{world.my_study}")
    assert await reason(view, world.my_image) == ""
    (launched,) = rows(lightbox, "SELECT purpose_of_use AS p FROM launch_session")
    assert launched["p"] == "BTG"
    headers = {"X-Request-ID": "lists"}
    assert len((await lightbox.ask("clinician", "GET", "/api/v1/patients", headers=headers)).json())
    assert records(lightbox, "lists")[-1]["purpose_of_use"] == "BTG"
    change(lightbox, "UPDATE broken_glass SET expires_at = ?", moment(minutes=-1))
    assert (await link(lightbox, world.my_study)).json()["reason"] == "ehr"


class SaysNo:
    """An EHR that says no, but perhaps in an emergency."""

    def __init__(self, *, in_an_emergency: bool) -> None:
        self._in_an_emergency = in_an_emergency

    async def ask(self, question: Question) -> Verdict:
        emergency = question.purpose_of_use == "BTG" and self._in_an_emergency
        return Verdict.ALLOWED if emergency else Verdict.DENIED

    async def ask_all(self, questions: list[Question]) -> dict[Question, Verdict]:
        return {each: await self.ask(each) for each in questions}
