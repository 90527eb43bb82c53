"""What the viewer origin says where it shows no images: the page, and the checks behind it.

Whoever has the session's cookie, or a link's code that nobody has used, is told what stands in the
way now. Whoever merely has the address is told no more than that it is over.
"""

import logging
from dataclasses import replace
from uuid import UUID

import sqlalchemy as sa
from sqlmodel import select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.access import Denial, Subject
from app.db import Database, utcnow
from app.errors import LightboxError
from app.models import LaunchSession
from app.viewer import words
from app.viewer.endings import ENDED_SENTENCES, EndedBecause, SessionOver, public_sentence
from app.viewer.explanation import Check, Explanation
from app.viewer.glances import principal_of, sha256
from app.viewer.pages import page
from app.viewer.sessions import Viewer

logger = logging.getLogger(__name__)

REFUSED = "These images can't be opened"
SILENT = "The images can't be shown right now"
ENDED = "This viewer is closed"
NOT_YOURS = "This viewing session belongs to another browser, or is not known."


async def of_link(
    viewer: Viewer, database: Database, code: str, error: LightboxError, request_id: str
) -> str:
    """The page for a link that did not open."""
    if error.status in (429, 503):
        return page(SILENT, error.detail, request_id, words.TRY_AGAIN_ANY)
    if not isinstance(error, SessionOver | Denial):
        return page(REFUSED, error.detail, request_id, words.NEW_LINK)
    async with database.session() as session:
        query = select(LaunchSession).where(LaunchSession.code_sha256 == sha256(code))
        launch = (await session.exec(query)).one()
        explanation = await _explained(viewer, session, launch)
    return page(REFUSED, error.detail, request_id, words.NEW_LINK, explanation)


async def of_session(
    viewer: Viewer, database: Database, ctx: str, cookie: str | None, request_id: str
) -> str:
    """The page for a session that doesn't answer any more."""
    async with database.session() as session:
        launch = await viewer.proven(session, ctx, cookie)
        if launch is not None:
            because = viewer.limits.over(launch, utcnow())
            explanation = await _explained(viewer, session, launch)
            sentence = words.STILL_OPEN if because is None else ENDED_SENTENCES[because]
            title = REFUSED if because is None else ENDED
            return page(title, sentence, request_id, explanation=explanation)
        launch = await session.get(LaunchSession, ctx)
        because = viewer.limits.over(launch, utcnow()) if launch is not None else None
    sentence = NOT_YOURS if because is None else public_sentence(because)
    return page(REFUSED if because is None else ENDED, sentence, request_id)


async def _explained(
    viewer: Viewer, session: AsyncSession, launch: LaunchSession
) -> Explanation | None:
    """What stands in the way of a new viewer of the same; None where that can't be said now."""
    subject, key = _what(launch)
    because = viewer.limits.over(launch, utcnow())
    try:
        said = await viewer.explainer.explain(session, principal_of(launch), subject, key)
    except (LightboxError, sa.exc.SQLAlchemyError) as error:
        logger.error("a refusal is not explained: %s", type(error).__name__)
        return None
    # Who opened it knows that there is such a patient.
    said.steps = [
        replace(each, sentence=words.NO_TIE) if each.sentence == words.UNRELATED[subject] else each
        for each in said.steps
    ]
    if said.can_open and because is not None:
        # Of this one, and not of a later one that may be open elsewhere.
        said.steps = [each for each in said.steps if each.check is not Check.SESSION]
        said.fails(Check.SESSION, ENDED_SENTENCES[because], _then(because))
    return said


def _what(launch: LaunchSession) -> tuple[Subject, UUID | str]:
    """What the viewer was opened for."""
    if launch.order_id is not None:
        return Subject.ORDER, launch.order_id
    if "," not in launch.opens:
        return Subject.STUDY, launch.opens
    return Subject.PATIENT, launch.patient_id


def _then(because: EndedBecause) -> str:
    return words.NEW_LINK if because is EndedBecause.UNUSED else words.OPEN_AGAIN
