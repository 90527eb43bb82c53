"""Two decide about one study at the same moment: one wins, and the other is told what happened.

On PostgreSQL each asks an app of their own; on SQLite, which has one process, both the same. Each
pair is tried many times, one a random moment after the other. Afterwards the links, the trail and
the archive must agree.
"""

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
import sqlalchemy as sa
from sqlmodel import select

from app.arrivals import index
from app.db import insert_if_absent
from app.models import Arrival, ArrivalCandidate
from tests.lightbox import Lightbox, running
from tests.live.arrivals import QuickOrthanc, count_of, ordered, slices
from tests.live.conftest import (
    Archive,
    DatabaseUrls,
    command,
    environment_of,
    settings_for,
    unique,
)

ROUNDS = int(os.environ.get("ROUNDS", "6"))  # of each pair
LATEST_SECONDS = 0.2  # how much later the second one asks, at most

Step = Awaitable[Any]


@dataclass
class Case:
    """A study that came past Lightbox, and who it may be of."""

    files: list[bytes]
    people: list[Any] = field(default_factory=list)
    orders: list[Any] = field(default_factory=list)
    is_looked_at: bool = True
    study_id: str = ""  # Orthanc's
    uid: str = ""
    version: int = 0
    state: str = ""

    def take(self, row: Arrival) -> None:
        self.uid, self.version, self.state = row.study_instance_uid, row.version, row.state


@dataclass
class Both:
    """Two apps on one database and one archive, and what the rounds came to."""

    one: Lightbox
    other: Lightbox
    archive: Archive
    chance: random.Random
    outcomes: Counter[str] = field(default_factory=Counter)

    async def rounds(self, make: Callable[[int], Awaitable["Case"]]) -> AsyncIterator["Case"]:
        """The cases of all rounds, each when its study is stable and was looked at."""
        cases = [await make(number) for number in range(ROUNDS)]
        for case in cases:  # all at first, so that they become stable side by side
            (case.study_id,) = {self.archive.store(each)["ParentStudy"] for each in case.files}
        for case in cases:
            await self._arrived(case)
            yield case

    async def _arrived(self, case: "Case") -> None:
        """Its images came past Lightbox, and were looked at."""
        state = self.one.app.state

        async def stable() -> bool:
            held = await state.orthanc.held(case.study_id)
            return held is not None and held.stable

        await until(stable)
        held = await state.orthanc.held(case.study_id)
        assert held is not None
        async with state.database.writing_session() as session:
            await index.note(session, held, stable=True)
            await session.commit()
        if case.is_looked_at:
            await self.look(self.one, case.study_id)
        case.take(await self.row(case.study_id))

    async def row(self, study_id: str) -> Arrival:
        async with self.one.app.state.database.session() as session:
            query = select(Arrival).where(Arrival.orthanc_id == study_id)
            found: Arrival = (await session.exec(query)).one()
            return found

    async def look(self, lightbox: Lightbox, study_id: str) -> None:
        await lightbox.app.state.follower.look(study_id)

    async def at_once(self, first: Step, second: Step) -> tuple[Any, Any]:
        async def late(step: Step, seconds: float) -> Any:
            await asyncio.sleep(seconds)  # the random offset
            return await step

        offsets = [0.0, self.chance.uniform(0.0, LATEST_SECONDS)]
        self.chance.shuffle(offsets)
        both = (late(step, seconds) for step, seconds in zip((first, second), offsets, strict=True))
        return tuple(await asyncio.gather(*both))

    async def decide(
        self, lightbox: Lightbox, who: str, uid: str, what: str, **body: Any
    ) -> httpx.Response:
        path = f"/api/v1/reconciliation/{uid}/{what}"
        return await lightbox.ask("radiologist", "POST", path, sub=who, json=body)

    def told(self, *answers: httpx.Response) -> list[httpx.Response]:
        """Those that won; the others were told what happened."""
        won = [each for each in answers if each.status_code == 200]
        for each in answers:
            if each.status_code == 200:
                continue
            said = each.json()
            assert each.status_code == 409, each.text
            informed = {"state", "version", "decided_by", "decision"} <= said.keys()
            assert informed or "is making a copy" in said["detail"], said
        self.outcomes[" ".join(sorted(str(each.status_code) for each in answers))] += 1
        return won

    async def agrees(self, study_id: str, uid: str) -> Arrival:
        """Links, trail and archive agree about a study; its row."""
        row = await self.row(study_id)
        async with self.one.app.state.database.session() as session:
            connection = await session.connection()

            async def rows(text: str) -> list[Any]:
                return list(await connection.execute(sa.text(text), {"uid": uid}))

            study = await rows("SELECT patient_id FROM study WHERE study_instance_uid = :uid")
            orders = await rows("SELECT order_id FROM order_study WHERE study_instance_uid = :uid")
            linked = await rows("SELECT orthanc_id FROM instance WHERE study_instance_uid = :uid")
            records = await rows(
                "SELECT reason FROM audit_record WHERE study_instance_uid = :uid AND outcome ="
                " 'done' AND action IN ('study:link', 'study:coerce') ORDER BY id"
            )
        is_linked = row.state == "linked"
        assert (len(study), bool(linked)) == (int(is_linked), is_linked)
        assert len(orders) == (1 if row.order_id else 0)
        there = {
            each["ID"] for each in self.archive.ask("GET", f"/studies/{study_id}/instances").json()
        }
        assert {each.orthanc_id for each in linked} <= there
        # Made, undone, made...: the trail tells the same story.
        story = [
            "undone" if each.reason == "undone" else "made"
            for each in records
            if each.reason != "rejected"
        ]
        assert story == [("made", "undone")[number % 2] for number in range(len(story))]
        assert bool(story and story[-1] == "made") == is_linked
        assert await count_of(self.one, uid) == len(linked)
        return row


