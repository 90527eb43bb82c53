""" "Why can't I see this?", for the EHR to show its clinicians."""

from dataclasses import replace
from typing import Annotated
from uuid import UUID

from fastapi import Depends, Request
from pydantic import BaseModel

from app.access import Caller, RoleAccess, Subject
from app.access.gate import entry_of
from app.audit import Action, Outcome
from app.dicom import parse_uid
from app.errors import Unprocessable
from app.routes.studies import StudyUid
from app.routing import AccessRouter
from app.viewer import Viewer, words
from app.viewer.explanation import Check, Explanation, State

router = AccessRouter(prefix="/api/v1/dicom/viewer/why", tags=["viewer"])

Explain = Annotated[
    RoleAccess, Depends(Caller(Action.ACCESS_EXPLAIN, patient_in_body=True), scope="function")
]


class CheckOut(BaseModel):
    """One check; its sentence is empty where it was not made."""

    check: Check
    state: State
    sentence: str


class GlassLink(BaseModel):
    """How the caller may break the glass. `{patient_id}` stands for what only the EHR can say:
    who it is about."""

    method: str = "POST"
    href: str
    sentence: str = words.EMERGENCY


class WhyOut(BaseModel):
    """What stands between the caller and the images: the first check that fails, in words, what to
    do next, and the whole chain."""

    subject: str
    can_open: bool
    failed: Check | None
    sentence: str
    next_step: str
    break_the_glass: GlassLink | None
    checks: list[CheckOut]


@router.get("/order/{order_id}")
async def why_order(access: Explain, order_id: UUID, request: Request) -> WhyOut:
    """Why the images of an order can't be seen, if they can't."""
    return await _why(access, request, Subject.ORDER, order_id)


@router.get("/study/{study_instance_uid}")
async def why_study(access: Explain, study_instance_uid: StudyUid, request: Request) -> WhyOut:
    """Why a study can't be seen, if it can't. One of others, and one that isn't there, are the
    same."""
    try:
        uid = parse_uid(study_instance_uid)
    except ValueError as error:
        raise Unprocessable(f"The study's UID in the path is not valid: {error}") from error
    return await _why(access, request, Subject.STUDY, uid)


@router.get("/patient/{patient_id}")
async def why_patient(access: Explain, patient_id: UUID, request: Request) -> WhyOut:
    """Why a patient's images can't be seen, if they can't."""
    return await _why(access, request, Subject.PATIENT, patient_id)


async def _why(access: RoleAccess, request: Request, subject: Subject, key: UUID | str) -> WhyOut:
    viewer: Viewer = request.app.state.viewer
    said = await viewer.explainer.explain(
        access.session, access.principal, subject, key, asked_as=access.action
    )
    failed = said.failed
    # On record before the answer leaves: whom it was about, and what was said.
    entry = replace(
        entry_of(access.principal, access.action, access.origin),
        outcome=Outcome.GRANTED,
        patient_id=said.patient_id,
        purpose_of_use=said.purpose_of_use,
        detail={
            subject.value: str(key),
            "failed": failed.check.value if failed else "",
        },
    )
    await access.gate.trail.record(entry)
    return WhyOut(
        subject=subject.value.partition("_")[0],
        can_open=said.can_open,
        failed=failed.check if failed else None,
        sentence=failed.sentence if failed else words.NOTHING_IN_THE_WAY,
        next_step=said.next_step if failed else words.OPEN_FROM_EHR,
        break_the_glass=_glass(said, key),
        checks=[
            CheckOut(check=each.check, state=each.state, sentence=each.sentence)
            for each in said.chain
        ],
    )


def _glass(said: Explanation, key: UUID | str) -> GlassLink | None:
    if not said.breakable:
        return None
    patient = str(key) if said.subject is Subject.PATIENT else "{patient_id}"
    return GlassLink(href=f"/api/v1/patients/{patient}/break-glass")
