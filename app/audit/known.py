"""What the ids in audit records stand for, as far as it is still known.

The trail keeps ids and outlives what they name. Whoever shows a record to somebody outside adds
what stands behind them today: a patient who was removed has no name any more, and a study that
now belongs to somebody else says nothing about the patient whose it was.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.orm import aliased
from sqlmodel import col, func, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.models import AuditRecord, Instance, Order, Patient, Study

_AT_ONCE = 500  # values of one IN
_T = TypeVar("_T")
BY_DICOMWEB = '{"access":"dicom-web"'
"""How the detail of a look by DICOMweb with a token begins (`app.access.glance`)."""


@dataclass(frozen=True)
class KnownPatient:
    """`name` as DICOM writes it: `Doe^Jane`."""

    mrn: str
    mrn_issuer: str
    name: str


@dataclass(frozen=True)
class KnownStudy:
    """`sop_classes`: how many instances of each SOPClassUID; empty where nobody asked."""

    patient_id: UUID
    study_date: str
    description: str
    accession_number: str
    sop_classes: Mapping[str, int] = field(default_factory=dict)


@dataclass
class Known:
    """What is known of the patients, studies and orders that some records name.

    `queries`: what was asked by the search that showed a patient, by the id of the record that
    says so. A caller chooses the request id, so that alone names no search.
    """

    patients: dict[UUID, KnownPatient] = field(default_factory=dict)
    studies: dict[str, KnownStudy] = field(default_factory=dict)
    accession_numbers: dict[UUID, str] = field(default_factory=dict)
    queries: dict[int, Mapping[str, Any]] = field(default_factory=dict)

    def patient(self, record: AuditRecord) -> KnownPatient | None:
        return self.patients.get(record.patient_id) if record.patient_id else None

    def study(self, record: AuditRecord, uid: str) -> KnownStudy | None:
        """None too where the study is no longer the record's patient's."""
        found = self.studies.get(uid)
        return found if found and found.patient_id == record.patient_id else None

    def query(self, record: AuditRecord) -> Mapping[str, Any] | None:
        """What a search asked; None where this is no search, or nobody wrote it down."""
        asked = json.loads(record.detail).get("query")
        if isinstance(asked, dict):
            return asked
        return None if record.id is None else self.queries.get(record.id)


def is_link(record: AuditRecord) -> bool:
    """Is it of a viewer link that was made, with which nothing has been seen yet?

    A look in a viewer names its `ctx`, one by DICOMweb with a token says `access`; neither has an
    outcome.
    """
    if record.action != "study:view" or record.outcome == "denied":
        return False
    looked = record.ctx or record.detail.startswith(BY_DICOMWEB)
    return record.outcome != "granted" or not looked


def of_a_link() -> sa.ColumnElement[bool]:
    """`is_link`, as a condition on the trail."""
    return sa.and_(
        col(AuditRecord.action) == "study:view",
        sa.or_(
            col(AuditRecord.outcome).in_(("done", "failed")),
            sa.and_(
                col(AuditRecord.outcome) == "granted",
                col(AuditRecord.ctx) == "",
                sa.not_(col(AuditRecord.detail).startswith(BY_DICOMWEB)),
            ),
        ),
    )


def studies_of(record: AuditRecord) -> list[str]:
    """The StudyInstanceUIDs that a record names, itself or in its `detail`, each once."""
    detail = json.loads(record.detail)
    listed = [*_listed(detail, "studies"), *_listed(detail, "opens")]
    named = [
        str(each.get("study_instance_uid", "")) if isinstance(each, dict) else str(each)
        for each in listed
    ]
    return list(dict.fromkeys(uid for uid in [record.study_instance_uid, *named] if uid))


def _listed(detail: Mapping[str, Any], name: str) -> Sequence[Any]:
    value = detail.get(name)
    return value if isinstance(value, list) else []


async def look_up(
    session: AsyncSession, records: Iterable[AuditRecord], *, count_instances: bool = False
) -> Known:
    """What stands behind the ids of these records now."""
    found = list(records)
    known = Known()
    for ids in _batched({each.patient_id for each in found if each.patient_id}):
        for patient in await session.exec(select(Patient).where(col(Patient.id).in_(ids))):
            name = f"{patient.last_name}^{patient.first_name}"
            known.patients[patient.id] = KnownPatient(patient.mrn, patient.mrn_issuer, name)
    for ids in _batched({each.order_id for each in found if each.order_id}):
        numbers = select(col(Order.id), col(Order.accession_number)).where(col(Order.id).in_(ids))
        known.accession_numbers.update(iter((await session.exec(numbers)).all()))
    for uids in _batched({uid for each in found for uid in studies_of(each)}):
        await _look_up_studies(session, uids, known, count_instances)
    shown = [each.id for each in found if each.id and _was_shown(each)]
    for shown_ids in _batched(shown):
        await _look_up_searches(session, shown_ids, known)
    return known


def _was_shown(record: AuditRecord) -> bool:
    return record.action.endswith(":list") and record.outcome == "done"


async def _look_up_searches(session: AsyncSession, ids: Sequence[int], known: Known) -> None:
    """The grants that these records are what became of: the nearest before each, of the same
    caller under the same request id."""
    shown, grant = aliased(AuditRecord), aliased(AuditRecord)
    nearest = (
        select(func.max(col(grant.id)))
        .where(
            grant.request_id == shown.request_id,
            grant.actor == shown.actor,
            grant.action == shown.action,
            grant.outcome == "granted",
            col(grant.id) < col(shown.id),
        )
        .correlate(shown)
        .scalar_subquery()
    )
    searches = (
        select(col(shown.id), col(AuditRecord.detail))
        .select_from(shown)
        .join(AuditRecord, col(AuditRecord.id) == nearest)
        .where(col(shown.id).in_(ids))
    )
    for record_id, detail in await session.exec(searches):
        asked = json.loads(detail).get("query")
        if record_id is not None and isinstance(asked, dict):
            known.queries[record_id] = asked


async def _look_up_studies(
    session: AsyncSession, uids: Sequence[str], known: Known, count_instances: bool
) -> None:
    counts: dict[str, dict[str, int]] = {}
    if count_instances:
        counting = (
            select(col(Instance.study_instance_uid), col(Instance.sop_class_uid), func.count())
            .where(col(Instance.study_instance_uid).in_(uids))
            .group_by(col(Instance.study_instance_uid), col(Instance.sop_class_uid))
        )
        for uid, sop_class, number in await session.exec(counting):
            counts.setdefault(uid, {})[sop_class] = number
    for study in await session.exec(select(Study).where(col(Study.study_instance_uid).in_(uids))):
        uid = study.study_instance_uid
        known.studies[uid] = KnownStudy(
            study.patient_id,
            study.study_date,
            study.study_description,
            study.accession_number,
            counts.get(uid, {}),
        )


def _batched(values: Iterable[_T]) -> Iterator[list[_T]]:
    left = iter(values)
    while batch := list(islice(left, _AT_ONCE)):
        yield batch
