""" "Why can't I see this?": what is told, and that a stranger learns nothing from it."""

import asyncio
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from sqlalchemy import event

from app.models import OrderStatus
from app.viewer.explanation import Check
from tests.contract.test_sessions import seal
from tests.contract.test_viewer import assert_refused, frame_of, link_to, redeem
from tests.fake_orthanc import FakeOrthanc
from tests.images import ct_image
from tests.lightbox import Lightbox, World
from tests.tables import REFUSE_RECORDS, change, moment, records, rows

WHY = "/api/v1/dicom/viewer/why"
ALL = [each.value for each in Check]


async def why(
    lightbox: Lightbox, path: str, *, role: str = "clinician", **more: Any
) -> dict[str, Any]:
    answer = await lightbox.ask(role, "GET", WHY + path, **more)
    assert answer.status_code == 200, answer.text
    said: dict[str, Any] = answer.json()
    assert_chain(said)
    return said


def assert_chain(said: dict[str, Any]) -> None:
    """The checks in order: passed ones, then at most one that failed, then those not made."""
    checks = [each["check"] for each in said["checks"]]
    assert checks == [each for each in ALL if each != "order" or said["subject"] == "order"]
    states = [each["state"] for each in said["checks"]]
    passed = states.count("passed")
    failed = states.count("failed")
    assert failed == (said["failed"] is not None)
    # An archive that is silent says nothing of the images before it.
    made = [each for each in states if each != "not-checked"]
    assert made == ["passed"] * passed + ["failed"] * failed
    for each in said["checks"]:
        assert bool(each["sentence"]) is (each["state"] != "not-checked")
    assert said["sentence"]
    assert said["next_step"]
    assert said["can_open"] is (said["failed"] in (None, "session"))


# --------------------------------------------------------------------- what a stranger is told


async def told_to(
    lightbox: Lightbox, role: str, path: str, *, sub: str | None = None
) -> tuple[httpx.Response, int]:
    """The answer, and how many statements the database was asked for it."""
    reader = lightbox.app.state.database.engine.sync_engine
    asked: list[str] = []
    mine = asyncio.current_task()

    def hear(_c: Any, _cursor: Any, statement: str, *_more: Any) -> None:
        if asyncio.current_task() is mine:  # not what the application does by itself
            asked.append(statement)

    event.listen(reader, "before_cursor_execute", hear)
    try:
        answer = await lightbox.ask(
            role, "GET", WHY + path, sub=sub, headers={"X-Request-ID": "the-same"}
        )
    finally:
        event.remove(reader, "before_cursor_execute", hear)
    assert asked, "nothing was heard"
    return answer, len(asked)


