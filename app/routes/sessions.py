"""Open viewers under control: who has one, and what ends them from outside."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from enum import StrEnum
from typing import Annotated
from uuid import UUID

import sqlalchemy as sa
from fastapi import Depends, Form, Path, Query, Request, Response
from pydantic import BaseModel, Field
from sqlmodel import col, select

from app.access import Caller, Gate, Public, RoleAccess, decisions
from app.access.gate import carried
from app.access.guards import origin_of
from app.audit import Action, AuditTrail, Entry, Outcome
from app.db import insert_if_absent, utcnow
from app.errors import Forbidden, NotFound, Unauthenticated
from app.identity import LogoutToken, Role
from app.models import LaunchSession, LaunchStudy, SpentToken, Study
from app.problems import problem
from app.routes.paging import Cursor, Limit, link_next, time_cursor
from app.routing import AccessRouter
from app.viewer import Viewer
from app.viewer.endings import EndedBecause
from app.viewer.glances import sha256

router = AccessRouter(prefix="/api/v1/viewer", tags=["viewer"])

ListSessions = Annotated[RoleAccess, Depends(Caller(Action.SESSION_LIST), scope="function")]
RevokeSession = Annotated[RoleAccess, Depends(Caller(Action.SESSION_REVOKE), scope="function")]
SignOut = Annotated[RoleAccess, Depends(Caller(Action.SIGN_OUT), scope="function")]
BY_LOGOUT_TOKEN = Depends(Public("the identity provider's signed logout token is the proof"))

OVERSEERS = frozenset({Role.ADMIN, Role.AUDITOR})
"""Who may see that anybody has a viewer open, and end it; not of whom it shows images."""


class SessionState(StrEnum):
    WAITING = "waiting"  # its link was not opened yet
    OPEN = "open"
    ENDED = "ended"


class Whose(StrEnum):
    OWN = "own"
    ALL = "all"


class SessionOut(BaseModel):
    """A viewer: who, since when, last used, how it stands. What it shows is in one's own only."""

    ctx: str
    sub: str
    name: str
    state: SessionState
    ended_because: EndedBecause | None
    purpose_of_use: str
    created_at: datetime
    opened_at: datetime | None
    last_used_at: datetime
    expires_at: datetime
    ended_at: datetime | None
    patient_id: UUID | None = None
    order_id: UUID | None = None
    study_instance_uids: list[str] | None = None


class LogoutBody(BaseModel):
    sub: str | None = Field(
        default=None,
        min_length=1,
        max_length=255,
        description="Whose viewers, where a service asks; a person ends their own.",
    )


class LogoutOut(BaseModel):
    viewers_ended: int


@router.get("/sessions", response_model_exclude_unset=True)
async def list_sessions(
    access: ListSessions,
    request: Request,
    response: Response,
    whose: Annotated[
        Whose, Query(description="`all` is for administrators and auditors: without patients.")
    ] = Whose.OWN,
    sub: Annotated[str, Query(max_length=255, description="Of all: those of one person.")] = "",
    state: SessionState | None = None,
    limit: Limit = 50,
    cursor: Cursor = "",
) -> list[SessionOut]:
    """Viewers, newest first."""
    viewer: Viewer = request.app.state.viewer
    now = utcnow()
    query = select(LaunchSession)
    if whose is Whose.OWN:
        query = query.where(LaunchSession.actor == access.principal.sub)
    elif not access.principal.roles & OVERSEERS:
        raise Forbidden("Only administrators and auditors see other people's viewers.")
    if sub:
        query = query.where(LaunchSession.actor == sub)
    if state is not None:
        query = query.where(_in_state(viewer, state, now))
    if cursor:
        at, ctx = time_cursor(cursor)
        query = query.where(
            sa.or_(
                col(LaunchSession.created_at) < at,
                sa.and_(col(LaunchSession.created_at) == at, col(LaunchSession.ctx) > ctx),
            )
        )
    query = query.order_by(col(LaunchSession.created_at).desc(), col(LaunchSession.ctx))
    found = (await access.session.exec(query.limit(limit + 1))).all()
    page = found[:limit]
    last = f"{page[-1].created_at.isoformat()} {page[-1].ctx}" if len(found) > limit else None
    link_next(request, response, last)
    if whose is not Whose.OWN:
        return [_shown(viewer, each, now) for each in page]
    patients = {each.patient_id for each in page}
    allowed = await decisions(
        access.session, request.app.state.gate, access.principal, Action.STUDY_VIEW, patients
    )
    purposes = {key: each.purpose_of_use for key, each in allowed.items() if each.allowed}
    elsewhere = await _elsewhere(access, page)
    for patient_id in sorted(purposes):
        by = carried(allowed[patient_id].by)
        await access.done(patient_id=patient_id, purpose_of_use=purposes[patient_id], detail=by)
    shown = []
    for each in page:
        uids = [uid for uid in each.opens.split(",") if (each.ctx, uid) not in elsewhere]
        shown.append(_shown(viewer, each, now, uids if each.patient_id in purposes else None))
    return shown


