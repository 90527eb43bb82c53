"""A record as an audit message: XML after the schema of DICOM PS3.15 A.5.1."""

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlencode, urlsplit
from xml.etree.ElementTree import Element, SubElement, tostring

from app.atna.events import (
    AUDIT_LOG_USED,
    INSTANCES_TRANSFERRED,
    QUERY,
    SECURITY_ALERT,
    Code,
    Event,
    dcm,
    event_of,
    ours,
    outcome_indicator,
)
from app.audit import Outcome
from app.audit.known import Known, is_link, studies_of
from app.models import AuditRecord

_APPLICATION = dcm("110150", "Application")
_DESTINATION = dcm("110152", "Destination Role ID")
_SOURCE = dcm("110153", "Source Role ID")
_PATIENT_NUMBER = Code("2", "RFC-3881", "Patient Number")
_URI = Code("12", "RFC-3881", "URI")
_STUDY_INSTANCE_UID = dcm("110180", "Study Instance UID")
_SOP_CLASS_UID = dcm("110181", "SOP Class UID")
_STUDY_ROOT_FIND = "1.2.840.10008.5.1.4.1.2.2.1"
_ACT_REASON = "2.16.840.1.113883.5.8"  # HL7 v3 ActReason, of which PurposeOfUse is a part
# XML 1.0, 2.2: what no document may hold, written in any way.
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Reporter:
    """Who reports: this installation's API origin, and its site."""

    base_url: str
    site: str

    @property
    def host(self) -> str:
        """The name of the API origin, which every process of the installation has in common."""
        return urlsplit(self.base_url).hostname or "lightbox"


def audit_message(record: AuditRecord, known: Known, reporter: Reporter) -> bytes:
    """The XML of a record, in UTF-8. Its last object names the record by its id, by which a
    receiver can tell a message that came twice."""
    studies = studies_of(record)
    event = event_of(record, has_study=bool(studies), is_link=is_link(record))
    message = Element("AuditMessage")
    _event_identification(message, record, event)
    _participants(message, record, event, reporter)
    _source(message, reporter)
    if record.patient_id is not None:
        _patient(message, record, known)
    for uid in studies:
        _study(message, record, known, uid)
    if record.order_id is not None:
        _order(message, record, known)
    if event.id == AUDIT_LOG_USED:
        _audit_log(message, reporter)
    if event.id == QUERY:
        _query(message, known.query(record) or {})
    if event.id == SECURITY_ALERT:
        _alert(message, record, reporter)
    _record(message, record)
    xml: bytes = tostring(message, encoding="utf-8", xml_declaration=True)
    return xml


def text_of_time(moment: datetime) -> str:
    """A time as xsd:dateTime and RFC 5424 have it, in UTC."""
    naive = moment.astimezone(UTC).replace(tzinfo=None)
    return naive.isoformat(timespec="microseconds") + "Z"


def _clean(text: str) -> str:
    """Text that XML can hold: what it can't is replaced."""
    return _NOT_XML.sub("\ufffd", text)


def _coded(parent: Element, tag: str, code: Code) -> None:
    SubElement(
        parent,
        tag,
        {
            "csd-code": _clean(code.value),
            "codeSystemName": code.system,
            "originalText": _clean(code.meaning),
        },
    )


def _base64(value: str) -> str:
    return base64.b64encode(value.encode("utf-8", "backslashreplace")).decode("ascii")


# ------------------------------------------------------------------------------- event, and who


def _event_identification(message: Element, record: AuditRecord, event: Event) -> None:
    identification = SubElement(
        message,
        "EventIdentification",
        EventActionCode=event.action,
        EventDateTime=text_of_time(record.at),
        EventOutcomeIndicator=outcome_indicator(record),
    )
    _coded(identification, "EventID", event.id)
    if event.type is not None:
        _coded(identification, "EventTypeCode", event.type)
    _coded(identification, "EventTypeCode", ours(record.action))
    _coded(identification, "EventTypeCode", ours(record.outcome))
    if record.purpose_of_use:
        meaning = "break the glass" if record.purpose_of_use == "BTG" else record.purpose_of_use
        code = Code(record.purpose_of_use, _ACT_REASON, meaning)
        _coded(identification, "EventTypeCode", code)
    problem = str(json.loads(record.detail).get("problem", ""))
    if said := ": ".join(each for each in (record.reason, problem) if each):
        SubElement(identification, "EventOutcomeDescription").text = _clean(said)


def _participants(message: Element, record: AuditRecord, event: Event, reporter: Reporter) -> None:
    """The person, who asked if one is known, and this application."""
    person = record.actor or str(json.loads(record.detail).get("viewer", ""))
    of_person, of_application = _roles(event)
    if person or record.client_address:
        participant = SubElement(
            message,
            "ActiveParticipant",
            UserID=_clean(person) or "unknown",
            UserIsRequestor=str(bool(record.actor or record.client_address)).lower(),
        )
        if address := record.client_address:
            participant.set("NetworkAccessPointID", _clean(address))
            participant.set("NetworkAccessPointTypeCode", _access_point_type(address))
        for code in of_person:
            _coded(participant, "RoleIDCode", code)
        for role in filter(None, record.actor_roles.split(",")):
            _coded(participant, "RoleIDCode", ours(role))
    participant = SubElement(
        message,
        "ActiveParticipant",
        UserID=reporter.base_url,
        UserName="Lightbox",
        UserIsRequestor=str(not (record.actor or record.client_address)).lower(),
        NetworkAccessPointID=reporter.host,
        NetworkAccessPointTypeCode=_access_point_type(reporter.host),
    )
    _coded(participant, "RoleIDCode", of_application)


