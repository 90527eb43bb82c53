"""Is the trail the one that was written? Every record against the one before, every checkpoint.

Reads one snapshot of the table, from any record on, and stops at the first thing that is wrong.
"""

import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
from psycopg import IsolationLevel
from sqlalchemy.engine import make_url

from app.audit.chain import COLUMNS, DIALECTS, GENESIS, Dialect, Head, Row, digest
from app.audit.entries import Action
from app.audit.signing import BadStatement, Keys, Statement, checked_line
from app.db import AUDIT_TABLE

PORTION = 5000
_ACTION, _DETAIL = COLUMNS.index("action"), COLUMNS.index("detail")
_PURGE = Action.AUDIT_PURGE.value

Progress = Callable[[int, int], None]
"""Called with how many records were checked, and how many there are."""


@dataclass
class Report:
    """What was found. `wrong` is the first record that is not as it was written: with a
    checkpoint that does not agree, the first after the last one that did. None: all is well."""

    first: int = 0
    last: int = 0
    checked: int = 0
    agreed: list[Statement] = field(default_factory=list)
    wrong: int | None = None
    sentence: str = ""

    @property
    def last_good(self) -> Statement | None:
        """The last checkpoint that agreed before something was wrong."""
        return self.agreed[-1] if self.agreed else None


class _Wrong(Exception):
    def __init__(self, record: int, sentence: str) -> None:
        super().__init__(sentence)
        self.record = record


def verify(
    url: str,
    *,
    statements: Iterable[Statement] = (),
    keys: Keys | None = None,
    start: int | None = None,
    progress: Progress = lambda done, total: None,
) -> Report:
    """Check the chain from record `start` on, or all of it, against signed `statements`.

    `url` is SQLAlchemy's, of a role that may read the table; `statements` must have been read
    before this is called, or the trail may have grown beyond them. `keys` check what the trail
    itself says of purges. Blocking. Raises what the driver raises where the database can't be
    read, and LookupError where there is no record `start`.
    """
    report = Report()
    with _snapshot(url) as table:
        checker = _Checker(table, report, list(statements), keys or {}, start)
        try:
            checker.check(progress)
        except _Wrong as wrong:
            report.wrong, report.sentence = wrong.record, str(wrong)
    return report


class _Checker:
    def __init__(
        self,
        table: "_Table",
        report: Report,
        statements: list[Statement],
        keys: Keys,
        start: int | None,
    ) -> None:
        self._table = table
        self._report = report
        self._keys = keys
        self._start = start
        self._statements = statements
        self._marks: dict[int, list[Statement]] = {}
        for each in statements:
            self._marks.setdefault(each.count, []).append(each)

    def check(self, progress: Progress) -> None:
        first, last = self._table.bounds()
        if self._start is not None and not first <= self._start <= last:
            raise LookupError(f"there is no record {self._start}; they are {first} to {last}")
        begin = first if self._start is None else self._start
        self._report.first, self._report.last = begin, last
        head = self._before(begin, first) if last else GENESIS
        self._compare(head)
        for stored in self._table.rows(begin) if last else ():
            if self._report.checked % PORTION == 0:
                progress(self._report.checked, last - begin + 1)
            head = self._follow(head, stored)
            self._report.checked += 1
            if head.id in self._marks:
                self._compare(head)
        progress(self._report.checked, self._report.checked)
        lost = [each for each in self._statements if each.count > head.id]
        if lost:
            most = max(lost, key=lambda each: each.count)
            raise _Wrong(
                head.id + 1,
                f"Records {head.id + 1} to {most.count} are missing at the end: {most.at} it was "
                "signed that they were there.",
            )

    def _before(self, begin: int, first: int) -> Head:
        """What the first record to be checked has to follow."""
        if begin > first:
            sha256 = self._table.sha256(begin - 1)
            if sha256 is None:
                raise _Wrong(begin - 1, f"Record {begin - 1} is missing.")
            return Head(begin - 1, sha256)
        if first == 1:
            return GENESIS
        # A statement that is kept elsewhere alone is of a purge that did not come about.
        purged = GENESIS
        for each in self._purges():
            if each.kind == "purge" and purged.id < each.count < first:
                purged = Head(each.count, each.head)
        if purged.id == first - 1:
            return purged
        unsigned = "" if self._keys else " (Without a public key no purge can be checked.)"
        raise _Wrong(
            purged.id + 1,
            f"Records {purged.id + 1} to {first - 1} are missing, and no signed purge "
            f"explains it.{unsigned}",
        )

    def _purges(self) -> Iterator[Statement]:
        for detail in self._table.details_of(_PURGE):
            try:
                yield self._purge(detail)
            except BadStatement:
                continue  # said when its record is reached

    def _purge(self, detail: Any) -> Statement:
        try:
            line = json.loads(detail)["statement"]
        except (ValueError, TypeError, KeyError) as error:
            raise BadStatement("it holds no signed statement") from error
        if not isinstance(line, str):
            raise BadStatement("it holds no signed statement")
        return checked_line(line, self._keys)

    def _follow(self, head: Head, stored: Row) -> Head:
        """The record after `head`, if it is what was written."""
        position, sha256, expected = stored[0], stored[-1], head.id + 1
        if position != expected:
            if isinstance(position, int) and position > expected:
                several = f"Records {expected} to {position - 1} are"
                one = f"Record {expected} is"
                raise _Wrong(expected, f"{one if position - 1 == expected else several} missing.")
            raise _Wrong(head.id, f"There is more than one record {position}: one was inserted.")
        row = self._table.dialect.read(stored[:-1])
        try:
            computed = digest(head.sha256, row)
        except TypeError:
            computed = ""
        if not self._table.dialect.is_as_stored(tuple(stored[:-1])):
            computed = ""
        if computed != sha256:
            raise _Wrong(
                expected,
                f"Record {expected} is not the one that was written after record {head.id}: "
                f"it was changed, moved or inserted, or record {head.id} was.",
            )
        if row[_ACTION] == _PURGE and self._keys:
            try:
                statement = self._purge(row[_DETAIL])
                if statement.kind != "purge" or statement.after != head.sha256:
                    raise BadStatement("its statement is not of this place in the chain")
            except BadStatement as error:
                raise _Wrong(expected, f"Record {expected} speaks of a purge: {error}.") from error
        return Head(position, sha256)

    def _compare(self, head: Head) -> None:
        for each in self._marks.get(head.id, ()):
            if each.head != head.sha256:
                good = self._report.last_good
                since = 1 if good is None else good.count + 1
                known = (
                    "No earlier checkpoint agrees"
                    if good is None
                    else (f"The last checkpoint that agrees is at record {good.count} ({good.at})")
                )
                raise _Wrong(
                    since,
                    f"Record {head.id} is not the one that was signed {each.at}: records were "
                    f"changed and the chain computed anew, an older trail was restored, or two "
                    f"were written. {known}, so the first wrong record is one of {since} to "
                    f"{head.id}.",
                )
            self._report.agreed.append(each)


