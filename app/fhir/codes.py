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
UID_SYSTEM = "urn:dicom:uid"
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


KINDS: Mapping[Action, Kind] = {
    Action.ACCESS_EXPLAIN: Kind.READ,
    Action.ACCESS_REPORT: Kind.READ,
    Action.APPLICATION_START: Kind.START,
    Action.APPLICATION_STOP: Kind.STOP,
    Action.ARCHIVE_CHANGE: Kind.OPERATION,
    Action.ARRIVAL_LIST: Kind.QUERY,
    Action.AUDIT_PURGE: Kind.OPERATION,
    Action.AUDIT_READ: Kind.QUERY,
    Action.CARE_TEAM_READ: Kind.READ,
    Action.CARE_TEAM_WRITE: Kind.UPDATE,
    Action.GLASS_BREAK: Kind.OPERATION,
    Action.GLASS_REVIEW: Kind.READ,
    Action.IMPORT_CANCEL: Kind.OPERATION,
    Action.IMPORT_READ: Kind.READ,
    Action.IMPORT_WRITE: Kind.UPDATE,
    Action.ORDER_CREATE: Kind.CREATE,
    Action.ORDER_LIST: Kind.QUERY,
    Action.ORDER_READ: Kind.READ,
    Action.ORDER_WRITE: Kind.UPDATE,
    Action.PATIENT_CREATE: Kind.CREATE,
    Action.PATIENT_LIST: Kind.QUERY,
    Action.PATIENT_MERGE: Kind.UPDATE,
    Action.PATIENT_READ: Kind.READ,
    Action.PATIENT_WRITE: Kind.UPDATE,
    Action.RESTRICTION_READ: Kind.READ,
    Action.RESTRICTION_WRITE: Kind.UPDATE,
    Action.SESSION_END: Kind.LOGOUT,
    Action.SESSION_LIST: Kind.QUERY,
    Action.SESSION_OPEN: Kind.LOGIN,
    Action.SESSION_REVOKE: Kind.LOGOUT,
    Action.SIGN_IN: Kind.LOGIN,
    Action.SIGN_OUT: Kind.LOGOUT,
    Action.STATISTICS_READ: Kind.READ,
    Action.STUDY_COERCE: Kind.UPDATE,
    Action.STUDY_DELETE: Kind.DELETE,
    Action.STUDY_LINK: Kind.UPDATE,
    Action.STUDY_LIST: Kind.QUERY,
    Action.STUDY_READ: Kind.READ,
    Action.STUDY_RETRIEVE: Kind.READ,
    Action.STUDY_UPLOAD: Kind.CREATE,
    Action.STUDY_VIEW: Kind.READ,
    Action.TAGS_MODIFY: Kind.OPERATION,
    Action.TAGS_READ: Kind.OPERATION,  # of a file that stays nobody's
    Action.WORKLIST_PUBLISH: Kind.OPERATION,
}
"""Every action."""
DONE_KINDS: Mapping[Action, Kind] = {
    Action.GLASS_BREAK: Kind.EMERGENCY,
    Action.GLASS_REVIEW: Kind.UPDATE,
}
"""Of these, what was done is another kind: a grant alone breaks no glass, and the queue of reviews
is read under the same right as a review is written."""
CHANGES = frozenset({Kind.CREATE, Kind.UPDATE, Kind.DELETE})
"""What has a record of its own for what became of it; the grant before is no change yet."""


def kind_of(action: str, outcome: str, *, is_link: bool = False) -> Kind:
    """The kind of an event; an action of another version is an operation, and so is a viewer link
    that was made (`app.audit.known.is_link`): nobody has seen anything by it yet."""
    try:
        known = Action(action)
    except ValueError:
        return Kind.OPERATION
    if is_link:
        return Kind.OPERATION
    if outcome == Outcome.DONE and known in DONE_KINDS:
        return DONE_KINDS[known]
    return KINDS[known]


def outcome_code(action: str, outcome: str) -> str:
    """FHIR's AuditEventOutcome, which is PS3.15's EventOutcomeIndicator: 0 is success, 4 a minor
    failure (it may be tried again), 8 a serious one (the action was stopped)."""
    if outcome == Outcome.DENIED:
        return "4" if action == Action.SIGN_IN else "8"
    return "4" if outcome == Outcome.FAILED else "0"
