"""Which event of DICOM PS3.15 A.5.3 each audit record is."""

from collections.abc import Mapping
from typing import NamedTuple

from app.audit import Action, Outcome
from app.models import AuditRecord


class Code(NamedTuple):
    """A coded value (PS3.15 A.5.1, CodedValueType)."""

    value: str
    system: str
    meaning: str


def dcm(value: str, meaning: str) -> Code:
    return Code(value, "DCM", meaning)


def ours(value: str) -> Code:
    """A word of our own trail."""
    return Code(value, "99LIGHTBOX", value)


APPLICATION_ACTIVITY = dcm("110100", "Application Activity")
AUDIT_LOG_USED = dcm("110101", "Audit Log Used")
INSTANCES_ACCESSED = dcm("110103", "DICOM Instances Accessed")
INSTANCES_TRANSFERRED = dcm("110104", "DICOM Instances Transferred")
STUDY_DELETED = dcm("110105", "DICOM Study Deleted")
ORDER_RECORD = dcm("110109", "Order Record")
PATIENT_RECORD = dcm("110110", "Patient Record")
QUERY = dcm("110112", "Query")
SECURITY_ALERT = dcm("110113", "Security Alert")
USER_AUTHENTICATION = dcm("110114", "User Authentication")

APPLICATION_START = dcm("110120", "Application Start")
APPLICATION_STOP = dcm("110121", "Application Stop")
LOGIN = dcm("110122", "Login")
LOGOUT = dcm("110123", "Logout")
EMERGENCY = dcm("110127", "Emergency Override Started")
RESTRICTED_FUNCTION = dcm("110132", "Use of Restricted Function")
OBJECT_SECURITY = dcm("110135", "Object Security Attributes Changed")
USER_SECURITY = dcm("110137", "User Security Attributes Changed")


class Event(NamedTuple):
    """EventID, EventActionCode, and the EventTypeCode where the standard has one."""

    id: Code
    action: str
    type: Code | None = None


def _own(action: Action, verb: str) -> Event:
    """An event that the standard has no word for."""
    return Event(ours(action.value), verb)


