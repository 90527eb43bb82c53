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
from app.audit.known import of_a_link
from app.errors import Unprocessable
from app.fhir.codes import UID_SYSTEM, kind_of, outcome_code
from app.models import AuditRecord

MOST_ON_A_PAGE = 200
DEFAULT_COUNT = 50
_MOST_PARAMETERS = 12  # of more, each with many values, SQLite thinks for half a minute
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

_OF_A_LOOK = kind_of(Action.STUDY_VIEW, Outcome.GRANTED).value.action
_OF_A_LINK = kind_of(Action.STUDY_VIEW, Outcome.GRANTED, is_link=True).value.action
Condition = sa.ColumnElement[bool]


class Parameter(NamedTuple):
    """A search parameter. Without `documentation` it says how to answer, and finds nothing."""

    name: str
    type: str
    condition: Callable[[str, str], Condition] | None
    documentation: str = ""


@dataclass
class Search:
    """What is searched for: conditions that all hold, how many, and before which record.

    `used` are the parameters that were understood, for the `self` link.
    """

    conditions: list[Condition] = field(default_factory=list)
    count: int = DEFAULT_COUNT
    used: list[tuple[str, str]] = field(default_factory=list)


def read_search(
    parameters: Iterable[tuple[str, str]], *, lenient: bool = False, token_issuer: str = ""
) -> Search:
    """The search that these parameters ask for, where `token_issuer` is the system of all agents
    (empty: they have none). Raises Unprocessable."""
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
            wanted = [parameter.condition(each, token_issuer) for each in alternatives]
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
    """The values that commas stand between, each once and as it was written; a comma of a value
    itself is written `\\,`."""
    return list(dict.fromkeys(_split(value, ",")))


def _split(text: str, mark: str) -> list[str]:
    """The parts between the marks that have no backslash of their own (FHIR 3.1.1.4.0)."""
    parts, escaped = [""], False
    for each in text:
        if each == mark and not escaped:
            parts.append("")
        else:
            parts[-1] += each
        escaped = each == "\\" and not escaped
    return parts


def _token(text: str) -> tuple[str | None, str]:
    """System and value, `system|value`; None: no system is named, and any will do. A bar of a value
    itself is written `\\|`."""
    *systems, value = (re.sub(r"\\([\\,|$])", r"\1", each) for each in _split(text, "|"))
    if len(systems) > 1:
        raise Unprocessable(r"More than one | stands in a value; one of the value itself is \|.")
    return (systems[0] if systems else None), value


def _count(value: str) -> int:
    if not (value.isascii() and value.isdigit() and len(value) <= 9 and int(value) > 0):
        raise Unprocessable("`_count` must be a number above 0.")
    return min(int(value), MOST_ON_A_PAGE)


# ------------------------------------------------------------------------------------ conditions


def _by_id(value: str, _issuer: str) -> Condition:
    if len(value) > _LONGEST_ID:
        raise Unprocessable(f"`_id` has at most {_LONGEST_ID} characters.")
    if not (value.isascii() and value.isdigit()) or int(value) > _LARGEST_ID:
        return sa.false()
    return col(AuditRecord.id) == int(value)


def _by_cursor(value: str, _issuer: str) -> Condition:
    if not (value.isascii() and value.isdigit() and len(value) <= 18):
        raise Unprocessable("`_before` is not one that this API gave.")
    return col(AuditRecord.id) < int(value)


def _by_date(value: str, _issuer: str) -> Condition:
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


def _by_patient(value: str, _issuer: str) -> Condition:
    return col(AuditRecord.patient_id) == _reference(value, "Patient", "patient")


def _by_agent(value: str, issuer: str) -> Condition:
    """By `sub`, or by `system|sub`; the system is who issues our tokens. `|sub` is a person without
    one, `system|` anybody of it."""
    system, sub = _token(value)
    if system is not None and system != issuer:
        return sa.false()
    if system and not sub:
        return col(AuditRecord.actor) != ""
    return col(AuditRecord.actor) == sub.removeprefix("Practitioner/")


def _by_entity(value: str, issuer: str) -> Condition:
    """By a patient, an order or a study: `Patient/id`, `ServiceRequest/id`, `urn:oid:uid`."""
    kind, slash, _ = value.partition("/")
    if slash and kind == "Patient":
        return _by_patient(value, issuer)
    if slash and kind == "ServiceRequest":
        return col(AuditRecord.order_id) == _reference(value, "ServiceRequest", "entity")
    system, uid = _token(value)
    uid = uid.removeprefix("urn:oid:")
    if len(uid) > 64 or not _UID.fullmatch(uid):
        raise Unprocessable(
            "`entity` must be `Patient/` or `ServiceRequest/` and an id, or a study's UID as "
            "`urn:oid:...`."
        )
    if system not in (None, UID_SYSTEM):
        return sa.false()
    return col(AuditRecord.study_instance_uid) == uid


def _reference(value: str, kind: str, name: str) -> UUID:
    try:
        return UUID(value.removeprefix(f"{kind}/"))
    except ValueError as error:
        raise Unprocessable(
            f"`{name}` must be an id of Lightbox, or `{kind}/` and that."
        ) from error


def _by_action(value: str, _issuer: str) -> Condition:
    if value not in "CRUDE" or len(value) != 1:
        raise Unprocessable("`action` must be one of C, R, U, D, E.")
    action, outcome = col(AuditRecord.action), col(AuditRecord.outcome)
    wanted = []
    for each in Outcome:
        of_it = [name.value for name in Action if kind_of(name, each).value.action == value]
        wanted.append(sa.and_(outcome == each.value, action.in_(of_it)))
    found = sa.or_(*wanted)
    if value == _OF_A_LOOK:
        return sa.and_(found, sa.not_(of_a_link()))
    return sa.or_(found, of_a_link()) if value == _OF_A_LINK else found


def _by_outcome(value: str, _issuer: str) -> Condition:
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
    Parameter(
        "agent", "reference", _by_agent, "Who asked: `sub` of their token; `system|sub` too."
    ),
    Parameter("agent:identifier", "token", _by_agent),
    Parameter(
        *("date", "date", _by_date),
        "When: eq, ge, le, gt, lt, or no prefix; repeated, all must hold. Days are in UTC.",
    ),
    Parameter(
        *("entity", "reference", _by_entity),
        "`Patient/id`, `ServiceRequest/id`, or the UID, `urn:oid:...`, of the record's own study.",
    ),
    Parameter("entity:identifier", "token", _by_entity),
    Parameter("outcome", "token", _by_outcome, "0 granted or done, 4 failed, 8 denied."),
    Parameter("patient", "reference", _by_patient, "The patient whose data it concerned."),
    Parameter("_count", "number", None),
    Parameter("_format", "special", None),
    Parameter("_before", "special", _by_cursor),
)
_BY_NAME: dict[str, Any] = {each.name: each for each in PARAMETERS}
