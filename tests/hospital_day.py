"""`python -m tests.hospital_day`: a day of a hospital, on this machine.

An EHR's backend places orders, two modalities ask for their worklist, "scan" and push to Orthanc,
and each study has to find its order by itself. In the middle the app is killed and started again,
and so is Orthanc. Prints what was linked, what was not, and how long it took.
"""

import argparse
import asyncio
import os
import secrets
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from pydicom import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import dcmread
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from pynetdicom import AE

from app.db import migrate
from app.demo.stack import LOOPBACK, AppServer, OrthancServer, free_port
from app.settings import Settings
from tests.images import ct_image
from tests.lightbox import make_settings, signed
from tests.live.arrivals import STABLE_SECONDS, QuickOrthanc, until
from tests.live.conftest import environment_of

STATIONS = ("CT1", "MR1")
WORKLIST_FIND = "1.2.840.10008.5.1.4.31"
DEADLINE_SECONDS = 120.0
FAMILIES = "Adler Baum Conti Dvorak Eriksen Fuchs Gruber Horvat Ivanov Jansen Keller Lang".split()
GIVEN = "Anna Boris Clara David Elena Filip Greta Hugo Irena Jakob Karin Leon".split()


class TwoModalities(QuickOrthanc):
    """An Orthanc that both stations may ask and send to."""

    def __init__(self, state_dir: Path) -> None:
        OrthancServer.__init__(
            self,
            state_dir,
            username="lightbox",
            password=secrets.token_hex(16),
            modalities=dict.fromkeys(STATIONS, LOOPBACK),
        )


@dataclass
class Day:
    """What happened so far."""

    orders: int
    placed: dict[str, Any] = field(default_factory=dict)  # by accession number
    sent: dict[str, int] = field(default_factory=dict)  # instances, by accession number
    sent_at: dict[str, float] = field(default_factory=dict)
    linked_at: dict[str, float] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    restarts: int = 0

    async def until_scanned(self, count: int) -> None:
        async def so() -> bool:
            return len(self.sent_at) >= count

        await until(so, f"{count} orders scanned", DEADLINE_SECONDS + 3 * self.orders)


