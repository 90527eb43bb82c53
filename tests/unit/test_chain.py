"""The chain's text, the signatures, and the one who writes; on SQLite and without a server."""

import asyncio
import base64
import json
import logging
import sqlite3
from collections.abc import AsyncIterator
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
import respx
import sqlalchemy as sa
from sqlalchemy.engine import make_url
from sqlmodel import select

from app.audit import Action, AuditTrail, Entry, Origin, Outcome, chain, checkpoints, writer
from app.audit.chain import COLUMNS, GENESIS, Head
from app.audit.checkpoints import Checkpoints, FileSink
from app.audit.signing import (
    BadStatement,
    Signer,
    checked_file,
    checked_line,
    make_key,
    read_public_key,
)
from app.audit.verify import verify
from app.db import Database
from app.errors import AuditUnavailable
from app.models import AuditRecord, Patient
from app.settings import TrailSettings

FULL = Entry(
    action=Action.STUDY_VIEW,
    outcome=Outcome.GRANTED,
    origin=Origin("request-1", "192.0.2.1"),
    actor="dr.nováková",
    actor_roles="clinician,radiologist",
    reason="",
    patient_id=UUID("00112233-4455-6677-8899-aabbccddeeff"),
    order_id=None,
    study_instance_uid="1.2.840.1",
    ctx="abc",
    purpose_of_use="BTG",
    detail={"b": 1, "a": "ž"},
)


@pytest.fixture
async def database(sqlite_url: str) -> AsyncIterator[Database]:
    each = Database(sqlite_url)
    yield each
    await each.close()


@pytest.fixture
async def trail(database: Database) -> AsyncIterator[AuditTrail]:
    each = AuditTrail(database)
    yield each
    await each.close()


@pytest.fixture
def signer(tmp_path: Path) -> Signer:
    make_key(tmp_path / "key.pem")
    return Signer.from_file(tmp_path / "key.pem")


def written(url: str, columns: str = "id") -> list[Any]:
    """What stands in the file."""
    path = make_url(url).database
    assert path is not None
    connection = sqlite3.connect(path)
    try:
        return connection.execute(
            f"SELECT {columns} FROM audit_record ORDER BY id"  # noqa: S608
        ).fetchall()
    finally:
        connection.close()


def change(url: str, *statements: str) -> None:
    path = make_url(url).database
    assert path is not None
    connection = sqlite3.connect(path, isolation_level=None)
    for statement in statements:
        connection.execute(statement)
    connection.close()


def named(name: str) -> Entry:
    return Entry(Action.AUDIT_READ, Outcome.GRANTED, Origin(name))


# --------------------------------------------------------------------------------- the text


