"""Orthanc, the database or the trail failing half-way: 503, and what is kept is the truth."""

from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from sqlmodel.ext.asyncio.session import AsyncSession

from app import linking
from app.db import Database
from app.dicomweb import Metadata, freshness
from app.intake import records as intake_records
from tests.fake_orthanc import FakeOrthanc
from tests.images import ct_image
from tests.lightbox import Lightbox, World
from tests.tables import REFUSE_RECORDS, change, contents, opened, outcomes, records, rows

FAULTS: dict[str, httpx.Response | Exception] = {
    "refused": httpx.ConnectError("refused at 10.0.0.1:8042"),
    "no address": httpx.ConnectTimeout("10.0.0.1"),
    "slow": httpx.ReadTimeout("10.0.0.1"),
    "slow to take": httpx.WriteTimeout("10.0.0.1"),
    "busy": httpx.PoolTimeout("10.0.0.1"),
    "half a body": httpx.RemoteProtocolError("peer closed connection without sending all"),
    "reset": httpx.ReadError("reset"),
    "401": httpx.Response(401, text="10.0.0.1 wants a password"),
    "403": httpx.Response(403),
    "500": httpx.Response(500, json={"Message": "Victim^Vera at 10.0.0.1", "OrthancStatus": 1}),
    "502": httpx.Response(502, html="<html>10.0.0.1</html>"),
    "507": httpx.Response(507, json={"Message": "full: /var/lib/orthanc"}),
    "302": httpx.Response(302, headers={"Location": "http://10.0.0.1/login"}),
    "HTML with 200": httpx.Response(200, html="<html>10.0.0.1</html>"),
    "half a JSON": httpx.Response(200, content=b'{"ID": "'),
    "nothing": httpx.Response(200, content=b""),
    "null": httpx.Response(200, json=None),
    "a number": httpx.Response(200, json=7),
    "other fields": httpx.Response(200, json={"Victim^Vera": 1}),
}
BY_STATUS = {name for name in FAULTS if name[0].isdigit()} | {
    name for name, fault in FAULTS.items() if isinstance(fault, Exception)
}
HIDDEN = ("10.0.0.1", "Victim", "/var/lib", "orthanc.test", "Traceback")


def assert_unavailable(answer: httpx.Response, slug: str = "orthanc-unavailable") -> None:
    assert answer.status_code == 503, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["retry-after"] == "5"
    assert answer.json()["type"] == f"urn:lightbox:problem:{slug}"
    assert not [word for word in HIDDEN if word in answer.text]


async def send(
    lightbox: Lightbox, world: World, content: bytes, request_id: str = "sends"
) -> httpx.Response:
    """Upload to my order."""
    return await lightbox.ask(
        "technologist",
        "POST",
        "/api/v1/dicom/upload",
        headers={"X-Request-ID": request_id},
        files={"file": ("a.dcm", content, "application/dicom")},
        data={"order_id": world.my_order["id"]},
    )


# ---------------------------------------------------------------------------------------- upload


