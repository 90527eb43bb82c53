"""The trail on real databases: complete, durable before the answer, and the condition for it."""

from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.engine import make_url

from tests.images import ct_image
from tests.lightbox import Lightbox
from tests.live.conftest import (
    DatabaseUrls,
    Edged,
    audit_of,
    make_person,
    unique,
)


class Switch:
    """Makes the trail unwritable, as a full disk or a wrong grant would, and writable again."""

    def __init__(self, database: DatabaseUrls) -> None:
        self.database = database

    def _execute(self, postgres: str, sqlite: str) -> None:
        if self.database.is_postgres:
            url = make_url(self.database.owner).set(drivername="postgresql")
            with psycopg.connect(url.render_as_string(hide_password=False)) as connection:
                connection.execute(postgres)
            return
        engine = sa.create_engine(self.database.sync_owner)
        with engine.begin() as connection_:
            connection_.execute(sa.text(sqlite))
        engine.dispose()

    def off(self) -> None:
        role = make_url(self.database.app).username
        self._execute(
            f"REVOKE INSERT ON audit_record FROM {role}",
            "CREATE TRIGGER broken BEFORE INSERT ON audit_record "
            "BEGIN SELECT RAISE(ABORT, 'no room'); END",
        )

    def on(self) -> None:
        role = make_url(self.database.app).username
        self._execute(f"GRANT INSERT ON audit_record TO {role}", "DROP TRIGGER broken")


async def test_no_record_no_answer(live: Lightbox, database: DatabaseUrls) -> None:
    """Nothing is shown, stored or deleted while the trail can't be written."""
    person = await make_person(live)
    uploaded = (
        await live.upload(ct_image(patient_id=person.mrn), order_id=person.order["id"])
    ).json()
    study = uploaded["study_instance_uid"]
    opened = await live.open(f"/order/{person.order['id']}")
    frame = (
        f"/studies/{study}/series/{uploaded['series_instance_uid']}"
        f"/instances/{uploaded['sop_instance_uid']}/frames/1"
    )
    requests: list[tuple[str | None, str, str]] = [
        ("clinician", "GET", f"/patients/{person.patient['id']}"),
        ("clinician", "GET", "/patients"),
        ("clinician", "GET", f"/orders/{person.order['id']}"),
        ("clinician", "GET", f"/dicom/studies/{study}"),
        ("clinician", "GET", "/dicom/studies"),
        ("clinician", "GET", f"/dicom/viewer/url/{study}"),
        ("admin", "GET", "/dicom/stats"),
        ("auditor", "GET", "/audit"),
        ("service", "DELETE", f"/dicom/studies/{study}?reason=a+mistake"),
        # Denials are recorded too: what can't be recorded is not even refused in words.
        ("admin", "GET", f"/dicom/studies/{study}"),
        (None, "GET", f"/dicom/studies/{study}"),
    ]
    switch = Switch(database)
    switch.off()
    for role, method, path in requests:
        answer = await live.ask(role, method, f"/api/v1{path}")
        assert answer.status_code == 503, (role, path)
        assert answer.json()["type"].endswith("audit-unavailable")
        assert person.mrn not in answer.text
    refused = await live.upload(ct_image(patient_id=person.mrn), order_id=person.order["id"])
    assert refused.status_code == 503
    first = await opened.get(frame)
    assert first.status_code == 503
    assert "x-accel-redirect" not in first.headers
    switch.on()
    assert (await opened.get(frame)).status_code == 200
    found = await live.must("clinician", "GET", f"/dicom/studies/{study}")
    assert found["NumberOfStudyRelatedInstances"] == 1


