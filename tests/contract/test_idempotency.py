"""A request that is sent again under its key is not done again, and shows nobody else anything."""

import asyncio
from typing import Any

import httpx
import pytest

from app import idempotency
from app.access import PatientAccess
from tests.images import ct_image
from tests.lightbox import Lightbox, World
from tests.tables import REFUSE_RECORDS, change, records, rows

pytestmark = pytest.mark.anyio
API = "/api/v1"
PERSON = {"first_name": "Ida", "last_name": "Potent", "dob": "1980-01-01", "mrn": "MRN-I"}


async def send(
    lightbox: Lightbox, path: str, key: str = "key-1", *, role: str = "service", **more: Any
) -> httpx.Response:
    method = more.pop("method", "POST")
    headers = {"Idempotency-Key": key}
    return await lightbox.ask(role, method, f"{API}{path}", headers=headers, **more)


def kept(lightbox: Lightbox) -> list[dict[str, Any]]:
    return rows(lightbox, "SELECT * FROM idempotency_key ORDER BY key")


async def test_the_same_request_is_answered_as_before_and_done_once(lightbox: Lightbox) -> None:
    first = await send(lightbox, "/patients", json=PERSON)
    again = await send(lightbox, "/patients", json=PERSON)
    assert first.status_code == again.status_code == 201
    assert first.content == again.content
    assert "idempotency-replayed" not in first.headers
    assert again.headers["idempotency-replayed"] == "true"
    assert len(rows(lightbox, "SELECT id FROM patient")) == 1
    # The trail tells the two apart.
    *_, done = records(lightbox, again.headers["x-request-id"])
    assert done["detail"] == {"repeats": first.headers["x-request-id"]}


async def test_without_a_key_nothing_is_kept(lightbox: Lightbox) -> None:
    await lightbox.patient()
    assert kept(lightbox) == []


@pytest.mark.parametrize("key", ["8e03978e-40d5-43dd-bc93-6894a57f9324", "a b", '"a b"', "x" * 255])
async def test_a_key_is_text_with_or_without_quotes(lightbox: Lightbox, key: str) -> None:
    answer = await send(lightbox, "/patients", key, json=PERSON)
    if " " in key:
        assert answer.status_code == 422
        assert rows(lightbox, "SELECT id FROM patient") == []
    else:
        assert answer.status_code == 201
        assert [each["key"] for each in kept(lightbox)] == [key]
        quoted = await send(lightbox, "/patients", f'"{key}"', json=PERSON)
        assert quoted.headers["idempotency-replayed"] == "true"


@pytest.mark.parametrize("key", ["", '""', 'a"b', "x" * 256, '"open', "caf\u00e9"])
async def test_a_key_that_is_none_is_refused(lightbox: Lightbox, key: str) -> None:
    headers = {"Idempotency-Key": key.encode("latin-1")}
    answer = await lightbox.ask("service", "POST", f"{API}/patients", json=PERSON, headers=headers)
    assert answer.status_code == 422
    assert rows(lightbox, "SELECT id FROM patient") == []


async def test_another_request_under_the_same_key_is_refused(lightbox: Lightbox) -> None:
    patient = (await send(lightbox, "/patients", json=PERSON)).json()
    for path, body in (
        ("/patients", {**PERSON, "mrn": "MRN-J"}),
        ("/orders", PERSON),
        ("/orders", {"patient_id": patient["id"]}),
    ):
        answer = await send(lightbox, path, json=body)
        assert answer.status_code == 422
    assert answer.json()["type"] == "urn:lightbox:problem:idempotency-key-reused"
    assert "Ida" not in answer.text
    assert rows(lightbox, "SELECT id FROM imaging_order") == []


async def test_a_key_is_its_callers_own(lightbox: Lightbox) -> None:
    first = await send(lightbox, "/patients", json=PERSON)
    answer = await send(lightbox, "/patients", sub="another-ehr", json=PERSON)
    assert answer.status_code == 409  # it was done, not answered from what was kept
    assert answer.json()["type"] == "urn:lightbox:problem:conflict"
    assert first.json()["id"] not in answer.text
    # And of a role that may not do it, not even with the same sub.
    answer = await send(lightbox, "/patients", role="admin", sub="service", json=PERSON)
    assert answer.status_code == 403


