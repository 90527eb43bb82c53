"""What is measured: Lightbox as it runs for real, and the same Orthanc asked directly.

Servers and data come when a row first asks for them, and go with the site.
"""

import json
import os
import random
import secrets
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import httpx
from playwright.sync_api import Browser, sync_playwright
from pydantic import SecretStr
from sqlalchemy.engine import make_url

from app.db import migrate
from app.demo.ohif import ensure_ohif
from app.demo.stack import (
    LOOPBACK,
    REPOSITORY,
    AppServer,
    Edge,
    OrthancServer,
    Server,
    find_dicomweb_plugin,
    find_program,
)
from app.identity import Role, issue_token
from app.settings import Settings
from tests.bench import data
from tests.bench.client import BenchError, Source
from tests.bench.postgres import durable_postgres
from tests.lightbox import make_settings
from tests.live.conftest import environment_of

OHIF_CACHE = REPOSITORY / ".lightbox" / "ohif"
CLINICIAN = "clinician"
SINGLE_PART = "application/octet-stream; transfer-syntax=*"
MULTIPART = 'multipart/related; type="application/octet-stream"; transfer-syntax=*'
GZIP = "gzip"
BROWSER = "gzip, deflate, br"
STUDIES_A_PATIENT = 5
STABLE_SECONDS = 60.0
CHROMIUM_ARGUMENTS = [  # as for the browser tests
    "--use-gl=angle",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


def quiet_port() -> int:
    """A free port below those that the kernel gives to clients: ours open so many connections
    that one might take the port of a server while it restarts."""
    while True:
        port = random.randrange(20_000, 30_000)
        with socket.socket() as probe:
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
            return port


@dataclass(frozen=True)
class Image:
    """Where one instance stands in DICOMweb, below a root."""

    study: str
    series: str
    instance: str

    @property
    def frame(self) -> str:
        return f"/studies/{self.study}/series/{self.series}/instances/{self.instance}/frames/1"


@dataclass(frozen=True)
class Loaded:
    """A series that both sides hold: its patient, its images, and the first file."""

    patient: Any
    order: Any
    images: tuple[Image, ...]
    sample: bytes

    @property
    def study(self) -> str:
        return self.images[0].study

    @property
    def series(self) -> str:
        return self.images[0].series


@dataclass(frozen=True)
class Session:
    """An open viewer: what OHIF's requests look like."""

    source: Source
    root: str
    """`/s/<ctx>/dicom-web`."""

    def at(self, origin: str) -> Source:
        """The same browser, at another edge."""
        return Source(origin, self.source.headers)


class Site:
    """Orthanc, app and edge in a folder of their own, and a small client of the API."""

    def __init__(self, folder: Path, *, database: str, quick: bool) -> None:
        self.folder = folder
        self.database = database
        self.slices = 60 if quick else 200
        self.small_studies = 60 if quick else 200
        self.quick = quick
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    # ------------------------------------------------------------------------------ servers

    @cached_property
    def orthanc(self) -> OrthancServer:
        """The one Orthanc of both sides."""
        return self._stack.enter_context(
            OrthancServer(
                self.folder / "orthanc",
                username="lightbox",
                password=secrets.token_hex(16),
                http_port=quiet_port(),
                dicom_port=None,
            )
        )

    def wait_until_stable(self, study_uid: str) -> None:
        """Until Orthanc takes a study for complete."""
        with httpx.Client(
            base_url=self.orthanc.url,
            headers={"Authorization": self.orthanc.authorization},
            trust_env=False,
            timeout=60.0,
        ) as client:
            (found,) = client.post("/tools/lookup", content=study_uid).json()
            deadline = time.monotonic() + STABLE_SECONDS
            while not client.get(found["Path"]).json()["IsStable"]:
                if time.monotonic() > deadline:
                    raise BenchError("Orthanc does not take the study for complete")
                time.sleep(0.2)

    @cached_property
    def _postgres(self) -> Any:
        return self._stack.enter_context(durable_postgres())

    def new_database(self, name: str) -> tuple[str, str]:
        """The URLs of a migrated, empty database: as its owner, and as the app."""
        if self.database == "postgresql":
            owner, app = self._postgres.create_database()
            migrate(owner, make_url(app).username)
            return owner, app
        url = f"sqlite+aiosqlite:///{self.folder / f'{name}.sqlite'}"
        migrate(url)
        return url, url

    @cached_property
    def lightbox(self) -> "LightboxServers":
        """App and edge, running."""
        owner_url, app_url = self.new_database("lightbox")
        return self._stack.enter_context(LightboxServers(self, "lightbox", owner_url, app_url))

    def another_lightbox(self, name: str, owner_url: str, app_url: str) -> "LightboxServers":
        """A second pair of app and edge, on a database of its own."""
        return self._stack.enter_context(LightboxServers(self, name, owner_url, app_url))

    @cached_property
    def direct(self) -> Source:
        """Orthanc as a client meets it that asks it itself."""
        return Source(self.orthanc.url, {"Authorization": self.orthanc.authorization})

    @cached_property
    def ohif(self) -> Path:
        return ensure_ohif(OHIF_CACHE, print)

    @cached_property
    def plain(self) -> "PlainNginx":
        """The customary set-up: OHIF's files and a proxy to Orthanc."""
        server = PlainNginx(
            self.folder / "plain",
            orthanc_url=self.orthanc.url,
            authorization=self.orthanc.authorization,
            ohif_dir=self.ohif,
        )
        return self._stack.enter_context(server)

    @cached_property
    def plain_defaults(self) -> "PlainNginx":
        """The same before an Orthanc as it comes, which asks for no credential of local callers."""
        server = PlainNginx(
            self.folder / "plain-defaults",
            orthanc_url=self.default_orthanc.url,
            authorization="",
            ohif_dir=self.ohif,
        )
        return self._stack.enter_context(server)

    @cached_property
    def chromium(self) -> Browser:
        """Headless, and rendering in software, as there is no GPU."""
        program = find_program("chromium", ("/usr/bin/chromium",), "chromium")
        playwright = self._stack.enter_context(sync_playwright())
        browser = playwright.chromium.launch(executable_path=program, args=CHROMIUM_ARGUMENTS)
        self._stack.callback(browser.close)
        return browser

    @cached_property
    def default_orthanc(self) -> "DefaultOrthanc":
        """An Orthanc as it comes, with the CT."""
        server = self._stack.enter_context(DefaultOrthanc(self.folder / "default-orthanc"))
        with httpx.Client(base_url=server.url, timeout=60.0, trust_env=False) as client:
            for each in self.ct_files():
                client.post("/instances", content=each).raise_for_status()
        return server

    # ------------------------------------------------------------------------- the API client

    @cached_property
    def _client(self) -> httpx.Client:
        client = httpx.Client(
            base_url=self.lightbox.settings.api_base_url, trust_env=False, timeout=60.0
        )
        return self._stack.enter_context(client)

    def token(self, role: str, sub: str | None = None) -> str:
        return issue_token(self.lightbox.settings, sub or role, [Role(role)], minutes=600)

    def must(self, role: str, method: str, path: str, **more: Any) -> Any:
        """The JSON of an API request that has to succeed."""
        headers = {"Authorization": f"Bearer {self.token(role)}"}
        answer = self._client.request(method, f"/api/v1{path}", headers=headers, **more)
        if not answer.is_success:
            raise BenchError(f"{method} {path}: {answer.status_code} {answer.text}")
        return answer.json() if answer.content else None

    def patient(self, mrn: str) -> Any:
        person = {"first_name": "Mark", "last_name": "Bench", "dob": "1980-01-01", "sex": "F"}
        return self.must("service", "POST", "/patients", json={**person, "mrn": mrn})

    def order(self, patient: Any) -> Any:
        """An order of CLINICIAN."""
        order = {
            "patient_id": patient["id"],
            "order_type": "IMAGING",
            "order_category": "CT",
            "description": "CT for measuring",
            "status": "scheduled",
            "requested_by": CLINICIAN,
        }
        return self.must("service", "POST", "/orders", json=order)

    def upload(self, content: bytes, order: Any) -> Any:
        return self.must(
            "technologist",
            "POST",
            "/dicom/upload",
            files={"file": ("image.dcm", content, "application/dicom")},
            data={"order_id": order["id"]},
        )

    def link(self, path: str) -> str:
        """A fresh viewer link; `path` goes below `/viewer/url`."""
        url: str = self.must(CLINICIAN, "GET", f"/dicom/viewer/url{path}")["url"]
        return url

    def open(self, path: str) -> Session:
        """Open a viewer as a browser does."""
        answer = httpx.get(self.link(path), trust_env=False)
        if answer.status_code != 303:
            raise BenchError(f"a viewer did not open: {answer.status_code}")
        ctx = httpx.URL(answer.headers["location"]).params["ctx"]
        cookie = answer.headers["set-cookie"].partition(";")[0]
        source = Source(self.lightbox.edge.viewer_url, {"Cookie": cookie})
        return Session(source, f"/s/{ctx}/dicom-web")

    # --------------------------------------------------------------------------------- data

    def ct_files(self) -> Iterator[bytes]:
        study = data.uid("ct")
        return data.ct_files(
            self.slices, mrn="BENCH-CT", study_uid=study, series_uid=data.uid("ct", "series")
        )

    @cached_property
    def ct(self) -> Loaded:
        """The uncompressed CT: half a MiB a slice."""
        return self._load("BENCH-CT", self.ct_files())

    @cached_property
    def compressed(self) -> Loaded:
        """The JPEG 2000 CT."""
        return self._load(
            "BENCH-J2K",
            data.compressed_files(
                self.slices,
                mrn="BENCH-J2K",
                study_uid=data.uid("j2k"),
                series_uid=data.uid("j2k", "series"),
            ),
        )

    @cached_property
    def small(self) -> list[Loaded]:
        """Studies of one small slice, five a patient."""
        loaded: list[Loaded] = []
        for index in range(self.small_studies):
            number, nth = divmod(index, STUDIES_A_PATIENT)
            mrn = f"BENCH-{number:05}"
            files = data.ct_files(
                1,
                mrn=mrn,
                study_uid=data.uid("small", index),
                series_uid=data.uid("small", index, "series"),
                size=64,
                study_date=f"2024{nth + 1:02}15",
            )
            known = loaded[-1].patient if nth else None
            loaded.append(self._load(mrn, files, known))
        return loaded

    def _load(self, mrn: str, files: Iterator[bytes], patient: Any = None) -> Loaded:
        """Bring a series in as a technologist does."""
        patient = patient or self.patient(mrn)
        order = self.order(patient)
        images: list[Image] = []
        sample = b""
        for content in files:
            sample = sample or content
            told = self.upload(content, order)
            images.append(
                Image(
                    told["study_instance_uid"],
                    told["series_instance_uid"],
                    told["sop_instance_uid"],
                )
            )
        return Loaded(patient, order, tuple(images), sample)


class LightboxServers:
    """An app and an edge on one database."""

    def __init__(self, site: Site, name: str, owner_url: str, app_url: str) -> None:
        self.owner_url = owner_url
        state = site.folder / name
        spool = state / "spool"
        spool.mkdir(parents=True)
        api_port, viewer_port, app_port = quiet_port(), quiet_port(), quiet_port()
        self.settings: Settings = make_settings(
            app_url,
            site.orthanc.url,
            orthanc_username=site.orthanc.username,
            orthanc_password=SecretStr(site.orthanc.password),
            api_base_url=f"http://localhost:{api_port}",
            viewer_base_url=f"http://localhost:{viewer_port}",
            launch_code_seconds=600,
            session_idle_minutes=600,
            spool_dir=spool,
        )
        self.app = AppServer(app_port, environment_of(self.settings), state_dir=state / "app")
        self.edge = Edge(
            state / "edge",
            api_port=api_port,
            viewer_port=viewer_port,
            app_port=app_port,
            orthanc=site.orthanc,
            ohif_dir=site.ohif,
        )
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self.app)
            stack.enter_context(self.edge)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def forget_frames(self) -> None:
        """Start the edge anew, without the frames that it kept."""
        self.edge.stop()
        kept = self.edge.state_dir / "kept"
        if kept.exists():
            # Removed at the end only: ext4 makes whoever creates files wait for what went just now.
            kept.rename(kept.with_name(f"was-kept-{time.monotonic_ns()}"))
        restart(self.edge)

    def forget(self) -> None:
        """Start the app anew, too: nothing that it may have kept in memory is left."""
        self.forget_frames()
        restart(self.app)

    def processes(self) -> Mapping[str, Sequence[int]]:
        """The process ids of the app and of the edge, workers included."""
        return {
            name: [pid, *_children(pid)]
            for name, server in (("app", self.app), ("edge", self.edge))
            if (pid := server.pid) is not None
        }


