"""Requests that are safe to send again: `Idempotency-Key`.

After the IETF draft draft-ietf-httpapi-idempotency-key-header. The same key and request of the
same caller get the stored answer, and nothing is done again; the same key with another request is
422; one that is still at work is 409. Only an answer to something done is kept: what failed was
rolled back, and may be sent again under its key.

The key is claimed in a transaction of its own, since a request may not hold SQLite's one turn to
write while it is decided upon. The answer is written in the transaction of the change, and only
while the claim is still this request's: so a change without its answer, or twice, can't be
committed, whoever dies when. A claim that nobody answered is free for others after
`CLAIM_SECONDS`.

The guard has decided before any answer is found, and each patient the answer is about is admitted
anew: an answer is never a way around a right that was lost. It is JSON with what the tables beside
it hold, and is forgotten after `idempotency_hours`.
"""

import hashlib
import re
import secrets
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import wraps
from typing import Any, get_type_hints
from uuid import UUID

import sqlalchemy as sa
from fastapi import Request, Response
from pydantic import BaseModel
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession
from starlette.datastructures import Headers
from starlette.types import Message, Scope, Send

from app.access import PatientAccess, RoleAccess, Subject
from app.access.gate import entry_of
from app.audit import AuditTrail
from app.db import Database, insert_if_absent, utcnow
from app.errors import Conflict, Unprocessable
from app.models import IdempotencyKey

HEADER = "Idempotency-Key"
REPLAYED = "Idempotency-Replayed"
CLAIM_SECONDS = 60.0
MOST_KEPT = 100_000  # of one caller; the oldest are forgotten before their time
METHODS = frozenset({"DELETE", "PATCH", "POST", "PUT"})
_PRUNE_ONE_IN = 50
# A structured field string (RFC 9651), or what many send: the same without quotes.
_KEY = re.compile(r'"([!#-\[\]-~]{1,255})"|([!#-\[\]-~]{1,255})')


class KeyReused(Unprocessable):
    title = "Idempotency key used for another request"
    slug = "idempotency-key-reused"


class StillAtWork(Conflict):
    title = "The same request is still at work"
    slug = "still-at-work"


@dataclass
class Asked:
    """A request with a key. `claim` is set while the key is claimed for it."""

    request: Request | None = None
    has_body: bool = False
    status: int = 200  # of its answer
    actor: str = ""
    key: str = ""
    claim: str = ""


_asked: ContextVar[Asked | None] = ContextVar("idempotent request", default=None)


async def answering(scope: Scope, send: Send, handle: Callable[[Send], Awaitable[None]]) -> None:
    """Run a route. If its request has a key, the endpoint (`once`) claims it; the claim is given
    up before an error is sent, since what failed was rolled back."""
    if scope["method"] not in METHODS or HEADER not in Headers(scope=scope):
        await handle(send)
        return
    asked = Asked()
    token = _asked.set(asked)

    async def watching(message: Message) -> None:
        if message["type"] == "http.response.start":
            if message["status"] >= 400:
                await _release(scope["app"].state.database, asked)
            asked.claim = ""
        await send(message)

    try:
        await handle(watching)
    finally:
        _asked.reset(token)
        await _release(scope["app"].state.database, asked)


def about(request: Request, status: int, *, has_body: bool) -> None:
    """What `once` needs to know of the request that its route is at."""
    asked = _asked.get()
    if asked is not None:
        asked.request, asked.status, asked.has_body = request, status, has_body


def key_of(request: Request) -> str:
    """The request's key. Raises Unprocessable."""
    given = request.headers.getlist(HEADER)
    found = _KEY.fullmatch(given[0].strip()) if len(given) == 1 else None
    if found is None:
        raise Unprocessable(
            f"`{HEADER}` is given once, with 1 to 255 visible characters and no quotes inside."
        )
    return str(found[1] or found[2])


async def _digest(asked: Asked, request: Request) -> str:
    """Of what is asked: method, address, body."""
    address = f"{request.method} {request.url.path}?{request.url.query}".encode()
    body = await request.body() if asked.has_body else b""  # read before, and bounded
    return hashlib.sha256(hashlib.sha256(address).digest() + body).hexdigest()


def may_repeat(endpoint: Callable[..., Any], methods: Iterable[str]) -> bool:
    """Is it a write that answers with JSON, or nothing? Files are not among them: they are told
    apart by their SOPInstanceUIDs, and sending one again is safe."""
    returned = get_type_hints(endpoint).get("return", Response)
    is_json = returned is type(None) or (
        isinstance(returned, type) and issubclass(returned, BaseModel)
    )
    return is_json and not METHODS.isdisjoint(methods)