def test_the_text_is_what_it_always_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hash is what `sha256sum` says: whoever changes the text breaks every chain there is."""
    at = datetime(2025, 2, 3, 4, 5, 6, 78, UTC)
    monkeypatch.setattr(chain, "utcnow", lambda: at)
    ((row, sha256),) = chain.follow(GENESIS, [FULL])
    assert json.dumps(list(row), separators=(",", ":")) == (
        '[1,"2025-02-03T04:05:06.000078Z","request-1","study:view","granted","","dr.nov\\u00e1kov'
        '\\u00e1","clinician,radiologist","192.0.2.1","00112233-4455-6677-8899-aabbccddeeff",null,'
        '"1.2.840.1","abc","BTG","{\\"a\\":\\"\\u017e\\",\\"b\\":1}"]'
    )
    assert sha256 == "1183d42b5aded79d493274a39f73d1104f5b9b0ce8ff0508e11634b42e39d0a2"


def test_every_column_is_chained() -> None:
    columns = [column.name for column in AuditRecord.__table__.c]  # type: ignore[attr-defined]
    assert sorted([*COLUMNS, "sha256"]) == sorted(columns)


@pytest.mark.parametrize("dialect", chain.DIALECTS)
def test_a_row_is_read_as_it_was_stored(dialect: str) -> None:
    ((row, _),) = chain.follow(GENESIS, [FULL])
    each = chain.DIALECTS[dialect]
    assert each.read(each.stored(row)) == row


@pytest.mark.parametrize("index", range(len(COLUMNS)), ids=COLUMNS)
def test_each_value_counts(index: int) -> None:
    ((row, sha256),) = chain.follow(GENESIS, [FULL])
    other = (*row[:index], "other", *row[index + 1 :])
    assert chain.digest(GENESIS.sha256, other) != sha256
    assert chain.digest("1" * 64, row) != sha256


# ------------------------------------------------------------------------------- the writer


async def test_what_comes_at_once_is_one_chain_in_few_commits(
    sqlite_url: str, trail: AuditTrail, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []
    append = writer.SqliteStore.append

    def counted(self: writer.SqliteStore, entries: writer.Group) -> None:
        batches.append(len(entries))
        append(self, entries)

    monkeypatch.setattr(writer.SqliteStore, "append", counted)
    await asyncio.gather(*(trail.record(named(f"r{i}"), named(f"s{i}")) for i in range(100)))
    assert written(sqlite_url) == [(i,) for i in range(1, 201)]
    assert sum(batches) == 200
    assert len(batches) < 20
    report = verify(sqlite_url)
    assert (report.wrong, report.checked) == (None, 200)


async def test_a_record_that_cannot_be_kept_fails_alone(sqlite_url: str, trail: AuditTrail) -> None:
    """One caller's odd character is not everybody's outage."""
    odd = Entry(Action.AUDIT_READ, Outcome.GRANTED, Origin("odd"), actor="\ud800")
    groups = [named("a"), odd, named("b")]
    outcomes = await asyncio.gather(
        *(trail.record(each) for each in groups), return_exceptions=True
    )
    assert [type(each) for each in outcomes] == [type(None), AuditUnavailable, type(None)]
    assert written(sqlite_url, "request_id") == [("a",), ("b",)]
    assert verify(sqlite_url).wrong is None


async def test_a_group_is_written_whole_or_not_at_all(sqlite_url: str, trail: AuditTrail) -> None:
    odd = Entry(Action.AUDIT_READ, Outcome.GRANTED, Origin("odd"), actor="\ud800")
    with pytest.raises(AuditUnavailable):
        await trail.record(named("a"), odd)
    assert written(sqlite_url) == []


async def test_who_gives_up_leaves_the_chain_whole(sqlite_url: str, trail: AuditTrail) -> None:
    waiting = [asyncio.create_task(trail.record(named(f"r{i}"), named(f"s{i}"))) for i in range(20)]
    await asyncio.sleep(0)
    for each in waiting[::2]:
        each.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    await trail.record(named("after"))
    names = [row[0] for row in written(sqlite_url, "request_id")]
    for i in range(1, 20, 2):
        assert names.count(f"r{i}") == names.count(f"s{i}") == 1
    for i in range(0, 20, 2):
        assert names.count(f"r{i}") == names.count(f"s{i}")
    assert verify(sqlite_url).wrong is None


async def test_nobody_waits_for_ever(
    trail: AuditTrail, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process holds the file's write lock."""
    monkeypatch.setattr(writer, "WAIT_SECONDS", 0.2)
    await trail.record(named("before"))
    path = make_url(sqlite_url).database
    assert path is not None
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(AuditUnavailable):
        await trail.record(named("late"))
    holder.execute("ROLLBACK")
    holder.close()
    await trail.record(named("after"))
    assert verify(sqlite_url).wrong is None


async def test_too_many_are_refused_at_once(
    trail: AuditTrail, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "MOST_WAITING", 3)
    outcomes = await asyncio.gather(
        *(trail.record(named("r")) for _ in range(5)), return_exceptions=True
    )
    assert [type(each) for each in outcomes] == [type(None)] * 3 + [AuditUnavailable] * 2


async def test_what_is_queued_is_written_before_the_end(
    sqlite_url: str, database: Database
) -> None:
    trail = AuditTrail(database)
    waiting = asyncio.create_task(trail.record(named("last")))
    await asyncio.sleep(0)
    await trail.close()
    await waiting
    assert written(sqlite_url, "request_id") == [("last",)]
    with pytest.raises(AuditUnavailable):
        await trail.record(named("too late"))


