"""Merging, an order's life and keys on both databases; what they lock, and what they refuse."""

import asyncio

import pytest

from tests.lightbox import running
from tests.live.conftest import Archive, DatabaseUrls, settings_for, unique

pytestmark = pytest.mark.anyio


async def test_of_merges_at_once_and_orders_placed_meanwhile_none_is_left_behind(
    database: DatabaseUrls, archive: Archive
) -> None:
    async with running(settings_for(database.app, archive.server, follow_orthanc=False)) as box:
        people = [await box.patient(unique()) for _ in range(3)]

        async def merge(source: int, into: int) -> int:
            path = f"/api/v1/patients/{people[source]['id']}/merge"
            body = {"into": people[into]["id"], "reason": "the same person"}
            return (await box.ask("service", "POST", path, json=body)).status_code

        async def place(whose: int, number: int) -> int:
            body = {"patient_id": people[whose]["id"]}
            headers = {"Idempotency-Key": f"{people[whose]['id']}-{number}"}
            answer = await box.ask("service", "POST", "/api/v1/orders", json=body, headers=headers)
            return answer.status_code

        found = await asyncio.gather(
            *(place(whose, number) for whose in range(3) for number in range(4)),
            *(merge(*pair) for pair in ((0, 1), (1, 2), (2, 0))),
            *(place(whose, number + 4) for whose in range(3) for number in range(4)),
        )
        assert set(found) <= {200, 201, 409}
        assert found[12:15].count(200) == 2
        survivors = {
            (await box.must("service", "GET", f"/patients/{each['id']}"))["id"] for each in people
        }
        (survivor,) = survivors
        for each in people:
            params = {"patient_id": each["id"], "limit": "200"}
            orders = await box.must("service", "GET", "/orders", params=params)
            placed = [*found[:12], *found[15:]].count(201)
            assert len(orders) == (placed if each["id"] == survivor else 0)
