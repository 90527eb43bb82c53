"""Audit messages on their way: a real receiver over TLS that is down, dies, and comes back, an
application that is restarted and killed; all records arrive, in order."""

import base64
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from xml.etree.ElementTree import fromstring

import anyio
import psycopg
import pytest
import sqlalchemy as sa
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from sqlalchemy.engine import make_url

from app.atna import feed, syslog
from app.atna.syslog import NotDelivered, Receiver, syslog_message
from app.demo.stack import LOOPBACK, AppServer, free_port
from app.settings import Settings
from tests.audit_schema import event_faults, schema_faults
from tests.lightbox import Lightbox, running
from tests.live.conftest import (
    Archive,
    DatabaseUrls,
    environment_of,
    make_person,
    migrated,
    settings_for,
)
from tests.servers import PostgresServer

SECONDS = 120.0


async def eventually(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"not within {SECONDS} s: {what}"
        await anyio.sleep(0.05)


# ---------------------------------------------------------------------------------- certificates


@dataclass(frozen=True)
class Certificates:
    """PEM files: an authority, and what it vouches for, each with its key."""

    ca: Path
    server: Path
    client: Path
    elsewhere: Path  # the right authority, another host's name
    other_ca: Path


def _issue(
    folder: Path,
    name: str,
    by: tuple[x509.Certificate, ec.EllipticCurvePrivateKey] | None,
    hosts: list[x509.GeneralName],
) -> tuple[Path, x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(by[0].subject if by else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=by is None, path_length=None), critical=True)
    )
    if hosts:
        builder = builder.add_extension(x509.SubjectAlternativeName(hosts), critical=False)
    certificate = builder.sign(by[1] if by else key, hashes.SHA256())
    path = folder / f"{name}.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    return path, certificate, key


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    folder = tmp_path_factory.mktemp("certificates")
    here: list[x509.GeneralName] = [
        x509.DNSName("localhost"),
        x509.IPAddress(ip_address(LOOPBACK)),
    ]
    ca, certificate, key = _issue(folder, "ca", None, [])
    by = (certificate, key)
    return Certificates(
        ca,
        _issue(folder, "server", by, here)[0],
        _issue(folder, "client", by, [])[0],
        _issue(folder, "elsewhere", by, [x509.DNSName("elsewhere.example")])[0],
        _issue(folder, "other-ca", None, [])[0],
    )


# --------------------------------------------------------------------------------- the receiver


@dataclass
class Sink:
    """A receiver's address, and the file that outlives its processes."""

    port: int
    file: Path
    certificates: Certificates

    @contextmanager
    def up(self, *options: str, tls: bool = True) -> Iterator[subprocess.Popen[bytes]]:
        script = Path(__file__).with_name("syslog_receiver.py")
        cert = ["--cert", str(self.certificates.server)] if tls else []
        command = [sys.executable, str(script), str(self.port), str(self.file), *cert, *options]
        process = subprocess.Popen(command)
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def messages(self) -> list[bytes]:
        if not self.file.exists():
            return []
        lines = self.file.read_bytes().split(b"\n")[:-1]  # a last one without end is half a line
        return [base64.b64decode(line) for line in lines]

    def ids(self) -> list[int]:
        """The ids of the records, in the order of arrival, with those that came twice."""
        found = [re.search(rb'sequenceId="([0-9]+)"', each) for each in self.messages()]
        return [int(each[1]) for each in found if each]

    def arrived(self) -> set[int]:
        return set(self.ids())

    def settings(self, **more: object) -> dict[str, object]:
        return {
            "syslog_host": "localhost",
            "syslog_port": self.port,
            "syslog_ca_file": self.certificates.ca,
            **more,
        }


@pytest.fixture
def sink(tmp_path: Path, certificates: Certificates) -> Sink:
    return Sink(free_port(), tmp_path / "received", certificates)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(feed, "LONGEST_PAUSE_SECONDS", 0.2)


def trail(database: DatabaseUrls) -> list[int]:
    engine = sa.create_engine(database.sync_owner)
    with engine.connect() as connection:
        found = connection.execute(sa.text("SELECT id FROM audit_record ORDER BY id"))
        ids = [row[0] for row in found]
    engine.dispose()
    return ids