def restart(server: Server) -> None:
    """Stop it and start it again, at the same place with the same files."""
    server.stop()
    server.start()
    server.wait_until_ready()


def _children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


# ----------------------------------------------------------------------------- the other side

_DEFAULT_CONFIGURATION: Mapping[str, Any] = {
    "Name": "Defaults",
    "DicomServerEnabled": False,  # only to need no port
    "DicomWeb": {"Enable": True},
}


class DefaultOrthanc(Server):
    """Orthanc and its DICOMweb plugin with their defaults: it compresses what it sends."""

    name = "Default Orthanc"

    def __init__(self, state_dir: Path) -> None:
        super().__init__(state_dir)
        self.port = quiet_port()

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.port}"

    def _prepare(self) -> tuple[Sequence[str | Path], Mapping[str, str]]:
        configuration = self.state_dir / "orthanc.json"
        places = {
            "HttpPort": self.port,
            "StorageDirectory": str(self.state_dir / "storage"),
            "IndexDirectory": str(self.state_dir / "storage"),
            "Plugins": [str(find_dicomweb_plugin())],
        }
        configuration.write_text(json.dumps({**_DEFAULT_CONFIGURATION, **places}))
        program = find_program("Orthanc", ("/usr/sbin/Orthanc",), "orthanc")
        return [program, configuration], os.environ

    def _answers(self, client: httpx.Client) -> bool:
        return client.get(f"{self.url}/system").status_code == 200


