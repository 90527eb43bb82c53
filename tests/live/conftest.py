"""Real parts for the live tests: Orthanc, PostgreSQL, and the whole of it behind the edge.

Servers are started once and shared; every test registers patients of its own, so that no test
sees another's data.
"""

import http.client
import os
import secrets
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import pydicom
import pytest
from pydantic import SecretStr
from pydicom.data import get_testdata_file
from pydicom.encaps import get_frame
from pydicom.uid import ExplicitVRLittleEndian
from sqlalchemy.engine import make_url

from app.db import migrate
from app.demo.stack import REPOSITORY, AppServer, Edge, OrthancServer, free_port
from app.main import create_app
from app.settings import Settings
from tests.lightbox import Lightbox, Opened, make_settings, running
from tests.servers import Orthanc, PostgresServer, orthanc_server, postgres_server

DATABASES = ("sqlite", "postgresql")


def unique(prefix: str = "MRN") -> str:
    """An identifier that no other test uses."""
    return f"{prefix}-{secrets.token_hex(5)}"


def sample(name: str) -> bytes:
    """A sample that ships inside pydicom's wheel; never downloaded."""
    path = get_testdata_file(name, download=False)
    assert isinstance(path, str), f"pydicom no longer ships {name}"
    return Path(path).read_bytes()


def stored_frame(content: bytes, number: int) -> tuple[bytes, str]:
    """A frame as PS3.18 8.7.3.3 has it sent, read by pydicom from the file, and its syntax:
    encapsulated frames as they are, others as Explicit VR Little Endian."""
    image = pydicom.dcmread(BytesIO(content))
    syntax = image.file_meta.TransferSyntaxUID
    assert syntax.is_little_endian
    frames = int(image.get("NumberOfFrames") or 1)
    if syntax.is_encapsulated:
        return get_frame(image.PixelData, number - 1, number_of_frames=frames), str(syntax)
    size = image.Rows * image.Columns * image.SamplesPerPixel * image.BitsAllocated // 8
    return image.PixelData[(number - 1) * size : number * size], str(ExplicitVRLittleEndian)


def audit_of(records: list[Any], action: str, outcome: str) -> list[Any]:
    """The records of one action and outcome."""
    return [each for each in records if (each["action"], each["outcome"]) == (action, outcome)]


# --------------------------------------------------------------------------------- the archive


@dataclass(frozen=True)
class Archive:
    """What Orthanc itself says, asked with its own credential and past Lightbox."""

    server: Orthanc

    def ask(self, method: str, path: str, **more: Any) -> httpx.Response:
        answer = httpx.request(
            method,
            self.server.url + path,
            auth=(self.server.username, self.server.password),
            trust_env=False,
            timeout=30.0,
            **more,
        )
        assert answer.is_success, f"{method} {path}: {answer.status_code} {answer.text}"
        return answer

    def without_credential(self, path: str) -> int:
        """The status that somebody gets who found the address."""
        return httpx.get(self.server.url + path, trust_env=False).status_code

    def alive(self) -> bool:
        return "Version" in self.ask("GET", "/system").json()

    def store(self, content: bytes) -> Any:
        """Store a file as a modality does: nobody asks Lightbox."""
        return self.ask("POST", "/instances", content=content).json()

    def find(self, uid: str) -> list[Any]:
        """Whatever has this UID: `{"ID", "Path", "Type"}` each."""
        found: list[Any] = self.ask("POST", "/tools/lookup", content=uid).json()
        return found

    def owners(self, study_uid: str) -> list[str]:
        """The PatientIDs under which a StudyInstanceUID is stored."""
        studies = [each["ID"] for each in self.find(study_uid) if each["Type"] == "Study"]
        patients = [self.ask("GET", f"/studies/{each}/patient").json() for each in studies]
        return sorted(each["MainDicomTags"]["PatientID"] for each in patients)

    def file(self, instance_id: str) -> bytes:
        """A stored file, byte for byte."""
        return self.ask("GET", f"/instances/{instance_id}/file").content

    def image(self, instance_id: str) -> pydicom.Dataset:
        return pydicom.dcmread(BytesIO(self.file(instance_id)))


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Archive]:
    """The Orthanc that the in-process apps share."""
    with orthanc_server(tmp_path_factory.mktemp("archive")) as server:
        yield Archive(server)


@pytest.fixture
def own_orthanc(tmp_path: Path) -> Iterator[OrthancServer]:
    """An Orthanc that the test may stop and start."""
    with OrthancServer(
        tmp_path / "orthanc", username="lightbox", password=secrets.token_hex(16), dicom_port=None
    ) as server:
        yield server


# -------------------------------------------------------------------------------- the database


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    with postgres_server() as server:
        yield server


@dataclass(frozen=True)
class DatabaseUrls:
    """A migrated database: as the owner of its tables, and as the application."""

    owner: str
    app: str

    @property
    def is_postgres(self) -> bool:
        return self.app.startswith("postgresql")

    @property
    def sync_owner(self) -> str:
        """For tests that look into the tables without an event loop."""
        return self.owner.replace("sqlite+aiosqlite", "sqlite")


def migrated(urls: tuple[str, str]) -> DatabaseUrls:
    owner, app = urls
    migrate(owner, make_url(app).username)
    return DatabaseUrls(owner, app)


@pytest.fixture(params=DATABASES)
def database(request: pytest.FixtureRequest) -> DatabaseUrls:
    """An empty database of this test's own, on each engine."""
    if request.param == "sqlite":
        url = request.getfixturevalue("sqlite_url")
        return DatabaseUrls(url, url)
    server: PostgresServer = request.getfixturevalue("postgres")
    return migrated(server.create_database())


