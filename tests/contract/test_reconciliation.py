"""The reconciliation worklist: who sees what waits, and what people decide about it.

The fake Orthanc stands for the archive; rows are made as the follower makes them, by its own steps.
"""

import json
from collections.abc import AsyncIterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import pydicom
import pytest

from app.arrivals import index
from app.models import Arrival
from app.orthanc import Orthanc
from tests.fake_orthanc import URL, FakeOrthanc, _ids
from tests.images import ct_image
from tests.lightbox import Lightbox, make_settings, running


@pytest.fixture
async def lightbox(
    sqlite_url: str, fake_orthanc: FakeOrthanc, tmp_path: Path
) -> AsyncIterator[Lightbox]:
    async with running(make_settings(sqlite_url, URL, spool_dir=tmp_path)) as each:
        yield each


async def arrive(lightbox: Lightbox, fake: FakeOrthanc, *files: bytes) -> str:
    """Images come into Orthanc past Lightbox, and are looked at; their StudyInstanceUID."""
    ids = {fake._store(each).json()["ParentStudy"] for each in files}
    orthanc: Orthanc = lightbox.app.state.orthanc
    database = lightbox.app.state.database
    for study_id in sorted(ids):
        held = await orthanc.held(study_id)
        assert held is not None
        async with database.session() as session:
            await index.note(session, held, stable=True)
            await session.commit()
    for study_id in sorted(ids):
        await lightbox.app.state.follower.look(study_id)
    return str(pydicom.dcmread(BytesIO(files[0])).StudyInstanceUID)


async def waiting(lightbox: Lightbox, role: str = "radiologist", **params: str) -> list[Any]:
    found: list[Any] = await lightbox.must(
        role, "GET", "/reconciliation", params={"limit": "200", **params}
    )
    return found


async def one(lightbox: Lightbox, uid: str, role: str = "radiologist") -> Any:
    return await lightbox.must(role, "GET", f"/reconciliation/{uid}")


async def decide(
    lightbox: Lightbox, uid: str, what: str, *, role: str = "radiologist", **body: Any
) -> Any:
    return await lightbox.ask(role, "POST", f"/api/v1/reconciliation/{uid}/{what}", json=body)


def similar(**values: Any) -> bytes:
    """Of a patient like Jane Doe, MRN-1, with a slip in the number."""
    return ct_image(**{"patient_id": "MRN-l", **values})


async def test_what_is_certain_does_not_wait(lightbox: Lightbox, fake_orthanc: FakeOrthanc) -> None:
    patient = await lightbox.patient()
    order = await lightbox.order(patient)
    planned = order["planned_study_instance_uid"]
    uid = await arrive(
        lightbox,
        fake_orthanc,
        ct_image(study_uid=planned, AccessionNumber=order["accession_number"]),
    )
    assert await waiting(lightbox) == []
    assert (await lightbox.must("service", "GET", f"/orders/{order['id']}"))["studies"] == [uid]
    (record,) = await lightbox.audit(action="study:link", outcome="done")
    assert record["actor"] == "lightbox"
    assert record["detail"]["before"] == {
        "instance_count": 0,
        "order_ids": [],
        "patient_id": None,
    }
    assert record["detail"]["after"]["order_ids"] == [order["id"]]
    assert record["detail"]["rule"] == "planned-study"


async def test_what_waits_is_shown_with_candidates_and_reasons(
    lightbox: Lightbox, fake_orthanc: FakeOrthanc
) -> None:
    patient = await lightbox.patient()
    order = await lightbox.order(patient)
    uid = await arrive(lightbox, fake_orthanc, similar())
    (found,) = await waiting(lightbox)
    assert (found["StudyInstanceUID"], found["state"]) == (uid, "proposed")
    assert found["PatientID"] == "MRN-l"
    assert {each["order_id"] for each in found["candidates"]} == {None, order["id"]}
    best = found["candidates"][0]
    assert best["patient_id"] == patient["id"]
    assert best["name"] == "Doe, Jane"
    assert {each["code"] for each in best["speaks_for"]} >= {"name-agrees", "birth-date-agrees"}
    assert found["reasons"]
    assert await one(lightbox, uid) == found
    assert await one(lightbox, uid, role="technologist") == found
    shown = await lightbox.audit(action="arrival:list", outcome="done")
    assert {each["patient_id"] for each in shown} >= {patient["id"]}


