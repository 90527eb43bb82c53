"""Files of a study that come at the same moment: one transaction, a record and a fate each."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from sqlmodel.ext.asyncio.session import AsyncSession

from app.errors import Conflict
from app.intake import Intake
from app.intake import records as intake_records
from app.intake.links import Links
from app.intake.records import Link
from tests.fake_orthanc import FakeOrthanc
from tests.images import ct_image
from tests.lightbox import Lightbox, World
from tests.tables import change, outcomes, records, rows

STUDY, SERIES = "2.25.71", "2.25.72"
FILES = 6
DEAD = "d" * 32


def sop(number: int) -> str:
    return f"2.25.{730 + number}"


def image(number: int, **values: Any) -> bytes:
    return ct_image(
        patient_id="MRN-MINE",
        study_uid=STUDY,
        series_uid=SERIES,
        sop_uid=sop(number),
        InstanceNumber=number,
        **values,
    )


@pytest.fixture
def batches(lightbox: Lightbox, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The SOPInstanceUIDs of each transaction that was tried. The first is held up until all
    the other files wait for it."""
    tried: list[list[str]] = []
    commit = Links._commit

    async def commit_late(self: Links, database: Any, wanted: Sequence[Link]) -> None:
        tried.append([each.file.header.sop_instance_uid for each in wanted])
        if len(tried) == 1:
            deadline = time.monotonic() + 60
            while len(wanted) + sum(map(len, self._waiting.values())) < FILES:
                assert time.monotonic() < deadline, "the others never came"
                await asyncio.sleep(0.01)
        await commit(self, database, wanted)

    monkeypatch.setattr(Links, "_commit", commit_late)
    return tried


async def send(lightbox: Lightbox, world: World, number: int, content: bytes) -> httpx.Response:
    return await lightbox.ask(
        "technologist",
        "POST",
        "/api/v1/dicom/upload",
        headers={"X-Request-ID": f"file-{number}"},
        files={"file": ("a.dcm", content, "application/dicom")},
        data={"order_id": world.my_order["id"]},
    )


async def send_all(lightbox: Lightbox, world: World) -> list[httpx.Response]:
    return await asyncio.gather(
        *(send(lightbox, world, number, image(number)) for number in range(FILES))
    )


def linked(lightbox: Lightbox) -> set[str]:
    found = rows(lightbox, "SELECT * FROM instance WHERE study_instance_uid = ?", STUDY)
    return {each["sop_instance_uid"] for each in found}


async def test_files_of_a_moment_share_a_transaction_and_have_a_record_each(
    lightbox: Lightbox, world: World, batches: list[list[str]]
) -> None:
    answers = await send_all(lightbox, world)
    assert [each.json()["status"] for each in answers] == ["uploaded"] * FILES
    assert len(batches) == 2
    assert sum(map(len, batches)) == FILES
    assert linked(lightbox) == {sop(number) for number in range(FILES)}
    for number in range(FILES):
        granted, done = records(lightbox, f"file-{number}")
        assert (granted["outcome"], done["outcome"]) == ("granted", "done")
        assert done["detail"]["sop_instance_uid"] == sop(number)
        assert done["study_instance_uid"] == STUDY
    assert rows(lightbox, "SELECT * FROM operation") == []


async def test_a_coerced_file_leaves_nothing_under_way(lightbox: Lightbox, world: World) -> None:
    """It has two grants, to upload and to coerce: what is done is the outcome of both."""
    answer = await lightbox.upload(
        ct_image(patient_id="SOMEBODY", sop_uid=sop(0)),
        order_id=world.my_order["id"],
        coerce_patient="true",
    )
    assert answer.json()["status"] == "uploaded", answer.text
    assert rows(lightbox, "SELECT * FROM operation") == []


