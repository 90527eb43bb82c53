"""Real servers for the tests: PostgreSQL and Orthanc.

Where a Docker engine answers they run in containers, by testcontainers; else the programs
installed on this machine are started. The tests can't tell which. The container branch was
written where no engine was at hand: it has passed the type checker and nothing else yet.
"""

import ctypes
import gc
import os
import pwd
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import psycopg
import pytest
from psycopg import sql
from sqlalchemy.engine import URL, make_url

from app.demo.stack import LOOPBACK, ORTHANC_CONFIGURATION, OrthancServer, free_port

POSTGRES_IMAGE = "postgres:15"
ORTHANC_IMAGE = "orthancteam/orthanc:26.7.0"
OLDEST_POSTGRES = 15

_START_SECONDS = 60.0
_STOP_SECONDS = 10.0
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@cache
def docker_engine_answers() -> bool:
    """True where containers can be started."""
    import docker
    from docker.errors import DockerException

    client = None
    with warnings.catch_warnings():
        # Where nothing answers, the client forgets the socket that it tried.
        warnings.simplefilter("ignore", ResourceWarning)
        with suppress(DockerException):
            client = docker.from_env(timeout=3)
        gc.collect()
    if client is None:
        return False
    try:
        return bool(client.ping())
    except DockerException:
        return False
    finally:
        client.close()


# ---------------------------------------------------------------------------------- PostgreSQL


@dataclass(frozen=True)
class PostgresServer:
    """A running server, and the databases made on it."""

    admin_url: str
    """`postgresql+psycopg://...` of a superuser."""

    def create_database(self) -> tuple[str, str]:
        """Make an empty database; return its URL as its owner and as the application.

        The owner may make tables. The application's role owns nothing, and may do with the
        owner's tables what is granted to it.
        """
        name = f"lightbox_{secrets.token_hex(6)}"
        owner, app = f"{name}_owner", f"{name}_app"
        passwords = {role: secrets.token_urlsafe(18) for role in (owner, app)}
        with psycopg.connect(_conninfo(self.admin_url), autocommit=True) as connection:
            for role, password in passwords.items():
                _execute(
                    connection,
                    "CREATE ROLE {} LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE PASSWORD {}",
                    sql.Identifier(role),
                    sql.Literal(password),
                )
            database = sql.Identifier(name)
            _execute(connection, "CREATE DATABASE {} OWNER {}", database, sql.Identifier(owner))
            _execute(connection, "REVOKE ALL ON DATABASE {} FROM PUBLIC", database)
            _execute(
                connection, "GRANT CONNECT ON DATABASE {} TO {}", database, sql.Identifier(app)
            )
        url = make_url(self.admin_url).set(database=name)
        as_owner, as_app = (
            url.set(username=role, password=password).render_as_string(hide_password=False)
            for role, password in passwords.items()
        )
        return as_owner, as_app


@contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    """A fresh PostgreSQL, gone at the end. Skips the test where there is none to start."""
    if docker_engine_answers():
        from testcontainers.community.postgres import PostgresContainer

        password = secrets.token_urlsafe(18)
        with PostgresContainer(
            POSTGRES_IMAGE, username="postgres", password=password, driver="psycopg"
        ) as container:
            yield PostgresServer(container.get_connection_url())
        return
    programs = _postgres_programs()
    if programs is None:
        pytest.skip(
            f"needs a Docker engine, or PostgreSQL {OLDEST_POSTGRES} or newer: make setup-test"
        )
    with _own_cluster(programs) as server:
        yield server


def _conninfo(url: str) -> str:
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


def _execute(connection: psycopg.Connection[Any], text: str, *values: sql.Composable) -> None:
    connection.execute(sql.SQL(text).format(*values))


def _postgres_programs() -> Path | None:
    """Folder of the newest installed PostgreSQL that will do; None if there is none."""
    found: dict[int, Path] = {}
    folders = list(Path("/usr/lib/postgresql").glob("*/bin"))
    if on_path := shutil.which("initdb"):
        folders.append(Path(on_path).resolve().parent)
    for folder in folders:
        if (folder / "initdb").exists() and (folder / "postgres").exists():
            told = subprocess.run(
                [folder / "postgres", "--version"], capture_output=True, text=True, check=True
            ).stdout
            if version := re.search(r"\) (\d+)", told):
                found[int(version[1])] = folder
    newest = max(found, default=0)
    return found[newest] if newest >= OLDEST_POSTGRES else None


def _unprivileged() -> dict[str, Any]:
    """Who runs PostgreSQL, as arguments for subprocess: it refuses to run as root."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        try:
            user = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    pytest.skip("PostgreSQL refuses to run as root, and there is no other user here")


def _die_with_parent() -> None:
    """Between fork and exec, after the change of user, which would undo it.

    SIGQUIT is PostgreSQL's immediate shutdown: the server takes its processes with it.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGQUIT), 0, 0, 0)


