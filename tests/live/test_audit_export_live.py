"""The trail's ways out, through the edge: addresses, media types, and on a real database."""

import csv
import io

from fhir.resources.R4B.bundle import Bundle

from tests.audit_schema import balp_faults
from tests.images import ct_image
from tests.live.conftest import Edged, make_person


async def test_every_form_passes_the_edge(through_edge: Edged) -> None:
    api = through_edge
    person = await make_person(api)
    image = ct_image(patient_id=person.mrn)
    study = (await api.upload(image, order_id=person.order["id"])).json()["study_instance_uid"]
    opened = await api.open(f"/order/{person.order['id']}")
    await opened.get(f"/studies/{study}/series")
    metadata = await api.ask(None, "GET", "/fhir/R4/metadata")
    assert metadata.headers["content-type"] == "application/fhir+json"
    found = await api.ask(
        "auditor", "GET", "/fhir/R4/AuditEvent", params={"patient": person.patient["id"]}
    )
    assert found.headers["content-type"] == "application/fhir+json"
    assert Bundle.model_validate(found.json()).type == "searchset"
    events = [each["resource"] for each in found.json()["entry"]]
    assert [fault for each in events for fault in balp_faults(each)] == []
    assert any(f"urn:oid:{study}" in str(each["entity"]) for each in events)
    one = await api.client.get(
        found.json()["entry"][0]["fullUrl"],
        headers={"Authorization": f"Bearer {api.token('auditor')}"},
    )
    assert one.json() == events[0]
    table = await api.ask(
        "auditor", "GET", "/api/v1/audit.csv", params={"patient_id": person.patient["id"]}
    )
    assert table.headers["content-disposition"] == 'attachment; filename="audit.csv"'
    lines = list(csv.DictReader(io.StringIO(table.content.decode("utf-8-sig"), newline="")))
    told = [each["id"] for each in lines if each["action"] != "audit:read"]  # this very one
    assert told == [each["id"] for each in events]
    path = f"/api/v1/patients/{person.patient['id']}/access-report"
    page = await api.ask("auditor", "GET", path, headers={"Accept": "text/html"})
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "images viewed" in page.text
    refused = await api.ask("clinician", "GET", "/fhir/R4/AuditEvent")
    assert (refused.status_code, refused.headers["content-type"]) == (403, "application/fhir+json")
