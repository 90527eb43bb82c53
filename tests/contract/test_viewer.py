"""Opening the viewer: the link, its one use, the session behind it, and what ends it."""

import asyncio
import re
from typing import Any
from uuid import UUID

import httpx
import pytest
from python_multipart.multipart import parse_options_header

from app.audit import Origin
from app.dicomweb import freshness
from tests.fake_orthanc import URL, FakeOrthanc
from tests.images import ct_image
from tests.lightbox import Lightbox, Opened, Shared, World, make_settings, make_world, running
from tests.parts import files_of, parts_of
from tests.tables import change, moment, outcomes, records, rows

INSTANCE = "/studies/{study}/series/{series}/instances/{instance}"
FRAME = f"{INSTANCE}/frames/1"


def frame_of(image: dict[str, Any], path: str = FRAME) -> str:
    return path.format(
        study=image["study_instance_uid"],
        series=image["series_instance_uid"],
        instance=image["sop_instance_uid"],
    )


async def link_to(lightbox: Lightbox, path: str, **params: str) -> Any:
    link = await lightbox.must("clinician", "GET", f"/dicom/viewer/url{path}", params=params)
    await lightbox.app.state.metadata.settled()
    return link


def code_of(link: Any) -> str:
    return str(httpx.URL(link["url"]).params["launch"])


async def redeem(lightbox: Lightbox, code: str, request_id: str = "opens") -> httpx.Response:
    """What the browser gets for a code; no cookie is kept."""
    answer = await lightbox.client.get(
        "/viewer", params={"launch": code}, headers={"X-Request-ID": request_id}
    )
    lightbox.client.cookies.clear()
    return answer