_PLAIN_NGINX = """\
worker_processes 2;
pid "{state}/nginx.pid";
error_log "{state}/nginx.log" error;
events {{ worker_connections 1024; }}
http {{
    client_body_temp_path "{state}/body";
    proxy_temp_path "{state}/proxy";
    fastcgi_temp_path "{state}/fastcgi";
    uwsgi_temp_path "{state}/uwsgi";
    scgi_temp_path "{state}/scgi";
    include /etc/nginx/mime.types;
    types {{ application/wasm wasm; }}
    default_type application/octet-stream;
    access_log "{state}/access.log";
    sendfile on;
    tcp_nopush on;
    gzip on;
    gzip_proxied any;
    gzip_types application/dicom+json application/json application/javascript text/css
               application/wasm image/svg+xml;
    server {{
        listen {listen};
        add_header Cross-Origin-Opener-Policy same-origin;
        add_header Cross-Origin-Embedder-Policy require-corp;
        location /dicom-web/ {{
            proxy_pass http://{orthanc};
            proxy_http_version 1.1;
            proxy_buffering off;
            proxy_set_header Host $http_host;
            proxy_set_header Connection "";
            proxy_set_header Authorization "{authorization}";
        }}
        location = /floor {{ alias "{state}/floor"; }}
        location = /app-config.js {{ alias "{state}/app-config.js"; }}
        location = /init-service-worker.js {{
            default_type application/javascript;
            return 200 "";
        }}
        location / {{
            root "{ohif}";
            try_files $uri /index.html;
        }}
    }}
}}
"""