@contextmanager
def _own_cluster(programs: Path) -> Iterator[PostgresServer]:
    identity = _unprivileged()
    # Not below pytest's folder, which only the test's own user may enter.
    folder = Path(tempfile.mkdtemp(prefix="lightbox-postgres-"))
    try:
        password, port = secrets.token_urlsafe(18), free_port()
        secret, log, data = folder / "password", folder / "log", folder / "data"
        secret.write_text(password)
        if identity:
            for path in (folder, secret):
                os.chown(path, identity["user"], identity["group"])
        environment = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8"}
        made = subprocess.run(
            [
                programs / "initdb",
                f"--pgdata={data}",
                "--username=postgres",
                f"--pwfile={secret}",
                "--auth=scram-sha-256",
                "--encoding=UTF8",
                "--no-sync",
                "--no-instructions",
            ],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            **identity,
        )
        secret.unlink()
        if made.returncode != 0:
            raise RuntimeError(f"PostgreSQL could not be set up:\n{made.stdout}")
        settings: Mapping[str, str] = {
            "listen_addresses": LOOPBACK,
            "port": str(port),
            "unix_socket_directories": "",
            "fsync": "off",  # what a test database loses in a power cut is no loss
            "synchronous_commit": "off",
            "full_page_writes": "off",
            "shared_buffers": "32MB",
            "max_connections": "200",
        }
        command = [str(programs / "postgres"), "-D", str(data)]
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        url = URL.create("postgresql+psycopg", "postgres", password, LOOPBACK, port, "postgres")
        with _running(command, cwd=folder, env=environment, log=log, identity=identity) as process:
            admin_url = url.render_as_string(hide_password=False)
            _wait_until_it_answers(process, admin_url, log)
            yield PostgresServer(admin_url)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _running(
    command: Sequence[str],
    *,
    cwd: Path,
    env: Mapping[str, str],
    log: Path,
    identity: Mapping[str, Any],
) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with_parent,  # noqa: PLW1509  (one system call)
            **identity,
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)  # ends the connections that are left, then itself
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGQUIT)
            process.wait(_STOP_SECONDS)


def _wait_until_it_answers(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            psycopg.connect(_conninfo(url), connect_timeout=2).close()
            return
        except psycopg.OperationalError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                told = log.read_text(errors="replace")
                raise RuntimeError(f"PostgreSQL did not start:\n{told}") from error
        time.sleep(0.05)


# ------------------------------------------------------------------------------------- Orthanc


class Orthanc(Protocol):
    """What a test needs to know of a running Orthanc."""

    @property
    def url(self) -> str: ...
    @property
    def username(self) -> str: ...
    @property
    def password(self) -> str: ...


@dataclass(frozen=True)
class _OrthancContainer:
    url: str
    username: str
    password: str


@contextmanager
def orthanc_server(
    state_dir: Path, *, username: str = "lightbox", password: str | None = None
) -> Iterator[Orthanc]:
    """A fresh Orthanc with `orthanc/orthanc.json`; the machine's own keeps its files in
    `state_dir`, which must be empty."""
    password = password or secrets.token_urlsafe(18)
    if not docker_engine_answers():
        with OrthancServer(state_dir, username=username, password=password) as server:
            yield server
        return

    from testcontainers.core.container import DockerContainer
    from testcontainers.core.wait_strategies import HttpWaitStrategy

    environment = {
        "LIGHTBOX_ORTHANC_STORAGE": "/var/lib/orthanc/db",
        "LIGHTBOX_ORTHANC_PLUGIN": "/usr/share/orthanc/plugins-available/libOrthancDicomWeb.so",
        "LIGHTBOX_ORTHANC_USERNAME": username,
        "LIGHTBOX_ORTHANC_PASSWORD": password,
        "LIGHTBOX_ORTHANC_PORT": "8042",
        "LIGHTBOX_ORTHANC_BIND": "",
        "LIGHTBOX_ORTHANC_REMOTE": "true",
        "LIGHTBOX_ORTHANC_DICOM_ENABLED": "false",
        "LIGHTBOX_ORTHANC_DICOM_PORT": "4242",
        "LIGHTBOX_ORTHANC_MODALITIES": "",
        "LIGHTBOX_ORTHANC_ENCODING": "Latin1",
        "LIGHTBOX_ORTHANC_MORE_PLUGINS": "",
        "LIGHTBOX_ORTHANC_WORKLIST_DIR": "/tmp",
    }
    # The image's own entry point reads configurations before Orthanc fills in the environment,
    # which ours are no JSON for: start Orthanc itself.
    ready = HttpWaitStrategy(8042, "/system").with_basic_credentials(username, password)
    container = (
        DockerContainer(ORTHANC_IMAGE)
        .with_envs(**environment)
        .with_volume_mapping(ORTHANC_CONFIGURATION, "/etc/lightbox/orthanc.json", "ro")
        .with_kwargs(entrypoint=["Orthanc"])
        .with_command("/etc/lightbox/orthanc.json")
        .with_exposed_ports(8042)
        .waiting_for(ready.for_status_code(200))
    )
    with container:
        host, port = container.get_container_host_ip(), container.get_exposed_port(8042)
        yield _OrthancContainer(f"http://{host}:{port}", username, password)