def assert_refused(answer: httpx.Response, status: int, why: str) -> None:
    """A page that says why, opens nothing and names nobody."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"].startswith("text/html")
    assert why in answer.text.replace("&#x27;", "'")
    assert answer.headers["x-request-id"] in answer.text
    assert "set-cookie" not in answer.headers
    assert "location" not in answer.headers
    for word in ("MRN", "Doe", "Jane", "2.25."):
        assert word not in answer.text


async def another_study(lightbox: Lightbox, world: World, **values: Any) -> Any:
    """A second study of my patient, linked to no order."""
    content = ct_image(patient_id="MRN-MINE", **values)
    return (await lightbox.upload(content, patient_id=world.mine["id"])).json()


# --------------------------------------------------------------------------------------- the link


async def test_a_link_names_what_it_opens_and_no_secret(lightbox: Lightbox, world: World) -> None:
    older = await another_study(lightbox, world, StudyDate="20010101")
    old, new = older["study_instance_uid"], world.my_study
    order = world.my_order["id"]
    for path, opens, order_id in (
        (f"/{new}", [new], None),
        (f"/order/{order}", [new], order),
        (f"/patient/{world.mine['id']}", [new, old], None),
    ):
        link = await link_to(lightbox, path)
        assert link["study_instance_uids"] == opens
        assert link["study_count"] == len(opens)
        assert link["patient_id"] == world.mine["id"]
        assert link["order_id"] == order_id
        assert link["expires_at"] < link["session_expires_at"]
        uids = ",".join(opens)
        start = f"http://localhost:3001/viewer?StudyInstanceUIDs={uids}&launch="
        assert re.fullmatch(re.escape(start) + "[A-Za-z0-9_-]{43}", link["url"])
        for word in (world.mine["id"], "MRN", "Doe", "eyJ", "clinician"):
            assert word not in link["url"]


async def test_secrets_are_kept_as_hashes_only(lightbox: Lightbox, world: World) -> None:
    view = await lightbox.open(f"/{world.my_study}")
    said = str(rows(lightbox, "SELECT * FROM launch_session"))
    said += str(rows(lightbox, "SELECT * FROM audit_record"))
    assert view.code not in said
    assert view.cookie.partition("=")[2] not in said


async def test_there_is_no_link_before_there_are_images(lightbox: Lightbox) -> None:
    patient = await lightbox.patient()
    order = await lightbox.order(patient)
    for path, why in (
        (f"order/{order['id']}", "for this order"),
        (f"patient/{patient['id']}", "for this patient"),
        ("2.25.1", "No study"),
    ):
        answer = await lightbox.ask("clinician", "GET", f"/api/v1/dicom/viewer/url/{path}")
        assert answer.status_code == 404
        assert why in answer.json()["detail"]


# -------------------------------------------------------------------------------------- its opening


async def test_a_code_is_traded_for_a_cookie_and_a_clean_url(
    lightbox: Lightbox, world: World
) -> None:
    link = await link_to(lightbox, f"/{world.my_study}")
    answer = await redeem(lightbox, code_of(link))
    assert answer.status_code == 303
    location = httpx.URL(answer.headers["location"])
    ctx = location.params["ctx"]
    assert dict(location.params) == {"StudyInstanceUIDs": world.my_study, "ctx": ctx}
    assert location.path == "/viewer"
    assert answer.headers["location"].startswith("/viewer?")
    cookie, *attributes = answer.headers["set-cookie"].split("; ")
    assert re.fullmatch(r"lightbox=[A-Za-z0-9_-]{43}", cookie)
    assert {each.lower() for each in attributes} == {
        "httponly",
        "max-age=43200",
        f"path=/s/{ctx}/".lower(),
        "samesite=strict",
    }
    assert answer.headers["cache-control"] == "no-store"
    assert outcomes(lightbox, "opens") == [("session:open", "granted")]
    page = await lightbox.client.get(answer.headers["location"])
    assert page.headers["x-accel-redirect"] == "/_ohif/index.html"


async def test_on_https_the_cookie_is_secure(sqlite_url: str, fake_orthanc: FakeOrthanc) -> None:
    settings = make_settings(sqlite_url, URL, viewer_base_url="https://images.hospital.test")
    async with running(settings) as lightbox:
        world = await make_world(lightbox)
        link = await link_to(lightbox, f"/{world.my_study}")
        assert link["url"].startswith("https://images.hospital.test/viewer?StudyInstanceUIDs=")
        answer = await redeem(lightbox, code_of(link))
    assert "; secure" in answer.headers["set-cookie"].lower()


async def test_two_tabs_have_a_session_each(lightbox: Lightbox, world: World) -> None:
    first = await lightbox.open(f"/{world.my_study}")
    second = await lightbox.open(f"/{world.my_study}")
    assert first.ctx != second.ctx
    assert (await first.get("/studies")).is_success
    assert (await second.get("/studies")).is_success
    assert (await second.get("/studies", cookie=first.cookie)).status_code == 401
    both = f"{first.cookie}; {second.cookie}"
    assert (await second.get("/studies", cookie=both)).is_success


async def test_a_link_opens_once(lightbox: Lightbox, world: World) -> None:
    view = await lightbox.open(f"/{world.my_study}")
    assert_refused(await redeem(lightbox, view.code), 410, "used already")
    (record,) = records(lightbox, "opens")
    assert (record["action"], record["outcome"]) == ("session:open", "denied")
    assert (record["reason"], record["actor"]) == ("used", "clinician")
    assert (await view.get("/studies")).is_success, "the first browser goes on"


async def test_of_many_browsers_at_once_one_gets_in(lightbox: Lightbox, world: World) -> None:
    code = code_of(await link_to(lightbox, f"/{world.my_study}"))
    answers = await asyncio.gather(*(redeem(lightbox, code, f"opens-{n}") for n in range(10)))
    assert sorted(each.status_code for each in answers) == [303] + [410] * 9
    decided = [outcome for n in range(10) for _, outcome in outcomes(lightbox, f"opens-{n}")]
    assert sorted(decided) == ["denied"] * 9 + ["granted"]


async def test_a_late_link_opens_nothing(lightbox: Lightbox, world: World) -> None:
    code = code_of(await link_to(lightbox, f"/{world.my_study}"))
    change(lightbox, "UPDATE launch_session SET code_expires_at = ?", moment(seconds=-1))
    assert_refused(await redeem(lightbox, code), 403, "not opened in time")
    assert records(lightbox, "opens")[0]["reason"] == "unused"
    await lightbox.app.state.viewer.sweep(Origin("sweeps"))
    assert_refused(await redeem(lightbox, code), 403, "not opened in time")


@pytest.mark.parametrize("code", ["x", "0" * 43, "'; --", "é", "../x", "a b"])
async def test_a_code_never_given_opens_nothing(code: str, untouched: Shared) -> None:
    answer = await redeem(untouched.lightbox, code, "guesses")
    assert_refused(answer, 404, "not known")
    assert records(untouched.lightbox, "guesses")[-1]["reason"] == "unknown-code"


async def test_a_link_of_a_cancelled_order_opens_nothing(lightbox: Lightbox, world: World) -> None:
    path = f"/orders/{world.my_order['id']}"
    code = code_of(await link_to(lightbox, f"/order/{world.my_order['id']}"))
    await lightbox.must("service", "PATCH", path, json={"status": "cancelled"})
    assert_refused(await redeem(lightbox, code), 403, "has been cancelled")


async def test_a_link_of_a_deleted_study_opens_nothing(lightbox: Lightbox, world: World) -> None:
    code = code_of(await link_to(lightbox, f"/{world.my_study}"))
    await lightbox.must("service", "DELETE", f"/dicom/studies/{world.my_study}?reason=wrong")
    assert_refused(await redeem(lightbox, code), 403, "have been deleted")


async def test_a_link_whose_right_was_lost_opens_nothing(lightbox: Lightbox, world: World) -> None:
    code = code_of(await link_to(lightbox, f"/{world.my_study}"))
    change(lightbox, "UPDATE imaging_order SET requested_by = 'x'")
    assert_refused(await redeem(lightbox, code), 403, "no longer have access")
    assert ("study:view", "denied") in outcomes(lightbox, "opens")
    assert_refused(await redeem(lightbox, code), 403, "no longer have access")


async def test_the_bare_address_explains_itself(untouched: Shared) -> None:
    client = untouched.lightbox.client
    assert_refused(await client.get("/"), 200, "It opens from an order or a patient")
    assert_refused(await client.get("/viewer"), 404, "It opens from an order or a patient")
    for ctx in ("unknown", "../x", "a b", "'"):
        answer = await client.get("/viewer", params={"ctx": ctx})
        assert_refused(answer, 403, "belongs to another browser, or is not known")
        assert "x-accel-redirect" not in answer.headers


async def test_ohif_opens_only_while_the_session_lives(lightbox: Lightbox, world: World) -> None:
    view = await lightbox.open(f"/{world.my_study}")
    address = {"StudyInstanceUIDs": world.my_study, "ctx": view.ctx}
    assert "x-accel-redirect" in (await lightbox.client.get("/viewer", params=address)).headers
    change(lightbox, "UPDATE launch_session SET expires_at = ?", moment(seconds=-1))
    answer = await lightbox.client.get("/viewer", params=address)
    assert (answer.status_code, answer.headers["location"]) == (303, f"/s/{view.ctx}/ended")
    assert "x-accel-redirect" not in answer.headers
    answer = await lightbox.client.get(answer.headers["location"])
    assert_refused(answer, 200, "reached its time limit")


# ----------------------------------------------------------------------------- what ends a session


async def assert_ended(view: Opened, reason: str, image: dict[str, Any]) -> None:
    """Nothing is shown any more, and each answer says why."""
    series = "/studies/{study}/series/{series}/metadata"
    for path in ("/studies", frame_of(image), frame_of(image, series)):
        answer = await view.get(path)
        assert answer.status_code == 403, answer.text
        assert answer.json()["reason"] == reason
        assert "x-accel-redirect" not in answer.headers
    status = await view.lightbox.client.get(
        f"/s/{view.ctx}/status", headers={"Cookie": view.cookie}
    )
    assert status.status_code == 403
    page = await view.lightbox.client.get(f"/s/{view.ctx}/ended")
    assert page.status_code == 200


async def status_of(view: Opened) -> int:
    path = f"/s/{view.ctx}/status"
    answer = await view.lightbox.client.get(path, headers={"Cookie": view.cookie})
    return answer.status_code


async def sign_of_life(view: Opened, **headers: str) -> httpx.Response:
    """What the page sends while somebody moves a pointer."""
    answer = await view.lightbox.client.get(
        f"/s/{view.ctx}/alive", headers={"Cookie": view.cookie, **headers}
    )
    view.lightbox.client.cookies.clear()
    return answer


async def test_a_session_ends_when_it_is_not_used(lightbox: Lightbox, world: World) -> None:
    view = await lightbox.open(f"/{world.my_study}")
    assert await status_of(view) == 204
    change(lightbox, "UPDATE launch_session SET last_used_at = ?", moment(minutes=-60, seconds=-1))
    await assert_ended(view, "idle", world.my_image)


async def test_a_session_that_is_used_slides_on(lightbox: Lightbox, world: World) -> None:
    view = await lightbox.open(f"/{world.my_study}")
    change(lightbox, "UPDATE launch_session SET last_used_at = ?", moment(minutes=-59))
    assert (await view.get(frame_of(world.my_image))).is_success
    await lightbox.app.state.viewer.flush()
    (launch,) = rows(lightbox, "SELECT last_used_at FROM launch_session")
    assert launch["last_used_at"] > moment(minutes=-1)


async def test_a_use_that_is_not_written_yet_counts(lightbox: Lightbox, world: World) -> None:
    view = await lightbox.open(f"/{world.my_study}")
    assert (await view.get(frame_of(world.my_image))).is_success
    change(lightbox, "UPDATE launch_session SET last_used_at = ?", moment(minutes=-61))
    assert (await view.get(frame_of(world.my_image))).is_success


async def test_use_does_not_stretch_the_absolute_limit(lightbox: Lightbox, world: World) -> None:
    view = await lightbox.open(f"/{world.my_study}")
    assert (await view.get(frame_of(world.my_image))).is_success
    change(lightbox, "UPDATE launch_session SET expires_at = ?", moment(seconds=-1))
    await assert_ended(view, "expired", world.my_image)


async def test_a_cancelled_order_ends_its_viewers_at_the_next_request(
    lightbox: Lightbox, world: World
) -> None:
    of_order = await lightbox.open(f"/order/{world.my_order['id']}")
    radiologist = await lightbox.open(f"/order/{world.my_order['id']}", role="radiologist")
    await lightbox.order(world.mine)  # the clinician's right to the patient stays
    of_study = await lightbox.open(f"/{world.my_study}")
    path = f"/orders/{world.my_order['id']}"
    await lightbox.must("service", "PATCH", path, json={"status": "cancelled"})
    await assert_ended(of_order, "order-cancelled", world.my_image)
    await assert_ended(radiologist, "order-cancelled", world.my_image)
    assert (await of_study.get(frame_of(world.my_image))).is_success


async def test_a_deleted_study_ends_the_viewers_that_opened_it_or_looked_at_it(
    lightbox: Lightbox, world: World
) -> None:
    other = await another_study(lightbox, world)
    opened = await lightbox.open(f"/{world.my_study}")
    beside = await lightbox.open(f"/patient/{world.mine['id']}")  # both, none looked at yet
    looked = await lightbox.open(f"/{other['study_instance_uid']}")
    assert (await looked.get(frame_of(world.my_image))).is_success
    theirs = await lightbox.open(f"/{world.their_study}", sub="other")
    deleted = await lightbox.must(
        "service", "DELETE", f"/dicom/studies/{world.my_study}", params={"reason": "a mistake"}
    )
    assert deleted["viewers_ended"] == 3
    for view in (opened, beside, looked):
        await assert_ended(view, "study-deleted", world.my_image)
    assert (await theirs.get(frame_of(world.their_image))).is_success


async def test_a_deleted_prior_that_nobody_looked_at_is_only_taken_away(
    lightbox: Lightbox, world: World
) -> None:
    """Its UID is the beginning of the one that is open, and its end: it must not be found in it."""
    uid = f"{world.my_study}.1"
    prior = await another_study(lightbox, world, StudyInstanceUID=uid)
    assert prior["study_instance_uid"] == uid
    view, reads = await lightbox.open(f"/{uid}"), frame_of(world.my_image)
    assert len((await view.get("/studies")).json()) == 2
    deleted = await lightbox.must(
        "service", "DELETE", f"/dicom/studies/{world.my_study}", params={"reason": "a mistake"}
    )
    assert deleted["viewers_ended"] == 0
    assert (await view.get(frame_of(prior))).is_success, "the reading goes on"
    (row,) = (await view.get("/studies")).json()
    assert row["0020000D"]["Value"] == [uid]
    answer = await view.get(reads, headers={"X-Request-ID": "gone"})
    assert answer.status_code == 404
    assert [each["reason"] for each in records(lightbox, "gone")] == ["not-in-session"]


@pytest.mark.parametrize(
    "loss",
    [
        "DELETE FROM care_team_member",
        "UPDATE care_team_member SET expires_at = '2020-01-01 00:00:00.000000'",
        "UPDATE care_team_member SET sub = 'Other'",
    ],
)
async def test_a_right_that_is_lost_ends_the_session_at_the_next_byte(
    loss: str, lightbox: Lightbox, world: World
) -> None:
    member = f"/patients/{world.mine['id']}/care-team/other"
    await lightbox.must("service", "PUT", member, json={})
    view = await lightbox.open(f"/{world.my_study}", sub="other")
    assert (await view.get(frame_of(world.my_image))).is_success
    assert change(lightbox, loss) == 1
    answer = await view.get(frame_of(world.my_image), headers={"X-Request-ID": "lost"})
    assert (answer.status_code, answer.json()["reason"]) == (403, "right-lost")
    assert outcomes(lightbox, "lost") == [("study:view", "denied"), ("session:end", "done")]
    await lightbox.must("service", "PUT", member, json={})
    await assert_ended(view, "right-lost", world.my_image)


async def test_what_ties_another_viewer_ties_nobody_else(lightbox: Lightbox, world: World) -> None:
    """A colleague goes on looking at the same study; whose right is lost does not."""
    member = f"/patients/{world.mine['id']}/care-team/other"
    await lightbox.must("service", "PUT", member, json={})
    mine = await lightbox.open(f"/{world.my_study}")
    radiologist = await lightbox.open(f"/{world.my_study}", role="radiologist")
    theirs = await lightbox.open(f"/{world.my_study}", sub="other")
    views = (mine, radiologist, theirs)
    for view in views:
        assert (await view.get(frame_of(world.my_image))).is_success
    await lightbox.must("service", "DELETE", member)
    statuses = [(await view.get(frame_of(world.my_image))).status_code for view in views]
    assert statuses == [200, 200, 403]
    change(lightbox, "UPDATE imaging_order SET requested_by = 'x'")
    statuses = [(await view.get(frame_of(world.my_image))).status_code for view in views]
    assert statuses == [403, 200, 403]


async def test_a_role_that_is_taken_away_counts_from_the_next_link(
    lightbox: Lightbox, world: World
) -> None:
    """The session keeps the roles of its launch; relations are looked at each time."""
    view = await lightbox.open(f"/{world.my_study}", role="radiologist")
    assert (await view.get("/studies")).is_success
    change(lightbox, "UPDATE imaging_order SET site = 'north'")
    answer = await view.get("/studies")
    assert (answer.status_code, answer.json()["reason"]) == (403, "right-lost")


async def test_a_study_moved_to_another_patient_is_not_shown(
    lightbox: Lightbox, world: World
) -> None:
    """Even one whose patient the same person may see: a session is for one patient."""
    await lightbox.must("service", "PUT", f"/patients/{world.theirs['id']}/care-team/clinician")
    view = await lightbox.open(f"/{world.my_study}")
    change(
        lightbox,
        "UPDATE study SET patient_id = (SELECT patient_id FROM study WHERE study_instance_uid = ?)"
        " WHERE study_instance_uid = ?",
        world.their_study,
        world.my_study,
    )
    answer = await view.get(frame_of(world.my_image), headers={"X-Request-ID": "moved"})
    assert (answer.status_code, answer.json()["reason"]) == (403, "study-moved")
    denied, ended = records(lightbox, "moved")
    assert (denied["action"], denied["outcome"]) == ("study:view", "denied")
    assert (ended["action"], ended["reason"]) == ("session:end", "study-moved")
    assert denied["patient_id"] == ended["patient_id"] == UUID(world.mine["id"]).hex
    await assert_ended(view, "study-moved", world.my_image)


@pytest.mark.parametrize("path", ["/studies", "alive", "another"])
async def test_a_study_that_was_looked_at_and_moved_ends_the_session_wherever_it_asks_next(
    path: str, lightbox: Lightbox, world: World
) -> None:
    await lightbox.must("service", "PUT", f"/patients/{world.theirs['id']}/care-team/clinician")
    other = await another_study(lightbox, world)
    view = await lightbox.open(f"/{world.my_study}")
    for image in (world.my_image, other):
        assert (await view.get(frame_of(image))).is_success
    change(
        lightbox,
        "UPDATE study SET patient_id = ? WHERE study_instance_uid = ?",
        UUID(world.theirs["id"]).hex,
        world.my_study,
    )
    if path == "alive":
        answer = await sign_of_life(view)
    else:
        answer = await view.get(frame_of(other) if path == "another" else path)
    assert (answer.status_code, answer.json()["reason"]) == (403, "study-moved")


# -------------------------------------------------------------------------------- two, and priors


async def test_two_studies_of_a_patient_open_side_by_side(lightbox: Lightbox, world: World) -> None:
    other = (await another_study(lightbox, world))["study_instance_uid"]
    link = await link_to(lightbox, f"/{world.my_study}", compare_with=other)
    assert link["study_instance_uids"] == [world.my_study, other]
    answer = await redeem(lightbox, code_of(link))
    location = httpx.URL(answer.headers["location"]).params
    assert location["StudyInstanceUIDs"] == f"{world.my_study},{other}"
    assert location["hangingProtocolId"] == "@ohif/hpCompare"


async def test_two_patients_never_open_side_by_side(lightbox: Lightbox, world: World) -> None:
    """Not for who may see both; and who may see one learns nothing about the other."""
    await lightbox.must("service", "PUT", f"/patients/{world.theirs['id']}/care-team/both")
    await lightbox.must("service", "PUT", f"/patients/{world.mine['id']}/care-team/both")
    path = f"/api/v1/dicom/viewer/url/{world.my_study}"
    answers = [
        await lightbox.ask(
            "clinician",
            "GET",
            path,
            sub=sub,
            params={"compare_with": uid},
            headers={"X-Request-ID": "same"},
        )
        for sub, uid in (
            ("both", world.their_study),
            ("clinician", world.their_study),
            ("clinician", "2.25.404"),
        )
    ]
    assert [each.status_code for each in answers] == [409, 409, 409]
    assert len({each.content for each in answers}) == 1
    for wrong in (world.my_study, "x", "1.2.3\n", "1" * 65):
        answer = await lightbox.ask("clinician", "GET", path, params={"compare_with": wrong})
        assert answer.status_code == 422
    assert rows(lightbox, "SELECT * FROM launch_session") == []


async def test_priors_are_the_patients_and_nobody_elses(lightbox: Lightbox, world: World) -> None:
    prior = (await another_study(lightbox, world))["study_instance_uid"]
    view = await lightbox.open(f"/order/{world.my_order['id']}")
    later = (await another_study(lightbox, world))["study_instance_uid"]

    async def uids(**params: str) -> set[str]:
        found = (await view.get("/studies", params=params)).json()
        return {row["0020000D"]["Value"][0] for row in found}

    assert await uids() == {world.my_study, prior}
    assert await uids(**{"00100020": "MRN-MINE"}) == {world.my_study, prior}
    assert await uids(**{"00100020": "MRN-VICTIM"}) == set()
    assert await uids(**{"00100020": "*"}) == {world.my_study, prior}
    assert await uids(StudyInstanceUID=world.their_study) == set()
    assert await uids(StudyInstanceUID=f"{world.their_study},{prior}") == {prior}
    assert await uids(StudyInstanceUID=later) == set(), "came after the launch"
    assert (await view.get(f"/studies/{later}/series")).status_code == 404
    assert (await view.get(f"/studies/{prior}/series")).is_success


# ------------------------------------------------------------------------------------ the gateway


async def test_a_search_answers_dicom_json(shared: Shared) -> None:
    asked_before = list(shared.orthanc.requests)
    answer = await shared.mine.get(
        "/studies?limit=101&offset=0&fuzzymatching=false&includefield=00081030,00080060"
        f"&StudyInstanceUID={shared.world.my_study}"
    )
    assert answer.headers["content-type"] == "application/dicom+json"
    (row,) = answer.json()
    assert row["00100020"]["Value"] == ["MRN-MINE"]
    (series,) = (await shared.mine.get(f"/studies/{shared.world.my_study}/series")).json()
    assert series["0020000E"]["Value"] == [shared.world.my_image["series_instance_uid"]]
    assert shared.orthanc.requests == asked_before, "no search reaches Orthanc"


@pytest.mark.parametrize(
    "query",
    [
        "patientid=MRN-VICTIM",
        "PatientID=MRN-MINE&00100020=MRN-VICTIM",
        "PatientID=MRN-MINE&PatientID=MRN-VICTIM",
        "PatientID=&PatientID=MRN-VICTIM",
        "%50atientid=MRN-VICTIM",
        "limit=-1",
        "limit=1&limit=100",
        "offset=x",
        "_method=DELETE",
        "nonsense=",
    ],
)
async def test_a_search_that_orthanc_would_misread_is_refused(query: str, shared: Shared) -> None:
    answer = await shared.mine.get(f"/studies?{query}")
    assert answer.status_code == 422
    assert "MRN" not in answer.text


async def test_pages_of_a_search(lightbox: Lightbox, world: World) -> None:
    for _ in range(4):
        await another_study(lightbox, world)
    view = await lightbox.open(f"/patient/{world.mine['id']}")
    pages = [
        [row["0020000D"]["Value"][0] for row in (await view.get(f"/studies?{query}")).json()]
        for query in ("limit=2", "limit=2&offset=2", "limit=2&offset=4", "limit=2&offset=6")
    ]
    assert [len(page) for page in pages] == [2, 2, 1, 0]
    assert len({uid for page in pages for uid in page}) == 5


async def test_metadata_shows_my_rows_only_and_no_inner_address(
    lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    """Somebody stored a slice in my series in Orthanc itself, and it never came through intake."""
    image = world.my_image
    series = image["series_instance_uid"]
    view = await lightbox.open(f"/{world.my_study}")
    uids = {"study_uid": world.my_study, "series_uid": series}
    fake_orthanc._store(ct_image(patient_id="MRN-MINE", PatientName="Victim^Vera", **uids))
    answer = await view.get(f"/studies/{world.my_study}/series/{series}/metadata")
    assert answer.headers["content-type"] == "application/dicom+json"
    (row,) = answer.json()
    assert row["00080018"]["Value"] == [image["sop_instance_uid"]]
    frames = frame_of(image).removesuffix("/1")
    assert row["7FE00010"]["BulkDataURI"] == f"/s/{view.ctx}/dicom-web{frames}"
    for word in ("localhost", "orthanc", "http", "Victim"):
        assert word not in answer.text


async def test_metadata_of_a_study_under_two_patients_is_shown_to_nobody(
    lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody stored the other patient's slice under my study and series in Orthanc itself."""
    monkeypatch.setattr(freshness, "FRESH_SECONDS", 0.0)
    series = world.my_image["series_instance_uid"]
    view = await lightbox.open(f"/{world.my_study}")
    fake_orthanc._store(
        ct_image(patient_id="MRN-VICTIM", study_uid=world.my_study, series_uid=series)
    )
    answer = await view.get(f"/studies/{world.my_study}/series/{series}/metadata")
    assert answer.status_code == 409
    assert "VICTIM" not in answer.text


