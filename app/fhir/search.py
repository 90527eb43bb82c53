"""The parameters of a search for AuditEvents (FHIR R4, 3.1.1), as conditions on the trail.

Strict: a parameter that isn't known, or can't be read, is refused, because a filter that is
ignored shows more than was asked for. With `Prefer: handling=lenient` those that are not known are
left out, as FHIR has it; the `self` link says what was used. Values with commas mean "or",
repeated parameters "and".
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

import sqlalchemy as sa
from sqlmodel import col

from app.audit import Action, Outcome
from app.errors import Unprocessable
from app.fhir.codes import kind_of, outcome_code
from app.models import AuditRecord

MOST_ON_A_PAGE = 200
DEFAULT_COUNT = 50
_MOST_PARAMETERS = 50
_MOST_ALTERNATIVES = 100
_LARGEST_ID = 2**63 - 1
_LONGEST_ID = 64  # FHIR's `id`
_UID = re.compile(r"(?:0|[1-9][0-9]*)(?:\.(?:0|[1-9][0-9]*))*", re.ASCII)
_DATE = re.compile(
    r"(?P<prefix>eq|ge|le|gt|lt)?"
    r"(?P<year>\d{4})(?:-(?P<month>\d\d)(?:-(?P<day>\d\d)(?:T(?P<time>\d\d:\d\d)"
    r"(?::(?P<second>\d\d)(?:\.(?P<fraction>\d{1,6}))?)?(?P<zone>Z|[+ -]\d\d:\d\d))?)?)?",
    re.ASCII,
)

Condition = sa.ColumnElement[bool]


class Parameter(NamedTuple):
    """A search parameter. Without `documentation` it says how to answer, and finds nothing."""

    name: str
    type: str
    condition: Callable[[str], Condition] | None
    documentation: str = ""


@dataclass
class Search:
    """What is searched for: conditions that all hold, how many, and before which record.

    `used` are the parameters that were understood, for the `self` link.
    """

    conditions: list[Condition] = field(default_factory=list)
    count: int = DEFAULT_COUNT
    used: list[tuple[str, str]] = field(default_factory=list)


def read_search(parameters: Iterable[tuple[str, str]], *, lenient: bool = False) -> Search:
    """The search that these parameters ask for. Raises Unprocessable."""
    search = Search()
    given = list(parameters)
    if len(given) > _MOST_PARAMETERS:
        raise Unprocessable(f"A search takes at most {_MOST_PARAMETERS} parameters.")
    for name, value in given:
        parameter = _BY_NAME.get(name)
        if parameter is None:
            if lenient:
                continue
            shown = name if re.fullmatch(r"[A-Za-z_:.-]{1,64}", name) else "a parameter"
            known = ", ".join(sorted(_BY_NAME))
            raise Unprocessable(f"AuditEvent is not searched by `{shown}`; it takes {known}.")
        if not value or not value.isprintable():
            raise Unprocessable(f"`{name}` is empty or holds control characters.")
        if parameter.condition is not None:
            alternatives = _alternatives(value)
            if len(alternatives) > _MOST_ALTERNATIVES:
                raise Unprocessable(
                    f"`{name}` takes at most {_MOST_ALTERNATIVES} values with commas between them."
                )
            wanted = [parameter.condition(each) for each in alternatives]
            search.conditions.append(sa.or_(*wanted))
        elif [each for each, _ in given].count(name) > 1:
            raise Unprocessable(f"`{name}` is given more than once.")
        if name == "_count":
            search.count = _count(value)
        elif name == "_format" and value not in _FORMATS:
            raise Unprocessable("`_format` must be `json` or `application/fhir+json`.")
        search.used.append((name, value))
    return search


def _alternatives(value: str) -> list[str]:
    """The values that commas stand between, each once; a comma of a value itself is written
    `\\,`."""
    found = [re.sub(r"\\([\\,|$])", r"\1", each) for each in re.split(r"(?<!\\),", value)]
    return list(dict.fromkeys(found))


def _count(value: str) -> int:
    if not (value.isascii() and value.isdigit() and len(value) <= 9 and int(value) > 0):
        raise Unprocessable("`_count` must be a number above 0.")
    return min(int(value), MOST_ON_A_PAGE)


# ------------------------------------------------------------------------------------ conditions


def _by_id(value: str) -> Condition:
    if len(value) > _LONGEST_ID:
        raise Unprocessable(f"`_id` has at most {_LONGEST_ID} characters.")
    if not (value.isascii() and value.isdigit()) or int(value) > _LARGEST_ID:
        return sa.false()
    return col(AuditRecord.id) == int(value)


def _by_cursor(value: str) -> Condition:
    if not (value.isascii() and value.isdigit() and len(value) <= 18):
        raise Unprocessable("`_before` is not one that this API gave.")
    return col(AuditRecord.id) < int(value)


def _by_date(value: str) -> Condition:
    """FHIR 3.1.1.4.7: a value is a span as long as its last part, and so is compared."""
    prefix, low, high = read_date(value)
    at = col(AuditRecord.at)
    return {
        "eq": sa.and_(at >= low, at < high),
        "ge": at >= low,
        "le": at < high,
        "gt": at >= high,
        "lt": at < low,
    }[prefix]


def read_date(value: str) -> tuple[str, datetime, datetime]:
    """Prefix (`eq` where none is written), and the span of time: from, and before. A date
    without a time is a day in UTC. Raises Unprocessable."""
    found = _DATE.fullmatch(value)
    if found is None:
        raise Unprocessable(
            "`date` must be a FHIR date, or a time with its zone, behind one of the prefixes "
            "eq, ge, le, gt, lt, or none: `ge2026-11-21`, `lt2026-11-21T08:00:00Z`."
        )
    part = found.groupdict()
    prefix = part["prefix"] or "eq"
    try:
        year, month, day = (int(part[each] or 1) for each in ("year", "month", "day"))
        low = datetime(year, month, day, tzinfo=UTC)
        if part["time"]:
            clock = f"{part['time']}:{part['second'] or '00'}.{(part['fraction'] or '0'):0<6}"
            zone = part["zone"].replace(" ", "+")  # a + that was not encoded
            text = f"{year:04}-{month:02}-{day:02}T{clock}{zone}"
            low = datetime.fromisoformat(text).astimezone(UTC)
        return prefix, low, _end(low, part)
    except (ValueError, OverflowError) as error:
        raise Unprocessable("`date` names a day or a time that there is not.") from error


def _end(low: datetime, part: dict[str, str | None]) -> datetime:
    if part["fraction"]:
        return low + timedelta(microseconds=10 ** (6 - len(part["fraction"])))
    if part["second"]:
        return low + timedelta(seconds=1)
    if part["time"]:
        return low + timedelta(minutes=1)
    if part["day"]:
        return low + timedelta(days=1)
    if part["month"]:
        return (low + timedelta(days=31)).replace(day=1)
    return low.replace(year=low.year + 1)


def _by_patient(value: str) -> Condition:
    return col(AuditRecord.patient_id) == _reference(value, "Patient", "patient")


def _by_agent(value: str) -> Condition:
    """By `sub`; what stands before a `|` is the system, and all are of one."""
    return col(AuditRecord.actor) == value.rpartition("|")[2].removeprefix("Practitioner/")


def _by_entity(value: str) -> Condition:
    """By a patient, an order or a study: `Patient/id`, `ServiceRequest/id`, `urn:oid:uid`."""
    kind, slash, _ = value.partition("/")
    if slash and kind == "Patient":
        return _by_patient(value)
    if slash and kind == "ServiceRequest":
        return col(AuditRecord.order_id) == _reference(value, "ServiceRequest", "entity")
    uid = value.rpartition("|")[2].removeprefix("urn:oid:")
    if len(uid) > 64 or not _UID.fullmatch(uid):
        raise Unprocessable(
            "`entity` must be `Patient/` or `ServiceRequest/` and an id, or a study's UID as "
            "`urn:oid:...`."
        )
    return col(AuditRecord.study_instance_uid) == uid


def _reference(value: str, kind: str, name: str) -> UUID:
    try:
        return UUID(value.removeprefix(f"{kind}/"))
    except ValueError as error:
        raise Unprocessable(
            f"`{name}` must be an id of Lightbox, or `{kind}/` and that."
        ) from error


def _by_action(value: str) -> Condition:
    if value not in "CRUDE" or len(value) != 1:
        raise Unprocessable("`action` must be one of C, R, U, D, E.")
    actions = [each.value for each in Action if kind_of(each).value.action == value]
    return col(AuditRecord.action).in_(actions)


def _by_outcome(value: str) -> Condition:
    if value not in ("0", "4", "8", "12"):
        raise Unprocessable("`outcome` must be one of 0, 4, 8, 12.")
    pairs = [
        sa.and_(col(AuditRecord.outcome) == outcome.value, col(AuditRecord.action) == action.value)
        for outcome in Outcome
        for action in Action
        if outcome_code(action, outcome) == value
    ]
    return sa.or_(sa.false(), *pairs)


_FORMATS = ("json", "application/json", "application/fhir+json")
PARAMETERS: Sequence[Parameter] = (
    Parameter("_id", "token", _by_id, "The id of a record."),
    Parameter("action", "token", _by_action, "C, R, U, D or E."),
    Parameter("agent", "reference", _by_agent, "Who asked: `sub` of their token."),
    Parameter("agent:identifier", "token", _by_agent),
    Parameter(
        *("date", "date", _by_date),
        "When: eq, ge, le, gt, lt, or no prefix; repeated, all must hold. Days are in UTC.",
    ),
    Parameter(
        *("entity", "reference", _by_entity),
        "`Patient/id`, `ServiceRequest/id`, or a study's UID as `urn:oid:...`.",
    ),
    Parameter("entity:identifier", "token", _by_entity),
    Parameter("outcome", "token", _by_outcome, "0 granted or done, 4 failed, 8 denied."),
    Parameter("patient", "reference", _by_patient, "The patient whose data it concerned."),
    Parameter("_count", "number", None),
    Parameter("_format", "special", None),
    Parameter("_before", "special", _by_cursor),
)
_BY_NAME: dict[str, Any] = {each.name: each for each in PARAMETERS}
