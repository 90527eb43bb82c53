"""What the standards ask of an audit message and of an AuditEvent, as tables to check against.

`schema_faults` is the schema of DICOM PS3.15 A.5.1 (RELAX NG there), said as one row an element;
`balp_faults` the must-haves of IHE BALP's RESTful profiles. Both return sentences; none is good.
"""

import base64
import binascii
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from xml.etree.ElementTree import Element

# --------------------------------------------------------------------- PS3.15 A.5.1, by element

Check = Callable[[str], bool]


def token(text: str) -> bool:
    return True


def boolean(text: str) -> bool:
    return text in ("true", "false", "1", "0")


def integer(text: str) -> bool:
    return re.fullmatch(r"[+-]?[0-9]+", text) is not None


def base64_binary(text: str) -> bool:
    try:
        base64.b64decode(text, validate=True)
    except binascii.Error:
        return False
    return True


def date_time(text: str) -> bool:
    """With its zone, as A.5.2.5 wants it."""
    try:
        return datetime.fromisoformat(text).tzinfo is not None and "T" in text
    except ValueError:
        return False


def one_of(first: int, last: int) -> Check:
    return lambda text: text in {str(each) for each in range(first, last + 1)}


@dataclass(frozen=True)
class Row:
    """An element: its children as a pattern over their names (each followed by a space), its
    attributes, and its text, which only an element without children may have."""

    children: str = ""
    required: Mapping[str, Check] = field(default_factory=dict)
    optional: Mapping[str, Check] = field(default_factory=dict)
    text: Check | None = None


CODED = Row(
    required={"csd-code": token, "codeSystemName": token, "originalText": token},
    optional={"displayName": token},
)
UID = Row(required={"UID": token})
SCHEMA: Mapping[str, Row] = {
    "AuditMessage": Row(
        "EventIdentification (ActiveParticipant )+AuditSourceIdentification "
        "(ParticipantObjectIdentification )*"
    ),
    "EventIdentification": Row(
        "EventID (EventTypeCode )*(EventOutcomeDescription )?",
        required={
            "EventDateTime": date_time,
            "EventOutcomeIndicator": lambda text: text in ("0", "4", "8", "12"),
        },
        optional={"EventActionCode": lambda text: text in tuple("CRUDE")},
    ),
    "EventID": CODED,
    "EventTypeCode": CODED,
    "EventOutcomeDescription": Row(text=token),
    "ActiveParticipant": Row(
        "(RoleIDCode )*(MediaIdentifier )?",
        required={"UserID": token, "UserIsRequestor": boolean},
        optional={
            "AlternativeUserID": token,
            "UserName": token,
            "NetworkAccessPointID": token,
            "NetworkAccessPointTypeCode": one_of(1, 5),
        },
    ),
    "RoleIDCode": CODED,
    "MediaIdentifier": Row("MediaType "),
    "MediaType": CODED,
    "AuditSourceIdentification": Row(
        "(AuditSourceTypeCode )*",
        required={"AuditSourceID": token},
        optional={"AuditEnterpriseSiteID": token},
    ),
    # One of the nine codes alone, or any with its system.
    "AuditSourceTypeCode": Row(
        required={"csd-code": token},
        optional={"codeSystemName": token, "originalText": token, "displayName": token},
    ),
    "ParticipantObjectIdentification": Row(
        "ParticipantObjectIDTypeCode (ParticipantObjectName |ParticipantObjectQuery )"
        "(ParticipantObjectDetail )*(ParticipantObjectDescription )*",
        required={"ParticipantObjectID": token},
        optional={
            "ParticipantObjectTypeCode": one_of(1, 4),
            "ParticipantObjectTypeCodeRole": one_of(1, 26),
            "ParticipantObjectDataLifeCycle": one_of(1, 15),
            "ParticipantObjectSensitivity": token,
        },
    ),
    "ParticipantObjectIDTypeCode": CODED,
    "ParticipantObjectName": Row(text=token),
    "ParticipantObjectQuery": Row(text=base64_binary),
    "ParticipantObjectDetail": Row(required={"type": token, "value": base64_binary}),
    "ParticipantObjectDescription": Row(
        "(MPPS )*(Accession )*(SOPClass )*(ParticipantObjectContainsStudy )?"
        "(Encrypted )?(Anonymized )?"
    ),
    "MPPS": UID,
    "Accession": Row(required={"Number": token}),
    "SOPClass": Row(
        "(Instance )*", required={"NumberOfInstances": integer}, optional={"UID": token}
    ),
    "Instance": UID,
    "ParticipantObjectContainsStudy": Row("(StudyIDs )*"),
    "StudyIDs": UID,
    "Encrypted": Row(text=boolean),
    "Anonymized": Row(text=boolean),
}


