"""What an action is in the terms of FHIR and of IHE BALP, and the code systems named in it."""

from collections.abc import Mapping
from enum import Enum
from typing import Any, NamedTuple

from app.audit import Action, Outcome

Json = dict[str, Any]

DCM = "http://dicom.nema.org/resources/ontology/DCM"
EVENT_TYPE = "http://terminology.hl7.org/CodeSystem/audit-event-type"
RESTFUL = "http://hl7.org/fhir/restful-interaction"
ENTITY_TYPE = "http://terminology.hl7.org/CodeSystem/audit-entity-type"
RESOURCE_TYPE = "http://hl7.org/fhir/resource-types"
OBJECT_ROLE = "http://terminology.hl7.org/CodeSystem/object-role"
PARTICIPATION = "http://terminology.hl7.org/CodeSystem/v3-ParticipationType"
PROVENANCE = "http://terminology.hl7.org/CodeSystem/provenance-participant-type"
ACT_REASON = "http://terminology.hl7.org/CodeSystem/v3-ActReason"
SOURCE_TYPE = "http://terminology.hl7.org/CodeSystem/security-source-type"
IDENTIFIER_TYPE = "http://terminology.hl7.org/CodeSystem/v2-0203"
BALP = "https://profiles.ihe.net/ITI/BALP"
BALP_ENTITY_TYPE = f"{BALP}/CodeSystem/BasicAuditEntityType"
ACTION_SYSTEM = "urn:lightbox:audit:action"
OUTCOME_SYSTEM = "urn:lightbox:audit:outcome"
ROLE_SYSTEM = "urn:lightbox:role"
DETAIL_SYSTEM = "urn:lightbox:audit:detail"


def coding(system: str, code: str, display: str = "") -> Json:
    """A Coding; `display` where there is one."""
    return {"system": system, "code": code} | ({"display": display} if display else {})


class Shape(NamedTuple):
    """How BALP writes down one kind of event: action code, the type of the event, and what the
    client, the server and the user are in it. `profile` ends the name of the BALP profile of a
    successful one; empty: there is none."""

    action: str
    type: Json
    subtype: Json
    client: Json
    server: Json
    user: Json
    profile: str = ""


_SOURCE = coding(DCM, "110153", "Source Role ID")
_DESTINATION = coding(DCM, "110152", "Destination Role ID")
_APPLICATION = coding(DCM, "110150", "Application")
_CUSTODIAN = coding(PROVENANCE, "custodian", "Custodian")
_RECIPIENT = coding(PARTICIPATION, "IRCP", "information recipient")
_AUTHOR = coding(PARTICIPATION, "AUT", "author (originator)")
_REST = coding(EVENT_TYPE, "rest", "RESTful Operation")
_ACTIVITY = coding(DCM, "110100", "Application Activity")
_ALERT = coding(DCM, "110113", "Security Alert")
_AUTHENTICATION = coding(DCM, "110114", "User Authentication")


def _rest(code: str) -> Json:
    return coding(RESTFUL, code, code)


class Kind(Enum):
    """The kinds of events that there are here."""

    READ = Shape("R", _REST, _rest("read"), _DESTINATION, _SOURCE, _RECIPIENT, "Read")
    QUERY = Shape("E", _REST, _rest("search-type"), _SOURCE, _DESTINATION, _RECIPIENT, "Query")
    CREATE = Shape("C", _REST, _rest("create"), _SOURCE, _DESTINATION, _AUTHOR, "Create")
    UPDATE = Shape("U", _REST, _rest("update"), _SOURCE, _DESTINATION, _AUTHOR, "Update")
    DELETE = Shape("D", _REST, _rest("delete"), _APPLICATION, _CUSTODIAN, _AUTHOR, "Delete")
    OPERATION = Shape("E", _REST, _rest("operation"), _SOURCE, _DESTINATION, _AUTHOR)
    EMERGENCY = Shape(
        *("E", _ALERT, coding(DCM, "110127", "Emergency Override Started")),
        *(_APPLICATION, _APPLICATION, _RECIPIENT),
    )
    START = Shape(
        *("E", _ACTIVITY, coding(DCM, "110120", "Application Start")),
        *(_APPLICATION, _APPLICATION, _RECIPIENT),
    )
    STOP = Shape(
        *("E", _ACTIVITY, coding(DCM, "110121", "Application Stop")),
        *(_APPLICATION, _APPLICATION, _RECIPIENT),
    )
    LOGIN = Shape(
        *("E", _AUTHENTICATION, coding(DCM, "110122", "Login")),
        *(_APPLICATION, _APPLICATION, _RECIPIENT),
    )
    LOGOUT = Shape(
        *("E", _AUTHENTICATION, coding(DCM, "110123", "Logout")),
        *(_APPLICATION, _APPLICATION, _RECIPIENT),
    )


_KINDS: Mapping[Action, Kind] = {
    Action.APPLICATION_START: Kind.START,
    Action.APPLICATION_STOP: Kind.STOP,
    Action.AUDIT_READ: Kind.QUERY,
    Action.GLASS_BREAK: Kind.EMERGENCY,
    Action.SESSION_END: Kind.LOGOUT,
    Action.SESSION_OPEN: Kind.LOGIN,
    Action.SESSION_REVOKE: Kind.LOGOUT,
    Action.SIGN_IN: Kind.LOGIN,
    Action.SIGN_OUT: Kind.LOGOUT,
    Action.TAGS_READ: Kind.OPERATION,  # of a file that stays nobody's
}
_KINDS_BY_VERB: Mapping[str, Kind] = {
    "coerce": Kind.UPDATE,
    "create": Kind.CREATE,
    "delete": Kind.DELETE,
    "explain": Kind.READ,
    "link": Kind.UPDATE,
    "list": Kind.QUERY,
    "read": Kind.READ,
    "report": Kind.READ,
    "retrieve": Kind.READ,
    "review": Kind.UPDATE,
    "upload": Kind.CREATE,
    "view": Kind.READ,
    "merge": Kind.UPDATE,
    "write": Kind.UPDATE,
}
CHANGES = frozenset({Kind.CREATE, Kind.UPDATE, Kind.DELETE})
"""What has a record of its own for what became of it; the grant before is no change yet."""


def kind_of(action: str) -> Kind:
    """The kind of an action's events; an action that nothing is said of is an operation."""
    try:
        known = _KINDS.get(Action(action))
    except ValueError:  # of another version
        known = None
    return known or _KINDS_BY_VERB.get(action.rpartition(":")[2], Kind.OPERATION)


def outcome_code(action: str, outcome: str) -> str:
    """FHIR's AuditEventOutcome, which is PS3.15's EventOutcomeIndicator: 0 is success, 4 a minor
    failure (it may be tried again), 8 a serious one (the action was stopped)."""
    if outcome == Outcome.DENIED:
        return "4" if action == Action.SIGN_IN else "8"
    return "4" if outcome == Outcome.FAILED else "0"