def _roles(event: Event) -> tuple[list[Code], Code]:
    """What the person's end and what the application is in an event: where data or a question
    goes from one to the other, its source and its destination."""
    if event.id == QUERY or (event.id == INSTANCES_TRANSFERRED and event.action == "C"):
        return [_SOURCE], _DESTINATION
    if event.id == INSTANCES_TRANSFERRED:
        return [_DESTINATION], _SOURCE
    return [], _APPLICATION


def _access_point_type(address: str) -> str:
    """`2` an IP address, `1` a name."""
    try:
        ip_address(address)
    except ValueError:
        return "1"
    return "2"


def _source(message: Element, reporter: Reporter) -> None:
    source = SubElement(
        message,
        "AuditSourceIdentification",
        AuditEnterpriseSiteID=_clean(reporter.site),
        AuditSourceID=reporter.host,
    )
    SubElement(source, "AuditSourceTypeCode", {"csd-code": "4"})  # application server process


# ----------------------------------------------------------------------------------------- what


def _object(
    message: Element,
    identifier: str,
    code: Code,
    *,
    type_code: str,
    role: str,
    name: str = "",
    query: str | None = None,
    detail: Mapping[str, str] | None = None,
) -> Element:
    """A participant object; by the schema it has a name or a query, never both."""
    element = SubElement(
        message,
        "ParticipantObjectIdentification",
        ParticipantObjectID=_clean(identifier),
        ParticipantObjectTypeCode=type_code,
        ParticipantObjectTypeCodeRole=role,
    )
    _coded(element, "ParticipantObjectIDTypeCode", code)
    if query is None:
        SubElement(element, "ParticipantObjectName").text = _clean(name)
    else:
        SubElement(element, "ParticipantObjectQuery").text = _base64(query)
    for kind, value in (detail or {}).items():
        if value:
            SubElement(element, "ParticipantObjectDetail", type=kind, value=_base64(value))
    return element


def _patient(message: Element, record: AuditRecord, known: Known) -> None:
    """By MRN; by our own id where the patient is no longer known."""
    patient = known.patient(record)
    detail = {"patient_id": str(record.patient_id)}
    if patient is None:
        _object(
            *(message, str(record.patient_id), ours("patient_id")),
            type_code="1",
            role="1",
            name="unknown",
        )
        return
    _object(
        *(message, patient.mrn, _PATIENT_NUMBER),
        type_code="1",
        role="1",
        name=patient.name,
        detail=detail | {"IssuerOfPatientID": patient.mrn_issuer},
    )


def _study(message: Element, record: AuditRecord, known: Known, uid: str) -> None:
    study = known.study(record, uid)
    element = _object(
        *(message, uid, _STUDY_INSTANCE_UID),
        type_code="2",
        role="3",
        name=study.description if study else "",
        detail={"StudyDate": study.study_date if study else ""},
    )
    classes: Mapping[str, int] = study.sop_classes if study else {}
    deleted = json.loads(record.detail).get("instance_count")
    if not classes and not isinstance(deleted, int):
        return
    # PS3.15 A.5.2: an accession number stands there only together with SOP classes.
    description = SubElement(element, "ParticipantObjectDescription")
    if study and study.accession_number:
        SubElement(description, "Accession", Number=_clean(study.accession_number))
    for sop_class, number in sorted(classes.items()):
        SubElement(description, "SOPClass", UID=sop_class, NumberOfInstances=str(number))
    if not classes:
        SubElement(description, "SOPClass", NumberOfInstances=str(deleted))


def _order(message: Element, record: AuditRecord, known: Known) -> None:
    assert record.order_id is not None
    number = known.accession_numbers.get(record.order_id, "")
    _object(
        *(message, str(record.order_id), ours("order_id")),
        type_code="2",
        role="3",
        name=number or "order",
        detail={"AccessionNumber": number},
    )


def _audit_log(message: Element, reporter: Reporter) -> None:
    uri = f"{reporter.base_url}/api/v1/audit"
    _object(message, uri, _URI, type_code="2", role="13", name="Security Audit Log")


def _query(message: Element, query: Mapping[str, Any]) -> None:
    """What was searched by: HTTP parameters, where the standard has a C-FIND's data set."""
    asked = "?" + urlencode(query, doseq=True)
    detail = {"QueryEncoding": "application/x-www-form-urlencoded"}
    _object(
        *(message, _STUDY_ROOT_FIND, _SOP_CLASS_UID),
        type_code="2",
        role="3",
        query=asked,
        detail=detail,
    )


def _alert(message: Element, record: AuditRecord, reporter: Reporter) -> None:
    """What the alert is about (A.5.3.11): this node, and what was tried or done at it."""
    said = f"{record.action} {record.outcome}"
    _object(
        *(message, reporter.base_url, _URI),
        type_code="2",
        role="13",
        name=record.action,
        detail={"Alert Description": f"{said}: {record.reason}" if record.reason else said},
    )


def _record(message: Element, record: AuditRecord) -> None:
    """The record itself. `detail` is not repeated: it can be long, and is read by the id."""
    detail = json.loads(record.detail)
    by = detail.get("by", [])
    kept = {
        "request_id": record.request_id,
        "ctx": record.ctx,
        "by": "; ".join(map(str, by)) if isinstance(by, list) else "",
        "sha256": record.sha256,
    }
    if record.outcome == Outcome.DENIED:
        kept["path"] = str(detail.get("path", ""))
    _object(
        *(message, str(record.id), ours("audit_record")),
        type_code="2",
        role="13",
        name="audit record",
        detail=kept,
    )
