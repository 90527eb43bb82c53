"""No record, no answer: the trail fails at each of its moments, and nothing half-done stays."""

import asyncio
import resource
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.engine import make_url

from app import db
from app.audit import Action, AuditTrail, Entry, Origin, Outcome, writer
from app.audit.chain import DIALECTS, GENESIS
from app.audit.checkpoints import FileSink
from app.audit.signing import Signer, checked_file, make_key
from app.audit.verify import verify
from app.db import Database
from app.errors import AuditUnavailable
from tests.images import ct_image
from tests.lightbox import Lightbox, running
from tests.live.conftest import Archive, DatabaseUrls, make_person, migrated, settings_for, unique
from tests.servers import PostgresServer, docker_engine_answers, postgres_server

TABLES = ("patient", "imaging_order", "order_study", "study", "instance", "launch_session")


def as_owner(database: DatabaseUrls, *statements: str) -> None:
    engine = sa.create_engine(database.sync_owner)
    with engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)
    engine.dispose()


def counts(database: DatabaseUrls) -> dict[str, int]:
    """How many rows of each kind there are."""
    engine = sa.create_engine(database.sync_owner)
    with engine.connect() as connection:
        found = {
            table: connection.exec_driver_sql(f"SELECT count(*) FROM {table}").scalar_one()  # noqa: S608
            for table in TABLES
        }
    engine.dispose()
    return found


def psycopg_url(url: str) -> str:
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


def entry(name: str, **more: Any) -> Entry:
    return Entry(Action.STUDY_VIEW, Outcome.GRANTED, Origin(name), **more)


@pytest.fixture
async def trail(database: DatabaseUrls) -> AsyncIterator[AuditTrail]:
    app = Database(database.app)
    each = AuditTrail(app)
    yield each
    await each.close()
    await app.close()


# ---------------------------------------------------------------------------------- at outcome


@contextmanager
def no_deeds(database: DatabaseUrls) -> Iterator[None]:
    """The trail takes decisions, and fails at what became of them."""
    if database.is_postgres:
        as_owner(
            database,
            "CREATE FUNCTION no_deed() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'no room'; END $$",
            "CREATE TRIGGER no_deeds BEFORE INSERT ON audit_record FOR EACH ROW "
            "WHEN (NEW.outcome = 'done') EXECUTE FUNCTION no_deed()",
        )
        yield
        as_owner(database, "DROP TRIGGER no_deeds ON audit_record")
        return
    as_owner(
        database,
        "CREATE TRIGGER no_deeds BEFORE INSERT ON audit_record WHEN NEW.outcome = 'done' "
        "BEGIN SELECT RAISE(ABORT, 'no room'); END",
    )
    yield
    as_owner(database, "DROP TRIGGER no_deeds")


async def test_what_cannot_be_recorded_as_done_is_not_done(
    live: Lightbox, database: DatabaseUrls, archive: Archive
) -> None:
    person = await make_person(live)
    image = ct_image(patient_id=person.mrn)
    uploaded = (await live.upload(image, order_id=person.order["id"])).json()
    study = uploaded["study_instance_uid"]
    before, mrn = counts(database), unique()
    other = ct_image(patient_id=person.mrn)
    body = {"first_name": "A", "last_name": "B", "mrn": mrn, "dob": "1980-01-01"}
    order = {"patient_id": person.patient["id"]}
    care_team = f"/patients/{person.patient['id']}/care-team/x"
    requests: list[tuple[str, str, str, dict[str, Any]]] = [
        ("service", "POST", "/patients", {"json": body}),
        ("service", "POST", "/orders", {"json": order}),
        ("service", "PATCH", f"/orders/{person.order['id']}", {"json": {"status": "cancelled"}}),
        ("service", "PUT", care_team, {"json": {}}),
        ("clinician", "GET", f"/dicom/viewer/url/{study}", {}),
    ]
    with no_deeds(database):
        for role, method, path, more in requests:
            answer = await live.ask(role, method, f"/api/v1{path}", **more)
            assert answer.status_code == 503, (path, answer.text)
            assert answer.json()["type"].endswith("audit-unavailable")
            assert person.mrn not in answer.text
        refused = await live.upload(other, order_id=person.order["id"])
        assert refused.status_code == 503
        # Lists record the patients they show as done: none is shown.
        for listing in ("patients", "orders", "dicom/studies"):
            answer = await live.ask("clinician", "GET", f"/api/v1/{listing}")
            assert (answer.status_code, person.mrn in answer.text) == (503, False)
    assert counts(database) == before
    assert len(archive.ask("GET", f"/studies/{_orthanc_study(archive, study)}/instances").json())
    assert archive.owners(study) == [person.mrn]
    failed = await live.audit(patient_id=person.patient["id"], outcome="failed")
    assert {each["reason"] for each in failed} <= {"audit-unavailable"}
    assert verify(database.app).wrong is None
    # And it goes on.
    again = await live.upload(other, order_id=person.order["id"])
    assert (again.status_code, again.json()["status"]) == (200, "uploaded")