OCTETS = "application/octet-stream; transfer-syntax=1.2.840.10008.1.2.1"


@pytest.mark.parametrize(
    ("end", "location", "media_type"),
    [
        ("/frames/1", "/_orthanc-kept/{stamp}{inner}/frames/0/raw", OCTETS),
        ("/rendered", "/_orthanc-image-kept/{stamp}{inner}/frames/0/rendered", "image/jpeg"),
        (
            "/rendered?viewport=256%2C128",
            "/_orthanc-image-kept/{stamp}{inner}/frames/0/rendered?width=256&height=128",
            "image/jpeg",
        ),
        (
            "/frames/1/rendered?quality=50",
            "/_orthanc-image-kept/{stamp}{inner}/frames/0/rendered?quality=50",
            "image/jpeg",
        ),
        (
            "/thumbnail",
            "/_orthanc-image-kept/{stamp}{inner}/frames/0/rendered?width=128&height=128",
            "image/jpeg",
        ),
        ("/bulk/00420011", "/_orthanc{inner}/content/0042-0011", "application/octet-stream"),
        (
            "/bulk/54000100/1/54001010",
            "/_orthanc{inner}/content/5400-0100/0/5400-1010",
            "application/octet-stream",
        ),
    ],
)
async def test_bytes_are_left_to_the_edge(
    end: str, location: str, media_type: str, shared: Shared
) -> None:
    """Each at the one address of Orthanc that it has; what may be kept, under the study's stamp."""
    image = shared.world.my_image
    answer = await shared.mine.get(frame_of(image, INSTANCE + end))
    assert answer.status_code == 200, answer.text
    stamp, inner = "(?P<stamp>[0-9a-f]{16})", f"/instances/{image['orthanc_instance_id']}"
    wanted = re.escape(location).replace(r"\{stamp\}", stamp).replace(r"\{inner\}", inner)
    assert re.fullmatch(wanted, answer.headers["x-accel-redirect"])
    assert answer.headers["content-type"] == media_type
    assert answer.content == b""
    assert answer.headers["cache-control"] == "no-store"
    assert re.fullmatch('"[0-9a-f]{32}"', answer.headers["etag"])


