"""Audit records of every kind that there is, made without an application."""

import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from itertools import count
from typing import Any
from uuid import UUID

from app.audit import Action, Outcome
from app.audit.known import Known, KnownPatient, KnownStudy
from app.models import AuditRecord

PATIENT = UUID("83f66213-0412-4df3-a4cc-43cb50b1ffa3")
ORDER = UUID("80ff23a5-88b8-4698-a21a-286aa5ea6ee6")
STUDY = "2.25.117597055778299430787770094930605779743"
OTHER_STUDY = "2.25.2"
CT = "1.2.840.10008.5.1.4.1.1.2"
_ids = count(1)


def record(action: str, outcome: str, **more: Any) -> AuditRecord:
    """A record of that action and outcome; `detail` as an object."""
    detail: Mapping[str, Any] = more.pop("detail", {})
    values: dict[str, Any] = {
        "id": next(_ids),
        "at": datetime(2026, 11, 21, 7, 52, 4, 768063, tzinfo=UTC),
        "request_id": "bb8825e69a97b120415fd35644d67af0",
        "action": action,
        "outcome": outcome,
        "actor": "dr.novak",
        "actor_roles": "clinician,radiologist",
        "client_address": "192.0.2.7",
        "sha256": "5e" * 32,
        "detail": json.dumps(detail, separators=(",", ":")),
    }
    return AuditRecord(**{**values, **more})


WHOSE: Mapping[str, Mapping[str, Any]] = {
    "nobody's": {},
    "a patient's": {"patient_id": PATIENT},
    "an order's": {"patient_id": PATIENT, "order_id": ORDER},
    "a study's": {"patient_id": PATIENT, "study_instance_uid": STUDY, "ctx": "0B_LPCAPW"},
    "a study's, of an order": {
        "patient_id": PATIENT,
        "order_id": ORDER,
        "study_instance_uid": STUDY,
    },
    "a study's, of a link": {
        "patient_id": PATIENT,
        "study_instance_uid": STUDY,
        "detail": {"by": ["attends one of the patient's orders"]},
    },
    "a study's, by DICOMweb": {
        "patient_id": PATIENT,
        "study_instance_uid": STUDY,
        "detail": {"access": "dicom-web", "by": ["attends one of the patient's orders"]},
    },
    "a study's, of no patient": {"study_instance_uid": STUDY},
    "a session's": {
        "patient_id": PATIENT,
        "actor": "",
        "actor_roles": "",
        "client_address": "",
        "detail": {
            "viewer": "dr.novak",
            "studies": [{"study_instance_uid": STUDY}, {"study_instance_uid": OTHER_STUDY}],
        },
    },
    "in an emergency": {
        "patient_id": PATIENT,
        "study_instance_uid": STUDY,
        "purpose_of_use": "BTG",
        "detail": {"by": ["broke the glass for the patient"]},
    },
    "a search's": {"detail": {"query": {"mrn": "MRN-1", "modality": ["CT", "MR"]}}},
    "an empty search's": {"detail": {"query": {}}},
    "refused": {"reason": "no-relationship", "detail": {"problem": "You may not."}},
}


def every_record() -> Iterator[AuditRecord]:
    """Each action with each outcome, about each kind of thing."""
    for action in Action:
        for outcome in Outcome:
            for about in WHOSE.values():
                yield record(action.value, outcome.value, **about)


def known() -> Known:
    """All that the records name is still known."""
    found = Known()
    found.patients[PATIENT] = KnownPatient("DOC-1", "HOSPITAL", "Santos^Maria")
    found.studies[STUDY] = KnownStudy(PATIENT, "20040119", "CT abdomen", "26-D8", {CT: 3})
    found.studies[OTHER_STUDY] = KnownStudy(PATIENT, "", "", "", {})
    found.accession_numbers[ORDER] = "26-D8"
    return found
