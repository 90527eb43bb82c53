"""What is known of a stored file: its study, series, instance, and the orders it answers."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.orm import aliased
from sqlmodel import col, select

from app import journal
from app.access import PatientAccess
from app.db import add_absent, insert_if_absent
from app.dicom import Described, Header, PatientIdentifier
from app.errors import Conflict
from app.intake.identity import Differences
from app.models import Instance, Order, OrderStudy, Patient, Series, Study, folded, new_generation
from app.orderlife import images_changed, orders_of
from app.orthanc import Stored

_AT_ONCE = 200  # values of a statement


def patient_id_of(header: Header) -> str:
    """PatientID (0010,0020) as Orthanc hashes it; empty where the file has none."""
    return header.patient.value if header.patient else ""


@dataclass(frozen=True)
class Numbers:
    """Under which numbers a patient is known. `former` are those of whom were merged into them;
    `ambiguous`: one of all these numbers is also somebody else's, by another issuer."""

    former: list[PatientIdentifier]
    ambiguous: bool


async def numbers(access: PatientAccess) -> Numbers:
    """Of the access's patient, as they are committed."""
    whose = access.patient.id
    connection = await access.session.connection()
    rows = (await connection.execute(_NUMBERS, {"whose": whose})).all()
    former = [PatientIdentifier(row.mrn, row.mrn_issuer) for row in rows if row.id != whose]
    return Numbers(former, any(row.ambiguous for row in rows))


async def former_identifiers(access: PatientAccess) -> list[PatientIdentifier]:
    """Of those who were merged into the access's patient."""
    return (await numbers(access)).former


async def is_ambiguous(access: PatientAccess) -> bool:
    """Is one of the patient's numbers also somebody else's, by another issuer?"""
    return (await numbers(access)).ambiguous


def _numbers() -> sa.Select[Any]:
    """A row for the patient and for each who was merged into them, or into one of those."""
    columns = (col(Patient.id), col(Patient.mrn), col(Patient.mrn_issuer))
    same = (
        sa.select(*columns)
        .where(col(Patient.id) == sa.bindparam("whose", type_=sa.Uuid()))
        .cte("same", recursive=True)
    )
    retired = aliased(Patient)
    same = same.union_all(
        sa.select(col(retired.id), col(retired.mrn), col(retired.mrn_issuer)).join(
            same, col(retired.merged_into) == same.c.id
        )
    )
    other = aliased(Patient)
    others = sa.select(sa.literal(1)).where(
        col(other.mrn).in_(sa.select(same.c.mrn)),
        col(other.id).not_in(sa.select(same.c.id)),
    )
    return sa.select(*same.c, others.exists().label("ambiguous"))


_NUMBERS = _numbers()


async def refuse_taken_uids(access: PatientAccess, header: Header, digest: str) -> bool:
    """One owner a UID, as far as our own tables know. Is this very file linked already?

    Raises Conflict.
    """
    return (await uids(access, header)).refuse_taken(access, header, digest)


@dataclass(frozen=True)
class Uids:
    """What our own tables know of a file's UIDs; None: nothing."""

    study_patient_id: UUID | None
    planned_patient_id: UUID | None
    planned_order_id: UUID | None
    """Of the order that the StudyInstanceUID was planned for."""
    series_study_uid: str | None
    instance_study_uid: str | None
    instance_series_uid: str | None
    instance_sha256: str | None

    def refuse_taken(self, access: PatientAccess, header: Header, digest: str) -> bool:
        """One owner a UID. Is this very file linked already? Raises Conflict."""
        uid, ours = header.study_instance_uid, access.patient.id
        if (
            self.study_patient_id not in (None, ours)
            or self.planned_patient_id not in (None, ours)
            or self.series_study_uid not in (None, uid)
        ):
            # Never say whose: that is another patient's data.
            raise Conflict(
                "The file's StudyInstanceUID or SeriesInstanceUID already belongs to another "
                "patient or study. Nothing was stored. If the images really are this patient's, "
                "they need new UIDs."
            )
        known = (self.instance_study_uid, self.instance_series_uid, self.instance_sha256)
        if known == (None, None, None):
            return False
        if known != (uid, header.series_instance_uid, digest):
            raise Conflict(
                "The file's SOPInstanceUID is already stored with other content. Nothing was "
                "stored. A changed image needs a SOPInstanceUID of its own (PS3.3 C.12.1.1)."
            )
        return True

    def planned_for_another_order(self, access: PatientAccess) -> bool:
        """Was the study planned for another order of the patient than the one named?"""
        return (
            access.order is not None
            and self.planned_patient_id == access.patient.id
            and self.planned_order_id != access.order.id
        )


