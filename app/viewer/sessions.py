"""Launch sessions: one opening of the viewer, for one person and one patient.

The API answers with a link that holds a one-time code, good for a minute. Opening it trades the
code for an HttpOnly cookie limited to `/s/<ctx>/` (so that two tabs don't overwrite each other)
and a clean URL. Each request of the viewer is decided anew: the session, the right of the person
behind it, the study. A session ends after a while without use, at an absolute limit, and at once
when its order is cancelled, its study deleted, or the right lost.
"""

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import cache
from typing import Any, NamedTuple
from urllib.parse import urlencode
from uuid import UUID

import sqlalchemy as sa
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.access import Denial, Gate, PatientAccess, SessionAccess, StudyAccess, Subject
from app.access.glance import (
    UID,
    Named,
    parameters,
    relation_columns,
    session_access,
    study_access,
    study_columns,
    with_instance,
)
from app.audit import Action, AuditTrail, Entry, Origin, Outcome
from app.db import Database, Reader, utcnow
from app.errors import Gone, LightboxError, NotFound, Unauthenticated
from app.identity import Principal, Role
from app.linking import StudySummary
from app.models import LaunchSession, LaunchStudy, Order, OrderStatus, Patient, Study
from app.orthanc import Orthanc
from app.settings import Settings
from app.viewer.endings import ENDED_SENTENCES, EndedBecause, SessionOver, end_sessions

COOKIE_NAME = "lightbox"
COMPARE_LAYOUT = "@ohif/hpCompare"  # OHIF's hanging protocol for two studies side by side


@dataclass(frozen=True)
class Launch:
    """A new launch: the link to open, once, until `expires_at`."""

    ctx: str
    url: str
    study_instance_uids: list[str]
    expires_at: datetime
    session_expires_at: datetime


@dataclass(frozen=True)
class Redeemed:
    """What the browser gets for its code."""

    clean_path: str
    cookie_value: str
    cookie_path: str
    max_age_seconds: int


