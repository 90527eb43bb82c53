"""Somebody with every right on the database changes the trail; `verify` names the place.

On PostgreSQL as superuser, on SQLite as the file's owner, in both with the triggers off.
"""

# ruff: noqa: S608  (the statements are the test's own)

import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
import sqlalchemy as sa
from alembic import command as alembic
from sqlalchemy import event
from sqlalchemy.engine import make_url
from typer.testing import CliRunner

from app.audit import Action, AuditTrail, Entry, Origin, Outcome
from app.audit.chain import COLUMNS, DIALECTS, GENESIS, Dialect, Head, digest, follow
from app.audit.purge import purge
from app.audit.signing import Signer, Statement, checked_line, make_key
from app.audit.verify import Report, verify
from app.cli.audit import cli
from app.db import AUDIT_TABLE, Database, _alembic_config
from app.demo.stack import REPOSITORY
from tests.live.conftest import DatabaseUrls, command
from tests.servers import PostgresServer

RECORDS, SIGNED = 12, (4, 8, 12)


def entry(name: str, **more: Any) -> Entry:
    values: dict[str, Any] = {
        "action": Action.STUDY_VIEW,
        "outcome": Outcome.GRANTED,
        "origin": Origin(name, "192.0.2.7"),
        "actor": "dr.novák",
        "actor_roles": "clinician",
        "reason": "why",
        "patient_id": UUID(int=7),
        "order_id": UUID(int=8),
        "study_instance_uid": "1.2.3",
        "ctx": "ctx",
        "purpose_of_use": "BTG",
        "detail": {"by": ["somebody"]},
    }
    return Entry(**{**values, **more})


class Owner:
    """Whoever may do everything to the database; the triggers are off."""

    def __init__(self, connection: sa.Connection) -> None:
        self.connection = connection
        self.dialect: Dialect = DIALECTS[connection.dialect.name]

    def do(self, statement: str) -> Any:
        return self.connection.exec_driver_sql(statement)

    def rows(self) -> list[tuple[Any, ...]]:
        """Canonical values, and the hash."""
        found = self.connection.exec_driver_sql(self.dialect.select, (1,)).fetchall()
        return [(*self.dialect.read(tuple(row[:-1])), row[-1]) for row in found]

    def kept(self) -> list[Any]:
        """All rows, as the database keeps them."""
        row = "CAST(t AS text)" if self.connection.dialect.name == "postgresql" else "*"
        return list(self.do(f"SELECT {row} FROM {AUDIT_TABLE} AS t ORDER BY id").fetchall())

    def head(self) -> Head:
        return Head(*self.connection.exec_driver_sql(self.dialect.head).one())

    def insert(self, row: tuple[Any, ...], sha256: str) -> None:
        self.connection.exec_driver_sql(
            self.dialect.insert, self.dialect.values([(row, sha256)])[0]
        )

    def chain_anew(self, first: int) -> None:
        """Make every hash from `first` on what it should be."""
        previous = GENESIS.sha256
        for row in self.rows():
            if row[0] >= first:
                sha256 = digest(previous, row[:-1])
                self.connection.exec_driver_sql(self.dialect.update, (row[0], sha256, row[0]))
                previous = sha256
            else:
                previous = row[-1]

    def write(self, *names: str) -> None:
        """Records as the application would write them."""
        for row, sha256 in follow(self.head(), [entry(name) for name in names]):
            self.insert(row, sha256)


