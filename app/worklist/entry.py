"""An order as one entry of a modality worklist: PS3.4 table K.6-1, as the bytes of a file.

Attributes of type 1 have a value, those of type 2 are there and may be empty. What doesn't fit
its VR is refused with a sentence, never cut: a cut identifier is another's.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from io import BytesIO
from typing import TypeVar
from zoneinfo import ZoneInfo

from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import PYDICOM_IMPLEMENTATION_UID, UID, ExplicitVRLittleEndian

from app.dicom import (
    PatientIdentifier,
    parse_code,
    parse_short_text,
    parse_text,
    parse_uid,
    person_name,
)
from app.models import Order, Patient, RestrictionLevel
from app.worklist.charsets import ASCII, composed, holds, smallest

MODALITY_WORKLIST = UID("1.2.840.10008.5.1.4.31")
# HL7 Confidentiality, which (0040,3001) leaves open: restricted, very restricted.
_CONFIDENTIALITY = {RestrictionLevel.VIP.value: "R", RestrictionLevel.SEALED.value: "V"}
_ISO = "ISO"  # UniversalEntityIDType (0040,0033) of an OID
T = TypeVar("T")
_UTC = ZoneInfo("UTC")
_PREGNANCY = (1, 2, 3, 4)  # (0010,21C0)


class Withheld(ValueError):
    """The order can't stand on the worklist; says why. `keyword`: the attribute, for the log."""

    def __init__(self, keyword: str, why: str) -> None:
        super().__init__(f"{keyword}: {why}")
        self.keyword = keyword


@dataclass(frozen=True)
class Listed:
    """What an entry is made of; `restriction` is the patient's level, empty for most."""

    order: Order
    patient: Patient
    restriction: str = ""


@dataclass(frozen=True)
class Site:
    """What the site configured for all entries; `character_set` empty: the smallest that fits."""

    station_ae_title: str = "ANY"
    time_zone: ZoneInfo = _UTC
    character_set: str = ""


@dataclass(frozen=True)
class Entry:
    """The file, and the set that each of its texts needs: Orthanc has to be able to say it."""

    content: bytes
    texts: tuple[str, ...]  # those beyond ASCII

    def can_be_said_in(self, term: str) -> bool:
        return holds(term, self.texts)


def make_entry(listed: Listed, site: Site) -> Entry:
    """The same bytes for the same order, whoever makes them. Raises Withheld."""
    dataset = _patient(listed)
    _request(dataset, listed.order)
    dataset.ScheduledProcedureStepSequence = [_step(listed.order, site)]
    dataset.TimezoneOffsetFromUTC = f"{_starts(listed.order, site):%z}"
    texts = tuple(sorted({text for text in _texts(dataset) if not text.isascii()}))
    term = site.character_set or smallest(texts)
    if not holds(term, texts):
        raise Withheld("SpecificCharacterSet", f"{term}, which is set for all, lacks a character.")
    if term != ASCII:
        dataset.SpecificCharacterSet = term
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID = MODALITY_WORKLIST
    dataset.file_meta.MediaStorageSOPInstanceUID = UID(f"2.25.{listed.order.id.int}")
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.ImplementationClassUID = PYDICOM_IMPLEMENTATION_UID
    dataset.file_meta.ImplementationVersionName = "LIGHTBOX"
    out = BytesIO()
    dataset.save_as(out, enforce_file_format=True)
    return Entry(out.getvalue(), texts)


def _patient(listed: Listed) -> Dataset:
    order, patient = listed.order, listed.patient
    made = Dataset()
    made.PatientName = _checked(
        "PatientName", person_name, composed(patient.last_name), composed(patient.first_name)
    )
    identifier = _checked("PatientID", PatientIdentifier, patient.mrn, patient.mrn_issuer)
    made.PatientID = identifier.value
    if identifier.issuer:
        made.IssuerOfPatientID = identifier.issuer
        qualifiers = _issuer(identifier.issuer)
        if "UniversalEntityID" in qualifiers:
            made.IssuerOfPatientIDQualifiersSequence = [qualifiers]
    made.PatientBirthDate = f"{patient.dob:%Y%m%d}"
    made.PatientSex = _checked("PatientSex", parse_code, patient.sex)
    made.PatientWeight = _weight(order.patient_weight_kg)
    made.ConfidentialityConstraintOnPatientDataDescription = _CONFIDENTIALITY.get(
        listed.restriction, ""
    )
    made.PatientState = _text("PatientState", order.patient_state)
    made.PregnancyStatus = _pregnancy(order.pregnancy_status)
    made.MedicalAlerts = _text("MedicalAlerts", order.medical_alerts)
    made.Allergies = _text("Allergies", order.allergies)
    made.SpecialNeeds = _text("SpecialNeeds", order.special_needs)
    made.CurrentPatientLocation = _text("CurrentPatientLocation", order.patient_location)
    made.AdmissionID = ""
    made.ReferencedPatientSequence = []
    return made