class Viewer:
    """Makes, redeems, checks and ends launch sessions. One per app."""

    def __init__(
        self, settings: Settings, database: Database, gate: Gate, orthanc: Orthanc, reader: Reader
    ) -> None:
        self._settings = settings
        self._database = database
        self._gate = gate
        self._orthanc = orthanc
        self._reader = reader
        self._glance = reader.prepare(_glance())
        self._search = reader.prepare(_search())
        # Since the last flush: requests by session and study, and when each session was used.
        self._counts: dict[tuple[str, str], tuple[int, datetime]] = {}
        self._used: dict[str, datetime] = {}

    async def launch(
        self,
        access: PatientAccess,
        opened: Sequence[StudySummary],
        known: Sequence[StudySummary],
        *,
        layout: str = "",
    ) -> Launch:
        """A link that opens `opened`, with the patient's other `known` studies as priors.

        Raises NotFound where there is nothing to open, Conflict where the archive holds one of
        the studies under two patients.
        """
        if not opened:
            raise NotFound(
                "There are no images yet: nothing has been stored for this "
                f"{'order' if access.order else 'patient'}."
            )
        await access.release()
        for summary in opened:
            await self._orthanc.refuse_shared(
                summary.study.study_instance_uid, summary.study.orthanc_id
            )
        now, code = utcnow(), secrets.token_urlsafe(32)
        uids = [summary.study.study_instance_uid for summary in opened]
        session = LaunchSession(
            ctx=secrets.token_urlsafe(16),
            code_sha256=_sha256(code),
            actor=access.principal.sub,
            actor_name=access.principal.name,
            actor_roles=access.principal.roles_text,
            actor_site=access.principal.site,
            purpose_of_use=access.purpose_of_use,
            patient_id=access.patient.id,
            order_id=access.order.id if access.order else None,
            opens=",".join(uids),
            layout=layout,
            code_expires_at=now + timedelta(seconds=self._settings.launch_code_seconds),
            expires_at=now + timedelta(hours=self._settings.session_max_hours),
        )
        access.session.add(session)
        await access.session.flush()
        allowed = {summary.study.study_instance_uid for summary in (*opened, *known)}
        access.session.add_all(
            [LaunchStudy(ctx=session.ctx, study_instance_uid=uid) for uid in sorted(allowed)]
        )
        await access.done(ctx=session.ctx, detail={"opens": uids, "study_count": len(allowed)})
        query = urlencode({"StudyInstanceUIDs": session.opens, "launch": code}, safe=",")
        return Launch(
            ctx=session.ctx,
            url=f"{self._settings.viewer_base_url}/viewer?{query}",
            study_instance_uids=uids,
            expires_at=session.code_expires_at,
            session_expires_at=session.expires_at,
        )

    async def redeem(self, code: str, origin: Origin) -> Redeemed:
        """Trade a code for a cookie: once, in time, and while the right still stands.

        Raises NotFound for a code never given, Gone for a used or late one, SessionOver, Denial.
        """
        now = utcnow()
        async with self._database.session() as session:
            launch = (
                await session.exec(
                    select(LaunchSession).where(LaunchSession.code_sha256 == _sha256(code))
                )
            ).first()
            entry = Entry(action=Action.SESSION_OPEN, outcome=Outcome.DENIED, origin=origin)
            if launch is None:
                await self._gate.trail.record(replace(entry, reason="unknown-code"))
                raise NotFound("This link is not known. Open the images from the EHR again.")
            entry = replace(
                entry,
                actor=launch.actor,
                actor_roles=launch.actor_roles,
                patient_id=launch.patient_id,
                order_id=launch.order_id,
                ctx=launch.ctx,
                purpose_of_use=launch.purpose_of_use,
            )
            refusal = _refusal_of_link(launch, now)
            if refusal is not None:
                await self._gate.trail.record(replace(entry, reason=refusal.extra["reason"]))
                raise refusal
            ctx, opens, layout = launch.ctx, launch.opens, launch.layout
            await self._still_allowed(session, launch, origin, Subject.PATIENT, launch.patient_id)
            cookie = secrets.token_urlsafe(32)
            redeemed = await session.exec(
                sa.update(LaunchSession)
                .where(col(LaunchSession.ctx) == ctx, col(LaunchSession.redeemed_at).is_(None))
                .values(redeemed_at=now, last_used_at=now, cookie_sha256=_sha256(cookie))
            )
            if redeemed.rowcount != 1:
                # Two browsers opened it at the same moment; the other was first.
                await session.rollback()  # the record needs SQLite's one write lock
                await self._gate.trail.record(replace(entry, reason="used"))
                raise _used()
            await AuditTrail.add(session, replace(entry, outcome=Outcome.GRANTED))
            await session.commit()
        query = {"StudyInstanceUIDs": opens, "ctx": ctx}
        if layout:
            query["hangingProtocolId"] = layout
        return Redeemed(
            clean_path=f"/viewer?{urlencode(query, safe=',@/')}",
            cookie_value=cookie,
            cookie_path=f"/s/{ctx}/",
            max_age_seconds=self._settings.session_max_hours * 3600,
        )

    async def open_session(
        self, session: AsyncSession, ctx: str, cookie: str | None
    ) -> LaunchSession:
        """The live session that the cookie proves.

        Raises Unauthenticated without the right cookie, SessionOver where it has ended.
        """
        launch = await session.get(LaunchSession, ctx)
        proof = launch.cookie_sha256 if launch is not None else None
        if launch is None or proof is None or cookie is None:
            raise _not_yours()
        if not hmac.compare_digest(proof, _sha256(cookie)):
            raise _not_yours()
        because = self._over(launch, utcnow())
        if because is not None:
            raise SessionOver(because)
        return launch

    async def glance(
        self, ctx: str, cookie: str | None, study_uid: str, series_uid: str, sop_uid: str
    ) -> StudyAccess | None:
        """The session's access to one of its studies, where everything is in order and its first
        request is on record. None: ask `study_access`, which says what is not in order.

        Raises DatabaseUnavailable.
        """
        values = parameters(study_uid, series_uid, sop_uid, utcnow())
        row = await self._reader.first(self._glance, {**values, "ctx": ctx})
        if row is None:
            return None
        launch, (first_accessed_at, *rest) = _Launch(*row[: len(_LAUNCH)]), row[len(_LAUNCH) :]
        if first_accessed_at is None or not self._is_in_order(launch, cookie, values["now"]):
            return None
        access = study_access(launch.principal, Action.STUDY_VIEW, rest, ctx)
        if access is None or access.patient_id != launch.patient_id:
            return None
        self._count(ctx, study_uid, values["now"])
        return access

    async def glance_to_search(self, ctx: str, cookie: str | None) -> SessionAccess | None:
        """As `glance`, for a search among the session's studies; None: ask `patient_access`."""
        now = utcnow()
        row = await self._reader.first(self._search, {"ctx": ctx, "now": now})
        if row is None:
            return None
        launch, rest = _Launch(*row[: len(_LAUNCH)]), row[len(_LAUNCH) :]
        if not self._is_in_order(launch, cookie, now):
            return None
        action, patient_id = Action.STUDY_VIEW, launch.patient_id
        return session_access(launch.principal, action, patient_id, rest, ctx)

    def _is_in_order(self, launch: "_Launch", cookie: str | None, now: datetime) -> bool:
        """Is it this browser's, and alive? It says only yes where `open_session` would."""
        return (
            launch.cookie_sha256 is not None
            and cookie is not None
            and hmac.compare_digest(launch.cookie_sha256, _sha256(cookie))
            and launch.ended_at is None
            and launch.expires_at > now
            and not self._is_idle(launch.ctx, launch.last_used_at, now)
            and (launch.order_id is None or launch.order_status not in (None, _CANCELLED))
        )

    async def study_access(
        self, session: AsyncSession, launch: LaunchSession, study_uid: str, origin: Origin
    ) -> PatientAccess:
        """The session's access to one of its studies; the first one is recorded before it counts.

        Raises NotFound for a study that is not the session's, Denial where the right is lost
        (which ends the session), AuditUnavailable.
        """
        granted = await session.get(LaunchStudy, (launch.ctx, study_uid))
        if granted is None:
            await self._gate.trail.record(
                Entry(
                    action=Action.STUDY_VIEW,
                    outcome=Outcome.DENIED,
                    origin=origin,
                    actor=launch.actor,
                    actor_roles=launch.actor_roles,
                    reason="not-in-session",
                    patient_id=launch.patient_id,
                    ctx=launch.ctx,
                    detail={"requested": study_uid},
                )
            )
            raise NotFound("This viewing session does not include this study.")
        first = granted.first_accessed_at is None
        access = await self._still_allowed(session, launch, origin, Subject.STUDY, study_uid)
        if access.patient.id != launch.patient_id:
            # The study was moved to another patient meanwhile: not this session's any more.
            raise NotFound("This viewing session does not include this study.")
        if first:
            await self._record_first_access(access)
        return access

    async def patient_access(
        self, session: AsyncSession, launch: LaunchSession, origin: Origin
    ) -> PatientAccess:
        """The session's access to its patient, for searches. Raises Denial."""
        return await self._still_allowed(
            session, launch, origin, Subject.PATIENT, launch.patient_id
        )

    async def refuse(self, launch: LaunchSession, origin: Origin, why: str) -> None:
        """Record a request that no rule allows, whatever the session may see."""
        await self._gate.trail.record(
            Entry(
                action=Action.STUDY_VIEW,
                outcome=Outcome.DENIED,
                origin=origin,
                actor=launch.actor,
                actor_roles=launch.actor_roles,
                reason=why,
                patient_id=launch.patient_id,
                ctx=launch.ctx,
            )
        )

    async def why_over(self, ctx: str) -> str:
        """The sentence for the page of a session that doesn't answer any more."""
        async with self._database.session() as session:
            launch = await session.get(LaunchSession, ctx)
            because = self._over(launch, utcnow()) if launch is not None else None
        if because is not None:
            return ENDED_SENTENCES[because]
        return "This viewing session belongs to another browser, or is not known."

    async def is_live(self, ctx: str) -> bool:
        """Is there a redeemed session of that name that has not ended? (Not: may you use it.)"""
        async with self._database.session() as session:
            launch = await session.get(LaunchSession, ctx)
            return (
                launch is not None
                and launch.redeemed_at is not None
                and self._over(launch, utcnow()) is None
            )

    async def flush(self) -> None:
        """Write what was counted since the last time, and slide the sessions that were used.

        What can't be written now is kept for the next time.
        """
        counts, self._counts = self._counts, {}
        if not counts:
            return
        try:
            await self._write(counts)
        except BaseException:
            for key, (count, last) in counts.items():
                since, later = self._counts.get(key, (0, last))
                self._counts[key] = (since + count, later)
            raise
        # A session that was used again meanwhile is in the new counts.
        live = {ctx for ctx, _ in self._counts}
        self._used = {ctx: used for ctx, used in self._used.items() if ctx in live}

    async def _write(self, counts: dict[tuple[str, str], tuple[int, datetime]]) -> None:
        async with self._database.session() as session:
            for (ctx, uid), (count, last) in sorted(counts.items()):
                await session.exec(
                    sa.update(LaunchStudy)
                    .where(col(LaunchStudy.ctx) == ctx, col(LaunchStudy.study_instance_uid) == uid)
                    .values(
                        request_count=col(LaunchStudy.request_count) + count, last_accessed_at=last
                    )
                )
                await session.exec(
                    sa.update(LaunchSession)
                    .where(col(LaunchSession.ctx) == ctx, col(LaunchSession.last_used_at) < last)
                    .values(last_used_at=last)
                )
            await session.commit()

    async def sweep(self, origin: Origin) -> int:
        """End the sessions whose time is over, each with its summary in the trail. How many."""
        await self.flush()
        now = utcnow()
        idle = now - timedelta(minutes=self._settings.session_idle_minutes)
        async with self._database.session() as session:
            over = (
                await session.exec(
                    select(LaunchSession).where(
                        col(LaunchSession.ended_at).is_(None),
                        sa.or_(
                            col(LaunchSession.expires_at) <= now,
                            sa.and_(
                                col(LaunchSession.redeemed_at).is_not(None),
                                col(LaunchSession.last_used_at) <= idle,
                            ),
                            sa.and_(
                                col(LaunchSession.redeemed_at).is_(None),
                                col(LaunchSession.code_expires_at) <= now,
                            ),
                        ),
                    )
                )
            ).all()
            for launch in over:
                because = self._over(launch, now) or EndedBecause.UNUSED
                await end_sessions(session, [launch], because, origin, actor="")
            await session.commit()
        return len(over)

    async def end_order_sessions(self, access: PatientAccess) -> int:
        """End the open viewers of the access's order, which is being cancelled. How many.

        Call it before the access's transaction writes: the counts are flushed in another.
        """
        assert access.order is not None
        of_order = col(LaunchSession.order_id) == access.order.id
        return await self._end_where(access, of_order, EndedBecause.ORDER_CANCELLED)

    async def end_study_sessions(self, access: PatientAccess) -> int:
        """End the open viewers that may show the access's study, which is being deleted.

        Call it before the access's transaction writes: the counts are flushed in another.
        """
        assert access.study is not None
        showing = col(LaunchSession.ctx).in_(
            select(LaunchStudy.ctx).where(
                LaunchStudy.study_instance_uid == access.study.study_instance_uid
            )
        )
        return await self._end_where(access, showing, EndedBecause.STUDY_DELETED)

    async def _end_where(
        self, access: PatientAccess, condition: sa.ColumnElement[bool], because: EndedBecause
    ) -> int:
        await self.flush()
        live = await access.session.exec(
            select(LaunchSession).where(condition, col(LaunchSession.ended_at).is_(None))
        )
        return await end_sessions(
            access.session, live.all(), because, access.origin, actor=access.principal.sub
        )

    def _over(self, launch: LaunchSession, now: datetime) -> EndedBecause | None:
        """Why the session is over; None while it lives."""
        if launch.ended_at is not None:
            return EndedBecause(launch.ended_because)
        if launch.expires_at <= now:
            return EndedBecause.EXPIRED
        if launch.redeemed_at is not None and self._is_idle(launch.ctx, launch.last_used_at, now):
            return EndedBecause.IDLE
        return None

    def _is_idle(self, ctx: str, last_used_at: datetime, now: datetime) -> bool:
        used = max(last_used_at, self._used.get(ctx, last_used_at))
        return used <= now - timedelta(minutes=self._settings.session_idle_minutes)

    def _count(self, ctx: str, study_uid: str, now: datetime) -> None:
        count, _ = self._counts.get((ctx, study_uid), (0, now))
        self._counts[ctx, study_uid] = (count + 1, now)
        self._used[ctx] = now

    async def _still_allowed(
        self,
        session: AsyncSession,
        launch: LaunchSession,
        origin: Origin,
        subject: Subject,
        key: UUID | str,
    ) -> PatientAccess:
        """Decide anew for the person behind the session; the right lost ends it, on record."""
        principal = _principal(
            launch.actor, launch.actor_name, launch.actor_roles, launch.actor_site
        )
        if launch.order_id is not None:
            # Cancelled while the link was being made: `end_order_sessions` could not see it yet.
            order = await session.get(Order, launch.order_id)
            if order is None or order.status == OrderStatus.CANCELLED:
                because = EndedBecause.ORDER_CANCELLED
                await end_sessions(session, [launch], because, origin, actor="")
                await session.commit()
                raise SessionOver(because)
        try:
            return await self._gate.patient_access(
                session,
                principal,
                Action.STUDY_VIEW,
                origin,
                subject,
                key,
                ctx=launch.ctx,
                record_grant=False,
            )
        except Denial:
            await self.flush()
            await end_sessions(session, [launch], EndedBecause.RIGHT_LOST, origin, actor="")
            await session.commit()
            raise SessionOver(EndedBecause.RIGHT_LOST) from None

    async def _record_first_access(self, access: PatientAccess) -> None:
        """Mark and record in one transaction, committed before a byte leaves: one record a study
        a session, however many requests come at once (PS3.15 A.5.3.5)."""
        assert access.study is not None
        now = utcnow()
        unmarked = (
            sa.update(LaunchStudy)
            .where(
                col(LaunchStudy.ctx) == access.ctx,
                col(LaunchStudy.study_instance_uid) == access.study.study_instance_uid,
                col(LaunchStudy.first_accessed_at).is_(None),
            )
            .values(first_accessed_at=now, last_accessed_at=now)
        )
        await self._gate.trail.record_if_first(unmarked, access.entry(Outcome.GRANTED))