def schema_faults(message: Element) -> list[str]:
    """What the schema does not allow in a message."""
    start = [] if message.tag == "AuditMessage" else [f"the root is {message.tag}"]
    return start + list(_faults(message))


def _faults(element: Element) -> Iterator[str]:
    row = SCHEMA.get(element.tag)
    if row is None:
        yield f"there is no element {element.tag}"
        return
    names = "".join(f"{child.tag} " for child in element)
    if not re.fullmatch(row.children, names):
        yield f"{element.tag} has the children {names or 'none'}"
    known = {**row.required, **row.optional}
    yield from (f"{element.tag} lacks {name}" for name in row.required.keys() - element.keys())
    for name, value in element.items():
        if name not in known:
            yield f"{element.tag} has {name}"
        elif not known[name](value):
            yield f"{element.tag}/@{name} is {value!r}"
    if element.tag == "AuditSourceTypeCode" and not element.get("codeSystemName"):
        code = element.get("csd-code", "")
        if not one_of(1, 9)(code):
            yield f"AuditSourceTypeCode {code} has no system"
    text = element.text or ""
    if row.text is None and text.strip():
        yield f"{element.tag} has text"
    if row.text is not None and not row.text(text):
        yield f"{element.tag} says {text!r}"
    if (element.tail or "").strip():
        yield f"text behind {element.tag}"
    for child in element:
        yield from _faults(child)


# ---------------------------------------------------- PS3.15 A.5.3: what an event has to name

PATIENT, STUDY, SECURITY = ("1", "1"), ("2", "3"), ("2", "13")
"""ParticipantObjectTypeCode and its role."""
MUST_NAME: Mapping[str, tuple[tuple[str, str], ...]] = {
    "110100": (),
    "110101": (SECURITY,),
    "110103": (STUDY, PATIENT),
    "110104": (STUDY, PATIENT),
    "110105": (STUDY, PATIENT),
    "110109": (PATIENT,),
    "110110": (PATIENT,),
    "110112": (STUDY,),
    "110113": (SECURITY,),
    "110114": (),
}
ACTIONS: Mapping[str, str] = {
    "110100": "E",
    "110101": "R",
    "110103": "CRUD",
    "110104": "CRU",
    "110105": "D",
    "110109": "CRUD",
    "110110": "CRUD",
    "110112": "E",
    "110113": "E",
    "110114": "E",
}
NEEDS_A_TYPE = {"110100", "110113", "110114"}
ENDS = {"110104", "110112"}
"""Events between two ends: a source (110153) and a destination (110152)."""


def event_faults(message: Element) -> list[str]:
    """What A.5.3 misses in a message of one of its events; of others nothing is known."""
    event = message.find("EventIdentification/EventID")
    assert event is not None
    code = event.get("csd-code", "")
    if event.get("codeSystemName") != "DCM":
        return []
    identification = message.find("EventIdentification")
    assert identification is not None
    objects = [
        (each.get("ParticipantObjectTypeCode"), each.get("ParticipantObjectTypeCodeRole"))
        for each in message.iter("ParticipantObjectIdentification")
    ]
    roles = [each.get("csd-code") for each in message.iter("RoleIDCode")]
    faults = [f"{code} names no {each}" for each in MUST_NAME[code] if each not in objects]
    if identification.get("EventActionCode", "") not in tuple(ACTIONS[code]):
        faults.append(f"{code} with action {identification.get('EventActionCode')}")
    if code in NEEDS_A_TYPE and not any(
        each.get("codeSystemName") == "DCM" for each in message.iter("EventTypeCode")
    ):
        faults.append(f"{code} has no type")
    if code in ENDS:
        faults += [f"{code} has no {end}" for end in ("110152", "110153") if end not in roles]
    requestors = [
        each for each in message.iter("ActiveParticipant") if each.get("UserIsRequestor") == "true"
    ]
    if len(requestors) > 1:
        faults.append("several asked")
    if len([each for each in objects if each == PATIENT]) > 1:
        faults.append("more than one patient")
    return faults


# ------------------------------------------------------------------------------ IHE BALP 1.1

DCM = "http://dicom.nema.org/resources/ontology/DCM"
PARTICIPATION = "http://terminology.hl7.org/CodeSystem/v3-ParticipationType"
CUSTODIAN = ("http://terminology.hl7.org/CodeSystem/provenance-participant-type", "custodian")
SOURCE, DESTINATION, APPLICATION = (DCM, "110153"), (DCM, "110152"), (DCM, "110150")
RECIPIENT = {(PARTICIPATION, "IRCP")}
DATA_SOURCES = {(PARTICIPATION, "AUT"), (PARTICIPATION, "INF"), (PARTICIPATION, "CST")}
ENTITY_TYPE = "http://terminology.hl7.org/CodeSystem/audit-entity-type"
OBJECT_ROLE = "http://terminology.hl7.org/CodeSystem/object-role"
XREQUEST = ("https://profiles.ihe.net/ITI/BALP/CodeSystem/BasicAuditEntityType", "XrequestId")


