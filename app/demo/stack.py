"""The processes of one Lightbox on this machine: Orthanc, the edge (nginx), the app.

`make demo` and the tests start them through the classes here. Each keeps everything it writes in
one folder, listens on private ports, and leaves nothing running behind:

    with OrthancServer(state / "orthanc", username="lightbox", password=secret) as orthanc:
        with Edge(state / "edge", api_port=8000, viewer_port=3001, app_port=app_port,
                  orthanc=orthanc, ohif_dir=ensure_ohif(cache, print)) as edge:
            ...

What cannot be set up is a `SetupError`, whose text is one sentence for the person at the terminal.
"""

import base64
import ctypes
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

REPOSITORY = Path(__file__).resolve().parents[2]
ORTHANC_CONFIGURATION = REPOSITORY / "orthanc" / "orthanc.json"
EDGE_TEMPLATES = tuple(
    REPOSITORY / "ohif" / name for name in ("nginx.conf.template", "orthanc.conf.template")
)
OHIF_CONFIGURATION = REPOSITORY / "ohif" / "app-config.js"

LOOPBACK = "127.0.0.1"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_POLL_SECONDS = 0.05
_STOP_SECONDS = 10.0
_LOG_TAIL_LINES = 5
_PLUGIN_FOLDERS = (
    Path("/usr/share/orthanc/plugins"),
    Path("/usr/share/orthanc/plugins-available"),
    Path("/usr/local/share/orthanc/plugins"),
    Path("/usr/lib/orthanc/plugins"),
)


class SetupError(Exception):
    """Something this machine lacks or refuses. The text is one sentence that says what to do."""


def free_port() -> int:
    """A TCP port of the loopback address that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def require_free_port(port: int, variable: str) -> None:
    """Raise SetupError if `port` is taken, naming the environment variable that moves it."""
    with socket.socket() as probe:
        # As servers do, so that the remains of a closed connection do not count as "in use".
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except PermissionError:
            raise SetupError(
                f"Port {port} needs a privilege that this user lacks; set {variable} to a port "
                "above 1023."
            ) from None
        except OSError:
            raise SetupError(
                f"Port {port} is in use by another program; set {variable} to a free one."
            ) from None


def find_program(name: str, candidates: Sequence[str], package: str) -> Path:
    """Path of an installed program: the first of `candidates` that exists, else by PATH.

    Raises SetupError, naming the `package` to install, if it is nowhere.
    """
    for candidate in candidates:
        if os.access(candidate, os.X_OK):
            return Path(candidate)
    found = shutil.which(name)
    if found is None:
        raise SetupError(f"{name} is not installed; on Debian: apt install {package}.")
    return Path(found)


def find_dicomweb_plugin() -> Path:
    """Path of Orthanc's DICOMweb plugin. Raises SetupError if it is not installed."""
    for folder in _PLUGIN_FOLDERS:
        for plugin in sorted(folder.glob("libOrthancDicomWeb.so*")):
            return plugin
    raise SetupError(
        "Orthanc's DICOMweb plugin is not installed; on Debian: apt install orthanc-dicomweb."
    )


def find_worklist_plugin() -> Path | None:
    """Path of Orthanc's worklist plugin; None where it is not installed."""
    found = (folder / "libModalityWorklists.so" for folder in _PLUGIN_FOLDERS)
    return next((plugin for plugin in found if plugin.exists()), None)


def _dies_with_parent(death_signal: signal.Signals) -> Callable[[], None]:
    """What a child runs before exec so that the kernel signals it when its parent dies."""
    libc = ctypes.CDLL(None, use_errno=True)
    parent = os.getpid()

    def arrange() -> None:
        if libc.prctl(_PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0) != 0:
            os._exit(126)
        if os.getppid() != parent:  # the parent died between fork and prctl
            os._exit(125)

    return arrange


