"""Patients and their care teams: the EHR's side."""

from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime
from typing import Annotated, Any, Literal
from uuid import UUID

import sqlalchemy as sa
from fastapi import BackgroundTasks, Depends, Path, Query, Request, Response
from pydantic import BaseModel, Field, field_validator, model_validator
from sqlmodel import col, select

from app.access import Caller, Grant, PatientAccess, RoleAccess, Subject, Visible, VisiblePatients
from app.aliases import lock, refuse_retired, retired_into, survivor, survivors
from app.audit import Action
from app.db import insert_if_absent, utcnow
from app.dicom import PatientIdentifier, person_name
from app.errors import Conflict, Unprocessable
from app.models import CareTeamMember, LaunchSession, LaunchStudy, Patient, Study
from app.patients.contradictions import contradictions
from app.patients.merging import look_again
from app.routes.paging import Cursor, Limit, link_next, uuid_cursor
from app.routes.times import UtcTime
from app.routing import AccessRouter
from app.viewer import Viewer
from app.viewer.endings import EndedBecause

router = AccessRouter(prefix="/api/v1/patients", tags=["patients"])

CreatePatient = Annotated[RoleAccess, Depends(Caller(Action.PATIENT_CREATE), scope="function")]
ListPatients = Annotated[VisiblePatients, Depends(Visible(Action.PATIENT_LIST), scope="function")]
ReadPatient = Annotated[
    PatientAccess, Depends(Grant(Action.PATIENT_READ, of=Subject.PATIENT), scope="function")
]
ReadCareTeam = Annotated[
    PatientAccess, Depends(Grant(Action.CARE_TEAM_READ, of=Subject.PATIENT), scope="function")
]
WriteCareTeam = Annotated[
    PatientAccess, Depends(Grant(Action.CARE_TEAM_WRITE, of=Subject.PATIENT), scope="function")
]
WritePatient = Annotated[
    PatientAccess, Depends(Grant(Action.PATIENT_WRITE, of=Subject.PATIENT), scope="function")
]
MOST_FORMER = 100  # retired patients with the same mrn; an issuer each
_PERSON = ("last_name", "first_name", "dob")
Sub = Annotated[str, Path(min_length=1, max_length=255, description="`sub` of the person's token.")]


class NewPatient(BaseModel):
    """A patient as the EHR registers them. `mrn` + `mrn_issuer` is PatientID + its issuer."""

    first_name: str = Field(max_length=64)
    last_name: str = Field(min_length=1, max_length=64)
    mrn: str
    mrn_issuer: str = ""
    dob: date
    sex: Literal["", "M", "F", "O"] = ""

    @field_validator("mrn_issuer", "sex", "first_name", mode="before")
    @classmethod
    def _null_is_absent(cls, value: object) -> object:
        return "" if value is None else value

    @field_validator("mrn", "mrn_issuer", mode="after")
    @classmethod
    def _stripped(cls, value: str) -> str:
        return value.strip(" ")

    @model_validator(mode="after")
    def _fit_for_dicom(self) -> "NewPatient":
        PatientIdentifier(self.mrn, self.mrn_issuer)
        _check_person(self.last_name, self.first_name, self.dob)
        return self


def _check_person(last_name: str, first_name: str, dob: date) -> None:
    """Raises ValueError for what DICOM can't say, and for nobody's birth date."""
    person_name(last_name, first_name)
    if not date(1800, 1, 1) <= dob <= datetime.now(UTC).date():
        raise ValueError("dob must be a date in the past, after 1800")


def _refuse_unfit(person: Mapping[str, Any]) -> None:
    try:
        _check_person(*(person[name] for name in _PERSON))
    except ValueError as error:
        raise Unprocessable(f"{error}.") from error


class PatientChange(BaseModel):
    """What may change; what is left out stays. `mrn` and `mrn_issuer` may be sent as they are."""

    first_name: str | None = Field(default=None, max_length=64)
    last_name: str | None = Field(default=None, min_length=1, max_length=64)
    dob: date | None = None
    sex: Literal["", "M", "F", "O"] | None = None
    mrn: str | None = None
    mrn_issuer: str | None = None

    model_config = {"extra": "forbid"}


class Replaced(BaseModel):
    """Somebody who was merged into the patient (FHIR Patient.link `replaces`)."""

    id: UUID
    mrn: str
    mrn_issuer: str


