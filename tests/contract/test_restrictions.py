"""The EHR restricts a patient: what is said, what is kept, what is recorded, who is told."""

import asyncio
from typing import Any

import pytest

from tests.lightbox import Lightbox, World
from tests.tables import rows

VIP = {"level": "vip", "reason": "a public person", "named": ["other", "dr.lee", "other"]}


def path(patient: Any) -> str:
    return f"/patients/{patient['id']}/restriction"


async def ask(lightbox: Lightbox, method: str, patient: Any, **more: Any) -> Any:
    return await lightbox.must("service", method, path(patient), **more)


async def test_a_restriction_is_what_the_ehr_said(lightbox: Lightbox, world: World) -> None:
    none = await ask(lightbox, "GET", world.mine)
    assert (none["level"], none["named"], none["set_by"]) == (None, [], None)
    made = await ask(lightbox, "PUT", world.mine, json=VIP)
    assert (made["level"], made["reason"]) == ("vip", "a public person")
    assert (made["named"], made["set_by"]) == (["dr.lee", "other"], "service")
    assert await ask(lightbox, "GET", world.mine) == made
    sealed = await ask(lightbox, "PUT", world.mine, json={"level": "sealed", "reason": None})
    assert (sealed["level"], sealed["reason"], sealed["named"]) == ("sealed", "", [])
    assert (await ask(lightbox, "GET", world.theirs))["level"] is None
    for _ in range(2):
        await ask(lightbox, "DELETE", world.mine)
        assert (await ask(lightbox, "GET", world.mine))["level"] is None
    assert rows(lightbox, "SELECT * FROM named_person") == []


async def test_each_change_is_recorded_with_what_was_before(
    lightbox: Lightbox, world: World
) -> None:
    vip = {"level": "vip", "reason": "a public person", "named": ["dr.lee", "other"]}
    sealed = {"level": "sealed", "reason": "", "named": []}
    await ask(lightbox, "PUT", world.mine, json=VIP)
    await ask(lightbox, "PUT", world.mine, json={"level": "sealed"})
    await ask(lightbox, "DELETE", world.mine)
    await ask(lightbox, "DELETE", world.mine)
    done = await lightbox.audit(action="restriction:write", outcome="done")
    assert [each["detail"] for each in reversed(done)] == [
        {"before": None, "after": vip},
        {"before": vip, "after": sealed},
        {"before": sealed, "after": None},
        {"before": None, "after": None},
    ]
    assert {each["patient_id"] for each in done} == {world.mine["id"]}
    granted = await lightbox.audit(action="restriction:write", outcome="granted")
    assert [each["request_id"] for each in granted] == [each["request_id"] for each in done]


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"level": "secret"},
        {"level": "VIP"},
        {"level": None},
        {"level": "vip", "named": [""]},
        {"level": "vip", "named": ["a\nb"]},
        {"level": "vip", "named": [7]},
        {"level": "vip", "named": "other"},
        {"level": "vip", "named": None},
        {"level": "vip", "named": ["x" * 256]},
        {"level": "vip", "named": [str(each) for each in range(1001)]},
        {"level": "vip", "reason": "x" * 501},
        {"level": "vip", "name": ["other"]},
    ],
    ids=lambda each: str(each)[:40],
)
async def test_what_is_not_understood_changes_nothing(
    wrong: Any, lightbox: Lightbox, world: World
) -> None:
    made = await ask(lightbox, "PUT", world.mine, json=VIP)
    answer = await lightbox.ask("service", "PUT", f"/api/v1{path(world.mine)}", json=wrong)
    assert answer.status_code == 422
    assert await ask(lightbox, "GET", world.mine) == made


async def test_of_two_lists_at_once_one_holds(lightbox: Lightbox, world: World) -> None:
    """And not both together: that would let people in whom neither named."""
    lists = [[f"{name}-{each}" for each in range(5)] for name in "abcdef"]
    answers = await asyncio.gather(
        *(
            lightbox.ask(
                "service",
                "PUT",
                f"/api/v1{path(world.mine)}",
                json={"level": "vip", "named": named},
            )
            for named in lists
        )
    )
    assert {each.status_code for each in answers} <= {200, 503}
    assert (await ask(lightbox, "GET", world.mine))["named"] in lists


async def test_who_is_kept_out_is_told_so_and_no_more(lightbox: Lightbox, world: World) -> None:
    await ask(lightbox, "PUT", world.mine, json=VIP)
    answer = await lightbox.ask("clinician", "GET", f"/api/v1/patients/{world.mine['id']}")
    assert (answer.status_code, answer.json()["reason"]) == (403, "restricted")
    for word in ("public", "dr.lee", "vip"):
        assert word not in answer.text.lower()
    # Somebody whom nothing ties to the patient does not even hear that.
    answer = await lightbox.ask(
        "clinician", "GET", f"/api/v1/patients/{world.mine['id']}", sub="stranger"
    )
    assert answer.json()["reason"] == "no-relationship"
    for role in ("clinician", "radiologist", "technologist", "admin", "auditor"):
        for method in ("GET", "PUT", "DELETE"):
            more: Any = {"json": VIP} if method == "PUT" else {}
            refused = await lightbox.ask(role, method, f"/api/v1{path(world.mine)}", **more)
            assert (refused.status_code, refused.json()["reason"]) == (403, "role")