# ------------------------------------------------------------------------ the app, in process


def settings_for(database_url: str, orthanc: Orthanc | OrthancServer, **more: Any) -> Settings:
    """Settings of an app on these parts."""
    return make_settings(
        database_url,
        orthanc.url,
        orthanc_username=orthanc.username,
        orthanc_password=SecretStr(orthanc.password),
        **more,
    )


@pytest.fixture
async def live(database: DatabaseUrls, archive: Archive, tmp_path: Path) -> AsyncIterator[Lightbox]:
    """The app on a real Orthanc and each real database."""
    async with running(settings_for(database.app, archive.server, spool_dir=tmp_path)) as each:
        yield each


@dataclass
class Person:
    """A patient of this test's own, with an order that `clinician` requested."""

    mrn: str
    patient: Any
    order: Any


async def make_person(lightbox: Lightbox, **order: Any) -> Person:
    mrn = unique()
    patient = await lightbox.patient(mrn)
    return Person(mrn, patient, await lightbox.order(patient, **order))


# ----------------------------------------------------------------- the whole, behind the edge


@dataclass
class Full:
    """A real app process on PostgreSQL, and nginx in front of it and Orthanc."""

    settings: Settings
    archive: Archive
    app: AppServer
    edge: Edge
    database: DatabaseUrls

    def get(self, origin: str, path: str, **headers: str) -> tuple[int, bytes]:
        """One GET with the path exactly as given: clients tidy it up before they send it."""
        port = {"api": self.edge.api_port, "viewer": self.edge.viewer_port}[origin]
        connection = http.client.HTTPConnection("localhost", port, timeout=30)
        try:
            connection.putrequest("GET", path, skip_accept_encoding=True)
            for name, value in headers.items():
                connection.putheader(name.replace("_", "-"), value)
            connection.endheaders()
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()


def environment_of(settings: Settings) -> dict[str, str]:
    """The settings as the environment of an app process."""
    values: dict[str, str] = {}
    for name in settings.model_fields_set:
        value = getattr(settings, name)
        text = value.get_secret_value() if isinstance(value, SecretStr) else str(value)
        values[f"LIGHTBOX_{name.upper()}"] = text
    return values


def command(*words: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """`python -m app ...`, run to its end."""
    return subprocess.run(
        [sys.executable, "-m", "app", *words],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture(scope="session")
def full(tmp_path_factory: pytest.TempPathFactory, postgres: PostgresServer) -> Iterator[Full]:
    """Orthanc, app and edge as they run for real; the viewer's files are a stand-in."""
    state = tmp_path_factory.mktemp("full")
    viewer_files = state / "viewer"
    viewer_files.mkdir()
    (viewer_files / "index.html").write_text("<!doctype html><title>the viewer</title>")
    spool = state / "spool"
    spool.mkdir()
    owner_url, app_url = postgres.create_database()
    api_port, viewer_port, app_port = free_port(), free_port(), free_port()
    orthanc = OrthancServer(
        state / "orthanc", username="lightbox", password=secrets.token_hex(16), dicom_port=None
    )
    settings = settings_for(
        app_url,
        orthanc,
        migration_database_url=owner_url,
        api_base_url=f"http://localhost:{api_port}",
        viewer_base_url=f"http://localhost:{viewer_port}",
        spool_dir=spool,
    )
    environment = environment_of(settings)
    migrating = command("migrate", environment=environment)
    assert migrating.returncode == 0, migrating.stderr
    app = AppServer(app_port, environment, state_dir=state / "app")
    edge = Edge(
        state / "edge",
        api_port=api_port,
        viewer_port=viewer_port,
        app_port=app_port,
        orthanc=orthanc,
        ohif_dir=viewer_files,
    )
    with orthanc, app, edge:
        urls = DatabaseUrls(owner_url, app_url)
        yield Full(settings, Archive(orthanc), app, edge, urls)


@dataclass
class Edged(Lightbox):
    """Lightbox as its callers meet it: the API origin, and the viewer's."""

    viewer: Lightbox

    async def open(self, path: str, *, role: str = "clinician", sub: str | None = None) -> Opened:
        link = await self.must(role, "GET", f"/dicom/viewer/url{path}", sub=sub)
        answer = await self.viewer.client.get(link["url"])
        assert answer.status_code == 303, answer.text
        cookie = answer.headers["set-cookie"].partition(";")[0]
        self.viewer.client.cookies.clear()
        location = httpx.URL(answer.headers["location"])
        code = httpx.URL(link["url"]).params["launch"]
        return Opened(self.viewer, link, code, location.params["ctx"], cookie)


@asynccontextmanager
async def edged(settings: Settings) -> AsyncIterator[Edged]:
    """A caller of the edge that stands at the base URLs of the settings."""
    never_started = create_app(settings)
    async with (
        httpx.AsyncClient(
            base_url=settings.api_base_url, trust_env=False, timeout=60.0
        ) as api_client,
        httpx.AsyncClient(
            base_url=settings.viewer_base_url, trust_env=False, timeout=60.0
        ) as viewer_client,
    ):
        viewer = Lightbox(never_started, settings, viewer_client)
        yield Edged(never_started, settings, api_client, viewer)


@pytest.fixture
async def through_edge(full: Full) -> AsyncIterator[Edged]:
    async with edged(full.settings) as each:
        yield each
