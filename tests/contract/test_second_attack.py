"""Glass, merges and viewers attacked where two of them meet, and at what each keeps for later.

`world`: `mine` is the clinician's, `theirs` is `other`'s.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID

import pytest

from app.access import Gate
from app.access.ehr import Question, Verdict
from app.aliases import lock
from app.audit import Action
from tests.contract.test_break_glass import WHY, alerts, break_glass, grants, queue
from tests.contract.test_merge import may_read, merged, restrict, restriction, studies, unmerge
from tests.contract.test_sessions import logout_token, reason, tell
from tests.contract.test_viewer import assert_refused, redeem, sign_of_life
from tests.fake_orthanc import URL, FakeOrthanc
from tests.images import ct_image
from tests.lightbox import Lightbox, World, make_settings, make_world, running
from tests.tables import change, moment, outcomes, rows

pytestmark = pytest.mark.anyio


@pytest.fixture
def before_the_lock(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], Awaitable[Any]]]:
    """What happens after it was decided to break the glass, and before it is broken."""
    happens: list[Callable[[], Awaitable[Any]]] = []

    async def late(*args: Any) -> None:
        while happens:
            await happens.pop()()
        await lock(*args)

    monkeypatch.setattr("app.access.glass.lock", late)
    return happens


# --------------------------------------------------------------------- what a merge overtakes


@pytest.mark.parametrize("what", ["care-team/third", "restriction"])
async def test_what_is_taken_off_during_a_merge_is_not_said_to_be_gone(
    what: str, lightbox: Lightbox, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The merge carries it to the survivor after the request has found its patient."""
    path = f"/patients/{world.theirs['id']}"
    await lightbox.must("service", "PUT", f"{path}/care-team/third", json={})
    if what == "restriction":
        await restrict(lightbox, world.theirs, "vip", "third")
    decide, merges = Gate.patient_access, [lambda: merged(lightbox, world.theirs, world.mine)]

    async def late(self: Gate, session: Any, principal: Any, action: Action, *more: Any) -> Any:
        access = await decide(self, session, principal, action, *more)
        if merges and action in (Action.CARE_TEAM_WRITE, Action.RESTRICTION_WRITE):
            await session.commit()
            await merges.pop()()
        return access

    monkeypatch.setattr(Gate, "patient_access", late)
    answer = await lightbox.ask("service", "DELETE", f"/api/v1{path}/{what}")
    assert (answer.status_code, merges) == (409, [])
    assert await may_read(lightbox, "third", world.mine)  # as the answer says: nothing was done


# ------------------------------------------------------------------------- glass and merges


@pytest.mark.parametrize("survivor_is", ["plain", "vip"])
async def test_a_glass_that_is_broken_during_a_merge_does_not_open_the_other_record(
    survivor_is: str, lightbox: Lightbox, world: World, before_the_lock: list[Any]
) -> None:
    """Nobody was alerted that it would open a restricted record besides."""
    await restrict(lightbox, world.theirs, "vip", "nobody")
    if survivor_is == "vip":
        await restrict(lightbox, world.mine, "vip", "nobody")
    before_the_lock.append(lambda: merged(lightbox, world.theirs, world.mine))
    headers = {"X-Request-ID": "breaks"}
    answer = await break_glass(lightbox, world.mine["id"], sub="third", **headers)
    assert answer.status_code == 409, answer.text
    assert grants(lightbox) == alerts(lightbox) == []
    assert not await may_read(lightbox, "third", world.mine)
    assert outcomes(lightbox, "breaks") == [("glass:break", "granted"), ("glass:break", "failed")]
    # Asked anew it is about the one record, and the alert too.
    assert (await break_glass(lightbox, world.mine["id"], sub="third")).json()["broken"]
    (alert,) = alerts(lightbox)
    assert alert["patient_id"] == world.mine["id"]


async def test_nothing_is_broken_for_who_is_retired_meanwhile(
    lightbox: Lightbox, world: World, before_the_lock: list[Any]
) -> None:
    before_the_lock.append(lambda: merged(lightbox, world.theirs, world.mine))
    answer = await break_glass(lightbox, world.theirs["id"], sub="third")
    assert answer.status_code == 409, answer.text
    assert grants(lightbox) == alerts(lightbox) == []
    assert world.mine["id"] not in answer.text
    assert not await may_read(lightbox, "third", world.mine)


