"""Breaking the glass, and the auditors' review of it."""

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated
from urllib.parse import urlencode
from uuid import UUID

import sqlalchemy as sa
from fastapi import Depends, Query, Request, Response
from pydantic import BaseModel, Field, StringConstraints
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.access import Caller, RoleAccess, glass
from app.access.glass import GlassReason
from app.audit import Action
from app.errors import Unprocessable
from app.models import BrokenGlass, PatientMerge
from app.routes.paging import Cursor, Limit, link_next, time_cursor
from app.routing import AccessRouter

router = AccessRouter(prefix="/api/v1", tags=["break the glass"])

BreakGlass = Annotated[
    RoleAccess, Depends(Caller(Action.GLASS_BREAK, patient_in_body=True), scope="function")
]
ReviewGlass = Annotated[RoleAccess, Depends(Caller(Action.GLASS_REVIEW), scope="function")]
# One or more lines, no other control characters.
_WORDS = r"^[^\x00-\x08\x0b\x0c\x0e-\x1f\x7f]*$"


class Reason(BaseModel):
    """Why: one of the codes, and in words for whoever reviews it."""

    reason_code: GlassReason
    reason_text: Annotated[
        str,
        StringConstraints(strip_whitespace=True, min_length=10, max_length=1000, pattern=_WORDS),
    ] = Field(description="What makes it necessary, in your own words.")


class GlassOut(BaseModel):
    """What came of it. Without need nothing is broken, and there is no grant."""

    broken: bool
    id: UUID | None = None
    patient_id: UUID
    reason_code: GlassReason
    broken_at: datetime | None = None
    expires_at: datetime | None = None
    detail: str


class ReviewedOut(BaseModel):
    """A grant, for its review. `trail` leads to what was done under it; where the patient was ever
    merged with another, to all that its person did since."""

    id: UUID
    patient_id: UUID
    sub: str
    name: str
    roles: list[str]
    reason_code: str
    reason_text: str
    opens_sealed: bool
    broken_at: datetime
    expires_at: datetime
    reviewed_at: datetime | None
    reviewed_by: str
    review_comment: str
    trail: str

    @classmethod
    async def of(cls, session: AsyncSession, grants: Sequence[BrokenGlass]) -> list["ReviewedOut"]:
        found = []
        merged = await _merged(session, {each.patient_id for each in grants})
        for grant in grants:
            fields = grant.model_dump()
            fields["roles"] = [each for each in grant.roles.split(",") if each]
            query = {"actor": grant.sub, "from": grant.broken_at.isoformat()}
            if grant.patient_id not in merged:
                # The trail keeps its records under the id that they were written with.
                query = {"patient_id": str(grant.patient_id), **query}
            found.append(cls(**fields, trail=f"/api/v1/audit?{urlencode(query)}"))
        return found


class Review(BaseModel):
    comment: Annotated[
        str,
        StringConstraints(strip_whitespace=True, min_length=3, max_length=2000, pattern=_WORDS),
    ] = Field(description="What the review found.")


@router.post("/patients/{patient_id}/break-glass")
async def break_glass(
    access: BreakGlass, patient_id: UUID, body: Reason, request: Request
) -> GlassOut:
    """Take the right to a patient in an emergency, for a while, on record, with an alert. Nothing
    is broken for who has the right anyway. 404 for an unknown patient, 403 where the glass can't be
    broken, 409 while an earlier grant stands."""
    settings = request.app.state.settings
    grant = await glass.break_glass(
        access, patient_id, body.reason_code, body.reason_text, settings
    )
    if grant is None:
        return GlassOut(
            broken=False,
            patient_id=patient_id,
            reason_code=body.reason_code,
            detail="You have the right to this patient already; nothing was broken.",
        )
    return GlassOut(
        broken=True,
        **grant.model_dump(include={"id", "patient_id", "broken_at", "expires_at"}),
        reason_code=body.reason_code,
        detail="The glass is broken for you until `expires_at`. What you do is marked in the "
        "trail, the hospital has been alerted, and an auditor will review it.",
    )


@router.get("/audit/break-glass")
async def read_broken_glass(
    access: ReviewGlass,
    request: Request,
    response: Response,
    reviewed: Annotated[
        bool | None, Query(description="`false`: the queue; `true`: what has been reviewed.")
    ] = None,
    limit: Limit = 50,
    cursor: Cursor = "",
) -> list[ReviewedOut]:
    """Who broke the glass, and why; the oldest first."""
    query = select(BrokenGlass)
    if reviewed is not None:
        is_null = col(BrokenGlass.reviewed_at).is_(None)
        query = query.where(sa.not_(is_null) if reviewed else is_null)
    if cursor:
        at, key = _read_key(cursor)
        query = query.where(
            sa.or_(
                col(BrokenGlass.broken_at) > at,
                sa.and_(col(BrokenGlass.broken_at) == at, col(BrokenGlass.id) > key),
            )
        )
    query = query.order_by(col(BrokenGlass.broken_at), col(BrokenGlass.id)).limit(limit + 1)
    found = (await access.session.exec(query)).all()
    page = found[:limit]
    last = f"{page[-1].broken_at.isoformat()} {page[-1].id}" if len(found) > limit else None
    link_next(request, response, last)
    return await ReviewedOut.of(access.session, page)


@router.post("/audit/break-glass/{grant_id}/review")
async def review_broken_glass(access: ReviewGlass, grant_id: UUID, body: Review) -> ReviewedOut:
    """Review a grant, once. 409 for one that was reviewed, 403 for one's own."""
    grant = await glass.review(access, grant_id, body.comment)
    (reviewed,) = await ReviewedOut.of(access.session, [grant])
    return reviewed


async def _merged(session: AsyncSession, patient_ids: set[UUID]) -> set[UUID]:
    """Those of them who ever were part of a merge."""
    parts = (col(PatientMerge.patient_id), col(PatientMerge.into_id))
    rows = await session.exec(
        select(*parts).where(sa.or_(*(each.in_(patient_ids) for each in parts)))
    )
    return patient_ids & {each for pair in rows for each in pair}


def _read_key(cursor: str) -> tuple[datetime, UUID]:
    at, key = time_cursor(cursor)
    try:
        return at, UUID(key)
    except ValueError as error:
        raise Unprocessable("`cursor` is not one that this API gave.") from error
