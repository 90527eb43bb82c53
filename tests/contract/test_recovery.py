"""What was cut off, found by a later process: taken back or finished once, and never what is
somebody else's."""

import asyncio
import uuid
from dataclasses import replace
from typing import Any

import httpx
import pytest

from app.audit import Action, Entry, Origin, Outcome
from app.audit.operations import text_of
from app.dicom import orthanc_id
from app.intake import Intake
from app.orthanc import Orthanc
from app.recovery import Recovery
from tests.fake_orthanc import FakeOrthanc
from tests.images import ct_image
from tests.lightbox import Lightbox, World
from tests.tables import change, moment, outcomes, records, rows

DEAD = "d" * 32
STUDY, SERIES, SOP = "2.25.1", "2.25.2", "2.25.3"


def cut_off(
    lightbox: Lightbox, action: Action, kind: str = "", there: str = "", **more: Any
) -> str:
    """A row that a dead process left; its request id."""
    request_id = uuid.uuid4().hex
    values = {"there_before": False, "detail": "", "process": DEAD, **more}
    subject = values.pop("subject", {})
    granted = Entry(
        action=action,
        outcome=Outcome.GRANTED,
        origin=Origin(request_id, "127.0.0.1"),
        actor="dr.novak",
        actor_roles="radiologist",
    )
    change(
        lightbox,
        "INSERT INTO operation (id, process, state, started_at, asked, kind, orthanc_id,"
        " there_before, detail) VALUES (?, ?, 'open', ?, ?, ?, ?, ?, ?)",
        *(uuid.uuid4().hex, values["process"], moment(), text_of(replace(granted, **subject))),
        *(kind, there, values["there_before"], values["detail"]),
    )
    return request_id


def under_way(lightbox: Lightbox) -> list[dict[str, Any]]:
    return rows(lightbox, "SELECT * FROM operation")


def orphan(orthanc: FakeOrthanc) -> str:
    """An instance that Orthanc holds and nobody linked; its id there."""
    content = ct_image(patient_id="MRN-MINE", study_uid=STUDY, series_uid=SERIES, sop_uid=SOP)
    orthanc._store(content)
    return orthanc_id("MRN-MINE", STUDY, SERIES, SOP)


async def recover(lightbox: Lightbox) -> None:
    recovery: Recovery = lightbox.app.state.recovery
    await recovery.step()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing moves by itself: only the test's own looks count."""
    monkeypatch.setattr("app.recovery.LOOK_SECONDS", 3600.0)


pytestmark = pytest.mark.usefixtures("patient")


async def test_what_changed_the_database_alone_is_marked(lightbox: Lightbox) -> None:
    request_id = cut_off(lightbox, Action.ORDER_CREATE)
    await recover(lightbox)
    await recover(lightbox)
    (record,) = records(lightbox, request_id)
    assert (record["action"], record["outcome"]) == ("order:create", "failed")
    assert (record["reason"], record["actor"]) == ("cut-off", "dr.novak")
    assert record["detail"] == {"found": "nothing was changed"}
    assert under_way(lightbox) == []


async def test_what_was_stored_and_not_linked_is_taken_back(
    lightbox: Lightbox, fake_orthanc: FakeOrthanc
) -> None:
    there = orphan(fake_orthanc)
    request_id = cut_off(lightbox, Action.STUDY_UPLOAD, "store", there)
    await recover(lightbox)
    assert there not in fake_orthanc.instances
    (record,) = records(lightbox, request_id)
    assert record["detail"]["found"] == "the archive had stored the file; it was taken back"


async def test_what_was_there_before_stays(lightbox: Lightbox, fake_orthanc: FakeOrthanc) -> None:
    there = orphan(fake_orthanc)
    request_id = cut_off(lightbox, Action.STUDY_UPLOAD, "store", there, there_before=True)
    await recover(lightbox)
    assert there in fake_orthanc.instances
    assert outcomes(lightbox, request_id) == [("study:upload", "failed")]


async def test_what_a_modality_sent_meanwhile_stays(
    lightbox: Lightbox, fake_orthanc: FakeOrthanc
) -> None:
    there = orphan(fake_orthanc)
    fake_orthanc.origin = {"Origin": "DicomProtocol", "RemoteAET": "CT1"}
    cut_off(lightbox, Action.STUDY_UPLOAD, "store", there)
    await recover(lightbox)
    assert there in fake_orthanc.instances
    assert under_way(lightbox) == []