async def test_the_review_of_a_grant_leads_to_what_was_done_before_a_merge_too(
    lightbox: Lightbox, world: World
) -> None:
    """The trail keeps the id that a record was written with; the grant goes with the patient."""
    await break_glass(lightbox, world.theirs["id"])
    await lightbox.open(f"/{world.their_study}")
    await merged(lightbox, world.theirs, world.mine)
    for whose in (world.mine, world.theirs):
        (waits,) = await queue(lightbox)
        assert waits["patient_id"] == whose["id"]
        assert await may_read(lightbox, "clinician", whose)
        trail = (await lightbox.ask("auditor", "GET", waits["trail"])).json()
        assert {"glass:break", "study:view", "session:open"} <= {each["action"] for each in trail}
        assert {each["actor"] for each in trail} == {"clinician"}
        await unmerge(lightbox, world.theirs)
    path = f"/audit/break-glass/{waits['id']}/review"
    said = await lightbox.must("auditor", "POST", path, json={"comment": "Justified."})
    assert said["trail"] == waits["trail"]


# ---------------------------------------------------------------- what came since a merge


async def test_a_restriction_that_was_said_again_since_is_the_survivors_own(
    lightbox: Lightbox, world: World
) -> None:
    """In the very words that the merge brought: the EHR means the survivor now."""
    await restrict(lightbox, world.theirs, "vip", "other")
    await merged(lightbox, world.theirs, world.mine)
    await restrict(lightbox, world.mine, "vip", "other")
    assert (await unmerge(lightbox, world.theirs)).status_code == 200
    for patient in (world.mine, world.theirs):
        assert await restriction(lightbox, patient) == ("vip", ["other"])
    assert not await may_read(lightbox, "clinician", world.mine)


async def test_restrictions_come_back_through_a_chain_of_merges(
    lightbox: Lightbox, world: World
) -> None:
    """Each step gives back what it took, with its own time; nothing is left on anybody."""
    third = await lightbox.patient("MRN-3")
    await restrict(lightbox, world.theirs, "vip", "other", "both")
    await restrict(lightbox, third, "sealed", "both")
    query = "SELECT * FROM patient_restriction ORDER BY patient_id"
    before = [{**each, "set_by": ""} for each in rows(lightbox, query)]
    await merged(lightbox, world.theirs, world.mine)
    await merged(lightbox, world.mine, third)
    assert await restriction(lightbox, third) == ("sealed", ["both"])
    for table in ("patient_restriction", "named_person"):
        (kept,) = rows(lightbox, f"SELECT DISTINCT patient_id AS p FROM {table}")  # noqa: S608
        assert kept["p"] == UUID(third["id"]).hex, "nothing is left with who was retired"
    for each in (world.mine, world.theirs):
        assert (await unmerge(lightbox, each)).status_code == 200
    assert [{**each, "set_by": ""} for each in rows(lightbox, query)] == before
    assert await restriction(lightbox, world.mine) == (None, [])


# ------------------------------------------------------------------------------- the glass


