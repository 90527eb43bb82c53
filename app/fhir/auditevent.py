"""One audit record as a FHIR R4 AuditEvent.

A profile of BALP is claimed (`meta.profile`) where the event is of its kind and succeeded: a read
or a search that was granted, a change that was done. BALP has no profile for what was refused or
failed, nor for the decision that comes before a change; those have the same shape and claim none.
"""

import base64
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlencode

from app.audit import Action, Outcome
from app.audit.known import Known, is_link, studies_of
from app.fhir import codes
from app.fhir.codes import CHANGES, Json, Kind, coding, kind_of, outcome_code
from app.models import AuditRecord


@dataclass(frozen=True)
class Server:
    """This installation: its API origin, its site, and who issues its tokens (a URL, or empty)."""

    base_url: str
    site: str
    token_issuer: str = ""


def audit_event(record: AuditRecord, known: Known, server: Server) -> Json:
    """The AuditEvent of a record, with what is known of those that it names."""
    kind = kind_of(record.action, record.outcome, is_link=is_link(record))
    outcome = outcome_code(record.action, record.outcome)
    shape = kind.value
    query = known.query(record) if kind is Kind.QUERY else None
    event: Json = {
        "resourceType": "AuditEvent",
        "id": str(record.id),
        "meta": {"lastUpdated": instant(record.at)},
        "type": shape.type,
        "subtype": [
            shape.subtype,
            coding(codes.ACTION_SYSTEM, record.action),
            coding(codes.OUTCOME_SYSTEM, record.outcome),
        ],
        "action": shape.action,
        "recorded": instant(record.at),
        "outcome": outcome,
    }
    if profile := _profile(record, kind, outcome, query):
        event["meta"]["profile"] = [profile]
    if said := _outcome_description(record, kind):
        event["outcomeDesc"] = said
    if record.purpose_of_use:
        event["purposeOfEvent"] = [_purpose(record.purpose_of_use)]
    event["agent"] = list(_agents(record, kind, server))
    event["source"] = {
        "site": server.site,
        "observer": _device(server),
        "type": [coding(codes.SOURCE_TYPE, "4", "Application Server")],
    }
    event["entity"] = list(_entities(record, kind, known, query))
    return event


def instant(moment: datetime) -> str:
    """A time as FHIR's `instant`, in UTC."""
    naive = moment.astimezone(UTC).replace(tzinfo=None)
    return naive.isoformat(timespec="microseconds") + "Z"


def _profile(record: AuditRecord, kind: Kind, outcome: str, query: Mapping[str, Any] | None) -> str:
    """The canonical address of the BALP profile that the event keeps; empty: none."""
    name = kind.value.profile
    if not name or outcome != "0":
        return ""
    if kind in CHANGES and record.outcome != Outcome.DONE:
        return ""
    if kind is Kind.QUERY and query is None:
        return ""
    subject = "Patient" if record.patient_id else ""
    return f"{codes.BALP}/StructureDefinition/IHE.BasicAudit.{subject}{name}"


def _outcome_description(record: AuditRecord, kind: Kind) -> str:
    problem = json.loads(record.detail).get("problem", "")
    said = ": ".join(each for each in (record.reason, str(problem)) if each)
    if said or record.outcome != Outcome.GRANTED:
        return said
    if record.action == Action.GLASS_BREAK:
        return "granted; a glass that was broken has a record of its own, done"
    if kind in CHANGES or (record.action == Action.STUDY_VIEW and kind is Kind.OPERATION):
        return "granted; what became of it has a record of its own with the same X-Request-Id"
    return said


def _purpose(code: str) -> Json:
    display = "break the glass" if code == "BTG" else ""
    return {"coding": [coding(codes.ACT_REASON, code, display)]}


# ------------------------------------------------------------------------------------------ who


def _agents(record: AuditRecord, kind: Kind, server: Server) -> Iterator[Json]:
    """Client, server, and the person, in that order. Who asked is the person, if one is known."""
    shape = kind.value
    here = {"address": server.base_url, "type": "5"}
    address = record.client_address
    yield {
        "type": {"coding": [shape.client]},
        "who": {"display": address} if address else _device(server),
        "requestor": not record.actor,
        "network": {"address": address, "type": network_type(address)} if address else here,
    }
    yield {
        "type": {"coding": [shape.server]},
        "who": _device(server),
        "requestor": False,
        "network": here,
    }
    person = record.actor
    if kind is Kind.LOGOUT and not person:  # a session that ended by itself: whose it was
        person = json.loads(record.detail).get("viewer", "")
    if not person:
        return
    user: Json = {"type": {"coding": [shape.user]}}
    if record.actor_roles:
        roles = record.actor_roles.split(",")
        user["role"] = [{"coding": [coding(codes.ROLE_SYSTEM, role)]} for role in roles]
    issuer = {"system": server.token_issuer} if server.token_issuer else {}
    user["who"] = {"identifier": {**issuer, "value": str(person)}}
    user["name"] = str(person)
    user["requestor"] = bool(record.actor)
    if record.purpose_of_use:
        user["purposeOfUse"] = [_purpose(record.purpose_of_use)]
    yield user


