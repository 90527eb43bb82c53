"""Glass, merges and open viewers at the same moment, on both databases.

`two` are two app instances on one PostgreSQL. On SQLite, which has one process, both are the same.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import psycopg
import pytest
import sqlalchemy as sa
from pydantic import SecretStr
from sqlmodel import col, select

from app.models import (
    BrokenGlass,
    CareTeamMember,
    LaunchSession,
    Notification,
    Order,
    OrderStudy,
    Restriction,
    Study,
)
from tests.images import ct_image
from tests.lightbox import Lightbox, Opened, running
from tests.live.conftest import (
    Archive,
    DatabaseUrls,
    Person,
    audit_of,
    make_person,
    settings_for,
    unique,
)
from tests.live.test_databases import at_once
from tests.pdp import SECRET, Pdp

pytestmark = pytest.mark.anyio
API = "/api/v1"
WHY = {"reason_code": "emergency-treatment", "reason_text": "Unconscious in the emergency room."}
Two = tuple[Lightbox, Lightbox]


@pytest.fixture
async def two(database: DatabaseUrls, archive: Archive, tmp_path: Path) -> AsyncIterator[Two]:
    settings = settings_for(database.app, archive.server, spool_dir=tmp_path)
    async with running(settings) as one:
        if not database.is_postgres:
            yield one, one
            return
        async with running(settings) as other:
            yield one, other


async def kept(lightbox: Lightbox, query: Any) -> list[Any]:
    """What is committed, by a session of the test's own."""
    async with lightbox.app.state.database.session() as session:
        return list(await session.exec(query))


async def break_glass(lightbox: Lightbox, patient: Any, sub: str) -> httpx.Response:
    path = f"{API}/patients/{patient['id']}/break-glass"
    return await lightbox.ask("clinician", "POST", path, sub=sub, json=WHY)


async def merge(lightbox: Lightbox, source: Any, into: Any) -> httpx.Response:
    body = {"into": into["id"], "reason": "the same person"}
    return await lightbox.ask("service", "POST", f"{API}/patients/{source['id']}/merge", json=body)


async def restrict(lightbox: Lightbox, patient: Any, level: str, *named: str) -> None:
    body = {"level": level, "named": list(named)}
    await lightbox.must("service", "PUT", f"/patients/{patient['id']}/restriction", json=body)


async def with_image(lightbox: Lightbox) -> tuple[Person, Any]:
    person = await make_person(lightbox)
    sent = await lightbox.upload(ct_image(patient_id=person.mrn), order_id=person.order["id"])
    assert sent.status_code == 200, sent.text
    return person, sent.json()


def frame_of(image: Any) -> str:
    return (
        f"/studies/{image['study_instance_uid']}/series/{image['series_instance_uid']}"
        f"/instances/{image['sop_instance_uid']}/frames/1"
    )


async def may_read(lightbox: Lightbox, sub: str, patient: Any) -> bool:
    answer = await lightbox.ask("clinician", "GET", f"{API}/patients/{patient['id']}", sub=sub)
    assert answer.status_code in (200, 403), answer.text
    return answer.status_code == 200


# --------------------------------------------------------------------------- the same moment


async def test_of_six_breaks_of_the_glass_at_once_one_counts(two: Two) -> None:
    """As one would: one grant, one alert, one record that it was done."""
    person, image = await with_image(two[0])
    answers = await at_once(*(break_glass(two[n % 2], person.patient, "third") for n in range(6)))
    assert sorted(each.status_code for each in answers) == [200] + [409] * 5
    said = next(each.json() for each in answers if each.is_success)
    assert {each.json()["expires_at"] for each in answers if not each.is_success} == {
        said["expires_at"].replace("Z", "+00:00")
    }
    (grant,) = await kept(two[1], select(BrokenGlass))
    assert (str(grant.id), grant.sub) == (said["id"], "third")
    alerts = await kept(two[1], select(Notification))
    assert [each.event for each in alerts] == ["break-glass"]
    records = await two[0].audit(action="glass:break")
    assert len(audit_of(records, "glass:break", "done")) == 1
    assert len(audit_of(records, "glass:break", "failed")) == 5
    for each in two:
        link = await each.ask(
            "clinician",
            "GET",
            f"{API}/dicom/viewer/url/{image['study_instance_uid']}",
            sub="third",
        )
        assert link.status_code == 200
    # For another patient, and for somebody else, it is nothing.
    another = await two[0].patient(unique())
    assert not await may_read(two[1], "third", another)
    assert not await may_read(two[1], "fourth", person.patient)


