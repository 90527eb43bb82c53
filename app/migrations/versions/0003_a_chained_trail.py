"""the trail's chain, and under what right a thing was done

Records that are there already are numbered anew, 1, 2, 3 and so on, and chained in that order.
From then on the chain gives the ids, and nothing else does.

Revision: 0003
Revises: 0002
"""

from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy as sa
from alembic import op

from app.audit.chain import DIALECTS, GENESIS, digest

revision = "0003"
down_revision = "0002"

PORTION = 1000


def upgrade() -> None:
    op.add_column("audit_record", _text("purpose_of_use", 16))
    op.add_column("audit_record", _text("sha256", 64))
    connection = op.get_bind()
    with _unlocked(connection):
        _chain(connection)
    if connection.dialect.name == "postgresql":
        op.execute("ALTER TABLE audit_record ALTER COLUMN id DROP DEFAULT")
        op.execute("DROP SEQUENCE audit_record_id_seq")


def _chain(connection: sa.Connection) -> None:
    dialect = DIALECTS[connection.dialect.name]
    former, (position, previous) = 0, GENESIS
    while True:
        found = connection.exec_driver_sql(dialect.select, (former + 1,)).fetchmany(PORTION)
        if not found:
            return
        for stored in found:
            former, position = stored[0], position + 1
            previous = digest(previous, (position, *dialect.read(tuple(stored[:-1]))[1:]))
            connection.exec_driver_sql(dialect.update, (position, previous, former))


@contextmanager
def _unlocked(connection: sa.Connection) -> Iterator[None]:
    """Without the trigger that refuses changes."""
    if connection.dialect.name == "postgresql":
        op.execute("ALTER TABLE audit_record DISABLE TRIGGER audit_record_append_only")
        yield
        op.execute("ALTER TABLE audit_record ENABLE TRIGGER audit_record_append_only")
        return
    trigger = connection.exec_driver_sql(
        "SELECT sql FROM sqlite_master WHERE name = 'audit_record_no_update'"
    ).scalar_one()
    op.execute("DROP TRIGGER audit_record_no_update")
    yield
    op.execute(trigger)


def _text(name: str, length: int) -> sa.Column[str]:
    return sa.Column(name, sa.String(length), nullable=False, server_default=sa.text("''"))
