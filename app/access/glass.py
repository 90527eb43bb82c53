"""Breaking the glass: somebody takes the right to a patient in an emergency, for a while.

Whoever does so says why, from a closed list and in words. It opens what their role may see anyway
of patients they treat, and no more; a hospital's alert is sent in the same transaction; whatever
is done under it is marked `BTG` in the trail; an auditor reviews each one, once.
"""

from dataclasses import replace
from datetime import datetime, timedelta
from enum import StrEnum
from uuid import UUID

import sqlalchemy as sa
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.access import Reason, Relation, RoleAccess, decide
from app.access.ehr import EHR_SILENT, Question, narrow
from app.access.gate import entry_of
from app.access.policy import BREAK_THE_GLASS, Decision, clauses
from app.aliases import lock, retired_into, survivor
from app.audit import Action, AuditTrail, Outcome
from app.db import utcnow
from app.errors import Conflict, EhrUnavailable, Forbidden, NotFound
from app.identity import Principal
from app.models import BrokenGlass, Patient, Restriction, RestrictionLevel
from app.notifications import Event, Notifications
from app.settings import Settings

RENEWABLE_MINUTES = 10
"""So long before its end a grant may be followed by the next one."""


_REFUSED = (
    "The glass can't be broken for this patient. Ask those who treat the patient, or the privacy "
    "office."
)
_REFUSED_BY_EHR = (
    "The EHR does not let you see this patient, in an emergency neither; so the glass was not "
    "broken. Ask those who treat the patient, or the EHR's support."
)


class GlassReason(StrEnum):
    """Why the glass is broken: the coded half of the reason."""

    COVERING_COLLEAGUE = "covering-colleague"
    EMERGENCY_TREATMENT = "emergency-treatment"
    INCOMPLETE_RECORD = "incomplete-record"
    PATIENT_REQUEST = "patient-request"
    PUBLIC_HEALTH = "public-health"
    SECOND_OPINION = "second-opinion"
    OTHER = "other"


async def break_glass(
    caller: RoleAccess, patient_id: UUID, code: GlassReason, text: str, settings: Settings
) -> BrokenGlass | None:
    """Grant the caller the right to the patient for `break_glass_minutes`, on record, with an
    alert. None: they have the right without it, and nothing is granted.

    Raises NotFound for an unknown patient; Forbidden for one for whom it can't be broken; Conflict
    while an earlier grant stands, or where the patient is merged at this moment.
    """
    now, principal, session = utcnow(), caller.principal, caller.session
    survives = await survivor(session, patient_id)  # an emergency knows no merged records
    patient_id = survives.id if survives is not None else patient_id
    joined = await retired_into(session, patient_id)
    found = await _facts(caller, patient_id, now)
    if found is None or survives is None:
        await caller.unknown({"patient_id": str(patient_id)})
        raise NotFound("No patient has this id.")
    relations, level = found
    entry = replace(entry_of(principal, caller.action, caller.origin), patient_id=patient_id)
    said: dict[str, str] = {"reason_code": code.value, "reason_text": text}
    by_right = decide(principal, Action.STUDY_VIEW, relations - {Relation.BROKE_GLASS})
    by_right = await _narrowed(caller, survives, by_right)
    sealed = level == RestrictionLevel.SEALED.value
    silent = by_right.reason is Reason.EHR_UNAVAILABLE
    refusal: Reason | None = by_right.reason if silent else None
    if not by_right.allowed and refusal is None:
        refusal = _refusal(principal, relations, sealed, settings)
    if not by_right.allowed and refusal is None:
        emergency = Decision(allowed=True, purpose_of_use=BREAK_THE_GLASS)
        refusal = (await _narrowed(caller, survives, emergency)).reason
    if refusal is not None:
        denied = replace(entry, outcome=Outcome.DENIED, reason=refusal.value, detail=said)
        await caller.gate.trail.record(denied)
        if refusal is Reason.EHR_UNAVAILABLE:
            raise EhrUnavailable(EHR_SILENT)
        raise Forbidden(_REFUSED_BY_EHR if refusal is Reason.EHR else _REFUSED)
    purpose = "" if by_right.allowed else BREAK_THE_GLASS
    granted = await caller.gate.grant(session, replace(entry, purpose_of_use=purpose))
    caller.grants.append(granted)
    if by_right.allowed:
        return None
    await lock(session, [patient_id])  # of many requests at once, one is first
    if {each.id for each in await retired_into(session, patient_id)} != {
        each.id for each in joined
    }:
        # What was decided on, and the alert would be about, is not what it would open.
        raise Conflict(
            "The patient was merged with another, or taken apart from one, at this moment. Nothing "
            "was broken; ask again."
        )
    await _refuse_too_early(session, principal.sub, patient_id, now, sealed=sealed)
    grant = BrokenGlass(
        patient_id=patient_id,
        sub=principal.sub,
        name=principal.name,
        roles=principal.roles_text,
        reason_code=code.value,
        reason_text=text,
        opens_sealed=sealed,
        broken_at=now,
        expires_at=now + timedelta(minutes=settings.break_glass_minutes),
    )
    session.add(grant)
    told = ("id", "patient_id", "sub", "reason_code", "broken_at", "expires_at")
    await Notifications.add(
        session, Event.BREAK_GLASS, {name: getattr(grant, name) for name in told}
    )
    named = {"grant_id": str(grant.id), "expires_at": grant.expires_at.isoformat()}
    await AuditTrail.add(session, replace(granted, outcome=Outcome.DONE, detail=said | named))
    return grant