async def test_what_somebody_linked_meanwhile_stays(
    lightbox: Lightbox, fake_orthanc: FakeOrthanc, world: World
) -> None:
    there = world.my_image["orthanc_instance_id"]
    request_id = cut_off(lightbox, Action.STUDY_UPLOAD, "store", there)
    await recover(lightbox)
    assert there in fake_orthanc.instances
    (record,) = records(lightbox, request_id)
    assert record["detail"]["found"] == "the file was linked by another request"


async def test_who_is_at_work_on_the_same_file_is_let_finish(
    lightbox: Lightbox, fake_orthanc: FakeOrthanc
) -> None:
    """It found the file stored, and is about to link it."""
    there = orphan(fake_orthanc)
    cut_off(lightbox, Action.STUDY_UPLOAD, "store", there)
    mine = lightbox.app.state.gate.trail.process
    cut_off(lightbox, Action.STUDY_UPLOAD, "store", there, process=mine, there_before=True)
    await recover(lightbox)
    assert there in fake_orthanc.instances
    change(lightbox, "DELETE FROM operation WHERE there_before")
    await recover(lightbox)
    assert there not in fake_orthanc.instances


async def test_orthanc_that_is_down_is_asked_again(
    lightbox: Lightbox, fake_orthanc: FakeOrthanc
) -> None:
    there = orphan(fake_orthanc)
    request_id = cut_off(lightbox, Action.STUDY_UPLOAD, "store", there)
    other = cut_off(lightbox, Action.ORDER_CREATE)
    fake_orthanc.faults.append(httpx.ConnectError("down"))
    await recover(lightbox)
    assert records(lightbox, request_id) == []
    assert outcomes(lightbox, other) == [("order:create", "failed")]
    assert there in fake_orthanc.instances
    await recover(lightbox)
    assert there not in fake_orthanc.instances
    assert outcomes(lightbox, request_id) == [("study:upload", "failed")]


async def test_what_may_still_be_stored_is_waited_for(
    lightbox: Lightbox, fake_orthanc: FakeOrthanc
) -> None:
    """Orthanc had the whole file when its sender died, and files it a moment later."""
    there = orthanc_id("MRN-MINE", STUDY, SERIES, SOP)
    request_id = cut_off(lightbox, Action.STUDY_UPLOAD, "store", there)
    await recover(lightbox)
    assert records(lightbox, request_id) == []
    assert orphan(fake_orthanc) == there
    await recover(lightbox)
    assert there not in fake_orthanc.instances
    assert outcomes(lightbox, request_id) == [("study:upload", "failed")]


async def test_what_was_never_stored_is_given_up_after_a_while(lightbox: Lightbox) -> None:
    there = orthanc_id("MRN-MINE", STUDY, SERIES, SOP)
    request_id = cut_off(lightbox, Action.STUDY_UPLOAD, "store", there)
    await recover(lightbox)
    change(lightbox, "UPDATE operation SET seen_at = ?", moment(hours=-1))
    await recover(lightbox)
    (record,) = records(lightbox, request_id)
    assert record["detail"]["found"] == "the archive did not store the file"


async def test_two_that_recover_at_once_write_one_record(
    lightbox: Lightbox, fake_orthanc: FakeOrthanc
) -> None:
    state, there = lightbox.app.state, orphan(fake_orthanc)
    requests = [cut_off(lightbox, Action.ORDER_WRITE) for _ in range(5)]
    requests.append(cut_off(lightbox, Action.STUDY_UPLOAD, "store", there))
    second = Recovery(
        lightbox.settings, state.gate, state.orthanc, state.viewer, state.worklist.wake
    )
    await asyncio.gather(second.step(), recover(lightbox))
    await recover(lightbox)
    for each in requests:
        assert [outcome for _, outcome in outcomes(lightbox, each)] == ["failed"]


