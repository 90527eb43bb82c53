"""Followers and archives that die in the middle: nothing is missed, nothing is doubled."""

import asyncio
import os
import secrets
import signal
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pydicom
import pytest

from app.arrivals.lock import LOCK_NUMBER
from app.demo.stack import AppServer, free_port
from app.settings import Settings
from tests.lightbox import Lightbox, running
from tests.live.arrivals import (
    QuickOrthanc,
    count_of,
    following,
    ordered,
    push,
    slices,
    studies_of,
    until,
    until_state,
)
from tests.live.conftest import Archive, DatabaseUrls, environment_of, migrated
from tests.servers import PostgresServer


@pytest.fixture
def orthanc(tmp_path: Path) -> Iterator[QuickOrthanc]:
    with QuickOrthanc(tmp_path / "orthanc") as server:
        yield server


def process(settings: Settings, folder: Path) -> AppServer:
    """An app process of its own."""
    return AppServer(free_port(), environment_of(settings), state_dir=folder)


async def links(lightbox: Lightbox, order: Any) -> list[Any]:
    """The records that a link was made; one, whatever happened in between."""
    return [
        each
        for each in await lightbox.audit(action="study:link", order_id=order["id"])
        if each["outcome"] == "done"
    ]


async def test_a_follower_that_is_killed_goes_on_where_it_was(
    database: DatabaseUrls, orthanc: QuickOrthanc, tmp_path: Path
) -> None:
    settings = following(database.app, orthanc, tmp_path)
    watching = settings.model_copy(update={"follow_orthanc": False})
    async with running(watching) as site:
        orders = [await ordered(site) for _ in range(8)]
        server = process(settings, tmp_path / "app")
        with server:
            for number, (patient, order) in enumerate(orders):
                push(orthanc, tmp_path, *slices(patient, order, 4))
                if number in (2, 5):
                    assert server.pid is not None
                    os.kill(server.pid, signal.SIGKILL)
                    server.stop()
                if number in (3, 6):
                    server.start()
            server.wait_until_ready()
            for _, order in orders:
                await until_state(site, order["planned_study_instance_uid"], "linked")
            for _, order in orders:
                uid = order["planned_study_instance_uid"]
                assert await studies_of(site, order) == [uid]
                assert await count_of(site, uid) == 4
                assert len(await links(site, order)) == 1


