"""Launch sessions: one opening of the viewer, for one person and one patient.

The API answers with a link that holds a one-time code, good for a minute. Opening it trades the
code for an HttpOnly cookie limited to `/s/<ctx>/` (so that two tabs don't overwrite each other)
and a clean URL. Each request of the viewer is decided anew: the session, the right of the person
behind it, the study. A session ends after a while without use, at an absolute limit, with the
grant where the glass was broken for it, and at once when it is revoked, its person signs out, its
order is cancelled, its study deleted or filed under another patient, or the right lost.
"""

import hmac
import secrets
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import NoReturn
from urllib.parse import urlencode
from uuid import UUID

import sqlalchemy as sa
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.access import (
    Denial,
    Gate,
    PatientAccess,
    Reason,
    SessionAccess,
    StudyAccess,
    Subject,
    glass,
)
from app.access.gate import carried
from app.access.policy import BREAK_THE_GLASS
from app.audit import Action, AuditTrail, Entry, Origin, Outcome
from app.db import Database, Reader, utcnow
from app.errors import NotFound
from app.linking import StudySummary
from app.models import LaunchSession, LaunchStudy, Order, OrderStatus, Study
from app.orthanc import Orthanc
from app.settings import Settings
from app.viewer.closing import Closing, Limits, signed_out
from app.viewer.endings import EndedBecause, SessionOver, end_sessions
from app.viewer.explain import Explainer
from app.viewer.glances import Alive, Glances, continues, principal_of, sha256, strayed
from app.viewer.links import Launch, Redeemed, not_yours, refusal_of_link, used
from app.viewer.usage import Usage

COOKIE_NAME = "lightbox"
COMPARE_LAYOUT = "@ohif/hpCompare"  # OHIF's hanging protocol for two studies side by side
WARN_MINUTES = glass.RENEWABLE_MINUTES
"""So long before its absolute limit an open viewer says that it will close."""


