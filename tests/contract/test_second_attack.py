"""Glass, merges and viewers attacked where two of them meet, and at what each keeps for later.

`world`: `mine` is the clinician's, `theirs` is `other`'s.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
import sqlalchemy as sa
from sqlmodel import select

from app.access import Gate
from app.access.ehr import Question, Verdict
from app.aliases import lock
from app.arrivals import index
from app.arrivals.changes import ORIGIN
from app.audit import Action
from app.models import Arrival, LaunchSession
from app.orderlife import images_changed
from app.viewer.endings import EndedBecause, end_sessions
from tests.contract.test_break_glass import WHY, SaysNo, alerts, break_glass, grants, queue
from tests.contract.test_merge import may_read, merged, restrict, restriction, studies, unmerge
from tests.contract.test_reconciliation import arrive, decide, one, orthanc_id
from tests.contract.test_sessions import logout_token, reason, tell
from tests.contract.test_viewer import assert_refused, redeem, sign_of_life
from tests.fake_orthanc import URL, FakeOrthanc
from tests.images import ct_image
from tests.lightbox import Lightbox, World, make_settings, make_world, running
from tests.live.arrivals import until
from tests.live.conftest import migrated
from tests.servers import postgres_server
from tests.tables import change, moment, outcomes, records, rows

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


class Hesitates:
    """An EHR that answers in an emergency alone."""

    async def ask(self, question: Question) -> Verdict:
        emergency = question.purpose_of_use == "BTG"
        return Verdict.ALLOWED if emergency else Verdict.UNAVAILABLE


async def test_an_ehr_that_is_silent_about_who_is_tied_breaks_nothing(
    lightbox: Lightbox, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers again a moment later: then there may be no need to break anything."""
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