@pytest.mark.parametrize(
    ("end", "location", "part_type"),
    [
        ("/frames/1", "-kept/{stamp}{inner}/frames/0/raw", OCTETS),
        ("", "{inner}/file", "application/dicom; transfer-syntax=1.2.840.10008.1.2.1"),
        ("/bulk/00420011", "{inner}/content/0042-0011", "application/octet-stream"),
    ],
)
async def test_one_part_is_left_to_the_edge_too(
    end: str, location: str, part_type: str, shared: Shared
) -> None:
    """As OHIF asks: the edge puts the bytes between two lines that only the app could choose."""
    image, main_type = shared.world.my_image, part_type.partition(";")[0]
    boundaries = set()
    for accept in (f"multipart/related; type={main_type}; transfer-syntax=*", "multipart/related"):
        path = frame_of(image, INSTANCE + end)
        answer = await shared.mine.get(path, headers={"Accept": accept})
        assert answer.status_code == 200, answer.text
        kind, parameters = parse_options_header(answer.headers["content-type"])
        boundary = parameters[b"boundary"].decode()
        assert (kind, parameters[b"type"]) == (b"multipart/related", main_type.encode())
        assert re.fullmatch("[0-9a-f]{32}", boundary)
        wanted = re.escape(location).replace(r"\{stamp\}", "[0-9a-f]{16}")
        wanted = wanted.replace(r"\{inner\}", f"/instances/{image['orthanc_instance_id']}")
        redirect = answer.headers["x-accel-redirect"]
        assert re.fullmatch(f"/_orthanc-part/{boundary}{wanted}", redirect)
        assert answer.headers["x-lightbox-part"] == part_type
        assert answer.content == b""
        boundaries.add(boundary)
    assert len(boundaries) == 2


