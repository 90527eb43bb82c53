"""Notifications: what the hospital's own systems are told of, by a signed webhook.

An event is a row in the transaction of what happened (an outbox): what is rolled back is never
told, and what is committed is not lost with a process. Each app process sends what is due; a row is
claimed by one at a time, and comes due again if that one dies with it. So it is told at least once,
in no certain order, always under the same `webhook-id`.

Signed as https://www.standardwebhooks.com (1.0.0) says: HMAC-SHA256 of `id.timestamp.body`.
"""

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import random
from collections.abc import Mapping
from datetime import date, datetime, timedelta
from enum import StrEnum
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import httpx
import sqlalchemy as sa
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.db import Database, utcnow
from app.models import Notification
from app.settings import Settings, webhook_key

logger = logging.getLogger(__name__)

POLL_SECONDS = 2.0
BATCH = 8  # sent at once by one process
CONNECT_SECONDS = 5.0
SEND_SECONDS = 15.0  # for all of one attempt, however slowly it is answered
LEASE = timedelta(seconds=60)  # a process that took a row and is silent has died
FIRST_DELAY_SECONDS = 5.0
LONGEST_DELAY_SECONDS = 900.0
MAX_ATTEMPTS = 300  # about three days: a weekend, and the Monday on which it is seen
KEPT = timedelta(days=30)  # what is done with; an alert that was given up is kept for good

NO_WEBHOOK = "no webhook is configured"


class Event(StrEnum):
    """What is told; docs/operating.md says what each body holds."""

    BREAK_GLASS = "break-glass"
    LINK_UNDONE = "link-undone"
    ORDER_AVAILABLE = "order-available"
    STUDY_UNMATCHED = "study-unmatched"


ALERTS = frozenset({Event.BREAK_GLASS})
"""What somebody has to look at; the others only save asking."""


class _Claimed(NamedTuple):
    id: UUID
    event: str
    body: str
    attempts: int  # with the one that is about to be made


