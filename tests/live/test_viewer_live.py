"""Open viewers on real parts: one per tab, one person's, and over the moment they should be."""

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import httpx
import pytest

import app.viewer.glances
import app.viewer.sessions
from app.db import utcnow
from tests.images import ct_image
from tests.lightbox import Lightbox, Opened
from tests.live.conftest import Edged, Full, Person, make_person, unique


@dataclass
class Shown:
    """A patient whose images are open in a viewer."""

    person: Person
    uploaded: Any
    opened: Opened

    @property
    def frame(self) -> str:
        return (
            f"/studies/{self.uploaded['study_instance_uid']}"
            f"/series/{self.uploaded['series_instance_uid']}"
            f"/instances/{self.uploaded['sop_instance_uid']}/frames/1"
        )

    async def status(self) -> int:
        return (await self.opened.get(self.frame)).status_code


async def show(lightbox: Lightbox, **order: Any) -> Shown:
    person = await make_person(lightbox, **order)
    answer = await lightbox.upload(ct_image(patient_id=person.mrn), order_id=person.order["id"])
    opened = await lightbox.open(f"/order/{person.order['id']}")
    return Shown(person, answer.json(), opened)


# ------------------------------------------------------------------------------- a real browser


@pytest.fixture
async def browser(full: Full) -> AsyncIterator[httpx.AsyncClient]:
    """A client that keeps its cookies by their path, as browsers do."""
    async with httpx.AsyncClient(
        base_url=full.settings.viewer_base_url, trust_env=False, timeout=30.0
    ) as client:
        yield client


async def link_to(through_edge: Edged, shown: Shown) -> str:
    order = shown.person.order["id"]
    link = await through_edge.must("clinician", "GET", f"/dicom/viewer/url/order/{order}")
    return str(link["url"])


async def test_two_tabs_do_not_overwrite_each_other(
    through_edge: Edged, browser: httpx.AsyncClient
) -> None:
    """The cookie is limited to its launch; each tab reads its own patient only."""
    tabs = []
    for _ in range(2):
        shown = await show(through_edge)
        answer = await browser.get(await link_to(through_edge, shown))
        assert answer.status_code == 303
        cookie = answer.headers["set-cookie"].lower()
        ctx = httpx.URL(answer.headers["location"]).params["ctx"]
        for attribute in (f"path=/s/{ctx.lower()}/", "httponly", "samesite=strict"):
            assert attribute in cookie
        assert "launch" not in answer.headers["location"]
        assert answer.headers["referrer-policy"] == "no-referrer"
        page = await browser.get(answer.headers["location"])
        assert (page.status_code, "the viewer" in page.text) == (200, True)
        tabs.append((ctx, shown))
    for ctx, shown in tabs:
        assert (await browser.get(f"/s/{ctx}/dicom-web{shown.frame}")).status_code == 200
        for other_ctx, other in tabs:
            if other_ctx != ctx:
                foreign = await browser.get(f"/s/{ctx}/dicom-web{other.frame}")
                assert foreign.status_code == 404


async def test_a_link_opens_once(through_edge: Edged, browser: httpx.AsyncClient) -> None:
    shown = await show(through_edge)
    url = await link_to(through_edge, shown)
    assert (await browser.get(url)).status_code == 303
    again = await browser.get(url)
    assert (again.status_code, "used already" in again.text) == (410, True)
    assert again.headers["content-type"].startswith("text/html")
    assert "no-store" in again.headers["cache-control"]
    assert "set-cookie" not in again.headers
    for bad in ("unknown", "x" * 200):
        answer = await browser.get(f"/viewer?launch={bad}")
        assert answer.status_code in (404, 422), bad
        assert "set-cookie" not in answer.headers


async def test_another_sessions_cookie_opens_nothing(through_edge: Edged) -> None:
    first, second = await show(through_edge), await show(through_edge)
    for cookie in (second.opened.cookie, "lightbox=", "lightbox=x", "other=1"):
        answer = await first.opened.get(first.frame, cookie=cookie)
        assert answer.status_code == 401, cookie
    assert await first.status() == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
async def test_the_viewer_only_reads(through_edge: Edged, method: str) -> None:
    shown = await show(through_edge)
    for path in ("/studies", shown.frame):
        answer = await through_edge.viewer.client.request(
            method,
            f"/s/{shown.opened.ctx}/dicom-web{path}",
            headers={"Cookie": shown.opened.cookie},
        )
        assert answer.status_code == 405
    assert await shown.status() == 200