def position(database: DatabaseUrls) -> int:
    engine = sa.create_engine(database.sync_owner)
    with engine.connect() as connection:
        found = connection.execute(sa.text("SELECT record_id FROM export_position")).scalars().all()
    engine.dispose()
    assert len(found) <= 1
    return found[0] if found else 0


def first_arrivals(ids: list[int]) -> list[int]:
    return list(dict.fromkeys(ids))


async def act(lightbox: Lightbox, times: int = 12) -> None:
    """Records of several kinds."""
    person = await make_person(lightbox)
    for _ in range(times):
        await lightbox.ask("clinician", "GET", f"/api/v1/patients/{person.patient['id']}")
    await lightbox.ask("clinician", "GET", f"/api/v1/orders/{person.order['id']}", sub="stranger")
    await lightbox.ask(None, "GET", "/api/v1/patients")
    await lightbox.ask("clinician", "GET", f"/api/v1/patients?mrn={person.mrn}")


# ------------------------------------------------------------------------------------- the feed


async def test_nothing_is_lost_and_the_order_is_kept(
    database: DatabaseUrls, archive: Archive, sink: Sink, tmp_path: Path, impatient: None
) -> None:
    """The receiver is down, then dies in the middle of a batch, is down again while the
    application is restarted, and comes back."""
    settings = settings_for(database.app, archive.server, spool_dir=tmp_path, **sink.settings())
    async with running(settings) as lightbox:
        await act(lightbox)
        assert len(trail(database)) > 15
        assert position(database) == 0
        with sink.up("--die-after", "5") as dying:
            await eventually(lambda: dying.poll() is not None, "the receiver dies")
        assert sink.ids() == [1, 2, 3, 4, 5]
        assert position(database) == 0, "a batch that was cut off has not arrived"
        await act(lightbox)
    async with running(settings) as lightbox:
        await act(lightbox, times=2)
        before = trail(database)
        with sink.up():
            await eventually(lambda: position(database) == before[-1], "all that was kept")
            await act(lightbox, times=2)
            whole = trail(database)
            assert len(whole) > len(before)
            await eventually(lambda: position(database) == whole[-1], "what came meanwhile")
    assert first_arrivals(sink.ids()) == whole == list(range(1, len(whole) + 1))
    assert len(sink.ids()) == len(whole) + 5, "only what was cut off came twice"
    for each in sink.messages():
        head, mark, xml = each.partition(b"\xef\xbb\xbf")
        assert mark
        assert head.startswith(b"<85>1 ")
        message = fromstring(xml)  # noqa: S314  (our own)
        assert schema_faults(message) == []
        assert event_faults(message) == []


async def test_of_two_processes_one_sends_and_the_other_takes_over(
    postgres: PostgresServer, archive: Archive, sink: Sink, tmp_path: Path
) -> None:
    database = migrated(postgres.create_database())
    settings: Settings = settings_for(
        database.app, archive.server, spool_dir=tmp_path, **sink.settings()
    )
    servers = [
        AppServer(free_port(), environment_of(settings), state_dir=tmp_path / f"app-{number}")
        for number in range(2)
    ]
    async with running(settings_for(database.app, archive.server, spool_dir=tmp_path)) as here:
        with sink.up(), servers[0]:
            await eventually(lambda: holders(postgres, database) == 1, "one has the lock")
            with servers[1]:
                await act(here)
                whole = trail(database)
                await eventually(lambda: position(database) == whole[-1], "all of it")
                assert sink.ids() == whole, "each once: only one of them sends"
                pid = servers[0].pid
                assert pid is not None
                os.kill(pid, signal.SIGKILL)
                await act(here)
                whole = trail(database)
                await eventually(lambda: position(database) == whole[-1], "by the other")
                assert first_arrivals(sink.ids()) == whole
                assert holders(postgres, database) == 1


def holders(postgres: PostgresServer, database: DatabaseUrls) -> int:
    url = make_url(postgres.admin_url).set(drivername="postgresql")
    key = feed._LOCK_KEY
    with psycopg.connect(url.render_as_string(hide_password=False)) as connection:
        row = connection.execute(
            "SELECT count(*) FROM pg_locks JOIN pg_database ON pg_database.oid = database"
            " WHERE locktype = 'advisory' AND granted AND datname = %s"
            " AND (classid::bigint << 32) | objid::bigint = %s",
            (make_url(database.app).database, key),
        ).fetchone()
    assert row is not None
    return int(row[0])