@dataclass
class Kept:
    """A written trail, and what was signed of it."""

    database: DatabaseUrls
    owner_url: sa.URL
    signer: Signer
    statements: list[Statement]

    @contextmanager
    def owner(self) -> Iterator[Owner]:
        engine = sa.create_engine(self.owner_url)
        try:
            with engine.begin() as connection:
                if connection.dialect.name == "postgresql":
                    connection.exec_driver_sql(f"ALTER TABLE {AUDIT_TABLE} DISABLE TRIGGER ALL")
                else:
                    found = connection.exec_driver_sql(
                        "SELECT name FROM sqlite_master WHERE type = 'trigger'"
                    )
                    for (name,) in found.fetchall():
                        connection.exec_driver_sql(f"DROP TRIGGER {name}")
                yield Owner(connection)
        finally:
            engine.dispose()

    def verify(self, **more: Any) -> Report:
        given: dict[str, Any] = {"statements": self.statements, "keys": self.signer.public}
        return verify(self.database.app, **{**given, **more})

    def line(self, line: str) -> None:
        self.statements.append(checked_line(line, self.signer.public))


@pytest.fixture
async def kept(request: pytest.FixtureRequest, database: DatabaseUrls, tmp_path: Path) -> Kept:
    """Twelve records, three checkpoints."""
    owner = make_url(database.sync_owner)
    if database.is_postgres:
        server: PostgresServer = request.getfixturevalue("postgres")
        owner = make_url(server.admin_url).set(database=owner.database)
    make_key(tmp_path / "key.pem")
    each = Kept(database, owner, Signer.from_file(tmp_path / "key.pem"), [])
    app = Database(database.app)
    trail = AuditTrail(app)
    for number in range(1, RECORDS + 1):
        await trail.record(entry(f"r{number}"))
        if number in SIGNED:
            with each.owner() as superuser:
                each.line(each.signer.checkpoint(superuser.head()))
    await trail.close()
    await app.close()
    assert each.verify().wrong is None
    return each


# -------------------------------------------------------------------------------- what is done


def edited(column: str) -> Callable[[Owner], None]:
    values = {
        "id": "1000",
        "at": "'2001-01-01 00:00:00.000000+00:00'",
        "patient_id": "NULL",
        "order_id": "'00000000-0000-0000-0000-000000000009'",
        "sha256": "'" + "0" * 64 + "'",
        "detail": "'{}'",
        "outcome": "'denied'",
    }
    value = values.get(column, "'changed'")
    return lambda owner: owner.do(f"UPDATE {AUDIT_TABLE} SET {column} = {value} WHERE id = 6")


def deleted(condition: str) -> Callable[[Owner], None]:
    return lambda owner: owner.do(f"DELETE FROM {AUDIT_TABLE} WHERE {condition}")


def swapped(owner: Owner) -> None:
    for former, new in ((5, -5), (7, 5), (-5, 7)):
        owner.do(f"UPDATE {AUDIT_TABLE} SET id = {new} WHERE id = {former}")


def inserted(owner: Owner) -> None:
    owner.do(f"UPDATE {AUDIT_TABLE} SET id = -id WHERE id >= 6")
    row, _ = follow(Head(5, owner.rows()[-1][-1]), [entry("forged")])[0]
    owner.insert(row, follow(owner.head(), [entry("forged")])[0][1])
    owner.do(f"UPDATE {AUDIT_TABLE} SET id = 1 - id WHERE id < 0")


def inserted_in_the_chain(owner: Owner) -> None:
    """With the hash that it should have there."""
    owner.do(f"UPDATE {AUDIT_TABLE} SET id = -id WHERE id >= 6")
    owner.write("forged")
    owner.do(f"UPDATE {AUDIT_TABLE} SET id = 1 - id WHERE id < 0")


def inserted_twice(owner: Owner) -> None:
    if owner.connection.dialect.name == "sqlite":
        # There the id is the row: a table without a key has to take its place.
        names = ", ".join((*COLUMNS, "sha256"))
        owner.do(f"CREATE TABLE other AS SELECT {names} FROM {AUDIT_TABLE}")
        owner.do(f"DROP TABLE {AUDIT_TABLE}")
        owner.do(f"ALTER TABLE other RENAME TO {AUDIT_TABLE}")
    else:
        owner.do(f"ALTER TABLE {AUDIT_TABLE} DROP CONSTRAINT audit_record_pkey")
    owner.do(f"INSERT INTO {AUDIT_TABLE} SELECT * FROM {AUDIT_TABLE} WHERE id = 6")


