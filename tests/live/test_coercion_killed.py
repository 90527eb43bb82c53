"""`kill -9` at each point of a coercion, and what there is of it after the next start.

Either nothing has happened, the original is whole and waits as before; or all has: one linked copy
that says what it was, one record, and the original is kept or removed. Never both, never neither.
"""

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from pydicom.uid import generate_uid

from app.demo.stack import REPOSITORY, free_port
from app.identity import Role, issue_token
from app.settings import Settings
from tests.images import ct_image
from tests.killed.coercion import AFTER_THE_LINK, BEFORE_THE_LINK, OF_A_REMOVAL
from tests.live.arrivals import QuickOrthanc, following
from tests.live.conftest import Archive, DatabaseUrls, command, environment_of, migrated, unique
from tests.servers import PostgresServer

DEADLINE_SECONDS = 90.0


def until(what: Callable[[], Any], why: str) -> Any:
    """What it says, once that is something."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not (found := what()):
        assert time.monotonic() < deadline, f"never came: {why}"
        time.sleep(0.05)  # between two looks
    return found


@dataclass
class Site:
    """One archive and one database, and an app that comes and goes."""

    settings: Settings
    urls: DatabaseUrls
    archive: Archive
    folder: Path

    @contextmanager
    def app(self, point: str = "") -> Iterator["App"]:
        port = free_port()
        with (self.folder / "app.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.killed.coercion", str(port), point],
                cwd=REPOSITORY,
                env={**os.environ, **environment_of(self.settings)},
                stdout=log,
                stderr=log,
            )
        with httpx.Client(
            base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60.0
        ) as client:
            try:
                app = App(self.settings, client, process)
                until(app.answers, "the app")
                yield app
            finally:
                process.kill()
                process.wait(30)

    def rows(self, text: str, **values: Any) -> list[Any]:
        engine = sa.create_engine(self.urls.sync_owner)
        try:
            with engine.connect() as connection:
                return list(connection.execute(sa.text(text), values))
        finally:
            engine.dispose()

    def settled(self) -> bool:
        """Is nothing left to be found out about, deleted or removed?"""
        open_ones = self.rows("SELECT 1 FROM operation")
        left = self.rows(
            "SELECT 1 FROM study_copy c JOIN arrival a ON a.orthanc_id = c.orthanc_id"
            " WHERE c.operation <> '' AND a.state <> 'gone'"
        )
        going = self.rows("SELECT 1 FROM study_copy WHERE operation = '' AND original_goes")
        return not open_ones and not left and not going

    def instances(self, study_uid: str) -> list[str]:
        """Orthanc's ids of what it holds of a study."""
        studies = [each for each in self.archive.find(study_uid) if each["Type"] == "Study"]
        return [
            each["ID"]
            for study in studies
            for each in self.archive.ask("GET", f"/studies/{study['ID']}/instances").json()
        ]

    def of_patient(self, mrn: str) -> list[str]:
        """StudyInstanceUIDs that Orthanc holds under a PatientID."""
        question = {"Level": "Study", "Query": {"PatientID": mrn}, "Expand": True}
        found = self.archive.ask("POST", "/tools/find", json=question).json()
        return [each["MainDicomTags"]["StudyInstanceUID"] for each in found]


@dataclass
class App:
    settings: Settings
    client: httpx.Client
    process: "subprocess.Popen[bytes]"

    def ask(self, role: str, method: str, path: str, **more: Any) -> httpx.Response:
        token = issue_token(self.settings, role, [Role(role)], minutes=60)
        headers = {"Authorization": f"Bearer {token}"}
        return self.client.request(method, f"/api/v1{path}", headers=headers, **more)

    def must(self, role: str, method: str, path: str, **more: Any) -> Any:
        answer = self.ask(role, method, path, **more)
        assert answer.is_success, f"{method} {path}: {answer.status_code} {answer.text}"
        return answer.json()

    def answers(self) -> bool:
        assert self.process.poll() is None, "the app has died"
        try:
            return self.client.get("/api/v1/health/live").status_code < 500
        except httpx.TransportError:
            return False

    def waits(self, uid: str) -> Any:
        """The study as it waits; None: it does not yet."""
        answer = self.ask("radiologist", "GET", f"/reconciliation/{uid}")
        return answer.json() if answer.is_success and answer.json()["candidates"] else None