def _orthanc_study(archive: Archive, uid: str) -> str:
    (found,) = [each["ID"] for each in archive.find(uid) if each["Type"] == "Study"]
    return str(found)


# ----------------------------------------------------------------------------------- disk full


async def use_until_full(live: Lightbox, person: Any) -> Any:
    """Requests until one is refused; its answer. Every one before was answered in full."""
    for number in range(400):
        answer = await live.ask(
            "service",
            "PUT",
            f"/api/v1/patients/{person.patient['id']}/care-team/{number}-{'x' * 200}",
            json={},
        )
        if answer.status_code != 200:
            return answer
    raise AssertionError("the disk was not full after 400 requests")


async def check_full(live: Lightbox, person: Any, study: str, rows: Callable[[], int]) -> None:
    refused = await use_until_full(live, person)
    assert refused.status_code == 503, refused.text
    before = rows()
    requests = [
        ("clinician", "GET", f"/patients/{person.patient['id']}"),
        ("clinician", "GET", f"/dicom/studies/{study}"),
        ("clinician", "GET", "/dicom/studies"),
        ("auditor", "GET", "/audit"),
    ]
    for role, method, path in requests * 5:  # what little room is left gets used up too
        answer = await live.ask(role, method, f"/api/v1{path}")
        assert answer.status_code in (200, 503)
    for role, method, path in requests:
        answer = await live.ask(role, method, f"/api/v1{path}")
        assert answer.status_code == 503, (path, answer.text)
        assert person.mrn not in answer.text
    assert rows() == before


async def test_a_full_disk_under_sqlite(
    sqlite_url: str, archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite's own error for it, at whatever statement it comes."""
    database = DatabaseUrls(sqlite_url, sqlite_url)
    file = make_url(sqlite_url).database
    assert file is not None
    settings = settings_for(sqlite_url, archive.server, spool_dir=tmp_path)
    async with running(settings) as live:
        person = await make_person(live)
        uploaded = await live.upload(ct_image(patient_id=person.mrn), order_id=person.order["id"])
        study = uploaded.json()["study_instance_uid"]
    with sqlite3.connect(file) as connection:
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.close()
    limited = (*db.SQLITE_PRAGMAS, f"max_page_count={pages + 6}")
    for module in (db, writer):
        monkeypatch.setattr(module, "SQLITE_PRAGMAS", limited)

    def members() -> int:
        with sqlite3.connect(file) as connection:
            found = connection.execute("SELECT count(*) FROM care_team_member").fetchone()[0]
        connection.close()
        return int(found)

    async with running(settings) as live:
        await check_full(live, person, study, members)
    assert verify(sqlite_url).wrong is None
    monkeypatch.undo()
    async with running(settings) as live:
        assert await live.must("clinician", "GET", f"/dicom/studies/{study}")
        written = await live.audit(action="care-team:write", outcome="done")
        assert len(written) == min(200, members())
    assert verify(database.app).wrong is None


LARGEST_FILE = 17 * 1024 * 1024  # a segment of the write-ahead log, 16 MiB, must have room


@pytest.fixture
def limited_server() -> Iterator[PostgresServer]:
    """For the server's processes no file may become larger (setrlimit(2), RLIMIT_FSIZE)."""
    if docker_engine_answers():
        pytest.skip("limits the server's processes, which a container hides")
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, former[1]))
    try:
        with postgres_server() as server:
            resource.setrlimit(resource.RLIMIT_FSIZE, former)
            yield server
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)


async def test_a_full_disk_under_postgresql(
    limited_server: PostgresServer, archive: Archive, tmp_path: Path
) -> None:
    """The trail's own file can't grow any more; its log still can, as on a disk of its own."""
    database = migrated(limited_server.create_database())

    def count(query: str) -> int:
        with psycopg.connect(psycopg_url(database.owner)) as connection:
            row = connection.execute(query.encode()).fetchone()
            assert row is not None
            return int(row[0])

    def members() -> int:
        return count("SELECT count(*) FROM care_team_member")

    settings = settings_for(database.app, archive.server, spool_dir=tmp_path)
    async with running(settings) as live:
        person = await make_person(live)
        uploaded = await live.upload(ct_image(patient_id=person.mrn), order_id=person.order["id"])
        study = uploaded.json()["study_instance_uid"]
        trail: AuditTrail = live.app.state.gate.trail
        for length, portion in ((1500, 500), (1500, 5), (0, 500), (0, 20), (0, 1)):
            filling = entry("filling", reason="x" * length)
            with suppress(AuditUnavailable):
                for _ in range(1000):
                    await trail.record(*[filling] * portion)
        assert count("SELECT pg_relation_size('audit_record')") > LARGEST_FILE - 8192 * 2
        await check_full(live, person, study, members)
    done = "SELECT count(*) FROM audit_record WHERE action = 'care-team:write' AND outcome = 'done'"
    assert count(done) == members()
    assert verify(database.app).wrong is None
    # Room again: the owner removes the filling; here all at once.
    with psycopg.connect(psycopg_url(database.owner), autocommit=True) as owner:
        owner.execute("ALTER TABLE audit_record DISABLE TRIGGER ALL")
        owner.execute("DELETE FROM audit_record WHERE id < (SELECT max(id) FROM audit_record)")
        owner.execute("VACUUM audit_record")
    async with running(settings) as live:
        assert await live.must("clinician", "GET", f"/dicom/studies/{study}")