@pytest.mark.parametrize("role", ["clinician", "radiologist", "technologist"])
@pytest.mark.parametrize("level", ["", "vip", "sealed"])
async def test_unknown_foreign_and_restricted_are_the_same(
    level: str, role: str, lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    """The same words, the same headers, the same work, and Orthanc is not asked."""
    change(lightbox, "UPDATE imaging_order SET site = 'north'")
    if level:
        seal(lightbox, world.theirs["id"], named="somebody", level=level)
    empty = await lightbox.patient("MRN-EMPTY")  # has no images at all
    bare = await lightbox.order(empty, requested_by="other", site="north")
    before = list(fake_orthanc.requests)
    for kind, foreign in (
        ("study", [world.their_study]),
        ("order", [world.their_order["id"], bare["id"]]),
        ("patient", [world.theirs["id"], empty["id"]]),
    ):
        nobody = "2.25.404" if kind == "study" else str(uuid4())
        unknown, work = await told_to(lightbox, role, f"/{kind}/{nobody}", sub="stranger")
        assert unknown.status_code == 200
        assert_chain(unknown.json())
        assert unknown.json()["failed"] == "relationship"
        for each in foreign:
            answer, asked = await told_to(lightbox, role, f"/{kind}/{each}", sub="stranger")
            expected = unknown.content.replace(nobody.encode(), each.encode())
            assert (answer.status_code, answer.content) == (200, expected)
            assert answer.headers == unknown.headers
            assert asked == work
            said = answer.text.replace(each, "")
            assert not [word for word in World.SECRET_WORDS if word in said]
            for word in ("restricted to", "sealed", "vip", world.theirs["id"]):
                assert word not in said.lower()
    assert fake_orthanc.requests == before


async def test_the_record_knows_whom_it_was_about(lightbox: Lightbox, world: World) -> None:
    await why(lightbox, f"/study/{world.their_study}", headers={"X-Request-ID": "asks"})
    (record,) = records(lightbox, "asks")
    assert (record["action"], record["outcome"]) == ("access:explain", "granted")
    assert record["patient_id"] == UUID(world.theirs["id"]).hex
    assert record["detail"] == {
        "study_instance_uid": world.their_study,
        "failed": "relationship",
    }


async def test_no_record_no_answer(lightbox: Lightbox, world: World) -> None:
    change(lightbox, REFUSE_RECORDS)
    answer = await lightbox.ask("clinician", "GET", f"{WHY}/study/{world.my_study}")
    assert answer.status_code == 503


@pytest.mark.parametrize("role", ["admin", "auditor"])
async def test_who_opens_no_images_is_told_nothing(
    role: str, lightbox: Lightbox, world: World
) -> None:
    for path in (f"/study/{world.my_study}", f"/patient/{uuid4()}"):
        answer = await lightbox.ask(role, "GET", WHY + path)
        assert (answer.status_code, answer.json()["reason"]) == (403, "role")


async def test_what_is_no_identifier_is_422(lightbox: Lightbox, world: World) -> None:
    for path in ("/study/x", "/order/1", "/patient/x", f"/study/{world.my_study}?x=1"):
        assert (await lightbox.ask("clinician", "GET", WHY + path)).status_code == 422


async def test_a_stranger_is_shown_the_way_to_break_the_glass(
    lightbox: Lightbox, world: World
) -> None:
    """With the patient's id only where they named it themselves."""
    for path, href in (
        (f"/patient/{world.theirs['id']}", f"/api/v1/patients/{world.theirs['id']}/break-glass"),
        (f"/study/{world.their_study}", "/api/v1/patients/{patient_id}/break-glass"),
        (f"/order/{world.their_order['id']}", "/api/v1/patients/{patient_id}/break-glass"),
    ):
        said = await why(lightbox, path)
        assert said["break_the_glass"]["method"] == "POST"
        assert said["break_the_glass"]["href"] == href
    # Not to a role that may not.
    change(lightbox, "UPDATE imaging_order SET site = 'north'")
    said = await why(
        lightbox, f"/patient/{world.theirs['id']}", role="technologist", sub="stranger"
    )
    assert (said["failed"], said["break_the_glass"]) == ("relationship", None)
    body = {"reason_code": "emergency-treatment", "reason_text": "Unconscious in the ER."}
    href = f"/api/v1/patients/{world.theirs['id']}/break-glass"
    assert (await lightbox.ask("clinician", "POST", href, json=body)).is_success
    said = await why(lightbox, f"/patient/{world.theirs['id']}")
    assert (said["failed"], said["can_open"]) == (None, True)
    assert "broke the glass" in said["checks"][1]["sentence"]


# ------------------------------------------------------------------- what who is tied is told


async def test_nothing_stands_in_the_way(lightbox: Lightbox, world: World) -> None:
    for path in (
        f"/study/{world.my_study}",
        f"/order/{world.my_order['id']}",
        f"/patient/{world.mine['id']}",
    ):
        for role in ("clinician", "radiologist", "service"):
            said = await why(lightbox, path, role=role)
            assert (said["failed"], said["can_open"], said["break_the_glass"]) == (None, True, None)
            assert {each["state"] for each in said["checks"]} == {"passed"}


async def test_a_service_is_told_what_is_not_there(lightbox: Lightbox, world: World) -> None:
    said = await why(lightbox, "/study/2.25.404", role="service")
    assert (said["failed"], said["sentence"]) == (
        *("relationship", "No study here has this StudyInstanceUID."),
    )


async def test_restricted_is_told_to_who_is_tied(lightbox: Lightbox, world: World) -> None:
    seal(lightbox, world.mine["id"], named="somebody", level="vip")
    said = await why(lightbox, f"/order/{world.my_order['id']}")
    assert said["failed"] == "restriction"
    assert said["break_the_glass"]["href"] == "/api/v1/patients/{patient_id}/break-glass"
    change(lightbox, "UPDATE patient_restriction SET level = 'sealed'")
    said = await why(lightbox, f"/order/{world.my_order['id']}")
    assert (said["failed"], said["break_the_glass"]) == ("restriction", None)


@pytest.mark.parametrize("status", ["scheduled", "in-progress", "completed"])
async def test_not_acquired_yet(status: str, lightbox: Lightbox) -> None:
    patient = await lightbox.patient()
    order = await lightbox.order(patient, status=status)
    said = await why(lightbox, f"/order/{order['id']}")
    assert said["failed"] == "images"
    words = {
        OrderStatus.SCHEDULED: "no images have been acquired yet",
        OrderStatus.IN_PROGRESS: "under way",
        OrderStatus.COMPLETED: "no images of it have arrived",
    }
    assert words[OrderStatus(status)] in said["sentence"]
    said = await why(lightbox, f"/patient/{patient['id']}")
    assert (said["failed"], said["sentence"]) == (
        *("images", "There are no images of this patient yet."),
    )


async def test_images_that_wait_to_be_matched(lightbox: Lightbox) -> None:
    patient = await lightbox.patient()
    order = await lightbox.order(patient)
    await lightbox.upload(ct_image(), patient_id=patient["id"])
    said = await why(lightbox, f"/order/{order['id']}")
    assert said["failed"] == "images"
    assert "matched" in said["sentence"]


async def test_images_that_only_the_archive_has_wait_too(
    lightbox: Lightbox, fake_orthanc: FakeOrthanc
) -> None:
    """A modality sent them under the order's own StudyInstanceUID, past Lightbox."""
    order = await lightbox.order(await lightbox.patient())
    fake_orthanc._store(ct_image(study_uid=order["planned_study_instance_uid"]))
    said = await why(lightbox, f"/order/{order['id']}")
    assert (said["failed"], "matched" in said["sentence"]) == ("images", True)


async def test_a_cancelled_order(lightbox: Lightbox, world: World) -> None:
    await lightbox.order(world.mine)  # the tie stays
    path = f"/orders/{world.my_order['id']}"
    await lightbox.must("service", "PATCH", path, json={"status": "cancelled"})
    said = await why(lightbox, f"/order/{world.my_order['id']}")
    assert (said["failed"], said["sentence"]) == ("order", "The order is cancelled.")


async def test_an_archive_that_is_silent(
    lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    fake_orthanc.faults_at["/tools/lookup"] = httpx.ConnectError("refused")
    order = await lightbox.order(world.mine)
    for path in (
        f"/study/{world.my_study}",
        f"/patient/{world.mine['id']}",
        f"/order/{world.my_order['id']}",
        f"/order/{order['id']}",
    ):
        said = await why(lightbox, path)
        assert said["failed"] == "archive"
        assert "does not answer" in said["sentence"]


async def test_images_that_the_archive_lost(
    lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    fake_orthanc._delete(f"/studies/{world.my_image['orthanc_study_id']}")
    said = await why(lightbox, f"/study/{world.my_study}")
    assert (said["failed"], "any more" in said["sentence"]) == ("archive", True)


async def test_a_study_under_two_patients(
    lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    fake_orthanc._store(ct_image(patient_id="MRN-VICTIM", study_uid=world.my_study))
    for path in (f"/study/{world.my_study}", f"/order/{world.my_order['id']}"):
        said = await why(lightbox, path)
        assert said["failed"] == "one-patient"
        assert "VICTIM" not in str(said)


async def test_a_session_that_ended(lightbox: Lightbox, world: World) -> None:
    path = f"/order/{world.my_order['id']}"
    view = await lightbox.open(path)
    said = await why(lightbox, path)
    assert said["checks"][-1]["sentence"] == "A viewer of yours is open."
    await lightbox.must("clinician", "DELETE", f"/viewer/sessions/{view.ctx}")
    said = await why(lightbox, path)
    assert (said["failed"], said["can_open"]) == ("session", True)
    assert "was ended by you" in said["sentence"]
    # Of the caller only: a colleague's viewer is none of theirs.
    said = await why(lightbox, path, role="radiologist")
    assert said["failed"] is None
    await link_to(lightbox, path)
    said = await why(lightbox, path)
    assert (said["failed"], said["checks"][-1]["sentence"]) == (
        *(None, "A link to them was made and waits to be opened."),
    )


# ------------------------------------------------------------------------------------ the pages


async def test_the_page_of_an_ended_session_tells_its_owner_what_was_checked(
    lightbox: Lightbox, world: World
) -> None:
    view = await lightbox.open(f"/{world.my_study}")
    await view.get(frame_of(world.my_image))
    await lightbox.must("clinician", "POST", "/viewer/logout")
    path = f"/s/{view.ctx}/ended"
    own = await lightbox.client.get(path, headers={"Cookie": view.cookie})
    assert_refused(own, 200, "You have signed out")
    assert own.text.count('class="passed"') == 6
    assert own.text.count('class="failed"') == 1
    assert "open the images from there" in own.text
    stranger = await lightbox.client.get(path)
    assert_refused(stranger, 200, "You have signed out")
    assert "What was checked" not in stranger.text
    wrong = await lightbox.client.get(path, headers={"Cookie": "lightbox=" + "x" * 43})
    assert wrong.text.replace(wrong.headers["x-request-id"], "") == stranger.text.replace(
        stranger.headers["x-request-id"], ""
    )


async def test_the_page_says_what_stands_in_the_way_now(lightbox: Lightbox, world: World) -> None:
    view = await lightbox.open(f"/{world.my_study}")
    change(lightbox, "UPDATE imaging_order SET requested_by = 'x'")
    assert (await view.get(frame_of(world.my_image))).status_code == 403
    own = await lightbox.client.get(f"/s/{view.ctx}/ended", headers={"Cookie": view.cookie})
    assert_refused(own, 200, "You no longer have access")
    assert "put you on the care team" in own.text
    assert "break the glass" in own.text
    assert own.text.count('class="not-checked"') == 5


async def test_the_page_of_a_refused_link(
    lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    late = (await link_to(lightbox, f"/{world.my_study}"))["url"].partition("launch=")[2]
    used = await lightbox.open(f"/{world.my_study}")
    change(
        lightbox,
        "UPDATE launch_session SET code_expires_at = ? WHERE redeemed_at IS NULL",
        moment(seconds=-1),
    )
    answer = await redeem(lightbox, late)
    assert_refused(answer, 403, "not opened in time")
    assert "What was checked" in answer.text
    asked = len(fake_orthanc.requests)
    answer = await redeem(lightbox, used.code)
    assert_refused(answer, 410, "used already")
    # A code that was used may stand in somebody else's history.
    assert "What was checked" not in answer.text
    assert len(fake_orthanc.requests) == asked


async def test_the_page_stands_without_archive_or_explanation(
    lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    view = await lightbox.open(f"/{world.my_study}")
    await lightbox.must("clinician", "POST", "/viewer/logout")
    fake_orthanc.faults_at["/tools/lookup"] = httpx.ConnectError("refused")
    own = await lightbox.client.get(f"/s/{view.ctx}/ended", headers={"Cookie": view.cookie})
    assert_refused(own, 200, "You have signed out")
    assert "does not answer right now" in own.text
    assert rows(lightbox, "SELECT ended_because FROM launch_session") == [
        {"ended_because": "signed-out"}
    ]