async def test_several_frames_and_files_are_parts_of_one_answer(
    lightbox: Lightbox, world: World
) -> None:
    pixels = [bytes([n]) * 512 for n in range(3)]
    image = await another_study(
        lightbox, world, NumberOfFrames=3, PixelData=b"".join(pixels), StudyDescription="cine"
    )
    view = await lightbox.open(f"/{image['study_instance_uid']}")
    for numbers, expected in (("/1,2", [0, 1]), ("/3,1,3", [2, 0, 2]), ("", [0, 1, 2])):
        answer = await view.get(frame_of(image, f"{INSTANCE}/frames{numbers}"))
        assert [each.content for each in parts_of(answer)] == [pixels[n] for n in expected]
        assert {each.media_type for each in parts_of(answer)} == {OCTETS}
        assert "x-accel-redirect" not in answer.headers
        assert answer.headers["cache-control"] == "no-store"
    assert (await view.get(frame_of(image, f"{INSTANCE}/frames/1,4"))).status_code == 404
    for path in ("/studies/{study}", "/studies/{study}/series/{series}"):
        answer = await view.get(frame_of(image, path))
        assert files_of(answer) == [image["orthanc_instance_id"]]
        assert answer.headers["cache-control"] == "no-store"


async def test_metadata_is_there_by_study_series_and_instance(shared: Shared) -> None:
    image, rows = shared.world.my_image, []
    for path in ("/studies/{study}", "/studies/{study}/series/{series}", INSTANCE):
        answer = await shared.mine.get(frame_of(image, f"{path}/metadata"))
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "application/dicom+json"
        rows.append(answer.json())
    assert rows[0] == rows[1] == rows[2]
    assert [row["00080018"]["Value"] for row in rows[0]] == [[image["sop_instance_uid"]]]
    for path in ("/studies/{study}/instances", "/studies/{study}/series/{series}/instances"):
        (row,) = (await shared.mine.get(frame_of(image, path))).json()
        assert row["00080018"]["Value"] == [image["sop_instance_uid"]]
        assert row["00280010"]["Value"] == [16]


