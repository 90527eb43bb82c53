"""Limits of tries: counting, summing up, memory."""

import asyncio
import ipaddress
from collections.abc import Sequence
from typing import cast

import pytest

from app import limits
from app.audit import Action, AuditTrail, Entry, Origin, Outcome
from app.errors import AuditUnavailable, TooManyRequests
from app.limits import FailedTries, Launches, network_of


class Trail:
    """Keeps what is recorded; or can't."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.down = False

    async def record(self, *entries: Entry) -> None:
        if self.down:
            raise AuditUnavailable("The audit trail can't be written.")
        self.entries += entries

    @property
    def summaries(self) -> Sequence[Entry]:
        return [each for each in self.entries if each.reason == "too-many-tries"]


def failed_tries(trail: Trail, per_minute: int) -> FailedTries:
    return FailedTries(cast(AuditTrail, trail), per_minute)


def a_try(address: str = "192.0.2.1") -> Entry:
    return Entry(Action.SIGN_IN, Outcome.DENIED, Origin("id", address), reason="bad-token")


async def try_(tries: FailedTries, address: str) -> bool:
    """Was it below the limit?"""
    try:
        await tries.record(a_try(address))
    except TooManyRequests:
        return False
    return True


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
        ("testclient", "testclient"),
        ("x" * 1000, "x" * 64),
    ],
)
def test_whose_tries_are_counted_together(address: str, network: str) -> None:
    assert network_of(address) == network


async def test_the_first_are_recorded_and_the_rest_summed_up() -> None:
    trail = Trail()
    tries = failed_tries(trail, 3)
    assert [await try_(tries, "192.0.2.1") for _ in range(10)] == [True] * 3 + [False] * 7
    assert await try_(tries, "192.0.2.2")  # another address is another matter
    assert trail.entries == [*[a_try("192.0.2.1")] * 3, a_try("192.0.2.2")]
    await tries.sum_up()
    (summary,) = trail.summaries
    assert (summary.action, summary.outcome) == (Action.SIGN_IN, Outcome.DENIED)
    assert summary.origin.client_address == "192.0.2.1"
    assert summary.detail["tries"] == 7
    assert summary.detail["first_at"] <= summary.detail["last_at"]
    await tries.sum_up()
    assert len(trail.entries) == 5  # once


async def test_retry_after_is_when_a_try_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_700_000_000.0
    monkeypatch.setattr("time.time", lambda: now)
    tries = failed_tries(Trail(), 2)
    assert await try_(tries, "192.0.2.1")
    now += 20
    assert await try_(tries, "192.0.2.1")
    with pytest.raises(TooManyRequests) as refused:
        await tries.record(a_try())
    assert refused.value.retry_after_seconds == 40
    assert refused.value.status == 429
    now += 39
    assert not await try_(tries, "192.0.2.1")
    now += 1.1
    assert await try_(tries, "192.0.2.1")
    assert not await try_(tries, "192.0.2.1")  # a moving window: the second still counts


async def test_many_addresses_do_not_flood_the_trail_either() -> None:
    trail = Trail()
    tries = failed_tries(trail, 20)
    # None of them too often: each hears that its token is bad.
    assert all([await try_(tries, f"10.0.{i // 250}.{i % 250}") for i in range(600)])
    singly = 20 * limits.ALL_ADDRESSES_FACTOR
    assert singly < 500
    assert len(trail.entries) == singly
    await tries.sum_up()
    assert len(trail.summaries) == limits.SUMMED_ADDRESSES + 1
    assert sum(each.detail["tries"] for each in trail.summaries) == 600 - singly
    (rest,) = [each for each in trail.summaries if each.origin.client_address == ""]
    assert rest.detail["tries"] == 600 - singly - limits.SUMMED_ADDRESSES


async def test_a_hundred_thousand_addresses_cost_little_memory() -> None:
    tries = failed_tries(Trail(), 60)
    for i in range(100_000):
        await try_(tries, str(ipaddress.ip_address(0x0A000000 + i)))
    assert len(tries._unrecorded) <= limits.SUMMED_ADDRESSES + 1
    kept: dict[str, list[object]] = tries._limiter.storage.events  # type: ignore[attr-defined]
    assert 1000 < len(kept) <= limits.BUCKETS + 1
    assert sum(map(len, kept.values())) <= 60 * (limits.BUCKETS + limits.ALL_ADDRESSES_FACTOR)


async def test_a_summary_that_can_not_be_written_stays_counted() -> None:
    trail = Trail()
    tries = failed_tries(trail, 1)
    for _ in range(4):
        await try_(tries, "192.0.2.1")
    trail.down = True
    with pytest.raises(AuditUnavailable):
        await tries.sum_up()
    trail.down = False
    await try_(tries, "192.0.2.1")
    await tries.sum_up()
    (summary,) = trail.summaries
    assert summary.detail["tries"] == 4


async def test_a_failure_that_can_not_be_recorded_is_no_answer() -> None:
    trail = Trail()
    trail.down = True
    with pytest.raises(AuditUnavailable):
        await failed_tries(trail, 5).record(a_try())


async def test_the_summing_up_goes_on_after_an_error_and_ends_with_the_app(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(limits, "SUM_UP_SECONDS", 0.001)
    trail = Trail()
    tries = failed_tries(trail, 1)
    for _ in range(3):
        await try_(tries, "192.0.2.1")
    trail.down = True
    task = asyncio.create_task(tries.run())
    async with asyncio.timeout(60):
        while caplog.text.count("not summed up") < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    assert trail.summaries == []
    trail.down = False
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    (summary,) = trail.summaries
    assert summary.detail["tries"] == 2


def test_viewer_links_are_counted_by_person() -> None:
    launches = Launches(2)
    launches.count("one")
    launches.count("one")
    with pytest.raises(TooManyRequests, match="viewer links"):
        launches.count("one")
    launches.count("other")