async def test_patients_of_others_are_not_shown_as_candidates(
    lightbox: Lightbox, fake_orthanc: FakeOrthanc
) -> None:
    """Not the candidate, not the study that is likely theirs, not by guessing its UID."""
    patient = await lightbox.patient()
    await lightbox.order(patient, site="north")
    uid = await arrive(lightbox, fake_orthanc, similar())
    assert await waiting(lightbox) == []
    assert (
        await lightbox.ask("radiologist", "GET", f"/api/v1/reconciliation/{uid}")
    ).status_code == 403
    for what, body in {
        "confirm": {"patient_id": patient["id"], "version": 2},
        "reject": {"reason": "not mine", "version": 2},
    }.items():
        answer = await decide(lightbox, uid, what, **body)
        assert (answer.status_code, "Doe" in answer.text) == (403, False)
    # Another candidate, of the own site: the study is shown, and of the other nothing.
    mine = await lightbox.patient("MRN-I", first_name="Jane")
    await lightbox.order(mine)
    await lightbox.app.state.follower.look(orthanc_id(fake_orthanc, uid))
    (found,) = await waiting(lightbox)
    assert {each["patient_id"] for each in found["candidates"]} == {mine["id"]}
    assert patient["id"] not in json.dumps(found)
    assert "MRN-1" not in json.dumps(found)
    for role in ("clinician", "service", "admin", "auditor"):
        answer = await lightbox.ask(role, "GET", "/api/v1/reconciliation")
        assert answer.status_code == 403


def orthanc_id(fake: FakeOrthanc, uid: str) -> str:
    return next(_ids(x)[1] for x in fake.instances.values() if x.StudyInstanceUID == uid)


async def test_confirmed_by_one_and_late_for_the_other(
    lightbox: Lightbox, fake_orthanc: FakeOrthanc
) -> None:
    patient = await lightbox.patient()
    order = await lightbox.order(patient)
    uid = await arrive(
        lightbox, fake_orthanc, ct_image(PatientName="Roe^Jane", PatientBirthDate="")
    )
    found = await one(lightbox, uid)
    body = {"order_id": order["id"], "version": found["version"], "reason": "married"}
    answer = await decide(lightbox, uid, "confirm", **body)
    assert answer.status_code == 200, answer.text
    assert (await lightbox.must("service", "GET", f"/orders/{order['id']}"))["studies"] == [uid]
    late = await decide(lightbox, uid, "confirm", role="technologist", **body)
    assert late.status_code == 409
    assert late.json()["decided_by"] == "radiologist"
    assert late.json()["state"] == "linked"
    late = await decide(
        lightbox, uid, "reject", role="technologist", reason="nobody's", version=found["version"]
    )
    assert (late.status_code, late.json()["decided_by"]) == (409, "radiologist")
    (record,) = await lightbox.audit(action="study:link", outcome="done")
    assert record["actor"] == "radiologist"
    assert record["detail"]["reason"] == "married"
    assert record["detail"]["after"]["patient_id"] == patient["id"]


