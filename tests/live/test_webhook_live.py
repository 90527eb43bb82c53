"""The webhook against a receiver in a process of its own: down, failing, slow, and back again."""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
import sqlalchemy as sa
from pydantic import SecretStr
from sqlmodel import Session, col, select

from app.db import Database, utcnow
from app.demo.stack import LOOPBACK, AppServer, free_port
from app.models import Notification
from app.notifications import Notifications, replay
from tests.lightbox import make_settings
from tests.live.conftest import DatabaseUrls, command, environment_of

KEY = os.urandom(32)
SECRET = "whsec_" + base64.b64encode(KEY).decode()

RECEIVER = """
import base64, json, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

port, folder = int(sys.argv[1]), Path(sys.argv[2])

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        told = {"path": self.path, "body": base64.b64encode(body).decode()}
        told |= {name.lower(): value for name, value in self.headers.items()}
        with (folder / "received").open("a") as file:
            file.write(json.dumps(told) + "\\n")
        mode = (folder / "mode").read_text()
        if mode == "slow":
            for byte in b"HTTP/1.1 200 OK" * 10:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(1)
            return
        self.send_response(int(mode.split()[0]))
        if mode.startswith("3"):
            self.send_header("Location", "/elsewhere")
        if mode.endswith("endless"):
            self.end_headers()
            while True:
                self.wfile.write(b"a patient's name " * 1000)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass

ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


class Receiver:
    """The hospital's end. `mode` is the status it answers, or how badly."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.mode = "200"

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.port}/hooks/lightbox"

    @property
    def mode(self) -> str:
        return (self.folder / "mode").read_text()

    @mode.setter
    def mode(self, mode: str) -> None:
        (self.folder / "mode").write_text(mode)

    @property
    def received(self) -> list[Any]:
        path = self.folder / "received"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", RECEIVER, str(self.port), str(self.folder)]
        )
        until(lambda: _listens(self.port), "the receiver does not listen")

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((LOOPBACK, port)) == 0


def until(condition: Callable[[], bool], otherwise: str, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.05)


class Site:
    """App processes on one database, and the receiver."""

    def __init__(self, folder: Path, database: DatabaseUrls, receiver: Receiver) -> None:
        self.folder, self.database, self.receiver = folder, database, receiver
        self.settings = make_settings(
            database.app,
            f"http://{LOOPBACK}:{free_port()}",  # no Orthanc is needed
            webhook_url=receiver.url,
            webhook_secret=SecretStr(SECRET),
            spool_dir=folder,
        )
        self.environment = environment_of(self.settings)
        self._engine = sa.create_engine(database.sync_owner)

    def app(self, name: str = "app") -> AppServer:
        return AppServer(
            free_port(),
            self.environment,
            state_dir=self.folder / name,
            health_path="/openapi.json",
        )

    async def add(self, count: int = 1) -> list[UUID]:
        """As a handler does, in its transaction."""
        database = Database(self.database.app)
        try:
            async with database.session() as session:
                made = [
                    await Notifications.add(session, "break-glass", {"patient_id": uuid4()})
                    for _ in range(count)
                ]
                await session.commit()
        finally:
            await database.close()
        return made

    def row(self, made: UUID) -> Notification:
        with Session(self._engine) as session:
            return session.exec(select(Notification).where(col(Notification.id) == made)).one()

    def again(self, made: UUID) -> None:
        """Due now, whatever it waits for."""
        with self._engine.begin() as connection:
            connection.execute(replay(made))

    def untold(self) -> int:
        with Session(self._engine) as session:
            undelivered = col(Notification.delivered_at).is_(None)
            return len(session.exec(select(Notification).where(undelivered)).all())

    def notifications(self, *words: str) -> str:
        told = command("notifications", *words, environment=self.environment)
        assert told.returncode == 0, told.stderr
        return told.stdout

    def close(self) -> None:
        self._engine.dispose()


@pytest.fixture
def site(tmp_path: Path, database: DatabaseUrls) -> Iterator[Site]:
    folder = tmp_path / "receiver"
    folder.mkdir()
    receiver = Receiver(folder)
    each = Site(tmp_path, database, receiver)
    try:
        yield each
    finally:
        receiver.stop()
        each.close()


def signed_by_us(told: Any) -> bool:
    """By OpenSSL, not by our own code."""
    body = base64.b64decode(told["body"])
    content = f"{told['webhook-id']}.{told['webhook-timestamp']}.".encode() + body
    mac = subprocess.run(
        ["openssl", "dgst", "-sha256", "-mac", "HMAC", "-macopt", f"hexkey:{KEY.hex()}", "-binary"],
        input=content,
        capture_output=True,
        check=True,
    ).stdout
    return bool(told["webhook-signature"] == f"v1,{base64.b64encode(mac).decode()}")