async def test_what_meets_a_merge_is_the_survivors_or_refused(two: Two) -> None:
    """Launch, upload, order, care team, restriction, glass and merge at once: nothing is left with
    who was retired, nobody gets past the restriction, and each answer holds."""
    one, other = two
    for _ in range(3):
        theirs, image = await with_image(one)
        mine, _ = await with_image(one)
        await restrict(one, mine.patient, "vip", "clinician")
        old = theirs.patient["id"]
        uid = image["study_instance_uid"]
        answers = await at_once(
            break_glass(other, theirs.patient, "third"),
            other.ask("clinician", "GET", f"{API}/dicom/viewer/url/{uid}"),
            other.ask("service", "PUT", f"{API}/patients/{old}/care-team/fourth", json={}),
            merge(one, theirs.patient, mine.patient),
            other.upload(ct_image(patient_id=theirs.mrn), order_id=theirs.order["id"]),
            other.ask("service", "POST", f"{API}/orders", json={"patient_id": old}),
            break_glass(other, mine.patient, "fifth"),
            other.ask("service", "PUT", f"{API}/patients/{old}/restriction", json={"level": "vip"}),
        )
        assert {each.status_code for each in answers} <= {200, 201, 409}, [
            each.text for each in answers if each.status_code not in (200, 201, 409)
        ]
        assert answers[3].status_code == 200
        tables: list[Any] = [BrokenGlass, CareTeamMember, LaunchSession, Order, Restriction, Study]
        for table in tables:
            left = select(table.patient_id).where(table.patient_id == UUID(old))
            assert await kept(one, left) == [], table
        # The survivor is restricted, for both. A glass that was broken for the retired one before
        # the merge does not open it; one that was broken by the old id afterwards does.
        assert not await may_read(one, "fourth", mine.patient)
        broke = answers[0].is_success and answers[3].json()["moved"]["glass"] == 0
        assert await may_read(one, "third", mine.patient) is broke
        if not answers[7].is_success:  # the retired one's record was not restricted
            assert await may_read(one, "fifth", mine.patient) is answers[6].is_success
        crossing = await kept(
            one,
            select(OrderStudy.order_id)
            .join(Order, col(Order.id) == col(OrderStudy.order_id))
            .join(Study, col(Study.study_instance_uid) == col(OrderStudy.study_instance_uid))
            .where(col(Order.patient_id) != col(Study.patient_id)),
        )
        assert crossing == []


