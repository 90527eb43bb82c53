"""The test's own look into a Lightbox's SQLite file, behind the application's back.

What the application says of itself is not proof: these read, and change, what is really there.
"""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy.engine import make_url

from tests.lightbox import Lightbox

REFUSE_RECORDS = (
    "CREATE TRIGGER no_more_records BEFORE INSERT ON audit_record "
    "BEGIN SELECT RAISE(ABORT, 'the disk is full'); END"
)
"""From then on no audit record can be written."""


def moment(**delta: float) -> str:
    """Now plus `delta`, as SQLAlchemy keeps it in SQLite."""
    return (datetime.now(UTC) + timedelta(**delta)).strftime("%Y-%m-%d %H:%M:%S.%f")


@contextmanager
def opened(lightbox: Lightbox) -> Iterator[sqlite3.Connection]:
    """A connection of the test's own; committed at the end of the block."""
    path = make_url(lightbox.settings.database_url).database
    assert path is not None
    with closing(sqlite3.connect(path, timeout=5)) as connection, connection:
        connection.row_factory = sqlite3.Row
        yield connection


def rows(lightbox: Lightbox, query: str, *values: object) -> list[dict[str, Any]]:
    """The rows of a query."""
    with opened(lightbox) as connection:
        return [dict(row) for row in connection.execute(query, values)]


def change(lightbox: Lightbox, statement: str, *values: object) -> int:
    """How many rows a statement changed."""
    with opened(lightbox) as connection:
        return connection.execute(statement, values).rowcount


def contents(lightbox: Lightbox) -> list[str]:
    """All that is kept, except the audit trail and what is under way, to be compared."""
    apart = ('INTO "audit_record"', 'INTO "operation"')
    with opened(lightbox) as connection:
        return [line for line in connection.iterdump() if not any(each in line for each in apart)]


def records(lightbox: Lightbox, request_id: str) -> list[dict[str, Any]]:
    """The audit records of one request, in their order, `detail` read."""
    found = rows(
        lightbox, "SELECT * FROM audit_record WHERE request_id = ? ORDER BY id", request_id
    )
    return [{**each, "detail": json.loads(each["detail"])} for each in found]


def outcomes(lightbox: Lightbox, request_id: str) -> list[tuple[str, str]]:
    """`(action, outcome)` of each record of one request, in their order."""
    return [(each["action"], each["outcome"]) for each in records(lightbox, request_id)]