EVENTS: Mapping[Action, Event] = {
    Action.ACCESS_EXPLAIN: Event(PATIENT_RECORD, "R"),
    Action.ACCESS_REPORT: Event(AUDIT_LOG_USED, "R"),
    Action.APPLICATION_START: Event(APPLICATION_ACTIVITY, "E", APPLICATION_START),
    Action.APPLICATION_STOP: Event(APPLICATION_ACTIVITY, "E", APPLICATION_STOP),
    Action.ARCHIVE_CHANGE: Event(PATIENT_RECORD, "U"),
    Action.ARRIVAL_LIST: Event(QUERY, "E"),
    Action.AUDIT_PURGE: _own(Action.AUDIT_PURGE, "E"),
    Action.AUDIT_READ: Event(AUDIT_LOG_USED, "R"),
    Action.CARE_TEAM_READ: Event(PATIENT_RECORD, "R"),
    Action.CARE_TEAM_WRITE: Event(SECURITY_ALERT, "E", USER_SECURITY),
    Action.GLASS_BREAK: Event(SECURITY_ALERT, "E", EMERGENCY),
    Action.GLASS_REVIEW: Event(PATIENT_RECORD, "R"),
    Action.IMPORT_CANCEL: _own(Action.IMPORT_CANCEL, "E"),
    Action.IMPORT_READ: _own(Action.IMPORT_READ, "R"),
    Action.IMPORT_WRITE: _own(Action.IMPORT_WRITE, "U"),
    Action.ORDER_CREATE: Event(ORDER_RECORD, "C"),
    Action.ORDER_LIST: Event(QUERY, "E"),
    Action.ORDER_READ: Event(ORDER_RECORD, "R"),
    Action.ORDER_WRITE: Event(ORDER_RECORD, "U"),
    Action.PATIENT_CREATE: Event(PATIENT_RECORD, "C"),
    Action.PATIENT_LIST: Event(QUERY, "E"),
    Action.PATIENT_MERGE: Event(PATIENT_RECORD, "U"),
    Action.PATIENT_READ: Event(PATIENT_RECORD, "R"),
    Action.PATIENT_WRITE: Event(PATIENT_RECORD, "U"),
    Action.RESTRICTION_READ: Event(PATIENT_RECORD, "R"),
    Action.RESTRICTION_WRITE: Event(SECURITY_ALERT, "E", OBJECT_SECURITY),
    Action.SESSION_END: Event(USER_AUTHENTICATION, "E", LOGOUT),
    Action.SESSION_LIST: Event(QUERY, "E"),
    Action.SESSION_OPEN: Event(USER_AUTHENTICATION, "E", LOGIN),
    Action.SESSION_REVOKE: Event(USER_AUTHENTICATION, "E", LOGOUT),
    Action.SIGN_IN: Event(USER_AUTHENTICATION, "E", LOGIN),
    Action.SIGN_OUT: Event(USER_AUTHENTICATION, "E", LOGOUT),
    Action.STATISTICS_READ: _own(Action.STATISTICS_READ, "R"),
    Action.STUDY_COERCE: Event(INSTANCES_ACCESSED, "U"),
    Action.STUDY_DELETE: Event(STUDY_DELETED, "D"),
    Action.STUDY_LINK: Event(PATIENT_RECORD, "U"),
    Action.STUDY_LIST: Event(QUERY, "E"),
    Action.STUDY_READ: Event(INSTANCES_ACCESSED, "R"),
    Action.STUDY_RETRIEVE: Event(INSTANCES_TRANSFERRED, "R"),
    Action.STUDY_UPLOAD: Event(INSTANCES_TRANSFERRED, "C"),
    Action.STUDY_VIEW: Event(INSTANCES_ACCESSED, "R"),
    Action.TAGS_MODIFY: _own(Action.TAGS_MODIFY, "E"),
    Action.TAGS_READ: _own(Action.TAGS_READ, "E"),
    Action.WORKLIST_PUBLISH: Event(PATIENT_RECORD, "R"),
}
"""Every action, as long as nothing else is said of its record: see `event_of`."""
_ABOUT_STUDIES = {INSTANCES_ACCESSED, INSTANCES_TRANSFERRED, STUDY_DELETED}


def event_of(record: AuditRecord, *, has_study: bool, is_link: bool = False) -> Event:
    """The event that a record is. `is_link`: see `app.audit.known`.

    What was denied is the use of a restricted function, whatever it was; a sign-in that failed
    is one. The standard's events name a patient, and those of images a study: a record that
    doesn't is an event of the next wider kind, and of our own (the action) where there is none.
    """
    try:
        event = EVENTS[Action(record.action)]
    except ValueError:  # of another version
        event = Event(ours(record.action), "E")
    if record.outcome == Outcome.DENIED and event.id != USER_AUTHENTICATION:
        return Event(SECURITY_ALERT, "E", RESTRICTED_FUNCTION)
    if is_link or (event.type == EMERGENCY and record.outcome != Outcome.DONE):
        # Nobody has seen anything by a link yet; and a grant alone breaks no glass.
        return Event(ours(record.action), "E")
    if record.action == Action.GLASS_REVIEW and record.outcome == Outcome.DONE:
        event = Event(PATIENT_RECORD, "U")
    if event.id in _ABOUT_STUDIES and not (has_study and record.patient_id):
        event = Event(ORDER_RECORD if record.order_id else PATIENT_RECORD, event.action)
    if event.id == ORDER_RECORD and not (record.order_id and record.patient_id):
        event = Event(PATIENT_RECORD, event.action)
    if event.id == PATIENT_RECORD and not record.patient_id:
        return Event(ours(record.action), event.action)
    return event


def outcome_indicator(record: AuditRecord) -> str:
    """0 success, 4 minor failure (it may be tried again), 8 serious failure (it was stopped)."""
    if record.outcome == Outcome.DENIED:
        return "4" if record.action == Action.SIGN_IN else "8"
    return "4" if record.outcome == Outcome.FAILED else "0"