class Server(ABC):
    """One child process with a log file, started, awaited and stopped.

    A context manager: entering starts it and waits until it answers; leaving stops it. Start it
    from a thread that lives as long as it should: the kernel takes the end of that thread for
    the death of the parent.
    """

    name: str
    """How messages call it."""
    death_signal = signal.SIGKILL
    """Sent by the kernel if our own process dies without stopping it."""

    def __init__(self, state_dir: Path) -> None:
        self.state_dir = state_dir.resolve()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    @abstractmethod
    def url(self) -> str:
        """Where it answers, without a trailing slash."""

    @abstractmethod
    def _prepare(self) -> tuple[Sequence[str | Path], Mapping[str, str]]:
        """Write what the program needs; return its command and environment."""

    @abstractmethod
    def _answers(self, client: httpx.Client) -> bool:
        """True once it is ready. May raise httpx.HTTPError, which means not yet."""

    @property
    def log_path(self) -> Path:
        """File with everything the program prints."""
        return self.state_dir / f"{self.name.lower().replace(' ', '-')}.log"

    @property
    def pid(self) -> int | None:
        """Process id while it runs, else None."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def start(self) -> None:
        """Start the program. Raises SetupError if it is missing or a port is taken."""
        if self.pid is not None:
            return
        self.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        command, environment = self._prepare()
        with self.log_path.open("ab") as log:
            # The lint rule warns of preexec_fn in threaded programs: ours makes two system
            # calls, takes no lock and allocates nothing the child could find half-done.
            self._process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=REPOSITORY,
                env=dict(environment),
                start_new_session=True,
                preexec_fn=_dies_with_parent(self.death_signal),  # noqa: PLW1509
            )

    def wait_until_ready(self, timeout: float = 30.0) -> None:
        """Return once it answers.

        Raises SetupError, with the end of its log, if it ends first or takes more than `timeout`
        seconds.
        """
        process = self._process
        if process is None:
            raise SetupError(f"{self.name} was not started.")
        deadline = time.monotonic() + timeout
        # trust_env: a proxy set for this user has no part in calls to the loopback address.
        with httpx.Client(timeout=2.0, trust_env=False) as client:
            while True:
                if process.poll() is not None:
                    raise SetupError(
                        f"{self.name} ended while starting (exit code {process.returncode}): "
                        f"{self._log_tail()}"
                    )
                try:
                    if self._answers(client):
                        return
                except httpx.HTTPError:
                    pass
                if time.monotonic() > deadline:
                    raise SetupError(
                        f"{self.name} did not answer within {timeout:.0f} s: {self._log_tail()}"
                    )
                time.sleep(_POLL_SECONDS)

    def stop(self) -> None:
        """End it: SIGTERM, and SIGKILL to the whole group if that takes more than ten seconds."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                pass
        # Also what the program may have left behind in its own group (nginx's workers).
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()

    def __enter__(self) -> Self:
        try:
            self.start()
            self.wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _log_tail(self) -> str:
        lines = self.log_path.read_text(errors="replace").splitlines() if self._has_log() else []
        tail = " | ".join(line.strip() for line in lines[-_LOG_TAIL_LINES:] if line.strip())
        return f"{tail or 'it printed nothing'} (log: {self.log_path})"

    def _has_log(self) -> bool:
        return self.log_path.is_file()