async def test_an_ehr_that_is_silent_about_who_is_tied_breaks_nothing(
    lightbox: Lightbox, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers again a moment later: then there may be no need to break anything."""

    class Hesitates:
        async def ask(self, question: Question) -> Verdict:
            emergency = question.purpose_of_use == "BTG"
            return Verdict.ALLOWED if emergency else Verdict.UNAVAILABLE

    monkeypatch.setattr(lightbox.app.state.gate, "ehr", Hesitates())
    answer = await break_glass(lightbox, world.mine["id"], **{"X-Request-ID": "silent"})
    assert answer.status_code == 503, answer.text
    assert grants(lightbox) == alerts(lightbox) == []
    assert outcomes(lightbox, "silent") == [("glass:break", "denied")]


@pytest.mark.parametrize("scope", ["user/Patient.rs", "user/ImagingStudy.r openid"])
async def test_a_token_that_could_see_no_images_breaks_no_glass(
    scope: str, lightbox: Lightbox, world: World
) -> None:
    """Else the hospital is alerted of what opened nothing, and an EHR that has only that token is
    told that it did."""
    answer = await lightbox.ask(
        None,
        "POST",
        f"/api/v1/patients/{world.theirs['id']}/break-glass",
        claims={"sub": "clinician", "roles": ["clinician"], "scope": scope},
        json=WHY,
    )
    assert answer.status_code == 403, answer.text
    assert grants(lightbox) == alerts(lightbox) == []


async def test_a_grant_that_does_not_open_what_is_sealed_since_is_in_nobodys_way(
    sqlite_url: str, fake_orthanc: FakeOrthanc
) -> None:
    settings = make_settings(sqlite_url, URL, break_glass_sealed=True)
    async with running(settings) as lightbox:
        world = await make_world(lightbox)
        assert (await break_glass(lightbox, world.theirs["id"])).json()["broken"]
        await restrict(lightbox, world.theirs, "sealed", "somebody")
        assert not await may_read(lightbox, "clinician", world.theirs)
        assert (await break_glass(lightbox, world.theirs["id"])).json()["broken"]
        assert await may_read(lightbox, "clinician", world.theirs)
        assert (await break_glass(lightbox, world.theirs["id"])).status_code == 409
        assert [each["opens_sealed"] for each in grants(lightbox)] == [0, 1]


async def test_grants_of_others_and_for_others_count_for_nothing(
    lightbox: Lightbox, world: World
) -> None:
    """Neither do they stand in the way of an emergency, nor do they make a viewer live longer."""
    third = await lightbox.patient("MRN-3")
    first = (await break_glass(lightbox, world.theirs["id"])).json()
    change(lightbox, "UPDATE broken_glass SET expires_at = ?", moment(minutes=30))
    for patient, sub in ((third["id"], None), (world.theirs["id"], "third")):
        assert (await break_glass(lightbox, patient, sub=sub)).json()["broken"] is True
    change(
        lightbox,
        "UPDATE broken_glass SET expires_at = ? WHERE id <> ?",
        *(moment(minutes=59), UUID(first["id"]).hex),
    )
    view = await lightbox.open(f"/{world.their_study}")
    (grant,) = rows(
        lightbox, "SELECT expires_at AS e FROM broken_glass WHERE id = ?", UUID(first["id"]).hex
    )
    (session,) = rows(lightbox, "SELECT expires_at AS e FROM launch_session")
    assert session == grant
    # Of the person's own for this patient, the last to end.
    change(lightbox, "UPDATE broken_glass SET expires_at = ?", moment(minutes=9))
    last = (await break_glass(lightbox, world.theirs["id"])).json()
    again = await lightbox.open(f"/{world.their_study}")
    assert again.link["session_expires_at"][:26] == last["expires_at"][:26]
    assert await reason(view, world.their_image) == ""


# ---------------------------------------------------------------------------- open viewers


async def test_a_viewer_that_the_cancelling_did_not_see_ends_at_its_next_request(
    lightbox: Lightbox, world: World
) -> None:
    """Its link was being made while the order was cancelled."""
    order = world.my_order["id"]
    view = await lightbox.open(f"/order/{order}")
    waits = await lightbox.must("clinician", "GET", f"/dicom/viewer/url/order/{order}")
    await lightbox.app.state.metadata.settled()
    assert await reason(view, world.my_image) == ""
    # Another order ties them still.
    await lightbox.order(world.mine)
    change(lightbox, "UPDATE imaging_order SET status = 'cancelled' WHERE id = ?", UUID(order).hex)
    assert await reason(view, world.my_image) == "order-cancelled"
    answer = await redeem(lightbox, waits["url"].partition("launch=")[2])
    assert_refused(answer, 403, "cancelled")
    ended = rows(lightbox, "SELECT DISTINCT ended_because AS b FROM launch_session")
    assert ended == [{"b": "order-cancelled"}]


@pytest.mark.parametrize("way", ["a search", "a sign of life"])
async def test_a_viewer_from_before_the_glass_does_not_even_search_under_it(
    way: str, lightbox: Lightbox, world: World
) -> None:
    """Its records have no mark, whatever it asks for first."""
    view = await lightbox.open(f"/{world.my_study}")
    assert (await view.get("/studies")).status_code == 200
    change(lightbox, "UPDATE imaging_order SET requested_by = 'x' WHERE requested_by = 'clinician'")
    assert (await break_glass(lightbox, world.mine["id"])).json()["broken"] is True
    answer = await (view.get("/studies") if way == "a search" else sign_of_life(view))
    assert (answer.status_code, answer.json()["reason"]) == (403, "right-lost")
    assert world.my_study not in answer.text


@pytest.mark.parametrize(
    ("ended", "opens"),
    [
        ({"sub": "clinician"}, False),  # all of the person's sign-ins
        ({"sub": "clinician", "sid": "ward"}, False),
        ({"sid": "ward"}, False),  # the provider names the sign-in alone
        ({"sub": "clinician", "sid": "home"}, True),
        ({"sub": "other", "sid": "ward"}, True),  # of somebody else, by chance of that name
        ({"sub": "other"}, True),
    ],
)
async def test_a_token_from_before_opens_nothing_where_the_sign_out_was_of_its_sign_in(
    ended: dict[str, str], opens: bool, lightbox: Lightbox, world: World
) -> None:
    """Neither a new link, nor one that was made while the sign-out looked for links."""
    claims = {"sub": "clinician", "roles": ["clinician"], "sid": "ward"}
    who = {**claims, "iat": int(time.time()) - 5}
    path = f"/api/v1/dicom/viewer/url/{world.my_study}"
    link = (await lightbox.ask(None, "GET", path, claims=who)).json()
    await lightbox.app.state.metadata.settled()
    assert (await tell(lightbox, logout_token(lightbox, **ended))).status_code == 200
    change(lightbox, "UPDATE launch_session SET ended_at = NULL, ended_because = ''")
    found = await redeem(lightbox, link["url"].partition("launch=")[2])
    again = await lightbox.ask(None, "GET", path, claims=who)
    assert (found.status_code, again.status_code) == ((303, 200) if opens else (403, 403))


# ------------------------------------------------------------------------- taken apart at once


async def test_of_two_who_take_it_apart_at_once_one_does(lightbox: Lightbox, world: World) -> None:
    """The second would give back anew what was taken, or changed, since the first did."""
    await merged(lightbox, world.theirs, world.mine)
    answers = await asyncio.gather(*(unmerge(lightbox, world.theirs) for _ in range(3)))
    assert sorted(each.status_code for each in answers) == [200, 409, 409]
    records = await lightbox.audit(action="patient:merge", outcome="done")
    taken_apart = [each for each in records if "unmerged" in each["detail"]]
    assert len(taken_apart) == 2, "one under each id"


# ------------------------------------------------------------------ whose it is, taken apart


async def test_what_was_the_survivors_stays_theirs_whatever_number_it_carries(
    lightbox: Lightbox, world: World
) -> None:
    """Filed under them before the merge, by somebody who knew better than the file."""
    change(
        lightbox,
        "UPDATE study SET dicom_patient_id = 'MRN-VICTIM' WHERE study_instance_uid = ?",
        world.my_study,
    )
    await merged(lightbox, world.theirs, world.mine)
    assert (await unmerge(lightbox, world.theirs)).status_code == 200
    assert await studies(lightbox, world.mine) == [world.my_study]
    assert await studies(lightbox, world.theirs) == [world.their_study]


async def test_a_study_that_came_anew_is_not_the_one_that_moved(
    lightbox: Lightbox, world: World
) -> None:
    """Deleted since, and sent again under the same UID: for the survivor this time."""
    await merged(lightbox, world.theirs, world.mine)
    path = f"/dicom/studies/{world.their_study}"
    await lightbox.must("service", "DELETE", path, params={"reason": "the wrong patient"})
    image = ct_image(patient_id="MRN-MINE", study_uid=world.their_study)
    sent = await lightbox.upload(image, patient_id=world.mine["id"])
    assert sent.status_code == 200, sent.text
    assert (await unmerge(lightbox, world.theirs)).status_code == 200
    assert await studies(lightbox, world.mine) == sorted([world.my_study, world.their_study])
    assert await studies(lightbox, world.theirs) == []


async def test_an_order_that_is_said_to_be_the_survivors_is(
    lightbox: Lightbox, world: World
) -> None:
    await merged(lightbox, world.theirs, world.mine)
    ours, theirs = [await lightbox.order(world.mine) for _ in range(2)]
    decided = {ours["id"]: False, theirs["id"]: True}
    assert (await unmerge(lightbox, world.theirs, orders=decided)).status_code == 200
    for order, patient in ((ours, world.mine), (theirs, world.theirs)):
        said = await lightbox.must("service", "GET", f"/orders/{order['id']}")
        assert said["patient_id"] == patient["id"]