async def test_another_patients_number_needs_coercion_and_says_why(
    lightbox: Lightbox, fake_orthanc: FakeOrthanc
) -> None:
    patient = await lightbox.patient()
    order = await lightbox.order(patient)
    series = "1.2.3.4.5"
    study = "1.2.3.4"
    files = [
        similar(study_uid=study, series_uid=series, InstanceNumber=n, PatientComments="of John")
        for n in (1, 2)
    ]
    uid = await arrive(lightbox, fake_orthanc, *files)
    version = (await one(lightbox, uid))["version"]
    body = {"order_id": order["id"], "version": version}
    answer = await decide(lightbox, uid, "confirm", **body)
    assert answer.status_code == 409
    assert answer.json()["differences"]["PatientID"] == {"file": "MRN-l", "expected": "MRN-1"}
    before = dict(fake_orthanc.bodies)
    # The archive fails in the middle: no copy is left, and it waits as before.
    fake_orthanc.faults_at["/instances"] = httpx.ConnectError("gone")
    answer = await decide(lightbox, uid, "confirm", **body, coerce=True)
    assert answer.status_code == 503
    del fake_orthanc.faults_at["/instances"]
    assert fake_orthanc.bodies == before
    row = await one(lightbox, uid)
    assert row["state"] == "proposed"
    answer = await decide(
        lightbox, uid, "confirm", **{**body, "version": row["version"]}, coerce=True
    )
    assert answer.status_code == 200, answer.text
    copy = answer.json()["study_instance_uid"]
    assert copy != uid
    assert (await lightbox.must("service", "GET", f"/orders/{order['id']}"))["studies"] == [copy]
    made = [x for x in fake_orthanc.instances.values() if x.StudyInstanceUID == copy]
    assert len(made) == 2
    for each in made:
        assert (each.PatientID, each.AccessionNumber) == ("MRN-1", order["accession_number"])
        assert "PatientComments" not in each or not each.PatientComments
        (original,) = each.OriginalAttributesSequence
        (was,) = original.ModifiedAttributesSequence
        assert (was.PatientID, was.StudyInstanceUID, was.PatientComments) == (
            *("MRN-l", study),
            "of John",
        )
        assert original.ModifyingSystem == "Lightbox"
    # The original is there as it came, and is linked to nobody, whoever looks.
    assert {k: v for k, v in fake_orthanc.bodies.items() if k in before} == before
    await lightbox.app.state.follower.look(orthanc_id(fake_orthanc, uid))
    assert (await lightbox.ask("service", "GET", f"/api/v1/dicom/studies/{uid}")).status_code == 404
    (record,) = await lightbox.audit(action="study:coerce", outcome="done")
    assert record["detail"]["coerced"]["PatientID"] == {"file": "MRN-l", "expected": "MRN-1"}
    assert record["detail"]["original"]["study_instance_uid"] == study


async def test_undone_it_waits_and_is_not_linked_again_by_itself(
    lightbox: Lightbox, fake_orthanc: FakeOrthanc
) -> None:
    patient = await lightbox.patient()
    order = await lightbox.order(patient)
    uid = await arrive(
        lightbox,
        fake_orthanc,
        ct_image(
            study_uid=order["planned_study_instance_uid"],
            AccessionNumber=order["accession_number"],
        ),
    )
    opened = await lightbox.open(f"/order/{order['id']}")
    assert (await opened.get(f"/studies/{uid}/series")).status_code == 200
    version = (await one(lightbox, uid))["version"]
    for_nothing = await decide(lightbox, uid, "undo", reason="x", version=version)
    assert for_nothing.status_code == 422
    stale = await decide(lightbox, uid, "undo", reason="wrong patient", version=version + 1)
    assert stale.status_code == 409
    answer = await decide(lightbox, uid, "undo", reason="wrong patient", version=version)
    assert answer.status_code == 200, answer.text
    assert answer.json()["viewers_ended"] == 1
    assert (await opened.get(f"/studies/{uid}/series")).status_code in (401, 403)
    again = await decide(lightbox, uid, "undo", reason="wrong patient", version=version)
    assert (again.status_code, again.json()["decided_by"]) == (409, "radiologist")
    after = await lightbox.must("service", "GET", f"/orders/{order['id']}")
    assert (after["studies"], after["fulfilled_at"]) == ([], None)
    await lightbox.app.state.follower.look(orthanc_id(fake_orthanc, uid))
    row = await one(lightbox, uid)
    assert (row["state"], row["decision"]) == ("unmatched", "undone: wrong patient")
    # Images that are added, or a changed order, don't make it certain again.
    await lightbox.must("service", "PATCH", f"/orders/{order['id']}", json={"description": "CT 2"})
    await arrive(
        lightbox,
        fake_orthanc,
        ct_image(study_uid=uid, AccessionNumber=order["accession_number"]),
    )
    assert (await one(lightbox, uid))["state"] == "unmatched"
    (record,) = [
        each
        for each in await lightbox.audit(action="study:link", outcome="done")
        if each["reason"] == "undone"
    ]
    assert record["detail"]["before"]["order_ids"] == [order["id"]]
    assert record["detail"]["viewers_ended"] == 1
    # A human may.
    row = await one(lightbox, uid)
    answer = await decide(lightbox, uid, "confirm", order_id=order["id"], version=row["version"])
    assert answer.status_code == 200, answer.text