def test_a_full_disk_under_the_checkpoints(tmp_path: Path) -> None:
    """No half line, and the lines before are kept."""
    make_key(tmp_path / "key.pem")
    signer = Signer.from_file(tmp_path / "key.pem")
    path = tmp_path / "checkpoints"
    sink, line = FileSink(path), signer.checkpoint(GENESIS)
    sink.append(line)
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, former[1]))
    try:
        with pytest.raises(OSError, match="part of the line"):
            sink.append(line)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    assert path.read_text() == f"{line}\n"
    sink.append(line)
    assert len(list(checked_file(path, signer.public))) == 2


# ------------------------------------------------------------------------- a server that goes away


async def test_a_connection_that_was_cut_is_made_anew(
    trail: AuditTrail, database: DatabaseUrls, postgres: PostgresServer
) -> None:
    """By the next record, which does not fail for it."""
    if not database.is_postgres:
        pytest.skip("a file has no connection to cut")
    await trail.record(entry("before"))
    name = make_url(database.app).database
    with psycopg.connect(psycopg_url(postgres.admin_url), autocommit=True) as admin:
        ended = admin.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = %s",
            (name,),
        ).fetchall()
    assert ended == [(True,)]
    await trail.record(entry("after"))
    report = verify(database.app)
    assert (report.wrong, report.checked) == (None, 2)


async def test_a_server_that_is_away_and_comes_back(sqlite_url: str) -> None:
    away = sqlite_url.replace("lightbox.sqlite", "not/there.sqlite")
    path = make_url(away).database
    assert path is not None
    app = Database(away)
    trail = AuditTrail(app)
    with pytest.raises(AuditUnavailable):
        await trail.record(entry("lost"))
    Path(path).parent.mkdir()
    db.migrate(away)
    await trail.record(entry("kept"))
    assert verify(away).checked == 1
    await trail.close()
    await app.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> str:
    """The chain's lock with a tenth of a second of patience; the statement that takes it."""
    known = DIALECTS["postgresql"]
    assert known.lock.count("'10000'") == 2
    changed = replace(known, lock=known.lock.replace("'10000'", "'200'"))
    monkeypatch.setattr(writer.PostgresStore, "dialect", changed)
    monkeypatch.setitem(DIALECTS, "postgresql", changed)
    return changed.lock


async def test_who_stops_with_the_chain_in_hand_loses_it(
    trail: AuditTrail, database: DatabaseUrls, impatient: str
) -> None:
    """A process that hangs, or a host that is cut off, must not stop the hospital."""
    if not database.is_postgres:
        pytest.skip("the lock of a file ends with its process")
    with psycopg.connect(psycopg_url(database.app)) as stopped:
        stopped.execute(impatient.encode())
        async with asyncio.timeout(60):
            while True:
                with suppress(AuditUnavailable):
                    await trail.record(entry("after"))
                    break
        with pytest.raises(psycopg.errors.IdleInTransactionSessionTimeout):
            stopped.execute("SELECT 1")
    report = verify(database.app)
    assert (report.wrong, report.checked) == (None, 1)


async def test_who_holds_the_chain_too_long_makes_503_and_no_fork(
    trail: AuditTrail, database: DatabaseUrls, impatient: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a transaction of its own, in the business's, and for the first of many."""
    if not database.is_postgres:
        pytest.skip("tests/unit/test_chain.py does it for the file")
    key = impatient.rpartition("(")[2].rstrip(")")
    app = Database(database.app)

    async def business() -> None:
        async with app.session() as session:
            await trail.add(session, entry("business"))
            await session.commit()

    async def first() -> None:
        await trail.record_if_first(
            sa.text("UPDATE patient SET mrn = mrn WHERE false"),  # type: ignore[arg-type]
            entry("first"),
        )

    attempts: list[Callable[[], Awaitable[None]]] = [lambda: trail.record(entry("own")), business]
    with psycopg.connect(psycopg_url(database.app), autocommit=True) as holder:
        holder.execute(f"SELECT pg_advisory_lock({key})".encode())
        for attempt in attempts:
            with pytest.raises(AuditUnavailable):
                await attempt()
    for attempt in attempts:
        await attempt()
    await first()
    report = verify(database.app)
    assert (report.wrong, report.checked) == (None, 2)
    await app.close()