@dataclass
class Case:
    """A patient, and a study of theirs that came with a slip in the PatientID."""

    patient: Any
    order: Any
    uid: str
    files: list[bytes]

    @classmethod
    def make(cls, site: Site, app: App) -> "Case":
        mrn = unique()
        name = "".join(secrets.choice("bcdfghklmnprstvw") + secrets.choice("aeiou") for _ in "abc")
        person = {"first_name": "Jane", "last_name": name.title(), "dob": "1980-01-01", "sex": "F"}
        patient = app.must("service", "POST", "/patients", json={**person, "mrn": mrn})
        order = {
            "patient_id": patient["id"],
            "order_category": "CT",
            "status": "scheduled",
            "requested_by": "clinician",
        }
        uid, series = str(generate_uid(None)), str(generate_uid(None))
        files = [
            ct_image(
                patient_id=f"{mrn}X",
                study_uid=uid,
                series_uid=series,
                InstanceNumber=number,
                PatientName=f"{name.title()}^Jane",
            )
            for number in (1, 2)
        ]
        made = cls(patient, app.must("service", "POST", "/orders", json=order), uid, files)
        for each in files:
            site.archive.store(each)
        return made

    def confirm(self, app: App) -> httpx.Response:
        row = until(lambda: app.waits(self.uid), "the study waits")
        body = {"order_id": self.order["id"], "version": row["version"], "coerce": True}
        return app.ask("radiologist", "POST", f"/reconciliation/{self.uid}/confirm", json=body)


def nothing_happened(site: Site, app: App, case: Case) -> None:
    assert site.of_patient(case.patient["mrn"]) == []
    stored = sorted(site.archive.file(each) for each in site.instances(case.uid))
    assert stored == sorted(case.files)
    order = app.must("service", "GET", f"/orders/{case.order['id']}")
    assert order["studies"] == []
    row = until(lambda: app.waits(case.uid), "the study waits again")
    assert (row["state"], row["decision"], row["decided_by"]) == ("proposed", "", "")
    (arrival,) = site.rows(
        "SELECT held, due_at FROM arrival WHERE study_instance_uid = :uid", uid=case.uid
    )
    assert not arrival.held


def done(site: Site, app: App, case: Case, *, removed: bool) -> None:
    (copy,) = app.must("service", "GET", f"/orders/{case.order['id']}")["studies"]
    assert site.of_patient(case.patient["mrn"]) == [copy]
    linked = site.rows("SELECT orthanc_id FROM instance WHERE study_instance_uid = :uid", uid=copy)
    assert sorted(each.orthanc_id for each in linked) == sorted(site.instances(copy))
    assert len(linked) == 2
    for each in site.instances(copy):
        image = site.archive.image(each)
        was = image.OriginalAttributesSequence[0].ModifiedAttributesSequence[0]
        assert (was.PatientID, was.StudyInstanceUID) == (f"{image.PatientID}X", case.uid)
    records = site.rows(
        "SELECT detail FROM audit_record WHERE action = 'study:coerce' AND outcome = 'done'"
        " AND study_instance_uid = :uid",
        uid=copy,
    )
    assert len(records) == 1
    stored = sorted(site.archive.file(each) for each in site.instances(case.uid))
    assert stored == ([] if removed else sorted(case.files))
    (arrival,) = site.rows(
        "SELECT state, decision FROM arrival WHERE study_instance_uid = :uid", uid=case.uid
    )
    assert arrival.state in ({"rejected", "gone"} if removed else {"rejected"})
    assert arrival.decision == f"coerced: the copy is {copy}"


def kill_at(site: Site, point: str, *, removes: bool) -> None:
    with site.app(point) as app:
        case = Case.make(site, app)
        with pytest.raises(httpx.TransportError):
            case.confirm(app)
        assert app.process.wait(30) == -9
    with site.app() as app:
        until(site.settled, "settled")
        if point in BEFORE_THE_LINK:
            nothing_happened(site, app, case)
            answer = case.confirm(app)
            assert answer.status_code == 200, answer.text
        done(site, app, case, removed=removes)
        # It is not linked a second time, whoever asks.
        row = app.ask("radiologist", "GET", f"/reconciliation/{case.uid}")
        if row.is_success:
            body = {"patient_id": case.patient["id"], "version": row.json()["version"]}
            path = f"/reconciliation/{case.uid}/confirm"
            again = app.ask("radiologist", "POST", path, json={**body, "coerce": True})
            assert again.status_code in (404, 409), again.text
        done(site, app, case, removed=removes)


@pytest.mark.parametrize(
    ("kind", "original", "points"),
    [
        ("sqlite", "remove", (*BEFORE_THE_LINK, *AFTER_THE_LINK, *OF_A_REMOVAL)),
        ("postgresql", "keep", (*BEFORE_THE_LINK, *AFTER_THE_LINK)),
    ],
)
def test_at_each_point_all_of_it_is_done_or_nothing(
    kind: str,
    original: str,
    points: tuple[str, ...],
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    if kind == "sqlite":
        url = request.getfixturevalue("sqlite_url")
        urls = DatabaseUrls(url, url)
    else:
        server: PostgresServer = request.getfixturevalue("postgres")
        urls = migrated(server.create_database())
    with QuickOrthanc(tmp_path / "orthanc") as orthanc:
        settings = following(
            urls.app,
            orthanc,
            tmp_path,
            reconciliation_original=original,
            migration_database_url=urls.owner,
            orthanc_timeout_seconds=10.0,
        )
        site = Site(settings, urls, Archive(orthanc), tmp_path)
        for point in points:
            kill_at(site, point, removes=original == "remove")
    verified = command("audit", "verify", environment=environment_of(settings))
    assert verified.returncode == 0, verified.stdout + verified.stderr