def _request(made: Dataset, order: Order) -> None:
    """Requested Procedure and Imaging Service Request."""
    accession = _required("AccessionNumber", parse_short_text, order.accession_number)
    made.AccessionNumber = accession
    if issuer := _checked("IssuerOfAccessionNumberSequence", parse_text, order.accession_issuer):
        made.IssuerOfAccessionNumberSequence = [_issuer(issuer)]
    made.RequestedProcedureID = accession
    made.RequestedProcedureDescription = _description(order)
    if code := _code(
        "RequestedProcedureCodeSequence",
        order.procedure_code,
        order.procedure_code_system,
        order.procedure_code_meaning,
    ):
        made.RequestedProcedureCodeSequence = [code]
    made.StudyInstanceUID = _checked(
        "StudyInstanceUID", parse_uid, order.planned_study_instance_uid
    )
    made.ReferencedStudySequence = []
    made.RequestedProcedurePriority = ""
    made.PatientTransportArrangements = ""
    made.RequestingPhysician = _name("RequestingPhysician", order.requesting_physician)
    made.ReferringPhysicianName = _name("ReferringPhysicianName", order.referring_physician)


def _step(order: Order, site: Site) -> Dataset:
    """The one Scheduled Procedure Step of an order."""
    made, starts = Dataset(), _starts(order, site)
    made.Modality = _required("Modality", parse_code, order.order_category)
    made.ScheduledStationAETitle = _required(
        "ScheduledStationAETitle", parse_short_text, order.station_ae_title or site.station_ae_title
    )
    made.ScheduledProcedureStepStartDate = f"{starts:%Y%m%d}"
    made.ScheduledProcedureStepStartTime = f"{starts:%H%M%S}"
    made.ScheduledPerformingPhysicianName = _name(
        "ScheduledPerformingPhysicianName", order.performing_physician
    )
    made.ScheduledProcedureStepDescription = _description(order)
    if code := _code(
        "ScheduledProtocolCodeSequence",
        order.protocol_code,
        order.protocol_code_system,
        order.protocol_code_meaning,
    ):
        made.ScheduledProtocolCodeSequence = [code]
    made.ScheduledProcedureStepID = _checked(
        "ScheduledProcedureStepID", parse_short_text, order.accession_number
    )
    made.ScheduledStationName = ""
    made.ScheduledProcedureStepLocation = composed(
        _checked("ScheduledProcedureStepLocation", parse_short_text, order.procedure_location)
    )
    made.PreMedication = ""
    made.RequestedContrastAgent = ""
    return made


def _starts(order: Order, site: Site) -> datetime:
    """In the modalities' time. An order for no time is for when it was placed: type 1."""
    return (order.scheduled_at or order.created_at).astimezone(site.time_zone)


def _description(order: Order) -> str:
    """Of type 1C here and there: in want of one the code's meaning, else the modality."""
    given = order.description.strip(" ") or order.procedure_code_meaning.strip(" ")
    return _text("RequestedProcedureDescription", given or order.order_category)


def _code(keyword: str, value: str, system: str, meaning: str) -> Dataset | None:
    """An item of PS3.3 table 8.8-1, whose three attributes are of type 1; None without a code."""
    if not (value or system or meaning):
        return None
    made = Dataset()
    made.CodeValue = _required(keyword, parse_short_text, value)
    made.CodingSchemeDesignator = _required(keyword, parse_short_text, system)
    made.CodeMeaning = composed(_required(keyword, parse_text, meaning))
    return made


def _issuer(text: str) -> Dataset:
    """PS3.3 table 10-17. An OID is universal, `name&oid&ISO` (HL7's HD) both, others local."""
    made = Dataset()
    parts = text.split("&")
    local, universal, kind = parts if len(parts) == 3 else (text, "", "")
    if _is_oid(text):
        local, universal, kind = "", text, _ISO
    if local:
        made.LocalNamespaceEntityID = local
    if universal and kind:
        made.UniversalEntityID = universal
        made.UniversalEntityIDType = kind
    return made


def _is_oid(text: str) -> bool:
    try:
        return text.count(".") > 1 and parse_uid(text) == text
    except ValueError:
        return False


def _weight(kilograms: float | None) -> str:
    """PatientWeight (0010,1030), DS of at most 16 characters; empty if unknown."""
    if kilograms is None:
        return ""
    if not 0 < kilograms < 1000:
        raise Withheld("PatientWeight", "is not between 0 and 1000 kg.")
    return f"{kilograms:.3f}".rstrip("0").rstrip(".")


def _pregnancy(status: int | None) -> int | None:
    if status is not None and status not in _PREGNANCY:
        raise Withheld("PregnancyStatus", "is none of 1, 2, 3 and 4.")
    return status


def _text(keyword: str, value: str) -> str:
    """LO for people to read."""
    return composed(_checked(keyword, parse_text, value))


def _name(keyword: str, value: str) -> str:
    """A PN as it was given: one component group of at most 64 characters (PS3.5 6.2)."""
    name = composed(_checked(keyword, parse_text, value))
    if "=" in name or name.count("^") > 4:
        raise Withheld(keyword, "is not one person's name, Last^First^Middle^Prefix^Suffix.")
    return name


def _checked(keyword: str, check: Callable[..., T], *given: str) -> T:
    try:
        return check(*given)
    except ValueError as error:
        raise Withheld(keyword, str(error)) from error


def _required(keyword: str, check: Callable[[str], str], given: str) -> str:
    value = _checked(keyword, check, given)
    if not value:
        raise Withheld(keyword, "A modality needs it (type 1), and the order has none.")
    return value


def _texts(dataset: Dataset) -> Iterator[str]:
    for element in dataset:
        if element.VR == "SQ":
            for item in element.value:
                yield from _texts(item)
        elif element.VR in ("LO", "PN", "SH", "UT"):
            yield str(element.value or "")
