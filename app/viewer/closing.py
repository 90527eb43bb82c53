"""When a session's time is over, and everything else that ends open viewers."""

from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.access import PatientAccess
from app.audit import Origin
from app.db import Database, insert_if_absent, utcnow
from app.models import EndedSignIn, LaunchSession, LaunchStudy, SpentToken
from app.settings import Settings
from app.viewer.endings import EndedBecause, end_sessions
from app.viewer.usage import Usage

TOKENS_KEPT = timedelta(days=30)
"""How long a used logout token is known again; one that lives longer could be used once more."""

SIGN_OUTS_KEPT = timedelta(hours=24)
"""How long a token from before a sign-out opens no viewer; longer than any token should live."""


class Limits:
    """The times after which a session is over."""

    def __init__(self, settings: Settings, usage: Usage) -> None:
        self._idle = timedelta(minutes=settings.session_idle_minutes)
        self._usage = usage

    def over(self, launch: LaunchSession, now: datetime) -> EndedBecause | None:
        """Why the session is over; None while it lives, or waits for its link to be opened."""
        if launch.ended_at is not None:
            return EndedBecause(launch.ended_because)
        if launch.expires_at <= now:
            return EndedBecause.EXPIRED
        if launch.redeemed_at is None:
            return EndedBecause.UNUSED if launch.code_expires_at <= now else None
        return EndedBecause.IDLE if self.is_idle(launch.ctx, launch.last_used_at, now) else None

    def is_idle(self, ctx: str, last_used_at: datetime, now: datetime) -> bool:
        return self._usage.last_used(ctx, last_used_at) <= now - self._idle

    def lives(self, now: datetime) -> sa.ColumnElement[bool]:
        """Redeemed sessions that have not ended, as far as it is written."""
        return sa.and_(
            col(LaunchSession.ended_at).is_(None),
            col(LaunchSession.redeemed_at).is_not(None),
            col(LaunchSession.expires_at) > now,
            col(LaunchSession.last_used_at) > now - self._idle,
        )

    def waits(self, now: datetime) -> sa.ColumnElement[bool]:
        """Sessions whose link can still be opened."""
        return sa.and_(
            col(LaunchSession.ended_at).is_(None),
            col(LaunchSession.redeemed_at).is_(None),
            col(LaunchSession.expires_at) > now,
            col(LaunchSession.code_expires_at) > now,
        )


def signed_out(actor: str, sid: str, since: datetime | None) -> sa.Select[Any]:
    """The sign-outs that a token of this person and sign-in, issued at `since`, is from before: as
    any is that doesn't say. One whose sign-in isn't known ends with any of its person's."""
    of_actor = col(EndedSignIn.actor) == actor
    of_sid = sa.and_(col(EndedSignIn.sid) == sid, sa.or_(of_actor, col(EndedSignIn.actor) == ""))
    theirs = sa.or_(sa.and_(of_actor, col(EndedSignIn.sid) == ""), of_sid if sid else of_actor)
    before = sa.true() if since is None else col(EndedSignIn.ended_at) >= since
    return sa.select(col(EndedSignIn.actor)).where(theirs, before).limit(1)


class Closing:
    """Ends open viewers, and links that wait. One per app.

    Call each before your transaction writes: the counts are flushed in another. What is ended is
    ended at the next request in every process, because each request reads what is committed.
    """

    def __init__(self, database: Database, usage: Usage, limits: Limits) -> None:
        self._database = database
        self._usage = usage
        self._limits = limits

    async def sweep(self, origin: Origin) -> int:
        """End the sessions whose time is over, each with its summary in the trail. How many."""
        await self._usage.flush_if_possible()
        now, ended = utcnow(), 0
        async with self._database.session() as session:
            over = await session.exec(
                select(LaunchSession)
                .where(
                    col(LaunchSession.ended_at).is_(None),
                    sa.not_(self._limits.lives(now)),
                    sa.not_(self._limits.waits(now)),
                )
                .order_by(col(LaunchSession.ctx))
            )
            for launch in over.all():
                because = self._limits.over(launch, now)
                if because is not None:  # None: used just now
                    ended += await end_sessions(session, [launch], because, origin, actor="")
            old = sa.delete(SpentToken).where(col(SpentToken.spent_at) < now - TOKENS_KEPT)
            await session.exec(old)
            past = sa.delete(EndedSignIn).where(col(EndedSignIn.ended_at) < now - SIGN_OUTS_KEPT)
            await session.exec(past)
            await session.commit()
        return ended

    async def flush(self) -> None:
        """Write what was counted, so that it is in the summaries."""
        await self._usage.flush_if_possible()

    async def sign_out(self, actor: str, sid: str) -> None:
        """Keep that a person, or one of their sign-ins, has ended. Committed before its viewers are
        looked for: a launch that is not seen there comes later, and sees this at its redemption."""
        await self.flush()
        now = utcnow()
        async with self._database.session() as session:
            added = insert_if_absent(session, EndedSignIn, actor=actor, sid=sid, ended_at=now)
            await session.exec(added)
            await session.exec(
                sa.update(EndedSignIn)
                .where(col(EndedSignIn.actor) == actor, col(EndedSignIn.sid) == sid)
                .values(ended_at=now)
            )
            await session.commit()

    async def of_order(self, access: PatientAccess) -> int:
        """End the viewers of the access's order, which is being cancelled. How many."""
        assert access.order is not None
        of_order = col(LaunchSession.order_id) == access.order.id
        await self._usage.flush_if_possible()
        return await self._end(access, of_order, EndedBecause.ORDER_CANCELLED)

    async def of_study(
        self, access: PatientAccess, because: EndedBecause = EndedBecause.STUDY_DELETED
    ) -> int:
        """End the viewers that opened or looked at the access's study, which is being deleted or
        unlinked; take it from the others, which merely list it. How many were ended."""
        assert access.study is not None
        uid = access.study.study_instance_uid
        await self._usage.flush_if_possible()
        commas = sa.literal(",")
        opened = (commas + col(LaunchSession.opens) + commas).contains(f",{uid},")
        # First: who looks at it in this moment finds it gone, or is found below.
        await access.session.exec(
            sa.delete(LaunchStudy).where(
                col(LaunchStudy.study_instance_uid) == uid,
                col(LaunchStudy.first_accessed_at).is_(None),
                ~sa.exists().where(col(LaunchSession.ctx) == col(LaunchStudy.ctx), opened),
            )
        )
        shown = select(LaunchStudy.ctx).where(LaunchStudy.study_instance_uid == uid)
        return await self._end(access, col(LaunchSession.ctx).in_(shown), because)

    async def where(
        self,
        session: AsyncSession,
        condition: sa.ColumnElement[bool],
        because: EndedBecause,
        origin: Origin,
        *,
        actor: str,
        flushed: bool = False,
    ) -> int:
        """End the sessions for which `condition` holds. How many. `flushed`: the caller has done
        that, and written since."""
        if not flushed:
            await self.flush()
        return await _end_where(session, condition, because, origin, actor)

    async def _end(
        self, access: PatientAccess, condition: sa.ColumnElement[bool], because: EndedBecause
    ) -> int:
        return await _end_where(
            access.session, condition, because, access.origin, access.principal.sub
        )


async def _end_where(
    session: AsyncSession,
    condition: sa.ColumnElement[bool],
    because: EndedBecause,
    origin: Origin,
    actor: str,
) -> int:
    live = await session.exec(
        select(LaunchSession).where(condition, col(LaunchSession.ended_at).is_(None))
    )
    return await end_sessions(session, live.all(), because, origin, actor=actor)