class PatientOut(BaseModel):
    """Asked for by the id of somebody who was merged into another, the answer is the other: their
    own `id`, and `replaces` names who was asked for."""

    id: UUID
    first_name: str
    last_name: str
    mrn: str
    mrn_issuer: str
    dob: date
    sex: str
    created_at: datetime
    replaces: list[Replaced] = []

    @classmethod
    def of(cls, patient: Patient, retired: Sequence[Patient] = ()) -> "PatientOut":
        replaces = [Replaced(**each.model_dump()) for each in retired]
        return cls(**patient.model_dump(), replaces=replaces)


class Contradiction(BaseModel):
    """A study whose files say something else of the patient: for each keyword what the `study`
    says, and the `patient`. `new`: it is this change that made it so."""

    StudyInstanceUID: str
    differences: dict[str, dict[str, str]]
    new: bool


class ChangedPatient(PatientOut):
    """`contradictions` are for people to look at; nothing was unlinked."""

    contradictions: list[Contradiction]
    viewers_ended: int


class NewMember(BaseModel):
    role: str = Field(
        default="",
        max_length=64,
        pattern=r"^[^\x00-\x1f\x7f]*$",
        description="For people to read; no meaning here.",
    )
    expires_at: UtcTime | None = None


class MemberOut(BaseModel):
    patient_id: UUID
    sub: str
    role: str
    expires_at: datetime | None
    added_at: datetime
    added_by: str

    @classmethod
    def of(cls, member: CareTeamMember) -> "MemberOut":
        return cls(**member.model_dump())


@router.post("", status_code=201)
async def create_patient(access: CreatePatient, body: NewPatient, request: Request) -> PatientOut:
    """Register a patient. 409 where the same mrn and issuer exist."""
    issuer = body.mrn_issuer or request.app.state.settings.assigning_authority
    patient = Patient(**{**body.model_dump(), "mrn_issuer": issuer})
    access.session.add(patient)
    try:
        await access.session.flush()
    except sa.exc.IntegrityError as error:
        raise Conflict("A patient with this mrn and mrn_issuer exists already.") from error
    await access.done(patient_id=patient.id)
    return PatientOut.of(patient)


@router.get("")
async def list_patients(
    window: ListPatients,
    request: Request,
    response: Response,
    mrn: Annotated[str, Query(max_length=64)] = "",
    mrn_issuer: Annotated[str, Query(max_length=64)] = "",
    limit: Limit = 50,
    cursor: Cursor = "",
) -> list[PatientOut]:
    """The patients that the caller may see. An unknown mrn and a forbidden one look the same."""
    query = select(Patient).where(col(Patient.merged_into).is_(None))
    named = [col(Patient.mrn) == mrn] if mrn else []
    named += [col(Patient.mrn_issuer) == mrn_issuer] if mrn_issuer else []
    if named:
        # Numbers of those who were merged lead to whose record they are now.
        retired = select(Patient).where(*named, col(Patient.merged_into).is_not(None))
        former = (await window.session.exec(retired.limit(MOST_FORMER))).all()
        found_by = {each.id for each in (await survivors(window.session, former)).values()}
        query = query.where(sa.or_(sa.and_(*named), col(Patient.id).in_(found_by)))
    query = await window.only(query)
    if cursor:
        query = query.where(col(Patient.id) > uuid_cursor(cursor))
    found = (await window.session.exec(query.order_by(col(Patient.id)).limit(limit + 1))).all()
    page = found[:limit]
    link_next(request, response, str(page[-1].id) if len(found) > limit else None)
    await window.disclose(each.id for each in page)
    return [PatientOut.of(each, await retired_into(window.session, each.id)) for each in page]


@router.get("/{patient_id}")
async def read_patient(access: ReadPatient, patient_id: UUID, response: Response) -> PatientOut:
    """One patient. Of one who was merged into another: that one, named in `Content-Location`."""
    if access.patient.id != patient_id:
        response.headers["Content-Location"] = f"/api/v1/patients/{access.patient.id}"
    return PatientOut.of(access.patient, await retired_into(access.session, access.patient.id))