async def test_who_was_given_up_for_dead_can_not_finish(
    lightbox: Lightbox,
    fake_orthanc: FakeOrthanc,
    world: World,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It was only slow: what it stored is taken back, and nothing is linked."""
    store = Intake._store

    async def slowly(self: Intake, file: Any, *, known: bool) -> Any:
        stored = await store(self, file, known=known)
        change(lightbox, "UPDATE operation SET process = ?, state = 'left'", DEAD)
        return stored

    monkeypatch.setattr(Intake, "_store", slowly)
    before = set(fake_orthanc.instances)
    answer = await lightbox.upload(
        ct_image(patient_id="MRN-MINE", sop_uid=SOP), order_id=world.my_order["id"]
    )
    assert answer.status_code == 503, answer.text
    assert rows(lightbox, "SELECT * FROM instance WHERE sop_instance_uid = ?", SOP) == []
    assert set(fake_orthanc.instances) == before


async def test_an_upload_whose_store_was_not_answered_is_taken_back(
    lightbox: Lightbox,
    fake_orthanc: FakeOrthanc,
    world: World,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody was killed: Orthanc stored the file, and its answer was lost."""
    store = Orthanc.store

    async def unanswered(self: Orthanc, file: Any, size: int) -> Any:
        await store(self, file, size)
        fake_orthanc.faults.append(httpx.ReadTimeout("no answer"))
        return await self.version()

    monkeypatch.setattr(Orthanc, "store", unanswered)
    before = set(fake_orthanc.instances)
    answer = await lightbox.upload(ct_image(patient_id="MRN-MINE"), order_id=world.my_order["id"])
    assert answer.status_code == 503
    assert set(fake_orthanc.instances) > before
    await recover(lightbox)
    assert set(fake_orthanc.instances) == before
    assert under_way(lightbox) == []


async def test_a_deletion_that_had_begun_is_finished(
    lightbox: Lightbox, fake_orthanc: FakeOrthanc, world: World
) -> None:
    uid, there = world.my_study, world.my_image["orthanc_study_id"]
    fake_orthanc._delete(f"/studies/{there}")
    asked = {"study_instance_uid": uid, "patient_id": uuid.UUID(world.mine["id"])}
    request_id = cut_off(
        *(lightbox, Action.STUDY_DELETE, "delete", there), detail="wrong patient", subject=asked
    )
    await recover(lightbox)
    assert rows(lightbox, "SELECT * FROM study WHERE study_instance_uid = ?", uid) == []
    (record,) = records(lightbox, request_id)
    assert (record["outcome"], record["reason"], record["actor"]) == ("done", "cut-off", "dr.novak")
    assert record["detail"]["reason"] == "wrong patient"
    assert record["detail"]["sop_instance_uids"] == [world.my_image["sop_instance_uid"]]
    assert under_way(lightbox) == []


async def test_a_deletion_that_had_not_begun_is_none(
    lightbox: Lightbox, fake_orthanc: FakeOrthanc, world: World
) -> None:
    uid, there = world.my_study, world.my_image["orthanc_study_id"]
    request_id = cut_off(
        *(lightbox, Action.STUDY_DELETE, "delete", there), subject={"study_instance_uid": uid}
    )
    await recover(lightbox)
    change(lightbox, "UPDATE operation SET seen_at = ?", moment(hours=-1))
    await recover(lightbox)
    assert outcomes(lightbox, request_id) == [("study:delete", "failed")]
    assert len(rows(lightbox, "SELECT * FROM study WHERE study_instance_uid = ?", uid)) == 1
    assert world.my_image["orthanc_instance_id"] in fake_orthanc.instances


async def test_nothing_is_left_of_what_has_an_end(lightbox: Lightbox, world: World) -> None:
    """Answered, refused, denied, or without a change: the journal is empty after each."""
    patient, order = world.mine["id"], world.my_order["id"]
    image = ct_image(patient_id="MRN-MINE")
    await lightbox.upload(image, order_id=order)
    await lightbox.upload(image, order_id=order)
    await lightbox.upload(ct_image(patient_id="OTHER"), order_id=order, coerce_patient="true")
    await lightbox.upload(ct_image(patient_id="OTHER"), order_id=order)
    await lightbox.upload(b"no DICOM", order_id=order)
    await lightbox.open(f"/{world.my_study}")
    for method, path in (
        ("PUT", f"/patients/{patient}/care-team/nurse"),
        ("DELETE", f"/patients/{patient}/care-team/nurse"),
        ("DELETE", f"/dicom/studies/{world.my_study}?reason=x"),
        ("DELETE", f"/dicom/studies/{world.my_study}?reason=by+a+test"),
        ("GET", f"/dicom/viewer/url/order/{order}?nonsense=1"),
    ):
        await lightbox.ask("service", method, f"/api/v1{path}")
    assert under_way(lightbox) == []