async def test_a_rejected_study_is_listed_apart_and_can_be_confirmed_later(
    lightbox: Lightbox, fake_orthanc: FakeOrthanc
) -> None:
    uid = await arrive(lightbox, fake_orthanc, ct_image(patient_id="NOBODY"))
    row = await one(lightbox, uid)
    assert (row["state"], row["candidates"]) == ("unmatched", [])
    answer = await decide(
        lightbox, uid, "reject", reason="a phantom", version=row["version"], role="technologist"
    )
    assert answer.status_code == 200, answer.text
    assert await waiting(lightbox) == []
    (found,) = await waiting(lightbox, state="rejected")
    assert (found["decided_by"], found["decision"]) == ("technologist", "rejected: a phantom")
    patient = await lightbox.patient("NOBODY")
    await lightbox.order(patient)
    await lightbox.app.state.follower.look(orthanc_id(fake_orthanc, uid))
    assert (await one(lightbox, uid))["state"] == "rejected"
    answer = await decide(
        lightbox, uid, "confirm", patient_id=patient["id"], version=found["version"]
    )
    assert answer.status_code == 200, answer.text


async def test_sorted_filtered_and_paged(lightbox: Lightbox, fake_orthanc: FakeOrthanc) -> None:
    for n, name in enumerate(["Cx^A", "Ax^B", "Bx^C", "Ax^A", "Dx^D"]):
        await arrive(
            lightbox,
            fake_orthanc,
            ct_image(patient_id=f"N-{n}", PatientName=name, StudyDate=f"2025010{5 - n}"),
        )
    for sort, key in {"name": "PatientName", "study_date": "StudyDate"}.items():
        for down in (False, True):
            seen: list[str] = []
            url = f"/api/v1/reconciliation?limit=2&sort={'-' if down else ''}{sort}"
            while url:
                answer = await lightbox.ask("radiologist", "GET", url)
                assert answer.status_code == 200, answer.text
                seen += [each[key] for each in answer.json()]
                url = answer.links["next"]["url"] if "next" in answer.links else ""
            assert seen == sorted(seen, reverse=down)
            assert len(seen) == 5
    by_time = [each["arrived_at"] for each in await waiting(lightbox, sort="-arrived_at")]
    assert by_time == sorted(by_time, reverse=True)
    assert await waiting(lightbox, state="conflicting") == []
    assert len(await waiting(lightbox, state="unmatched")) == 5
    for params in ({"state": "gone"}, {"sort": "mrn"}, {"cursor": "!"}):
        answer = await lightbox.ask("radiologist", "GET", "/api/v1/reconciliation", params=params)
        assert answer.status_code == 422


async def test_a_file_that_does_not_pass_is_not_confirmed_either(
    lightbox: Lightbox, fake_orthanc: FakeOrthanc
) -> None:
    patient = await lightbox.patient()
    order = await lightbox.order(patient)
    planned = order["planned_study_instance_uid"]
    uid = await arrive(
        lightbox,
        fake_orthanc,
        ct_image(study_uid=planned),
        ct_image(study_uid=planned, Rows=4096, Columns=4096),
    )
    row = await one(lightbox, uid)
    assert row["state"] == "quarantined"
    answer = await decide(lightbox, uid, "confirm", order_id=order["id"], version=row["version"])
    assert answer.status_code == 409
    assert (await lightbox.ask("service", "GET", f"/api/v1/dicom/studies/{uid}")).status_code == 404
    async with lightbox.app.state.database.session() as session:
        stored = await session.get(Arrival, orthanc_id(fake_orthanc, uid))
    assert stored is not None
    assert stored.state == "quarantined"
