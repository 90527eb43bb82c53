"""The closed list of what can speak for or against a match: its points, and its words.

Points order proposals and do nothing else. What forbids certainty stands in `rules`.
"""

from enum import StrEnum
from typing import NamedTuple


class Code(StrEnum):
    """One piece of evidence. `ACCESSION_...` and so on up to SITE speak of an order."""

    __hash__ = str.__hash__  # Enum's own is slow, and sets of these are what matching is made of

    STUDY_PLANNED = "study-planned"
    STUDY_LINKED = "study-linked"
    STUDY_REFERENCED = "study-referenced"
    ACCESSION_AGREES = "accession-agrees"
    ACCESSION_ISSUER_UNKNOWN = "accession-issuer-unknown"
    ACCESSION_VARIANT = "accession-variant"
    ACCESSION_NEAR = "accession-near"
    ACCESSION_DIFFERS = "accession-differs"
    ACCESSION_ISSUER_DIFFERS = "accession-issuer-differs"
    SEVERAL_ACCESSIONS = "several-accessions"
    MODALITY_AGREES = "modality-agrees"
    MODALITY_EQUIVALENT = "modality-equivalent"
    MODALITY_DIFFERS = "modality-differs"
    BODY_PART_AGREES = "body-part-agrees"
    BODY_PART_DIFFERS = "body-part-differs"
    DATE_SAME_DAY = "date-same-day"
    DATE_NEAR = "date-near"
    DATE_FAR = "date-far"
    DATE_IMPLAUSIBLE = "date-implausible"
    STATION_AGREES = "station-agrees"
    STATION_DIFFERS = "station-differs"
    SITE_AGREES = "site-agrees"
    ORDER_CANCELLED = "order-cancelled"
    ORDER_FULFILLED = "order-fulfilled"
    PATIENT_ID_AGREES = "patient-id-agrees"
    PATIENT_ID_FORMER = "patient-id-former"
    PATIENT_ID_OTHER = "patient-id-other"
    PATIENT_ID_AMBIGUOUS = "patient-id-ambiguous"
    PATIENT_ID_NEAR = "patient-id-near"
    PATIENT_ID_DIFFERS = "patient-id-differs"
    PATIENT_ID_ISSUER_DIFFERS = "patient-id-issuer-differs"
    NAME_AGREES = "name-agrees"
    NAME_COMMON = "name-common"
    NAME_PARTLY = "name-partly"
    NAME_SWAPPED = "name-swapped"
    NAME_TRANSLITERATED = "name-transliterated"
    NAME_FORMER = "name-former"
    NAME_SIMILAR = "name-similar"
    NAME_OTHER_FAMILY = "name-other-family"
    NAME_OTHER_GIVEN = "name-other-given"
    NAME_DIFFERS = "name-differs"
    BIRTH_DATE_AGREES = "birth-date-agrees"
    BIRTH_DATE_NEAR = "birth-date-near"
    BIRTH_DATE_DIFFERS = "birth-date-differs"
    SEX_AGREES = "sex-agrees"
    SEX_DIFFERS = "sex-differs"
    # Of the study among all candidates.
    TWO_PATIENTS = "two-patients"
    OWNED_BY_ANOTHER = "owned-by-another"
    NAMES_ANOTHER_ORDER = "names-another-order"
    NAMES_ANOTHER_PATIENT = "names-another-patient"
    NAMESAKE = "namesake"
    TOO_LITTLE = "too-little"
    NO_CANDIDATE = "no-candidate"


class Meaning(NamedTuple):
    """Above zero it speaks for a match, else against. `{theirs}`: the study's, `{ours}`: ours."""

    points: int
    words: str


