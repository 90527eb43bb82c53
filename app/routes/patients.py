"""Patients and their care teams: the EHR's side."""

from datetime import UTC, date, datetime
from typing import Annotated, Literal
from uuid import UUID

import sqlalchemy as sa
from fastapi import Depends, Path, Query, Request, Response
from pydantic import BaseModel, Field, field_validator, model_validator
from sqlmodel import col, select

from app.access import Caller, Grant, PatientAccess, RoleAccess, Subject, Visible, VisiblePatients
from app.audit import Action
from app.dicom import PatientIdentifier, person_name
from app.errors import Conflict
from app.models import CareTeamMember, Patient
from app.routes.paging import Cursor, Limit, link_next, uuid_cursor
from app.routes.times import UtcTime
from app.routing import AccessRouter

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
        person_name(self.last_name, self.first_name)
        if not date(1800, 1, 1) <= self.dob <= datetime.now(UTC).date():
            raise ValueError("dob must be a date in the past, after 1800")
        return self


class PatientOut(BaseModel):
    id: UUID
    first_name: str
    last_name: str
    mrn: str
    mrn_issuer: str
    dob: date
    sex: str
    created_at: datetime

    @classmethod
    def of(cls, patient: Patient) -> "PatientOut":
        return cls(**patient.model_dump())


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
    query = select(Patient).where(window.condition)
    if mrn:
        query = query.where(Patient.mrn == mrn)
    if mrn_issuer:
        query = query.where(Patient.mrn_issuer == mrn_issuer)
    if cursor:
        query = query.where(col(Patient.id) > uuid_cursor(cursor))
    found = (await window.session.exec(query.order_by(col(Patient.id)).limit(limit + 1))).all()
    page = found[:limit]
    link_next(request, response, str(page[-1].id) if len(found) > limit else None)
    await window.disclose(each.id for each in page)
    return [PatientOut.of(each) for each in page]


@router.get("/{patient_id}")
async def read_patient(access: ReadPatient, patient_id: UUID) -> PatientOut:
    """One patient."""
    return PatientOut.of(access.patient)


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
    member = await access.session.merge(
        CareTeamMember(
            patient_id=access.patient.id,
            sub=sub,
            role=given.role,
            expires_at=given.expires_at,
            added_by=access.principal.sub,
        )
    )
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
    await access.session.exec(
        sa.delete(CareTeamMember).where(
            col(CareTeamMember.patient_id) == access.patient.id, col(CareTeamMember.sub) == sub
        )
    )
    await access.done(detail={"sub": sub, "removed": True})
