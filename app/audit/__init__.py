"""The trail: what may be asked, and the record that somebody asked it.

Records are only ever added. The decision is committed before the handler runs; what became of
it is a second record under the same request id. If a record can't be written, nothing is shown.
DICOM PS3.15 A.5 gives the events; `Action` is our one vocabulary for rights and records alike.
"""

from app.audit.entries import Action, Entry, Operation, OperationState, Origin, Outcome
from app.audit.trail import AuditTrail

__all__ = ["Action", "AuditTrail", "Entry", "Operation", "OperationState", "Origin", "Outcome"]
