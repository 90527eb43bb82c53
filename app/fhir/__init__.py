"""The trail as FHIR R4 AuditEvent, after IHE BALP 1.1 (Basic Audit Log Patterns).

`codes` says what each action is in the terms of FHIR and IHE; `auditevent` makes the resource of
a record; `search` reads the parameters of a search; `documents` are the other resources that the
FHIR routes answer with. All of it is plain dicts: JSON as it is sent.
"""

from app.fhir.auditevent import Server, audit_event
from app.fhir.documents import capability_statement, operation_outcome, searchset
from app.fhir.search import PARAMETERS, Search, read_search

MEDIA_TYPE = "application/fhir+json"
BASE_PATH = "/fhir/R4"

__all__ = [
    "BASE_PATH",
    "MEDIA_TYPE",
    "PARAMETERS",
    "Search",
    "Server",
    "audit_event",
    "capability_statement",
    "operation_outcome",
    "read_search",
    "searchset",
]
