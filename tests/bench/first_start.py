"""How long the first start takes beside an archive that is full already; by hand:

    .venv/bin/python -m tests.bench.first_start [COUNT] [--sqlite]

COUNT studies of one tiny instance each go into a real Orthanc; one in a hundred is of a patient
and an order that Lightbox knows. Then the app starts, and until all are listed, looked at, and
linked or waiting, its API is asked all the time.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian, generate_uid
from sqlalchemy.engine import make_url

from app.db import migrate
from app.demo.stack import AppServer, free_port
from app.identity import Role, issue_token
from app.settings import Settings
from tests.lightbox import running
from tests.live.arrivals import QuickOrthanc, following
from tests.live.conftest import environment_of
from tests.servers import postgres_server

KNOWN_IN = 100  # one study in so many is of an order that is known
SENDERS = 8
ASK_EVERY_SECONDS = 0.1
TELL_EVERY_SECONDS = 5.0


def tiny(number: int, order: dict[str, Any] | None, person: dict[str, Any] | None) -> bytes:
    """An instance without pixels, some hundred bytes."""
    image = Dataset()
    image.SOPClassUID = ComputedRadiographyImageStorage
    image.SOPInstanceUID, image.SeriesInstanceUID = generate_uid(None), generate_uid(None)
    image.StudyInstanceUID = order["planned_study_instance_uid"] if order else generate_uid(None)
    image.PatientID = person["mrn"] if person else f"OLD-{number // 3}"
    image.PatientName = f"{person['last_name']}^{person['first_name']}" if person else "Old^Patient"
    image.PatientBirthDate = (
        person["dob"].replace("-", "") if person else f"19{number % 90 + 10}0101"
    )
    image.PatientSex = person["sex"] if person else "O"
    image.AccessionNumber = order["accession_number"] if order else f"A{number}"
    image.StudyDate, image.Modality = time.strftime("%Y%m%d"), "CT" if order else "CR"
    image.file_meta = FileMetaDataset()
    image.file_meta.MediaStorageSOPClassUID = image.SOPClassUID
    image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    out = BytesIO()
    image.save_as(out, enforce_file_format=True)
    return out.getvalue()


def fill(orthanc: QuickOrthanc, files: Iterator[bytes], count: int) -> float:
    """Store them; how many seconds it took."""
    began = time.monotonic()
    with httpx.Client(
        base_url=orthanc.url,
        auth=(orthanc.username, orthanc.password),
        trust_env=False,
        timeout=60.0,
        limits=httpx.Limits(keepalive_expiry=0.8),
    ) as client:

        def store(content: bytes) -> None:
            client.post("/instances", content=content).raise_for_status()

        with ThreadPoolExecutor(SENDERS) as senders:
            for number, _ in enumerate(senders.map(store, files), 1):
                if number % 5000 == 0 or number == count:
                    seconds = time.monotonic() - began
                    print(f"{number} stored, {number / seconds:.0f}/s", flush=True)
    return time.monotonic() - began


async def known(settings: Settings, count: int) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Patients and orders that are there before."""
    async with running(settings.model_copy(update={"follow_orthanc": False})) as site:
        made = []
        for number in range(count):
            values = {"last_name": f"Known{number}", "dob": f"19{number % 90 + 10}-03-04"}
            patient = await site.patient(f"KNOWN-{number}", **values)
            made.append((patient, await site.order(patient)))
        return made


async def until_done(settings: Settings, app: AppServer, count: int, waits: int) -> None:
    """Ask the API until all is done, and say how it answered."""
    token = issue_token(settings, "admin", [Role.ADMIN], minutes=600)
    service = issue_token(settings, "service", [Role.SERVICE], minutes=600)
    began, told, answers, listed = time.monotonic(), 0.0, [], 0.0
    async with httpx.AsyncClient(base_url=app.url, trust_env=False, timeout=60.0) as client:
        while True:
            asked = time.monotonic()
            found = await client.get(
                "/api/v1/patients",
                params={"limit": "20"},
                headers={"Authorization": f"Bearer {service}", "X-Lightbox-Origin": "api"},
            )
            found.raise_for_status()
            answers.append(time.monotonic() - asked)
            now = time.monotonic() - began
            if now - told >= TELL_EVERY_SECONDS or not told:
                told = now
                stats = await client.get(
                    "/api/v1/dicom/stats",
                    headers={"Authorization": f"Bearer {token}", "X-Lightbox-Origin": "api"},
                )
                progress = stats.raise_for_status().json()["follower"]
                done = progress["listed"] - progress["to_look_at"]
                print(
                    f"{now:6.0f} s: {progress['listed']} listed, {done} looked at, "
                    f"{progress['waiting']} wait",
                    flush=True,
                )
                if progress["listed"] >= count and not listed:
                    listed = now
                if listed and progress["to_look_at"] == 0 and progress["waiting"] == waits:
                    break
            await asyncio.sleep(ASK_EVERY_SECONDS)
    answers.sort()
    print("\n| studies | listed after | all looked at after | a second | API: median | slowest |")
    print("|---|---|---|---|---|---|")
    print(
        f"| {count} | {listed:.0f} s | {now:.0f} s | {count / now:.0f} | "
        f"{statistics.median(answers) * 1000:.0f} ms | {answers[-1] * 1000:.0f} ms |"
    )


@contextmanager
def database(folder: Path, *, sqlite: bool) -> Iterator[str]:
    """A migrated one, as the app connects to it."""
    with ExitStack() as stack:
        if sqlite:
            owner = app = f"sqlite+aiosqlite:///{folder / 'lightbox.sqlite'}"
        else:
            owner, app = stack.enter_context(postgres_server()).create_database()
        migrate(owner, make_url(app).username)
        yield app


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.first_start", description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=10_000)
    parser.add_argument("--sqlite", action="store_true")
    given = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="first-start-")))
        url = stack.enter_context(database(folder, sqlite=given.sqlite))
        orthanc = stack.enter_context(QuickOrthanc(folder / "orthanc"))
        settings = following(url, orthanc, folder)
        people = asyncio.run(known(settings, given.count // KNOWN_IN))

        def files() -> Iterator[bytes]:
            for number in range(given.count):
                which = number // KNOWN_IN
                is_known = number % KNOWN_IN == 0 and which < len(people)
                person, order = people[which] if is_known else (None, None)
                yield tiny(number, order, person)

        fill(orthanc, files(), given.count)
        app = AppServer(free_port(), environment_of(settings), state_dir=folder / "app")
        with app:
            asyncio.run(until_done(settings, app, given.count, given.count - len(people)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
