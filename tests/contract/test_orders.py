"""The life of an order, as its EHR sees it: by what really arrived, and by what the EHR may say.

Several studies may answer an order, and several orders share a study.
"""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import pytest
from sqlmodel.ext.asyncio.session import AsyncSession

from app.models import OrderStatus
from app.orderlife import Moved, images_changed
from tests.images import ct_image
from tests.lightbox import Lightbox, World
from tests.tables import change, records, rows

pytestmark = pytest.mark.anyio
API = "/api/v1"


@asynccontextmanager
async def writing(lightbox: Lightbox) -> AsyncIterator[AsyncSession]:
    """A transaction, as whoever links images has one."""
    async with lightbox.app.state.database.session() as session:
        yield session
        await session.commit()


async def changed(lightbox: Lightbox, *orders: Any, **more: Any) -> list[Moved]:
    async with writing(lightbox) as session:
        return await images_changed(session, [UUID(each["id"]) for each in orders], **more)


async def read(lightbox: Lightbox, order: Any) -> Any:
    return await lightbox.must("service", "GET", f"/orders/{order['id']}")


async def set_to(lightbox: Lightbox, order: Any, status: str) -> Any:
    path = f"{API}/orders/{order['id']}"
    return await lightbox.ask("service", "PATCH", path, json={"status": status})


def mine() -> bytes:
    """A study of the world's first patient."""
    return ct_image(patient_id="MRN-MINE")


def told(lightbox: Lightbox) -> list[Any]:
    found = rows(lightbox, "SELECT body FROM notification WHERE event = 'order-available'")
    return [json.loads(each["body"])["data"] for each in found]


def linked(lightbox: Lightbox, order: Any, uid: str) -> None:
    """A study answers one more order."""
    change(
        lightbox,
        "INSERT INTO order_study VALUES (?, ?, '2026-01-01 00:00:00.000000', 'somebody')",
        *(UUID(order["id"]).hex, uid),
    )


async def test_images_move_an_order_and_their_end_is_told_once(lightbox: Lightbox) -> None:
    patient = await lightbox.patient()
    order = await lightbox.order(patient)
    sent = await lightbox.upload(ct_image(), order_id=order["id"])
    uid = sent.json()["study_instance_uid"]
    assert (await read(lightbox, order))["status"] == "arriving"
    (done,) = [
        each
        for each in records(lightbox, sent.headers["x-request-id"])
        if each["outcome"] == "done"
    ]
    assert done["detail"]["order_status"] == {order["id"]: "scheduled -> arriving"}
    assert told(lightbox) == []
    (moved,) = await changed(lightbox, order, complete=True, study_instance_uid=uid)
    assert (moved.before, moved.after, moved.available) == ("arriving", "available", True)
    said = await read(lightbox, order)
    assert said["status"] == "available"
    assert said["fulfilled_at"] is not None
    (event,) = told(lightbox)
    assert event.keys() == {"order_id", "study_instance_uid", "at"}  # no name, no words
    assert (event["order_id"], event["study_instance_uid"]) == (order["id"], uid)
    # Said again, or more of it: nothing is new.
    assert await changed(lightbox, order, complete=True, study_instance_uid=uid) == []
    assert (await lightbox.upload(ct_image(study_uid=uid), order_id=order["id"])).status_code == 200
    assert (await read(lightbox, order))["status"] == "available"
    assert len(told(lightbox)) == 1


async def test_an_order_waits_for_each_of_its_studies(lightbox: Lightbox) -> None:
    order = await lightbox.order(await lightbox.patient())
    uids = []
    for _ in range(2):
        sent = await lightbox.upload(ct_image(), order_id=order["id"])
        uids.append(sent.json()["study_instance_uid"])
    change(
        lightbox,
        "INSERT INTO arrival SELECT orthanc_id, study_instance_uid, 'linked', '', '', '', '', '',"
        " '', '', '', '', '', '{}', 1, 1, '', '[]', '[]', NULL, NULL, '', study_instance_uid = ?,"
        " 0, 0, '', NULL, '', 1, NULL, 0, 0, '2026-01-01 00:00:00.000000',"
        " '2026-01-01 00:00:00.000000', '2026-01-01 00:00:00.000000' FROM study",
        uids[0],
    )
    assert await changed(lightbox, order, complete=True, study_instance_uid=uids[0]) == []
    assert (await read(lightbox, order))["status"] == "arriving"
    (moved,) = await changed(lightbox, order, complete=True, study_instance_uid=uids[1])
    assert moved.available
    assert sorted((await read(lightbox, order))["studies"]) == sorted(uids)


