"""Deletion, and an archive that is not there: what is said stays true, and it mends itself."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from app.demo.stack import OrthancServer
from tests.images import ct_image
from tests.lightbox import Lightbox, running
from tests.live.conftest import (
    Archive,
    DatabaseUrls,
    Person,
    audit_of,
    make_person,
    settings_for,
)


@pytest.fixture
async def shaky(
    database: DatabaseUrls, own_orthanc: OrthancServer, tmp_path: Path
) -> AsyncIterator[Lightbox]:
    """The app on an Orthanc that the test stops and starts."""
    async with running(settings_for(database.app, own_orthanc, spool_dir=tmp_path)) as each:
        yield each


async def person_with_images(lightbox: Lightbox) -> tuple[Person, str]:
    """A patient with two instances in two series of one study."""
    person = await make_person(lightbox)
    first = await lightbox.upload(ct_image(patient_id=person.mrn), order_id=person.order["id"])
    study = first.json()["study_instance_uid"]
    second = await lightbox.upload(
        ct_image(patient_id=person.mrn, study_uid=study), order_id=person.order["id"]
    )
    assert (first.status_code, second.status_code) == (200, 200), second.text
    return person, study


async def test_an_archive_that_goes_and_comes_back(
    shaky: Lightbox, own_orthanc: OrthancServer
) -> None:
    """Health, upload, link and deletion while it is away, and again when it is there."""
    person, study = await person_with_images(shaky)
    opened = await shaky.open(f"/order/{person.order['id']}")
    archive = Archive(own_orthanc)
    health = await shaky.ask(None, "GET", "/api/v1/dicom/health")
    assert (health.status_code, health.json()["status"]) == (200, "healthy")
    own_orthanc.stop()

    health = await shaky.ask(None, "GET", "/api/v1/dicom/health")
    assert (health.status_code, health.json()["status"]) == (503, "unhealthy")
    assert (health.json()["orthanc"], health.json()["database"]) == ("down", "up")
    assert len(health.json()["problems"]) == 1
    waiting = await shaky.order(person.patient)
    refused = [
        await shaky.upload(ct_image(patient_id=person.mrn), order_id=waiting["id"]),
        await shaky.upload(
            ct_image(patient_id="ELSE"), order_id=waiting["id"], coerce_patient="true"
        ),
        await shaky.ask("clinician", "GET", f"/api/v1/dicom/viewer/url/{study}"),
        await shaky.ask("admin", "GET", "/api/v1/dicom/stats"),
        await shaky.ask("service", "DELETE", f"/api/v1/dicom/studies/{study}?reason=a+mistake"),
    ]
    for answer in refused:
        assert answer.status_code == 503, answer.text
        assert int(answer.headers["retry-after"]) > 0
        assert str(own_orthanc.http_port) not in answer.text
    assert (await shaky.must("service", "GET", f"/orders/{waiting['id']}"))["studies"] == []
    # Half-way is not gone: the study is still listed, its viewer still open.
    listed = await shaky.must("clinician", "GET", f"/dicom/studies/{study}")
    assert listed["NumberOfStudyRelatedInstances"] == 2
    assert (await opened.get(f"/studies/{study}/series")).status_code == 200
    series = listed["series"][0]["SeriesInstanceUID"]
    assert (await opened.get(f"/studies/{study}/series/{series}/metadata")).status_code == 503

    own_orthanc.start()
    own_orthanc.wait_until_ready()
    health = await shaky.ask(None, "GET", "/api/v1/dicom/health")
    assert (health.status_code, health.json()["problems"]) == (200, [])
    assert (await opened.get(f"/studies/{study}/series/{series}/metadata")).status_code == 200
    again = await shaky.upload(ct_image(patient_id=person.mrn), order_id=waiting["id"])
    assert again.status_code == 200, again.text
    deleted = await shaky.ask(
        "service", "DELETE", f"/api/v1/dicom/studies/{study}?reason=a+mistake"
    )
    assert deleted.status_code == 200, deleted.text
    assert archive.find(study) == []
    assert (await opened.get(f"/studies/{study}/series")).status_code == 403

    records = await shaky.audit(study_instance_uid=study, action="study:delete")
    assert [each["outcome"] for each in records] == ["done", "granted", "failed", "granted"]
    assert records[2]["reason"] == "orthanc-unavailable"
    assert records[0]["detail"]["reason"] == "a mistake"


async def test_a_study_that_is_gone_from_the_archive_can_be_deleted(
    live: Lightbox, archive: Archive
) -> None:
    """Somebody removed it there: the links must not stay for ever."""
    person, study = await person_with_images(live)
    (found,) = [each for each in archive.find(study) if each["Type"] == "Study"]
    archive.ask("DELETE", f"/studies/{found['ID']}")
    link = await live.ask("clinician", "GET", f"/api/v1/dicom/viewer/url/{study}")
    assert link.status_code == 409
    deletion = f"/api/v1/dicom/studies/{study}?reason=gone+from+the+archive"
    assert (await live.ask("service", "DELETE", deletion)).status_code == 200
    order = await live.must("clinician", "GET", f"/orders/{person.order['id']}")
    assert order["study_instance_uid"] is None


async def test_what_was_deleted_stays_on_record(live: Lightbox, archive: Archive) -> None:
    """Who, why, how much, and each UID; the answer to repeating it is 404, not a second record."""
    person, study = await person_with_images(live)
    sops = sorted(
        each["00080018"]["Value"][0]
        for each in archive.ask("GET", f"/dicom-web/studies/{study}/instances").json()
    )
    opened = await live.open(f"/patient/{person.patient['id']}")
    deletion = f"/api/v1/dicom/studies/{study}?reason=wrong+patient"
    answer = await live.ask("radiologist", "DELETE", deletion, sub="dr.sato")
    assert answer.json() == {
        "status": "deleted",
        "study_instance_uid": study,
        "series_deleted": 2,
        "instances_deleted": 2,
        "order_ids": [person.order["id"]],
        "viewers_ended": 1,
    }
    for role in ("radiologist", "service"):
        assert (await live.ask(role, "DELETE", deletion)).status_code == 404
    over = await opened.get(f"/studies/{study}/series")
    assert (over.status_code, over.json()["reason"]) == (403, "study-deleted")
    page = await live.client.get(f"/s/{opened.ctx}/ended")
    assert "have been deleted" in page.text
    (done,) = audit_of(await live.audit(study_instance_uid=study), "study:delete", "done")
    assert (done["actor"], done["patient_id"]) == ("dr.sato", person.patient["id"])
    detail = done["detail"]
    assert (detail["reason"], detail["series_count"], detail["instance_count"]) == (
        "wrong patient",
        2,
        2,
    )
    assert sorted(detail["sop_instance_uids"]) == sops
    assert detail["order_ids"] == [person.order["id"]]


async def test_a_deleted_study_can_be_sent_again(live: Lightbox, archive: Archive) -> None:
    """To the patient it should have gone to in the first place."""
    wrong, right = await make_person(live), await make_person(live)
    content = ct_image(patient_id=right.mrn)
    first = await live.upload(content, order_id=wrong.order["id"], coerce_patient="true")
    study = first.json()["study_instance_uid"]
    assert (await live.upload(content, order_id=right.order["id"])).status_code == 409
    await live.must("service", "DELETE", f"/dicom/studies/{study}?reason=wrong+patient")
    second = await live.upload(content, order_id=right.order["id"])
    assert (second.status_code, second.json()["status"]) == (200, "uploaded")
    assert archive.owners(study) == [right.mrn]


@pytest.mark.parametrize("reason", ["", "reason=", "reason=ab", "reason=%20%20%20%20"])
async def test_without_a_reason_nothing_is_deleted(
    live: Lightbox, archive: Archive, reason: str
) -> None:
    person, study = await person_with_images(live)
    answer = await live.ask("service", "DELETE", f"/api/v1/dicom/studies/{study}?{reason}")
    assert answer.status_code == 422
    assert archive.owners(study) == [person.mrn]
