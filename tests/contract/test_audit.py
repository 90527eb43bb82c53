"""The trail: read by auditors alone, filtered and paged, and never changed."""

import sqlite3
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from app.audit import Action, Outcome
from tests.lightbox import Lightbox, Shared, World
from tests.tables import change, outcomes, records, rows

FIELDS = {
    "id",
    "at",
    "request_id",
    "action",
    "outcome",
    "reason",
    "actor",
    "actor_roles",
    "client_address",
    "patient_id",
    "order_id",
    "study_instance_uid",
    "ctx",
    "purpose_of_use",
    "detail",
    "sha256",
}


async def read(lightbox: Lightbox, **params: str) -> Any:
    return await lightbox.must("auditor", "GET", "/audit", params={"limit": "200", **params})


# --------------------------------------------------------------------------------------- reading


async def test_a_record_says_who_what_whose_when_and_from_where(
    lightbox: Lightbox, world: World
) -> None:
    path = f"/api/v1/dicom/studies/{world.my_study}"
    await lightbox.ask("clinician", "GET", path, headers={"X-Request-ID": "looks"})
    (record,) = [each for each in await read(lightbox) if each["request_id"] == "looks"]
    assert set(record) == FIELDS
    assert (record["action"], record["outcome"]) == ("study:read", "granted")
    assert (record["actor"], record["actor_roles"]) == ("clinician", ["clinician"])
    assert record["patient_id"] == world.mine["id"]
    assert record["study_instance_uid"] == world.my_study
    assert record["client_address"] == "127.0.0.1"
    assert record["detail"] == {"by": ["requested an order of the patient"]}
    at = datetime.fromisoformat(record["at"])
    assert at.utcoffset() == timedelta(0)
    assert abs(datetime.now(UTC) - at) < timedelta(minutes=1)


async def test_reading_the_trail_is_recorded(lightbox: Lightbox, world: World) -> None:
    for _ in range(2):
        await read(lightbox, actor="clinician")
    reads = await read(lightbox, action="audit:read")
    assert [(each["actor"], each["outcome"]) for each in reads] == [("auditor", "granted")] * 3


async def test_records_come_newest_first(shared: Shared) -> None:
    found = await read(shared.lightbox)
    assert len(found) > 10
    assert [each["id"] for each in found] == sorted((each["id"] for each in found), reverse=True)


FILTERS: dict[str, Callable[[World], dict[str, str]]] = {
    "patient": lambda world: {"patient_id": world.mine["id"]},
    "study": lambda world: {"study_instance_uid": world.my_study},
    "order": lambda world: {"order_id": world.my_order["id"]},
    "actor": lambda world: {"actor": "technologist"},
    "action": lambda world: {"action": "study:upload"},
    "outcome": lambda world: {"outcome": "done"},
    "two": lambda world: {"outcome": "granted", "patient_id": world.theirs["id"]},
}


@pytest.mark.parametrize("name", FILTERS)
async def test_a_filter_shows_what_fits_and_nothing_else(name: str, shared: Shared) -> None:
    wanted = FILTERS[name](shared.world)
    everything = await read(shared.lightbox)
    fitting = [each for each in everything if wanted.items() <= each.items()]
    newest = everything[0]["id"]  # what this reads is a record too, of the patient it names
    found = [each for each in await read(shared.lightbox, **wanted) if each["id"] <= newest]
    assert [each["id"] for each in found] == [each["id"] for each in fitting]
    assert 0 < len(found) < len(everything)


