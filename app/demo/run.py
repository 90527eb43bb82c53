"""The demo from start to Ctrl-C: Orthanc, app and edge as children, on a SQLite file.

Everything it keeps is in one folder (`.lightbox`, or LIGHTBOX_STATE_DIR); a second start finds
the same data. demo.json stands there exactly while everything answers.
"""

import fcntl
import json
import os
import secrets
import select
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
from pydantic import SecretStr
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from app.audit.signing import make_key
from app.db import migrate
from app.demo.ohif import ensure_ohif
from app.demo.seed import CLINICIAN, OTHER_CLINICIAN, WHO, Seeder
from app.demo.stack import (
    LOOPBACK,
    REPOSITORY,
    AppServer,
    Edge,
    OrthancServer,
    Server,
    SetupError,
    free_port,
    require_free_port,
)
from app.identity import Role, issue_token
from app.settings import Settings

TOKEN_MINUTES = 12 * 60
MODALITY = "MODALITY"  # the AE title that may ask for the worklist and send, from this machine
LINK_SECONDS = 60 * 60  # a person reads the terminal first; the real default is a minute


@dataclass(frozen=True)
class Ports:
    """The two public ports, and the private ones: given by the environment, or free ones."""

    api: int
    viewer: int
    app: int
    orthanc: int
    dicom: int

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "Ports":
        def port(name: str, default: int | None) -> int:
            text = environment.get(name, "")
            if not text:
                return free_port() if default is None else default
            if not (text.isascii() and text.isdigit() and 1 <= int(text[:6]) <= 65535):
                raise SetupError(f"{name} must be a port number from 1 to 65535.")
            return int(text)

        ports = cls(
            api=port("LIGHTBOX_API_PORT", 8000),
            viewer=port("LIGHTBOX_VIEWER_PORT", 3001),
            app=port("LIGHTBOX_APP_PORT", None),
            orthanc=port("LIGHTBOX_ORTHANC_PORT", None),
            dicom=port("LIGHTBOX_DICOM_PORT", None),
        )
        if len({ports.api, ports.viewer, ports.app, ports.orthanc, ports.dicom}) != 5:
            raise SetupError("The ports of the demo must all be different.")
        require_free_port(ports.api, "LIGHTBOX_API_PORT")
        require_free_port(ports.viewer, "LIGHTBOX_VIEWER_PORT")
        return ports


class Stopped(Exception):
    """Somebody asked the demo to end."""


def run_demo(console: Console) -> None:
    """Start everything, say where it is, and stay until asked to stop. Raises SetupError."""
    for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(each, _stop)
    state = _state_dir()
    started = time.monotonic()
    try:
        with ExitStack() as stack:
            stack.enter_context(_own(state))
            ports = Ports.from_environment(os.environ)
            demo = _Demo(state, ports, console)
            servers = demo.start(stack)
            demo.load()
            console.print(f"Up after {time.monotonic() - started:.0f} s.\n")
            demo.say_how()
            stack.enter_context(demo.announced())
            demo.wait(servers)
    except Stopped:
        pass
    finally:
        # A second Ctrl-C must not leave half of it running.
        for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(each, signal.SIG_IGN)
    console.print("\nStopped. Nothing was left running; `make demo` comes up with the same data.")