class OrthancServer(Server):
    """An Orthanc of our own, with `orthanc/orthanc.json`, its files in `state_dir`.

    A port of 0 means a free one; a `dicom_port` of None means no DICOM server. Orthanc before
    1.12.10 cannot bind its ports to one address: it refuses HTTP callers from elsewhere, and
    DICOM callers that are not in its configuration. `modalities` are those that are, AE title to
    address: they may send images and ask for the worklist, which is in `worklist_dir`, and
    nothing else. `encoding` is what Orthanc answers in.
    """

    name = "Orthanc"
    death_signal = signal.SIGTERM  # it closes its index first

    def __init__(
        self,
        state_dir: Path,
        *,
        username: str,
        password: str,
        http_port: int = 0,
        dicom_port: int | None = 0,
        modalities: Mapping[str, str] | None = None,
        encoding: str = "Latin1",
    ) -> None:
        super().__init__(state_dir)
        self.modalities = dict(modalities or {})
        self.encoding = encoding
        self.worklist_dir = self.state_dir / "worklist"
        for what, value in (("user name", username), ("password", password)):
            if re.fullmatch(r"[!#-\[\]-~]+", value) is None or "$" in value or ":" in username:
                raise SetupError(
                    f"Orthanc's {what} must be printable ASCII without spaces, quotes, "
                    "backslashes and dollar signs."
                )
        self.username = username
        self.password = password
        self.http_port = http_port or free_port()
        self.dicom_port = None if dicom_port is None else dicom_port or free_port()

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.http_port}"

    @property
    def authorization(self) -> str:
        """Value of the Authorization header that Orthanc accepts. A secret."""
        credential = f"{self.username}:{self.password}".encode()
        return "Basic " + base64.b64encode(credential).decode("ascii")

    def _prepare(self) -> tuple[Sequence[str | Path], Mapping[str, str]]:
        program = find_program("Orthanc", ("/usr/sbin/Orthanc",), "orthanc")
        plugin = find_dicomweb_plugin()
        require_free_port(self.http_port, "LIGHTBOX_ORTHANC_PORT")
        if self.dicom_port is not None:
            require_free_port(self.dicom_port, "LIGHTBOX_DICOM_PORT")
        storage = self.state_dir / "storage"
        storage.mkdir(exist_ok=True, mode=0o700)
        self.worklist_dir.mkdir(exist_ok=True, mode=0o700)
        worklist_plugin = find_worklist_plugin()
        environment = {
            **os.environ,
            "LIGHTBOX_ORTHANC_STORAGE": str(storage),
            "LIGHTBOX_ORTHANC_PLUGIN": str(plugin),
            "LIGHTBOX_ORTHANC_USERNAME": self.username,
            "LIGHTBOX_ORTHANC_PASSWORD": self.password,
            "LIGHTBOX_ORTHANC_PORT": str(self.http_port),
            "LIGHTBOX_ORTHANC_BIND": f'"{LOOPBACK}"',
            "LIGHTBOX_ORTHANC_REMOTE": "false",
            "LIGHTBOX_ORTHANC_DICOM_ENABLED": "false" if self.dicom_port is None else "true",
            "LIGHTBOX_ORTHANC_DICOM_PORT": str(self.dicom_port or 4242),
            "LIGHTBOX_ORTHANC_MODALITIES": self._modalities(),
            "LIGHTBOX_ORTHANC_ENCODING": self.encoding,
            "LIGHTBOX_ORTHANC_MORE_PLUGINS": f', "{worklist_plugin}"' if worklist_plugin else "",
            "LIGHTBOX_ORTHANC_WORKLIST_DIR": str(self.worklist_dir),
        }
        return [program, ORTHANC_CONFIGURATION], environment

    def _modalities(self) -> str:
        """The members of DicomModalities: Orthanc allows what is not forbidden."""
        forbidden = ("Find", "Get", "Move", "NAction", "NEventReport", "StorageCommitment")
        rights = {
            **{f"Allow{what}": True for what in ("Echo", "FindWorklist", "Store")},
            **{f"Allow{what}": False for what in forbidden},
        }
        entries = {
            title: {"AET": title, "Host": host, "Port": 104, **rights}
            for title, host in self.modalities.items()
        }
        return json.dumps(entries)[1:-1]

    def _answers(self, client: httpx.Client) -> bool:
        answer = client.get(f"{self.url}/system", headers={"Authorization": self.authorization})
        if answer.status_code in (401, 403):
            raise SetupError(
                f"Another Orthanc, with another password, answers on port {self.http_port}; set "
                "LIGHTBOX_ORTHANC_PORT to a free one."
            )
        return answer.status_code == 200