async def test_a_lost_right_is_not_gone_around(lightbox: Lightbox, world: World) -> None:
    """The patient is decided about anew, whatever was answered before."""
    reason = {"reason_code": "emergency-treatment", "reason_text": "Unconscious in the ER."}
    path = f"/patients/{world.theirs['id']}/break-glass"
    first = await send(lightbox, path, role="clinician", json=reason)
    assert first.status_code == 200, first.text
    again = await send(lightbox, path, role="clinician", json=reason)
    assert again.content == first.content
    assert len(rows(lightbox, "SELECT id FROM broken_glass")) == 1
    context = {"sub": "clinician", "roles": ["clinician"], "patient": world.mine["id"]}
    context["scope"] = "launch/patient patient/*.cruds"
    headers = {"Idempotency-Key": "key-1"}
    answer = await lightbox.ask(
        None, "POST", f"{API}{path}", claims=context, headers=headers, json=reason
    )
    assert answer.status_code == 403, answer.text
    assert first.json()["id"] not in answer.text


async def test_what_failed_may_be_sent_again_under_its_key(lightbox: Lightbox) -> None:
    patient = await lightbox.patient()
    order = {"patient_id": patient["id"], "accession_number": "ACC-1"}
    other = await lightbox.order(patient, accession_number="ACC-1")
    assert (await send(lightbox, "/orders", json=order)).status_code == 409
    assert kept(lightbox) == []
    change(lightbox, "UPDATE imaging_order SET accession_number = 'ACC-2'")
    answer = await send(lightbox, "/orders", json=order)
    assert answer.status_code == 201
    assert answer.json()["id"] != other["id"]


async def test_an_answer_is_not_kept_without_what_was_done(lightbox: Lightbox) -> None:
    """The commit fails: neither stands, and the key is free."""
    patient = await lightbox.patient()
    body = {"status": "cancelled"}
    order = await lightbox.order(patient)
    change(
        lightbox,
        REFUSE_RECORDS.replace("BEFORE INSERT ON", "BEFORE INSERT ON").replace(
            "BEGIN SELECT", "WHEN NEW.outcome = 'done' BEGIN SELECT"
        ),
    )
    answer = await send(lightbox, f"/orders/{order['id']}", method="PATCH", json=body)
    assert answer.status_code == 503
    assert kept(lightbox) == []
    assert rows(lightbox, "SELECT status FROM imaging_order") == [{"status": "scheduled"}]
    change(lightbox, "DROP TRIGGER no_more_records")
    answer = await send(lightbox, f"/orders/{order['id']}", method="PATCH", json=body)
    assert answer.json()["status"] == "cancelled"