@dataclass(frozen=True)
class Profile:
    """subtypes, action, type of client and server, types a user may have."""

    subtypes: frozenset[str]
    action: str
    client: tuple[str, str]
    server: tuple[str, str]
    users: set[tuple[str, str]]


PROFILES: Mapping[str, Profile] = {
    "Read": Profile(frozenset({"read", "vread"}), "R", DESTINATION, SOURCE, RECIPIENT),
    "Query": Profile(
        frozenset({"search", "search-type", "search-system"}), "E", SOURCE, DESTINATION, RECIPIENT
    ),
    "Create": Profile(frozenset({"create"}), "C", SOURCE, DESTINATION, DATA_SOURCES),
    "Update": Profile(frozenset({"update", "patch"}), "U", SOURCE, DESTINATION, DATA_SOURCES),
    "Delete": Profile(frozenset({"delete"}), "D", APPLICATION, CUSTODIAN, DATA_SOURCES),
}
BASE = "https://profiles.ihe.net/ITI/BALP/StructureDefinition/IHE.BasicAudit."


def _pair(coding: Mapping[str, Any]) -> tuple[str, str]:
    return coding.get("system", ""), coding.get("code", "")


def balp_faults(event: Mapping[str, Any]) -> list[str]:
    """What is missing of the profile that an event claims; nothing for one that claims none."""
    claimed = event["meta"].get("profile", [])
    if not claimed:
        return []
    (url,) = claimed
    name = url.removeprefix(BASE)
    of_patient = name.startswith("Patient")
    name = name.removeprefix("Patient")
    return [*_of_event(event, PROFILES[name]), *_of_entities(event, name, of_patient)]


def _of_event(event: Mapping[str, Any], profile: Profile) -> Iterator[str]:
    if _pair(event["type"]) != (
        "http://terminology.hl7.org/CodeSystem/audit-event-type",
        "rest",
    ):
        yield "type"
    rest = [
        each["code"]
        for each in event["subtype"]
        if each["system"] == "http://hl7.org/fhir/restful-interaction"
    ]
    if len(rest) != 1 or rest[0] not in profile.subtypes:
        yield f"subtype {rest}"
    if event["action"] != profile.action:
        yield f"action {event['action']}"
    if event.get("outcome") != "0":
        yield f"outcome {event.get('outcome')}"
    agents: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for agent in event["agent"]:
        agents.setdefault(_pair(agent["type"]["coding"][0]), []).append(agent)
    for end, kind in (("client", profile.client), ("server", profile.server)):
        found = agents.pop(kind, [])
        if len(found) != 1:
            yield f"{len(found)} {end}s"
        for agent in found:
            if not agent.get("who") or not agent.get("network") or "media" in agent:
                yield f"{end}: {agent}"
    for kind, users in agents.items():
        if kind not in profile.users or len(users) != 1:
            yield f"agent {kind}"
        for user in users:
            if user["requestor"] is not True or not user.get("who"):
                yield f"user {user}"
            if "network" in user or "media" in user or not user.get("name"):
                yield f"user {user}"
    if not event["source"].get("observer"):
        yield "source"


def _of_entities(event: Mapping[str, Any], name: str, of_patient: bool) -> Iterator[str]:
    kinds: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for entity in event["entity"]:
        kinds.setdefault(_pair(entity["type"]), []).append(entity)
    for entity in kinds.get(XREQUEST, []):
        if not entity["what"]["identifier"]["value"]:
            yield "X-Request-Id"
    objects, patients = kinds.get((ENTITY_TYPE, "2"), []), kinds.get((ENTITY_TYPE, "1"), [])
    if len(objects) != 1:
        yield f"{len(objects)} objects"
        return
    (data,) = objects
    if name == "Query":
        if _pair(data.get("role", {})) != (OBJECT_ROLE, "24") or not data.get("query"):
            yield f"query {data}"
        elif not base64_binary(data["query"]):
            yield "the query is not base64"
        if {"what", "lifecycle", "detail"} & data.keys():
            yield f"query {data}"
    else:
        if not data.get("what"):
            yield f"data {data}"
        if _pair(data.get("role", {})) not in {(OBJECT_ROLE, each) for each in ("3", "4", "20")}:
            yield f"role of data {data.get('role')}"
    if len(patients) != (1 if of_patient else 0):
        yield f"{len(patients)} patients"
    for patient in patients:
        if _pair(patient.get("role", {})) != (OBJECT_ROLE, "1"):
            yield "role of patient"
        if not re.fullmatch(r"Patient/[A-Za-z0-9.-]{1,64}", patient["what"].get("reference", "")):
            yield f"patient {patient}"
    if (name != "Query" or of_patient) and len(event["entity"]) < (2 if of_patient else 1):
        yield "too few entities"
