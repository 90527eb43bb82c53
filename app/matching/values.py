"""What goes into the matcher and what comes out: frozen values, from no table and no file."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

from app.matching.codes import Code


@dataclass(frozen=True)
class Identifier:
    """A number with who issued it (HL7 CX, PS3.3 10.14). Empty: absent.

    `issuer` is the local namespace, `universal` the universal entity ID of the qualifiers.
    """

    value: str = ""
    issuer: str = ""
    universal: str = ""


@dataclass(frozen=True)
class Request:
    """An item of Request Attributes Sequence (0040,0275): what the modality says it was asked."""

    accession: Identifier = Identifier()
    study_instance_uid: str = ""  # its own (0020,000D), or that of its Referenced Study Sequence


@dataclass(frozen=True)
class ArrivedStudy:
    """A study as its files say, values decoded; "" and () where absent. Any text is survived."""

    study_instance_uid: str
    patient: Identifier = Identifier()  # PatientID, IssuerOfPatientID and its qualifiers
    other_patient_ids: tuple[Identifier, ...] = ()
    accession: Identifier = Identifier()
    requests: tuple[Request, ...] = ()
    patient_name: str = ""  # PN, up to three groups joined by =
    other_patient_names: tuple[str, ...] = ()  # PN; PatientBirthName too
    birth_date: str = ""  # DA
    sex: str = ""
    modalities: tuple[str, ...] = ()
    study_date: str = ""  # DA
    body_parts: tuple[str, ...] = ()
    stations: tuple[str, ...] = ()  # AE titles and StationName
    institution: str = ""
    under_two_patients: bool = False
    """Its StudyInstanceUID was seen under two patients in the archive."""
    owner: UUID | None = None
    """The patient to whom Lightbox has linked this StudyInstanceUID already."""


@dataclass(frozen=True)
class PatientCandidate:
    """A patient as the EHR knows them."""

    id: UUID
    mrn: str
    mrn_issuer: str = ""
    name: str = ""  # PN, as `app.dicom.person_name` makes it
    birth_date: date | None = None
    sex: str = ""
    other_names: tuple[str, ...] = ()  # PN: of birth, in another script
    former: tuple[Identifier, ...] = ()
    """Numbers that the EHR has merged into this patient."""


@dataclass(frozen=True)
class OrderCandidate:
    """An order as the EHR placed it. Only "scheduled" and "in-progress" are open."""

    id: UUID
    patient: PatientCandidate
    accession_number: str
    planned_study_instance_uid: str
    accession_issuer: str = ""
    status: str = "scheduled"
    modality: str = ""  # order_category
    description: str = ""
    scheduled_at: datetime | None = None
    ordered_at: datetime | None = None
    station_ae_title: str = ""
    site: str = ""
    linked: frozenset[str] = frozenset()  # StudyInstanceUIDs that answer it already


class Verdict(StrEnum):
    """What may be done. Only `certain` links by itself; everything else waits for a human.

    `conflicting`: identifiers contradict each other; the study must be shown to nobody.
    """

    CERTAIN = "certain"
    PROPOSED = "proposed"
    CONFLICTING = "conflicting"
    UNMATCHED = "unmatched"


class Rule(StrEnum):
    """What made it certain."""

    PLANNED_STUDY = "planned-study"
    LINKED_STUDY = "linked-study"
    ACCESSION_AND_PATIENT = "accession-and-patient"
    PATIENT = "patient"


@dataclass(frozen=True)
class Finding:
    """One piece of evidence: a code, and the same in words for a person.

    The words quote patient data: for the worklist of who may reconcile, not for logs or problems.
    """

    code: Code
    words: str

    def as_json(self) -> dict[str, str]:
        return {"code": self.code.value, "words": self.words}


@dataclass(frozen=True)
class Proposal:
    """A patient, and mostly one of their orders, that the study may belong to."""

    patient_id: UUID
    order_id: UUID | None  # None: the patient without an order
    score: int  # 0 to 100; orders the list, and decides nothing
    speaks_for: tuple[Finding, ...]
    speaks_against: tuple[Finding, ...]

    def as_json(self) -> dict[str, Any]:
        return {
            "patient_id": str(self.patient_id),
            "order_id": str(self.order_id) if self.order_id else None,
            "score": self.score,
            "for": [each.as_json() for each in self.speaks_for],
            "against": [each.as_json() for each in self.speaks_against],
        }


@dataclass(frozen=True)
class Match:
    """Whose the study is, or who has to be asked.

    `patient_id` and `rule` are None unless the verdict is certain. `order_id` is None then, too,
    where the patient alone is certain. `because` says what a human has to decide, or what was
    found. `candidates` come best first, at most `rules.MOST_PROPOSALS`.
    """

    verdict: Verdict
    patient_id: UUID | None = None
    order_id: UUID | None = None
    rule: Rule | None = None
    because: tuple[Finding, ...] = ()
    candidates: tuple[Proposal, ...] = ()

    def as_json(self) -> Mapping[str, Any]:
        """Plain values, fit for `json.dumps`."""
        return {
            "verdict": self.verdict.value,
            "patient_id": str(self.patient_id) if self.patient_id else None,
            "order_id": str(self.order_id) if self.order_id else None,
            "rule": self.rule.value if self.rule else None,
            "because": [each.as_json() for each in self.because],
            "candidates": [each.as_json() for each in self.candidates],
        }