# ------------------------------------------------------------------------------- two databases


class _Table:
    """One snapshot of the trail."""

    def __init__(self, connection: Any, dialect: Dialect) -> None:
        self._connection = connection
        self.dialect = dialect

    def bounds(self) -> tuple[int, int]:
        """The first and last id; 0 and 0 where there is none."""
        query = f"SELECT min(id), max(id) FROM {AUDIT_TABLE}"  # noqa: S608
        first, last = self._connection.execute(query).fetchone()
        return first or 0, last or 0

    def sha256(self, position: int) -> str | None:
        query = f"SELECT sha256 FROM {AUDIT_TABLE} WHERE id = {position:d}"  # noqa: S608
        found = self._connection.execute(query).fetchone()
        return None if found is None else str(found[0])

    def details_of(self, action: str) -> list[Any]:
        query = f"SELECT detail FROM {AUDIT_TABLE} WHERE action = '{action}'"  # noqa: S608
        return [row[0] for row in self._connection.execute(query).fetchall()]

    def rows(self, start: int) -> Iterator[Row]:
        """Canonical values and hash of each record, ascending."""
        with closing(self._cursor()) as cursor:
            cursor.execute(self.dialect.select, (start,))
            while portion := cursor.fetchmany(PORTION):
                yield from portion

    def _cursor(self) -> Any:
        if isinstance(self._connection, psycopg.Connection):
            return self._connection.cursor(name="trail")
        return self._connection.cursor()


@contextmanager
def _snapshot(url: str) -> Iterator[_Table]:
    parsed = make_url(url)
    dialect = DIALECTS[parsed.get_backend_name()]
    if parsed.get_backend_name() == "postgresql":
        plain = parsed.set(drivername="postgresql").render_as_string(hide_password=False)
        with psycopg.connect(plain) as connection:
            connection.isolation_level = IsolationLevel.REPEATABLE_READ
            connection.read_only = True
            yield _Table(connection, dialect)
        return
    # Never makes the file. Not read-only: WAL wants its index written.
    address = Path(parsed.database or "").resolve().as_uri() + "?mode=rw"
    with closing(sqlite3.connect(address, uri=True, isolation_level=None)) as file:
        file.execute("PRAGMA query_only=ON")
        file.execute("BEGIN")
        yield _Table(file, dialect)
