"""The other resources: Bundle, OperationOutcome, CapabilityStatement."""

from collections.abc import Mapping, Sequence
from typing import Any

from app.fhir.codes import BALP, Json, Kind, coding
from app.fhir.search import PARAMETERS

PROBLEM_SYSTEM = "urn:lightbox:problem"
_ISSUES: Mapping[int, str] = {
    400: "invalid",
    401: "login",
    403: "forbidden",
    404: "not-found",
    405: "not-supported",
    406: "not-supported",
    409: "conflict",
    410: "deleted",
    413: "too-long",
    415: "not-supported",
    429: "throttled",
    503: "transient",
}


def operation_outcome(status: int, slug: str, title: str, detail: str) -> Json:
    """What went wrong, with the word of our own problem type as its code."""
    return {
        "resourceType": "OperationOutcome",
        "issue": [
            {
                "severity": "error",
                "code": _ISSUES.get(status, "exception"),
                "details": {"coding": [coding(PROBLEM_SYSTEM, slug)], "text": title},
                "diagnostics": detail,
            }
        ],
    }


def searchset(events: Sequence[Json], base_url: str, self_url: str, next_url: str | None) -> Json:
    """A page of a search. It has no `total`: counting a trail takes as long as reading it."""
    links = [{"relation": "self", "url": self_url}]
    if next_url is not None:
        links.append({"relation": "next", "url": next_url})
    bundle: Json = {"resourceType": "Bundle", "type": "searchset", "link": links}
    if events:
        bundle["entry"] = [
            {
                "fullUrl": f"{base_url}/AuditEvent/{each['id']}",
                "resource": each,
                "search": {"mode": "match"},
            }
            for each in events
        ]
    return bundle


def capability_statement(base_url: str, version: str) -> Json:
    """What this FHIR API can do."""
    profiles = [
        f"{BALP}/StructureDefinition/IHE.BasicAudit.{subject}{kind.value.profile}"
        for kind in Kind
        if kind.value.profile
        for subject in ("", "Patient")
    ]
    resource: dict[str, Any] = {
        "type": "AuditEvent",
        "supportedProfile": profiles,
        "documentation": "The audit trail. A record never changes: there is one version of it.",
        "interaction": [{"code": "read"}, {"code": "search-type"}],
        "versioning": "no-version",
        "searchParam": [
            {"name": each.name, "type": each.type, "documentation": each.documentation}
            for each in PARAMETERS
            if each.documentation
        ],
    }
    return {
        "resourceType": "CapabilityStatement",
        "url": f"{base_url}/metadata",
        "version": version,
        "name": "Lightbox",
        "status": "active",
        "date": "2026-11-21",
        "kind": "instance",
        "software": {"name": "Lightbox", "version": version},
        "implementation": {"description": "Lightbox", "url": base_url},
        "fhirVersion": "4.0.1",
        "format": ["application/fhir+json", "json"],
        "rest": [
            {
                "mode": "server",
                "security": {
                    "description": "A bearer token of the hospital's identity provider, with the "
                    "role auditor. Every request is recorded in the trail itself."
                },
                "resource": [resource],
            }
        ],
    }