class Viewer:
    """Makes, redeems, checks and ends launch sessions. One per app."""

    def __init__(
        self, settings: Settings, database: Database, gate: Gate, orthanc: Orthanc, reader: Reader
    ) -> None:
        self._settings = settings
        self._database = database
        self._gate = gate
        self._orthanc = orthanc
        self._usage = Usage(database)
        self.limits = Limits(settings, self._usage)
        self.closing = Closing(database, self._usage, self.limits)
        self.explainer = Explainer(settings, gate, orthanc, self.limits)
        self._glances = Glances(reader, gate.ehr, self._usage, self.limits)

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
        who = access.principal
        gone = signed_out(who.sub, who.sid, who.issued_at)
        if (await (await access.session.connection()).execute(gone)).first() is not None:
            raise SessionOver(EndedBecause.SIGNED_OUT)
        now, code = utcnow(), secrets.token_urlsafe(32)
        uids = [summary.study.study_instance_uid for summary in opened]
        session = LaunchSession(
            ctx=secrets.token_urlsafe(16),
            code_sha256=sha256(code),
            actor=access.principal.sub,
            actor_name=access.principal.name,
            actor_roles=access.principal.roles_text,
            actor_site=access.principal.site,
            actor_sid=access.principal.sid,
            actor_since=who.issued_at,
            purpose_of_use=access.purpose_of_use,
            context_patient_id=access.patient.id if who.patient is not None else None,
            patient_id=access.patient.id,
            order_id=access.order.id if access.order else None,
            opens=",".join(uids),
            layout=layout,
            code_expires_at=now + timedelta(seconds=self._settings.launch_code_seconds),
            expires_at=await self._ends_at(access, now),
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

        Raises NotFound for a code never given, Gone for a used or late one, TooManyRequests after
        too many of those, SessionOver, Denial.
        """
        now = utcnow()
        async with self._database.session() as session:
            launch = (
                await session.exec(
                    select(LaunchSession).where(LaunchSession.code_sha256 == sha256(code))
                )
            ).first()
            entry = Entry(action=Action.SESSION_OPEN, outcome=Outcome.DENIED, origin=origin)
            if launch is None:
                await self._gate.failed_tries.record(replace(entry, reason="unknown-code"))
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
            refusal = refusal_of_link(launch, now)
            if refusal is not None:
                await self._gate.failed_tries.record(replace(entry, reason=refusal.extra["reason"]))
                raise refusal
            ctx, opens, layout = launch.ctx, launch.opens, launch.layout
            gone = signed_out(launch.actor, launch.actor_sid, launch.actor_since)
            if (await (await session.connection()).execute(gone)).first() is not None:
                await self._over(session, launch, origin, EndedBecause.SIGNED_OUT)
            access = await self.patient_access(session, launch, origin)
            cookie = secrets.token_urlsafe(32)
            redeemed = await session.exec(
                sa.update(LaunchSession)
                .where(
                    col(LaunchSession.ctx) == ctx,
                    col(LaunchSession.redeemed_at).is_(None),
                    col(LaunchSession.ended_at).is_(None),
                )
                .values(redeemed_at=now, last_used_at=now, cookie_sha256=sha256(cookie))
            )
            if redeemed.rowcount != 1:
                # Two browsers opened it at the same moment, and the other was first; or it ended.
                await session.rollback()  # the record needs SQLite's one write lock
                last = await session.get(LaunchSession, ctx, populate_existing=True)
                if last is not None and last.redeemed_at is None and last.ended_at is not None:
                    because = EndedBecause(last.ended_because)
                    await self._gate.trail.record(replace(entry, reason=because.value))
                    raise SessionOver(because)
                await self._gate.trail.record(replace(entry, reason="used"))
                raise used()
            granted = replace(entry, outcome=Outcome.GRANTED, detail=carried(access.by))
            await AuditTrail.add(session, granted)
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
        self, session: AsyncSession, ctx: str, cookie: str | None, origin: Origin
    ) -> LaunchSession:
        """The live session that the cookie proves.

        Raises Unauthenticated without the right cookie; SessionOver where it has ended, which is
        recorded.
        """
        launch = await self.proven(session, ctx, cookie)
        if launch is None:
            raise not_yours()
        because = self.limits.over(launch, utcnow())
        if because is not None:
            await self.refuse(launch, origin, because.value)
            raise SessionOver(because)
        return launch

    async def proven(
        self, session: AsyncSession, ctx: str, cookie: str | None
    ) -> LaunchSession | None:
        """The session of that name, over or not, if the cookie is its own."""
        launch = await session.get(LaunchSession, ctx)
        proof = launch.cookie_sha256 if launch is not None else None
        if proof is None or cookie is None or not hmac.compare_digest(proof, sha256(cookie)):
            return None
        return launch

    async def glance(
        self, ctx: str, cookie: str | None, study_uid: str, series_uid: str, sop_uid: str
    ) -> StudyAccess | None:
        """See `Glances.at_study`."""
        return await self._glances.at_study(ctx, cookie, study_uid, series_uid, sop_uid)

    async def glance_to_search(self, ctx: str, cookie: str | None) -> SessionAccess | None:
        """See `Glances.at_search`."""
        return await self._glances.at_search(ctx, cookie)

    async def alive(self, ctx: str, cookie: str | None) -> Alive | None:
        """See `Glances.alive`."""
        return await self._glances.alive(ctx, cookie)

    async def study_access(
        self, session: AsyncSession, launch: LaunchSession, study_uid: str, origin: Origin
    ) -> PatientAccess:
        """The session's access to one of its studies; the first one is recorded before it counts.

        Raises NotFound for a study that is not the session's, Denial where the right is lost
        (which ends the session), AuditUnavailable.
        """
        granted = await session.get(LaunchStudy, (launch.ctx, study_uid))
        if granted is None:
            await self.refuse(launch, origin, "not-in-session", requested=study_uid)
            raise NotFound("This viewing session does not include this study.")
        study = await session.get(Study, study_uid)
        if study is None:
            await self.refuse(launch, origin, "unknown", requested=study_uid)
            raise NotFound("This viewing session does not include this study.")
        if study.patient_id != launch.patient_id:
            # Filed under another patient meanwhile: what was shown of it was not this one's.
            await self._over(session, launch, origin, EndedBecause.STUDY_MOVED)
        first = granted.first_accessed_at is None
        access = await self._still_allowed(session, launch, origin, Subject.STUDY, study_uid)
        if access.patient.id != launch.patient_id:
            raise NotFound("This viewing session does not include this study.")
        if first:
            await self._record_first_access(launch, access)
        return access

    async def patient_access(
        self, session: AsyncSession, launch: LaunchSession, origin: Origin
    ) -> PatientAccess:
        """The session's access to its patient, for searches. Raises Denial."""
        return await self._still_allowed(
            session, launch, origin, Subject.PATIENT, launch.patient_id
        )

    async def refuse(self, launch: LaunchSession, origin: Origin, why: str, **detail: str) -> None:
        """Record a request that is refused."""
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
                purpose_of_use=launch.purpose_of_use,
                detail=detail,
            )
        )

    async def is_live(self, ctx: str) -> bool:
        """Is there a redeemed session of that name that has not ended? (Not: may you use it.)"""
        async with self._database.session() as session:
            launch = await session.get(LaunchSession, ctx)
            return (
                launch is not None
                and launch.redeemed_at is not None
                and self.limits.over(launch, utcnow()) is None
            )

    async def is_known(self, ctx: str) -> bool:
        """Was there ever a session of that name that somebody opened?"""
        async with self._database.session() as session:
            launch = await session.get(LaunchSession, ctx)
            return launch is not None and launch.redeemed_at is not None

    async def flush(self) -> None:
        """Write what was counted since the last time; see `Usage.flush`."""
        await self._usage.flush()

    async def sweep(self, origin: Origin) -> int:
        """End the sessions whose time is over; see `Closing.sweep`."""
        return await self.closing.sweep(origin)

    async def end_order_sessions(self, access: PatientAccess) -> int:
        """See `Closing.of_order`."""
        return await self.closing.of_order(access)

    async def end_study_sessions(
        self, access: PatientAccess, because: EndedBecause = EndedBecause.STUDY_DELETED
    ) -> int:
        """See `Closing.of_study`."""
        return await self.closing.of_study(access, because)

    async def _ends_at(self, access: PatientAccess, now: datetime) -> datetime:
        limit = now + timedelta(hours=self._settings.session_max_hours)
        if access.purpose_of_use != BREAK_THE_GLASS:
            return limit
        until = await glass.holds_until(
            access.session, access.principal.sub, access.patient.id, now
        )
        # None: over in this very moment.
        return min(limit, until or now)

    async def _over(
        self, session: AsyncSession, launch: LaunchSession, origin: Origin, because: EndedBecause
    ) -> NoReturn:
        """End the session at this request, on record: why it was refused, and what it had seen."""
        await self.refuse(launch, origin, because.value)
        await self._end(session, launch, origin, because)

    async def _end(
        self, session: AsyncSession, launch: LaunchSession, origin: Origin, because: EndedBecause
    ) -> NoReturn:
        await self._usage.flush_if_possible()
        await end_sessions(session, [launch], because, origin, actor="")
        await session.commit()
        raise SessionOver(because)

    async def _still_allowed(
        self,
        session: AsyncSession,
        launch: LaunchSession,
        origin: Origin,
        subject: Subject,
        key: UUID | str,
    ) -> PatientAccess:
        """Decide anew for the person behind the session; the right lost ends it, on record."""
        if launch.order_id is not None:
            # Cancelled while the link was being made: `of_order` could not see it yet.
            order = await session.get(Order, launch.order_id)
            if order is None or order.status == OrderStatus.CANCELLED:
                await self._over(session, launch, origin, EndedBecause.ORDER_CANCELLED)
        moved = select(LaunchSession.ctx).where(LaunchSession.ctx == launch.ctx, strayed())
        if (await session.exec(moved)).first() is not None:
            await self._over(session, launch, origin, EndedBecause.STUDY_MOVED)
        try:
            access = await self._gate.patient_access(
                session,
                principal_of(launch),
                Action.STUDY_VIEW,
                origin,
                subject,
                key,
                ctx=launch.ctx,
                record_grant=False,
            )
        except Denial as denial:
            await self._end(session, launch, origin, _lost(launch, denial.reason))
        if not continues(launch.purpose_of_use, access.purpose_of_use):
            # The right it was opened with is lost, and the glass was broken since: open it anew.
            await self._over(session, launch, origin, EndedBecause.RIGHT_LOST)
        return access

    async def _record_first_access(self, launch: LaunchSession, access: PatientAccess) -> None:
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
        entry = access.entry(
            Outcome.GRANTED, purpose_of_use=launch.purpose_of_use, detail=carried(access.by)
        )
        await self._gate.trail.record_if_first(unmarked, entry)


def _lost(launch: LaunchSession, reason: Reason) -> EndedBecause:
    if launch.purpose_of_use == BREAK_THE_GLASS:
        return EndedBecause.GLASS_ENDED
    if reason is Reason.RESTRICTED:
        return EndedBecause.RESTRICTED
    return EndedBecause.RIGHT_LOST