def _refusal(
    principal: Principal, relations: frozenset[Relation], sealed: bool, settings: Settings
) -> Reason | None:
    """Why a broken glass would open nothing; None: it would."""
    limited = decide(principal, Action.GLASS_BREAK, relations)
    if not limited.allowed:
        return limited.reason
    if sealed and not settings.break_glass_sealed:
        return Reason.RESTRICTED
    return decide(principal, Action.STUDY_VIEW, relations | {Relation.BROKE_GLASS}).reason


async def _narrowed(caller: RoleAccess, patient: Patient, decision: Decision) -> Decision:
    """What the EHR leaves of it."""
    await caller.session.commit()  # only read so far; no connection is held while the EHR is asked
    asked_of = (patient.id, patient.mrn, patient.mrn_issuer)
    purpose = decision.purpose_of_use
    question = Question.of(caller.principal, Action.STUDY_VIEW, *asked_of, purpose)
    return await narrow(caller.gate.ehr, decision, question)


async def _refuse_too_early(
    session: AsyncSession, sub: str, patient_id: UUID, now: datetime, *, sealed: bool
) -> None:
    """Raises Conflict while an earlier grant, that opens what is to be opened, stands for long
    enough."""
    until = await holds_until(session, sub, patient_id, now, sealed=sealed)
    if until is not None and until - now > timedelta(minutes=RENEWABLE_MINUTES):
        raise Conflict(
            "You have broken the glass for this patient already. It can be broken anew in the "
            f"last {RENEWABLE_MINUTES} minutes before that ends.",
            extra={"expires_at": until.isoformat()},
        )


async def _facts(
    caller: RoleAccess, patient_id: UUID, now: datetime
) -> tuple[frozenset[Relation], str | None] | None:
    """The relations that hold, and the level of the patient's restriction; None: no patient."""
    holds = clauses(caller.principal, now)
    connection = await caller.session.connection()
    row = (
        await connection.execute(
            sa.select(
                col(Restriction.level),
                *(clause.label(relation.name) for relation, clause in holds.items()),
            )
            .select_from(Patient)
            .outerjoin(Restriction, col(Restriction.patient_id) == col(Patient.id))
            .where(col(Patient.id) == patient_id)
        )
    ).first()
    if row is None:
        return None
    level, *held = row
    return frozenset(each for each, is_so in zip(holds, held, strict=True) if is_so), level


async def holds_until(
    session: AsyncSession, sub: str, patient_id: UUID, now: datetime, *, sealed: bool = False
) -> datetime | None:
    """Until when what somebody broke for a patient stands, of `sealed` ones what opens those; None
    if nothing does."""
    found = await session.exec(
        select(BrokenGlass.expires_at)
        .where(
            BrokenGlass.patient_id == patient_id,
            BrokenGlass.sub == sub,
            BrokenGlass.expires_at > now,
            sa.true() if not sealed else col(BrokenGlass.opens_sealed),
        )
        .order_by(col(BrokenGlass.expires_at).desc())
        .limit(1)
    )
    return found.first()


async def review(caller: RoleAccess, grant_id: UUID, comment: str) -> BrokenGlass:
    """Mark a grant as reviewed, once. Raises NotFound, Forbidden for one's own, Conflict."""
    session, now = caller.session, utcnow()
    grant = await session.get(BrokenGlass, grant_id)
    if grant is None:
        raise NotFound("There is no such grant.")
    if grant.sub == caller.principal.sub:
        raise Forbidden("You broke this glass yourself; somebody else has to review it.")
    reviewed = await session.exec(
        sa.update(BrokenGlass)
        .where(col(BrokenGlass.id) == grant_id, col(BrokenGlass.reviewed_at).is_(None))
        .values(reviewed_at=now, reviewed_by=caller.principal.sub, review_comment=comment)
        .execution_options(synchronize_session=False)
    )
    if reviewed.rowcount != 1:
        raise Conflict("It has been reviewed already; a review is not changed.")
    await caller.done(
        patient_id=grant.patient_id, detail={"grant_id": str(grant_id), "comment": comment}
    )
    await session.refresh(grant)
    return grant