async def test_a_time_is_from_and_before(shared: Shared) -> None:
    everything = await read(shared.lightbox)
    middle = everything[len(everything) // 2]["at"]
    later = await read(shared.lightbox, **{"from": middle})
    earlier = await read(shared.lightbox, to=middle)
    assert min(each["at"] for each in later) == middle > max(each["at"] for each in earlier)
    assert await read(shared.lightbox, **{"from": middle, "to": middle}) == []
    assert await read(shared.lightbox, **{"from": "2099-01-01T00:00:00+02:00"}) == []


@pytest.mark.parametrize(
    "params",
    [
        {"patient_id": "MRN-1"},
        {"action": "everything"},
        {"outcome": "fine"},
        {"from": "yesterday"},
        {"from": "2025-01-01T00:00:00"},
        {"to": "2025-01-01"},
        {"to": "0001-01-01T00:00:00+14:00"},
        {"cursor": "LTE="},
        {"cursor": "MWUz"},
        {"limit": "201"},
        {"since": "2025-01-01T00:00:00Z"},
    ],
    ids=str,
)
async def test_a_filter_that_makes_no_sense_is_refused(
    params: dict[str, str], untouched: Shared
) -> None:
    answer = await untouched.lightbox.ask("auditor", "GET", "/api/v1/audit", params=params)
    assert answer.status_code == 422


async def test_pages_show_each_record_once_while_more_are_written(shared: Shared) -> None:
    """Reading writes records too: they come before the first page, and shift none."""
    everything = [each["id"] for each in await read(shared.lightbox)]
    link: str | None = "/api/v1/audit?limit=7"
    pages: list[list[int]] = []
    while link is not None:
        answer = await shared.lightbox.ask("auditor", "GET", link)
        pages.append([each["id"] for each in answer.json()])
        following = answer.headers.get("link")
        assert following is None or following.endswith('>; rel="next"')
        link = following and following[1:].partition(">")[0]
    assert [len(page) for page in pages[:-1]] == [7] * (len(pages) - 1)
    assert [each for page in pages for each in page][1:] == everything


# ------------------------------------------------------------------------------- what is recorded


async def test_a_list_names_each_patient_it_showed(lightbox: Lightbox, world: World) -> None:
    for path, action in (
        ("patients", "patient:list"),
        ("orders", "order:list"),
        ("dicom/studies", "study:list"),
    ):
        request_id = path.replace("/", "-")
        await lightbox.ask(
            "service",
            "GET",
            f"/api/v1/{path}?limit=200",
            headers={"X-Request-ID": request_id},
        )
        found = records(lightbox, request_id)
        assert [(each["action"], each["outcome"]) for each in found] == [
            (action, "granted"),
            (action, "done"),
            (action, "done"),
        ]
        shown = {each["patient_id"] for each in found if each["outcome"] == "done"}
        ids = (world.mine["id"], world.theirs["id"])
        assert shown == {each.replace("-", "") for each in ids}
        assert found[0]["detail"] == {"query": {"limit": "200"}}


async def test_only_the_patients_of_the_page_are_named(lightbox: Lightbox, world: World) -> None:
    await lightbox.ask(
        "service", "GET", "/api/v1/patients?limit=1", headers={"X-Request-ID": "page"}
    )
    assert len(records(lightbox, "page")) == 2


async def test_what_fails_after_its_grant_says_so(lightbox: Lightbox, world: World) -> None:
    path = f"/api/v1/orders/{world.my_order['id']}"
    await lightbox.must("service", "PATCH", path[7:], json={"status": "cancelled"})
    answer = await lightbox.ask(
        "service",
        "PATCH",
        path,
        json={"status": "scheduled"},
        headers={"X-Request-ID": "fails"},
    )
    assert answer.status_code == 409
    assert outcomes(lightbox, "fails") == [("order:write", "granted"), ("order:write", "failed")]
    failed = records(lightbox, "fails")[1]
    assert failed["reason"] == "conflict"
    assert failed["order_id"] == world.my_order["id"].replace("-", "")


async def test_what_does_not_exist_is_recorded_too(lightbox: Lightbox) -> None:
    await lightbox.ask(
        "clinician", "GET", "/api/v1/dicom/studies/2.25.7", headers={"X-Request-ID": "guesses"}
    )
    (record,) = records(lightbox, "guesses")
    assert (record["outcome"], record["reason"]) == ("denied", "unknown")
    assert record["detail"] == {"study_instance_uid": "2.25.7"}


async def test_a_change_is_recorded_with_what_was(lightbox: Lightbox, world: World) -> None:
    await lightbox.ask(
        "service",
        "PATCH",
        f"/api/v1/orders/{world.my_order['id']}",
        json={"description": "new"},
        headers={"X-Request-ID": "changes"},
    )
    detail = records(lightbox, "changes")[1]["detail"]
    assert detail["before"] == {"description": "CT test"}
    assert detail["after"] == {"description": "new"}


async def test_a_deletion_keeps_what_was_deleted(lightbox: Lightbox, world: World) -> None:
    await lightbox.ask(
        "radiologist",
        "DELETE",
        f"/api/v1/dicom/studies/{world.my_study}",
        params={"reason": "  images of a phantom "},
        headers={"X-Request-ID": "deletes"},
    )
    record = records(lightbox, "deletes")[-1]
    assert (record["action"], record["outcome"]) == ("study:delete", "done")
    assert (record["actor"], record["study_instance_uid"]) == ("radiologist", world.my_study)
    assert record["detail"] == {
        "reason": "images of a phantom",
        "series_count": 1,
        "instance_count": 1,
        "order_ids": [world.my_order["id"]],
        "sop_instance_uids": [world.my_image["sop_instance_uid"]],
        "viewers_ended": 0,
        "order_status": {world.my_order["id"]: "arriving -> scheduled"},
    }


async def test_no_token_is_ever_recorded(shared: Shared) -> None:
    token = shared.lightbox.token("clinician")
    await shared.lightbox.client.get(f"/api/v1/patients?token={token}")
    await shared.lightbox.client.get("/api/v1/patients", headers={"Authorization": token})
    said = str(rows(shared.lightbox, "SELECT * FROM audit_record"))
    assert token not in said
    assert token.rpartition(".")[2] not in said


def test_actions_are_sorted_words_of_one_grammar() -> None:
    for words in (Action, Outcome):
        values = [each.value for each in words]
        assert values == sorted(values)
        assert all(word.replace(":", "").replace("-", "").isalpha() for word in values)


# ------------------------------------------------------------------------------- never changed


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE audit_record SET actor = 'somebody else'",
        "UPDATE audit_record SET id = id + 1000",
        "UPDATE OR IGNORE audit_record SET outcome = 'granted'",
        "DELETE FROM audit_record",
        "DELETE FROM audit_record WHERE id = 1",
        "REPLACE INTO audit_record SELECT * FROM audit_record WHERE id = 1",
        "INSERT OR REPLACE INTO audit_record SELECT * FROM audit_record",
        "INSERT INTO audit_record SELECT * FROM audit_record WHERE 1 ON CONFLICT DO NOTHING",
    ],
)
async def test_a_record_is_never_changed(statement: str, shared: Shared) -> None:
    before = rows(shared.lightbox, "SELECT * FROM audit_record")
    with pytest.raises(sqlite3.DatabaseError, match="never changed"):
        change(shared.lightbox, statement)
    assert rows(shared.lightbox, "SELECT * FROM audit_record") == before


async def test_the_api_has_no_way_to_change_a_record(untouched: Shared) -> None:
    for method in ("POST", "PUT", "PATCH", "DELETE"):
        for path in ("/api/v1/audit", "/api/v1/audit/1"):
            answer = await untouched.lightbox.ask("auditor", method, path)
            assert answer.status_code in (404, 405)