@pytest.mark.parametrize(
    ("end", "status"),
    [
        ("/frames/0", 404),
        ("/frames/2", 404),
        ("/frames/1000001", 404),
        ("/frames/1,2", 404),
        ("/frames/1,", 404),
        ("/frames/1%2C1", 404),
        ("/frames/-1", 404),
        ("/frames/x", 404),
        ("/frames/1?quality=1", 422),
        ("/frames", 200),
        ("/frames/1/", 404),
        ("/frames/1/raw", 404),
        ("/frames/0/rendered", 404),
        ("/frames/2/rendered", 404),
        ("/frames/1,1/rendered", 404),
        ("/frames/2/thumbnail", 404),
        ("?x=1", 422),
        ("/", 404),
        ("/file", 404),
        ("/metadata/", 404),
        ("/metadata?includefield=all", 422),
        ("/rendered/", 404),
        ("/rendered?frame=1", 422),
        ("/rendered?annotation=patient", 422),
        ("/rendered?viewport=0,0", 422),
        ("/rendered?viewport=4097,1", 422),
        ("/rendered?viewport=1,2,3", 422),
        ("/rendered?viewport=1", 422),
        ("/rendered?viewport=a,b", 422),
        ("/rendered?viewport=256,256&quality=100", 200),
        ("/bulk/", 404),
        ("/bulk/7fe00010", 404),
        ("/bulk/7FE00010", 404),
        ("/bulk/7FE00010/1", 404),
        ("/bulk/00420011/", 404),
        ("/bulk/system", 404),
        ("/bulk/../file", 404),
        ("/bulk/..%2f..%2fsystem", 404),
        ("/bulk/00420011%00", 422),
        ("/bulk/%30%3042001100", 404),
    ],
)
async def test_only_what_stands_on_the_list_is_answered(
    end: str, status: int, shared: Shared
) -> None:
    answer = await shared.mine.get(frame_of(shared.world.my_image, INSTANCE + end))
    assert answer.status_code == status, answer.text
    assert ("x-accel-redirect" in answer.headers) is (status == 200)