# ------------------------------------------------------------------------------------- delivery

MESSAGES = [
    syslog_message(number, datetime.now(UTC), "host", b"<AuditMessage/>") for number in (1, 2, 3)
]


def receiver(sink: Sink, **more: object) -> Receiver:
    values: dict[str, object] = {"host": "localhost", "ca_file": sink.certificates.ca, **more}
    return Receiver(port=sink.port, **values)  # type: ignore[arg-type]


async def reaches(sink: Sink, to: Receiver) -> None:
    """Deliver, as soon as the receiver listens."""

    def delivered() -> bool:
        try:
            to.deliver(MESSAGES)
        except NotDelivered as error:
            if "refused" not in str(error):
                raise
            return False
        return True

    await eventually(delivered, "the receiver listens")
    assert sink.ids() == [1, 2, 3]


async def fails(sink: Sink, to: Receiver, why: str) -> None:
    def refused() -> bool:
        with pytest.raises(NotDelivered) as caught:
            to.deliver(MESSAGES)
        if "Connection refused" in str(caught.value):
            return False
        assert re.search(why, str(caught.value)), caught.value
        return True

    await eventually(refused, "the receiver listens")
    assert sink.ids() == []


async def test_only_a_receiver_that_the_authority_vouches_for(sink: Sink) -> None:
    with sink.up():
        await fails(sink, receiver(sink, ca_file=sink.certificates.other_ca), "verify failed")
        await fails(sink, receiver(sink, ca_file=None), "verify failed")
        await reaches(sink, receiver(sink))


async def test_only_under_its_own_name(sink: Sink, certificates: Certificates) -> None:
    sink.certificates = Certificates(
        certificates.ca,
        certificates.elsewhere,
        certificates.client,
        certificates.elsewhere,
        certificates.other_ca,
    )
    with sink.up():
        await fails(sink, receiver(sink), "[Hh]ostname mismatch")


async def test_a_receiver_may_want_our_certificate(sink: Sink) -> None:
    with sink.up("--client-ca", str(sink.certificates.ca)):
        await fails(sink, receiver(sink), "(?i)certificate required|reset|eof|pipe")
        await reaches(sink, receiver(sink, cert_file=sink.certificates.client))


async def test_a_relay_on_this_machine_without_tls(sink: Sink) -> None:
    with sink.up(tls=False):
        await reaches(sink, receiver(sink, tls=False))


@pytest.mark.parametrize("tls", [True, False])
async def test_what_is_not_read_to_the_end_was_not_delivered(
    tls: bool, sink: Sink, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A receiver whose process hangs: the system takes the bytes, nobody reads them."""
    monkeypatch.setattr(syslog, "TIMEOUT_SECONDS", 0.5)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(sink.certificates.server)
    held: list[socket.socket] = []

    def accept(server: socket.socket) -> None:
        connection, _ = server.accept()
        held.append(context.wrap_socket(connection, server_side=True) if tls else connection)

    with socket.create_server((LOOPBACK, sink.port)) as server:
        thread = threading.Thread(target=accept, args=(server,))
        thread.start()
        with pytest.raises(NotDelivered, match="timed out"):
            receiver(sink, tls=tls).deliver(MESSAGES)
        thread.join()
        for connection in held:
            connection.close()


@pytest.mark.parametrize("tls", [True, False])
async def test_a_receiver_that_dies_with_bytes_unread_resets(tls: bool, sink: Sink) -> None:
    """However little is left: even what fitted into its buffer is not delivered."""
    options = ("--die-after", "2")
    with sink.up(*options, tls=tls) as process:

        def tried() -> bool:
            with pytest.raises(NotDelivered) as caught:
                receiver(sink, tls=tls).deliver(MESSAGES * 40)
            return "refused" not in str(caught.value)

        await eventually(tried, "the receiver listens")
        assert process.wait(10) == -signal.SIGKILL
    assert sink.ids() == [1, 2]
