"""A caller as the parameters of a statement: what is asked of everybody is built once."""

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlmodel import col

from app.identity import Principal
from app.models import Patient, UtcDateTime

NOW: sa.ColumnElement[Any] = sa.bindparam("now", type_=UtcDateTime())


@dataclass(frozen=True)
class Named:
    """Whoever a statement's parameters, or columns, name."""

    sub: Any
    site: Any
    patient: sa.ColumnElement[bool] | None = None  # is the row of `Patient` the one in context?


CALLER = Named(
    sa.bindparam("sub", type_=sa.String()),
    sa.bindparam("site", type_=sa.String()),
    sa.or_(
        sa.not_(sa.bindparam("limited", type_=sa.Boolean())),
        col(Patient.id) == sa.bindparam("context_id", type_=sa.Uuid()),
        sa.and_(
            col(Patient.mrn) == sa.bindparam("context_mrn", type_=sa.String()),
            col(Patient.mrn_issuer) == sa.bindparam("context_issuer", type_=sa.String()),
        ),
    ),
)


def caller_values(principal: Principal) -> dict[str, Any]:
    """The values of `CALLER`'s parameters. What is None there equals nothing."""
    context = principal.patient
    return {
        "sub": principal.sub,
        "site": principal.site,
        "limited": context is not None,
        "context_id": context.patient_id if context else None,
        "context_mrn": context.mrn or None if context else None,
        "context_issuer": context.mrn_issuer if context else None,
    }