MEANING: dict[Code, Meaning] = {
    Code.STUDY_PLANNED: Meaning(45, "The StudyInstanceUID was planned for this order."),
    Code.STUDY_LINKED: Meaning(45, "The study is linked to this order already."),
    Code.STUDY_REFERENCED: Meaning(30, "The images refer to the study planned for this order."),
    Code.ACCESSION_AGREES: Meaning(30, "The accession number {theirs} is the order's."),
    Code.ACCESSION_ISSUER_UNKNOWN: Meaning(
        20, "The accession number {theirs} is the order's, whose issuer is unknown."
    ),
    Code.ACCESSION_VARIANT: Meaning(
        20, "The accession number {theirs} is the order's {ours} in another notation."
    ),
    Code.ACCESSION_NEAR: Meaning(
        12, "The accession number {theirs} is one slip away from the order's {ours}."
    ),
    Code.ACCESSION_DIFFERS: Meaning(-10, "The accession number is {theirs}, the order's {ours}."),
    Code.ACCESSION_ISSUER_DIFFERS: Meaning(
        -10, "The accession number was issued by {theirs}, the order's by {ours}."
    ),
    Code.SEVERAL_ACCESSIONS: Meaning(-2, "The images name several accession numbers: {theirs}."),
    Code.MODALITY_AGREES: Meaning(6, "The modality {theirs} was ordered."),
    Code.MODALITY_EQUIVALENT: Meaning(4, "The modality {theirs} can answer an order for {ours}."),
    Code.MODALITY_DIFFERS: Meaning(-12, "The modality is {theirs}; {ours} was ordered."),
    Code.BODY_PART_AGREES: Meaning(4, "The body part {theirs} was ordered."),
    Code.BODY_PART_DIFFERS: Meaning(-8, "The body part is {theirs}; the order says {ours}."),
    Code.DATE_SAME_DAY: Meaning(6, "Made on the day that was scheduled, {ours}."),
    Code.DATE_NEAR: Meaning(3, "Made on {theirs}, within a week of the schedule, {ours}."),
    Code.DATE_FAR: Meaning(-4, "Made on {theirs}, away from the schedule, {ours}."),
    Code.DATE_IMPLAUSIBLE: Meaning(-12, "Made on {theirs}, much too far from the order, {ours}."),
    Code.STATION_AGREES: Meaning(3, "Made at the station that was scheduled, {ours}."),
    Code.STATION_DIFFERS: Meaning(-1, "Made at {theirs}; {ours} was scheduled."),
    Code.SITE_AGREES: Meaning(1, "Made at the order's site, {ours}."),
    Code.ORDER_CANCELLED: Meaning(-15, "The order is cancelled."),
    Code.ORDER_FULFILLED: Meaning(-8, "The order is fulfilled already."),
    Code.PATIENT_ID_AGREES: Meaning(25, "PatientID and issuer are the patient's."),
    Code.PATIENT_ID_FORMER: Meaning(
        20, "The PatientID {theirs} was merged into the patient's {ours}."
    ),
    Code.PATIENT_ID_OTHER: Meaning(12, "The patient's {ours} is among the other PatientIDs."),
    Code.PATIENT_ID_AMBIGUOUS: Meaning(
        10, "The PatientID {theirs} is the patient's, and another patient's by another issuer."
    ),
    Code.PATIENT_ID_NEAR: Meaning(8, "The PatientID {theirs} is one slip away from {ours}."),
    Code.PATIENT_ID_DIFFERS: Meaning(-10, "The PatientID is {theirs}, the patient's {ours}."),
    Code.PATIENT_ID_ISSUER_DIFFERS: Meaning(
        -2, "The PatientID is the same number, but issued by {theirs}; the patient's by {ours}."
    ),
    Code.NAME_AGREES: Meaning(20, "The name {theirs} is the patient's."),
    Code.NAME_COMMON: Meaning(15, "The name {theirs} is the patient's, as it is of many newborns."),
    Code.NAME_PARTLY: Meaning(12, "The name {theirs} goes with {ours}, as far as it says."),
    Code.NAME_SWAPPED: Meaning(15, "The name {theirs} is {ours} in another order."),
    Code.NAME_TRANSLITERATED: Meaning(12, "The name {theirs} reads like {ours} in another script."),
    Code.NAME_FORMER: Meaning(12, "The name {theirs} is another name of the patient, {ours}."),
    Code.NAME_SIMILAR: Meaning(6, "The name {theirs} is similar to {ours}, and not the same."),
    Code.NAME_OTHER_FAMILY: Meaning(-8, "The given name agrees, the family name is not: {theirs}."),
    Code.NAME_OTHER_GIVEN: Meaning(
        -30, "The family name agrees, the given name is another (a relative?): {theirs}, {ours}."
    ),
    Code.NAME_DIFFERS: Meaning(-40, "The name is {theirs}, the patient's {ours}."),
    Code.BIRTH_DATE_AGREES: Meaning(15, "The birth date {theirs} is the patient's."),
    Code.BIRTH_DATE_NEAR: Meaning(
        6, "The birth date {theirs} is one slip away from the patient's {ours}."
    ),
    Code.BIRTH_DATE_DIFFERS: Meaning(-30, "The birth date is {theirs}, the patient's {ours}."),
    Code.SEX_AGREES: Meaning(2, "The sex agrees."),
    Code.SEX_DIFFERS: Meaning(-15, "The sex is {theirs}, the patient's {ours}."),
    Code.TWO_PATIENTS: Meaning(0, "Two patients have images under this StudyInstanceUID."),
    Code.OWNED_BY_ANOTHER: Meaning(0, "The study is linked to another patient already."),
    Code.NAMES_ANOTHER_ORDER: Meaning(-10, "Another identifier of the study names another order."),
    Code.NAMES_ANOTHER_PATIENT: Meaning(0, "Identifiers of the study name different patients."),
    Code.NAMESAKE: Meaning(0, "Another patient known here has this name."),
    Code.TOO_LITTLE: Meaning(0, "Too little of it agrees to be sure."),
    Code.NO_CANDIDATE: Meaning(0, "Nothing known comes near."),
}
