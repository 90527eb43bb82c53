"""Why a viewing session is over, and how one is ended: on record, with what was looked at."""

from collections.abc import Iterable, Mapping
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
    GLASS_ENDED = "glass-ended"
    IDLE = "idle"
    ORDER_CANCELLED = "order-cancelled"
    PATIENT_CHANGED = "patient-changed"
    RESTRICTED = "restricted"
    REVOKED = "revoked"
    RIGHT_LOST = "right-lost"
    SIGNED_OUT = "signed-out"
    STUDY_DELETED = "study-deleted"
    STUDY_MOVED = "study-moved"
    UNUSED = "unused"


ENDED_SENTENCES: Mapping[EndedBecause, str] = {
    EndedBecause.EXPIRED: "This viewing session has reached its time limit.",
    EndedBecause.GLASS_ENDED: "The emergency access under which these images were open is over.",
    EndedBecause.IDLE: "This viewing session was not used for a while and has ended.",
    EndedBecause.ORDER_CANCELLED: "The order whose images were open here has been cancelled.",
    EndedBecause.PATIENT_CHANGED: "Who this patient is was corrected, and images that were open "
    "here say something else. Check whose they are before you rely on them.",
    EndedBecause.RESTRICTED: "This patient's record has been restricted to named people, and you "
    "are not among them.",
    EndedBecause.REVOKED: "This viewing session was ended by you, or by an administrator.",
    EndedBecause.RIGHT_LOST: "You no longer have access to this patient's images.",
    EndedBecause.SIGNED_OUT: "You have signed out, and your viewers were closed with it.",
    EndedBecause.STUDY_DELETED: "The images that were open here have been deleted.",
    EndedBecause.STUDY_MOVED: "Images that were open here are no longer filed under this "
    "patient. Don't rely on what you saw of them.",
    EndedBecause.UNUSED: "This link was not opened in time.",
}


def public_sentence(because: EndedBecause) -> str:
    """The sentence for whoever has the address and not the cookie: a patient's being restricted
    is no business of theirs."""
    if because is EndedBecause.RESTRICTED:
        because = EndedBecause.RIGHT_LOST
    return ENDED_SENTENCES[because]


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
    # In one order everywhere, as counts are written.
    for launch in sorted(launches, key=lambda each: each.ctx):
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
