"""The journal: what was granted, and has no outcome on record yet.

A row is written with the record of the grant and goes with that of the outcome, each in one
transaction with it. So a row whose process has died stands for something that was cut off, and
nothing that was cut off is without one.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from app.audit.chain import text_of_time
from app.audit.entries import Action, Entry, Operation, Origin, Outcome
from app.db import utcnow

TABLE = "operation"

Change = tuple[str, list[tuple[Any, ...]]]
"""A statement for the driver, and the parameters of each time that it is run."""

_NOTED = ("kind", "orthanc_id", "there_before", "detail")
_MARKS = {"postgresql": "%s", "sqlite": "?"}
_OPEN = "operations"
_CLOSED = "operations closed"
_ENDING = "operations end"


def changes(dialect: str, entries: Iterable[Entry]) -> list[Change]:
    """What these records change in the journal."""
    listed = list(entries)
    opened = [
        (each.operation.id, each.operation.process, _now(dialect), text_of(each))
        for each in listed
        if each.operation is not None and each.outcome is Outcome.GRANTED
    ]
    return [(_insert(_MARKS[dialect]), opened)] * bool(opened) + closing(dialect, closed_by(listed))


def closed_by(entries: Iterable[Entry]) -> set[Operation]:
    """The operations whose outcome these records are."""
    return {
        each.operation
        for each in entries
        if each.operation is not None and each.outcome in (Outcome.DONE, Outcome.FAILED)
    }


def closing(dialect: str, operations: Iterable[Operation]) -> list[Change]:
    """What takes these operations out of the journal."""
    values = [(each.id, each.process, each.state.value) for each in operations]
    return [(_delete(_MARKS[dialect]), values)] if values else []


@dataclass(frozen=True)
class Note:
    """What an operation is about to do in Orthanc; see `OpenOperation`."""

    operation: Operation
    kind: str
    orthanc_id: str
    there_before: bool = False
    detail: str = ""


class GivenUpError(Exception):
    """An operation was given up meanwhile: its row is another process's, or gone."""


def noting(dialect: str, note: Note) -> tuple[str, tuple[Any, ...]]:
    """What adds a note to its operation's row: a statement, and its parameters."""
    mark, its = _MARKS[dialect], note.operation
    set_to = ", ".join(f"{name} = {mark}" for name in _NOTED)
    return (
        f"UPDATE {TABLE} SET {set_to} WHERE {_row(mark)}",  # noqa: S608
        (
            *(getattr(note, name) for name in _NOTED),
            *(its.id, its.process, its.state.value),
        ),
    )


def _row(mark: str) -> str:
    # Not one that another process has taken over.
    return f"id = {mark} AND process = {mark} AND state = {mark}"


def _insert(mark: str) -> str:
    marks = ", ".join([mark] * 4)
    return (
        f"INSERT INTO {TABLE} (id, process, started_at, asked, state, kind, orthanc_id,"  # noqa: S608
        f" there_before, detail) VALUES ({marks}, 'open', '', '', FALSE, '')"
    )


def _delete(mark: str) -> str:
    return f"DELETE FROM {TABLE} WHERE {_row(mark)}"  # noqa: S608


def _now(dialect: str) -> str:
    now = text_of_time(utcnow())
    return now if dialect == "postgresql" else now.replace("T", " ").removesuffix("Z")


def text_of(entry: Entry) -> str:
    """Who asked for what, to be read again by `entry_of_text`."""
    said = {
        name: value
        for name, value in asdict(entry).items()
        if value and name not in ("operation", "detail")
    }
    return json.dumps(said, default=str, separators=(",", ":"))


def entry_of_text(text: str) -> Entry:
    """The grant that opened an operation, without its detail."""
    said: Mapping[str, Any] = json.loads(text)
    more: dict[str, Any] = {
        name: UUID(said[name]) for name in ("patient_id", "order_id") if name in said
    }
    return Entry(
        **{
            **said,
            **more,
            "action": Action(said["action"]),
            "outcome": Outcome(said["outcome"]),
            "origin": Origin(**said["origin"]),
        }
    )


# ------------------------------------------------------------- what a session has under way


def watch(session: AsyncSession, operation: Operation) -> None:
    """What is done in this session's transactions is the outcome of the operation."""
    session.sync_session.info.setdefault(_OPEN, set()).add(operation)


def under_way(session: AsyncSession) -> set[Operation]:
    """Those that are still open."""
    return set(session.sync_session.info.get(_OPEN, ()))


def settled(session: AsyncSession, operations: Iterable[Operation]) -> None:
    """They are no longer this session's."""
    session.sync_session.info.get(_OPEN, set()).difference_update(operations)


def ending(session: AsyncSession) -> None:
    """The next commit is the last: what was granted and changed nothing ends with it."""
    session.sync_session.info[_ENDING] = True


def to_close(info: dict[Any, Any], entries: Iterable[Entry]) -> set[Operation]:
    """What a commit with these records closes: what is done is the outcome of all that the
    session has under way."""
    listed = list(entries)
    closed = closed_by(listed)
    done = any(each.outcome is Outcome.DONE for each in listed)
    if info.pop(_ENDING, False) or done:
        closed |= info.get(_OPEN, set())
    info[_CLOSED] = closed
    return closed


def committed(info: dict[Any, Any]) -> None:
    """What a commit closed is no longer under way."""
    info.get(_OPEN, set()).difference_update(info.pop(_CLOSED, set()))