@pytest.mark.parametrize("status", ["arriving", "available"])
async def test_nobody_but_images_says_that_images_are_there(
    lightbox: Lightbox, world: World, status: str
) -> None:
    body = {"patient_id": world.mine["id"], "status": status}
    answer = await lightbox.ask("service", "POST", f"{API}/orders", json=body)
    assert answer.status_code == 422
    fresh = await lightbox.order(world.mine)
    answer = await set_to(lightbox, fresh, status)
    assert answer.status_code == 409
    assert answer.json()["allowed"] == ["scheduled", "in-progress", "completed", "cancelled"]
    assert (await read(lightbox, fresh))["status"] == "scheduled"


async def test_what_can_not_be_is_refused_with_what_can(lightbox: Lightbox, world: World) -> None:
    answer = await set_to(lightbox, world.my_order, "scheduled")
    assert answer.status_code == 409
    said = answer.json()
    assert said["status"] == 409
    assert said["allowed"] == ["in-progress", "completed", "cancelled"]
    assert "images of it are arriving" in said["detail"]
    (failed,) = [
        each
        for each in records(lightbox, answer.headers["x-request-id"])
        if each["outcome"] == "failed"
    ]
    assert failed["reason"] == "conflict"
    # What the EHR sends back as it got it is no change.
    assert (await set_to(lightbox, world.my_order, "arriving")).json()["status"] == "arriving"
    # It has begun whether the EHR says so or not.
    assert (await set_to(lightbox, world.my_order, "in-progress")).json()["status"] == "arriving"
    assert (await set_to(lightbox, world.my_order, "completed")).json()["status"] == "completed"
    assert (await set_to(lightbox, world.my_order, "cancelled")).json()["status"] == "cancelled"
    for status in ("scheduled", "in-progress", "completed"):
        assert (await set_to(lightbox, world.my_order, status)).status_code == 409


async def test_a_deletion_takes_an_order_back_to_what_the_ehr_said(
    lightbox: Lightbox, world: World
) -> None:
    path = f"/dicom/studies/{world.my_study}"
    await set_to(lightbox, world.my_order, "in-progress")
    await changed(lightbox, world.my_order, complete=True, study_instance_uid=world.my_study)
    assert (await read(lightbox, world.my_order))["status"] == "available"
    answer = await lightbox.ask(
        "service", "DELETE", f"{API}{path}", params={"reason": "the wrong study"}
    )
    assert answer.status_code == 200, answer.text
    said = await read(lightbox, world.my_order)
    assert (said["status"], said["studies"], said["fulfilled_at"]) == ("in-progress", [], None)
    (done,) = [
        each
        for each in records(lightbox, answer.headers["x-request-id"])
        if each["outcome"] == "done"
    ]
    assert done["detail"]["order_status"] == {world.my_order["id"]: "available -> in-progress"}
    # When images come again, that is told again.
    sent = await lightbox.upload(mine(), order_id=world.my_order["id"])
    assert sent.status_code == 200, sent.text
    await changed(lightbox, world.my_order, complete=True)
    assert len(told(lightbox)) == 2


async def test_the_ehr_can_want_more_images(lightbox: Lightbox, world: World) -> None:
    order = world.my_order
    await changed(lightbox, order, complete=True, study_instance_uid=world.my_study)
    said = (await set_to(lightbox, order, "scheduled")).json()
    assert (said["status"], said["fulfilled_at"]) == ("scheduled", None)
    # Looking again at what was there before doesn't make it complete.
    assert await changed(lightbox, order, complete=True, study_instance_uid=world.my_study) == []
    assert (await read(lightbox, order))["status"] == "scheduled"
    sent = await lightbox.upload(mine(), order_id=order["id"])
    assert (await read(lightbox, order))["status"] == "arriving"
    (moved,) = await changed(
        lightbox, order, complete=True, study_instance_uid=sent.json()["study_instance_uid"]
    )
    assert (moved.after, len(told(lightbox))) == (OrderStatus.AVAILABLE, 2)