async def _elsewhere(access: RoleAccess, page: Sequence[LaunchSession]) -> set[tuple[str, str]]:
    """Of these viewers (`ctx`), the studies that are filed under another patient by now."""
    moved = await access.session.exec(
        select(LaunchStudy.ctx, LaunchStudy.study_instance_uid)
        .join(LaunchSession, col(LaunchSession.ctx) == col(LaunchStudy.ctx))
        .join(Study, col(Study.study_instance_uid) == col(LaunchStudy.study_instance_uid))
        .where(
            col(LaunchStudy.ctx).in_([each.ctx for each in page]),
            col(Study.patient_id) != col(LaunchSession.patient_id),
        )
    )
    return set(moved.all())


@router.delete("/sessions/{ctx}", status_code=204)
async def revoke_session(
    access: RevokeSession, ctx: Annotated[str, Path(max_length=64)], request: Request
) -> None:
    """End a viewer at its next request: one's own; an administrator or auditor, anybody's. Safe to
    repeat. 404 for one that is not there and for one of others."""
    viewer: Viewer = request.app.state.viewer
    launch = await access.session.get(LaunchSession, ctx)
    overseer = bool(access.principal.roles & OVERSEERS)
    if launch is None or not (overseer or launch.actor == access.principal.sub):
        raise NotFound("You have no viewer of this name.")
    one = col(LaunchSession.ctx) == ctx
    ended = await viewer.closing.where(
        access.session, one, EndedBecause.REVOKED, access.origin, actor=access.principal.sub
    )
    await access.done(
        patient_id=launch.patient_id,
        ctx=ctx,
        purpose_of_use=launch.purpose_of_use,
        detail={"viewer": launch.actor, "viewers_ended": ended},
    )


@router.post("/logout")
async def logout(access: SignOut, request: Request, body: LogoutBody | None = None) -> LogoutOut:
    """Sign-out from the EHR: ends the caller's viewers, and links that wait, at once. A service
    names the person by `sub`."""
    viewer: Viewer = request.app.state.viewer
    sub = body.sub if body is not None and body.sub is not None else access.principal.sub
    if sub != access.principal.sub and Role.SERVICE not in access.principal.roles:
        raise Forbidden("Only a service signs others out; leave `sub` out to sign out yourself.")
    await viewer.closing.sign_out(sub, "")
    theirs = col(LaunchSession.actor) == sub
    ended = await viewer.closing.where(
        access.session, theirs, EndedBecause.SIGNED_OUT, access.origin, actor=access.principal.sub
    )
    await access.done(detail={"sub": sub, "viewers_ended": ended})
    return LogoutOut(viewers_ended=ended)