class Edge(Server):
    """nginx with `ohif/nginx.conf.template`: the API origin and the viewer origin.

    `ohif_dir` is the built viewer (`app.demo.ohif.ensure_ohif`). It runs as the current user,
    and nothing of it lies outside of `state_dir`.
    """

    name = "nginx"
    death_signal = signal.SIGTERM  # SIGKILL would leave its workers running

    def __init__(
        self,
        state_dir: Path,
        *,
        api_port: int,
        viewer_port: int,
        app_port: int,
        orthanc: OrthancServer,
        ohif_dir: Path,
    ) -> None:
        super().__init__(state_dir)
        self.api_port = api_port
        self.viewer_port = viewer_port
        self.app_port = app_port
        self.orthanc = orthanc
        self.ohif_dir = ohif_dir.resolve()

    @property
    def url(self) -> str:
        """The API origin."""
        return f"http://localhost:{self.api_port}"

    @property
    def viewer_url(self) -> str:
        """The viewer origin."""
        return f"http://localhost:{self.viewer_port}"

    @property
    def access_log_path(self) -> Path:
        """One JSON object a line; no query strings, no cookies."""
        return self.state_dir / "access.log"

    def _prepare(self) -> tuple[Sequence[str | Path], Mapping[str, str]]:
        program = find_program("nginx", ("/usr/sbin/nginx",), "nginx-light")
        require_free_port(self.api_port, "LIGHTBOX_API_PORT")
        require_free_port(self.viewer_port, "LIGHTBOX_VIEWER_PORT")
        if not (self.ohif_dir / "index.html").is_file():
            raise SetupError(f"There is no built viewer in {self.ohif_dir}.")
        configuration = self.state_dir / "nginx.conf"
        for template in EDGE_TEMPLATES:
            rendered = self.state_dir / template.stem
            # Orthanc's credential is in it.
            rendered.touch(mode=0o600)
            rendered.chmod(0o600)
            rendered.write_text(self._render(template), encoding="utf-8")
        # As root, nginx would give its workers to "nobody", who cannot read our folders.
        as_root = " user root;" if os.geteuid() == 0 else ""
        command: list[str | Path] = [program, "-p", self.state_dir, "-c", configuration]
        return [*command, "-e", self.log_path, "-g", f"daemon off;{as_root}"], os.environ

    def _render(self, template: Path) -> str:
        values = {
            "LIGHTBOX_EDGE_DIR": str(self.state_dir),
            "LIGHTBOX_ACCESS_LOG": str(self.access_log_path),
            "LIGHTBOX_ERROR_LOG": str(self.log_path),
            "LIGHTBOX_FRAME_CACHE_SIZE": "2g",
            "LIGHTBOX_API_LISTEN": f"{LOOPBACK}:{self.api_port}",
            "LIGHTBOX_VIEWER_LISTEN": f"{LOOPBACK}:{self.viewer_port}",
            "LIGHTBOX_APP_ADDRESS": f"{LOOPBACK}:{self.app_port}",
            "LIGHTBOX_ORTHANC_ADDRESS": f"{LOOPBACK}:{self.orthanc.http_port}",
            "LIGHTBOX_ORTHANC_AUTHORIZATION": self.orthanc.authorization,
            "LIGHTBOX_OHIF_DIR": str(self.ohif_dir),
            "LIGHTBOX_OHIF_CONFIG": str(OHIF_CONFIGURATION),
        }
        for name, value in values.items():
            if re.search(r'["\\$\x00-\x1f]', value):
                raise SetupError(
                    f"nginx cannot use the path {value!r} ({name}); move to a folder without "
                    "quotes, backslashes and dollar signs."
                )
        text = template.read_text(encoding="utf-8")
        return re.sub(r"\$\{(LIGHTBOX_[A-Z_]+)\}", lambda match: values[match[1]], text)

    def _answers(self, client: httpx.Client) -> bool:
        # A file, not a route of the app: the edge may stand before the app does.
        answer = client.get(f"http://{LOOPBACK}:{self.viewer_port}/app-config.js")
        return answer.status_code == 200


class AppServer(Server):
    """The app itself, listening on the loopback address for the edge.

    `environment` is added to ours and holds its settings (`LIGHTBOX_...`); `command` is for
    tests, which put something else in its place. `health_path` answers 200 once it is ready.
    """

    name = "Lightbox"

    def __init__(
        self,
        port: int,
        environment: Mapping[str, str],
        command: Sequence[str] | None = None,
        *,
        state_dir: Path,
        health_path: str = "/api/v1/dicom/health",
    ) -> None:
        super().__init__(state_dir)
        self.port = port
        self.environment = dict(environment)
        default = [sys.executable, "-m", "app", "serve", "--host", LOOPBACK, "--port", str(port)]
        self.command = list(default if command is None else command)
        self.health_path = health_path

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.port}"

    def _prepare(self) -> tuple[Sequence[str | Path], Mapping[str, str]]:
        require_free_port(self.port, "LIGHTBOX_APP_PORT")
        return self.command, {**os.environ, **self.environment, "PYTHONUNBUFFERED": "1"}

    def _answers(self, client: httpx.Client) -> bool:
        answer = client.get(self.url + self.health_path, headers={"X-Lightbox-Origin": "api"})
        return answer.status_code == 200