# ------------------------------------------------------------------- in the business's transaction


def person(mrn: str) -> Patient:
    return Patient(mrn=mrn, first_name="A", last_name="B", dob=date(1980, 1, 1))


async def patients(database: Database) -> list[str]:
    async with database.session() as session:
        return sorted((await session.exec(select(Patient.mrn))).all())


async def test_records_stand_with_the_change_whoever_commits(
    sqlite_url: str, database: Database, trail: AuditTrail
) -> None:
    async with database.session() as session:
        session.add(person("one"))
        await trail.add(session, named("first"), named("second"))
        await session.commit()
        await trail.add(session, named("alone"))
        await session.commit()
    async with database.session() as session, session.begin():
        session.add(person("two"))
        await trail.add(session, named("third"))
    names = written(sqlite_url, "request_id")
    assert names == [("first",), ("second",), ("alone",), ("third",)]
    assert await patients(database) == ["one", "two"]
    assert verify(sqlite_url).wrong is None


async def test_the_chain_is_taken_last(database: Database, trail: AuditTrail) -> None:
    """Or somebody who holds it could wait for a row of somebody who waits for it."""
    said: list[str] = []

    @sa.event.listens_for(database.engine.sync_engine, "before_cursor_execute")
    def heard(*about: Any) -> None:
        said.append(about[2])

    async with database.session() as session:
        await trail.add(session, named("first"))
        session.add(person("later"))
        await session.commit()
    written_to = [each.split()[2] for each in said if each.startswith("INSERT")]
    assert written_to == ["patient", "audit_record"]
    assert said[-1].startswith("INSERT INTO audit_record")


async def test_records_go_with_the_change_that_is_undone(
    sqlite_url: str, database: Database, trail: AuditTrail
) -> None:
    async with database.session() as session:
        await trail.add(session, named("undone"))
        await session.rollback()
        await session.commit()
        session.add(person("kept"))
        await session.commit()
    async with database.session() as session:
        await trail.add(session, named("left"))
    async with database.session() as session:
        await trail.add(session, named("closed"))
        await session.close()
        await session.commit()
    assert written(sqlite_url) == []


async def test_a_part_of_a_transaction_takes_no_record(
    database: Database, trail: AuditTrail
) -> None:
    """Undone alone, it would leave the record, or take away more than its own."""
    async with database.session() as session, session.begin_nested():
        with pytest.raises(RuntimeError, match="part"):
            await trail.add(session, named("part"))


async def test_a_savepoint_does_not_write_early(
    sqlite_url: str, database: Database, trail: AuditTrail
) -> None:
    async with database.session() as session:
        session.add(person("one"))
        await trail.add(session, named("first"))
        async with session.begin_nested():
            session.add(person("two"))
        await session.rollback()
    assert written(sqlite_url) == []


async def test_each_error_is_the_one_to_blame(
    sqlite_url: str, database: Database, trail: AuditTrail
) -> None:
    """The trail's says 503; the change's own comes through as it is."""
    async with database.session() as session:
        session.add(person("one"))
        await session.commit()
    async with database.session() as session:
        await trail.add(session, named("first"))
        session.add(person("one"))
        with pytest.raises(sa.exc.IntegrityError):
            await session.commit()
    change(
        sqlite_url,
        "CREATE TRIGGER broken BEFORE INSERT ON audit_record "
        "BEGIN SELECT RAISE(ABORT, 'no room'); END",
    )
    async with database.session() as session:
        session.add(person("two"))
        await trail.add(session, named("second"))
        with pytest.raises(AuditUnavailable):
            await session.commit()
        await session.rollback()
    assert written(sqlite_url) == []
    assert await patients(database) == ["one"]