async def test_an_archive_that_is_restarted_in_the_middle(
    database: DatabaseUrls, orthanc: QuickOrthanc, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Orthanc forgets which studies it has not called stable yet, and never does so then."""
    async with running(following(database.app, orthanc, tmp_path)) as site:
        first, second = await ordered(site), await ordered(site)
        push(orthanc, tmp_path, *slices(*first, 3))
        orthanc.stop()
        await asyncio.sleep(3)  # long enough for a flood of log lines
        said = [each for each in caplog.records if "not followed" in each.getMessage()]
        assert 0 < len(said) < 8
        orthanc.start()
        orthanc.wait_until_ready()
        push(orthanc, tmp_path, *slices(*second, 3))
        for _, order in (first, second):
            await until_state(site, order["planned_study_instance_uid"], "linked")
            assert await count_of(site, order["planned_study_instance_uid"]) == 3
            assert len(await links(site, order)) == 1


async def test_of_two_processes_one_follows_and_the_other_takes_over(
    postgres: PostgresServer, orthanc: QuickOrthanc, tmp_path: Path
) -> None:
    database = migrated(postgres.create_database())
    settings = following(database.app, orthanc, tmp_path)
    holder = (
        "SELECT a.pid FROM pg_locks l JOIN pg_stat_activity a USING (pid) WHERE "  # noqa: S608
        "l.locktype = 'advisory' AND a.datname = current_database() "
        f"AND ((l.classid::bigint << 32) | l.objid::bigint) = {LOCK_NUMBER}"
    )
    plain = database.owner.replace("postgresql+psycopg", "postgresql")

    def holders() -> list[int]:
        with psycopg.connect(plain) as connection:
            return [row[0] for row in connection.execute(holder)]

    watching = settings.model_copy(update={"follow_orthanc": False})
    async with running(watching) as site:
        with process(settings, tmp_path / "one") as one, process(settings, tmp_path / "two") as two:

            async def follows(each: AppServer) -> bool:
                async with httpx.AsyncClient(trust_env=False) as client:
                    answer = await client.get(
                        f"{each.url}/api/v1/dicom/stats",
                        headers={
                            "Authorization": f"Bearer {site.token('admin')}",
                            "X-Lightbox-Origin": "api",
                        },
                    )
                return bool(answer.json()["follower"]["following"])

            async def one_follows() -> bool:
                return [await follows(one), await follows(two)].count(True) == 1

            await until(one_follows)
            assert len(holders()) == 1
            patient, order = await ordered(site)
            push(orthanc, tmp_path, *slices(patient, order, 2))
            await until_state(site, order["planned_study_instance_uid"], "linked")
            leader, other = (one, two) if await follows(one) else (two, one)
            assert leader.pid is not None
            os.kill(leader.pid, signal.SIGKILL)
            killed = time.monotonic()
            patient, order = await ordered(site)
            push(orthanc, tmp_path, *slices(patient, order, 2))

            async def taken() -> bool:
                return await follows(other)

            await until(taken)
            print(f"taken over after {time.monotonic() - killed:.1f} s")
            await until_state(site, order["planned_study_instance_uid"], "linked")
            assert len(await links(site, order)) == 1
            assert len(holders()) == 1


async def test_the_first_start_lists_what_is_there_and_the_api_answers(
    database: DatabaseUrls, orthanc: QuickOrthanc, tmp_path: Path
) -> None:
    archive = Archive(orthanc)
    watching = following(database.app, orthanc, tmp_path, follow_orthanc=False)
    async with running(watching) as site:
        known = [await ordered(site) for _ in range(5)]
    nobody = {"mrn": "", "last_name": "", "first_name": "", "dob": "1900-01-01", "sex": ""}
    for number in range(300):
        person = {**nobody, "mrn": f"OLD-{number}", "last_name": f"Old{secrets.token_hex(3)}"}
        archive.store(*slices(person, None, 1))
    for patient, order in known:
        archive.store(*slices(patient, order, 1))
    async with running(following(database.app, orthanc, tmp_path)) as site:
        started, slowest = time.monotonic(), 0.0
        seen: list[Any] = []

        async def done() -> bool:
            nonlocal slowest
            asked = time.monotonic()
            answer = await site.must("service", "GET", "/patients")
            slowest = max(slowest, time.monotonic() - asked)
            assert answer
            progress = (await site.must("admin", "GET", "/dicom/stats"))["follower"]
            seen.append(progress)
            return bool(
                progress["listed"] == progress["to_list"] == 305
                and progress["to_look_at"] == 0
                and progress["waiting"] == 300
            )

        await until(done, "all looked at", seconds=120.0)
        print(f"305 studies in {time.monotonic() - started:.1f} s, slowest answer {slowest:.2f} s")
        for _, order in known:
            assert await studies_of(site, order) == [order["planned_study_instance_uid"]]


async def test_another_archive_under_the_same_address_is_noticed(
    database: DatabaseUrls, orthanc: QuickOrthanc, tmp_path: Path
) -> None:
    """Restored from nothing: its log counts anew. Nothing of ours is thrown away for it."""
    async with running(following(database.app, orthanc, tmp_path)) as site:
        patient, order = await ordered(site)
        uid = order["planned_study_instance_uid"]
        push(orthanc, tmp_path, *slices(patient, order, 5))
        await until_state(site, uid, "linked")
        orthanc.stop()
        (orthanc.state_dir / "storage").rename(tmp_path / "lost")
        orthanc.start()
        orthanc.wait_until_ready()
        patient, other = await ordered(site)
        files = slices(patient, other, 1)
        push(orthanc, tmp_path, *files)
        new = str(pydicom.dcmread(BytesIO(files[0])).StudyInstanceUID)
        await until_state(site, new, "linked")
        records = await site.audit(action="archive:change")
        assert "archive-replaced" in {each["reason"] for each in records}
