"""Which order and which patient does a study belong to that arrived in Orthanc?

Pure: values in, a verdict out; no database, no HTTP. The rules stand in `rules`.

    match(study, orders, patients, authority=...).verdict is Verdict.CERTAIN

Only what is certain may be linked without a human. Scores order proposals, no more.
"""

from .codes import Code
from .lookup import Lookup, family_keys, look_up
from .rules import match
from .values import (
    ArrivedStudy,
    Finding,
    Identifier,
    Match,
    OrderCandidate,
    PatientCandidate,
    Proposal,
    Request,
    Rule,
    Verdict,
)

__all__ = [
    "ArrivedStudy",
    "Code",
    "Finding",
    "Identifier",
    "Lookup",
    "Match",
    "OrderCandidate",
    "PatientCandidate",
    "Proposal",
    "Request",
    "Rule",
    "Verdict",
    "family_keys",
    "look_up",
    "match",
]
