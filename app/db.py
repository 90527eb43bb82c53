"""The database: engine, sessions, migration, and the check that the trail can't be changed.

Runs on SQLite (one small site, the demo) and on PostgreSQL (any number of app processes). On
PostgreSQL the tables belong to one role and the application works as another, which may insert
and read audit records and nothing else; on both, triggers refuse a change of a record.
"""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from typing import Any

import psycopg
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from psycopg_pool import AsyncConnectionPool
from sqlalchemy import event
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection, make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlmodel import SQLModel
from sqlmodel.ext.asyncio.session import AsyncSession

from app.errors import DatabaseUnavailable

AUDIT_TABLE = "audit_record"
# WAL: readers don't wait for the writer. FULL: a committed audit record survives a power cut.
SQLITE_PRAGMAS = (
    "journal_mode=WAL",
    "synchronous=FULL",
    "foreign_keys=ON",
    "busy_timeout=15000",
)


def utcnow() -> datetime:
    """Now, in UTC; the one clock of the application."""
    return datetime.now(UTC)


def insert_if_absent(
    session: AsyncSession, table: type[SQLModel], *rows: Mapping[str, Any], **values: Any
) -> sa.Insert:
    """An INSERT, of one row or several, that does nothing where a row is there already, on either
    database."""
    given = list(rows) if rows else [values]
    if session.get_bind().dialect.name == "postgresql":
        return postgresql.insert(table).values(given).on_conflict_do_nothing()
    return sqlite.insert(table).values(given).on_conflict_do_nothing()


async def add_absent(
    session: AsyncSession, table: type[SQLModel], rows: Sequence[Mapping[str, Any]]
) -> None:
    """Insert rows that name the same columns; does nothing where one is there already."""
    connection = await session.connection()
    await connection.execute(_absent(table, connection.dialect.name), rows)


@cache
def _absent(table: type[SQLModel], dialect: str) -> sa.Insert:
    """Without rows: it is compiled once for all of them."""
    columns: Any = table.__table__  # type: ignore[attr-defined]
    if dialect == "postgresql":
        return postgresql.insert(columns).on_conflict_do_nothing()
    return sqlite.insert(columns).on_conflict_do_nothing()


class Database:
    """One engine and the sessions made from it. Made by `create_app`'s lifespan or a test.

    `beside` is another on the same URL, with which it shares the turn to write.
    """

    def __init__(self, url: str, beside: "Database | None" = None) -> None:
        self._turn: asyncio.Lock = asyncio.Lock() if beside is None else beside._turn
        self.engine: AsyncEngine = create_async_engine(
            url, hide_parameters=True, pool_pre_ping=url.startswith("postgresql")
        )
        if self.engine.dialect.name == "sqlite":
            event.listen(self.engine.sync_engine, "connect", _configure_sqlite)

    @asynccontextmanager
    async def session(self) -> AsyncIterator[AsyncSession]:
        """A session that is rolled back unless its user commits."""
        async with AsyncSession(self.engine, expire_on_commit=False) as session:
            yield session

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[None]:
        """The turn to write, for what is written often. SQLite has one writer at a time; the others
        would ask again and again, ever more rarely. Hold no turn while you wait for another."""
        if self.engine.dialect.name != "sqlite":
            yield
            return
        async with self._turn:
            yield

    @asynccontextmanager
    async def writing_session(self) -> AsyncIterator[AsyncSession]:
        """A session, and then the turn to write. In this order: who has the turn must not wait for
        a connection, which those may hold who wait for the turn."""
        async with self.session() as session:
            _ = await session.connection()
            async with self.writing():
                yield session

    async def ping(self) -> None:
        """Raises DatabaseUnavailable where the database doesn't answer."""
        try:
            async with self.engine.connect() as connection:
                await connection.execute(sa.text("SELECT 1"))
        except (sa.exc.SQLAlchemyError, OSError) as error:
            raise DatabaseUnavailable("The database does not answer. Try again soon.") from error

    async def verify(self) -> None:
        """Refuse to run on tables of another version, or as a role that could forge the trail.

        Raises RuntimeError with the sentence to show the operator.
        """
        async with self.engine.connect() as connection:
            await connection.run_sync(_verify_revision)
            if self.engine.dialect.name == "postgresql":
                may = await connection.scalar(
                    sa.text(
                        "SELECT has_table_privilege(current_user, :t, 'UPDATE')"
                        " OR has_table_privilege(current_user, :t, 'DELETE')"
                        " OR has_table_privilege(current_user, :t, 'TRUNCATE')"
                        " OR pg_has_role(current_user, (SELECT relowner FROM pg_class"
                        "    WHERE oid = CAST(:t AS regclass)), 'MEMBER')"
                    ),
                    {"t": AUDIT_TABLE},
                )
                if may:
                    raise RuntimeError(
                        "The database role of the application could change the audit trail. "
                        "Give LIGHTBOX_DATABASE_URL a role of its own (not the owner of the "
                        "tables, no superuser), LIGHTBOX_MIGRATION_DATABASE_URL the owner, and "
                        "run `python -m app migrate`."
                    )

    async def close(self) -> None:
        await self.engine.dispose()