_CANCELLED = OrderStatus.CANCELLED


class _Launch(NamedTuple):
    """What `Viewer.glance` asks about the session; in the order of `_LAUNCH`."""

    ctx: str
    cookie_sha256: str | None
    ended_at: datetime | None
    expires_at: datetime
    last_used_at: datetime
    actor: str
    actor_name: str
    actor_roles: str
    actor_site: str
    patient_id: UUID
    order_id: UUID | None
    order_status: OrderStatus | None

    @property
    def principal(self) -> Principal:
        return _principal(self.actor, self.actor_name, self.actor_roles, self.actor_site)


_LAUNCH: tuple[Any, ...] = (
    col(LaunchSession.ctx),
    col(LaunchSession.cookie_sha256),
    col(LaunchSession.ended_at),
    col(LaunchSession.expires_at),
    col(LaunchSession.last_used_at),
    col(LaunchSession.actor),
    col(LaunchSession.actor_name),
    col(LaunchSession.actor_roles),
    col(LaunchSession.actor_site),
    col(LaunchSession.patient_id).label("launch_patient_id"),
    col(LaunchSession.order_id),
    col(Order.status),
)
_ACTOR = Named(col(LaunchSession.actor), col(LaunchSession.actor_site))
_CTX = sa.bindparam("ctx", type_=sa.String())


