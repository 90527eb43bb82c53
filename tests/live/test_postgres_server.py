"""The test databases themselves: separate roles, and nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import psycopg
import pytest
from psycopg import errors
from sqlalchemy.engine import make_url

from app.demo.stack import REPOSITORY
from tests.servers import PostgresServer, docker_engine_answers, postgres_server

SCRIPT = """
import signal
from tests.servers import postgres_server
with postgres_server() as server:
    print(server.admin_url, flush=True)
    signal.pause()
"""


def connect(url: str) -> psycopg.Connection[tuple[object, ...]]:
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    return psycopg.connect(plain, autocommit=True)


def stat_fields(pid: int) -> list[str]:
    """State, parent and so on of a process (proc(5)); of one that is gone, state Z."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ["Z", "0"]


def server_processes(url: str) -> list[int]:
    """Process ids of the server behind an URL, the first one's being the parent of the others."""
    with connect(url) as connection:
        row = connection.execute("SELECT pg_backend_pid()").fetchone()
        assert row is not None
        server = int(stat_fields(int(str(row[0])))[1])
        everyone = [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]
        return [server, *(pid for pid in everyone if int(stat_fields(pid)[1]) == server)]


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if stat_fields(pid)[0] != "Z"]


def eventually_gone(pids: list[int], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while alive(pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pids)


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with postgres_server() as each:
        yield each


def test_the_version_is_one_that_lightbox_supports(server: PostgresServer) -> None:
    with connect(server.admin_url) as connection:
        assert connection.info.server_version >= 150000


def test_the_application_may_do_what_is_granted_and_no_more(server: PostgresServer) -> None:
    owner_url, app_url = server.create_database()
    with connect(owner_url) as owner, connect(app_url) as app:
        owner.execute("CREATE TABLE record (text text)")
        with pytest.raises(errors.InsufficientPrivilege):
            app.execute("CREATE TABLE own (text text)")
        with pytest.raises(errors.InsufficientPrivilege):
            app.execute("CREATE TEMPORARY TABLE own (text text)")
        with pytest.raises(errors.InsufficientPrivilege):
            app.execute("SELECT text FROM record")
        owner.execute(f'GRANT SELECT, INSERT ON record TO "{app.info.user}"')
        app.execute("INSERT INTO record VALUES ('kept')")
        assert app.execute("SELECT text FROM record").fetchall() == [("kept",)]
        for forbidden in ("UPDATE record SET text = ''", "DELETE FROM record", "TRUNCATE record"):
            with pytest.raises(errors.InsufficientPrivilege):
                app.execute(forbidden)
        with pytest.raises(errors.InsufficientPrivilege):
            app.execute("DROP TABLE record")


def test_databases_are_apart(server: PostgresServer) -> None:
    first, second = server.create_database(), server.create_database()
    assert make_url(first[0]).database != make_url(second[0]).database
    name = make_url(first[0]).database
    for url in second:
        stranger = make_url(url).set(database=name).render_as_string(hide_password=False)
        with pytest.raises(psycopg.OperationalError, match="permission denied"):
            connect(stranger)


def test_a_wrong_password_is_refused(server: PostgresServer) -> None:
    wrong = make_url(server.admin_url).set(password="wrong").render_as_string(hide_password=False)
    with pytest.raises(psycopg.OperationalError, match="password"):
        connect(wrong)


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder for temporary files that another user may pass through: pytest's own is closed."""
    with TemporaryDirectory(prefix="lightbox-test-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.skipif(docker_engine_answers(), reason="in a container the engine sees to it")
def test_the_end_leaves_no_process_and_no_file(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    with postgres_server() as server:
        left_open = connect(server.admin_url)
        pids = server_processes(server.admin_url)
        assert len(alive(pids)) > 2
        assert list(scratch.iterdir())
    left_open.close()
    assert eventually_gone(pids)
    assert list(scratch.iterdir()) == []


@pytest.mark.skipif(docker_engine_answers(), reason="in a container the engine sees to it")
def test_the_server_dies_with_a_parent_that_was_killed(scratch: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "TMPDIR": str(scratch)},
    )
    assert parent.stdout is not None
    with parent.stdout:
        url = parent.stdout.readline().strip()
    pids = server_processes(url)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert eventually_gone(pids)