async def test_at_the_same_moment_one_is_done_and_the_others_wait(
    lightbox: Lightbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient = await lightbox.patient()
    started, go = asyncio.Event(), asyncio.Event()
    done = PatientAccess.done

    async def slowly(self: PatientAccess, **more: Any) -> None:
        started.set()
        await go.wait()
        await done(self, **more)

    monkeypatch.setattr(PatientAccess, "done", slowly)
    order = {"patient_id": patient["id"]}
    # It holds SQLite's turn to write only from its own first row on; so it waits before that.
    monkeypatch.setattr("app.routes.orders.new_uid", lambda: "1.2.3.4")
    path = f"/patients/{patient['id']}/care-team/x"
    first = asyncio.create_task(send(lightbox, path, method="DELETE"))
    await asyncio.wait_for(started.wait(), 10)
    change_of = rows(lightbox, "SELECT answered_at FROM idempotency_key")
    assert change_of == [{"answered_at": None}]
    go.set()
    assert (await first).status_code == 204
    again = await send(lightbox, path, method="DELETE")
    assert (again.status_code, again.headers["idempotency-replayed"]) == (204, "true")
    assert (await send(lightbox, "/orders", "key-2", json=order)).status_code == 201


def claimed(lightbox: Lightbox, seconds_ago: float) -> None:
    """The request died at work, or is at it still."""
    change(
        lightbox,
        "UPDATE idempotency_key SET answered_at = NULL, body = '', status = 0, claim = 'other',"
        " claimed_at = strftime('%Y-%m-%d %H:%M:%f000', 'now', ?)",
        f"-{seconds_ago} seconds",
    )


async def test_a_request_still_at_work_is_not_done_twice(lightbox: Lightbox) -> None:
    await send(lightbox, "/patients", json=PERSON)
    claimed(lightbox, 1)
    answer = await send(lightbox, "/patients", json=PERSON)
    assert answer.status_code == 409
    assert answer.json()["type"] == "urn:lightbox:problem:still-at-work"
    assert [each["claim"] for each in kept(lightbox)] == ["other"]


async def test_a_claim_whose_process_died_is_taken_over(lightbox: Lightbox) -> None:
    await send(lightbox, "/patients", json=PERSON)
    claimed(lightbox, idempotency.CLAIM_SECONDS + 5)
    change(lightbox, "DELETE FROM patient")
    answer = await send(lightbox, "/patients", json=PERSON)
    assert answer.status_code == 201
    assert "idempotency-replayed" not in answer.headers


async def test_who_lost_the_claim_changes_nothing(
    lightbox: Lightbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slower than its time, and taken over: the first one may not be done as well."""
    patient = await lightbox.patient()
    answer_ = idempotency._answer

    async def late(*args: Any) -> None:
        await args[0].session.rollback()  # give up SQLite's turn, and have nothing written
        claimed(lightbox, 1)
        await answer_(*args)

    monkeypatch.setattr(idempotency, "_answer", late)
    answer = await send(lightbox, "/orders", json={"patient_id": patient["id"]})
    assert answer.status_code == 409, answer.text
    assert rows(lightbox, "SELECT id FROM imaging_order") == []
    assert [each["claim"] for each in kept(lightbox)] == ["other"]


async def test_keys_are_forgotten_after_their_time(lightbox: Lightbox) -> None:
    await send(lightbox, "/patients", json=PERSON)
    change(
        lightbox,
        "UPDATE idempotency_key"
        " SET created_at = strftime('%Y-%m-%d %H:%M:%f000', 'now', '-25 hours')",
    )
    answer = await send(lightbox, "/patients", json=PERSON)
    assert answer.status_code == 409  # done anew, and the patient is there
    assert kept(lightbox) == []


async def test_a_caller_keeps_only_so_many(lightbox: Lightbox) -> None:
    for number in range(4):
        person = {**PERSON, "mrn": f"MRN-{number}"}
        await send(lightbox, "/patients", f"key-{number}", json=person)
    await send(lightbox, "/patients", "other", sub="other", json={**PERSON, "mrn": "MRN-O"})
    async with lightbox.app.state.database.session() as session:
        await idempotency.prune(session, "service", most=2)
        await session.commit()
    assert [each["key"] for each in kept(lightbox)] == ["key-2", "key-3", "other"]


async def test_files_and_reads_take_no_key(lightbox: Lightbox, world: World) -> None:
    """A file is known by its SOPInstanceUID; a read changes nothing."""
    content = ct_image(patient_id="MRN-MINE")
    fields = {"order_id": world.my_order["id"]}
    for status in ("uploaded", "duplicate"):
        answer = await send(
            lightbox,
            "/dicom/upload",
            role="technologist",
            files={"file": ("a.dcm", content, "application/dicom")},
            data=fields,
        )
        assert answer.json()["status"] == status
    path = f"/patients/{world.mine['id']}"
    assert (await send(lightbox, path, method="GET")).status_code == 200
    assert kept(lightbox) == []


async def test_what_answers_with_nothing_is_repeated_too(lightbox: Lightbox, world: World) -> None:
    path = f"/patients/{world.mine['id']}/care-team/dr.who"
    await send(lightbox, path, "key-put", method="PUT", json={"role": "consultant"})
    first = await send(lightbox, path, "key-delete", method="DELETE")
    await lightbox.must("service", "PUT", path)
    again = await send(lightbox, path, "key-delete", method="DELETE")
    assert (first.status_code, again.status_code, again.content) == (204, 204, b"")
    # The repeated deletion did not take off whom somebody put on meanwhile.
    assert len(await lightbox.must("service", "GET", path.rpartition("/")[0])) == 1


async def test_a_refused_caller_leaves_no_key(lightbox: Lightbox, world: World) -> None:
    for role in (None, "clinician", "auditor"):
        answer = await lightbox.ask(
            role, "POST", f"{API}/patients", headers={"Idempotency-Key": "k"}, json=PERSON
        )
        assert answer.status_code == (401 if role is None else 403)
    answer = await send(lightbox, "/patients", json={"first_name": "only"})
    assert answer.status_code == 422
    assert kept(lightbox) == []
