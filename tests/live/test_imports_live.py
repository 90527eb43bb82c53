"""Imports over real parts: cut off, killed with SIGKILL, cancelled, watched, measured."""

import asyncio
import base64
import hashlib
import io
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from pydicom.uid import generate_uid

from app.demo.stack import REPOSITORY, AppServer, Edge, OrthancServer, free_port
from app.settings import MEBIBYTE, Settings
from tests.images import ct_image
from tests.live.conftest import (
    Archive,
    DatabaseUrls,
    Edged,
    Person,
    edged,
    environment_of,
    make_person,
    migrated,
    settings_for,
)

API = "/api/v1/dicom/imports"
TECH = "technologist"
TOLERANCE_MIB = 24


@dataclass
class Site:
    """The app, which a test may kill, behind the edge, on each database."""

    settings: Settings
    app: AppServer
    caller: Edged
    archive: Archive
    database: DatabaseUrls

    def kill(self, app: AppServer | None = None) -> None:
        """SIGKILL: the app is told nothing."""
        server = app or self.app
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        server.stop()

    def start(self) -> None:
        self.app.start()
        self.app.wait_until_ready()

    def rows(self, query: str, **values: object) -> list[tuple[Any, ...]]:
        """The test's own look into the tables."""
        engine = sa.create_engine(self.database.sync_owner)
        try:
            with engine.connect() as connection:
                return [tuple(row) for row in connection.execute(sa.text(query), values)]
        finally:
            engine.dispose()

    def peak_mib(self) -> float:
        """The most memory that the app's process ever had resident (proc(5): VmHWM)."""
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{self.app.pid}/status").read_text())
        assert found is not None
        return int(found[1]) / 1024

    async def counts(self) -> dict[str, int]:
        """How many files are in each state, in all imports of the technologist."""
        total: dict[str, int] = {}
        for each in await self.caller.must(TECH, "GET", "/dicom/imports"):
            for state, count in each["counts"].items():
                total[state] = total.get(state, 0) + count
        return total

    async def until(
        self, good: Callable[[dict[str, int]], bool], seconds: float = 120
    ) -> dict[str, int]:
        deadline = time.monotonic() + seconds
        while True:
            counts = await self.counts()
            if good(counts):
                return counts
            assert time.monotonic() < deadline, counts
            await asyncio.sleep(0.05)

    @contextmanager
    def importing(self, folder: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
        """`python -m app import`, at work. Its token is in the environment alone."""
        process = subprocess.Popen(
            [sys.executable, "-m", "app", "import", str(folder), *words],
            cwd=REPOSITORY,
            env={
                **os.environ,
                "LIGHTBOX_TOKEN": self.caller.token(TECH),
                "LIGHTBOX_API_BASE_URL": self.settings.api_base_url,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            yield process
        finally:
            process.kill()
            process.communicate()


async def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """What it ended with, and what it said."""
    said, _ = await asyncio.to_thread(process.communicate, timeout=300)
    return process.returncode, said


def parts(
    tmp_path: Path, database: DatabaseUrls
) -> tuple[Settings, OrthancServer, Edge, AppServer]:
    viewer_files = tmp_path / "viewer"
    viewer_files.mkdir()
    (viewer_files / "index.html").touch()
    orthanc = OrthancServer(
        tmp_path / "orthanc", username="lightbox", password=secrets.token_hex(16), dicom_port=None
    )
    api_port, viewer_port, app_port = free_port(), free_port(), free_port()
    settings = settings_for(
        database.app,
        orthanc,
        migration_database_url=database.owner,
        api_base_url=f"http://localhost:{api_port}",
        viewer_base_url=f"http://localhost:{viewer_port}",
        max_upload_bytes=1024 * MEBIBYTE,
        spool_dir=tmp_path,
    )
    app = AppServer(app_port, environment_of(settings), state_dir=tmp_path / "app")
    edge = Edge(
        tmp_path / "edge",
        api_port=api_port,
        viewer_port=viewer_port,
        app_port=app_port,
        orthanc=orthanc,
        ohif_dir=viewer_files,
    )
    return settings, orthanc, edge, app


@pytest.fixture
async def site(tmp_path: Path, database: DatabaseUrls) -> AsyncIterator[Site]:
    settings, orthanc, edge, app = parts(tmp_path, database)
    with orthanc, edge, app:
        async with edged(settings) as caller:
            yield Site(settings, app, caller, Archive(orthanc), database)


@pytest.fixture
def sqlite_database(sqlite_url: str) -> DatabaseUrls:
    return DatabaseUrls(sqlite_url, sqlite_url)


@pytest.fixture
async def small_site(tmp_path: Path, sqlite_database: DatabaseUrls) -> AsyncIterator[Site]:
    settings, orthanc, edge, app = parts(tmp_path, sqlite_database)
    with orthanc, edge, app:
        async with edged(settings) as caller:
            yield Site(settings, app, caller, Archive(orthanc), sqlite_database)


def make_study(folder: Path, mrn: str, count: int) -> set[str]:
    """A study in a folder; the SOPInstanceUIDs."""
    folder.mkdir(parents=True, exist_ok=True)
    study, series = generate_uid(None), generate_uid(None)
    uids = set()
    for number in range(1, count + 1):
        uid = generate_uid(None)
        content = ct_image(
            patient_id=mrn, study_uid=study, series_uid=series, sop_uid=uid, InstanceNumber=number
        )
        (folder / f"IM{number:05}").write_bytes(content)
        uids.add(str(uid))
    return uids


def make_bad(folder: Path, mrn: str, other: str) -> None:
    """A text, another patient's file and a bomb, in the middle of the others by name."""
    (folder / "IM00010a.txt").write_text("no image")
    (folder / "IM00020b").write_bytes(ct_image(patient_id=other, PatientName="Victim^Vera"))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.dcm", bytes(8_000_000))
    (folder / "IM00030c.zip").write_bytes(out.getvalue())


def exactly_once(site: Site, uids: set[str]) -> None:
    """Archive, links, imports and trail say the same: each file once, and nothing else."""
    stored = site.archive.ask("GET", "/instances?expand").json()
    found = [each["MainDicomTags"]["SOPInstanceUID"] for each in stored]
    assert sorted(found) == sorted(uids)
    linked = [row[0] for row in site.rows("SELECT sop_instance_uid FROM instance")]
    assert sorted(linked) == sorted(uids)
    query = "SELECT sop_instance_uid FROM import_file WHERE state = 'linked'"
    assert sorted(row[0] for row in site.rows(query)) == sorted(uids)
    query = "SELECT detail FROM audit_record WHERE action = 'study:upload' AND outcome = 'done'"
    told = [json.loads(row[0])["sop_instance_uid"] for row in site.rows(query)]
    assert sorted(told) == sorted(uids)
    assert list(site.settings.spool_dir.glob("lightbox-imports-*/*")) == []


async def interrupted_twice(site: Site, person: Person, folder: Path, count: int) -> str:
    """Import a folder; the client is killed at a fifth, the app at half. What it said at last."""
    words = ("--order", person.order["id"])
    with site.importing(folder, *words) as first:
        await site.until(lambda counts: counts.get("linked", 0) >= count // 5)
        assert first.poll() is None, first.communicate()[0]
        first.kill()
    with site.importing(folder, *words) as second:
        await site.until(lambda counts: counts.get("linked", 0) >= count // 2)
        assert second.poll() is None, second.communicate()[0]
        site.kill()
        site.start()
        code, said = await ended(second)
    assert code == 3, said
    (only,) = await site.caller.must(TECH, "GET", "/dicom/imports")
    assert only["state"] == "done", "the second run went on with the first one's import"
    return said


async def test_cut_off_and_killed_it_stores_each_file_once(site: Site, tmp_path: Path) -> None:
    person, other = await make_person(site.caller), await make_person(site.caller)
    folder = tmp_path / "folder"
    uids = make_study(folder, person.mrn, 90)
    make_bad(folder, person.mrn, other.mrn)
    said = await interrupted_twice(site, person, folder, 90)
    exactly_once(site, uids)
    assert (await site.counts()) == {"linked": 90, "refused": 3}
    assert "Going on" in said
    for word in ("IM00010a.txt", "IM00020b", "IM00030c.zip", "3 files were not taken in"):
        assert word in said, said
    assert site.caller.token(TECH).split(".")[0] not in said
    order = await site.caller.must("service", "GET", f"/orders/{person.order['id']}")
    assert len(order["studies"]) == 1
    # Again, with nothing new: a new import, in which all is there already.
    with site.importing(folder, "--order", person.order["id"]) as again:
        code, said = await ended(again)
    assert code == 3, said
    stored = site.archive.ask("GET", "/statistics").json()
    assert stored["CountInstances"] == 90
    query = (
        "SELECT count(*) FROM import_file WHERE duplicate AND import_id ="
        " (SELECT id FROM dicom_import ORDER BY created_at DESC LIMIT 1)"
    )
    assert site.rows(query) == [(90,)]


async def test_an_archive_that_a_killed_app_was_in_the_middle_of(
    small_site: Site, tmp_path: Path
) -> None:
    site = small_site
    person = await make_person(site.caller)
    uids = make_study(tmp_path / "files", person.mrn, 80)
    path = tmp_path / "study.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for each in sorted((tmp_path / "files").iterdir()):
            archive.write(each, each.name)
    with site.importing(path, "--patient", person.patient["id"]) as process:
        await site.until(lambda counts: counts.get("linked", 0) >= 20)
        site.kill()
        site.start()
        assert (await ended(process))[0] == 0
    exactly_once(site, uids)
    assert await site.counts() == {"linked": 80, "unpacked": 1}


async def test_cancelled_in_the_middle_by_an_admin(small_site: Site, tmp_path: Path) -> None:
    site = small_site
    person = await make_person(site.caller)
    folder = tmp_path / "folder"
    make_study(folder, person.mrn, 150)
    with site.importing(folder, "--order", person.order["id"]) as process:
        await site.until(lambda counts: counts.get("linked", 0) >= 20)
        (only,) = await site.caller.must("admin", "GET", "/dicom/imports", params={"whose": "all"})
        stopped = await site.caller.ask("admin", "DELETE", f"{API}/{only['id']}")
        assert stopped.status_code == 204
        code, said = await ended(process)
    assert code == 1
    assert "over" in said or "cancelled" in said, said
    counts = await site.until(
        lambda counts: not counts.keys() & {"receiving", "received", "validated", "stored"}
    )
    stored = site.archive.ask("GET", "/statistics").json()["CountInstances"]
    assert stored == counts["linked"] < 150
    assert list(site.settings.spool_dir.glob("lightbox-imports-*/*")) == []


def announced(content: bytes) -> dict[str, str]:
    digest = base64.b64encode(hashlib.sha256(content).hexdigest().encode()).decode()
    return {
        "Tus-Resumable": "1.0.0",
        "Content-Type": "application/offset+octet-stream",
        "Upload-Length": str(len(content)),
        "Upload-Metadata": f"sha256 {digest}",
    }


async def stream(site: Site, import_id: str, last: str) -> AsyncIterator[dict[str, str]]:
    """Events as they come through nginx."""
    headers = {"Authorization": f"Bearer {site.caller.token(TECH)}", "Last-Event-ID": last}
    async with site.caller.client.stream(
        "GET", f"{API}/{import_id}/events", headers=headers
    ) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        event: dict[str, str] = {}
        async for line in answer.aiter_lines():
            if line:
                name, _, value = line.partition(": ")
                event[name] = value
            elif "event" in event:
                yield event
                event = {}


async def test_progress_comes_through_the_edge_as_it_happens(
    small_site: Site,
) -> None:
    site, count = small_site, 12
    person = await make_person(site.caller)
    made = await site.caller.must(TECH, "POST", "/dicom/imports", json={"file_count": count})
    path, last = f"{API}/{made['id']}/files", "0"
    seen: list[dict[str, str]] = []
    for number in range(count):
        content = ct_image(patient_id=person.mrn)
        sent = await site.caller.ask(
            TECH, "POST", path, headers=announced(content), content=content
        )
        assert sent.status_code == 201, sent.text
        # Each time another connection, from the last event of the one before: had the edge kept
        # anything back, this would wait for a file that is only sent afterwards.
        async with asyncio.timeout(60):
            async for event in stream(site, made["id"], last):
                last = event.get("id", last)
                seen.append(event)
                linked = [e for e in seen if e["event"] == "file" and '"linked"' in e["data"]]
                if len(linked) == number + 1:
                    break
    async with asyncio.timeout(60):
        seen.extend([event async for event in stream(site, made["id"], last)])
    ids = [int(each["id"]) for each in seen if "id" in each]
    assert ids == sorted(ids)
    assert seen[-1]["event"] == "done"
    of_each: dict[int, list[str]] = {}
    for each in (json.loads(e["data"]) for e in seen if e["event"] == "file"):
        of_each.setdefault(each["number"], []).append(each["state"])
    rank = ["receiving", "received", "validated", "stored", "linked"]
    assert sorted(of_each) == list(range(1, count + 1))
    for states in of_each.values():
        assert states == sorted(set(states), key=rank.index), "in order, and nothing twice"
        assert states[-1] == "linked"


async def test_another_process_takes_over_from_one_that_was_killed(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    database = migrated(request.getfixturevalue("postgres").create_database())
    settings, orthanc, edge, first = parts(tmp_path, database)
    second = AppServer(free_port(), environment_of(settings), state_dir=tmp_path / "second")
    with ExitStack() as stack:
        for each in (orthanc, edge, first):
            stack.enter_context(each)
        async with edged(settings) as caller:
            site = Site(settings, first, caller, Archive(orthanc), database)
            person = await make_person(caller)
            uids = make_study(tmp_path / "folder", person.mrn, 200)
            made = await caller.must(TECH, "POST", "/dicom/imports", json={"file_count": 1})
            out = io.BytesIO()
            with zipfile.ZipFile(out, "w") as archive:
                for path in (tmp_path / "folder").iterdir():
                    archive.write(path, path.name)
            sent = await caller.ask(
                *(TECH, "POST", f"{API}/{made['id']}/files"),
                headers=announced(out.getvalue()),
                content=out.getvalue(),
            )
            assert sent.status_code == 201
            await site.until(lambda counts: counts.get("linked", 0) >= 5)
            stack.enter_context(second)
            assert (await site.counts())["linked"] < 200, "the first one is still at work"
            site.kill()
            query = "SELECT state FROM dicom_import"
            deadline = time.monotonic() + 60
            while site.rows(query) != [("done",)]:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.1)
            exactly_once(site, uids)


def write_cine(path: Path, patient_id: str, frames: int) -> None:
    """A multi-frame image of half a MiB a frame, whose pixels are a hole in the file."""
    header = ct_image(
        patient_id=patient_id, NumberOfFrames=frames, Rows=512, Columns=512, PixelData=b""
    )
    pixels = frames * 512 * 512 * 2
    with path.open("wb") as file:
        file.write(header[:-4] + pixels.to_bytes(4, "little"))
        file.truncate(len(header) + pixels)


async def test_a_large_import_costs_no_more_memory_than_a_small_one(
    small_site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = small_site
    peaks = []
    for name, count, frames in (("small", 40, 2), ("large", 150, 600)):
        person = await make_person(site.caller)
        folder = tmp_path / name
        make_study(folder, person.mrn, count)
        write_cine(folder / "cine.dcm", person.mrn, frames)
        with site.importing(folder) as process:
            code, said = await ended(process)
        assert code == 0, said
        peaks.append(site.peak_mib())
    with capsys.disabled():
        print(f"\npeak of the app: {peaks[0]:.1f} MiB, with 300 MiB and 150 files {peaks[1]:.1f}")
    assert peaks[1] - peaks[0] < TOLERANCE_MIB


def test_the_command_fails_with_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    port = free_port()

    def run(path: Path, **environment: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "app", "import", str(path), "--url", f"http://localhost:{port}"],
            cwd=REPOSITORY,
            env={**{k: v for k, v in os.environ.items() if k != "LIGHTBOX_TOKEN"}, **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return done.returncode, done.stderr

    assert run(tmp_path) == (
        1,
        "There is no token: set LIGHTBOX_TOKEN, or name a --token-file.\n",
    )
    assert run(tmp_path / "gone", LIGHTBOX_TOKEN="t")[1] == f"{tmp_path / 'gone'} is not there.\n"
    (tmp_path / "empty").mkdir()
    assert "There are no files" in run(tmp_path / "empty", LIGHTBOX_TOKEN="t")[1]


async def test_the_command_says_why_it_was_refused(small_site: Site, tmp_path: Path) -> None:
    site = small_site
    person = await make_person(site.caller)
    folder = tmp_path / "folder"
    make_study(folder, person.mrn, 1)
    with site.importing(folder, "--order", str(person.patient["id"])) as process:
        code, said = await ended(process)
    assert (code, said) == (1, "No order has this id.\n")
    token = tmp_path / "token"
    token.write_text("not.a.token")
    with site.importing(folder, "--token-file", str(token)) as process:
        code, said = await ended(process)
    assert (code, said) == (1, "The token does not hold any more. Run it again with a new one.\n")
    refused = await site.caller.ask("clinician", "POST", API, json={"file_count": 1})
    assert refused.status_code == 403
    answer = await site.caller.ask(None, "GET", API)
    assert answer.status_code == 401