def recomputed(owner: Owner) -> None:
    owner.do(f"UPDATE {AUDIT_TABLE} SET actor = 'nobody' WHERE id = 6")
    owner.chain_anew(1)


def recomputed_without_one(owner: Owner) -> None:
    owner.do(f"DELETE FROM {AUDIT_TABLE} WHERE id = 6")
    for former in range(7, RECORDS + 1):
        owner.do(f"UPDATE {AUDIT_TABLE} SET id = {former - 1} WHERE id = {former}")
    owner.chain_anew(1)


def one_hash_too(owner: Owner) -> None:
    """The record and its hash, but not what follows."""
    owner.do(f"UPDATE {AUDIT_TABLE} SET actor = 'nobody' WHERE id = 6")
    rows = owner.rows()
    sha256 = digest(rows[4][-1], rows[5][:-1])
    owner.connection.exec_driver_sql(owner.dialect.update, (6, sha256, 6))


def restored(owner: Owner) -> None:
    owner.do(f"DELETE FROM {AUDIT_TABLE} WHERE id > 6")


def restored_and_used(owner: Owner) -> None:
    restored(owner)
    owner.write(*(f"again{number}" for number in range(10)))


def forked_by_a_writer(owner: Owner) -> None:
    """One that did not see the last record, and so hangs on the one before."""
    _, sha256 = follow(Head(11, owner.rows()[10][-1]), [entry("other")])[0]
    row, _ = follow(Head(12, ""), [entry("other")])[0]
    owner.insert(row, sha256)


def moved_out_of_sight(owner: Owner) -> None:
    """To a time that is written alike, and sorts elsewhere."""
    at = "replace(at, ' ', 'T') || 'Z'"
    if owner.connection.dialect.name == "postgresql":
        text = "to_char(at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US')"
        at = f"CAST({text} || '+00 BC' AS timestamptz)"
    owner.do(f"UPDATE {AUDIT_TABLE} SET at = {at} WHERE id = 6")


def never(owner: Owner) -> None:
    owner.do(f"UPDATE {AUDIT_TABLE} SET at = '-infinity' WHERE id = 6")


def with_dashes(column: str) -> Callable[[Owner], None]:
    """SQLite's: the same UUID, which is not found by it any more. PostgreSQL has one form."""
    number = UUID(int={"patient_id": 7, "order_id": 8}[column])

    def do(owner: Owner) -> None:
        is_postgres = owner.connection.dialect.name == "postgresql"
        value = UUID(int=9) if is_postgres else number
        owner.do(f"UPDATE {AUDIT_TABLE} SET {column} = '{value}' WHERE id = 6")

    return do


DEEDS: dict[str, tuple[Callable[[Owner], object], int]] = {
    **{f"{column} edited": (edited(column), 6) for column in (*COLUMNS, "sha256")},
    "at, as it reads": (moved_out_of_sight, 6),
    "at endless": (never, 6),
    "patient_id, as it reads": (with_dashes("patient_id"), 6),
    "order_id, as it reads": (with_dashes("order_id"), 6),
    "first deleted": (deleted("id = 1"), 1),
    "middle deleted": (deleted("id = 6"), 6),
    "two deleted": (deleted("id IN (6, 7)"), 6),
    "last deleted": (deleted("id = 12"), 12),
    "beginning cut": (deleted("id < 6"), 1),
    "tail cut": (deleted("id > 9"), 10),
    "all deleted": (deleted("id > 0"), 1),
    "two swapped": (swapped, 5),
    "one inserted": (inserted, 6),
    "one inserted in the chain": (inserted_in_the_chain, 7),
    "one doubled": (inserted_twice, 6),
    "a record and its hash": (one_hash_too, 7),
    "chain recomputed": (recomputed, 5),  # 5 to 8: the checkpoint at 4 agrees
    "one left out, chain recomputed": (recomputed_without_one, 5),
    "old backup restored": (restored, 7),
    "old backup restored and used": (restored_and_used, 5),
    "two writers forked": (forked_by_a_writer, 13),
}


