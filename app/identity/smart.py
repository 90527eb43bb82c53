"""What SMART on FHIR puts into a token: the patient in context, and scopes for resources.

SMART App Launch 2.2: `patient` names the one patient that the caller has open; `scope` holds
`user/ImagingStudy.rs` (v2) or `user/ImagingStudy.read` (v1) among others. Whatever looks like a
limit and isn't understood covers nothing.
"""

import re
from collections.abc import Iterable
from uuid import UUID

from app.identity.principal import PatientContext, Scope

MAX_IDENTIFIER = 64  # PatientID and its issuer are LO (PS3.5 6.2)
_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_LEVELS = ("patient/", "user/", "system/")
_SCOPE = re.compile(r"(patient|user|system)/(\*|[A-Z][A-Za-z]{1,63})\.(read|write|\*|c?r?u?d?s?)")
_VERSION_1 = {"read": "rs", "write": "cud", "*": "cruds"}
NOBODY = PatientContext()


def patient_context(value: object, assigning_authority: str) -> PatientContext:
    """The patient that a claim names: our id (a UUID), `issuer|mrn` as FHIR searches for a token,
    or a bare MRN of the assigning authority. Nobody for anything else."""
    if not isinstance(value, str) or not value.isprintable() or value != value.strip():
        return NOBODY
    if _UUID.fullmatch(value):
        return PatientContext(patient_id=UUID(value))
    issuer, bar, mrn = value.partition("|")
    if not bar:
        issuer, mrn = assigning_authority, value
    if "|" in mrn or not 0 < len(mrn) <= MAX_IDENTIFIER or len(issuer) > MAX_IDENTIFIER:
        return NOBODY
    return PatientContext(mrn=mrn, mrn_issuer=issuer)


def resource_scopes(value: object) -> frozenset[Scope] | None:
    """The SMART scopes for resources in a `scope` claim (text, or a list of texts); None where
    it holds none, so that it limits nothing. What can't be read covers nothing."""
    if isinstance(value, str):
        words: Iterable[object] = value.split(" ")
    elif isinstance(value, list):
        words = value
    else:
        return frozenset()
    if not all(isinstance(word, str) for word in words):
        return frozenset()
    limiting = [str(word) for word in words if str(word).startswith(_LEVELS)]
    if not limiting:
        return None
    return frozenset(scope for scope in map(_scope, limiting) if scope is not None)


def _scope(word: str) -> Scope | None:
    """One scope. A filter after it (v2's `?category=...`) is more than is understood here."""
    found = _SCOPE.fullmatch(word)
    if found is None or not found[3]:
        return None
    return Scope(found[1], found[2], frozenset(_VERSION_1.get(found[3], found[3])))