async def until(what: Callable[[], Awaitable[bool]], seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not await what():
        assert time.monotonic() < deadline, "never came"
        await asyncio.sleep(0.02)


@pytest.fixture
async def both(
    database: DatabaseUrls,
    archive_of_quick_studies: Archive,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> AsyncIterator[Both]:
    settings = settings_for(
        database.app,
        archive_of_quick_studies.server,
        spool_dir=tmp_path,
        migration_database_url=database.owner,
    )
    seed = random.Random(request.node.name).randrange(2**32)
    async with AsyncExitStack() as stack:
        one = await stack.enter_async_context(running(settings))
        other = await stack.enter_async_context(running(settings)) if database.is_postgres else one
        found = Both(one, other, archive_of_quick_studies, random.Random(seed))
        yield found
    print(f"{request.node.name}: {dict(found.outcomes)}")
    verified = command("audit", "verify", environment=environment_of(settings))
    assert verified.returncode == 0, verified.stdout + verified.stderr


@pytest.fixture(scope="module")
def archive_of_quick_studies(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Archive]:
    with QuickOrthanc(tmp_path_factory.mktemp("quick")) as server:
        yield Archive(server)


UNLIKE = {"PatientName": "Somebody^Else", "PatientBirthDate": ""}
"""Tags that leave it to a human, though the PatientID is the patient's."""


async def of_two_orders(both: Both, **tags: Any) -> Case:
    patient, first = await ordered(both.one)
    orders = [first, await both.one.order(patient)]
    return Case(slices(patient, None, 2, **{**UNLIKE, **tags}), [patient], orders)


async def linked(both: Both) -> Case:
    """Whose study was planned for the first of two orders."""
    patient, first = await ordered(both.one)
    orders = [first, await both.one.order(patient)]
    return Case(slices(patient, first, 2), [patient], orders)


async def test_confirm_and_confirm(both: Both) -> None:
    """To the patient's two orders."""
    async for case in both.rounds(lambda _: of_two_orders(both)):
        orders = [{"order_id": each["id"], "version": case.version} for each in case.orders]
        answers = await both.at_once(
            both.decide(both.one, "ann", case.uid, "confirm", **orders[0]),
            both.decide(both.other, "bea", case.uid, "confirm", **orders[1]),
        )
        assert len(both.told(*answers)) == 1
        now = await both.agrees(case.study_id, case.uid)
        which = 0 if answers[0].status_code == 200 else 1
        winner = ("ann", "bea")[which]
        assert (now.decided_by, str(now.order_id)) == (winner, case.orders[which]["id"])
        late = answers[1 - which].json()
        assert (late["decided_by"], late["state"]) == (winner, "linked")


async def test_coerce_and_coerce(both: Both) -> None:
    """To two patients, neither of whom the number is, and to one: one copy, and no more of it."""

    async def make(number: int) -> Case:
        people = [(await ordered(both.one))[0] for _ in range(2)]
        if number % 2:
            people[1] = people[0]
        return Case(slices(people[0], None, 2, PatientID=unique("ELSE")), people)

    async for case in both.rounds(make):
        whose = [
            {"patient_id": each["id"], "version": case.version, "coerce": True}
            for each in case.people
        ]
        answers = await both.at_once(
            both.decide(both.one, "ann", case.uid, "confirm", **whose[0]),
            both.decide(both.other, "bea", case.uid, "confirm", **whose[1]),
        )
        (won,) = both.told(*answers)
        questions = [
            {"Level": "Study", "Query": {"PatientID": mrn}}
            for mrn in {each["mrn"] for each in case.people}
        ]
        (copy,) = [
            each
            for question in questions
            for each in both.archive.ask("POST", "/tools/find", json=question).json()
        ]
        made = await both.agrees(copy, won.json()["study_instance_uid"])
        assert made.state == "linked"
        assert (await both.row(case.study_id)).state == "rejected"


async def test_confirm_and_reject(both: Both) -> None:
    async for case in both.rounds(lambda _: of_two_orders(both)):
        order, version = case.orders[0]["id"], case.version
        answers = await both.at_once(
            both.decide(both.one, "ann", case.uid, "confirm", order_id=order, version=version),
            both.decide(both.other, "bea", case.uid, "reject", reason="no one's", version=version),
        )
        assert len(both.told(*answers)) == 1
        now = await both.agrees(case.study_id, case.uid)
        assert now.state == ("linked" if answers[0].status_code == 200 else "rejected")


async def test_undo_and_confirm(both: Both) -> None:
    """Who confirms names the version that the undoing makes: both may be told yes, one after the
    other, and never the other way round."""
    async for case in both.rounds(lambda _: linked(both)):
        assert case.state == "linked"
        undo = {"reason": "wrong", "version": case.version}
        confirm = {"order_id": case.orders[1]["id"], "version": case.version + 1}
        answers = await both.at_once(
            both.decide(both.one, "ann", case.uid, "undo", **undo),
            both.decide(both.other, "bea", case.uid, "confirm", **confirm),
        )
        both.told(*answers)
        assert answers[0].status_code == 200, answers[0].text
        now = await both.agrees(case.study_id, case.uid)
        assert now.state == ("linked" if answers[1].status_code == 200 else "unmatched")


async def test_undo_and_undo(both: Both) -> None:
    async for case in both.rounds(lambda _: linked(both)):
        undo = {"reason": "wrong", "version": case.version}
        answers = await both.at_once(
            both.decide(both.one, "ann", case.uid, "undo", **undo),
            both.decide(both.other, "bea", case.uid, "undo", **undo),
        )
        assert len(both.told(*answers)) == 1
        assert (await both.agrees(case.study_id, case.uid)).state == "unmatched"


async def test_confirm_and_the_followers_own_link(both: Both) -> None:
    """What makes it certain is known by now, and a human links it to another order."""

    async def make(_: int) -> Case:
        case = await linked(both)
        case.is_looked_at = False
        return case

    async for case in both.rounds(make):
        # As it stands where it waited before the order came.
        async with both.one.app.state.database.writing_session() as session:
            change = sa.update(Arrival).where(Arrival.orthanc_id == case.study_id)  # type: ignore[arg-type]
            await session.exec(change.values(state="proposed"))
            await session.exec(
                insert_if_absent(
                    session,
                    ArrivalCandidate,
                    orthanc_id=case.study_id,
                    patient_id=UUID(case.people[0]["id"]),
                )
            )
            await session.commit()
        confirm = {"order_id": case.orders[1]["id"], "version": case.version}
        confirmed, _ = await both.at_once(
            both.decide(both.one, "ann", case.uid, "confirm", **confirm),
            both.look(both.other, case.study_id),
        )
        won = bool(both.told(confirmed))
        now = await both.agrees(case.study_id, case.uid)
        assert (now.state, now.rule) == ("linked", "confirmed" if won else "planned-study")
        assert str(now.order_id) == case.orders[1 if won else 0]["id"]


async def test_unmerge_and_the_followers_link(both: Both) -> None:
    """Images under the retired patient's number are the survivor's while they are one, and never
    after they were taken apart."""

    async def make(_: int) -> Case:
        survivor, _order = await ordered(both.one)
        same = {"last_name": survivor["last_name"], "dob": survivor["dob"]}
        retired = await both.one.patient(unique(), **same)
        order = await both.one.order(retired)
        body = {"into": survivor["id"], "reason": "the same person"}
        await both.one.must("service", "POST", f"/patients/{retired['id']}/merge", json=body)
        files = slices(retired, order, 2)
        return Case(files, [survivor, retired], [order], is_looked_at=False)

    async for case in both.rounds(make):
        path = f"/api/v1/patients/{case.people[1]['id']}/unmerge"
        unmerged, _ = await both.at_once(
            both.one.ask("service", "POST", path, json={"reason": "two people"}),
            both.look(both.other, case.study_id),
        )
        assert unmerged.status_code == 200, unmerged.text
        first = await both.agrees(case.study_id, case.uid)
        both.outcomes[f"{first.state} at once"] += 1
        await both.look(both.one, case.study_id)
        now = await both.agrees(case.study_id, case.uid)
        assert (now.state, str(now.patient_id)) == ("linked", case.people[1]["id"])