@pytest.mark.parametrize("deed", DEEDS)
async def test_it_is_found(deed: str, kept: Kept) -> None:
    do, wrong = DEEDS[deed]
    with kept.owner() as owner:
        before = owner.kept()
        do(owner)
        assert owner.kept() != before
    report = kept.verify()
    assert report.wrong == wrong, report.sentence
    assert report.sentence
    good = [number for number in SIGNED if number < wrong]
    assert [each.count for each in report.agreed] == good


async def test_two_databases_that_went_on_from_one(kept: Kept) -> None:
    """A replica that was made a second original: whichever is looked at, it is seen."""
    with kept.owner() as owner:
        mine, theirs = (
            [(row, sha256) for row, sha256 in follow(owner.head(), [entry(name)] * 2)]
            for name in ("mine", "theirs")
        )
        for row, sha256 in mine:
            owner.insert(row, sha256)
    kept.line(kept.signer.checkpoint(Head(14, mine[-1][1])))
    assert kept.verify().wrong is None
    kept.line(kept.signer.checkpoint(Head(14, theirs[-1][1])))
    report = kept.verify()
    assert (report.wrong, report.last_good and report.last_good.count) == (15, 14)
    assert "14" in report.sentence


async def test_no_second_record_takes_a_place(kept: Kept) -> None:
    """The key forbids it, whoever writes; so there is no fork inside a database."""
    with pytest.raises(sa.exc.DBAPIError), kept.owner() as owner:  # noqa: PT012
        row, sha256 = follow(Head(11, owner.rows()[10][-1]), [entry("other")])[0]
        owner.insert(row, sha256)
    assert kept.verify().wrong is None


async def test_from_any_record_on(kept: Kept) -> None:
    for start in range(1, RECORDS + 1):
        report = kept.verify(start=start)
        assert (report.wrong, report.first, report.checked) == (None, start, RECORDS + 1 - start)
    for nowhere in (0, RECORDS + 1):
        with pytest.raises(LookupError):
            kept.verify(start=nowhere)
    with kept.owner() as owner:
        edited("actor")(owner)
    assert kept.verify(start=6).wrong == 6
    assert kept.verify(start=7).wrong is None
    with kept.owner() as owner:
        owner.chain_anew(6)
    # What the chain hangs on there is not the record that was signed.
    assert kept.verify(start=9).wrong is not None


async def test_without_checkpoints_the_chain_alone_speaks(kept: Kept) -> None:
    """What it can't say is why there are checkpoints."""
    with kept.owner() as owner:
        restored(owner)
    assert kept.verify(statements=[]).wrong is None
    with kept.owner() as owner:
        edited("actor")(owner)
    assert kept.verify(statements=[]).wrong == 6


# ----------------------------------------------------------------------------- many processes

WRITER = """
import asyncio, sys
from app.audit import Action, AuditTrail, Entry, Origin, Outcome
from app.db import Database
async def main(url, name, count):
    database = Database(url)
    trail = AuditTrail(database)
    async def some(number):
        for each in range(count):
            await trail.record(
                Entry(Action.STUDY_VIEW, Outcome.GRANTED, Origin(f"{name}-{number}-{each}")))
    print("ready", flush=True)
    sys.stdin.readline()
    await asyncio.gather(*(some(number) for number in range(4)))
    await trail.close()
    await database.close()
asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
"""


def run_writers(url: str, processes: int, count: int) -> None:
    """All at once, each with four who write so many records."""
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, url, f"process{number}", str(count)],
            cwd=REPOSITORY,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for number in range(processes)
    ]
    for each in writers:
        assert each.stdout is not None
        assert each.stdout.readline() == "ready\n"
    for each in writers:
        assert each.stdin is not None
        each.stdin.write("\n")
        each.stdin.flush()
    for each in writers:
        _, said = each.communicate(timeout=60)
        assert each.returncode == 0, said