async def uids(access: PatientAccess, header: Header) -> Uids:
    """What is known of a file's UIDs now: one query."""
    values = {
        "study": header.study_instance_uid,
        "series": header.series_instance_uid,
        "sop": header.sop_instance_uid,
    }
    connection = await access.session.connection()
    return Uids(*(await connection.execute(_UIDS, values)).one())


def _uids() -> sa.Select[Any]:
    tables: sa.FromClause = sa.select(sa.literal(1).label("one")).subquery("asked")
    models: list[tuple[Any, Any, str]] = [
        (Study, Study.study_instance_uid, "study"),
        (Order, Order.planned_study_instance_uid, "study"),
        (Series, Series.series_instance_uid, "series"),
        (Instance, Instance.sop_instance_uid, "sop"),
    ]
    for model, uid, name in models:
        named = col(uid) == sa.bindparam(name, type_=sa.String())
        tables = tables.outerjoin(model.__table__, named)
    columns: list[Any] = [
        *(Study.patient_id, Order.patient_id, Order.id, Series.study_instance_uid),
        *(Instance.study_instance_uid, Instance.series_instance_uid, Instance.received_sha256),
    ]
    return sa.select(*columns).select_from(tables)


_UIDS = _uids()


@dataclass(frozen=True)
class Kept:
    """A file that Orthanc has, and what was read of it. `sha256` of the file as it came."""

    header: Header
    stored: Stored
    sha256: str
    described: Described


@dataclass(frozen=True)
class Link:
    """A file that is to be linked; `coerced` is what was rewritten in it."""

    access: PatientAccess
    file: Kept
    coerced: Differences


async def link(links: Sequence[Link]) -> None:
    """Write study, series, instances, links and records of files of one study, which are linked
    for the same patient, order and caller, in one transaction. Raises Conflict if another was
    faster."""
    access, uid = links[0].access, links[0].file.header.study_instance_uid
    await keep(access, [each.file for each in links])
    await answer_order(access, uid)
    # It may have been linked to other orders before.
    moved = await images_changed(
        access.session, await orders_of(access.session, uid), complete=False
    )
    status = {str(each.order_id): each.told for each in moved}
    for each in links:
        detail: dict[str, Any] = {
            "sop_instance_uid": each.file.header.sop_instance_uid,
            "received_sha256": each.file.sha256,
            "duplicate": not each.file.stored.new,
        }
        if each.coerced and each.file.stored.new:
            detail["coerced"] = each.coerced
        if status:
            detail["order_status"] = status
            status = {}
        await each.access.done(study_instance_uid=uid, detail=detail)


async def answer_order(access: PatientAccess, study_instance_uid: str) -> None:
    """Link the study to the order that the access names, if it names one. Raises Conflict where
    both are not the access's patient's."""
    if access.order is None:
        return
    both = (
        select(Order.id)
        .join(Study, col(Study.patient_id) == col(Order.patient_id))
        .where(
            Order.id == access.order.id,
            Order.patient_id == access.patient.id,
            Study.study_instance_uid == study_instance_uid,
        )
    )
    if (await access.session.exec(both)).first() is None:
        raise Conflict("The study and the order are not of the same patient. Nothing was linked.")
    await access.session.exec(
        insert_if_absent(
            access.session,
            OrderStudy,
            order_id=access.order.id,
            study_instance_uid=study_instance_uid,
            linked_by=access.principal.sub,
        )
    )