@pytest.mark.parametrize(
    "path",
    [
        "/series",
        "/instances",
        "/patients",
        "/",
        "/studies/",
        "/studies/{mine}/",
        "/studies/{mine}/bulkdata",
        "/studies/{mine}/frames/1",
        "/studies/{mine}/series/{series}/frames/1",
        "/studies/{mine}/rendered/",
        "/studies/{mine}/series/{series}/",
        "/studies/{theirs}",
        "/studies/{theirs}/metadata",
        "/studies/{theirs}/instances",
        "/studies/{theirs}/thumbnail",
        "/studies/{theirs}/rendered",
        "/studies/{mine}/../{theirs}/series",
        "/studies/{mine}/%2e%2e/{theirs}/series",
        "/studies/{mine}%2f..%2f{theirs}/series",
        "/studies/{mine}..%5c{theirs}/series",
        "/studies/{mine}%0a/series",
        "/studies/{mine}%20/series",
        "/studies/{mine},{theirs}/series",
        "/studies/{mine}%2C{theirs}/series",
        "/studies/{mine}%5C{theirs}/series",
        "/studies/*/series",
        "/studies/%2a/series",
        "/studies//series",
        "//studies",
        "/studies/{mine}//series",
        "/studies/1.2.%EF%BC%93/series",
        "/studies/.../series",
        "/STUDIES/{mine}/series",
        "/studies/{encoded}/series",
        "/%73tudies",
        "/%73tudies/{mine}/series",
        "/studies/{mine}/%73eries",
        "/studies/{mine}/series/../../../../api/v1/patients",
        "/../../dicom-web/studies",
        "/wado?requestType=WADO&objectUID=1.2.3",
        "/studies/{mine};x=/series",
    ],
)
async def test_every_other_path_is_refused(path: str, untouched: Shared) -> None:
    world, mine = untouched.world, untouched.mine
    filled = path.format(
        mine=world.my_study,
        encoded=f"%3{world.my_study}",  # its first digit, in another writing
        theirs=world.their_study,
        series=world.my_image["series_instance_uid"],
    )
    # As raw bytes: a client would tidy dots and slashes away.
    raw = f"/s/{mine.ctx}/dicom-web{filled}".encode()
    url = httpx.URL("http://lightbox.test").copy_with(raw_path=raw)
    answer = await untouched.lightbox.client.get(url, headers={"Cookie": mine.cookie})
    assert answer.status_code == 404, answer.text
    assert "x-accel-redirect" not in answer.headers
    assert not [word for word in World.SECRET_WORDS if word in answer.text]


