"""Who may see what: the policy, and the guards that apply it.

`policy` is pure and reads like a table; `guards` ask it, write the record, and hand out the
`PatientAccess` that every function which touches patient data takes first.
"""

from app.access.guards import (
    Caller,
    Denial,
    Gate,
    Grant,
    Guard,
    PatientAccess,
    Public,
    RoleAccess,
    Subject,
    Visible,
    VisiblePatients,
)

__all__ = [
    "POLICY",
    "Caller",
    "Denial",
    "Gate",
    "Grant",
    "Guard",
    "PatientAccess",
    "Public",
    "Reason",
    "Relation",
    "RoleAccess",
    "Subject",
    "Visible",
    "VisiblePatients",
    "decide",
]