@router.post("/backchannel-logout", dependencies=[BY_LOGOUT_TOKEN], response_class=Response)
async def backchannel_logout(
    request: Request,
    logout_token: Annotated[str, Form(description="OpenID Connect Back-Channel Logout 1.0.")] = "",
) -> Response:
    """Sign-out at the identity provider: ends the viewers of the sign-in (`sid`) or of the person
    (`sub`) that the logout token names. 200, or 400 for a token that does not hold."""
    gate: Gate = request.app.state.gate
    viewer: Viewer = request.app.state.viewer
    entry = Entry(action=Action.SIGN_OUT, outcome=Outcome.DENIED, origin=origin_of(request))
    try:
        told = await gate.verifier.logout_token(logout_token)
    except Unauthenticated as error:
        await gate.failed_tries.record(replace(entry, reason="bad-token"))
        return _bad_request(request, error.detail)
    said = {"sub": told.sub, "sid": told.sid}
    entry = replace(entry, actor=told.sub, detail=said)
    async with gate.database.session() as session:
        known = await session.get(SpentToken, sha256(told.jti)) is not None
    if known:  # or an old one, sent again, would end a later sign-in
        await gate.failed_tries.record(replace(entry, reason="replayed", detail={}))
        return _bad_request(request, _USED)
    grants: list[Entry] = []
    async with gate.transaction(grants) as session:
        granted = await gate.grant(session, entry)
        grants.append(granted)
        await viewer.closing.sign_out(told.sub, told.sid)
        spent = insert_if_absent(
            session, SpentToken, jti_sha256=sha256(told.jti), spent_at=utcnow()
        )
        # Not by `rowcount`, which PostgreSQL's driver does not tell of such an insert.
        if (await session.exec(spent.returning(col(SpentToken.jti_sha256)))).first() is not None:
            ended = await viewer.closing.where(
                session,
                _of(told),
                EndedBecause.SIGNED_OUT,
                entry.origin,
                actor=told.sub,
                flushed=True,
            )
            detail = {**said, "viewers_ended": ended}
            await AuditTrail.add(session, replace(granted, outcome=Outcome.DONE, detail=detail))
            return Response(status_code=200)
        # Of several at once another was first.
        failed = replace(granted, outcome=Outcome.FAILED, reason="replayed")
        await AuditTrail.add(session, failed)
    return _bad_request(request, _USED)


def _of(told: LogoutToken) -> sa.ColumnElement[bool]:
    """The sessions that a logout token ends. One whose sign-in isn't known ends with any of its
    person's."""
    of_sub = col(LaunchSession.actor) == told.sub
    if not told.sid:
        return of_sub
    of_sid = col(LaunchSession.actor_sid) == told.sid
    if not told.sub:
        return of_sid
    return sa.and_(of_sub, sa.or_(of_sid, col(LaunchSession.actor_sid) == ""))


_USED = "This logout token was used before."


def _bad_request(request: Request, detail: str) -> Response:
    """400 as OAuth says it (Back-Channel Logout 1.0, 2.8), in the shape of every problem."""
    said = {"error": "invalid_request", "error_description": detail}
    return problem(request, 400, "Bad request", detail, extra=said)


def _in_state(viewer: Viewer, state: SessionState, now: datetime) -> sa.ColumnElement[bool]:
    lives, waits = viewer.limits.lives(now), viewer.limits.waits(now)
    if state is SessionState.OPEN:
        return lives
    return waits if state is SessionState.WAITING else sa.not_(sa.or_(lives, waits))


def _shown(
    viewer: Viewer, launch: LaunchSession, now: datetime, uids: list[str] | None = None
) -> SessionOut:
    """`uids`: the studies that are named with the patient and the order; None: none of them."""
    because = viewer.limits.over(launch, now)
    waiting = launch.redeemed_at is None
    live = SessionState.WAITING if waiting else SessionState.OPEN
    shown = SessionOut(
        ctx=launch.ctx,
        sub=launch.actor,
        name=launch.actor_name,
        state=live if because is None else SessionState.ENDED,
        ended_because=because,
        purpose_of_use=launch.purpose_of_use,
        created_at=launch.created_at,
        opened_at=launch.redeemed_at,
        last_used_at=launch.last_used_at,
        expires_at=launch.expires_at,
        ended_at=launch.ended_at,
    )
    if uids is not None:
        shown.patient_id = launch.patient_id
        shown.order_id = launch.order_id
        shown.study_instance_uids = uids
    return shown
