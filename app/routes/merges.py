"""Two records of one patient: joined, and taken apart again. The EHR's side."""

from datetime import datetime
from typing import Annotated
from uuid import UUID

import sqlalchemy as sa
from fastapi import BackgroundTasks, Depends, Request
from pydantic import BaseModel, Field, StringConstraints
from sqlmodel import col

from app.access import Caller, RoleAccess, Subject
from app.audit import Action
from app.models import LaunchSession, RestrictionLevel
from app.patients import merging
from app.patients.merging import Decisions
from app.routing import AccessRouter
from app.viewer import Viewer
from app.viewer.endings import EndedBecause
from app.viewer.glances import strayed

router = AccessRouter(prefix="/api/v1/patients", tags=["patients"])

MergePatients = Annotated[
    RoleAccess, Depends(Caller(Action.PATIENT_MERGE, patient_in_body=True), scope="function")
]
Why = Annotated[
    str,
    StringConstraints(
        strip_whitespace=True, min_length=3, max_length=500, pattern=r"^[^\x00-\x1f\x7f]*$"
    ),
]


class NewMerge(BaseModel):
    """Who survives, and why; the patient of the path is retired."""

    into: UUID = Field(description="The patient who survives.")
    reason: Why = Field(description="For the record.")

    model_config = {"extra": "forbid"}


class OtherNumber(BaseModel):
    """A study whose files carry another PatientID than their patient's."""

    StudyInstanceUID: str
    PatientID: str


class MergedOut(BaseModel):
    """`moved` counts what is the survivor's now. `under_other_number` are all studies of the
    survivor whose files carry another PatientID, which a viewer shows."""

    merge_id: UUID
    patient_id: UUID
    merged_into: UUID
    reason: str
    merged_at: datetime
    merged_by: str
    moved: dict[str, int]
    restriction: RestrictionLevel | None
    under_other_number: list[OtherNumber]
    warnings: list[str]


class WrongLink(BaseModel):
    order_id: UUID
    study_instance_uid: str = Field(max_length=64)


class NewUnmerge(BaseModel):
    """Why; and, where the answer before was 409, whose each is: true for the retired patient's."""

    reason: Why = Field(description="For the record.")
    orders: dict[UUID, bool] = Field(
        default={}, max_length=1000, description="Of orders placed since: is it the retired one's?"
    )
    studies: dict[str, bool] = Field(
        default={}, max_length=1000, description="Of studies that came since, as `orders`."
    )
    unlink: list[WrongLink] = Field(
        default=[], max_length=1000, description="Links between the two records, to be cut."
    )

    model_config = {"extra": "forbid"}


class UnmergedOut(BaseModel):
    merge_id: UUID
    patient_id: UUID
    merged_into: UUID
    reason: str
    unmerged_at: datetime | None
    viewers_ended: int


@router.post("/{patient_id}/merge")
async def merge_patient(
    caller: MergePatients,
    patient_id: UUID,
    body: NewMerge,
    request: Request,
    after: BackgroundTasks,
) -> MergedOut:
    """Retire the patient into another, who has all of their record from then on. 409, with the
    survivor, where either was merged already; 422 for a patient and themselves."""
    source = await caller.admit(Subject.PATIENT, patient_id)
    target = await caller.admit(Subject.PATIENT, body.into)
    done = await merging.merge(source, target, patient_id, body.into, body.reason)
    after.add_task(request.app.state.worklist.wake)
    warnings = []
    if done.under_other_number:
        warnings.append(
            f"{len(done.under_other_number)} studies keep the PatientID that they came with; a "
            "viewer shows it, and it is not the survivor's mrn."
        )
    return MergedOut(
        merge_id=done.merge.id,
        patient_id=patient_id,
        merged_into=body.into,
        reason=done.merge.reason,
        merged_at=done.merge.merged_at,
        merged_by=done.merge.merged_by,
        moved=done.moved,
        restriction=RestrictionLevel(done.restriction) if done.restriction else None,
        under_other_number=[
            OtherNumber(StudyInstanceUID=uid, PatientID=number)
            for uid, number in done.under_other_number
        ],
        warnings=warnings,
    )


@router.post("/{patient_id}/unmerge")
async def unmerge_patient(
    caller: MergePatients,
    patient_id: UUID,
    body: NewUnmerge,
    request: Request,
    after: BackgroundTasks,
) -> UnmergedOut:
    """Take the retired patient's record out of the survivor's again. 409 where they are not
    merged, the survivor was merged in turn, or something has to be decided: `undecided`."""
    viewer: Viewer = request.app.state.viewer
    access = await caller.admit(Subject.PATIENT, patient_id)
    await viewer.closing.flush()
    decisions = Decisions(
        orders=body.orders,
        studies=body.studies,
        unlink=frozenset((each.order_id, each.study_instance_uid) for each in body.unlink),
    )
    done = await merging.unmerge(access, patient_id, body.reason, decisions)
    either = col(LaunchSession.patient_id).in_((done.patient_id, done.into_id))
    ended = await viewer.closing.where(
        access.session,
        sa.and_(either, strayed()),
        EndedBecause.STUDY_MOVED,
        access.origin,
        actor=access.principal.sub,
        flushed=True,
    )
    after.add_task(request.app.state.worklist.wake)
    return UnmergedOut(
        merge_id=done.id,
        patient_id=done.patient_id,
        merged_into=done.into_id,
        reason=done.unmerge_reason,
        unmerged_at=done.unmerged_at,
        viewers_ended=ended,
    )
