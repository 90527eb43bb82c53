"""The chain: how a record is written down to be hashed, and how it hangs on the one before.

There is one chain for all processes. A record's id is its position: 1, 2, 3 and so on without a
gap, given out under the chain's lock. Its `sha256` is the SHA-256, in hexadecimal, of the `sha256`
of the record before, a line feed, and its own canonical text: the JSON array of `COLUMNS`, without
spaces and in ASCII, times as `YYYY-MM-DDThh:mm:ss.ffffffZ`, UUIDs as RFC 9562 writes them. So no
record can be changed, removed, inserted or moved without all that follow it.

Writers and `verify` use the same functions. Whoever changes the text breaks every chain there is.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple
from uuid import UUID

from app.audit.entries import Entry
from app.db import AUDIT_TABLE, utcnow

COLUMNS = (
    "id",
    "at",
    "request_id",
    "action",
    "outcome",
    "reason",
    "actor",
    "actor_roles",
    "client_address",
    "patient_id",
    "order_id",
    "study_instance_uid",
    "ctx",
    "purpose_of_use",
    "detail",
)
"""What is hashed, in this order: every column but `sha256`."""

LOCK_SECONDS = 10
"""How long a writer waits for the chain, and how long one that has stopped may keep it."""
_LOCK_KEY = int.from_bytes(b"lightbox")

Row = tuple[Any, ...]
"""The values of `COLUMNS` as the canonical text has them."""


class Head(NamedTuple):
    """The last record: its position, which is the number of records so far, and its hash."""

    id: int
    sha256: str


GENESIS = Head(0, "0" * 64)
"""Before the first record."""

_as_json = json.JSONEncoder(separators=(",", ":"), ensure_ascii=True).encode


def digest(previous: str, row: Sequence[Any]) -> str:
    """The `sha256` of a record after one whose `sha256` is `previous`.

    Raises TypeError where a value is none that JSON has.
    """
    return hashlib.sha256(f"{previous}\n{_as_json(list(row))}".encode()).hexdigest()


def text_of_time(moment: datetime) -> str:
    """A time as the canonical text has it."""
    naive = moment.astimezone(UTC).replace(tzinfo=None)
    return naive.isoformat(timespec="microseconds") + "Z"


def follow(head: Head, entries: Iterable[Entry]) -> list[tuple[Row, str]]:
    """The records that hang these entries on the chain, each with its `sha256`."""
    linked: list[tuple[Row, str]] = []
    position, previous = head
    for entry in entries:
        position += 1
        row = _row(position, utcnow(), entry)
        previous = digest(previous, row)
        linked.append((row, previous))
    return linked


def _row(position: int, at: datetime, entry: Entry) -> Row:
    return (
        position,
        text_of_time(at),
        entry.origin.request_id,
        entry.action.value,
        entry.outcome.value,
        entry.reason,
        entry.actor,
        entry.actor_roles,
        entry.origin.client_address,
        _text_of_uuid(entry.patient_id),
        _text_of_uuid(entry.order_id),
        entry.study_instance_uid,
        entry.ctx,
        entry.purpose_of_use,
        json.dumps(entry.detail, sort_keys=True, separators=(",", ":"), ensure_ascii=False),
    )


def _text_of_uuid(identifier: UUID | None) -> str | None:
    return None if identifier is None else str(identifier)


# ------------------------------------------------------------------------------- two databases


@dataclass(frozen=True)
class Dialect:
    """How one database is asked: statements for its driver, and the values as it keeps them."""

    lock: str
    """Takes the chain until the end of the transaction."""
    insert: str
    update: str
    """Of id and hash, by the former id: for the migration that first chains records."""
    select: str
    """The canonical values and `sha256`, ascending; one parameter, the id to start from."""
    stored: Callable[[Row], Row]
    read: Callable[[Row], Row]

    head: str = f"SELECT id, sha256 FROM {AUDIT_TABLE} ORDER BY id DESC LIMIT 1"  # noqa: S608

    def is_as_stored(self, stored: Row) -> bool:
        """Are these values, as the database keeps them, the only ones that read as they do? What
        reads the same and is kept otherwise is not found by who searches for it."""
        try:
            return self.stored(self.read(stored)) == stored
        except (AttributeError, TypeError):
            return False

    def values(self, linked: Iterable[tuple[Row, str]]) -> list[Row]:
        """The parameters of `insert`, for each record."""
        return [(*self.stored(row), sha256) for row, sha256 in linked]


def _insert(mark: str) -> str:
    names = ", ".join((*COLUMNS, "sha256"))
    marks = ", ".join([mark] * (len(COLUMNS) + 1))
    return f"INSERT INTO {AUDIT_TABLE} ({names}) VALUES ({marks})"  # noqa: S608


def _select(mark: str, **special: str) -> str:
    names = ", ".join(special.get(name, name) for name in COLUMNS)
    return f"SELECT {names}, sha256 FROM {AUDIT_TABLE} WHERE id >= {mark} ORDER BY id"  # noqa: S608


def _stored_by_sqlite(row: Row) -> Row:
    """As SQLAlchemy keeps times and UUIDs there: `YYYY-MM-DD hh:mm:ss.ffffff`, 32 digits."""
    values = list(row)
    values[_AT] = values[_AT].replace("T", " ").removesuffix("Z")
    for each in _UUIDS:
        values[each] = values[each] and values[each].replace("-", "")
    return tuple(values)


def _read_from_sqlite(row: Row) -> Row:
    values = list(row)
    at = values[_AT]
    if isinstance(at, str) and at[10:11] == " ":
        values[_AT] = f"{at[:10]}T{at[11:]}Z"
    for each in _UUIDS:
        digits = values[each]
        if isinstance(digits, str) and len(digits) == 32:
            values[each] = "-".join(
                (digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:])
            )
    return tuple(values)


def _as_it_is(row: Row) -> Row:
    return row


_AT = COLUMNS.index("at")
_UUIDS = (COLUMNS.index("patient_id"), COLUMNS.index("order_id"))
_MILLISECONDS = LOCK_SECONDS * 1000

DIALECTS: Mapping[str, Dialect] = {
    "postgresql": Dialect(
        # Whoever holds the chain and stops, or is cut off, loses it to the others.
        lock=f"SELECT set_config('lock_timeout', '{_MILLISECONDS}', true), "
        f"set_config('idle_in_transaction_session_timeout', '{_MILLISECONDS}', true), "
        f"pg_advisory_xact_lock({_LOCK_KEY})",
        insert=_insert("%s"),
        update=f"UPDATE {AUDIT_TABLE} SET id = %s, sha256 = %s WHERE id = %s",  # noqa: S608
        select=_select(
            "%s",
            # The year has no era in it: a time before year 1 has no text at all.
            at="CASE WHEN isfinite(at) AND at >= TIMESTAMPTZ '0001-01-01 00:00:00+00' THEN "
            "to_char(at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"') END",
            patient_id="CAST(patient_id AS text)",
            order_id="CAST(order_id AS text)",
        ),
        stored=_as_it_is,
        read=_as_it_is,
    ),
    "sqlite": Dialect(
        lock="BEGIN IMMEDIATE",
        insert=_insert("?"),
        update=f"UPDATE {AUDIT_TABLE} SET id = ?, sha256 = ? WHERE id = ?",  # noqa: S608
        select=_select("?"),
        stored=_stored_by_sqlite,
        read=_read_from_sqlite,
    ),
}