def _glance() -> sa.Select[Any]:
    """Session, study and instance in one row; see `app.access.glance`."""
    uid = sa.bindparam(UID, type_=sa.String())
    tables = (
        _table(LaunchSession)
        .join(
            _table(LaunchStudy),
            sa.and_(
                col(LaunchStudy.ctx) == col(LaunchSession.ctx),
                col(LaunchStudy.study_instance_uid) == uid,
            ),
        )
        .join(_table(Study), col(Study.study_instance_uid) == uid)
        .outerjoin(_table(Order), col(Order.id) == col(LaunchSession.order_id))
    )
    columns = (*_LAUNCH, col(LaunchStudy.first_accessed_at), *study_columns(_ACTOR))
    return (
        sa.select(*columns).select_from(with_instance(tables)).where(col(LaunchSession.ctx) == _CTX)
    )


def _search() -> sa.Select[Any]:
    """Session and patient in one row."""
    tables = (
        _table(LaunchSession)
        .join(_table(Patient), col(Patient.id) == col(LaunchSession.patient_id))
        .outerjoin(_table(Order), col(Order.id) == col(LaunchSession.order_id))
    )
    columns = (*_LAUNCH, *relation_columns(_ACTOR))
    return sa.select(*columns).select_from(tables).where(col(LaunchSession.ctx) == _CTX)


def _table(model: Any) -> sa.FromClause:
    table: sa.FromClause = model.__table__
    return table


@cache
def _roles(text: str) -> frozenset[Role]:
    return frozenset(Role(role) for role in text.split(",") if role)


def _principal(sub: str, name: str, roles: str, site: str) -> Principal:
    return Principal(sub=sub, name=name, roles=_roles(roles), site=site)


def _refusal_of_link(launch: LaunchSession, now: datetime) -> LightboxError | None:
    if launch.redeemed_at is not None:
        return _used()
    if launch.ended_at is not None and launch.ended_because != EndedBecause.UNUSED:
        return SessionOver(EndedBecause(launch.ended_because))
    if launch.ended_at is not None or launch.code_expires_at <= now:
        return SessionOver(EndedBecause.UNUSED)
    return None


def _used() -> Gone:
    return Gone("This link has been used already; each link opens once.", extra={"reason": "used"})


def _not_yours() -> Unauthenticated:
    return Unauthenticated("There is no open viewing session for this. Open the images again.")


def _sha256(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