@router.patch("/{patient_id}")
async def change_patient(
    access: WritePatient,
    patient_id: UUID,
    body: PatientChange,
    request: Request,
    after: BackgroundTasks,
) -> ChangedPatient:
    """Correct who a patient is. Studies whose files contradict it are listed, and open viewers of
    those that did not before are ended. 409 for another `mrn`: that is a merge."""
    viewer: Viewer = request.app.state.viewer
    patient, changes = access.patient, body.model_dump(exclude_unset=True)
    for name in ("mrn", "mrn_issuer"):
        if name in changes and changes.pop(name) != getattr(patient, name):
            raise Conflict(
                f"A patient's {name} isn't changed. Register the patient with the right one, and "
                "merge this one into it."
            )
    for name, value in changes.items():
        if value is None:
            raise Unprocessable(f"`{name}` can't be null; leave it out to keep it.")
    before = {name: str(getattr(patient, name)) for name in changes}
    _refuse_unfit({**patient.model_dump(include=set(_PERSON)), **changes})
    studies = (await access.session.exec(select(Study).where(Study.patient_id == patient.id))).all()
    former = {each.study_instance_uid for each in studies if contradictions(patient, each)}
    await viewer.closing.flush()
    for name, value in changes.items():
        setattr(patient, name, value)
    access.session.add(patient)
    await access.session.flush()
    found = [
        Contradiction(
            StudyInstanceUID=each.study_instance_uid,
            differences=differences,
            new=each.study_instance_uid not in former,
        )
        for each in studies
        if (differences := contradictions(patient, each))
    ]
    fresh = [each.StudyInstanceUID for each in found if each.new]
    ended = await _end_viewers_of(access, viewer, fresh)
    await look_again(access.session, patient.id)
    await access.done(
        detail={
            "before": before,
            "after": {name: str(value) for name, value in changes.items()},
            "contradictions": [each.StudyInstanceUID for each in found],
            "viewers_ended": ended,
        }
    )
    after.add_task(request.app.state.worklist.wake)
    return ChangedPatient(
        **PatientOut.of(patient, await retired_into(access.session, patient.id)).model_dump(),
        contradictions=found,
        viewers_ended=ended,
    )


async def _end_viewers_of(access: PatientAccess, viewer: Viewer, uids: list[str]) -> int:
    """End the viewers that may show one of these studies. How many."""
    if not uids:
        return 0
    shown = select(LaunchStudy.ctx).where(col(LaunchStudy.study_instance_uid).in_(uids))
    return await viewer.closing.where(
        access.session,
        col(LaunchSession.ctx).in_(shown),
        EndedBecause.PATIENT_CHANGED,
        access.origin,
        actor=access.principal.sub,
        flushed=True,
    )


@router.get("/{patient_id}/care-team")
async def read_care_team(access: ReadCareTeam, patient_id: UUID) -> list[MemberOut]:
    """Who is on the patient's care team; those whose time has expired are still listed."""
    members = await access.session.exec(
        select(CareTeamMember)
        .where(CareTeamMember.patient_id == access.patient.id)
        .order_by(CareTeamMember.sub)
    )
    return [MemberOut.of(each) for each in members]


@router.put("/{patient_id}/care-team/{sub}")
async def put_care_team_member(
    access: WriteCareTeam, patient_id: UUID, sub: Sub, body: NewMember | None = None
) -> MemberOut:
    """Put somebody on the care team, or change until when. Safe to repeat."""
    given = body or NewMember()
    values = {
        "role": given.role,
        "expires_at": given.expires_at,
        "added_by": access.principal.sub,
    }
    key = {"patient_id": access.patient.id, "sub": sub}
    # Two who put the same person there at once: one inserts, and the other changes.
    await access.session.exec(
        insert_if_absent(access.session, CareTeamMember, **key, **values, added_at=utcnow())
    )
    member = await access.session.get(
        CareTeamMember, (access.patient.id, sub), populate_existing=True
    )
    if member is None:
        raise Conflict("They were taken off at the same moment; ask again.")
    member.sqlmodel_update(values)
    await access.session.flush()
    await access.done(
        detail={
            "sub": sub,
            "role": given.role,
            "expires_at": given.expires_at.isoformat() if given.expires_at else None,
        }
    )
    return MemberOut.of(member)


@router.delete("/{patient_id}/care-team/{sub}", status_code=204)
async def delete_care_team_member(access: WriteCareTeam, patient_id: UUID, sub: Sub) -> None:
    """Take somebody off the care team; their open viewers end at the next request."""
    # Merged at this moment: they are on the survivor's team now, and must not be told gone.
    await lock(access.session, [patient_id])
    refuse_retired(await survivor(access.session, patient_id) or access.patient, patient_id)
    await access.session.exec(
        sa.delete(CareTeamMember).where(
            col(CareTeamMember.patient_id) == access.patient.id, col(CareTeamMember.sub) == sub
        )
    )
    await access.done(detail={"sub": sub, "removed": True})