class Notifications:
    """Sends what is due. One per app."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._url = settings.webhook_url
        secret = settings.webhook_secret
        self._key = webhook_key(secret.get_secret_value()) if secret is not None else b""
        self._database = database

    @staticmethod
    async def add(session: AsyncSession, event: Event | str, body: Mapping[str, Any]) -> UUID:
        """Add an event to the caller's transaction; its id.

        `body` is sent as `data`: ids (UUID, datetime and enum values are written as text), no
        name and no free text. Raises ValueError for an event that `Event` doesn't list.
        """
        named, at = Event(event), utcnow()
        told = {"type": named.value, "timestamp": at.isoformat(), "data": dict(body)}
        row = Notification(
            id=uuid4(),
            event=named.value,
            body=json.dumps(told, default=_as_text, separators=(",", ":")),
            created_at=at,
            next_attempt_at=at,
        )
        session.add(row)
        await session.flush()
        return row.id

    async def run(self) -> None:
        """Send what is due, until cancelled. Nothing that goes wrong ends it."""
        if self._url is None:
            logger.warning(
                "no webhook is configured (LIGHTBOX_WEBHOOK_URL): nobody is told of broken glass "
                "and other events; `python -m app notifications list` shows them"
            )
        async with httpx.AsyncClient(
            timeout=httpx.Timeout(SEND_SECONDS, connect=CONNECT_SECONDS), follow_redirects=False
        ) as client:
            while True:
                try:
                    while await self.send_due(client) == BATCH:
                        pass
                except Exception as error:
                    logger.error("notifications are not sent, will try again", exc_info=error)
                await asyncio.sleep(POLL_SECONDS)

    async def send_due(self, client: httpx.AsyncClient) -> int:
        """Try each row that is due, at most `BATCH`; how many were tried. Without a webhook they
        are given up, and said to be."""
        claimed = await self._claim()
        if not claimed:
            return 0
        if self._url is None:
            await asyncio.gather(*(self._give_up(each, NO_WEBHOOK) for each in claimed))
        else:
            await asyncio.gather(*(self._send(client, each) for each in claimed))
        await self._forget_old()
        return len(claimed)

    async def _claim(self) -> list[_Claimed]:
        """Take rows that are due, in one statement: no two processes get the same."""
        now = utcnow()
        due = (
            select(Notification.id)
            .where(col(Notification.next_attempt_at) <= now)
            .order_by(col(Notification.next_attempt_at), col(Notification.created_at))
        )
        mine = due.limit(BATCH).with_for_update(skip_locked=True).cte("mine")
        taken = (
            sa.update(Notification)
            .where(
                col(Notification.id).in_(sa.select(mine.c.id)),
                col(Notification.next_attempt_at) <= now,
            )
            .values(attempts=col(Notification.attempts) + 1, next_attempt_at=now + LEASE)
            .returning(
                *(col(Notification.id), col(Notification.event)),
                *(col(Notification.body), col(Notification.attempts)),
            )
            .execution_options(synchronize_session=False)
        )
        async with self._database.session() as session:
            if (await session.exec(due.limit(1))).first() is None:
                return []  # SQLite's one writer is not kept busy by nothing
        async with self._database.writing_session() as session:
            rows = (await session.exec(taken)).all()
            await session.commit()
        return [_Claimed(*row) for row in rows]

    async def _send(self, client: httpx.AsyncClient, each: _Claimed) -> None:
        why_not = await self._post(client, each)
        if why_not == "":
            await self._settle(each, delivered_at=utcnow(), next_attempt_at=None, last_error="")
        elif each.attempts >= MAX_ATTEMPTS:
            await self._give_up(each, why_not)
        else:
            again = utcnow() + timedelta(seconds=delay_seconds(each.attempts))
            await self._settle(each, next_attempt_at=again, last_error=why_not)
            logger.warning(
                "notification %s (%s) not delivered at attempt %d: %s",
                *(each.id, each.event, each.attempts, why_not),
            )

    async def _post(self, client: httpx.AsyncClient, each: _Claimed) -> str:
        """Why it was not taken; empty where it was. A status or a kind of error: what the receiver
        says is not read, and an error's own words may hold the URL."""
        assert self._url is not None
        body = each.body.encode()
        headers = {
            "Content-Type": "application/json",
            **signature(self._key, str(each.id), utcnow(), body),
        }
        try:
            async with (
                asyncio.timeout(SEND_SECONDS),
                client.stream("POST", self._url, content=body, headers=headers) as answer,
            ):
                return "" if answer.is_success else f"HTTP {answer.status_code}"
        except TimeoutError:
            return "timeout"
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            return type(error).__name__

    async def _give_up(self, each: _Claimed, why: str) -> None:
        await self._settle(each, next_attempt_at=None, last_error=why)
        wanted = self._url is not None or each.event in ALERTS
        logger.log(
            logging.ERROR if wanted else logging.DEBUG,
            "notification %s (%s) given up at attempt %d: %s; `python -m app notifications replay` "
            "sends it again",
            *(each.id, each.event, each.attempts, why),
        )

    async def _settle(self, each: _Claimed, **values: Any) -> None:
        """Write what became of an attempt, unless the row is somebody else's by now."""
        mine = (
            sa.update(Notification)
            .where(
                col(Notification.id) == each.id,
                col(Notification.attempts) == each.attempts,
                col(Notification.delivered_at).is_(None),
            )
            .values(**values)
        )
        async with self._database.writing_session() as session:
            await session.exec(mine)
            await session.commit()

    async def _forget_old(self) -> None:
        before = utcnow() - KEPT
        no_alert = sa.and_(
            col(Notification.created_at) < before,
            col(Notification.next_attempt_at).is_(None),
            col(Notification.event).not_in(ALERTS),
        )
        old = sa.delete(Notification).where(
            sa.or_(col(Notification.delivered_at) < before, no_alert)
        )
        async with self._database.writing_session() as session:
            await session.exec(old)
            await session.commit()


def replay(notification_id: UUID | None = None) -> sa.Update:
    """The statement that makes one row due now, delivered or not; without an id, all that were
    given up. They keep their `webhook-id`."""
    which = (
        sa.and_(
            col(Notification.delivered_at).is_(None), col(Notification.next_attempt_at).is_(None)
        )
        if notification_id is None
        else col(Notification.id) == notification_id
    )
    now = utcnow()
    return (
        sa.update(Notification)
        .where(which)
        .values(attempts=0, next_attempt_at=now, delivered_at=None)
    )


def delay_seconds(attempts: int) -> float:
    """How long to wait after so many attempts: doubled each time up to a quarter of an hour, and
    up to a fifth more or less, so that many rows do not come back at once."""
    doubled = FIRST_DELAY_SECONDS * 2.0 ** min(attempts - 1, 20)
    return min(doubled, LONGEST_DELAY_SECONDS) * random.uniform(0.8, 1.2)  # noqa: S311


def signature(key: bytes, message_id: str, at: datetime, body: bytes) -> dict[str, str]:
    """The headers of Standard Webhooks for one attempt."""
    seconds = str(int(at.timestamp()))
    signed = b".".join((message_id.encode(), seconds.encode(), body))
    mac = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    return {
        "webhook-id": message_id,
        "webhook-timestamp": seconds,
        "webhook-signature": f"v1,{mac}",
    }


def _as_text(value: object) -> str:
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, (datetime, date)):
        return value.isoformat()
    raise TypeError(f"a notification can't hold a {type(value).__name__}")