@pytest.fixture
def ehr_wants_an_emergency(lightbox: Lightbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """The EHR says no to whoever is tied to a patient, but in an emergency."""
    state, ehr = lightbox.app.state, SaysNo(in_an_emergency=True)
    for part, name in (
        (state.gate, "ehr"),
        (state.studies, "_ehr"),
        (state.viewer._glances, "_ehr"),
    ):
        monkeypatch.setattr(part, name, ehr)


@pytest.mark.usefixtures("ehr_wants_an_emergency")
async def test_what_the_ehr_allows_in_an_emergency_alone_is_marked_by_every_way(
    lightbox: Lightbox, world: World
) -> None:
    """By token too, and though the caller is tied to the patient."""
    path = f"/dicom-web/studies/{world.my_study}/series"
    assert (await lightbox.ask("clinician", "GET", path)).status_code == 404
    assert (await break_glass(lightbox, world.mine["id"])).json()["broken"] is True
    answer = await lightbox.ask("clinician", "GET", path, headers={"X-Request-ID": "sees"})
    assert answer.status_code == 200, answer.text
    (record,) = records(lightbox, "sees")
    assert (record["action"], record["outcome"]) == ("study:view", "granted")
    assert record["purpose_of_use"] == "BTG"


@pytest.mark.usefixtures("ehr_wants_an_emergency")
async def test_a_viewer_from_under_the_glass_is_no_emergency_any_more_when_that_ends(
    lightbox: Lightbox, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The right by which it could go on is one that the EHR denies."""
    assert (await break_glass(lightbox, world.mine["id"])).json()["broken"] is True
    view = await lightbox.open(f"/{world.my_study}")
    assert await reason(view, world.my_image) == ""
    for answer in (await view.get("/studies"), await sign_of_life(view)):
        assert answer.status_code == 200, answer.text
    # An EHR that is silent has not said no: there is nothing to be asked as an emergency.
    with monkeypatch.context() as silent:
        for part, name in (
            (lightbox.app.state.gate, "ehr"),
            (lightbox.app.state.viewer._glances, "_ehr"),
        ):
            silent.setattr(part, name, Hesitates())
        assert (await view.get("/studies")).status_code == 503
    change(lightbox, "UPDATE broken_glass SET expires_at = ?", moment(minutes=-1))
    assert await reason(view, world.my_image) == "glass-ended"


async def test_what_is_recorded_once_in_a_while_is_recorded_anew_of_whatever_is_new_about_it(
    lightbox: Lightbox, world: World
) -> None:
    """Else who looked second, in another role or under broken glass, would not be in the trail."""
    await lightbox.must("service", "PUT", f"/patients/{world.mine['id']}/care-team/third", json={})
    seen = 0

    async def seen_as(
        study: str, sub: str = "clinician", *more_roles: str
    ) -> list[tuple[str, str]]:
        """Whose the records are of two looks, and their purpose."""
        nonlocal seen
        found = []
        claims = {"sub": sub, "roles": ["clinician", *more_roles]}
        for _ in range(2):
            seen += 1
            headers = {"X-Request-ID": f"seen-{seen}"}
            path = f"/dicom-web/studies/{study}/series"
            answer = await lightbox.ask(None, "GET", path, claims=claims, headers=headers)
            assert answer.status_code == 200, answer.text
            found += records(lightbox, f"seen-{seen}")
        assert {(each["actor"], each["study_instance_uid"]) for each in found} <= {(sub, study)}
        return [(each["patient_id"], each["purpose_of_use"]) for each in found]

    mine, theirs = (UUID(each["id"]).hex for each in (world.mine, world.theirs))
    assert await seen_as(world.my_study) == [(mine, "")]
    assert await seen_as(world.my_study, "third") == [(mine, "")]
    assert await seen_as(world.my_study, "clinician", "radiologist") == [(mine, "")]
    await merged(lightbox, world.mine, world.theirs)
    assert await seen_as(world.my_study) == [(theirs, "")]
    assert await seen_as(world.their_study) == [(theirs, "")]
    change(lightbox, "UPDATE imaging_order SET requested_by = 'x' WHERE requested_by = 'clinician'")
    assert (await break_glass(lightbox, world.theirs["id"])).json()["broken"] is True
    assert await seen_as(world.my_study) == [(theirs, "BTG")]


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
    ("path", "why"),
    [
        ("/%61live", "not-plain"),  # a sign of life, in another writing
        ("/dicom-web/studies/1..2/series", "not-a-uid"),
        ("/dicom-web/patients", "not-enumerated"),
    ],
)
async def test_a_viewers_tries_are_on_record_under_whose_it_is(
    path: str, why: str, lightbox: Lightbox, world: World
) -> None:
    view = await lightbox.open(f"/{world.my_study}")
    url = httpx.URL("http://lightbox.test").copy_with(raw_path=f"/s/{view.ctx}{path}".encode())
    headers = {"Cookie": view.cookie, "X-Request-ID": "tries"}
    assert (await lightbox.client.get(url, headers=headers)).status_code == 404
    (record,) = records(lightbox, "tries")
    assert (record["outcome"], record["reason"]) == ("denied", why)
    assert (record["ctx"], record["actor"]) == (view.ctx, "clinician")
    assert record["patient_id"] == UUID(world.mine["id"]).hex
    assert (await sign_of_life(view)).status_code == 200


async def test_what_another_process_ended_just_now_is_not_ended_again(
    lightbox: Lightbox, world: World
) -> None:
    """Else the trail says twice, and of two reasons, what was looked at."""
    view = await lightbox.open(f"/{world.my_study}")
    async with lightbox.app.state.database.session() as session:
        launches = (await session.exec(select(LaunchSession))).all()
        await lightbox.must("clinician", "DELETE", f"/viewer/sessions/{view.ctx}")
        assert await end_sessions(session, launches, EndedBecause.IDLE, ORIGIN, actor="") == 0
        await session.commit()
    (record,) = await lightbox.audit(action="session:end")
    assert record["reason"] == "revoked"
    assert await reason(view, world.my_image) == "revoked"


@pytest.mark.parametrize("path", ["/alive", "/dicom-web/studies", "/dicom-web/patients"])
async def test_who_has_the_address_and_not_the_cookie_is_on_record(
    path: str, lightbox: Lightbox, world: World
) -> None:
    view = await lightbox.open(f"/{world.my_study}")
    name = view.cookie.partition("=")[0]
    for number, (cookie, why) in enumerate([("", "no-cookie"), (f"{name}=guess", "bad-cookie")]):
        headers = {"Cookie": cookie, "X-Request-ID": f"guess-{number}"}
        answer = await lightbox.client.get(f"/s/{view.ctx}{path}", headers=headers)
        assert answer.status_code == 401, answer.text
        (record,) = records(lightbox, f"guess-{number}")
        assert (record["action"], record["outcome"], record["reason"]) == ("sign-in", "denied", why)
        assert record["actor"] == "", "nobody knows who it is"


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


async def test_no_link_is_made_across_a_patient_who_is_taken_apart_meanwhile(
    fake_orthanc: FakeOrthanc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To an order of the one, of a study of the other that has no new files."""
    with postgres_server() as server:
        url = migrated(server.create_database()).app
        async with running(make_settings(url, URL, spool_dir=tmp_path)) as lightbox:
            await _link_while_taken_apart(lightbox, fake_orthanc, monkeypatch)


async def _link_while_taken_apart(
    lightbox: Lightbox, fake: FakeOrthanc, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, database = await make_world(lightbox), lightbox.app.state.database
    study, order = world.my_study, world.their_order["id"]
    held = await lightbox.app.state.orthanc.held(orthanc_id(fake, study))
    async with database.session() as session:
        await index.note(session, held, stable=True)
        await session.exec(sa.update(Arrival).values(state="rejected", due_at=None))
        await session.commit()
    await merged(lightbox, world.theirs, world.mine)
    apart: list[asyncio.Task[Any]] = []

    async def waits() -> bool:
        async with database.session() as session:
            query = sa.text("SELECT count(*) FROM pg_locks WHERE NOT granted")
            found = await (await session.connection()).execute(query)
            return apart[0].done() or found.scalar_one() > 0

    async def late(*args: Any, **more: Any) -> Any:
        apart.append(asyncio.create_task(unmerge(lightbox, world.theirs)))
        await until(waits, "the taking apart is over, or waits for the link")
        return await images_changed(*args, **more)

    monkeypatch.setattr("app.arrivals.linker.images_changed", late)
    version = (await one(lightbox, study))["version"]
    linked = await decide(lightbox, study, "confirm", order_id=order, version=version)
    taken_apart = await apart[0]
    assert (linked.status_code, taken_apart.status_code) == (200, 409), linked.text
    (crossing,) = taken_apart.json()["undecided"]
    assert (crossing["order_id"], crossing["study_instance_uid"]) == (order, study)


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


async def test_what_arrived_since_is_shown_on_the_worklist_to_whose_it_is_and_to_nobody_else(
    lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    """It was linked to the survivor, and went with the retired patient's number."""
    order = await lightbox.order(world.theirs)
    await merged(lightbox, world.theirs, world.mine)
    image = ct_image(
        patient_id="MRN-VICTIM",
        study_uid=order["planned_study_instance_uid"],
        PatientName="Doe^Jane",
        AccessionNumber=order["accession_number"],
        StudyDate=time.strftime("%Y%m%d"),
    )
    uid = await arrive(lightbox, fake_orthanc, image)
    query = "SELECT state, patient_id FROM arrival WHERE study_instance_uid = ?"
    (row,) = rows(lightbox, query, uid)
    assert row == {"state": "linked", "patient_id": UUID(world.mine["id"]).hex}
    assert (await unmerge(lightbox, world.theirs)).status_code == 200
    (row,) = rows(lightbox, query, uid)
    assert row == {"state": "linked", "patient_id": UUID(world.theirs["id"]).hex}
    statuses = []
    for patient in (world.mine, world.theirs):
        who = {"sub": "r", "roles": ["radiologist"], "patient": patient["id"]}
        path = f"/api/v1/reconciliation/{uid}"
        statuses.append((await lightbox.ask(None, "GET", path, claims=who)).status_code)
    assert statuses == [403, 200]


async def test_what_was_undone_since_is_given_back_to_nobody(
    lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    """Whose it is was wrong: it waits for a human, and is not filed with anybody by a merge."""
    order = await lightbox.order(world.theirs, requested_by="other")
    image = ct_image(
        patient_id="MRN-VICTIM",
        study_uid=order["planned_study_instance_uid"],
        PatientName="Victim^Vera",
        AccessionNumber=order["accession_number"],
    )
    uid = await arrive(lightbox, fake_orthanc, image)
    query = "SELECT state, patient_id FROM arrival WHERE study_instance_uid = ?"
    assert rows(lightbox, query, uid) == [
        {"state": "linked", "patient_id": UUID(world.theirs["id"]).hex}
    ]
    await merged(lightbox, world.theirs, world.mine)
    version = (await one(lightbox, uid))["version"]
    undone = await decide(lightbox, uid, "undo", version=version, reason="the wrong patient")
    assert undone.status_code == 200, undone.text
    assert (await unmerge(lightbox, world.theirs)).status_code == 200
    assert rows(lightbox, query, uid) == [{"state": "unmatched", "patient_id": None}]
    (record, _) = [
        each
        for each in await lightbox.audit(action="patient:merge", outcome="done")
        if "unmerged" in each["detail"]
    ]
    assert record["detail"]["moved"]["arrival"] == 0
