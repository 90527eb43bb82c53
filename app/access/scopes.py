"""Which SMART scope covers which action: the one table, and nothing else.

A token without SMART scopes for resources is not limited by this. One that has some may do only
what they cover (SMART App Launch 2.2): `c`reate, `r`ead, `u`pdate, `d`elete, `s`earch of a FHIR
resource. An action of more than one letter needs them all.
"""

from collections.abc import Mapping

from app.audit import Action
from app.identity import Principal

NEEDS: Mapping[Action, tuple[str, str]] = {
    Action.ACCESS_EXPLAIN: ("Patient", "r"),
    Action.ACCESS_REPORT: ("AuditEvent", "rs"),
    Action.ARRIVAL_LIST: ("ImagingStudy", "rs"),
    Action.AUDIT_READ: ("AuditEvent", "rs"),
    Action.CARE_TEAM_READ: ("CareTeam", "rs"),
    Action.CARE_TEAM_WRITE: ("CareTeam", "cud"),
    Action.GLASS_REVIEW: ("AuditEvent", "rs"),
    Action.IMPORT_CANCEL: ("ImagingStudy", "c"),
    Action.IMPORT_READ: ("ImagingStudy", "c"),
    Action.IMPORT_WRITE: ("ImagingStudy", "c"),
    Action.ORDER_CREATE: ("ServiceRequest", "c"),
    Action.ORDER_LIST: ("ServiceRequest", "s"),
    Action.ORDER_READ: ("ServiceRequest", "r"),
    Action.ORDER_WRITE: ("ServiceRequest", "u"),
    Action.PATIENT_CREATE: ("Patient", "c"),
    Action.PATIENT_LIST: ("Patient", "s"),
    Action.PATIENT_MERGE: ("Patient", "ud"),
    Action.PATIENT_READ: ("Patient", "r"),
    Action.PATIENT_WRITE: ("Patient", "u"),
    Action.RESTRICTION_READ: ("Consent", "rs"),
    Action.RESTRICTION_WRITE: ("Consent", "cud"),
    Action.SESSION_LIST: ("AuditEvent", "rs"),
    Action.STATISTICS_READ: ("MeasureReport", "r"),
    Action.STUDY_COERCE: ("ImagingStudy", "u"),
    Action.STUDY_DELETE: ("ImagingStudy", "d"),
    Action.STUDY_LINK: ("ImagingStudy", "u"),
    Action.STUDY_LIST: ("ImagingStudy", "s"),
    Action.STUDY_READ: ("ImagingStudy", "r"),
    Action.STUDY_RETRIEVE: ("ImagingStudy", "r"),
    Action.STUDY_UPLOAD: ("ImagingStudy", "c"),
    # A viewer searches too, among what it was opened for.
    Action.STUDY_VIEW: ("ImagingStudy", "rs"),
    Action.TAGS_MODIFY: ("ImagingStudy", "u"),
    Action.TAGS_READ: ("ImagingStudy", "r"),
}

NEEDS_NONE = frozenset({Action.GLASS_BREAK, Action.SESSION_REVOKE, Action.SIGN_OUT})
"""They show no data: what a broken glass opens is covered by a scope or not, like anything."""


def covers(principal: Principal, action: Action) -> bool:
    """Do the token's scopes, if it has any, cover the action?

    A `patient/` scope is for the one patient in context, so without a context it covers nothing.
    """
    if principal.scopes is None or action in NEEDS_NONE:
        return True
    if action not in NEEDS:
        return False
    resource, letters = NEEDS[action]
    given = {
        letter
        for scope in principal.scopes
        if scope.resource in ("*", resource)
        if scope.level != "patient" or principal.patient is not None
        for letter in scope.letters
    }
    return given >= set(letters)