async def blocked_or_done(url: str, request: asyncio.Task[Any]) -> None:
    """Until the request waits for a lock in the database, or is answered."""
    # Of rows: not of the trail's turn, which is an advisory lock.
    query = (
        "SELECT count(*) FROM pg_locks JOIN pg_stat_activity USING (pid) WHERE NOT granted"
        " AND locktype IN ('transactionid', 'tuple') AND datname = current_database()"
    )
    deadline = time.monotonic() + 60
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        while time.monotonic() < deadline and not request.done():
            row = await (await connection.execute(query)).fetchone()
            if row and row[0]:
                return
            await asyncio.sleep(0.02)
    assert request.done(), "neither waiting nor answered"


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
@pytest.mark.parametrize("of", ["retired", "survivor"])
async def test_who_is_taken_off_the_team_while_it_is_joined_stays_off(
    of: str, two: Two, database: DatabaseUrls
) -> None:
    """Taken off by a transaction that ends while the merge goes on: `third` altogether, `fourth` of
    the one, so that what is left of them is limited."""
    one, _ = two
    theirs, mine = await one.patient(unique()), await one.patient(unique())
    taken_from, other = (theirs, mine) if of == "retired" else (mine, theirs)
    soon = f"{datetime.now(UTC) + timedelta(hours=1):%Y-%m-%dT%H:%M:%SZ}"
    for patient, sub, body in (
        (taken_from, "third", {}),
        (taken_from, "fourth", {}),
        (other, "fourth", {"expires_at": soon}),
    ):
        await one.must("service", "PUT", f"/patients/{patient['id']}/care-team/{sub}", json=body)
    url = database.owner.replace("postgresql+psycopg", "postgresql")
    async with await psycopg.AsyncConnection.connect(url) as taking_off:
        await taking_off.execute(
            "DELETE FROM care_team_member WHERE patient_id = %s", (UUID(taken_from["id"]),)
        )
        merging = asyncio.create_task(merge(one, theirs, mine))
        await blocked_or_done(url, merging)
        await taking_off.commit()
    assert (await merging).status_code == 200
    (left,) = await kept(one, select(CareTeamMember))
    assert (left.sub, str(left.patient_id)) == ("fourth", mine["id"])
    assert left.expires_at == datetime.fromisoformat(soon)


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
async def test_a_merge_waits_for_what_is_being_filed(two: Two, database: DatabaseUrls) -> None:
    one, _ = two
    theirs, mine = await one.patient(unique()), await one.patient(unique())
    url = database.owner.replace("postgresql+psycopg", "postgresql")
    async with await psycopg.AsyncConnection.connect(url) as filing:
        await filing.execute(
            "INSERT INTO care_team_member VALUES (%s, 'third', '', NULL, now(), 'somebody')",
            (UUID(theirs["id"]),),
        )
        merging = asyncio.create_task(merge(one, theirs, mine))
        await blocked_or_done(url, merging)
        assert not merging.done()
        await filing.commit()
    assert (await merging).status_code == 200
    (member,) = await kept(one, select(CareTeamMember))
    assert (member.sub, str(member.patient_id)) == ("third", mine["id"])


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
async def test_a_second_break_waits_for_the_first_and_sees_it(
    two: Two, database: DatabaseUrls
) -> None:
    one, _ = two
    patient = await one.patient(unique())
    url = database.owner.replace("postgresql+psycopg", "postgresql")
    async with await psycopg.AsyncConnection.connect(url) as first:
        await first.execute(
            "SELECT id FROM patient WHERE id = %s FOR UPDATE", (UUID(patient["id"]),)
        )
        second = asyncio.create_task(break_glass(one, patient, "third"))
        await blocked_or_done(url, second)
        assert not second.done()
        await first.execute(
            "INSERT INTO broken_glass (id, patient_id, sub, name, roles, reason_code, reason_text,"
            " opens_sealed, broken_at, expires_at, reviewed_by, review_comment) VALUES"
            " (gen_random_uuid(), %s, 'third', '', 'clinician', 'other', '', false, now(),"
            " now() + interval '1 hour', '', '')",
            (UUID(patient["id"]),),
        )
        await first.commit()
    assert (await second).status_code == 409
    assert len(await kept(one, select(BrokenGlass))) == 1
    assert await kept(one, select(Notification)) == []


# ------------------------------------------------------------------------- the next request


async def frame(lightbox: Lightbox, view: Opened, image: Any) -> httpx.Response:
    """One frame of a viewer, asked of this instance."""
    return await Opened(lightbox, view.link, view.code, view.ctx, view.cookie).get(frame_of(image))


