"""Who may see what: the policy, and the guards that apply it.

`policy` is pure and reads like a table; the `gate` asks it, writes the record, and hands out the
`PatientAccess` that every function which touches patient data takes first; `guards` are how a
route asks the gate.
"""

from app.access.ehr import Ehr
from app.access.gate import Denial, Gate, PatientAccess, RoleAccess, Subject
from app.access.glance import InstanceFacts, SessionAccess, StudyAccess, StudyGate
from app.access.guards import (
    Caller,
    DirectGuard,
    Grant,
    Guard,
    Nothing,
    Public,
    StudyGrant,
    Visible,
)
from app.access.policy import POLICY, Reason, Relation, decide
from app.access.window import VisiblePatients, decisions

__all__ = [
    "POLICY",
    "Caller",
    "Denial",
    "DirectGuard",
    "Ehr",
    "Gate",
    "Grant",
    "Guard",
    "InstanceFacts",
    "Nothing",
    "PatientAccess",
    "Public",
    "Reason",
    "Relation",
    "RoleAccess",
    "SessionAccess",
    "StudyAccess",
    "StudyGate",
    "StudyGrant",
    "Subject",
    "Visible",
    "VisiblePatients",
    "decide",
    "decisions",
]
