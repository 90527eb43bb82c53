"""Why somebody can't see the images of an order, a study or a patient: the checks, in order.

Nobody learns here what their role does not show them anyway. Where nothing ties the caller to the
patient, an order, study or patient that exists, one that doesn't, and one that is restricted all
come out as the same answer, after the same work: one statement.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

import sqlalchemy as sa
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.access import Gate, Reason, Relation, Subject, decide
from app.access.ehr import Question, narrow
from app.access.policy import (
    ANY_PATIENT,
    BREAK_THE_GLASS,
    Decision,
    clauses,
    may_ask,
    sufficing,
)
from app.aliases import surviving
from app.audit import Action
from app.db import utcnow
from app.errors import OrthancUnavailable
from app.identity import Principal
from app.models import (
    Arrival,
    ArrivalCandidate,
    ArrivalState,
    LaunchSession,
    LaunchStudy,
    Order,
    OrderStatus,
    OrderStudy,
    Patient,
    Restriction,
    RestrictionLevel,
    Study,
)
from app.orthanc import Orthanc, promptly
from app.settings import Settings
from app.viewer import words
from app.viewer.closing import Limits
from app.viewer.endings import ENDED_SENTENCES
from app.viewer.explanation import Check, Explanation


@dataclass(frozen=True)
class _Facts:
    """What one statement says of the subject; without a patient: nothing of that name."""

    relations: frozenset[Relation] = frozenset()
    patient_id: UUID | None = None
    mrn: str = ""
    mrn_issuer: str = ""
    level: str | None = None  # of the patient's restriction


class Explainer:
    """Goes through the checks. One per app."""

    def __init__(self, settings: Settings, gate: Gate, orthanc: Orthanc, limits: Limits) -> None:
        self._settings = settings
        self._gate = gate
        self._orthanc = orthanc
        self._limits = limits

    async def explain(
        self,
        session: AsyncSession,
        principal: Principal,
        subject: Subject,
        key: UUID | str,
        *,
        asked_as: Action = Action.STUDY_VIEW,
    ) -> Explanation:
        """The chain for this person and subject, as things stand now.

        `asked_as` is a further action that the caller must have for this patient.
        """
        said = Explanation(subject)
        by_role = may_ask(principal, Action.STUDY_VIEW)
        if not by_role.allowed:
            return said.fails(Check.ROLE, words.NO_ROLE, words.ASK_ADMINISTRATOR)
        said.passed(Check.ROLE, words.ROLE)
        facts = await self._facts(session, principal, subject, key)
        said.patient_id = facts.patient_id
        if not await self._is_let_in(session, said, principal, facts, asked_as):
            return said
        assert facts.patient_id is not None
        studies = await self._images(session, said, facts.patient_id, subject, key)
        if studies is None:
            return said
        await session.commit()  # no connection is held while Orthanc is asked
        if not await self._is_in_archive(said, studies):
            return said
        await self._last_session(session, said, principal, facts.patient_id, subject, key)
        return said

    async def _is_let_in(
        self,
        session: AsyncSession,
        said: Explanation,
        principal: Principal,
        facts: _Facts,
        asked_as: Action,
    ) -> bool:
        """Relationship and restriction, one after the other; the words are the same for whatever
        the caller may not know."""
        sees_all = ANY_PATIENT in sufficing(principal, Action.STUDY_VIEW)
        if facts.patient_id is None and sees_all and principal.patient is None:
            said.fails(Check.RELATIONSHIP, words.UNKNOWN[said.subject], words.CHECK_THE_ID)
            return False
        decision = await self._decision(session, principal, facts, asked_as)
        breaks = may_ask(principal, Action.GLASS_BREAK).allowed
        if decision.reason is Reason.RESTRICTED:
            said.passed(Check.RELATIONSHIP, words.RELATED)
            sealed = facts.level == RestrictionLevel.SEALED.value
            said.breakable = breaks and (not sealed or self._settings.break_glass_sealed)
            said.fails(Check.RESTRICTION, words.RESTRICTED, words.ASK_PRIVACY_OFFICE)
            return False
        if decision.reason in words.OF_THE_EHR:
            denied = decision.reason is Reason.EHR
            said.breakable = breaks and denied and Relation.BROKE_GLASS not in facts.relations
            said.fails(Check.RELATIONSHIP, *words.OF_THE_EHR[decision.reason])
            return False
        if not decision.allowed:
            # A token that is limited to another patient can't be helped by breaking the glass.
            said.breakable = breaks and principal.patient is None
            said.fails(Check.RELATIONSHIP, words.UNRELATED[said.subject], words.ASK_FOR_A_TIE)
            return False
        said.purpose_of_use = decision.purpose_of_use
        broke = decision.purpose_of_use == BREAK_THE_GLASS
        by = words.SEES_ALL if sees_all else words.BROKE if broke else words.RELATED
        said.passed(Check.RELATIONSHIP, by)
        said.passed(Check.RESTRICTION, words.NOT_RESTRICTED)
        return True

    async def _decision(
        self, session: AsyncSession, principal: Principal, facts: _Facts, asked_as: Action
    ) -> Decision:
        """As the gate would decide: the policy, then the EHR where that said yes."""
        limited = decide(principal, asked_as, facts.relations)
        decision = decide(principal, Action.STUDY_VIEW, facts.relations)
        if not limited.allowed:
            decision = limited
        if not decision.allowed or facts.patient_id is None:
            return decision
        await session.commit()  # no connection is held while the EHR is asked
        patient = (facts.patient_id, facts.mrn, facts.mrn_issuer)
        purpose = decision.purpose_of_use
        question = Question.of(principal, Action.STUDY_VIEW, *patient, purpose)
        return await narrow(self._gate.ehr, decision, question)

    async def _facts(
        self, session: AsyncSession, principal: Principal, subject: Subject, key: UUID | str
    ) -> _Facts:
        holds = clauses(principal, utcnow())
        columns = [clause.label(relation.name) for relation, clause in holds.items()]
        patient = (col(Patient.id), col(Patient.mrn), col(Patient.mrn_issuer))
        query = sa.select(*patient, col(Restriction.level), *columns).select_from(Patient)
        if subject is Subject.STUDY:
            query = query.join(Study, col(Study.patient_id) == col(Patient.id))
            query = query.where(col(Study.study_instance_uid) == key)
        elif subject is Subject.ORDER:
            query = query.join(Order, col(Order.patient_id) == col(Patient.id))
            query = query.where(col(Order.id) == key)
        else:
            query = query.where(col(Patient.id) == surviving(UUID(str(key))))
        query = query.outerjoin(Restriction, col(Restriction.patient_id) == col(Patient.id))
        row = (await (await session.connection()).execute(query)).first()
        if row is None:
            return _Facts()
        patient_id, mrn, issuer, level, *held = row
        relations = frozenset(each for each, is_so in zip(holds, held, strict=True) if is_so)
        return _Facts(relations, patient_id, mrn, issuer, level)

    async def _images(
        self,
        session: AsyncSession,
        said: Explanation,
        patient_id: UUID,
        subject: Subject,
        key: UUID | str,
    ) -> Sequence[Study] | None:
        """The studies that would be opened; None where there are none, which is said."""
        order: Order | None = None
        query = select(Study).where(Study.patient_id == patient_id)
        if subject is Subject.STUDY:
            query = query.where(Study.study_instance_uid == key)
        elif subject is Subject.ORDER:
            order = (await session.exec(select(Order).where(Order.id == key))).one()
            if order.status == OrderStatus.CANCELLED:
                said.fails(Check.ORDER, words.CANCELLED, words.OPEN_BY_PATIENT)
                return None
            said.passed(Check.ORDER, words.NOT_CANCELLED)
            linked = select(OrderStudy.study_instance_uid).where(OrderStudy.order_id == key)
            query = query.where(col(Study.study_instance_uid).in_(linked))
        studies = (await session.exec(query)).all()
        if studies:
            said.passed(Check.IMAGES, words.IMAGES)
            return studies
        await self._why_no_images(session, said, patient_id, order)
        return None

    async def _why_no_images(
        self, session: AsyncSession, said: Explanation, patient_id: UUID, order: Order | None
    ) -> Explanation:
        """Not acquired yet, or here and not matched to the order or the patient."""
        waits = await _waits(session, patient_id, order)
        await session.commit()
        if order is not None and not waits:
            try:
                async with promptly():
                    waits = bool(await self._orthanc.owners(order.planned_study_instance_uid))
            except OrthancUnavailable:
                return said.fails(Check.ARCHIVE, words.ARCHIVE_SILENT, words.TRY_AGAIN)
        if waits:
            return said.fails(Check.IMAGES, words.UNMATCHED, words.ASK_TO_MATCH)
        if order is None:
            return said.fails(Check.IMAGES, words.NONE_OF_PATIENT, words.ASK_RADIOLOGY)
        sentence = words.NOT_ACQUIRED.get(order.status, words.NONE_OF_ORDER)
        return said.fails(Check.IMAGES, sentence, words.ASK_RADIOLOGY)

    async def _is_in_archive(self, said: Explanation, studies: Sequence[Study]) -> bool:
        """Does the archive hold each of them, once? What it can't say is said."""
        try:
            async with promptly():
                owners = [
                    (await self._orthanc.owners(each.study_instance_uid), each.orthanc_id)
                    for each in studies
                ]
        except OrthancUnavailable:
            said.fails(Check.ARCHIVE, words.ARCHIVE_SILENT, words.TRY_AGAIN)
            return False
        if any(not found for found, _ in owners):
            said.fails(Check.ARCHIVE, words.NOT_IN_ARCHIVE, words.ASK_PACS)
            return False
        said.passed(Check.ARCHIVE, words.ARCHIVE)
        if any(found != [ours] for found, ours in owners):
            said.fails(Check.ONE_PATIENT, words.TWO_PATIENTS, words.ASK_PACS)
            return False
        said.passed(Check.ONE_PATIENT, words.ONE_PATIENT)
        return True

    async def _last_session(
        self,
        session: AsyncSession,
        said: Explanation,
        principal: Principal,
        patient_id: UUID,
        subject: Subject,
        key: UUID | str,
    ) -> None:
        """What became of the caller's last viewer of this."""
        query = select(LaunchSession).where(
            LaunchSession.actor == principal.sub, LaunchSession.patient_id == patient_id
        )
        if subject is Subject.ORDER:
            query = query.where(LaunchSession.order_id == key)
        elif subject is Subject.STUDY:
            listing = select(LaunchStudy.ctx).where(LaunchStudy.study_instance_uid == key)
            query = query.where(col(LaunchSession.ctx).in_(listing))
        query = query.order_by(col(LaunchSession.created_at).desc()).limit(1)
        last = (await session.exec(query)).first()
        if last is None:
            said.passed(Check.SESSION, words.NO_VIEWER)
            return
        because = self._limits.over(last, utcnow())
        if because is None:
            waits = last.redeemed_at is None
            said.passed(Check.SESSION, words.LINK_WAITS if waits else words.VIEWER_OPEN)
            return
        when = _at(min(last.ended_at or last.expires_at, utcnow()))
        said.fails(Check.SESSION, f"{ENDED_SENTENCES[because]} ({when})", words.OPEN_AGAIN)


async def _waits(session: AsyncSession, patient_id: UUID, order: Order | None) -> bool:
    """Is there a study in the archive that nobody has matched yet, and may be the one?"""
    may_be = select(Arrival.orthanc_id).where(
        col(Arrival.orthanc_id).in_(
            select(ArrivalCandidate.orthanc_id).where(ArrivalCandidate.patient_id == patient_id)
        ),
        sa.or_(*(col(Arrival.state) == each.value for each in _WAITING)),
    )
    if (await session.exec(may_be.limit(1))).first() is not None:
        return True
    if order is None:
        return False
    unlinked = select(Study.study_instance_uid).where(
        Study.patient_id == patient_id,
        ~sa.exists().where(col(OrderStudy.study_instance_uid) == col(Study.study_instance_uid)),
    )
    return (await session.exec(unlinked.limit(1))).first() is not None


_WAITING = (
    *(ArrivalState.ARRIVING, ArrivalState.CONFLICTING, ArrivalState.PROPOSED),
    *(ArrivalState.QUARANTINED, ArrivalState.UNMATCHED),
)


def _at(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"
