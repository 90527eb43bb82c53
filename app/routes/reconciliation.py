"""The reconciliation worklist: studies that wait for somebody to say whose they are."""

from datetime import datetime
from functools import partial
from typing import Annotated, Literal, Self
from uuid import UUID

from fastapi import BackgroundTasks, Depends, Path, Query, Request, Response
from pydantic import BaseModel, Field, model_validator

from app.access import Caller, RoleAccess, Subject, Visible, VisiblePatients
from app.arrivals import Follower, waiting
from app.arrivals.reconciliation import Decided
from app.arrivals.sight import LISTED
from app.arrivals.waiting import Shown, Waiting, Wanted
from app.audit import Action
from app.errors import Unprocessable
from app.models import ArrivalState
from app.routes.paging import Cursor, Limit, link_next, read_cursor
from app.routing import AccessRouter
from app.viewer import Viewer
from app.viewer.endings import EndedBecause

router = AccessRouter(prefix="/api/v1/reconciliation", tags=["reconciliation"])

ListArrivals = Annotated[VisiblePatients, Depends(Visible(Action.ARRIVAL_LIST), scope="function")]
LinkStudy = Annotated[
    RoleAccess, Depends(Caller(Action.STUDY_LINK, patient_in_body=True), scope="function")
]
StudyUid = Annotated[str, Path(alias="study_instance_uid", description="StudyInstanceUID")]
Reason = Annotated[str, Field(min_length=3, max_length=500, pattern=r"^[^\x00-\x1f\x7f]*$")]
Version = Annotated[int, Field(ge=1, description="The `version` that was seen.")]


class Finding(BaseModel):
    code: str
    words: str


class CandidateOut(BaseModel):
    """A patient, and mostly one of their orders, that the study may belong to."""

    patient_id: UUID
    order_id: UUID | None
    score: int
    mrn: str
    mrn_issuer: str
    name: str
    dob: str
    sex: str
    accession_number: str
    order_description: str
    scheduled_at: datetime | None
    speaks_for: list[Finding]
    speaks_against: list[Finding]

    @classmethod
    def of(cls, shown: Shown) -> "CandidateOut":
        patient, order = shown.patient, shown.order
        return cls(
            patient_id=patient.id,
            order_id=order.id if order else None,
            score=shown.score,
            mrn=patient.mrn,
            mrn_issuer=patient.mrn_issuer,
            name=f"{patient.last_name}, {patient.first_name}".rstrip(", "),
            dob=patient.dob.isoformat(),
            sex=patient.sex,
            accession_number=order.accession_number if order else "",
            order_description=order.description if order else "",
            scheduled_at=order.scheduled_at if order else None,
            speaks_for=[Finding(**each) for each in shown.speaks_for],
            speaks_against=[Finding(**each) for each in shown.speaks_against],
        )


class WaitingOut(BaseModel):
    """A study in the archive that is linked to nobody, as its files say, and why it waits."""

    StudyInstanceUID: str
    PatientID: str
    PatientName: str
    PatientBirthDate: str
    PatientSex: str
    AccessionNumber: str
    StudyDate: str
    StudyTime: str
    StudyDescription: str
    ModalitiesInStudy: list[str]
    NumberOfStudyRelatedSeries: int
    NumberOfStudyRelatedInstances: int
    state: ArrivalState
    version: int
    reasons: list[Finding]
    candidates: list[CandidateOut]
    decided_by: str
    decided_at: datetime | None
    decision: str
    arrived_at: datetime
    changed_at: datetime

    @classmethod
    def of(cls, found: Waiting) -> "WaitingOut":
        row = found.row
        return cls(
            StudyInstanceUID=row.study_instance_uid,
            PatientID=row.dicom_patient_id,
            PatientName=row.patient_name,
            PatientBirthDate=row.patient_birth_date,
            PatientSex=row.patient_sex,
            AccessionNumber=row.accession_number,
            StudyDate=row.study_date,
            StudyTime=row.study_time,
            StudyDescription=row.study_description,
            ModalitiesInStudy=[each for each in row.modalities.split("\\") if each],
            NumberOfStudyRelatedSeries=row.series_count,
            NumberOfStudyRelatedInstances=row.instance_count,
            state=ArrivalState(row.state),
            version=row.version,
            reasons=[Finding(**each) for each in found.reasons],
            candidates=[CandidateOut.of(each) for each in found.candidates],
            decided_by=row.decided_by,
            decided_at=row.decided_at,
            decision=row.decision,
            arrived_at=row.arrived_at,
            changed_at=row.changed_at,
        )