async def test_many_processes_write_one_chain(kept: Kept) -> None:
    count = 100
    run_writers(kept.database.app, 3, count)
    report = kept.verify()
    assert (report.wrong, report.checked) == (None, RECORDS + 3 * 4 * count)
    with kept.owner() as owner:
        names = [row[2] for row in owner.rows()[RECORDS:]]
    assert len(set(names)) == len(names)
    turns = [name.partition("-")[0] for name in names]
    if kept.database.is_postgres:  # for SQLite several processes are none of our promises
        # They took turns; else this has shown nothing.
        assert sum(before != after for before, after in pairwise(turns)) > 10


# -------------------------------------------------------------------------------- the migration


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_records_of_before_are_chained(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Numbered anew where numbers were lost, in their order, with all that they said."""
    url = f"sqlite:///{tmp_path / 'old.sqlite'}"
    if kind == "postgresql":
        server: PostgresServer = request.getfixturevalue("postgres")
        url = server.create_database()[0]
    engine = sa.create_engine(url)
    ids = [2, 3, 7, *range(100, 1200), 5000]
    with engine.begin() as connection:
        config = _alembic_config()
        config.attributes["connection"] = connection
        alembic.upgrade(config, "0002")
        table = sa.Table(AUDIT_TABLE, sa.MetaData(), autoload_with=connection)
        connection.execute(
            table.insert(),
            [
                {
                    **{column.name: "" for column in table.c},
                    "id": number,
                    "at": datetime(2025, 1, 1, tzinfo=UTC) + timedelta(seconds=number),
                    "request_id": f"r{number}",
                    "patient_id": UUID(int=number) if kind == "postgresql" else None,
                    "order_id": None,
                    "detail": "{}",
                }
                for number in ids
            ],
        )
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        alembic.upgrade(config, "head")
    report = verify(url.replace("sqlite:", "sqlite+aiosqlite:"))
    assert (report.wrong, report.first, report.last) == (None, 1, len(ids))
    with engine.connect() as connection:
        found = connection.exec_driver_sql(f"SELECT request_id FROM {AUDIT_TABLE} ORDER BY id")
        assert [row[0] for row in found] == [f"r{number}" for number in ids]
    with pytest.raises(sa.exc.DBAPIError, match="never changed"), engine.begin() as connection:
        connection.exec_driver_sql(f"UPDATE {AUDIT_TABLE} SET id = 9 WHERE id = 1")
    engine.dispose()


def test_nothing_but_the_chain_gives_ids(database: DatabaseUrls) -> None:
    if not database.is_postgres:
        pytest.skip("a row of SQLite always has a number; verify finds the missing hash")
    plain = make_url(database.app).set(drivername="postgresql")
    with (
        psycopg.connect(plain.render_as_string(hide_password=False)) as connection,
        pytest.raises(psycopg.errors.NotNullViolation),
    ):
        connection.execute(
            f"INSERT INTO {AUDIT_TABLE} (at, request_id, action, outcome, reason, actor, "
            "actor_roles, client_address, study_instance_uid, ctx, detail) "
            "VALUES (now(), 'r', 'a', 'o', '', '', '', '', '', '', '{}')"
        )


# --------------------------------------------------------------------- the command line, retention


@dataclass
class Operator:
    """Somebody at a terminal, with the settings in the environment."""

    kept: Kept
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        return {
            "LIGHTBOX_DATABASE_URL": self.kept.database.app,
            "LIGHTBOX_MIGRATION_DATABASE_URL": self.kept.database.owner,
            "LIGHTBOX_AUDIT_KEY_FILE": str(self.folder / "key.pem"),
            "LIGHTBOX_AUDIT_CHECKPOINT_FILE": str(self.folder / "checkpoints"),
        }

    def run(self, *words: str, **environment: str) -> tuple[int, str, str]:
        """What the command answers: its code, and what it said on the two outputs."""
        invoke = partial(CliRunner().invoke, cli, words, env={**self.environment, **environment})
        with ThreadPoolExecutor(1) as thread:  # there is an event loop in this one
            done = thread.submit(invoke).result()
        return done.exit_code, done.stdout, done.stderr


@pytest.fixture
def operator(kept: Kept, tmp_path: Path) -> Operator:
    lines = [kept.signer.checkpoint(Head(each.count, each.head)) for each in kept.statements]
    (tmp_path / "checkpoints").write_text("".join(f"{line}\n" for line in lines))
    return Operator(kept, tmp_path)


async def test_verify_at_a_terminal(operator: Operator) -> None:
    done = command("audit", "verify", environment=operator.environment)
    code, said = done.returncode, done.stdout
    assert (code, said.splitlines()[0]) == (0, "12 records, 1 to 12, are as they were written.")
    assert "3 checkpoints agree, the last one at record 12" in said
    code, said, _ = operator.run("verify", "--from", "7")
    assert (code, said.splitlines()[0]) == (0, "6 records, 7 to 12, are as they were written.")
    assert operator.run("verify", "--from", "13")[0] == 1
    with operator.kept.owner() as owner:
        recomputed(owner)
    code, said, _ = operator.run("verify")
    assert code == 1
    assert said.startswith("The trail is wrong from record 5 on. Record 8 is not the one")
    assert "The last checkpoint that agrees is at record 4" in said
    with operator.kept.owner() as owner:
        one_hash_too(owner)
        edited("actor")(owner)
    done = command("audit", "verify", environment=operator.environment)
    assert done.returncode == 1
    assert done.stdout.startswith("The trail is wrong from record 6 on. Record 6 is not the one")


async def test_a_checkpoint_that_was_changed_is_found(operator: Operator) -> None:
    path = operator.folder / "checkpoints"
    path.write_text(path.read_text().replace('"count":8', '"count":9'))
    code, _, complaint = operator.run("verify")
    assert code == 1
    assert "line 2 of checkpoints: its signature does not hold" in complaint


async def test_an_auditor_needs_the_public_key_alone(operator: Operator) -> None:
    other = operator.folder / "other.pem"
    code, public, _ = operator.run("key", str(other))
    assert code == 0
    assert public.startswith("-----BEGIN PUBLIC KEY-----")
    assert operator.run("key", str(other))[0] == 1
    (operator.folder / "wrong.pem").write_text(public)
    wrong = ("--public-key", str(operator.folder / "wrong.pem"))
    code, _, complaint = operator.run("verify", *wrong)
    assert code == 1
    assert "was not given" in complaint
    environment = {"LIGHTBOX_AUDIT_KEY_FILE": "", "LIGHTBOX_AUDIT_CHECKPOINT_FILE": ""}
    (operator.folder / "public.pem").write_bytes(_public_pem(operator.folder / "key.pem"))
    code, said, complaint = operator.run(
        "verify",
        "--public-key",
        str(operator.folder / "public.pem"),
        "--checkpoints",
        str(operator.folder / "checkpoints"),
        **environment,
    )
    assert (code, complaint) == (0, "")
    assert "3 checkpoints agree" in said
    code, _, complaint = operator.run("verify", **environment)
    assert code == 0
    assert "no checkpoints to compare with" in complaint


def _public_pem(private: Path) -> bytes:
    """As OpenSSL sees it."""
    return subprocess.run(
        ["openssl", "pkey", "-in", private, "-pubout"], check=True, capture_output=True
    ).stdout


def aged(kept: Kept, through: int) -> None:
    """Make the first records seven years old, as if they had been written then."""
    with kept.owner() as owner:
        year = datetime.now(UTC).year - 7
        at = f"'{year}-01-01 00:00:00.000000{'+00' if kept.database.is_postgres else ''}'"
        owner.do(f"UPDATE {AUDIT_TABLE} SET at = {at} WHERE id <= {through}")
        owner.chain_anew(1)
        rows = owner.rows()
    kept.statements.clear()
    for number in SIGNED:
        kept.line(kept.signer.checkpoint(Head(number, rows[number - 1][-1])))


def trigger_is_there(kept: Kept) -> bool:
    engine = sa.create_engine(kept.database.sync_owner)
    try:
        with engine.begin() as connection:
            connection.exec_driver_sql(f"DELETE FROM {AUDIT_TABLE}")
    except sa.exc.DBAPIError as error:
        return "never changed" in str(error)
    finally:
        engine.dispose()
    return False


@pytest.fixture
def armed(kept: Kept) -> None:
    """The triggers are there again, as the migration made them."""
    with kept.owner() as owner:
        if kept.database.is_postgres:
            owner.do(f"ALTER TABLE {AUDIT_TABLE} ENABLE TRIGGER ALL")
            return
        for event in ("UPDATE", "DELETE"):
            owner.do(
                f"CREATE TRIGGER {AUDIT_TABLE}_no_{event.lower()} BEFORE {event} ON {AUDIT_TABLE} "
                "BEGIN SELECT RAISE(ABORT, 'audit records are never changed'); END"
            )


def rewritten(operator: Operator, kept: Kept) -> None:
    lines = [kept.signer.checkpoint(Head(each.count, each.head)) for each in kept.statements]
    (operator.folder / "checkpoints").write_text("".join(f"{line}\n" for line in lines))


async def test_what_is_old_goes_and_the_rest_still_proves_itself(
    operator: Operator, kept: Kept, request: pytest.FixtureRequest
) -> None:
    aged(kept, 5)
    rewritten(operator, kept)
    request.getfixturevalue("armed")
    said = "5 records, up to record 5, would be removed.\n"
    assert operator.run("purge", "--dry-run") == (0, said, "")
    assert operator.run("purge", "--keep-years", "8", "--dry-run")[1].startswith("No record")
    assert kept.verify().checked == RECORDS
    assert operator.run("purge")[1] == "5 records, up to record 5, were removed.\n"
    assert trigger_is_there(kept)
    code, said, _ = operator.run("verify")
    assert (code, said.splitlines()[0]) == (0, "8 records, 6 to 13, are as they were written.")
    assert operator.run("purge")[1].startswith("No record")
    # Neither file nor trail alone has the statement.
    (operator.folder / "nothing").write_text("")
    assert operator.run("verify", "--checkpoints", str(operator.folder / "nothing"))[0] == 0
    with kept.owner() as owner:
        row = owner.rows()[-1]
        assert (row[3], row[4]) == ("audit:purge", "done")
        assert row[6].startswith("operator ")
        deleted("id = 6")(owner)
    report = kept.verify()
    assert (report.wrong, "no signed purge" in report.sentence) == (6, True)


@pytest.mark.usefixtures("armed")
async def test_all_of_it_can_go(operator: Operator, kept: Kept) -> None:
    assert (
        operator.run("purge", "--before", "2999-01-01")[1]
        == "12 records, up to record 12, were removed.\n"
    )
    code, said, _ = operator.run("verify")
    assert (code, said.splitlines()[0]) == (0, "1 records, 13 to 13, are as they were written.")
    with kept.owner() as owner:
        owner.write("after")
    assert operator.run("verify")[0] == 0


async def test_a_purge_that_nobody_signed_is_found(kept: Kept, tmp_path: Path) -> None:
    """The owner deletes the oldest and writes a record of it, with a key of their own."""
    make_key(tmp_path / "own.pem")
    with kept.owner() as owner:
        line = Signer.from_file(tmp_path / "own.pem").purge(
            Head(5, owner.rows()[4][-1]), 5, owner.head()
        )
        deleted("id <= 5")(owner)
        forged = entry(
            "purge", action=Action.AUDIT_PURGE, outcome=Outcome.DONE, detail={"statement": line}
        )
        for row, sha256 in follow(owner.head(), [forged]):
            owner.insert(row, sha256)
    assert kept.verify().wrong == 1
    assert kept.verify(keys={}).wrong == 1
    assert kept.verify(start=7).wrong == 13


@pytest.mark.usefixtures("armed")
async def test_a_purge_that_failed_at_its_end_explains_nothing(kept: Kept) -> None:
    """Its statement was kept already: what is removed later is missing all the same, also where
    somebody writes a record with that statement."""

    def full(_: Any) -> None:
        raise OSError("the disk is full")

    lines: list[str] = []
    owner_url = kept.owner_url.render_as_string(hide_password=False)
    event.listen(sa.Engine, "commit", full)
    try:
        with pytest.raises(OSError, match="full"):
            purge(owner_url, datetime(2999, 1, 1, tzinfo=UTC), kept.signer, lines.append)
    finally:
        event.remove(sa.Engine, "commit", full)
    (line,) = lines
    assert kept.verify().checked == RECORDS
    with kept.owner() as owner:
        owner.write("after")
    kept.line(line)
    assert kept.verify().wrong is None
    with kept.owner() as owner:
        deleted(f"id <= {RECORDS}")(owner)
    assert kept.verify().wrong == 1
    said = entry("p", action=Action.AUDIT_PURGE, outcome=Outcome.DONE, detail={"statement": line})
    with kept.owner() as owner:
        for row, sha256 in follow(owner.head(), [said]):
            owner.insert(row, sha256)
    report = kept.verify()
    assert (report.wrong, "not of this place" in report.sentence) == (RECORDS + 2, True)


async def test_what_a_sink_has_not_got_is_not_purged(operator: Operator, kept: Kept) -> None:
    with kept.owner() as owner:
        owner.do(
            "INSERT INTO export_position (sink, record_id, at) VALUES ('syslog', 4, '2026-01-01')"
        )
    code, _, said = operator.run("purge", "--before", "2999-01-01")
    assert (code, "records 5 to" in said, "syslog" in said) == (1, True, True)
    with kept.owner() as owner:
        assert len(owner.rows()) == RECORDS


async def test_evidence_is_not_purged(operator: Operator, kept: Kept) -> None:
    with kept.owner() as owner:
        edited("actor")(owner)
    code, said, _ = operator.run("purge", "--before", "2999-01-01")
    assert (code, "wrong from record 6" in said) == (1, True)
    with kept.owner() as owner:
        assert len(owner.rows()) == RECORDS


async def test_nothing_goes_without_key_owner_or_a_place_for_the_statement(
    operator: Operator, kept: Kept
) -> None:
    everything = ("purge", "--before", "2999-01-01")
    refusals = [
        {"LIGHTBOX_AUDIT_KEY_FILE": "", "LIGHTBOX_AUDIT_CHECKPOINT_FILE": ""},
        {"LIGHTBOX_AUDIT_CHECKPOINT_FILE": "/nowhere/checkpoints"},
        {
            "LIGHTBOX_AUDIT_CHECKPOINT_FILE": "",
            "LIGHTBOX_AUDIT_CHECKPOINT_URL": "http://127.0.0.1:9/nobody",
        },
    ]
    if kept.database.is_postgres:
        refusals.append({"LIGHTBOX_MIGRATION_DATABASE_URL": ""})
        refusals.append({"LIGHTBOX_MIGRATION_DATABASE_URL": kept.database.app})
    for environment in refusals:
        code, _, complaint = operator.run(*everything, **environment)
        assert code == 1, environment
        assert complaint
    with kept.owner() as owner:
        assert len(owner.rows()) == RECORDS
    assert kept.verify().wrong is None