async def test_business_and_trail_share_one_chain(
    sqlite_url: str, database: Database, trail: AuditTrail
) -> None:
    async def business(i: int) -> None:
        async with database.session() as session, database.writing():
            session.add(person(f"p{i}"))
            await trail.add(session, named(f"b{i}"))
            await session.commit()

    await asyncio.gather(
        *(business(i) for i in range(10)), *(trail.record(named(f"r{i}")) for i in range(30))
    )
    assert written(sqlite_url) == [(i,) for i in range(1, 41)]
    assert verify(sqlite_url).wrong is None


# -------------------------------------------------------------------------------- signatures


def test_a_key_is_its_owners_alone_and_never_overwritten(tmp_path: Path) -> None:
    path, public = tmp_path / "key.pem", tmp_path / "public.pem"
    public.write_text(make_key(path))
    assert path.stat().st_mode & 0o777 == 0o600
    before = path.read_bytes()
    with pytest.raises(FileExistsError):
        make_key(path)
    assert path.read_bytes() == before
    signer = Signer.from_file(path)
    assert list(read_public_key(public)) == [signer.key_id]
    assert checked_line(signer.checkpoint(Head(7, "f" * 64)), read_public_key(public)).count == 7


def test_a_file_without_a_key_is_named(tmp_path: Path) -> None:
    path = tmp_path / "none.pem"
    for read in (Signer.from_file, read_public_key):
        with pytest.raises(ValueError, match="can't be read"):
            read(path)
    path.write_text("no key")
    for read in (Signer.from_file, read_public_key):
        with pytest.raises(ValueError, match="in PEM"):
            read(path)


@pytest.mark.parametrize("member", ["kind", "count", "head", "removed", "at", "key", "signature"])
def test_no_member_of_a_statement_can_be_changed(member: str, signer: Signer) -> None:
    line = signer.checkpoint(Head(7, "f" * 64))
    members = json.loads(line)
    changed: dict[str, Any] = {
        "kind": "purge",
        "count": 8,
        "removed": 1,
        "signature": base64.b64encode(bytes(64)).decode(),
    }
    members[member] = changed.get(member, "0" * 64)
    with pytest.raises(BadStatement):
        checked_line(json.dumps(members), signer.public)
    assert checked_line(line, signer.public).head == "f" * 64


@pytest.mark.parametrize(
    "line",
    ["", "{}", "[]", "null", "x", '{"signature":"AA=="}', "[" * 100_000, '{"signature":1}'],
    ids=range(8),
)
def test_what_is_no_statement_is_refused(line: str, signer: Signer) -> None:
    with pytest.raises(BadStatement, match="no signed statement"):
        checked_line(line, signer.public)


def test_another_key_does_not_count(signer: Signer, tmp_path: Path) -> None:
    make_key(tmp_path / "other.pem")
    other = Signer.from_file(tmp_path / "other.pem")
    with pytest.raises(BadStatement, match="not given"):
        checked_line(other.checkpoint(Head(1, "f" * 64)), signer.public)


# ------------------------------------------------------------------------------- checkpoints


def test_half_a_line_is_written_over(tmp_path: Path, signer: Signer) -> None:
    path = tmp_path / "checkpoints"
    sink = FileSink(path)
    assert sink.last() == GENESIS
    sink.append(signer.checkpoint(Head(1, "a" * 64)))
    assert path.stat().st_mode & 0o777 == 0o600
    with path.open("a") as file:
        file.write('{"at":"20')
    assert sink.last() == GENESIS
    sink.append(signer.checkpoint(Head(2, "b" * 64)))
    assert [each.count for each in checked_file(path, signer.public)] == [1, 2]
    assert sink.last() == Head(2, "b" * 64)


def settings(url: str, folder: Path, **more: Any) -> TrailSettings:
    values: dict[str, Any] = {
        "database_url": url,
        "audit_key_file": folder / "key.pem",
        "audit_checkpoint_file": folder / "checkpoints",
    }
    return TrailSettings(**{**values, **more})


async def until(condition: Any) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110  (the condition is another's)
            await asyncio.sleep(0.01)


async def end(task: "asyncio.Task[None]") -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "LOOK_SECONDS", 0.01)


