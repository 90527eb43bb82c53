"""Viewer links: what is given out, what the browser gets for it, and why one does not open."""

from dataclasses import dataclass
from datetime import datetime

from app.errors import Gone, LightboxError, Unauthenticated
from app.models import LaunchSession
from app.viewer.endings import EndedBecause, SessionOver


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


def refusal_of_link(launch: LaunchSession, now: datetime) -> LightboxError | None:
    if launch.redeemed_at is not None:
        return used()
    if launch.ended_at is not None and launch.ended_because != EndedBecause.UNUSED:
        return SessionOver(EndedBecause(launch.ended_because))
    if launch.ended_at is not None or launch.code_expires_at <= now:
        return SessionOver(EndedBecause.UNUSED)
    return None


def used() -> Gone:
    return Gone("This link has been used already; each link opens once.", extra={"reason": "used"})


def not_yours() -> Unauthenticated:
    return Unauthenticated("There is no open viewing session for this. Open the images again.")
