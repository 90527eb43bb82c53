"""Limits of tries: how often one address may fail to say who it is, one person open viewers.

Counted in a moving minute, in the memory of each app process. Only failures count for an address,
because a hospital may come as one (NAT): who has a valid token or code is never held up by others.
Beyond the limit a failure costs 429 and no record of its own; what was not recorded singly is
summed up in the trail once a minute.
"""

import asyncio
import hashlib
import ipaddress
import logging
import math
import secrets
import time
from dataclasses import dataclass
from datetime import datetime

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from app.audit import Action, AuditTrail, Entry, Origin, Outcome
from app.db import utcnow
from app.errors import TooManyRequests

logger = logging.getLogger(__name__)

SUM_UP_SECONDS = 60.0
BUCKETS = 4096  # addresses share them, so that 100,000 cost no more memory than 4,096
SUMMED_ADDRESSES = 100  # named one by one in a summary; the others together
ALL_ADDRESSES_FACTOR = 20  # failures that are recorded singly, of all addresses together


@dataclass
class _Unrecorded:
    tries: int
    first_at: datetime
    last_at: datetime


class FailedTries:
    """Tries to say who one is that failed: bad tokens, cookies and launch codes. One per app."""

    def __init__(self, trail: AuditTrail, per_minute: int) -> None:
        self._trail = trail
        self._limiter = _limiter()
        self._of_one = RateLimitItemPerMinute(per_minute)
        self._of_all = RateLimitItemPerMinute(per_minute * ALL_ADDRESSES_FACTOR)
        self._unrecorded: dict[str, _Unrecorded] = {}
        # Nobody can choose an address that shares the bucket of another's.
        self._key = secrets.token_bytes(16)

    async def record(self, entry: Entry) -> None:
        """Record a failed try. Raises TooManyRequests where its address had too many, and
        AuditUnavailable."""
        network = network_of(entry.origin.client_address)
        bucket = self._bucket(network)
        if not self._limiter.hit(self._of_one, bucket):
            self._count(network)
            raise too_many(
                "Too many tries from your address have failed.",
                self._limiter,
                *(self._of_one, bucket),
            )
        if self._limiter.hit(self._of_all, "all"):
            await self._trail.record(entry)
        else:
            self._count(network)

    async def sum_up(self) -> None:
        """Record what was counted since the last time. Raises AuditUnavailable; then it stays
        counted."""
        counted, self._unrecorded = self._unrecorded, {}
        try:
            await self._trail.record(*(_summary(*each) for each in counted.items()))
        except BaseException:
            for network, each in counted.items():
                self._add(network, each)
            raise

    async def run(self) -> None:
        """Sum up each minute, until cancelled; then once more."""
        try:
            while True:
                await asyncio.sleep(SUM_UP_SECONDS)
                await self._try_to_sum_up()
        finally:
            await self._try_to_sum_up()

    async def _try_to_sum_up(self) -> None:
        try:
            await self.sum_up()
        except Exception as error:
            logger.error("failed sign-ins were not summed up, will try again", exc_info=error)

    def _count(self, network: str) -> None:
        now = utcnow()
        self._add(network, _Unrecorded(1, now, now))

    def _add(self, network: str, more: _Unrecorded) -> None:
        if network not in self._unrecorded and len(self._unrecorded) >= SUMMED_ADDRESSES:
            network = ""
        known = self._unrecorded.setdefault(network, _Unrecorded(0, more.first_at, more.last_at))
        known.tries += more.tries
        known.first_at = min(known.first_at, more.first_at)
        known.last_at = max(known.last_at, more.last_at)

    def _bucket(self, network: str) -> str:
        digest = hashlib.blake2b(network.encode(), key=self._key, digest_size=4).digest()
        return str(int.from_bytes(digest) % BUCKETS)


class Launches:
    """Viewer links of one person. One per app."""

    def __init__(self, per_minute: int) -> None:
        self._limiter = _limiter()
        self._item = RateLimitItemPerMinute(per_minute)

    def count(self, sub: str) -> None:
        """Count a link. Raises TooManyRequests."""
        if not self._limiter.hit(self._item, sub):
            said = "You have asked for too many viewer links at once."
            raise too_many(said, self._limiter, self._item, sub)


def network_of(address: str) -> str:
    """Whose tries are counted together: an IPv4 address, or an IPv6 network of 64 bits, which one
    machine has for itself. What is no address stays as it is, as far as 64 characters."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address[:64]
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)


def too_many(
    said: str, limiter: MovingWindowRateLimiter, item: RateLimitItemPerMinute, key: str
) -> TooManyRequests:
    """The refusal, with the seconds after which the oldest of the tries counts no more."""
    reset_at = limiter.get_window_stats(item, key).reset_time
    seconds = min(max(math.ceil(reset_at - time.time()), 1), item.get_expiry())
    return TooManyRequests(f"{said} Try again in {seconds} seconds.", seconds)


def _limiter() -> MovingWindowRateLimiter:
    return MovingWindowRateLimiter(MemoryStorage())


def _summary(network: str, each: _Unrecorded) -> Entry:
    """`client_address` is empty for what is summed up over addresses."""
    return Entry(
        action=Action.SIGN_IN,
        outcome=Outcome.DENIED,
        origin=Origin(request_id="limits", client_address=network),
        reason="too-many-tries",
        detail={
            "tries": each.tries,
            "first_at": each.first_at.isoformat(),
            "last_at": each.last_at.isoformat(),
        },
    )