async def keep(access: PatientAccess, files: Sequence[Kept]) -> None:
    """Write study, series and instances of one study's files. Many go into few statements: nobody
    else writes to SQLite meanwhile. Raises Conflict if another was faster."""
    session = access.session
    for each in sorted({file.stored.instance_id for file in files}):
        await journal.hold(session, each)
    studies = {file.header.study_instance_uid: file for file in files}
    series = {file.header.series_instance_uid: file for file in files}
    await add_absent(session, Study, [_study(access, each) for each in studies.values()])
    await add_absent(session, Series, [_series(each) for each in series.values()])
    await add_absent(session, Instance, [_instance(access, each) for each in files])
    if not await _are_ours(access, files):
        raise Conflict(
            "The same UIDs were stored with other content, or for another patient or study, "
            "at the same moment. Nothing was kept of this."
        )


async def _are_ours(access: PatientAccess, files: Sequence[Kept]) -> bool:
    """Do the rows that are there now say of each file what it is?"""
    connection = await access.session.connection()
    named = sorted({file.header.sop_instance_uid for file in files})
    found: dict[str, tuple[Any, ...]] = {}
    for start in range(0, len(named), _AT_ONCE):
        rows = await connection.execute(_ROWS, {"sops": named[start : start + _AT_ONCE]})
        found.update({row[0]: tuple(row[1:]) for row in rows})
    return all(
        found.get(file.header.sop_instance_uid)
        == (
            access.patient.id,
            file.header.study_instance_uid,
            file.header.study_instance_uid,
            file.header.series_instance_uid,
            file.stored.instance_id,
            file.sha256,
        )
        for file in files
    )


_COLUMNS: list[Any] = [
    *(Instance.sop_instance_uid, Study.patient_id, Instance.study_instance_uid),
    *(Series.study_instance_uid, Instance.series_instance_uid),
    *(Instance.orthanc_id, Instance.received_sha256),
]
_ROWS = (
    sa.select(*_COLUMNS)
    .join(Study, col(Study.study_instance_uid) == col(Instance.study_instance_uid))
    .join(Series, col(Series.series_instance_uid) == col(Instance.series_instance_uid))
    .where(col(Instance.sop_instance_uid).in_(sa.bindparam("sops", expanding=True)))
)


def _study(access: PatientAccess, file: Kept) -> dict[str, Any]:
    header, described = file.header, file.described
    return {
        "study_instance_uid": header.study_instance_uid,
        "patient_id": access.patient.id,
        "orthanc_id": file.stored.study_id,
        "dicom_patient_id": patient_id_of(header),
        "patient_name": header.patient_name,
        "patient_birth_date": header.patient_birth_date,
        "patient_sex": header.patient_sex,
        "study_date": header.study_date,
        "study_time": header.study_time,
        "study_description": header.study_description,
        "accession_number": header.accession_number,
        "folded_name": folded(header.patient_name),
        "folded_description": folded(header.study_description),
        "folded_referring_physician": folded(described.referring_physician),
        "study_id": described.study_id,
        "attributes": _json(described.study),
        "generation": new_generation(),
    }


def _series(file: Kept) -> dict[str, Any]:
    header = file.header
    return {
        "series_instance_uid": header.series_instance_uid,
        "study_instance_uid": header.study_instance_uid,
        "modality": header.modality,
        "series_number": header.series_number,
        "series_description": header.series_description,
        "attributes": _json(file.described.series),
    }


def _instance(access: PatientAccess, file: Kept) -> dict[str, Any]:
    header, described = file.header, file.described
    return {
        "sop_instance_uid": header.sop_instance_uid,
        "series_instance_uid": header.series_instance_uid,
        "study_instance_uid": header.study_instance_uid,
        "orthanc_id": file.stored.instance_id,
        "sop_class_uid": header.sop_class_uid,
        "transfer_syntax_uid": header.transfer_syntax_uid,
        "number_of_frames": header.number_of_frames,
        "instance_number": header.instance_number,
        "rows": described.rows,
        "columns": described.columns,
        "attributes": _json(described.instance),
        "received_sha256": file.sha256,
        "received_by": access.principal.sub,
    }


def _json(attributes: dict[str, Any]) -> str:
    return json.dumps(attributes, separators=(",", ":"), ensure_ascii=False)