class Backend:
    """The EHR's backend: it repeats what was not answered, as one does."""

    def __init__(self, settings: Settings, url: str) -> None:
        token = signed(settings, sub="ehr", roles=["service"])
        self._client = httpx.AsyncClient(
            base_url=f"{url}/api/v1",
            headers={"Authorization": f"Bearer {token}", "X-Lightbox-Origin": "api"},
            timeout=20.0,
        )

    async def ask(self, method: str, path: str, body: Any = None) -> Any:
        key = {"Idempotency-Key": secrets.token_hex(16)} if method == "POST" else {}
        deadline = time.monotonic() + DEADLINE_SECONDS
        while True:
            try:
                answer = await self._client.request(method, path, json=body, headers=key)
                if answer.status_code < 400:
                    return answer.json()
                if answer.status_code not in (409, 429, 503):
                    raise RuntimeError(f"{method} {path}: {answer.status_code} {answer.text}")
            except httpx.TransportError:
                pass  # the app was just killed
            if time.monotonic() > deadline:
                raise RuntimeError(f"{method} {path}: not answered in time")
            await asyncio.sleep(0.2)

    async def place(self, day: Day) -> None:
        for number in range(day.orders):
            name, first = FAMILIES[number % 12], GIVEN[number // 12 % 12]
            patient = await self.ask(
                "POST",
                "/patients",
                {
                    "first_name": first,
                    "last_name": f"{name}{number // 144 or ''}",
                    "mrn": f"D{number:06}",
                    "mrn_issuer": "HOSPITAL",
                    "dob": f"19{number % 80 + 10}-0{number % 9 + 1}-1{number % 10}",
                    "sex": "FM"[number % 2],
                },
            )
            station = STATIONS[number % 2]
            order = await self.ask(
                "POST",
                "/orders",
                {
                    "patient_id": patient["id"],
                    "order_type": "IMAGING",
                    "order_category": station[:2],
                    "description": f"{station[:2]} {number}",
                    "status": "scheduled",
                    "station_ae_title": station,
                    "scheduled_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                },
            )
            day.placed[order["accession_number"]] = order

    async def watch(self, day: Day) -> None:
        """Until each order that was scanned has its images."""
        while len(day.linked_at) < day.orders:
            for accession in [each for each in day.sent_at if each not in day.linked_at]:
                order = await self.ask("GET", f"/orders/{day.placed[accession]['id']}")
                if order["studies"]:
                    day.linked_at[accession] = time.monotonic()
            await asyncio.sleep(0.1)

    async def check(self, day: Day) -> None:
        """Each order has its own study and no other, whole, and under its own patient."""
        for accession, placed in day.placed.items():
            order = await self.ask("GET", f"/orders/{placed['id']}")
            studies = await self.ask("GET", f"/dicom/studies/order/{placed['id']}")
            if (
                order["studies"] != [placed["planned_study_instance_uid"]]
                or [each["NumberOfStudyRelatedInstances"] for each in studies]
                != [day.sent[accession]]
                or studies[0]["patient_id"] != placed["patient_id"]
            ):
                day.wrong.append(accession)

    async def close(self) -> None:
        await self._client.aclose()


class Modality:
    """One station: asks for its worklist, makes images of what it finds, and pushes them."""

    def __init__(self, title: str, orthanc: OrthancServer) -> None:
        self._title = title
        self._orthanc = orthanc

    def _associate(self, syntax: str) -> Any:
        entity = AE(ae_title=self._title)
        entity.add_requested_context(syntax, ExplicitVRLittleEndian)
        entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = 10
        return entity.associate(LOOPBACK, self._orthanc.dicom_port or 0, ae_title="LIGHTBOX")

    def worklist(self) -> list[Dataset]:
        """Its entries; none while Orthanc does not answer."""
        asked, step = Dataset(), Dataset()
        for keyword in (
            *("AccessionNumber", "PatientName", "PatientID", "IssuerOfPatientID"),
            *("PatientBirthDate", "PatientSex", "StudyInstanceUID"),
        ):
            setattr(asked, keyword, None)
        step.ScheduledStationAETitle = self._title
        step.Modality = None
        asked.ScheduledProcedureStepSequence = [step]
        association = self._associate(WORKLIST_FIND)
        if not association.is_established:
            return []
        try:
            return [found for _, found in association.send_c_find(asked, WORKLIST_FIND) if found]
        finally:
            association.release()

    def scan(self, entry: Dataset, count: int) -> list[Dataset]:
        """Images as the worklist's entry says."""
        series = generate_uid(None)
        return [
            dcmread(
                DicomBytesIO(
                    ct_image(
                        patient_id=entry.PatientID,
                        study_uid=entry.StudyInstanceUID,
                        series_uid=series,
                        InstanceNumber=number + 1,
                        Modality=entry.ScheduledProcedureStepSequence[0].Modality,
                        AccessionNumber=entry.AccessionNumber,
                        PatientName=str(entry.PatientName),
                        PatientBirthDate=entry.PatientBirthDate,
                        PatientSex=entry.PatientSex,
                        StudyDate=time.strftime("%Y%m%d"),
                    )
                )
            )
            for number in range(count)
        ]

    def push(self, images: list[Dataset]) -> bool:
        """Did Orthanc take them all? What it has already it takes again."""
        association = self._associate(CTImageStorage)
        if not association.is_established:
            return False
        try:
            return all(association.send_c_store(each).get("Status") == 0 for each in images)
        except (RuntimeError, ValueError):
            return False  # Orthanc went away
        finally:
            association.release()

    async def work(self, day: Day) -> None:
        done: set[str] = set()
        while len(day.sent_at) < day.orders:
            for entry in await asyncio.to_thread(self.worklist):
                accession = str(entry.AccessionNumber)
                if accession in done:
                    continue
                images = await asyncio.to_thread(self.scan, entry, 2 + len(done) % 4)
                await until(
                    partial(asyncio.to_thread, self.push, images),
                    "Orthanc takes no images",
                    DEADLINE_SECONDS,
                )
                done.add(accession)
                day.sent[accession] = len(images)
                day.sent_at[accession] = time.monotonic()
            await asyncio.sleep(0.2)


async def _disturb(day: Day, app: AppServer, orthanc: OrthancServer) -> None:
    """Kill the app at a third of the day, restart Orthanc at two thirds."""
    await day.until_scanned(day.orders // 3)
    assert app.pid is not None
    os.kill(app.pid, signal.SIGKILL)
    await asyncio.to_thread(app.stop)
    await asyncio.sleep(2)
    await asyncio.to_thread(app.start)
    await asyncio.to_thread(app.wait_until_ready)
    day.restarts += 1
    await day.until_scanned(2 * day.orders // 3)
    await asyncio.to_thread(orthanc.stop)
    await asyncio.sleep(1)
    await asyncio.to_thread(orthanc.start)
    await asyncio.to_thread(orthanc.wait_until_ready)
    day.restarts += 1


async def live(orders: int, folder: Path) -> int:
    """The day. 0 where every order has its own images and nothing else."""
    url = f"sqlite+aiosqlite:///{folder / 'lightbox.db'}"
    migrate(url)
    (folder / "spool").mkdir()
    with TwoModalities(folder / "orthanc") as orthanc:
        settings = make_settings(
            url,
            orthanc.url,
            orthanc_username=orthanc.username,
            orthanc_password=orthanc.password,
            spool_dir=folder / "spool",
            worklist_dir=orthanc.worklist_dir,
            follow_orthanc=True,
        )
        app = AppServer(free_port(), environment_of(settings), state_dir=folder / "app")
        day = Day(orders)
        backend = Backend(settings, app.url)
        stations = [Modality(title, orthanc) for title in STATIONS]
        with app:
            began = time.monotonic()
            try:
                async with asyncio.timeout(DEADLINE_SECONDS + 3 * orders):
                    await asyncio.gather(
                        backend.place(day),
                        backend.watch(day),
                        _disturb(day, app, orthanc),
                        _progress(day),
                        *(station.work(day) for station in stations),
                    )
                await backend.check(day)
                left = [each for station in stations for each in station.worklist()]
            except TimeoutError:
                left = []
                print("\nnot all orders got their images in time", file=sys.stderr)
            finally:
                await backend.close()
        took = time.monotonic() - began
    return _report(day, took, len(left))


async def _progress(day: Day) -> None:
    while len(day.linked_at) < day.orders:
        line = f"{len(day.placed)} placed, {len(day.sent_at)} scanned, {len(day.linked_at)} linked"
        print(f"\r{line}   ", end="", file=sys.stderr, flush=True)
        await asyncio.sleep(0.5)
    print(file=sys.stderr)


def _report(day: Day, took: float, left: int) -> int:
    waits = sorted(day.linked_at[each] - day.sent_at[each] for each in day.linked_at)
    print(f"orders placed {len(day.placed)}, scanned {len(day.sent)}, linked {len(waits)}")
    print(f"restarts in the middle: {day.restarts}; the day took {took:.0f} s")
    print(f"linked wrongly, doubled or not whole: {len(day.wrong)}; left on the worklist: {left}")
    if waits:
        print(
            f"from the last image sent to the images at the order (Orthanc waits "
            f"{STABLE_SECONDS} s to call a study stable): median {statistics.median(waits):.2f} s, "
            f"90 % {waits[int(len(waits) * 0.9)]:.2f} s, longest {waits[-1]:.2f} s"
        )
    return 0 if len(waits) == day.orders and not day.wrong and not left else 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.hospital_day", description=__doc__)
    parser.add_argument("--orders", type=int, default=200, help="how many (200)")
    with tempfile.TemporaryDirectory(prefix="lightbox-day-") as folder:
        return asyncio.run(live(parser.parse_args().orders, Path(folder)))


if __name__ == "__main__":
    sys.exit(main())
