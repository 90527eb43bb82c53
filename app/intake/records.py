"""What is known of a stored file: its study, series, instance, and the orders it answers."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlmodel import col, select

from app import journal
from app.access import PatientAccess
from app.aliases import retired_into
from app.db import insert_if_absent
from app.dicom import Described, Header, PatientIdentifier
from app.errors import Conflict
from app.intake.identity import Differences
from app.models import Instance, Order, OrderStudy, Patient, Series, Study, folded, new_generation
from app.orderlife import images_changed, orders_of
from app.orthanc import Stored

_AT_ONCE = 200  # rows of a statement


def patient_id_of(header: Header) -> str:
    """PatientID (0010,0020) as Orthanc hashes it; empty where the file has none."""
    return header.patient.value if header.patient else ""


async def former_identifiers(access: PatientAccess) -> list[PatientIdentifier]:
    """Of those who were merged into the access's patient."""
    retired = await retired_into(access.session, access.patient.id)
    return [PatientIdentifier(each.mrn, each.mrn_issuer) for each in retired]


async def is_ambiguous(access: PatientAccess) -> bool:
    """Is one of the patient's numbers also somebody else's, by another issuer?"""
    patient = access.patient
    same = [patient, *await retired_into(access.session, patient.id)]
    others = select(Patient.id).where(
        col(Patient.mrn).in_([each.mrn for each in same]),
        col(Patient.id).not_in([each.id for each in same]),
    )
    return (await access.session.exec(others.limit(1))).first() is not None


async def planned_for_another_order(access: PatientAccess, study_instance_uid: str) -> bool:
    """Was the study planned for another order of the patient than the one named?"""
    planned = select(Order).where(
        Order.planned_study_instance_uid == study_instance_uid,
        Order.patient_id == access.patient.id,
    )
    order = (await access.session.exec(planned)).first()
    return order is not None and access.order is not None and order.id != access.order.id


async def refuse_taken_uids(access: PatientAccess, header: Header, digest: str) -> bool:
    """One owner a UID, as far as our own tables know. Is this very file linked already?

    Raises Conflict.
    """
    session, patient = access.session, access.patient
    uid = header.study_instance_uid
    study = await session.get(Study, uid)
    planned = (
        await session.exec(select(Order).where(Order.planned_study_instance_uid == uid))
    ).first()
    series = await session.get(Series, header.series_instance_uid)
    if (
        (study is not None and study.patient_id != patient.id)
        or (planned is not None and planned.patient_id != patient.id)
        or (series is not None and series.study_instance_uid != uid)
    ):
        # Never say whose: that is another patient's data.
        raise Conflict(
            "The file's StudyInstanceUID or SeriesInstanceUID already belongs to another "
            "patient or study. Nothing was stored. If the images really are this patient's, "
            "they need new UIDs."
        )
    instance = await session.get(Instance, header.sop_instance_uid)
    if instance is not None and (
        instance.study_instance_uid != uid
        or instance.series_instance_uid != header.series_instance_uid
        or instance.received_sha256 != digest
    ):
        raise Conflict(
            "The file's SOPInstanceUID is already stored with other content. Nothing was "
            "stored. A changed image needs a SOPInstanceUID of its own (PS3.3 C.12.1.1)."
        )
    return instance is not None


async def link(
    access: PatientAccess,
    header: Header,
    stored: Stored,
    digest: str,
    differences: Differences,
    described: Described,
) -> None:
    """Write study, series, instance, link and record. Raises Conflict if another was faster."""
    uid = header.study_instance_uid
    await keep(access, [Kept(header, stored, digest, described)])
    await answer_order(access, uid)
    # It may have been linked to other orders before.
    moved = await images_changed(
        access.session, await orders_of(access.session, uid), complete=False
    )
    detail: dict[str, Any] = {
        "sop_instance_uid": header.sop_instance_uid,
        "received_sha256": digest,
        "duplicate": not stored.new,
    }
    if differences and stored.new:
        detail["coerced"] = differences
    if moved:
        detail["order_status"] = {str(each.order_id): each.told for each in moved}
    await access.done(study_instance_uid=uid, detail=detail)


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


@dataclass(frozen=True)
class Kept:
    """A file that Orthanc has, and what was read of it. `sha256` of the file as it came."""

    header: Header
    stored: Stored
    sha256: str
    described: Described


async def keep(access: PatientAccess, files: Sequence[Kept]) -> None:
    """Write study, series and instances of one study's files. Many go into few statements: nobody
    else writes to SQLite meanwhile. Raises Conflict if another was faster."""
    session = access.session
    for each in sorted({file.stored.instance_id for file in files}):
        await journal.hold(session, each)
    studies = {file.header.study_instance_uid: file for file in files}
    series = {file.header.series_instance_uid: file for file in files}
    for table, rows in (
        (Study, [_study(access, each) for each in studies.values()]),
        (Series, [_series(each) for each in series.values()]),
        (Instance, [_instance(access, each) for each in files]),
    ):
        for start in range(0, len(rows), _AT_ONCE):
            await session.exec(insert_if_absent(session, table, *rows[start : start + _AT_ONCE]))
    if not await _are_ours(access, files):
        raise Conflict(
            "The same UIDs were stored with other content, or for another patient or study, "
            "at the same moment. Nothing was kept of this."
        )


async def _are_ours(access: PatientAccess, files: Sequence[Kept]) -> bool:
    """Do the rows that are there now say of each file what it is?"""
    expected = {
        file.header.sop_instance_uid: (
            access.patient.id,
            file.header.study_instance_uid,
            file.header.study_instance_uid,
            file.header.series_instance_uid,
            file.stored.instance_id,
            file.sha256,
        )
        for file in files
    }
    named, found = sorted(expected), {}
    for start in range(0, len(named), _AT_ONCE):
        rows = await access.session.exec(
            select(
                Instance.sop_instance_uid,
                Study.patient_id,
                Instance.study_instance_uid,
                Series.study_instance_uid,
                Instance.series_instance_uid,
                Instance.orthanc_id,
                Instance.received_sha256,
            )  # type: ignore[call-overload]
            .join(Study, col(Study.study_instance_uid) == col(Instance.study_instance_uid))
            .join(Series, col(Series.series_instance_uid) == col(Instance.series_instance_uid))
            .where(col(Instance.sop_instance_uid).in_(named[start : start + _AT_ONCE]))
        )
        found.update({row[0]: tuple(row[1:]) for row in rows})
    return found == expected


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