# -------------------------------------------------------------------------------------- the record


async def test_the_first_access_is_recorded_once_however_many_come(
    lightbox: Lightbox, world: World
) -> None:
    view = await lightbox.open(f"/{world.my_study}")
    before = len(await lightbox.audit(action="study:view"))
    answers = await asyncio.gather(*(view.get(frame_of(world.my_image)) for _ in range(20)))
    assert {each.status_code for each in answers} == {200}
    found = (await lightbox.audit(action="study:view"))[: -before or None]
    assert [(each["outcome"], each["ctx"]) for each in found] == [("granted", view.ctx)]
    assert found[0]["study_instance_uid"] == world.my_study
    assert found[0]["actor"] == "clinician"
    await lightbox.app.state.viewer.flush()
    (study,) = rows(lightbox, "SELECT * FROM launch_study WHERE ctx = ?", view.ctx)
    assert study["request_count"] == 20


async def test_each_session_and_each_study_has_its_record(lightbox: Lightbox, world: World) -> None:
    other = await another_study(lightbox, world)
    views = [await lightbox.open(f"/{world.my_study}") for _ in range(2)]
    for view in views:
        for image in (world.my_image, other, world.my_image):
            assert (await view.get(frame_of(image))).is_success
    found = [
        (each["ctx"], each["study_instance_uid"])
        for each in await lightbox.audit(action="study:view", outcome="granted")
        if each["ctx"]
    ]
    uids = (world.my_study, other["study_instance_uid"])
    assert sorted(found) == sorted((view.ctx, uid) for view in views for uid in uids)


async def test_the_end_of_a_session_sums_it_up(lightbox: Lightbox, world: World) -> None:
    other = await another_study(lightbox, world)  # a prior that nobody looks at
    view = await lightbox.open(f"/order/{world.my_order['id']}")
    for _ in range(3):
        await view.get(frame_of(world.my_image))
    path = f"/orders/{world.my_order['id']}"
    await lightbox.must("service", "PATCH", path, json={"status": "cancelled"})
    (record,) = await lightbox.audit(action="session:end")
    assert (record["reason"], record["actor"], record["ctx"]) == (
        "order-cancelled",
        "service",
        view.ctx,
    )
    assert record["patient_id"] == world.mine["id"]
    assert record["detail"]["viewer"] == "clinician"
    (study,) = record["detail"]["studies"]
    assert study["study_instance_uid"] == world.my_study != other["study_instance_uid"]
    assert study["request_count"] == 3
    assert study["first_accessed_at"] <= study["last_accessed_at"]


@pytest.mark.parametrize(
    ("column", "reason"),
    [("expires_at", "expired"), ("last_used_at", "idle"), ("code_expires_at", "unused")],
)
async def test_what_is_over_is_swept_once_with_its_record(
    column: str, reason: str, lightbox: Lightbox, world: World
) -> None:
    if reason == "unused":
        await link_to(lightbox, f"/{world.my_study}")
    else:
        await lightbox.open(f"/{world.my_study}")
    viewer = lightbox.app.state.viewer
    assert await viewer.sweep(Origin("early")) == 0
    change(lightbox, f"UPDATE launch_session SET {column} = ?", moment(hours=-2))  # noqa: S608
    assert await viewer.sweep(Origin("sweeps")) == 1
    assert await viewer.sweep(Origin("again")) == 0
    assert [each["reason"] for each in records(lightbox, "sweeps")] == [reason]
    assert outcomes(lightbox, "sweeps") == [("session:end", "done")]


async def test_counts_are_written_at_the_end_of_the_process(
    sqlite_url: str, fake_orthanc: FakeOrthanc
) -> None:
    async with running(make_settings(sqlite_url, URL)) as lightbox:
        world = await make_world(lightbox)
        view = await lightbox.open(f"/{world.my_study}")
        await view.get(frame_of(world.my_image))
    (study,) = rows(lightbox, "SELECT * FROM launch_study WHERE ctx = ?", view.ctx)
    assert study["request_count"] == 1
