"""Orthanc under bad files, and Orthanc gone: it stays alive, and what can't be shown is said to be
unavailable, also what the edge still keeps."""

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydicom.uid import generate_uid

from app.demo.stack import AppServer, Edge, OrthancServer, free_port
from tests.images import ct_image
from tests.lightbox import Opened
from tests.live.conftest import (
    Archive,
    DatabaseUrls,
    Edged,
    Full,
    command,
    edged,
    environment_of,
    make_person,
    settings_for,
)
from tests.live.test_samples import SAMPLES
from tests.servers import PostgresServer

MALFORMED = SAMPLES / "malformed"
PART = b"--cut-here\r\nContent-Type: application/dicom\r\n\r\n"
RELATED = {"Content-Type": 'multipart/related; type="application/dicom"; boundary=cut-here'}
ANYTHING = {"Accept": "*/*"}


# ------------------------------------------------------------------------------------- bad files


@pytest.mark.skipif(not MALFORMED.is_dir(), reason="needs DICOM samples; see test_samples.py")
async def test_malformed_files_do_not_end_orthanc(
    through_edge: Edged, full: Full, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each as an upload that is made the patient's, as STOW, and looked at if it was taken."""
    person = await make_person(through_edge)
    orthanc, counts = full.archive.server, Counter[str]()
    assert isinstance(orthanc, OrthancServer)
    pid = orthanc.pid
    for path in sorted(MALFORMED.iterdir()):
        content = path.read_bytes()
        uploaded = await through_edge.upload(
            content, order_id=person.order["id"], coerce_patient="true"
        )
        assert uploaded.status_code in (200, 409, 413, 415, 422), (path.name, uploaded.text)
        stored = await through_edge.ask(
            "technologist",
            "POST",
            "/dicom-web/studies",
            headers=RELATED,
            content=PART + content + b"\r\n--cut-here--\r\n",
        )
        assert stored.status_code in (200, 202, 400, 409), (path.name, stored.text)
        counts[f"upload {uploaded.status_code}"] += 1
        counts[f"STOW {stored.status_code}"] += 1
        if uploaded.status_code == 200:
            study = uploaded.json()["study_instance_uid"]
            statuses = await looked_at(through_edge, uploaded.json())
            assert set(statuses) <= {200, 404, 406}, (path.name, statuses)
            counts.update(f"looked at {each}" for each in statuses)
            await through_edge.must("service", "DELETE", f"/dicom/studies/{study}?reason=next+one")
        assert orthanc.pid == pid, path.name
        assert full.archive.alive(), path.name
    with capsys.disabled():
        print("\n" + "\n".join(f"{name:>16}{count:>5}" for name, count in sorted(counts.items())))


async def looked_at(caller: Edged, image: dict[str, str]) -> list[int]:
    """The statuses of everything that shows an instance."""
    series = f"/studies/{image['study_instance_uid']}/series/{image['series_instance_uid']}"
    instance = f"{series}/instances/{image['sop_instance_uid']}"
    paths = (
        *(f"{series}/metadata", f"{instance}/frames/1", f"{instance}/rendered", instance),
        *(f"{instance}/thumbnail", f"{instance}/bulk/00100010"),
    )
    answers = [await caller.ask("clinician", "GET", f"/dicom-web{each}") for each in paths]
    return [each.status_code for each in answers]


# ---------------------------------------------------------------------------------- Orthanc gone


@pytest.fixture
def mortal(
    own_orthanc: OrthancServer, postgres: PostgresServer, tmp_path: Path
) -> Iterator[tuple[Full, OrthancServer]]:
    """App and edge on an Orthanc that the test ends and starts."""
    viewer_files, spool = tmp_path / "viewer", tmp_path / "spool"
    for folder in (viewer_files, spool):
        folder.mkdir()
    (viewer_files / "index.html").touch()
    api_port, viewer_port, app_port = free_port(), free_port(), free_port()
    owner_url, app_url = postgres.create_database()
    settings = settings_for(
        app_url,
        own_orthanc,
        migration_database_url=owner_url,
        api_base_url=f"http://localhost:{api_port}",
        viewer_base_url=f"http://localhost:{viewer_port}",
        spool_dir=spool,
    )
    environment = environment_of(settings)
    migrating = command("migrate", environment=environment)
    assert migrating.returncode == 0, migrating.stderr
    app = AppServer(app_port, environment, state_dir=tmp_path / "app")
    edge = Edge(
        tmp_path / "edge",
        api_port=api_port,
        viewer_port=viewer_port,
        app_port=app_port,
        orthanc=own_orthanc,
        ohif_dir=viewer_files,
    )
    with app, edge:
        urls = DatabaseUrls(owner_url, app_url)
        yield Full(settings, Archive(own_orthanc), app, edge, urls), own_orthanc


Asking = Callable[[str], Awaitable[httpx.Response]]


async def until(ask: Asking, path: str, status: int) -> httpx.Response:
    """The answer, when it has this status: what was asked for within a second is believed."""
    deadline = time.monotonic() + 60
    while (answer := await ask(path)).status_code != status:
        assert time.monotonic() < deadline, (path, answer.status_code, answer.text)
        await asyncio.sleep(0.05)
    return answer


def killed(orthanc: OrthancServer) -> None:
    """As the kernel does it to who takes too much memory."""
    assert orthanc.pid is not None
    os.kill(orthanc.pid, signal.SIGKILL)
    orthanc.stop()


def assert_unavailable(answer: httpx.Response, orthanc: OrthancServer) -> None:
    assert answer.status_code == 503, answer.text
    assert int(answer.headers["retry-after"]) > 0
    assert answer.headers["content-type"] == "application/problem+json"
    assert "no-store" in answer.headers["cache-control"]
    assert str(orthanc.http_port) not in answer.text
    assert "127.0.0.1" not in answer.text


async def test_killed_in_the_middle_and_back(mortal: tuple[Full, OrthancServer]) -> None:
    full, orthanc = mortal
    async with edged(full.settings) as caller:
        person = await make_person(caller)
        frames = [bytes([n]) * 512 for n in range(2)]
        content = ct_image(patient_id=person.mrn, NumberOfFrames=2, PixelData=b"".join(frames))
        image = (await caller.upload(content, order_id=person.order["id"])).json()
        opened: Opened = await caller.open(f"/order/{person.order['id']}")

        async def by_token(path: str) -> httpx.Response:
            return await caller.ask("clinician", "GET", f"/dicom-web{path}", headers=ANYTHING)

        async def by_cookie(path: str) -> httpx.Response:
            return await opened.get(path, headers=ANYTHING)

        study = f"/studies/{image['study_instance_uid']}"
        series = f"{study}/series/{image['series_instance_uid']}"
        instance = f"{series}/instances/{image['sop_instance_uid']}"
        kept = [f"{instance}/frames/1", f"{instance}/rendered", f"{series}/metadata"]
        never_asked = [
            *(f"{instance}/frames/2", f"{instance}/frames/1,2", f"{instance}/bulk/00100010"),
            *(instance, f"{instance}/rendered?quality=50", study),
        ]
        searches = ["/studies", f"{study}/series", f"{series}/instances"]
        ways: tuple[Asking, ...] = (by_token, by_cookie)
        for ask in ways:
            for path in kept * 2:
                assert (await ask(path)).status_code == 200, path
        for _ in range(2):
            killed(orthanc)
            for ask in ways:
                for path in [*kept, *never_asked]:
                    assert_unavailable(await until(ask, path, 503), orthanc)
                for path in searches:
                    assert (await ask(path)).status_code == 200, path
            stored = await caller.ask(
                "technologist",
                "POST",
                "/dicom-web/studies",
                headers=RELATED,
                content=PART + ct_image(patient_id=person.mrn) + b"\r\n--cut-here--\r\n",
            )
            assert_unavailable(stored, orthanc)
            orthanc.start()
            orthanc.wait_until_ready()
            for ask in ways:
                for path in [*kept, *never_asked]:
                    assert (await until(ask, path, 200)).content, path
                assert (await ask(f"{instance}/frames/2")).content == frames[1]
        again = await caller.upload(ct_image(patient_id=person.mrn), order_id=person.order["id"])
        assert again.status_code == 200, again.text


async def test_killed_while_it_sends(mortal: tuple[Full, OrthancServer]) -> None:
    """A transfer that breaks off is never taken for a whole one."""
    full, orthanc = mortal
    async with edged(full.settings) as caller:
        person = await make_person(caller)
        uid, side, count = str(generate_uid(None)), 1900, 7
        shape: dict[str, Any] = {"Rows": side, "Columns": side, "PixelData": bytes(side * side * 2)}
        for _ in range(count):
            content = ct_image(patient_id=person.mrn, study_uid=uid, **shape)
            answer = await caller.upload(content, order_id=person.order["id"])
            assert answer.status_code == 200, answer.text
        path = f"/dicom-web/studies/{uid}"
        token = {"Authorization": f"Bearer {caller.token('clinician')}"}
        async with caller.client.stream("GET", path, headers=token) as sent:
            assert sent.status_code == 200
            chunks = sent.aiter_raw(1024)
            await anext(chunks)
            killed(orthanc)
            with pytest.raises(httpx.RemoteProtocolError):
                _ = [chunk async for chunk in chunks]
        orthanc.start()
        orthanc.wait_until_ready()
        answer = await until(lambda path: caller.ask("clinician", "GET", path), path, 200)
        assert len(answer.content) > count * side * side * 2