# The long one; what the databases do differently is below.
@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
async def test_told_at_last_whatever_happens_between(site: Site) -> None:
    receiver = site.receiver
    with site.app() as app:
        (made,) = await site.add()
        until(lambda: site.row(made).last_error == "ConnectError", "nobody tried")
        assert f"{made}\tbreak-glass\t" in site.notifications("list")
        assert "\twaiting\t" in site.notifications("list")

        receiver.mode = "500"
        receiver.start()
        until(lambda: site.row(made).last_error == "HTTP 500", "not tried again")
        receiver.mode = "307"
        site.again(made)
        until(lambda: site.row(made).last_error == "HTTP 307", "not tried again")
        receiver.mode = "slow"
        site.again(made)
        before = len(receiver.received)
        until(lambda: len(receiver.received) > before, "not tried again")
        until(lambda: site.row(made).last_error == "timeout", "the slow one is waited for")

        # The process dies in the middle of an attempt; another one tells it.
        site.again(made)
        before = len(receiver.received)
        until(lambda: len(receiver.received) > before, "not tried again")
        assert app.pid is not None
        os.kill(app.pid, signal.SIGKILL)
        until(lambda: not _listens(app.port), "the app lives")
        log = app.log_path.read_text()
    row = site.row(made)
    assert row.delivered_at is None
    assert row.next_attempt_at is not None  # it comes due again by itself
    receiver.mode = "200"
    assert site.notifications("replay", str(made)).strip() == "1 due now."
    with site.app("second") as second:
        until(lambda: site.row(made).delivered_at is not None, "not told")
        log += second.log_path.read_text()
    assert site.notifications("list") == ""
    assert "\tdelivered\t" in site.notifications("list", "--all")

    assert {told["webhook-id"] for told in receiver.received} == {str(made)}
    assert {told["path"] for told in receiver.received} == {"/hooks/lightbox"}  # no redirect
    assert all(signed_by_us(told) for told in receiver.received)
    last = receiver.received[-1]
    assert abs(int(last["webhook-timestamp"]) - utcnow().timestamp()) < 60
    body = json.loads(base64.b64decode(last["body"]))
    assert (body["type"], set(body["data"])) == ("break-glass", {"patient_id"})
    forged = {**last, "body": base64.b64encode(b"{}").decode()}
    assert not signed_by_us(forged)
    for secret in (SECRET, SECRET.removeprefix("whsec_"), str(receiver.port), "hooks"):
        assert secret not in log
    assert "not delivered at attempt 1: ConnectError" in log


async def test_an_answer_without_end_is_not_read(site: Site) -> None:
    site.receiver.mode = "200 endless"
    site.receiver.start()
    (made,) = await site.add()
    with site.app() as app:
        until(lambda: site.row(made).delivered_at is not None, "not told")
        assert "patient's name" not in app.log_path.read_text()
    assert len(site.receiver.received) == 1


async def test_what_was_given_up_is_sent_on_demand(site: Site) -> None:
    """An app without a webhook gives up at once and says so; one with it sends what is replayed."""
    made = await site.add(3)
    unset = {name: value for name, value in site.environment.items() if "WEBHOOK" not in name}
    with AppServer(
        free_port(), unset, state_dir=site.folder / "unset", health_path="/openapi.json"
    ) as app:
        until(lambda: all(site.row(each).last_error for each in made), "not given up")
        log = app.log_path.read_text()
    assert "no webhook is configured" in log
    assert log.count("given up at attempt 1") == 3
    assert site.notifications("list").count("\tgiven-up\t") == 3
    site.receiver.start()
    with site.app():
        assert site.notifications("replay", "--all").strip() == "3 due now."
        until(lambda: all(site.row(each).delivered_at for each in made), "not told")
    assert sorted(told["webhook-id"] for told in site.receiver.received) == sorted(map(str, made))


def test_the_command_says_what_is_wrong(site: Site) -> None:
    for words, sentence in (
        (["replay"], "Name one notification, or --all."),
        (["replay", str(uuid4())], "There is no notification of that id."),
        (["replay", str(uuid4()), "--all"], "Name one notification, or --all."),
    ):
        told = command("notifications", *words, environment=site.environment)
        assert (told.returncode, told.stderr.strip()) == (1, sentence)
    nowhere = {**site.environment, "LIGHTBOX_DATABASE_URL": "sqlite+aiosqlite:////nowhere/x"}
    told = command("notifications", "list", environment=nowhere)
    assert (told.returncode, told.stdout) == (1, "")
    assert told.stderr.startswith("The database does not answer")


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
async def test_several_processes_send_each_row_once(site: Site) -> None:
    site.receiver.start()
    with ExitStack() as running:
        for number in range(3):
            running.enter_context(site.app(f"app-{number}"))
        made = await site.add(120)
        until(lambda: site.untold() == 0, "not all are told")
    ids = [told["webhook-id"] for told in site.receiver.received]
    assert sorted(ids) == sorted(map(str, made))


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
async def test_a_row_that_somebody_holds_is_passed_by(site: Site) -> None:
    """A lock on one row holds up neither the others nor the sender."""
    held, free = await site.add(2)
    site.receiver.start()
    url = site.database.owner.replace("+psycopg", "")
    with psycopg.connect(url) as connection:
        connection.execute("SELECT 1 FROM notification WHERE id = %s FOR UPDATE", [held])
        with site.app():
            until(lambda: site.row(free).delivered_at is not None, "the sender waits")
            assert site.row(held).attempts == 0
            connection.rollback()
            until(lambda: site.row(held).delivered_at is not None, "not told")