async def test_an_archive_that_is_down_is_said_so(through_edge: Edged, full: Full) -> None:
    """Bytes that can't be fetched are a 503 that helps, and the viewer goes on when it is back."""
    shown = await show(through_edge)
    server = full.edge.orthanc
    server.stop()
    try:
        answer = await shown.opened.get(shown.frame)
        assert answer.status_code == 503
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.headers["retry-after"]
        assert str(server.http_port) not in answer.text
    finally:
        server.start()
        server.wait_until_ready()
    assert await shown.status() == 200


# -------------------------------------------------------------------------------- being over

End = Callable[[Lightbox, Shown], Awaitable[object]]


async def cancel_order(lightbox: Lightbox, shown: Shown) -> object:
    order = shown.person.order["id"]
    return await lightbox.must("service", "PATCH", f"/orders/{order}", json={"status": "cancelled"})


async def delete_study(lightbox: Lightbox, shown: Shown) -> object:
    uid = shown.uploaded["study_instance_uid"]
    return await lightbox.must("service", "DELETE", f"/dicom/studies/{uid}?reason=a+mistake")


async def take_over(lightbox: Lightbox, shown: Shown) -> object:
    order = shown.person.order["id"]
    return await lightbox.must(
        "service", "PATCH", f"/orders/{order}", json={"requested_by": "other"}
    )


ENDS = [
    pytest.param(cancel_order, "order-cancelled", "cancelled", id="order-cancelled"),
    pytest.param(delete_study, "study-deleted", "deleted", id="study-deleted"),
    pytest.param(take_over, "right-lost", "no longer have access", id="right-lost"),
]


@pytest.mark.parametrize(("end", "reason", "words"), ENDS)
async def test_a_viewer_is_over_at_the_next_request(
    live: Lightbox, end: End, reason: str, words: str
) -> None:
    """And a link that was not opened yet opens nothing; the page says why."""
    shown = await show(live)
    unopened = await live.must(
        "clinician", "GET", f"/dicom/viewer/url/order/{shown.person.order['id']}"
    )
    assert await shown.status() == 200
    await end(live, shown)
    for path in (shown.frame, "/studies"):
        answer = await shown.opened.get(path)
        assert (answer.status_code, answer.json()["reason"]) == (403, reason)
    page = await live.client.get("/viewer", params={"ctx": shown.opened.ctx})
    assert page.status_code == 303
    page = await live.client.get(page.headers["location"])
    assert (page.status_code, words in page.text) == (200, True)
    code = unopened["url"].partition("launch=")[2]
    late = await live.client.get("/viewer", params={"launch": code})
    assert late.status_code == 403
    assert "set-cookie" not in late.headers
    (record, *_) = await live.audit(patient_id=shown.person.patient["id"], action="session:end")
    assert record["reason"] == reason


async def test_leaving_the_care_team_ends_it(live: Lightbox) -> None:
    person = await make_person(live, requested_by="somebody-else")
    member = f"/patients/{person.patient['id']}/care-team/dr.team"
    await live.must("service", "PUT", member, json={})
    await live.upload(ct_image(patient_id=person.mrn), order_id=person.order["id"])
    opened = await live.open(f"/patient/{person.patient['id']}", sub="dr.team")
    assert (await opened.get("/studies")).status_code == 200
    await live.must("service", "DELETE", member)
    answer = await opened.get("/studies")
    assert (answer.status_code, answer.json()["reason"]) == (403, "right-lost")
    # Back on the team: a new launch, never the old one.
    await live.must("service", "PUT", member, json={})
    assert (await opened.get("/studies")).status_code == 403
    await live.open(f"/patient/{person.patient['id']}", sub="dr.team")


def move_clock(patch: pytest.MonkeyPatch, later: timedelta) -> None:
    """What the viewer's sessions take for now."""
    for module in (app.viewer.sessions, app.viewer.glances):
        patch.setattr(module, "utcnow", lambda: utcnow() + later)


TIMES = [
    pytest.param(timedelta(minutes=59), 200, "", id="still-used"),
    pytest.param(timedelta(minutes=61), 403, "idle", id="idle"),
    pytest.param(timedelta(hours=12, seconds=1), 403, "expired", id="absolute"),
]


@pytest.mark.parametrize(("later", "status", "reason"), TIMES)
async def test_the_limits_of_time(
    live: Lightbox,
    monkeypatch: pytest.MonkeyPatch,
    later: timedelta,
    status: int,
    reason: str,
) -> None:
    shown = await show(live)
    assert await shown.status() == 200
    move_clock(monkeypatch, later)
    answer = await shown.opened.get(shown.frame)
    assert answer.status_code == status
    if reason:
        assert answer.json()["reason"] == reason


