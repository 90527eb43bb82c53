"""Patients whom only named people may see: the EHR's side.

A restriction counts from the next request on, in open viewers too: their session ends with the
right. Its reason and its names are for the EHR and the trail, and in no answer to anybody else.
"""

from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

import sqlalchemy as sa
from fastapi import Depends
from pydantic import BaseModel, Field, field_validator
from sqlmodel import col, select

from app.access import Grant, PatientAccess, Subject
from app.aliases import lock, refuse_retired, survivor
from app.audit import Action
from app.db import utcnow
from app.models import NamedPerson, Restriction, RestrictionLevel
from app.routing import AccessRouter

router = AccessRouter(prefix="/api/v1/patients", tags=["patients"])

ReadRestriction = Annotated[
    PatientAccess, Depends(Grant(Action.RESTRICTION_READ, of=Subject.PATIENT), scope="function")
]
WriteRestriction = Annotated[
    PatientAccess, Depends(Grant(Action.RESTRICTION_WRITE, of=Subject.PATIENT), scope="function")
]
Sub = Annotated[str, Field(min_length=1, max_length=255, pattern=r"^[^\x00-\x1f\x7f]+$")]


class NewRestriction(BaseModel):
    """`vip`: only those named, or who breaks the glass. `sealed`: only those named."""

    level: RestrictionLevel
    reason: str = Field(
        default="",
        max_length=500,
        pattern=r"^[^\x00-\x1f\x7f]*$",
        description="For the record; no meaning here.",
    )
    named: list[Sub] = Field(
        default=[], max_length=1000, description="`sub`s of who may see the patient all the same."
    )

    model_config = {"extra": "forbid"}

    @field_validator("reason", mode="before")
    @classmethod
    def _null_is_absent(cls, value: object) -> object:
        return "" if value is None else value

    @field_validator("named", mode="after")
    @classmethod
    def _once_each(cls, value: list[str]) -> list[str]:
        return sorted(set(value))


class RestrictionOut(BaseModel):
    """`level` is null where the patient is not restricted."""

    patient_id: UUID
    level: RestrictionLevel | None = None
    reason: str = ""
    named: list[str] = []
    set_at: datetime | None = None
    set_by: str | None = None

    @property
    def told(self) -> dict[str, Any] | None:
        """What the record keeps of it; None: no restriction."""
        if self.level is None:
            return None
        return {"level": self.level.value, "reason": self.reason, "named": self.named}


@router.get("/{patient_id}/restriction")
async def read_restriction(access: ReadRestriction, patient_id: UUID) -> RestrictionOut:
    """Who may see the patient, if not everybody who is tied to them."""
    return await _restriction(access)


@router.put("/{patient_id}/restriction")
async def put_restriction(
    access: WriteRestriction, patient_id: UUID, body: NewRestriction
) -> RestrictionOut:
    """Restrict the patient, or change how and for whom; `named` replaces who was named before. From
    the next request on, in open viewers too. Safe to repeat."""
    before = await _locked(access)
    await access.session.merge(
        Restriction(
            patient_id=access.patient.id,
            level=body.level.value,
            reason=body.reason,
            set_at=utcnow(),
            set_by=access.principal.sub,
        )
    )
    await _forget_named(access)
    access.session.add_all(
        [NamedPerson(patient_id=access.patient.id, sub=sub) for sub in body.named]
    )
    await access.session.flush()
    after = await _restriction(access)
    await access.done(detail={"before": before.told, "after": after.told})
    return after


@router.delete("/{patient_id}/restriction", status_code=204)
async def delete_restriction(access: WriteRestriction, patient_id: UUID) -> None:
    """Lift the restriction, and forget who was named. Safe to repeat."""
    before = await _locked(access)
    await _forget_named(access)
    await access.session.exec(
        sa.delete(Restriction).where(col(Restriction.patient_id) == access.patient.id)
    )
    await access.done(detail={"before": before.told, "after": None})


async def _locked(access: PatientAccess) -> RestrictionOut:
    """The restriction as it is, which nobody else changes until the end of the transaction: of two
    lists of names written at once one must hold, and not both together."""
    # Merged at this moment: the restriction is the survivor's now.
    await lock(access.session, [access.patient.id])
    current = await survivor(access.session, access.patient.id)
    refuse_retired(current or access.patient, access.patient.id)
    return await _restriction(access)


async def _forget_named(access: PatientAccess) -> None:
    await access.session.exec(
        sa.delete(NamedPerson).where(col(NamedPerson.patient_id) == access.patient.id)
    )


async def _restriction(access: PatientAccess) -> RestrictionOut:
    found = (
        await access.session.exec(
            select(Restriction).where(Restriction.patient_id == access.patient.id)
        )
    ).first()
    if found is None:
        return RestrictionOut(patient_id=access.patient.id)
    named = await access.session.exec(
        select(NamedPerson.sub)
        .where(NamedPerson.patient_id == access.patient.id)
        .order_by(NamedPerson.sub)
    )
    return RestrictionOut(
        patient_id=found.patient_id,
        level=RestrictionLevel(found.level),
        reason=found.reason,
        named=list(named),
        set_at=found.set_at,
        set_by=found.set_by,
    )
