"""Retention: the oldest records go, and a signed statement says so.

For the role that owns the table, which the application is not: it takes the trigger away for one
transaction. The statement is in the record of the purge, from which `verify` then starts, and
beside the checkpoints: there it is kept before the commit, and proves nothing by itself.
"""

import getpass
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from secrets import token_hex

import sqlalchemy as sa
from sqlalchemy.engine import make_url
from sqlmodel import col

from app.audit.chain import DIALECTS, Head, follow
from app.audit.entries import Action, Entry, Origin, Outcome
from app.audit.signing import Signer
from app.db import AUDIT_TABLE
from app.models import AuditRecord, ExportPosition


class NotSent(ValueError):
    """A sink outside has not got all that would go."""


@dataclass(frozen=True)
class Purged:
    """What was, or would be, removed: `removed` records, up to `through`."""

    through: int
    removed: int


def purge(
    owner_url: str,
    before: datetime,
    signer: Signer,
    keep: Callable[[str], None],
    *,
    dry_run: bool = False,
) -> Purged | None:
    """Remove the records before the first one that is not older than `before`; None: there are
    none. `keep` gets the signed line; if it raises, nothing is removed.

    Blocking. Nobody else writes meanwhile. Raises NotSent, and what SQLAlchemy raises.
    """
    url = make_url(owner_url)
    if url.drivername == "sqlite+aiosqlite":
        url = url.set(drivername="sqlite")
    engine = sa.create_engine(url, hide_parameters=True)
    dialect = DIALECTS[engine.dialect.name]
    try:
        with engine.begin() as connection:
            connection.exec_driver_sql(dialect.lock)
            through, removed = _old(connection, before)
            if through is not None:
                _refuse_unsent(connection, through.id)
            if through is None or dry_run:
                return None if through is None else Purged(through.id, removed)
            head = Head(*connection.exec_driver_sql(dialect.head).one())
            line = signer.purge(through, removed, head)
            with _without_trigger(connection):
                connection.execute(sa.delete(AuditRecord).where(col(AuditRecord.id) <= through.id))
            linked = follow(head, [_entry(line, before)])
            connection.exec_driver_sql(dialect.insert, dialect.values(linked))
            keep(line)
        return Purged(through.id, removed)
    finally:
        engine.dispose()


def _old(connection: sa.Connection, before: datetime) -> tuple[Head | None, int]:
    """The last record to go, and how many go with it."""
    identity = col(AuditRecord.id)
    kept = connection.scalar(sa.select(sa.func.min(identity)).where(col(AuditRecord.at) >= before))
    old = sa.true() if kept is None else identity < kept
    removed = connection.scalar(sa.select(sa.func.count()).select_from(AuditRecord).where(old))
    last = connection.execute(
        sa.select(identity, col(AuditRecord.sha256)).where(old).order_by(identity.desc()).limit(1)
    ).first()
    return (None, 0) if last is None else (Head(int(last[0] or 0), last[1]), int(removed or 0))


def _refuse_unsent(connection: sa.Connection, through: int) -> None:
    position = col(ExportPosition.record_id)
    sink, sent = connection.execute(
        sa.select(col(ExportPosition.sink), position).order_by(position).limit(1)
    ).first() or ("", through)
    if sent < through:
        raise NotSent(
            f"records {sent + 1} to {through} have not reached {sink} yet. Let them be sent; if "
            "the sink is no longer used, delete its row of export_position."
        )


def _entry(line: str, before: datetime) -> Entry:
    return Entry(
        action=Action.AUDIT_PURGE,
        outcome=Outcome.DONE,
        origin=Origin(request_id=token_hex(16)),
        actor=f"operator {getpass.getuser()}",
        detail={"before": before.isoformat(), "statement": line},
    )


@contextmanager
def _without_trigger(connection: sa.Connection) -> Iterator[None]:
    if connection.dialect.name == "postgresql":
        trigger = f"TRIGGER {AUDIT_TABLE}_append_only"
        connection.exec_driver_sql(f"ALTER TABLE {AUDIT_TABLE} DISABLE {trigger}")
        yield
        connection.exec_driver_sql(f"ALTER TABLE {AUDIT_TABLE} ENABLE {trigger}")
        return
    name = f"{AUDIT_TABLE}_no_delete"
    made = connection.exec_driver_sql("SELECT sql FROM sqlite_master WHERE name = ?", (name,))
    statement = str(made.scalar_one())
    connection.exec_driver_sql(f"DROP TRIGGER {name}")
    yield
    connection.exec_driver_sql(statement)