async def test_one_that_was_given_up_takes_no_other_with_it(
    lightbox: Lightbox,
    world: World,
    fake_orthanc: FakeOrthanc,
    batches: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    link = intake_records.link

    async def given_up(links: Sequence[Link]) -> None:
        for each in links:
            if each.file.header.sop_instance_uid == sop(3):
                row = each.access.operation
                assert row is not None
                stolen = sa.text("UPDATE operation SET process = :dead WHERE id = :id")
                connection = await each.access.session.connection()
                await connection.execute(stolen, {"dead": DEAD, "id": row.id})
        await link(links)

    monkeypatch.setattr(intake_records, "link", given_up)
    answers = await send_all(lightbox, world)
    refused = [number for number, each in enumerate(answers) if each.status_code != 200]
    assert refused == [3]
    assert answers[3].status_code == 503
    assert linked(lightbox) == {sop(number) for number in range(FILES)} - {sop(3)}
    assert outcomes(lightbox, "file-3")[-1] == ("study:upload", "failed")
    assert len(fake_orthanc.instances) == 2 + FILES - 1, "it was taken back"


async def test_one_that_was_deleted_meanwhile_takes_no_other_with_it(
    lightbox: Lightbox,
    world: World,
    fake_orthanc: FakeOrthanc,
    batches: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    link = intake_records.link

    async def deleted(links: Sequence[Link]) -> None:
        await link(links)
        for each in links:
            if each.file.header.sop_instance_uid == sop(2):
                fake_orthanc._delete(f"/instances/{each.file.stored.instance_id}")

    monkeypatch.setattr(intake_records, "link", deleted)
    answers = await send_all(lightbox, world)
    assert [each.status_code for each in answers] == [200, 200, 409, 200, 200, 200]
    assert linked(lightbox) == {sop(number) for number in range(FILES)} - {sop(2)}
    assert outcomes(lightbox, "file-2") == [("study:upload", "granted"), ("study:upload", "failed")]
    assert rows(lightbox, "SELECT * FROM operation") == []


async def test_a_database_that_does_not_answer_is_not_asked_for_each(
    lightbox: Lightbox,
    world: World,
    fake_orthanc: FakeOrthanc,
    batches: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All of them are taken back, and none is linked."""
    before = set(fake_orthanc.instances)
    commit = AsyncSession.commit

    async def lost(session: AsyncSession) -> None:
        if session.sync_session.info.get("audit entries"):
            raise sa.exc.OperationalError("COMMIT", {}, Exception("disk I/O"))
        await commit(session)

    with monkeypatch.context() as patch:
        patch.setattr(AsyncSession, "commit", lost)
        answers = await send_all(lightbox, world)
    assert {each.status_code for each in answers} == {503}
    assert len(batches) == 2
    assert sum(map(len, batches)) == FILES
    assert linked(lightbox) == set()
    assert set(fake_orthanc.instances) == before
    for number in range(FILES):
        assert outcomes(lightbox, f"file-{number}")[-1] == ("study:upload", "failed")
    assert rows(lightbox, "SELECT * FROM operation") == []


async def test_who_no_longer_waits_is_not_linked(
    lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that was ended while its file waited for its turn: what it stored goes."""
    before = set(fake_orthanc.instances)
    commit, waits, go = Links._commit, asyncio.Event(), asyncio.Event()

    async def commit_late(self: Links, database: Any, wanted: Sequence[Link]) -> None:
        waits.set()
        await go.wait()
        await commit(self, database, wanted)

    monkeypatch.setattr(Links, "_commit", commit_late)
    first = asyncio.create_task(send(lightbox, world, 0, image(0)))
    await asyncio.wait_for(waits.wait(), 60)
    second = asyncio.create_task(send(lightbox, world, 1, image(1)))
    intake: Intake = lightbox.app.state.intake
    deadline = time.monotonic() + 60
    while not any(intake._links._waiting.values()):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    go.set()
    assert (await first).status_code == 200
    assert linked(lightbox) == {sop(0)}
    assert len(set(fake_orthanc.instances) - before) == 1


async def test_two_contents_of_one_instance_are_never_linked_together(
    lightbox: Lightbox, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of A, B and A again under one SOPInstanceUID none is kept, in whatever order they stand."""
    seen: list[Link] = []
    link = intake_records.link

    async def remembered(links: Sequence[Link]) -> None:
        seen.extend(links)
        await link(links)

    monkeypatch.setattr(intake_records, "link", remembered)
    (await send(lightbox, world, 0, image(0))).raise_for_status()
    change(lightbox, "DELETE FROM instance WHERE sop_instance_uid = ?", sop(0))
    access, file = seen[0].access, seen[0].file
    a, b = replace(file, sha256="a" * 64), replace(file, sha256="b" * 64)
    for files in ([a, b, a], [b, a], [a, b]):
        async with lightbox.app.state.database.session() as session:
            with pytest.raises(Conflict):
                await intake_records.keep(access.within(session), files)
    assert linked(lightbox) == set()