class Prepared:
    """A SELECT compiled once: what `Reader.first` needs of it."""

    def __init__(self, statement: sa.Select[Any], dialect: sa.Dialect) -> None:
        compiled = statement.compile(dialect=dialect)
        self.text = str(compiled)
        self.names: Sequence[str] | None = getattr(compiled, "positiontup", None)
        if "POSTCOMPILE" in self.text:
            raise ValueError("an IN of many values can't be prepared; use OR")
        self.values = dict(compiled.params)
        self.binds = {
            name: process
            for bind, name in compiled.bind_names.items()
            if (process := bind.type.dialect_impl(dialect).bind_processor(dialect))
        }
        self.results = {
            index: process
            for index, column in enumerate(statement.selected_columns)
            if (process := column.type.dialect_impl(dialect).result_processor(dialect, None))
        }

    def parameters(self, values: Mapping[str, Any]) -> Any:
        """The values as the driver takes them."""
        given = {**self.values, **values}
        for name, process in self.binds.items():
            given[name] = process(given[name])
        return given if self.names is None else [given[name] for name in self.names]

    def read(self, row: Sequence[Any]) -> tuple[Any, ...]:
        """A driver's row as values of the statement's types."""
        values = list(row)
        for index, process in self.results.items():
            values[index] = process(values[index])
        return tuple(values)


class Reader:
    """Committed rows by a compiled statement: the read on the way of every image.

    It goes past the ORM and its pool, which would take longer than the rest of such a request. On
    SQLite it reads on the event loop: tens of microseconds, and never behind a writer (WAL).
    """

    def __init__(self, url: str) -> None:
        engine = create_async_engine(url)
        self._dialect = engine.dialect
        self._sqlite: sqlite3.Connection | None = None
        self._pool: AsyncConnectionPool | None = None
        parsed = make_url(url)
        if self._dialect.name == "postgresql":
            plain = parsed.set(drivername="postgresql").render_as_string(hide_password=False)
            self._pool = AsyncConnectionPool(
                plain,
                min_size=1,
                max_size=8,
                timeout=15.0,
                open=False,
                kwargs={"autocommit": True, "prepare_threshold": 1},
            )
        else:
            self._path = parsed.database or ""

    @property
    def dialect_name(self) -> str:
        """`sqlite` or `postgresql`."""
        return self._dialect.name

    def prepare(self, statement: sa.Select[Any]) -> Prepared:
        return Prepared(statement, self._dialect)

    async def open(self) -> None:
        if self._pool is not None:
            await self._pool.open()
        else:
            self._sqlite = sqlite3.connect(
                self._path, isolation_level=None, check_same_thread=False
            )
            self._sqlite.execute("PRAGMA query_only=ON")
            self._sqlite.execute("PRAGMA busy_timeout=1000")

    async def close(self) -> None:
        if self._pool is not None:
            await self._pool.close()
        if self._sqlite is not None:
            self._sqlite.close()

    async def first(self, prepared: Prepared, values: Mapping[str, Any]) -> tuple[Any, ...] | None:
        """The first row as it is committed now; None if there is none. Raises
        DatabaseUnavailable."""
        rows = await self.all(prepared, values)
        return rows[0] if rows else None

    async def all(self, prepared: Prepared, values: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        """The rows as they are committed now. Raises DatabaseUnavailable."""
        parameters = prepared.parameters(values)
        rows: Sequence[Sequence[Any]]
        try:
            if self._sqlite is not None:
                rows = self._sqlite.execute(prepared.text, parameters).fetchall()
            else:
                rows = await self._all_of_postgres(prepared.text, parameters)
        except (sqlite3.Error, psycopg.Error) as error:
            raise DatabaseUnavailable("The database does not answer. Try again soon.") from error
        return [prepared.read(row) for row in rows]

    async def _all_of_postgres(self, text: str, parameters: Any) -> Sequence[Any]:
        assert self._pool is not None
        for again in (True, False):
            try:
                async with self._pool.connection() as connection:
                    cursor = await connection.execute(text, parameters)
                    return await cursor.fetchall()
            except psycopg.OperationalError:
                # A connection that the server has closed meanwhile is met once.
                if not again:
                    raise
        return []


def migrate(owner_url: str, app_role: str | None = None) -> None:
    """Bring the tables to this version; on PostgreSQL then grant `app_role` what it needs.

    Blocking: for the command line and for tests, never for the event loop.
    """
    url = make_url(owner_url)
    if url.drivername == "sqlite+aiosqlite":
        url = url.set(drivername="sqlite")
    engine = sa.create_engine(url, hide_parameters=True)
    try:
        with engine.begin() as connection:
            config = _alembic_config()
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
            if app_role is not None and engine.dialect.name == "postgresql":
                _grant(connection, app_role)
    finally:
        engine.dispose()


def _grant(connection: Connection, role: str) -> None:
    name = connection.dialect.identifier_preparer.quote_identifier(role)
    for statement in (
        f"GRANT USAGE ON SCHEMA public TO {name}",
        f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {name}",
        f"GRANT USAGE, SELECT ON ALL SEQUENCES IN SCHEMA public TO {name}",
        f"REVOKE ALL ON {AUDIT_TABLE}, alembic_version FROM {name}",
        f"GRANT SELECT, INSERT ON {AUDIT_TABLE} TO {name}",
        f"GRANT SELECT ON alembic_version TO {name}",
    ):
        connection.execute(sa.text(statement))


def _alembic_config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(files("app").joinpath("migrations")))
    return config


def _verify_revision(connection: Connection) -> None:
    current = MigrationContext.configure(connection).get_current_revision()
    head = ScriptDirectory.from_config(_alembic_config()).get_current_head()
    if current != head:
        raise RuntimeError(
            f"The database is at revision {current or 'none'}, this version needs {head}: "
            "run `python -m app migrate`."
        )


def _configure_sqlite(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    for pragma in SQLITE_PRAGMAS:
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()