async def test_a_viewer_slides_while_it_is_used_and_ends_all_the_same(
    live: Lightbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A radiologist reads for hours, a forgotten tab with a running cine doesn't for ever."""
    shown = await show(live)
    seen = []
    for half_hours in range(26):
        later = timedelta(minutes=30 * half_hours)
        move_clock(monkeypatch, later)
        seen.append(await shown.status())
    assert seen == [200] * 24 + [403] * 2


async def test_a_link_is_good_for_a_minute(live: Lightbox, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = await show(live)
    for seconds, status in ((58, 303), (61, 403)):
        link = await live.must(
            "clinician", "GET", f"/dicom/viewer/url/order/{shown.person.order['id']}"
        )
        with monkeypatch.context() as later:
            moment = timedelta(seconds=seconds)
            move_clock(later, moment)
            code = link["url"].partition("launch=")[2]
            answer = await live.client.get("/viewer", params={"launch": code})
        live.client.cookies.clear()
        assert answer.status_code == status, answer.text
    assert "not opened in time" in answer.text


# ------------------------------------------------------------------------------ what it shows


async def test_priors_are_the_patients_own(live: Lightbox) -> None:
    """A launch for an order brings the patient's other studies, and no other patient's."""
    shown, stranger = await show(live), await show(live)
    person = shown.person
    prior_order = await live.order(person.patient)
    prior = (
        await live.upload(
            ct_image(patient_id=person.mrn, StudyDate="20200101"), order_id=prior_order["id"]
        )
    ).json()["study_instance_uid"]
    opened = await live.open(f"/order/{person.order['id']}")
    assert opened.link["study_instance_uids"] == [shown.uploaded["study_instance_uid"]]
    rows = (await opened.get(f"/studies?00100020={person.mrn}")).json()
    assert {row["0020000D"]["Value"][0] for row in rows} == {
        prior,
        shown.uploaded["study_instance_uid"],
    }
    theirs = stranger.uploaded["study_instance_uid"]
    assert (await opened.get(f"/studies?StudyInstanceUID={theirs}")).json() == []
    assert (await opened.get(f"/studies/{theirs}/series")).status_code == 404
    # What comes later is not part of this launch.
    later = (await live.upload(ct_image(patient_id=person.mrn), order_id=prior_order["id"])).json()[
        "study_instance_uid"
    ]
    assert (await opened.get(f"/studies/{later}/series")).status_code == 404
    both = await live.must("clinician", "GET", f"/dicom/viewer/url/{prior}?compare_with={later}")
    assert both["study_instance_uids"] == [prior, later]
    mixed = await live.ask(
        "radiologist", "GET", f"/api/v1/dicom/viewer/url/{prior}?compare_with={theirs}"
    )
    assert mixed.status_code == 409


async def test_no_link_without_images(live: Lightbox) -> None:
    """Said before the viewer opens, in words."""
    person = await make_person(live)
    for subject in (f"order/{person.order['id']}", f"patient/{person.patient['id']}"):
        answer = await live.ask("clinician", "GET", f"/api/v1/dicom/viewer/url/{subject}")
        assert (answer.status_code, "no images yet" in answer.json()["detail"]) == (404, True)


async def test_text_outside_of_ascii_comes_through(live: Lightbox) -> None:
    """Names in the tables, the search and the metadata, in whatever the file was written."""
    mrn = unique()
    patient = await live.patient(mrn, first_name="Jürgen", last_name="Çelik-山田")
    order = await live.order(patient)
    answer = await live.upload(
        ct_image(
            patient_id=mrn, SpecificCharacterSet="ISO_IR 192", PatientName="Çelik-山田^Jürgen"
        ),
        order_id=order["id"],
    )
    assert (answer.status_code, answer.json()["warnings"]) == (200, [])
    coerced = await live.upload(
        ct_image(patient_id="ELSE"), order_id=order["id"], coerce_patient="true"
    )
    assert coerced.status_code == 200, coerced.text
    opened = await live.open(f"/patient/{patient['id']}")
    rows = (await opened.get("/studies")).json()
    assert [row["00100010"]["Value"][0]["Alphabetic"] for row in rows] == ["Çelik-山田^Jürgen"] * 2
    for each in (answer.json(), coerced.json()):
        path = f"/studies/{each['study_instance_uid']}/series/{each['series_instance_uid']}"
        (row,) = (await opened.get(f"{path}/metadata")).json()
        assert row["00100010"]["Value"][0]["Alphabetic"] == "Çelik-山田^Jürgen"