async def test_completed_stays_and_is_told_all_the_same(lightbox: Lightbox, world: World) -> None:
    await set_to(lightbox, world.my_order, "completed")
    (moved,) = await changed(
        lightbox, world.my_order, complete=True, study_instance_uid=world.my_study
    )
    assert (moved.after, moved.available) == ("completed", True)
    said = await read(lightbox, world.my_order)
    assert said["status"] == "completed"
    assert said["fulfilled_at"] is not None
    assert len(told(lightbox)) == 1


async def test_a_cancelled_order_is_not_told_of(lightbox: Lightbox, world: World) -> None:
    await set_to(lightbox, world.my_order, "cancelled")
    moved = await changed(
        lightbox, world.my_order, complete=True, study_instance_uid=world.my_study
    )
    assert moved == []
    assert told(lightbox) == []
    assert (await read(lightbox, world.my_order))["fulfilled_at"] is None


async def test_orders_that_share_a_study_live_their_own_lives(
    lightbox: Lightbox, world: World
) -> None:
    """One of two is cancelled: its viewer ends, and the other's goes on."""
    second = await lightbox.order(world.mine)
    linked(lightbox, second, world.my_study)
    first_viewer = await lightbox.open(f"/order/{world.my_order['id']}")
    second_viewer = await lightbox.open(f"/order/{second['id']}")
    assert (await read(lightbox, second))["study_instance_uid"] == world.my_study
    study = await lightbox.must("service", "GET", f"/dicom/studies/{world.my_study}")
    assert sorted(study["order_ids"]) == sorted([world.my_order["id"], second["id"]])
    await changed(
        lightbox, world.my_order, second, complete=True, study_instance_uid=world.my_study
    )
    assert len(told(lightbox)) == 2
    assert (await set_to(lightbox, world.my_order, "cancelled")).status_code == 200
    assert (await first_viewer.get(f"/studies/{world.my_study}/metadata")).status_code == 403
    assert (await second_viewer.get(f"/studies/{world.my_study}/metadata")).status_code == 200
    assert (await read(lightbox, second))["status"] == "available"
    # Unlinked from the second alone, the study is still the first's.
    change(lightbox, "DELETE FROM order_study WHERE order_id = ?", UUID(second["id"]).hex)
    (moved,) = await changed(lightbox, second)
    assert (moved.before, moved.after) == ("available", "scheduled")
    assert (await read(lightbox, world.my_order))["studies"] == [world.my_study]
    answer = await lightbox.ask("clinician", "GET", f"{API}/dicom/viewer/url/order/{second['id']}")
    assert answer.status_code == 404


async def test_deleting_a_shared_study_takes_it_from_all_orders(
    lightbox: Lightbox, world: World
) -> None:
    second = await lightbox.order(world.mine)
    linked(lightbox, second, world.my_study)
    await changed(lightbox, second, complete=True, study_instance_uid=world.my_study)
    answer = await lightbox.must(
        "service", "DELETE", f"/dicom/studies/{world.my_study}", params={"reason": "a wrong one"}
    )
    assert sorted(answer["order_ids"]) == sorted([world.my_order["id"], second["id"]])
    for each in (world.my_order, second):
        said = await read(lightbox, each)
        assert (said["status"], said["studies"]) == ("scheduled", [])


async def test_of_two_studies_one_may_go(lightbox: Lightbox, world: World) -> None:
    sent = await lightbox.upload(mine(), order_id=world.my_order["id"])
    uid = sent.json()["study_instance_uid"]
    link = await lightbox.must(
        "clinician", "GET", f"/dicom/viewer/url/order/{world.my_order['id']}"
    )
    assert sorted(link["study_instance_uids"]) == sorted([uid, world.my_study])
    await lightbox.must(
        "service", "DELETE", f"/dicom/studies/{uid}", params={"reason": "a wrong one"}
    )
    said = await read(lightbox, world.my_order)
    assert (said["studies"], said["status"]) == ([world.my_study], "arriving")


async def test_a_technologist_works_on_what_arrives(lightbox: Lightbox, world: World) -> None:
    """Not on what is done: there, what counts is what they sent themselves."""
    path = f"{API}/orders/{world.my_order['id']}"
    assert (await read(lightbox, world.my_order))["status"] == "arriving"
    assert (await lightbox.ask("technologist", "GET", path, sub="another")).status_code == 200
    await changed(lightbox, world.my_order, complete=True, study_instance_uid=world.my_study)
    assert (await lightbox.ask("technologist", "GET", path, sub="another")).status_code == 403
    assert (await lightbox.ask("technologist", "GET", path)).status_code == 200