def network_type(address: str) -> str:
    """FHIR's and PS3.15's type of a network access point: `2` an IP address, `1` a name."""
    try:
        ip_address(address)
    except ValueError:
        return "1"
    return "2"


def _device(server: Server) -> Json:
    identifier = {"system": "urn:ietf:rfc:3986", "value": server.base_url}
    return {"type": "Device", "identifier": identifier, "display": "Lightbox"}


# ----------------------------------------------------------------------------------------- what


def _entities(
    record: AuditRecord, kind: Kind, known: Known, query: Mapping[str, Any] | None
) -> Iterator[Json]:
    yield _transaction(record)
    if record.patient_id is not None:
        yield {
            "what": _patient(record, known),
            "type": coding(codes.ENTITY_TYPE, "1", "Person"),
            "role": coding(codes.OBJECT_ROLE, "1", "Patient"),
        }
    uids = studies_of(record)
    if query is not None:
        yield {
            "type": coding(codes.ENTITY_TYPE, "2", "System Object"),
            "role": coding(codes.OBJECT_ROLE, "24", "Query"),
            "query": base64.b64encode(query_string(query).encode()).decode(),
        }
    else:
        # BALP wants one object of this type, no more.
        yield {
            "what": _data(record, known, uids),
            "type": coding(codes.ENTITY_TYPE, "2", "System Object"),
            "role": coding(codes.OBJECT_ROLE, "4", "Domain Resource"),
        }
        uids = uids[1:]
    for uid in uids:
        yield {
            "what": _study(record, known, uid),
            "type": coding(codes.RESOURCE_TYPE, "ImagingStudy", "ImagingStudy"),
        }
    if record.order_id is not None:
        yield {
            "what": _order(record, known),
            "type": coding(codes.RESOURCE_TYPE, "ServiceRequest", "ServiceRequest"),
        }


def query_string(query: Mapping[str, Any]) -> str:
    """A search as it was asked, beginning with `?`."""
    return "?" + urlencode(query, doseq=True)


def _transaction(record: AuditRecord) -> Json:
    """The request, and all that our own record says beyond FHIR."""
    detail = json.loads(record.detail)
    said = {"ctx": record.ctx, "sha256": record.sha256}
    said |= {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in detail.items()
        if name != "query"
    }
    entity: Json = {
        "what": {"identifier": {"value": record.request_id}},
        "type": coding(codes.BALP_ENTITY_TYPE, "XrequestId"),
    }
    details = [{"type": name, "valueString": text} for name, text in said.items() if text.strip()]
    return entity | ({"detail": details} if details else {})


def _data(record: AuditRecord, known: Known, uids: list[str]) -> Json:
    """What it was done to: the study, else the order, else the patient, else what it is called."""
    if uids:
        return _study(record, known, uids[0])
    if record.order_id is not None:
        return _order(record, known)
    if record.patient_id is not None:
        return _patient(record, known)
    return {"identifier": {"system": codes.ACTION_SYSTEM, "value": record.action}}


def _patient(record: AuditRecord, known: Known) -> Json:
    what: Json = {"reference": f"Patient/{record.patient_id}", "type": "Patient"}
    if patient := known.patient(record):
        identifier: Json = {
            "type": {"coding": [coding(codes.IDENTIFIER_TYPE, "MR", "Medical record number")]},
            "value": patient.mrn,
        }
        if patient.mrn_issuer:
            identifier["assigner"] = {"display": patient.mrn_issuer}
        what["identifier"] = identifier
    return what


def _study(record: AuditRecord, known: Known, uid: str) -> Json:
    study = known.study(record, uid)
    shown = {"display": study.description} if study and study.description else {}
    identifier = {"system": codes.UID_SYSTEM, "value": f"urn:oid:{uid}"}
    return {"type": "ImagingStudy", "identifier": identifier, **shown}


def _order(record: AuditRecord, known: Known) -> Json:
    what: Json = {"reference": f"ServiceRequest/{record.order_id}", "type": "ServiceRequest"}
    assert record.order_id is not None
    if number := known.accession_numbers.get(record.order_id):
        kind = coding(codes.IDENTIFIER_TYPE, "ACSN", "Accession ID")
        what["identifier"] = {"type": {"coding": [kind]}, "value": number}
    return what
