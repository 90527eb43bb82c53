"""Who may see a patient after a merge, and after it is taken apart again.

Ties add up: who treats either of the two treats the one. Restrictions don't: the stricter holds,
for those only whom both let through; nobody gets past a restriction by a merge. And what was
tightened or taken since is not given back by taking apart.
"""

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.db import utcnow
from app.models import (
    BrokenGlass,
    CareTeamMember,
    MergedRow,
    NamedPerson,
    PatientMerge,
    Restriction,
    RestrictionLevel,
)

Told = dict[str, Any]
_RANKS = ("", RestrictionLevel.VIP.value, RestrictionLevel.SEALED.value)


async def join_rights(session: AsyncSession, done: PatientMerge, actor: str) -> Told:
    """Join care teams and restrictions under the survivor. What changed, for the record."""
    team = await _join_teams(session, done)
    theirs, ours = [await _restriction(session, x) for x in (done.patient_id, done.into_id)]
    both = stricter(theirs, ours)
    await _end_glass(session, done, {done.patient_id: ours, done.into_id: theirs})
    _note(
        session, done, "restriction", "before", {"retired": theirs, "survivor": ours, "both": both}
    )
    await session.flush()
    await _write_restriction(session, done.patient_id, None, actor)
    if both != ours:
        await _write_restriction(session, done.into_id, both, actor)
    before = {"retired": theirs, "survivor": ours}
    return {"care_team": team, "restriction": {"before": before, "after": both}}


async def part_rights(session: AsyncSession, done: PatientMerge, actor: str) -> Told:
    """Take care teams and restrictions apart. What changed, for the record."""
    team = await _part_teams(session, done)
    noted = (await _noted(session, done, "restriction"))["before"]
    now = await _restriction(session, done.into_id)
    untouched = now == noted["both"]
    theirs = noted["retired"] if untouched else stricter(noted["retired"], now)
    ours = noted["survivor"] if untouched else now
    await _write_restriction(session, done.patient_id, theirs, actor)
    if ours != now:
        await _write_restriction(session, done.into_id, ours, actor)
    for key, was in (await _noted(session, done, "glass-ended")).items():
        await session.exec(
            sa.update(BrokenGlass)
            .where(
                col(BrokenGlass.id) == UUID(key),
                col(BrokenGlass.expires_at) == datetime.fromisoformat(was["ended_at"]),
            )
            .values(expires_at=datetime.fromisoformat(was["expires_at"]))
            .execution_options(synchronize_session=False)
        )
    after = {"retired": theirs, "survivor": ours}
    return {"care_team": team, "restriction": {"before": now, "after": after}}


def stricter(one: Told | None, other: Told | None) -> Told | None:
    """What restricts a patient of whom both hold: the higher level, since the later of both, and
    whom both let through. Without a restriction everybody is."""
    if one is None or other is None:
        return one or other
    high, low = sorted((one, other), key=lambda each: _RANKS.index(each["level"]), reverse=True)
    reasons = dict.fromkeys(each["reason"] for each in (high, low) if each["reason"])
    return {
        "level": high["level"],
        "reason": " / ".join(reasons)[:500],
        "named": sorted(set(one["named"]) & set(other["named"])),
        "set_at": max(one["set_at"], other["set_at"], key=datetime.fromisoformat),
    }


# ---------------------------------------------------------------------------- restrictions


async def _restriction(session: AsyncSession, patient_id: UUID) -> Told | None:
    found = (
        await session.exec(
            select(Restriction)
            .where(Restriction.patient_id == patient_id)
            .execution_options(populate_existing=True)
        )
    ).first()
    if found is None:
        return None
    named = await session.exec(select(NamedPerson.sub).where(NamedPerson.patient_id == patient_id))
    return {
        "level": found.level,
        "reason": found.reason,
        "named": sorted(named),
        "set_at": found.set_at.isoformat(),  # said again since, it is not what it was
    }


async def _write_restriction(
    session: AsyncSession, patient_id: UUID, told: Told | None, actor: str
) -> None:
    for table in (NamedPerson, Restriction):
        await session.exec(sa.delete(table).where(col(table.patient_id) == patient_id))
    if told is None:
        return
    await _insert(
        session,
        Restriction,
        patient_id=patient_id,
        level=told["level"],
        reason=told["reason"],
        set_at=datetime.fromisoformat(told["set_at"]),
        set_by=actor,
    )
    for sub in told["named"]:
        await _insert(session, NamedPerson, patient_id=patient_id, sub=sub)


