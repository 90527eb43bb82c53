"""Why a viewing session is over, and how one is ended: on record, with what was looked at."""

from collections.abc import Iterable
from datetime import datetime
from enum import StrEnum

import sqlalchemy as sa
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.audit import Action, AuditTrail, Entry, Origin, Outcome
from app.db import utcnow
from app.errors import Forbidden
from app.models import LaunchSession, LaunchStudy


class EndedBecause(StrEnum):
    """Why a session is over; the refusal page has a sentence for each."""

    EXPIRED = "expired"
    IDLE = "idle"
    ORDER_CANCELLED = "order-cancelled"
    RIGHT_LOST = "right-lost"
    STUDY_DELETED = "study-deleted"
    UNUSED = "unused"


ENDED_SENTENCES = {
    EndedBecause.EXPIRED: "This viewing session has reached its time limit.",
    EndedBecause.IDLE: "This viewing session was not used for a while and has ended.",
    EndedBecause.ORDER_CANCELLED: "The order whose images were open here has been cancelled.",
    EndedBecause.RIGHT_LOST: "You no longer have access to this patient's images.",
    EndedBecause.STUDY_DELETED: "The images that were open here have been deleted.",
    EndedBecause.UNUSED: "This link was not opened in time.",
}


class SessionOver(Forbidden):
    """The session is over; `because` says why."""

    def __init__(self, because: EndedBecause) -> None:
        super().__init__(ENDED_SENTENCES[because], extra={"reason": because.value})
        self.because = because


async def end_sessions(
    session: AsyncSession,
    launches: Iterable[LaunchSession],
    because: EndedBecause,
    origin: Origin,
    *,
    actor: str,
) -> int:
    """End sessions in the caller's transaction, each with a record of what was looked at."""
    ended = 0
    for launch in launches:
        marked = await session.exec(
            sa.update(LaunchSession)
            .where(col(LaunchSession.ctx) == launch.ctx, col(LaunchSession.ended_at).is_(None))
            .values(ended_at=utcnow(), ended_because=because.value)
        )
        if marked.rowcount != 1:
            continue  # another process ended it just now
        ended += 1
        shown = await session.exec(
            select(LaunchStudy).where(
                LaunchStudy.ctx == launch.ctx, col(LaunchStudy.first_accessed_at).is_not(None)
            )
        )
        studies = [
            {
                "study_instance_uid": each.study_instance_uid,
                "request_count": each.request_count,
                "first_accessed_at": _iso(each.first_accessed_at),
                "last_accessed_at": _iso(each.last_accessed_at),
            }
            for each in shown
        ]
        await AuditTrail.add(
            session,
            Entry(
                action=Action.SESSION_END,
                outcome=Outcome.DONE,
                origin=origin,
                actor=actor,
                reason=because.value,
                patient_id=launch.patient_id,
                order_id=launch.order_id,
                ctx=launch.ctx,
                purpose_of_use=launch.purpose_of_use,
                detail={"viewer": launch.actor, "studies": studies},
            ),
        )
    return ended


def _iso(moment: datetime | None) -> str | None:
    return moment.isoformat() if moment else None