class Confirmation(BaseModel):
    """Whose it is: exactly one of `order_id` and `patient_id`."""

    order_id: UUID | None = None
    patient_id: UUID | None = None
    version: Version
    reason: str = Field(default="", max_length=500, pattern=r"^[^\x00-\x1f\x7f]*$")
    coerce: bool = Field(
        default=False, description="Give a copy the patient's identifiers where PatientIDs differ."
    )
    model_config = {"extra": "forbid"}

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.order_id is None) == (self.patient_id is None):
            raise ValueError("name exactly one of order_id and patient_id")
        return self


class Said(BaseModel):
    """Why, by the version that was seen."""

    reason: Reason
    version: Version
    model_config = {"extra": "forbid"}

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if len(self.reason.strip()) < 3:
            raise ValueError("reason must say why")
        return self


class DecidedOut(BaseModel):
    """`study_instance_uid` is that of the copy where tags were coerced."""

    status: Literal["confirmed", "rejected", "undone"]
    study_instance_uid: str
    viewers_ended: int
    warnings: list[str]


def _out(status: Literal["confirmed", "rejected", "undone"], decided: Decided) -> DecidedOut:
    return DecidedOut(
        status=status,
        study_instance_uid=decided.study_instance_uid,
        viewers_ended=decided.viewers_ended,
        warnings=list(decided.warnings),
    )


Sort = Literal[
    "arrived_at", "-arrived_at", "study_date", "-study_date", "name", "-name", "state", "-state"
]


@router.get("")
async def list_waiting(
    window: ListArrivals,
    request: Request,
    response: Response,
    state: Annotated[ArrivalState | None, Query(description="One of those that wait.")] = None,
    sort: Annotated[Sort, Query(description="With `-`: the other way round.")] = "arrived_at",
    limit: Limit = 50,
    cursor: Cursor = "",
) -> list[WaitingOut]:
    """The studies that wait, unless all whose they may be are patients of others."""
    if state is not None and state not in LISTED:
        raise Unprocessable(f"`state` is one of {', '.join(sorted(LISTED))} here.")
    wanted = Wanted((state,) if state else (), sort, read_cursor(cursor), limit)
    page, last = await waiting.find(window, wanted)
    link_next(request, response, last)
    return [WaitingOut.of(each) for each in page]


@router.get("/{study_instance_uid}")
async def read_waiting(caller: LinkStudy, study_instance_uid: StudyUid) -> WaitingOut:
    """One study, for who may decide about it: it waits, was rejected, or is linked."""
    return WaitingOut.of(await waiting.one(caller, study_instance_uid))


@router.post("/{study_instance_uid}/confirm")
async def confirm_study(
    caller: LinkStudy,
    study_instance_uid: StudyUid,
    body: Confirmation,
    request: Request,
    after: BackgroundTasks,
) -> DecidedOut:
    """Link a waiting study to an order or a patient. 409 where somebody was faster, a file does not
    pass the checks, or the PatientIDs differ and `coerce` is not set."""
    follower: Follower = request.app.state.follower
    named = body.order_id or body.patient_id
    assert named is not None
    decided = await follower.reconciliation.confirm(
        caller,
        study_instance_uid,
        body.version,
        Subject.ORDER if body.order_id else Subject.PATIENT,
        named,
        reason=body.reason.strip(),
        coerce=body.coerce,
    )
    after.add_task(request.app.state.worklist.wake)
    return _out("confirmed", decided)


@router.post("/{study_instance_uid}/reject")
async def reject_study(
    caller: LinkStudy, study_instance_uid: StudyUid, body: Said, request: Request
) -> DecidedOut:
    """Say that a waiting study belongs to nobody here; it can still be confirmed later."""
    follower: Follower = request.app.state.follower
    decided = await follower.reconciliation.reject(
        caller, study_instance_uid, body.version, body.reason.strip()
    )
    return _out("rejected", decided)


@router.post("/{study_instance_uid}/undo")
async def undo_link(
    caller: LinkStudy,
    study_instance_uid: StudyUid,
    body: Said,
    request: Request,
    after: BackgroundTasks,
) -> DecidedOut:
    """Unlink a study: its orders lose it, open viewers of it end, and it waits again."""
    follower: Follower = request.app.state.follower
    viewer: Viewer = request.app.state.viewer
    end_viewers = partial(viewer.end_study_sessions, because=EndedBecause.STUDY_MOVED)
    decided = await follower.reconciliation.undo(
        caller, study_instance_uid, body.version, body.reason.strip(), end_viewers
    )
    after.add_task(request.app.state.worklist.wake)
    return _out("undone", decided)
