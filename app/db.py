"""The database: engine, sessions, migration, and the check that the trail can't be changed.

Runs on SQLite (one small site, the demo) and on PostgreSQL (any number of app processes). On
PostgreSQL the tables belong to one role and the application works as another, which may insert
and read audit records and nothing else; on both, triggers refuse a change of a record.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import event
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection, make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlmodel import SQLModel
from sqlmodel.ext.asyncio.session import AsyncSession

from app.errors import DatabaseUnavailable

AUDIT_TABLE = "audit_record"


def utcnow() -> datetime:
    """Now, in UTC; the one clock of the application."""
    return datetime.now(UTC)


def insert_if_absent(session: AsyncSession, table: type[SQLModel], **values: Any) -> sa.Insert:
    """An INSERT that does nothing where the row is there already, on either database."""
    if session.get_bind().dialect.name == "postgresql":
        return postgresql.insert(table).values(**values).on_conflict_do_nothing()
    return sqlite.insert(table).values(**values).on_conflict_do_nothing()


class Database:
    """One engine and the sessions made from it. Made by `create_app`'s lifespan or a test."""

    def __init__(self, url: str) -> None:
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
    # WAL: readers don't wait for the writer. FULL: a committed audit record survives a power cut.
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        "busy_timeout=15000",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()