async def _end_glass(
    session: AsyncSession, done: PatientMerge, of_other: Mapping[UUID, Told | None]
) -> None:
    """What was broken for either of the two opens no more where the other's record is restricted,
    however little: nobody was alerted that it would be open too."""
    now = utcnow()
    ending = [each for each, told in of_other.items() if told is not None]
    live = (col(BrokenGlass.patient_id).in_(ending), col(BrokenGlass.expires_at) > now)
    rows = await session.exec(select(col(BrokenGlass.id), col(BrokenGlass.expires_at)).where(*live))
    for grant_id, expires_at in rows.all():
        told = {"expires_at": expires_at.isoformat(), "ended_at": now.isoformat()}
        _note(session, done, "glass-ended", str(grant_id), told)
    await session.exec(
        sa.update(BrokenGlass)
        .where(*live)
        .values(expires_at=now)
        .execution_options(synchronize_session=False)
    )


# ------------------------------------------------------------------------------ care teams


async def _join_teams(session: AsyncSession, done: PatientMerge) -> list[str]:
    """The retired patient's people treat the survivor. Who, by `sub`."""
    theirs, ours = [await _team(session, x) for x in (done.patient_id, done.into_id)]
    for sub, member in theirs.items():
        mine = ours.get(sub)
        both = member if mine is None else {**mine, "expires_at": _later(member, mine)}
        _note(session, done, "care-team", sub, {"retired": member, "survivor": mine, "both": both})
        await _write_member(session, done.into_id, sub, both)
    await session.exec(
        sa.delete(CareTeamMember).where(col(CareTeamMember.patient_id) == done.patient_id)
    )
    return sorted(theirs)


async def _part_teams(session: AsyncSession, done: PatientMerge) -> list[str]:
    """Who treated the retired patient does so again, unless taken off meanwhile. Who, by `sub`."""
    now, back = await _team(session, done.into_id), []
    for sub, was in (await _noted(session, done, "care-team")).items():
        current = now.get(sub)
        if current is None:
            continue
        back.append(sub)
        if current == was["both"]:
            await _write_member(session, done.into_id, sub, was["survivor"])
            await _write_member(session, done.patient_id, sub, was["retired"])
        else:
            # It was changed since: for how long at most, holds for either.
            until = _earlier(was["retired"], current)
            await _write_member(
                session, done.patient_id, sub, {**was["retired"], "expires_at": until}
            )
    return sorted(back)


def _later(one: Told, other: Told) -> str | None:
    ends = [one["expires_at"], other["expires_at"]]
    return None if None in ends else max(ends, key=datetime.fromisoformat)


def _earlier(one: Told, other: Told) -> str | None:
    ends = [each["expires_at"] for each in (one, other) if each["expires_at"] is not None]
    return min(ends, key=datetime.fromisoformat) if ends else None


async def _team(session: AsyncSession, patient_id: UUID) -> dict[str, Told]:
    """Who treats a patient, by `sub`. Locked: who is being taken off in this moment is off."""
    rows = await session.exec(
        select(CareTeamMember)
        .where(CareTeamMember.patient_id == patient_id)
        .order_by(col(CareTeamMember.sub))
        .with_for_update()
        .execution_options(populate_existing=True)
    )
    return {
        each.sub: {
            "role": each.role,
            "expires_at": each.expires_at.isoformat() if each.expires_at else None,
            "added_at": each.added_at.isoformat(),
            "added_by": each.added_by,
        }
        for each in rows
    }


async def _write_member(
    session: AsyncSession, patient_id: UUID, sub: str, told: Told | None
) -> None:
    await session.exec(
        sa.delete(CareTeamMember).where(
            col(CareTeamMember.patient_id) == patient_id, col(CareTeamMember.sub) == sub
        )
    )
    if told is None:
        return
    until = told["expires_at"]
    await _insert(
        session,
        CareTeamMember,
        patient_id=patient_id,
        sub=sub,
        role=told["role"],
        expires_at=datetime.fromisoformat(until) if until else None,
        added_at=datetime.fromisoformat(told["added_at"]),
        added_by=told["added_by"],
    )


# ------------------------------------------------------------------------------------ rows


async def _insert(session: AsyncSession, table: Any, **values: Any) -> None:
    """Past the session's own objects, which may be of rows that were deleted by statement."""
    await (await session.connection()).execute(sa.insert(table).values(**values))


def _note(session: AsyncSession, done: PatientMerge, kind: str, key: str, told: Told) -> None:
    session.add(MergedRow(merge_id=done.id, kind=kind, key=key, detail=json.dumps(told)))


async def _noted(session: AsyncSession, done: PatientMerge, kind: str) -> dict[str, Told]:
    rows = await session.exec(
        select(MergedRow).where(MergedRow.merge_id == done.id, MergedRow.kind == kind)
    )
    return {each.key: json.loads(each.detail) for each in rows}
