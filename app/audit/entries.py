"""What a record says: the words, and who asked whence.

DICOM PS3.15 A.5 gives the events; `Action` is our one vocabulary for rights and records alike.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any
from uuid import UUID


class Action(StrEnum):
    """What a caller may ask for, `subject:verb`. Rights and audit records use the same words."""

    ACCESS_EXPLAIN = "access:explain"
    ACCESS_REPORT = "access:report"
    APPLICATION_START = "application:start"
    APPLICATION_STOP = "application:stop"
    ARCHIVE_CHANGE = "archive:change"
    ARRIVAL_LIST = "arrival:list"
    AUDIT_PURGE = "audit:purge"
    AUDIT_READ = "audit:read"
    CARE_TEAM_READ = "care-team:read"
    CARE_TEAM_WRITE = "care-team:write"
    GLASS_BREAK = "glass:break"
    GLASS_REVIEW = "glass:review"
    IMPORT_CANCEL = "import:cancel"
    IMPORT_READ = "import:read"
    IMPORT_WRITE = "import:write"
    ORDER_CREATE = "order:create"
    ORDER_LIST = "order:list"
    ORDER_READ = "order:read"
    ORDER_WRITE = "order:write"
    PATIENT_CREATE = "patient:create"
    PATIENT_LIST = "patient:list"
    PATIENT_MERGE = "patient:merge"
    PATIENT_READ = "patient:read"
    PATIENT_WRITE = "patient:write"
    RESTRICTION_READ = "restriction:read"
    RESTRICTION_WRITE = "restriction:write"
    SESSION_END = "session:end"
    SESSION_LIST = "session:list"
    SESSION_OPEN = "session:open"
    SESSION_REVOKE = "session:revoke"
    SIGN_IN = "sign-in"
    SIGN_OUT = "sign-out"
    STATISTICS_READ = "statistics:read"
    STUDY_COERCE = "study:coerce"
    STUDY_DELETE = "study:delete"
    STUDY_LINK = "study:link"
    STUDY_LIST = "study:list"
    STUDY_READ = "study:read"
    STUDY_RETRIEVE = "study:retrieve"
    STUDY_UPLOAD = "study:upload"
    STUDY_VIEW = "study:view"
    TAGS_MODIFY = "tags:modify"
    TAGS_READ = "tags:read"
    WORKLIST_PUBLISH = "worklist:publish"


class Outcome(StrEnum):
    """`granted` and `denied` are decisions, `done` and `failed` what became of a grant."""

    DENIED = "denied"
    DONE = "done"
    FAILED = "failed"
    GRANTED = "granted"


@dataclass(frozen=True)
class Origin:
    """Where a request came from: its id, and the address of the client as the edge saw it."""

    request_id: str
    client_address: str = ""


UNDERTAKEN = frozenset(
    {
        Action.CARE_TEAM_WRITE,
        Action.GLASS_BREAK,
        Action.GLASS_REVIEW,
        Action.IMPORT_CANCEL,
        Action.IMPORT_WRITE,
        Action.ORDER_CREATE,
        Action.ORDER_WRITE,
        Action.PATIENT_CREATE,
        Action.PATIENT_MERGE,
        Action.PATIENT_WRITE,
        Action.RESTRICTION_WRITE,
        Action.SESSION_REVOKE,
        Action.SIGN_OUT,
        Action.STUDY_COERCE,
        Action.STUDY_DELETE,
        Action.STUDY_LINK,
        Action.STUDY_UPLOAD,
        Action.STUDY_VIEW,
        Action.TAGS_MODIFY,
    }
)
"""What has an outcome: its grant opens an `Operation`."""


class OperationState(StrEnum):
    """`open`: its process is at work on it. `left`: it is to be found out what became of it."""

    LEFT = "left"
    OPEN = "open"


@dataclass(frozen=True)
class Operation:
    """Something granted whose outcome is not recorded yet: a row of the journal."""

    id: str
    process: str  # which works on it, or finds out
    state: OperationState = OperationState.OPEN


@dataclass(frozen=True)
class Entry:
    """What one record says; the trail adds the time.

    A grant with an `operation` opens it in the journal, what is done or failed closes it: in the
    transaction of the record. It is no part of the record.
    """

    action: Action
    outcome: Outcome
    origin: Origin
    actor: str = ""
    actor_roles: str = ""
    reason: str = ""
    patient_id: UUID | None = None
    order_id: UUID | None = None
    study_instance_uid: str = ""
    ctx: str = ""
    purpose_of_use: str = ""
    detail: Mapping[str, Any] = field(default_factory=dict)
    operation: Operation | None = None