def once(endpoint: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """The endpoint of a write, done at most once for each key. Its access is an argument."""

    @wraps(endpoint)
    async def run(*args: Any, **kwargs: Any) -> Any:
        asked = _asked.get()
        given = [each for each in kwargs.values() if isinstance(each, (PatientAccess, RoleAccess))]
        if asked is None or asked.request is None or len(given) != 1 or _has_files(asked.request):
            return await endpoint(*args, **kwargs)
        (access,) = given
        asked.actor, asked.key = access.principal.sub, key_of(asked.request)
        await access.session.commit()  # only read so far
        stored = await _claim(asked, asked.request)
        if stored is not None:
            return await _replay(access, stored)
        body = _json(await endpoint(*args, **kwargs))
        await _answer(access, asked, body)
        return _response(body, asked.status)

    return run


def _has_files(request: Request) -> bool:
    return request.headers.get("content-type", "").lower().startswith("multipart/")


def _json(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, BaseModel):
        raise TypeError("an endpoint that is safe to repeat returns a model, or nothing")
    return value.model_dump_json(by_alias=True)


def _response(body: str, status: int, *, replayed: bool = False) -> Response:
    headers = {REPLAYED: "true"} if replayed else {}
    if not body:
        return Response(status_code=status, headers=headers)
    return Response(body, status, headers, media_type="application/json")


async def _claim(asked: Asked, request: Request) -> IdempotencyKey | None:
    """Claim the key, or find its answer. Raises KeyReused, StillAtWork."""
    now, asked_for = utcnow(), secrets.token_hex(16)
    digest = await _digest(asked, request)
    database: Database = request.app.state.database
    old = now - timedelta(hours=request.app.state.settings.idempotency_hours)
    values: dict[str, Any] = {
        "request_sha256": digest,
        "request_id": request.state.request_id,
        "claim": asked_for,
        "claimed_at": now,
        "created_at": now,
        "answered_at": None,
        "status": 0,
        "body": "",
        "patient_ids": "",
    }
    this = (col(IdempotencyKey.actor) == asked.actor, col(IdempotencyKey.key) == asked.key)
    async with database.writing_session() as session:
        await _forget(session, asked.actor, old)
        added = await session.exec(
            insert_if_absent(session, IdempotencyKey, actor=asked.actor, key=asked.key, **values)
        )
        found: IdempotencyKey | None = None
        if added.rowcount != 1:
            found = (await session.exec(select(IdempotencyKey).where(*this))).first()
        if found is not None and found.request_sha256 != digest:
            raise KeyReused(
                f"This `{HEADER}` was used for another request. Send a new one with a new request."
            )
        if found is not None and found.answered_at is None:
            free = col(IdempotencyKey.claimed_at) < now - timedelta(seconds=CLAIM_SECONDS)
            taken = await session.exec(
                sa.update(IdempotencyKey)
                .where(*this, free, col(IdempotencyKey.answered_at).is_(None))
                .values(**values)
                .execution_options(synchronize_session=False)
            )
            if taken.rowcount != 1:
                raise StillAtWork(
                    "The request with this key is still being carried out. Ask again in a moment."
                )
            found = None
        await session.commit()
    if found is None:
        asked.claim = asked_for
    return found


async def _answer(access: PatientAccess | RoleAccess, asked: Asked, body: str) -> None:
    """Keep the answer together with what was done. Raises StillAtWork where the claim was lost."""
    kept = await access.session.exec(
        sa.update(IdempotencyKey)
        .where(
            col(IdempotencyKey.actor) == asked.actor,
            col(IdempotencyKey.key) == asked.key,
            col(IdempotencyKey.claim) == asked.claim,
            col(IdempotencyKey.answered_at).is_(None),
        )
        .values(
            answered_at=utcnow(),
            status=asked.status,
            body=body,
            patient_ids=",".join(sorted({str(each) for each in _patients(access)})),
        )
        .execution_options(synchronize_session=False)
    )
    if kept.rowcount != 1:
        raise StillAtWork(
            "The request took too long, and was sent again meanwhile. This one did nothing."
        )


def _patients(access: PatientAccess | RoleAccess) -> Iterable[UUID]:
    if isinstance(access, PatientAccess):
        return [access.patient.id]
    return [each.patient_id for each in access.grants if each.patient_id is not None]


async def _replay(access: PatientAccess | RoleAccess, stored: IdempotencyKey) -> Response:
    """What was answered before, to a caller who may still ask for it; on record."""
    detail = {"repeats": stored.request_id}
    if isinstance(access, PatientAccess):
        await access.done(detail=detail)
    else:
        named = [UUID(each) for each in stored.patient_ids.split(",") if each]
        for each in named:
            admitted = await access.admit(Subject.PATIENT, each)
            await admitted.done(detail=detail)
        if not named:
            entry = entry_of(access.principal, access.action, access.origin)
            await AuditTrail.add(access.session, replace(entry, detail=detail))
    return _response(stored.body, stored.status, replayed=True)


async def _release(database: Database, asked: Asked) -> None:
    """The key is free again, if nothing was done under the claim."""
    if not asked.claim:
        return
    claim, asked.claim = asked.claim, ""
    with suppress(sa.exc.SQLAlchemyError, OSError):  # then its time has to pass
        async with database.writing_session() as session:
            await session.exec(
                sa.delete(IdempotencyKey).where(
                    col(IdempotencyKey.actor) == asked.actor,
                    col(IdempotencyKey.key) == asked.key,
                    col(IdempotencyKey.claim) == claim,
                    col(IdempotencyKey.answered_at).is_(None),
                )
            )
            await session.commit()


async def _forget(session: AsyncSession, actor: str, old: datetime) -> None:
    """What is too old; now and then, what one caller has too much of."""
    await session.exec(sa.delete(IdempotencyKey).where(col(IdempotencyKey.created_at) < old))
    if secrets.randbelow(_PRUNE_ONE_IN) == 0:
        await prune(session, actor)


async def prune(session: AsyncSession, actor: str, most: int = MOST_KEPT) -> None:
    """Forget the oldest keys of a caller beyond `most`."""
    last = (
        select(IdempotencyKey.created_at)
        .where(IdempotencyKey.actor == actor)
        .order_by(col(IdempotencyKey.created_at).desc())
        .offset(most)
        .limit(1)
    )
    oldest = (await session.exec(last)).first()
    if oldest is not None:
        await session.exec(
            sa.delete(IdempotencyKey).where(
                col(IdempotencyKey.actor) == actor, col(IdempotencyKey.created_at) <= oldest
            )
        )