@pytest.mark.usefixtures("hasty")
async def test_checkpoints_by_number_by_time_and_at_the_end(
    sqlite_url: str, database: Database, trail: AuditTrail, signer: Signer, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoints"

    def counts() -> list[int]:
        return [each.count for each in checked_file(path, signer.public)] if path.exists() else []

    await trail.record(named("a"))
    often = settings(sqlite_url, tmp_path, audit_checkpoint_records=3, audit_checkpoint_seconds=900)
    task = asyncio.create_task(Checkpoints(often, database).run())
    await until(lambda: counts() == [1])  # what is new at the start
    await trail.record(named("b"), named("c"))
    await trail.record(named("d"))
    await until(lambda: counts() == [1, 4])
    await trail.record(named("e"))
    await end(task)
    assert counts() == [1, 4, 5]
    soon = settings(sqlite_url, tmp_path, audit_checkpoint_seconds=0.02)
    task = asyncio.create_task(Checkpoints(soon, database).run())
    await trail.record(named("f"))
    await until(lambda: counts()[-1:] == [6])
    await end(task)
    assert counts().count(6) == 1  # nothing new, nothing written
    report = verify(sqlite_url, statements=checked_file(path, signer.public))
    assert (report.wrong, [each.count for each in report.agreed]) == (None, counts())


@pytest.mark.usefixtures("hasty", "signer")
async def test_a_trail_that_is_not_the_signed_one_is_cried_out(
    sqlite_url: str,
    database: Database,
    trail: AuditTrail,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    await trail.record(named("a"), named("b"))
    known = settings(sqlite_url, tmp_path, audit_checkpoint_records=1)
    task = asyncio.create_task(Checkpoints(known, database).run())
    await until((tmp_path / "checkpoints").exists)
    await end(task)
    change(sqlite_url, "DROP TRIGGER audit_record_no_delete", "DELETE FROM audit_record")
    await trail.record(named("c"), named("d"), named("e"))
    task = asyncio.create_task(Checkpoints(known, database).run())
    await until(lambda: "not the one that was signed" in caplog.text)
    await end(task)
    assert [each.levelno for each in caplog.records].count(logging.CRITICAL) == 1


@pytest.mark.usefixtures("hasty")
async def test_what_the_sink_does_not_take_is_sent_again(
    sqlite_url: str,
    database: Database,
    trail: AuditTrail,
    signer: Signer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checkpoints, "MOST_KEPT", 2)
    url = "https://sink.example/checkpoints"
    kept: list[str] = []
    answers = [500, 302, 204]

    def answer(request: httpx.Request) -> httpx.Response:
        status = answers.pop(0) if answers else 200
        if status < 300:
            kept.append(request.content.decode())
        return httpx.Response(status, headers={"Location": "https://other.example"})

    known = settings(
        sqlite_url,
        tmp_path,
        audit_checkpoint_file=None,
        audit_checkpoint_url=url,
        audit_checkpoint_records=1,
    )
    with respx.mock as router:
        router.post(url).mock(side_effect=answer)
        each = Checkpoints(known, database)
        task = asyncio.create_task(each.run())
        for name in ("a", "b", "c"):
            await trail.record(named(name))
            await until(lambda: each._last.id == len(written(sqlite_url)))
        each._again = 0.0
        await until(lambda: len(answers) < 2)
        each._again = 0.0
        await until(lambda: len(kept) == 2)
        await end(task)
    counts = [checked_line(line, signer.public).count for line in kept]
    assert counts == [2, 3]  # the oldest was given up


async def test_without_checkpoints_the_log_says_so(
    sqlite_url: str, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    await Checkpoints(TrailSettings(database_url=sqlite_url), database).run()
    assert "has no checkpoints" in caplog.text


@pytest.mark.parametrize(
    "more",
    [
        {"audit_key_file": None},
        {"audit_checkpoint_url": "https://sink.example"},
        {"audit_checkpoint_file": None, "audit_checkpoint_url": "ftp://sink.example"},
        {"audit_checkpoint_records": 0},
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(more: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"audit_|AUDIT_"):
        settings("sqlite+aiosqlite://", tmp_path, **more)