_PLAIN_CONFIG = """\
window.config = {
  name: 'direct', routerBasename: null, extensions: [], modes: [],
  customizationService: { 'ohif.tours': { $set: [] } },
  showStudyList: false,
  showLoadingIndicator: true,
  strictZSpacingForVolumeViewport: true,
  investigationalUseDialog: { option: 'configure', days: 30 },
  maxNumberOfWebWorkers: 3,
  maxNumRequests: { interaction: 100, thumbnail: 5, prefetch: 10 },
  studyPrefetcher: { enabled: false },
  defaultDataSourceName: 'dicomweb',
  dataSources: [{
    namespace: '@ohif/extension-default.dataSourcesModule.dicomweb',
    sourceName: 'dicomweb',
    configuration: {
      friendlyName: 'Orthanc', name: 'orthanc',
      qidoRoot: '/dicom-web', wadoRoot: '/dicom-web', wadoUriRoot: '/wado',
      qidoSupportsIncludeField: true, supportsFuzzyMatching: false, supportsWildcard: false,
      supportsReject: false, supportsStow: false, dicomUploadEnabled: false,
      imageRendering: 'wadors', thumbnailRendering: 'wadors',
      enableStudyLazyLoad: true, omitQuotationForMultipartRequest: true,
      bulkDataURI: { enabled: true, relativeResolution: 'studies' },
    },
  }],
};
"""


class PlainNginx(Server):
    """nginx as people put it before OHIF and Orthanc: static files, and one location that adds
    Orthanc's credential. Also the floor of our clients: one file of a frame's size."""

    name = "Plain nginx"

    def __init__(
        self, state_dir: Path, *, orthanc_url: str, authorization: str, ohif_dir: Path
    ) -> None:
        super().__init__(state_dir)
        self.port = quiet_port()
        self.orthanc_url = orthanc_url
        self.authorization = authorization
        self.ohif_dir = ohif_dir

    @property
    def url(self) -> str:
        return f"http://localhost:{self.port}"

    def _prepare(self) -> tuple[Sequence[str | Path], Mapping[str, str]]:
        program = find_program("nginx", ("/usr/sbin/nginx",), "nginx-light")
        (self.state_dir / "floor").write_bytes(data.pixels(1))
        (self.state_dir / "app-config.js").write_text(_PLAIN_CONFIG)
        configuration = self.state_dir / "nginx.conf"
        configuration.touch(mode=0o600)
        configuration.write_text(
            _PLAIN_NGINX.format(
                state=self.state_dir,
                listen=f"{LOOPBACK}:{self.port}",
                orthanc=urlsplit(self.orthanc_url).netloc,
                authorization=self.authorization,
                ohif=self.ohif_dir,
            )
        )
        as_root = " user root;" if os.geteuid() == 0 else ""
        command: list[str | Path] = [program, "-p", self.state_dir, "-c", configuration]
        return [*command, "-e", self.log_path, "-g", f"daemon off;{as_root}"], os.environ

    def _answers(self, client: httpx.Client) -> bool:
        return client.get(f"http://{LOOPBACK}:{self.port}/app-config.js").status_code == 200