@pytest.mark.parametrize("level", ["vip", "sealed"])
async def test_a_restriction_counts_everywhere_from_the_next_request_on(
    level: str, two: Two
) -> None:
    one, other = two
    person, image = await with_image(one)
    view = await one.open(f"/{image['study_instance_uid']}")
    lists = (
        f"{API}/patients",
        f"{API}/orders",
        f"{API}/dicom/studies",
        "/dicom-web/studies",
        f"{API}/patients?mrn={person.mrn}",
    )
    for path in lists:
        assert len((await other.ask("clinician", "GET", path)).json()) == 1, path
    frames = f"/dicom-web{frame_of(image)}"
    assert (await frame(other, view, image)).status_code == 200
    assert (await other.ask("clinician", "GET", frames)).status_code == 200
    await restrict(one, person.patient, level, "somebody")
    for path in lists:
        answer = await other.ask("clinician", "GET", path)
        assert answer.json() == [], path
        assert answer.headers.get("x-total-count", "0") == "0"
        assert "link" not in answer.headers
    assert (await other.ask("clinician", "GET", frames)).status_code == 404
    for where in (other, one):
        ended = await frame(where, view, image)
        assert (ended.status_code, ended.json()["reason"]) == (403, "restricted")
    for path in (
        f"{API}/patients/{person.patient['id']}",
        f"{API}/orders/{person.order['id']}",
        f"{API}/dicom/viewer/url/{image['study_instance_uid']}",
    ):
        assert (await other.ask("clinician", "GET", path)).status_code == 403
    broken = await break_glass(other, person.patient, "clinician")
    assert broken.status_code == (200 if level == "vip" else 403)
    assert (await frame(one, view, image)).status_code == 403, "an ended viewer stays ended"
    await one.must("service", "DELETE", f"/patients/{person.patient['id']}/restriction")
    assert (await frame(one, view, image)).status_code == 403
    assert await may_read(other, "clinician", person.patient)


# ------------------------------------------------------------------------------ the EHR's say


@pytest.fixture(scope="module")
def pdp() -> Iterator[Pdp]:
    with Pdp() as each:
        yield each


async def test_a_denial_or_silence_of_the_ehr_opens_nothing(
    database: DatabaseUrls, archive: Archive, tmp_path: Path, pdp: Pdp
) -> None:
    pdp.switch()
    settings = settings_for(
        database.app,
        archive.server,
        spool_dir=tmp_path,
        policy_url=pdp.url,
        policy_secret=SecretStr(SECRET),
        policy_timeout_seconds=0.5,
        policy_cache_seconds=0,
    )
    async with running(settings) as box:
        person, image = await with_image(box)
        view = await box.open(f"/{image['study_instance_uid']}")
        patient, frames = f"{API}/patients/{person.patient['id']}", f"/dicom-web{frame_of(image)}"
        assert (await view.get(frame_of(image))).status_code == 200
        assert (await box.ask("clinician", "GET", frames)).status_code == 200
        for mode in ("silent", "error"):
            pdp.switch(mode=mode)
            asked = [
                await view.get(frame_of(image)),
                await view.get("/studies"),
                await box.ask("clinician", "GET", frames),
                await box.ask("clinician", "GET", patient),
                await box.ask("clinician", "GET", f"{API}/patients"),
                await break_glass(box, person.patient, "clinician"),  # who is tied
                await break_glass(box, person.patient, "third"),  # who is not
            ]
            assert [each.status_code for each in asked] == [503] * len(asked), mode
            assert not [each for each in asked if person.mrn in each.text]
        assert await kept(box, select(BrokenGlass)) == []
        pdp.switch()
        assert (await view.get(frame_of(image))).status_code == 200, "the session lives on"
        pdp.switch(person.mrn)
        denied = [
            (await box.ask("clinician", "GET", frames)).status_code,
            (await box.ask("clinician", "GET", patient)).status_code,
            (await break_glass(box, person.patient, "clinician")).status_code,
            (await break_glass(box, person.patient, "third")).status_code,
        ]
        assert denied == [404, 403, 403, 403]
        assert (await box.ask("clinician", "GET", f"{API}/patients")).json() == []
        assert await kept(box, select(BrokenGlass)) == []
        assert await kept(box, select(Notification)) == []
        ended = await view.get(frame_of(image))
        assert (ended.status_code, ended.json()["reason"]) == (403, "right-lost")
        (because,) = await kept(box, sa.select(col(LaunchSession.ended_because)))
        assert because[0] == "right-lost"
        pdp.switch()
        assert (await view.get(frame_of(image))).status_code == 403