async def test_the_trail_tells_the_story(through_edge: Edged) -> None:
    """Who asked for what, was it granted, and what became of it; with the client's address."""
    api = through_edge
    person = await make_person(api)
    request_id = unique("request")
    answer = await api.ask(
        "technologist",
        "POST",
        "/api/v1/dicom/upload",
        files={"file": ("a.dcm", ct_image(patient_id=person.mrn))},
        data={"order_id": person.order["id"]},
        headers={"X-Request-ID": request_id, "X-Forwarded-For": "203.0.113.9"},
    )
    assert answer.headers["x-request-id"] == request_id
    study = answer.json()["study_instance_uid"]
    await api.ask("clinician", "GET", f"/api/v1/dicom/studies/{study}", sub="stranger")
    opened = await api.open(f"/order/{person.order['id']}")
    await opened.get(f"/studies/{study}/series")
    await opened.get(f"/studies/{study}/series")
    records = list(reversed(await api.audit(patient_id=person.patient["id"])))
    assert [(each["actor"], each["action"], each["outcome"]) for each in records] == [
        ("service", "patient:create", "done"),
        ("service", "order:create", "granted"),
        ("service", "order:create", "done"),
        ("technologist", "study:upload", "granted"),
        ("technologist", "study:upload", "done"),
        ("stranger", "study:read", "denied"),
        ("clinician", "study:view", "granted"),
        ("clinician", "study:view", "done"),
        ("clinician", "session:open", "granted"),
        ("clinician", "study:view", "granted"),
    ]
    by_request = [each for each in records if each["request_id"] == request_id]
    assert [each["outcome"] for each in by_request] == ["granted", "done"]
    assert {each["client_address"] for each in records} == {"127.0.0.1"}
    assert records[5]["reason"] == "no-relationship"
    assert records[-1]["ctx"] == opened.ctx


FILTERS: list[tuple[dict[str, str], int]] = [
    ({"actor": "nobody"}, 0),
    ({"action": "study:view"}, 4),
    ({"action": "study:view", "outcome": "denied"}, 2),
    ({"action": "study:view", "outcome": "denied", "actor": "stranger"}, 2),
    ({"from": "2100-01-01T00:00:00Z"}, 0),
    ({"to": "2000-01-01T00:00:00Z"}, 0),
]


def told(records: list[Any]) -> list[Any]:
    """Without the reading itself, which is of the patient too."""
    return [each for each in records if each["action"] != "audit:read"]


async def test_filters_and_pages(live: Lightbox) -> None:
    """By patient, study, actor, action and time; every record on exactly one page."""
    person = await make_person(live)
    uploaded = (
        await live.upload(ct_image(patient_id=person.mrn), order_id=person.order["id"])
    ).json()
    study = uploaded["study_instance_uid"]
    link = f"/api/v1/dicom/viewer/url/{study}"
    await live.ask("clinician", "GET", link)
    for _ in range(2):
        await live.ask("clinician", "GET", link, sub="stranger")
    patient = {"patient_id": person.patient["id"]}
    for filters, count in FILTERS:
        found = await live.audit(**patient, **filters)
        assert len(found) == count, filters
    of_study = await live.audit(study_instance_uid=study)
    assert {each["study_instance_uid"] for each in of_study} == {study}
    everything = told(await live.audit(**patient))
    seen: list[Any] = []
    path: str | None = f"/api/v1/audit?patient_id={person.patient['id']}&limit=3"
    while path:
        page = await live.ask("auditor", "GET", path)
        assert len(page.json()) <= 3
        seen += page.json()
        path = page.links.get("next", {}).get("url")
    assert [each["id"] for each in told(seen)] == [each["id"] for each in everything]
    middle = everything[len(everything) // 2]
    since = told(await live.audit(**patient, **{"from": middle["at"]}))
    before = told(await live.audit(**patient, to=middle["at"]))
    assert len(since) + len(before) == len(everything)
    assert middle["id"] in {each["id"] for each in since}


async def test_reading_the_trail_is_recorded(live: Lightbox) -> None:
    (granted, *_) = await live.must("auditor", "GET", "/audit?action=audit:read", sub="a.weiss")
    assert (granted["actor"], granted["outcome"]) == ("a.weiss", "granted")


@pytest.mark.parametrize("role", ["clinician", "radiologist", "technologist", "service", "admin"])
async def test_nobody_else_reads_it(live: Lightbox, role: str) -> None:
    assert (await live.ask(role, "GET", "/api/v1/audit")).status_code == 403
    denied = audit_of(
        await live.must("auditor", "GET", "/audit?action=audit:read"), "audit:read", "denied"
    )
    assert [each["actor"] for each in denied] == [role]