def kept_jwt_secret() -> SecretStr | None:
    """The secret that the demo's tokens are signed with; None before its first start."""
    try:
        kept = json.loads((_state_dir() / "secrets.json").read_text())
        return SecretStr(kept["jwt_secret"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


class _Demo:
    def __init__(self, state: Path, ports: Ports, console: Console) -> None:
        self._state = state
        self._ports = ports
        self._console = console
        self._kept = _kept_secrets(state)
        self._orthanc = OrthancServer(
            state / "orthanc",
            username="lightbox",
            password=self._kept["orthanc_password"],
            http_port=ports.orthanc,
            dicom_port=ports.dicom,
            modalities={MODALITY: LOOPBACK},
        )
        spool = state / "spool"
        spool.mkdir(mode=0o700, exist_ok=True)
        self._settings = Settings(
            database_url=f"sqlite+aiosqlite:///{state / 'lightbox.sqlite'}",
            api_base_url=f"http://localhost:{ports.api}",
            viewer_base_url=f"http://localhost:{ports.viewer}",
            orthanc_url=self._orthanc.url,
            orthanc_username=self._orthanc.username,
            orthanc_password=SecretStr(self._orthanc.password),
            jwt_secret=SecretStr(self._kept["jwt_secret"]),
            launch_code_seconds=LINK_SECONDS,
            spool_dir=spool,
            audit_key_file=_kept_audit_key(state),
            audit_checkpoint_file=state / "audit-checkpoints.jsonl",
            worklist_dir=self._orthanc.worklist_dir,
        )
        self._tokens = {
            name: issue_token(self._settings, sub, [Role(role)], TOKEN_MINUTES)
            for name, (sub, role, _) in WHO.items()
        }
        self._patients: list[Any] = []
        self._orders: list[Any] = []

    def start(self, stack: ExitStack) -> list[Server]:
        """The three servers, answering."""
        # Shared by all demos of this checkout: 50 MB that never change.
        cache = Path(os.environ.get("LIGHTBOX_CACHE_DIR") or REPOSITORY / ".lightbox" / "ohif")
        ohif = ensure_ohif(cache, self._step)
        migrate(self._settings.database_url)
        app = AppServer(
            self._ports.app, _environment(self._settings), state_dir=self._state / "app"
        )
        edge = Edge(
            self._state / "edge",
            api_port=self._ports.api,
            viewer_port=self._ports.viewer,
            app_port=self._ports.app,
            orthanc=self._orthanc,
            ohif_dir=ohif,
        )
        servers: list[Server] = [self._orthanc, app, edge]
        for server in servers:
            self._step(f"Starting {server.name}")
            stack.enter_context(server)
        return servers

    def load(self) -> None:
        """Patients, orders and images, through the API."""
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
        )
        self._step("Loading patients, orders and images through the API")
        with Progress(*columns, console=self._console) as bars:
            tasks: dict[str, Any] = {}

            def progress(what: str, done: int, total: int) -> None:
                if what not in tasks:
                    tasks[what] = bars.add_task(what, total=total)
                bars.update(tasks[what], completed=done)

            seeder = Seeder(self._settings.api_base_url, self._tokens)
            self._patients, self._orders = seeder.seed(progress)

    @contextmanager
    def announced(self) -> Iterator[None]:
        """demo.json, from when everything answers until it doesn't."""
        path = self._state / "demo.json"
        content = {
            "api": self._settings.api_base_url,
            "viewer": self._settings.viewer_base_url,
            "tokens": self._tokens,
            "patients": self._patients,
            "orders": self._orders,
        }
        unready = path.with_suffix(".tmp")
        unready.touch(mode=0o600)
        unready.write_text(json.dumps(content, indent=2))
        unready.replace(path)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)

    def say_how(self) -> None:
        """Who is who, and the links to click."""
        who = Table(
            "who", "role", "token in demo.json", "", title="Who is who", title_justify="left"
        )
        for name, (sub, role, what) in WHO.items():
            who.add_row(sub, role, name, what)
        self._console.print(who)
        self._console.print(
            f"\nAPI     {self._settings.api_base_url}/docs   (tokens: {self._state}/demo.json)"
            f"\nViewer  {self._settings.viewer_base_url}\n"
        )
        self._say_links()

    def _say_links(self) -> None:
        patients = {each["id"]: each for each in self._patients}
        self._console.print(
            "Links to click; each opens [bold]once[/], in the browser of this machine:\n"
        )
        for order in self._orders:
            if not order["study_instance_uid"]:
                continue
            patient = patients[order["patient_id"]]
            treats = OTHER_CLINICIAN if patient["mrn"] in ("LB-1003", "LB-1004") else CLINICIAN
            name = "clinician" if treats == CLINICIAN else "other_clinician"
            answer = httpx.get(
                f"{self._settings.api_base_url}/api/v1/dicom/viewer/url/order/{order['id']}",
                headers={"Authorization": f"Bearer {self._tokens[name]}"},
                timeout=30.0,
                trust_env=False,
            )
            if answer.is_error:
                raise SetupError(f"No link for {order['description']}: {answer.json()['detail']}")
            self._console.print(
                f"  {order['description']}, {patient['first_name']} {patient['last_name']}, "
                f"as {treats}:"
            )
            # Not wrapped and not marked up: a terminal must be able to open it.
            self._console.file.write(f"    {answer.json()['url']}\n")
        self._console.print(
            "\n[bold]Enter[/] makes new links, [bold]Ctrl-C[/] stops everything."
            if sys.stdin.isatty()
            else "\nCtrl-C or SIGTERM stops everything."
        )
        self._console.file.flush()

    def wait(self, servers: list[Server]) -> None:
        """Until a signal; Enter makes new links. Raises SetupError if a server ends by itself."""
        interactive = sys.stdin.isatty()
        while True:
            readable, _, _ = select.select([sys.stdin] if interactive else [], [], [], 1.0)
            if readable:
                if sys.stdin.readline() == "":
                    interactive = False  # the terminal has gone
                else:
                    self._say_links()
            for server in servers:
                if server.pid is None:
                    raise SetupError(
                        f"{server.name} ended by itself; its log is {server.log_path}."
                    )

    def _step(self, what: str) -> None:
        self._console.print(f"[bold]·[/] {what}")


def _state_dir() -> Path:
    return Path(os.environ.get("LIGHTBOX_STATE_DIR") or ".lightbox").resolve()


def _environment(settings: Settings) -> dict[str, str]:
    """The settings as the app's environment."""
    values: dict[str, str] = {}
    for name in sorted(settings.model_fields_set):
        value = getattr(settings, name)
        text = value.get_secret_value() if isinstance(value, SecretStr) else str(value)
        values[f"LIGHTBOX_{name.upper()}"] = text
    return values


def _kept_secrets(state: Path) -> dict[str, str]:
    """The demo's secrets: made at the first start, for the user's eyes only."""
    path = state / "secrets.json"
    if not path.exists():
        path.touch(mode=0o600)
        made = {"jwt_secret": secrets.token_hex(32), "orthanc_password": secrets.token_hex(24)}
        path.write_text(json.dumps(made))
    try:
        kept = json.loads(path.read_text())
        return {name: str(kept[name]) for name in ("jwt_secret", "orthanc_password")}
    except (ValueError, KeyError, TypeError) as error:
        raise SetupError(f"{path} can't be read; remove {state} to start afresh.") from error


def _kept_audit_key(state: Path) -> Path:
    """The key that signs the trail's checkpoints: made at the first start."""
    path = state / "audit-key.pem"
    with suppress(FileExistsError):
        make_key(path)
    return path


@contextmanager
def _own(state: Path) -> Iterator[None]:
    """The state folder, for one demo at a time."""
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (state / "lock").open("w")
    except OSError as error:
        raise SetupError(
            f"{state} can't be written ({error.strerror}); set LIGHTBOX_STATE_DIR to a folder "
            "that can."
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SetupError(
                f"A demo is running in {state} already; stop it, or set LIGHTBOX_STATE_DIR, "
                "LIGHTBOX_API_PORT and LIGHTBOX_VIEWER_PORT for a second one."
            ) from error
        yield


def _stop(_number: int, _frame: FrameType | None) -> None:
    raise Stopped
