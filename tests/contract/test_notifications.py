"""The webhook's outbox: what is made, claimed, retried, given up and sent again."""

import asyncio
import base64
import hashlib
import hmac
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
import sqlalchemy as sa
from pydantic import SecretStr, ValidationError
from sqlmodel import col, select

from app import notifications
from app.db import Database, utcnow
from app.models import Notification
from app.notifications import BATCH, MAX_ATTEMPTS, NO_WEBHOOK, Event, Notifications, replay
from app.settings import Settings
from tests.fake_orthanc import URL as ORTHANC
from tests.lightbox import make_settings

KEY = bytes(range(32))
SECRET = "whsec_" + base64.b64encode(KEY).decode()
WEBHOOK = "https://engine.hospital.example/hooks/a-secret-path"

Respond = Callable[[httpx.Request], httpx.Response]


@pytest.fixture
async def database(sqlite_url: str) -> AsyncIterator[Database]:
    each = Database(sqlite_url)
    yield each
    await each.close()


@pytest.fixture
def settings(sqlite_url: str) -> Settings:
    return make_settings(sqlite_url, ORTHANC, webhook_url=WEBHOOK, webhook_secret=SecretStr(SECRET))


def receiver(respond: Respond) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.MockTransport(respond))


def answering(status: int, **more: Any) -> Respond:
    return lambda request: httpx.Response(status, **more)


async def add(database: Database, event: str = "break-glass", **body: Any) -> UUID:
    async with database.session() as session:
        made = await Notifications.add(session, event, body or {"patient_id": uuid4()})
        await session.commit()
    return made


async def rows(database: Database) -> dict[UUID, Notification]:
    async with database.session() as session:
        found = (await session.exec(select(Notification))).all()
    return {each.id: each for each in found}


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110  (what is waited for has no event)
            await asyncio.sleep(0.01)


async def set_all(database: Database, **values: Any) -> None:
    async with database.session() as session:
        await session.exec(sa.update(Notification).values(**values))
        await session.commit()


# ------------------------------------------------------------------------------ the outbox


async def test_what_is_rolled_back_is_never_told(database: Database) -> None:
    async with database.session() as session:
        await Notifications.add(session, Event.BREAK_GLASS, {"patient_id": uuid4()})
        await session.rollback()
    assert await rows(database) == {}


async def test_the_body_is_type_timestamp_and_data(database: Database) -> None:
    patient, before = uuid4(), utcnow()
    at = datetime(2026, 3, 1, 12, tzinfo=UTC)
    made = await add(database, patient_id=patient, expires_at=at, reason_code="BTG")
    row = (await rows(database))[made]
    body = json.loads(row.body)
    assert set(body) == {"type", "timestamp", "data"}
    assert body["type"] == row.event == "break-glass"
    assert before <= datetime.fromisoformat(body["timestamp"]) <= utcnow()
    assert body["data"] == {
        "patient_id": str(patient),
        "expires_at": "2026-03-01T12:00:00+00:00",
        "reason_code": "BTG",
    }


async def test_an_unknown_event_and_an_unfit_value_are_refused(database: Database) -> None:
    with pytest.raises(ValueError, match="broken-glass"):
        await add(database, "broken-glass")
    with pytest.raises(TypeError, match="object"):
        await add(database, patient=object())


@pytest.mark.parametrize(
    "wrong",
    [
        {"webhook_url": WEBHOOK},
        {"webhook_secret": SecretStr(SECRET)},
        {"webhook_url": "ftp://engine.example/", "webhook_secret": SecretStr(SECRET)},
        {"webhook_url": WEBHOOK, "webhook_secret": SecretStr("whsec_c2hvcnQ=")},
        {"webhook_url": WEBHOOK, "webhook_secret": SecretStr("not base64 " * 4)},
    ],
)
def test_settings_that_do_not_sign_are_refused(wrong: Mapping[str, Any]) -> None:
    with pytest.raises(ValidationError) as refused:
        make_settings("sqlite+aiosqlite:///x", ORTHANC, **wrong)
    for secret in (SECRET, "c2hvcnQ", "not base64"):
        assert secret not in "".join(each["msg"] for each in refused.value.errors())


# ------------------------------------------------------------------------------ what is sent


def test_the_signature_is_that_of_the_standard() -> None:
    """The worked example of the Standard Webhooks' own libraries."""
    key = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    at = datetime.fromtimestamp(1614265330, UTC)
    body = b'{"test": 2432232314}'
    assert notifications.signature(key, "msg_p5jXN8AQM9LWM0D4loKWxJek", at, body) == {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }


async def test_it_is_sent_signed_once_and_marked(settings: Settings, database: Database) -> None:
    made = await add(database)
    seen: list[httpx.Request] = []

    def take(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(204)

    sender = Notifications(settings, database)
    async with receiver(take) as client:
        assert await sender.send_due(client) == 1
        assert await sender.send_due(client) == 0
    (request,) = seen
    assert (request.method, str(request.url)) == ("POST", WEBHOOK)
    assert request.headers["content-type"] == "application/json"
    assert request.headers["webhook-id"] == str(made)
    stamp = request.headers["webhook-timestamp"]
    assert abs(int(stamp) - utcnow().timestamp()) < 30
    signed = f"{made}.{stamp}.".encode() + request.content
    mac = base64.b64encode(hmac.digest(KEY, signed, hashlib.sha256)).decode()
    assert request.headers["webhook-signature"] == f"v1,{mac}"
    row = (await rows(database))[made]
    assert row.delivered_at is not None
    assert (row.attempts, row.next_attempt_at, row.last_error) == (1, None, "")


def _raising(error: Exception) -> Respond:
    def respond(request: httpx.Request) -> httpx.Response:
        raise error

    return respond


@pytest.mark.parametrize(
    ("respond", "said"),
    [
        (answering(500, text="patient Zebrowski^Quirina unknown"), "HTTP 500"),
        (answering(301, headers={"Location": "https://elsewhere.example/"}), "HTTP 301"),
        (answering(307, headers={"Location": "https://elsewhere.example/"}), "HTTP 307"),
        (answering(410), "HTTP 410"),
        (_raising(httpx.ConnectError(f"to {WEBHOOK} refused")), "ConnectError"),
        (_raising(httpx.ReadTimeout(f"{WEBHOOK} is slow")), "ReadTimeout"),
        (_raising(httpx.RemoteProtocolError(SECRET)), "RemoteProtocolError"),
    ],
)
async def test_what_fails_comes_again_and_says_little(
    settings: Settings,
    database: Database,
    caplog: pytest.LogCaptureFixture,
    respond: Respond,
    said: str,
) -> None:
    caplog.set_level(logging.DEBUG, logger="app")
    made = await add(database)
    calls: list[str] = []

    def count(request: httpx.Request) -> httpx.Response:
        calls.append(str(request.url))
        return respond(request)

    async with receiver(count) as client:
        client.follow_redirects = False
        before = utcnow()
        await Notifications(settings, database).send_due(client)
    assert calls == [WEBHOOK]  # no redirect is followed
    row = (await rows(database))[made]
    assert row.delivered_at is None
    assert (row.attempts, row.last_error) == (1, said)
    assert row.next_attempt_at is not None
    assert timedelta(seconds=3.9) < row.next_attempt_at - before < timedelta(seconds=15)
    assert f"notification {made} (break-glass) not delivered at attempt 1: {said}" in caplog.text
    for secret in ("hospital.example", "a-secret-path", "Zebrowski", SECRET, "elsewhere"):
        assert secret not in caplog.text + row.last_error


async def test_a_receiver_that_never_ends_is_left(
    settings: Settings, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notifications, "SEND_SECONDS", 0.05)

    async def never(request: httpx.Request) -> httpx.Response:
        await asyncio.Event().wait()
        raise AssertionError

    made = await add(database)
    async with httpx.AsyncClient(transport=httpx.MockTransport(never)) as client:
        await Notifications(settings, database).send_due(client)
    assert (await rows(database))[made].last_error == "timeout"


def test_waiting_doubles_up_to_a_quarter_of_an_hour() -> None:
    for attempts, middle in ((1, 5), (2, 10), (3, 20), (8, 640), (9, 900), (299, 900)):
        drawn = {notifications.delay_seconds(attempts) for _ in range(200)}
        assert len(drawn) > 100  # many rows do not come back at once
        assert 0.8 * middle <= min(drawn) < max(drawn) <= 1.2 * middle
    together = sum(min(5 * 2 ** (n - 1), 900) for n in range(1, MAX_ATTEMPTS))
    assert timedelta(days=3) <= timedelta(seconds=together) < timedelta(days=4)


async def test_it_is_given_up_and_sent_again_on_demand(
    settings: Settings, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    made = await add(database)
    await set_all(database, attempts=MAX_ATTEMPTS - 1)
    sender, ids = Notifications(settings, database), []

    def take(request: httpx.Request) -> httpx.Response:
        ids.append(request.headers["webhook-id"])
        return httpx.Response(200)

    async with receiver(answering(503)) as client:
        await sender.send_due(client)
    row = (await rows(database))[made]
    assert (row.next_attempt_at, row.delivered_at) == (None, None)
    assert (row.attempts, row.last_error) == (MAX_ATTEMPTS, "HTTP 503")
    assert f"notification {made} (break-glass) given up" in caplog.text
    async with receiver(take) as client:
        assert await sender.send_due(client) == 0
        async with database.session() as session:
            await session.exec(replay())
            await session.commit()
        assert await sender.send_due(client) == 1
    assert ids == [str(made)]
    assert (await rows(database))[made].delivered_at is not None


async def test_without_a_webhook_nothing_is_lost_in_silence(
    sqlite_url: str, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    made, routine = await add(database), await add(database, "order-available")
    sender = Notifications(make_settings(sqlite_url, ORTHANC), database)
    async with receiver(answering(500)) as client:
        await sender.send_due(client)
    assert str(routine) not in caplog.text  # who wants no webhook is not told of each
    row = (await rows(database))[made]
    assert (row.delivered_at, row.next_attempt_at, row.last_error) == (None, None, NO_WEBHOOK)
    assert f"notification {made} (break-glass) given up" in caplog.text
    task = asyncio.create_task(sender.run())
    await until(lambda: "no webhook is configured (LIGHTBOX_WEBHOOK_URL)" in caplog.text)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


# ----------------------------------------------------------------------------- many senders


async def test_a_row_is_taken_by_one_and_comes_back_if_that_one_dies(
    settings: Settings, database: Database
) -> None:
    made = await add(database)
    one, other = Notifications(settings, database), Notifications(settings, database)
    (claimed,) = await one._claim()
    assert claimed.id == made
    assert await other._claim() == []
    await set_all(database, next_attempt_at=utcnow() - timedelta(seconds=1))  # the lease is over
    (again,) = await other._claim()
    assert (again.id, again.attempts) == (made, 2)
    # The first was only slow: what it says now is not heard any more.
    await one._give_up(claimed, "HTTP 500")
    assert (await rows(database))[made].next_attempt_at is not None


async def test_many_rows_are_sent_once_by_several_senders(
    settings: Settings, database: Database
) -> None:
    made = [await add(database) for _ in range(3 * BATCH)]
    seen: list[str] = []

    async def take(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(0)
        seen.append(request.headers["webhook-id"])
        return httpx.Response(200)

    async with httpx.AsyncClient(transport=httpx.MockTransport(take)) as client:
        senders = [Notifications(settings, database) for _ in range(4)]
        await asyncio.gather(*(each.send_due(client) for each in senders))
    assert sorted(seen) == sorted(str(each) for each in made)


async def test_old_rows_go_and_alerts_that_nobody_heard_stay(
    settings: Settings, database: Database
) -> None:
    delivered, dead, routine = [
        await add(database, event) for event in ("break-glass", "break-glass", "order-available")
    ]
    long_ago = utcnow() - timedelta(days=31)
    for made, values in (
        (delivered, {"delivered_at": long_ago}),
        (dead, {"last_error": "HTTP 500"}),
        (routine, {"last_error": "HTTP 500"}),
    ):
        async with database.session() as session:
            await session.exec(
                sa.update(Notification)
                .where(col(Notification.id) == made)
                .values(created_at=long_ago, next_attempt_at=None, **values)
            )
            await session.commit()
    fresh = await add(database)
    async with receiver(answering(200)) as client:
        await Notifications(settings, database).send_due(client)
    assert set(await rows(database)) == {dead, fresh}


async def test_the_sender_outlives_an_error(
    settings: Settings, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notifications, "POLL_SECONDS", 0.01)
    made = await add(database)
    sender, claim, calls = Notifications(settings, database), Notifications._claim, 0
    claimed: list[UUID] = []

    async def fails_first(self: Notifications) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError("unforeseen")
        claimed.extend(each.id for each in await claim(self))
        return []

    monkeypatch.setattr(Notifications, "_claim", fails_first)
    task = asyncio.create_task(sender.run())
    await until(lambda: claimed == [made])
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert calls > 1