@pytest.mark.parametrize("at", ["lookup", "store"])
async def test_an_upload_that_fails_leaves_nothing(
    at: str, lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    before, stored = contents(lightbox), set(fake_orthanc.instances)
    passing = [httpx.Response(200, json=[])] if at == "store" else []
    content = ct_image(patient_id="MRN-MINE")
    for name, fault in FAULTS.items():
        fake_orthanc.faults[:] = [*passing, fault]
        answer = await send(lightbox, world, content, request_id := name.replace(" ", "-"))
        assert_unavailable(answer)
        assert outcomes(lightbox, request_id) == [
            ("study:upload", "granted"),
            ("study:upload", "failed"),
        ]
        assert records(lightbox, request_id)[1]["reason"] == "orthanc-unavailable"
        assert fake_orthanc.faults == []
    assert contents(lightbox) == before
    assert set(fake_orthanc.instances) == stored
    assert (await send(lightbox, world, content)).json()["status"] == "uploaded"


async def test_orthanc_refusing_a_file_is_the_files_fault(
    lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    before = contents(lightbox)
    bad = httpx.Response(400, json={"Message": "Bad file format at 10.0.0.1"})
    fake_orthanc.faults[:] = [httpx.Response(200, json=[]), bad]
    answer = await send(lightbox, world, ct_image(patient_id="MRN-MINE"))
    assert answer.status_code == 422
    assert "10.0.0.1" not in answer.text
    assert contents(lightbox) == before


async def test_an_order_stays_without_images_until_they_are_stored(
    lightbox: Lightbox, fake_orthanc: FakeOrthanc
) -> None:
    patient = await lightbox.patient()
    order = await lightbox.order(patient)
    fake_orthanc.faults[:] = [httpx.Response(200, json=[]), httpx.Response(507)]
    assert_unavailable(await lightbox.upload(ct_image(), order_id=order["id"]))
    said = await lightbox.must("clinician", "GET", f"/orders/{order['id']}")
    assert (said["study_instance_uid"], said["studies"]) == (None, [])
    link = await lightbox.ask("clinician", "GET", f"/api/v1/dicom/viewer/url/order/{order['id']}")
    assert link.status_code == 404


async def test_what_orthanc_kept_though_the_answer_was_lost_is_linked_when_sent_again(
    lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    content = ct_image(patient_id="MRN-MINE")
    fake_orthanc._store(content)
    before = contents(lightbox)
    fake_orthanc.faults[:] = [httpx.Response(200, json=[]), httpx.ReadTimeout("")]
    assert_unavailable(await send(lightbox, world, content))
    assert contents(lightbox) == before, "stored in Orthanc, linked to nothing, shown to nobody"
    again = await send(lightbox, world, content)
    assert again.json()["status"] == "duplicate"
    studies = (await lightbox.must("clinician", "GET", f"/orders/{world.my_order['id']}"))[
        "studies"
    ]
    assert again.json()["study_instance_uid"] in studies


async def test_of_many_files_only_the_failed_are_missing(
    lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    contents_of = [ct_image(patient_id="MRN-MINE") for _ in range(3)]
    nobody = httpx.Response(200, json=[])
    fake_orthanc.faults[:] = [nobody, FAULTS["reset"]]
    files = [("files", (f"{n}.dcm", content)) for n, content in enumerate(contents_of)]
    answer = await lightbox.must(
        "technologist",
        "POST",
        "/dicom/upload-multiple",
        files=files,
        data={"order_id": world.my_order["id"]},
    )
    assert [each["status"] for each in answer["results"]] == ["failed", "uploaded", "uploaded"]
    assert answer["results"][0]["error_status"] == 503
    order = await lightbox.must("clinician", "GET", f"/orders/{world.my_order['id']}")
    kept = [each["study_instance_uid"] for each in answer["results"][1:]]
    assert set(order["studies"]) == {world.my_study, *kept}


WRONG_IDS = {
    "ParentStudy": "0" * 8 + "-00000000" * 4,
    "ParentSeries": "0" * 8 + "-00000000" * 4,
}


@pytest.mark.parametrize("field", WRONG_IDS)
async def test_an_instance_filed_elsewhere_is_taken_back(
    field: str, lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    """Orthanc read other identifiers than Lightbox did: it must not keep the file."""
    before, stored = contents(lightbox), set(fake_orthanc.instances)
    content = ct_image(patient_id="MRN-MINE")
    said = fake_orthanc._store(content).json() | {field: WRONG_IDS[field]}
    fake_orthanc.faults[:] = [httpx.Response(200, json=[]), httpx.Response(200, json=said)]
    answer = await send(lightbox, world, content)
    assert answer.status_code == 409
    assert contents(lightbox) == before
    assert set(fake_orthanc.instances) == stored
    assert fake_orthanc.asked("DELETE") == [("DELETE", f"/instances/{said['ID']}")]


@pytest.mark.parametrize("value", ["../system", "", None, 7, "0" * 44, "A" * 8 + "-AAAAAAAA" * 4])
async def test_an_id_that_is_none_is_not_believed(
    value: object, lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    before = contents(lightbox)
    good = "0" * 8 + "-00000000" * 4
    said = {"ID": value, "ParentSeries": good, "ParentStudy": good, "Status": "Success"}
    fake_orthanc.faults[:] = [httpx.Response(200, json=[]), httpx.Response(200, json=said)]
    assert_unavailable(await send(lightbox, world, ct_image(patient_id="MRN-MINE")))
    assert contents(lightbox) == before
    assert fake_orthanc.asked("DELETE") == []


@pytest.mark.parametrize("fails", ["link", "commit", "conflict"])
async def test_an_instance_whose_link_fails_is_taken_back(
    fails: str,
    lightbox: Lightbox,
    world: World,
    fake_orthanc: FakeOrthanc,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before, stored = contents(lightbox), set(fake_orthanc.instances)
    linked, commit = intake_records.link, AsyncSession.commit
    lost = sa.exc.OperationalError("COMMIT", {}, Exception("disk I/O at 10.0.0.1"))
    raced = sa.exc.IntegrityError("INSERT", {}, Exception("FOREIGN KEY"))

    async def fail_to_link(*args: Any) -> None:
        await linked(*args)
        if fails == "commit":
            monkeypatch.setattr(AsyncSession, "commit", fail_to_commit)
        else:
            raise lost if fails == "link" else raced

    async def fail_to_commit(session: AsyncSession) -> None:
        monkeypatch.setattr(AsyncSession, "commit", commit)
        raise lost

    monkeypatch.setattr(intake_records, "link", fail_to_link)
    content = ct_image(patient_id="MRN-MINE")
    answer = await send(lightbox, world, content)
    if fails == "conflict":
        assert answer.status_code == 409
    else:
        assert_unavailable(answer, "database-unavailable")
    assert contents(lightbox) == before
    assert set(fake_orthanc.instances) == stored
    assert outcomes(lightbox, "sends")[-1] == ("study:upload", "failed")
    monkeypatch.setattr(intake_records, "link", linked)
    assert (await send(lightbox, world, content)).json()["status"] == "uploaded"


async def test_a_duplicate_whose_link_fails_is_not_taken_back(
    lightbox: Lightbox,
    world: World,
    fake_orthanc: FakeOrthanc,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stored = dict(fake_orthanc.bodies)

    async def fail(*_: object) -> None:
        raise sa.exc.OperationalError("INSERT", {}, Exception("gone"))

    monkeypatch.setattr(intake_records, "link", fail)
    answer = await send(lightbox, world, stored[world.my_image["orthanc_instance_id"]])
    assert_unavailable(answer, "database-unavailable")
    assert fake_orthanc.bodies == stored
    assert fake_orthanc.asked("DELETE") == []


async def test_where_it_cannot_be_taken_back_it_is_linked_to_nothing(
    lightbox: Lightbox,
    world: World,
    fake_orthanc: FakeOrthanc,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = contents(lightbox)

    async def fail(*_: object) -> None:
        fake_orthanc.faults.append(httpx.ConnectError("down"))
        raise sa.exc.OperationalError("INSERT", {}, Exception("gone"))

    monkeypatch.setattr(intake_records, "link", fail)
    content = ct_image(patient_id="MRN-MINE")
    assert_unavailable(await send(lightbox, world, content), "database-unavailable")
    assert contents(lightbox) == before
    assert len(fake_orthanc.instances) == 3
    monkeypatch.undo()
    assert (await send(lightbox, world, content)).json()["status"] == "duplicate"


# -------------------------------------------------------------------------------------- deletion


async def delete(lightbox: Lightbox, uid: str, request_id: str = "deletes") -> httpx.Response:
    return await lightbox.ask(
        "radiologist",
        "DELETE",
        f"/api/v1/dicom/studies/{uid}",
        params={"reason": "wrong patient"},
        headers={"X-Request-ID": request_id},
    )


async def test_a_deletion_that_fails_changes_nothing(
    lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    before, stored = contents(lightbox), set(fake_orthanc.instances)
    for name in sorted(BY_STATUS):
        fake_orthanc.faults[:] = [FAULTS[name]]
        answer = await delete(lightbox, world.my_study, request_id := name.replace(" ", "-"))
        assert_unavailable(answer)
        assert outcomes(lightbox, request_id) == [
            ("study:delete", "granted"),
            ("study:delete", "failed"),
        ]
    assert contents(lightbox) == before
    assert set(fake_orthanc.instances) == stored
    assert (await delete(lightbox, world.my_study)).status_code == 200


async def test_a_deletion_cut_in_two_is_finished_by_the_next(
    lightbox: Lightbox,
    world: World,
    fake_orthanc: FakeOrthanc,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = contents(lightbox)

    async def fail(*_: object) -> None:
        raise sa.exc.OperationalError("DELETE", {}, Exception("gone"))

    with monkeypatch.context() as patch:
        patch.setattr(linking, "forget_study", fail)
        assert_unavailable(await delete(lightbox, world.my_study), "database-unavailable")
    assert len(fake_orthanc.instances) == 1, "gone from Orthanc"
    assert contents(lightbox) == before, "and still listed here"
    answer = await delete(lightbox, world.my_study, "again")
    assert answer.status_code == 200
    assert answer.json()["instances_deleted"] == 1
    assert outcomes(lightbox, "again") == [("study:delete", "granted"), ("study:delete", "done")]
    assert (await delete(lightbox, world.my_study)).status_code == 404


# ---------------------------------------------------------------------- links, metadata and numbers


async def test_no_link_is_given_while_orthanc_does_not_answer(
    lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    before = contents(lightbox)
    for name, fault in FAULTS.items():
        fake_orthanc.faults[:] = [fault]
        answer = await lightbox.ask(
            "clinician",
            "GET",
            f"/api/v1/dicom/viewer/url/order/{world.my_order['id']}",
            headers={"X-Request-ID": (request_id := name.replace(" ", "-"))},
        )
        assert_unavailable(answer)
        assert outcomes(lightbox, request_id) == [
            ("study:view", "granted"),
            ("study:view", "failed"),
        ]
    assert contents(lightbox) == before


@pytest.mark.parametrize("others", [0, 2])
async def test_no_link_is_given_to_what_orthanc_does_not_hold_alone(
    others: int, lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    """Removed in Orthanc behind our back, or there under a second PatientID as well."""
    if others:
        fake_orthanc._store(ct_image(patient_id="MRN-VICTIM", study_uid=world.my_study))
    else:
        fake_orthanc.instances.clear()
    answer = await lightbox.ask("clinician", "GET", f"/api/v1/dicom/viewer/url/{world.my_study}")
    assert answer.status_code == 409
    assert rows(lightbox, "SELECT * FROM launch_session") == []


async def test_metadata_is_not_shown_while_orthanc_fails(
    lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(freshness, "FRESH_SECONDS", 0.0)
    # Nothing is kept yet when it is asked for.
    monkeypatch.setattr(Metadata, "make_ready", lambda *_: None)
    view = await lightbox.open(f"/{world.my_study}")
    path = f"/studies/{world.my_study}/series/{world.my_image['series_instance_uid']}/metadata"
    asked = ("statistics", "lookup", "metadata")
    for each in asked:
        for fault in FAULTS.values():
            fake_orthanc.faults_at[each] = fault
            assert_unavailable(await view.get(path))
        del fake_orthanc.faults_at[each]
    fake_orthanc.faults_at["metadata"] = httpx.Response(404, text="10.0.0.1")
    answer = await view.get(path)
    assert (answer.status_code, "10.0.0.1" in answer.text) == (404, False)
    fake_orthanc.faults_at.clear()
    assert (await view.get(path)).is_success
    fake_orthanc.instances.clear()
    answer = await view.get(path)
    assert answer.status_code in (404, 409), "kept, and not shown any more"


async def test_numbers_are_not_guessed(lightbox: Lightbox, fake_orthanc: FakeOrthanc) -> None:
    wrong: dict[str, Any] = {**fake_orthanc._statistics(), "TotalDiskSize": "many"}
    for fault in [*FAULTS.values(), httpx.Response(200, json=wrong)]:
        fake_orthanc.faults[:] = [fault]
        assert_unavailable(await lightbox.ask("admin", "GET", "/api/v1/dicom/stats"))


async def test_health_says_what_is_wrong(lightbox: Lightbox, fake_orthanc: FakeOrthanc) -> None:
    for fault in FAULTS.values():
        fake_orthanc.faults[:] = [fault]
        answer = await lightbox.client.get("/api/v1/dicom/health")
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "5"
        said = answer.json()
        assert (said["status"], said["orthanc"], said["database"]) == ("unhealthy", "down", "up")
        assert said["orthanc_version"] is None
        assert len(said["problems"]) == 1
        assert not [word for word in HIDDEN if word in answer.text]
    answer = await lightbox.client.get("/api/v1/dicom/health")
    assert (answer.status_code, answer.json()["problems"]) == (200, [])


async def test_health_says_that_the_database_is_down(
    lightbox: Lightbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Database("sqlite+aiosqlite:////no/such/folder/at/10.0.0.1")
    monkeypatch.setattr(lightbox.app.state, "database", broken)
    answer = await lightbox.client.get("/api/v1/dicom/health")
    assert (answer.status_code, answer.json()["database"]) == (503, "down")
    assert answer.json()["orthanc"] == "up"
    assert not [word for word in (*HIDDEN, "folder") if word in answer.text]


# ------------------------------------------------------------------------------- the audit trail


@pytest.fixture
def no_records(lightbox: Lightbox, world: World) -> World:
    """A world in which no audit record can be written any more."""
    with opened(lightbox) as connection:
        connection.execute(REFUSE_RECORDS)
    return world


async def test_no_record_no_answer(
    lightbox: Lightbox, no_records: World, fake_orthanc: FakeOrthanc
) -> None:
    world = no_records
    before, asked_before = contents(lightbox), list(fake_orthanc.requests)
    file = {"file": ("a.dcm", ct_image(patient_id="MRN-MINE"))}
    person = {"first_name": "A", "last_name": "B", "mrn": "NEW", "dob": "1980-01-01"}
    asked: list[tuple[str | None, str, str, dict[str, Any]]] = [
        ("clinician", "GET", "/patients", {}),
        ("clinician", "GET", f"/patients/{world.mine['id']}", {}),
        ("clinician", "GET", f"/patients/{world.theirs['id']}", {}),
        ("clinician", "GET", f"/orders/{world.my_order['id']}", {}),
        ("clinician", "GET", "/dicom/studies", {}),
        ("clinician", "GET", f"/dicom/studies/{world.my_study}", {}),
        ("clinician", "GET", "/dicom/studies/1.2.3", {}),
        ("clinician", "GET", f"/dicom/viewer/url/{world.my_study}", {}),
        ("service", "POST", "/patients", {"json": person}),
        ("service", "POST", "/orders", {"json": {"patient_id": world.mine["id"]}}),
        ("service", "PATCH", f"/orders/{world.my_order['id']}", {"json": {"description": "x"}}),
        ("service", "PUT", f"/patients/{world.mine['id']}/care-team/x", {"json": {}}),
        ("technologist", "POST", "/dicom/upload", {"files": file}),
        ("technologist", "POST", "/dicom/read-tags", {"files": file}),
        ("radiologist", "DELETE", f"/dicom/studies/{world.my_study}?reason=because", {}),
        ("admin", "GET", "/dicom/stats", {}),
        ("auditor", "GET", "/audit", {}),
        (None, "GET", "/patients", {}),
    ]
    for role, method, path, more in asked:
        answer = await lightbox.ask(role, method, f"/api/v1{path}", **more)
        assert_unavailable(answer, "audit-unavailable")
        assert "MRN" not in answer.text
    assert contents(lightbox) == before
    assert fake_orthanc.requests == asked_before


async def test_no_record_no_pixel(lightbox: Lightbox, world: World) -> None:
    view = await lightbox.open(f"/{world.my_study}")
    unopened = await lightbox.must("clinician", "GET", f"/dicom/viewer/url/{world.my_study}")
    with opened(lightbox) as connection:
        connection.execute(REFUSE_RECORDS)
    image = world.my_image
    path = f"/studies/{world.my_study}/series/{image['series_instance_uid']}"
    for end in ("", "/metadata", f"/instances/{image['sop_instance_uid']}/frames/1"):
        answer = await view.get((path + end) if end else path.rpartition("/")[0])
        assert_unavailable(answer, "audit-unavailable")
        assert "x-accel-redirect" not in answer.headers
    (study,) = rows(lightbox, "SELECT * FROM launch_study WHERE ctx = ?", view.ctx)
    assert study["first_accessed_at"] is None
    code = unopened["url"].partition("launch=")[2]
    answer = await lightbox.client.get("/viewer", params={"launch": code})
    assert answer.status_code == 503
    assert "set-cookie" not in answer.headers
    change(lightbox, "DROP TRIGGER no_more_records")
    assert (await lightbox.client.get("/viewer", params={"launch": code})).status_code == 303
    assert (await view.get(f"{path}/instances/{image['sop_instance_uid']}/frames/1")).is_success


async def test_work_that_cannot_be_recorded_is_not_done(
    lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    """The decision is recorded, but the record of the deed fails: the deed is undone."""
    change(
        lightbox,
        "CREATE TRIGGER no_deeds BEFORE INSERT ON audit_record WHEN NEW.outcome = 'done' "
        "BEGIN SELECT RAISE(ABORT, 'full'); END",
    )
    before, stored = contents(lightbox), set(fake_orthanc.instances)
    answer = await send(lightbox, world, ct_image(patient_id="MRN-MINE"))
    assert not answer.is_success
    person = {"first_name": "A", "last_name": "B", "mrn": "NEW", "dob": "1980-01-01"}
    path = f"/api/v1/orders/{world.my_order['id']}"
    for method, where, body in (
        ("POST", "/api/v1/patients", person),
        ("PATCH", path, {"status": "cancelled"}),
    ):
        answer = await lightbox.ask("service", method, where, json=body)
        assert_unavailable(answer, "audit-unavailable")
    assert contents(lightbox) == before
    assert set(fake_orthanc.instances) == stored
