"""Linking what has passed: one transaction a study, through the gate, on record."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from uuid import UUID

from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app import aliases, linking
from app.access import Gate, PatientAccess, Subject
from app.arrivals import copies, index
from app.arrivals.changes import ORIGIN
from app.arrivals.files import Examined
from app.audit import Action
from app.errors import Conflict
from app.identity import Principal, Role
from app.intake import records
from app.linking import StudySummary
from app.models import Arrival, ArrivalState, Instance, OrderStudy, Study
from app.orderlife import images_changed, orders_of
from app.orthanc import Orthanc, promptly

Ready = Callable[[PatientAccess, StudySummary], None]
Also = Callable[[AsyncSession], Awaitable[None]]


def follower(site: str) -> Principal:
    """Who links what is certain."""
    return Principal("lightbox", "Lightbox", frozenset({Role.SERVICE}), site)


class Linker:
    """Writes the links. `ready` is told of each study that can be opened now."""

    def __init__(self, gate: Gate, orthanc: Orthanc, site: str, ready: Ready) -> None:
        self._gate = gate
        self._orthanc = orthanc
        self._principal = follower(site)
        self._ready = ready

    async def link_certain(
        self, row: Arrival, files: Sequence[Examined], columns: dict[str, Any], still: Also
    ) -> None:
        """Link a study to the patient and the order that are certain, and `still` are. `columns`
        are the row's new ones. Raises as `link` does."""
        subject = Subject.ORDER if columns["order_id"] else Subject.PATIENT
        key: UUID = columns["order_id"] or columns["patient_id"]
        async with self._gate.transaction([]) as session:
            access = await self._gate.patient_access(
                session, self._principal, Action.STUDY_LINK, ORIGIN, subject, key
            )
            if access.patient.id != columns["patient_id"]:
                raise Conflict("The order is another patient's by now.")
            await self.link(access, row, files, columns, {"rule": columns["rule"]}, still)

    async def link(
        self,
        access: PatientAccess,
        row: Arrival,
        files: Sequence[Examined],
        columns: dict[str, Any],
        detail: dict[str, Any],
        also: Also | None = None,
    ) -> None:
        """Write study, series, instances, links and record, and commit.

        `files` are all of the study that were not linked before, each of them passed. `also` is
        done in the same transaction. Raises Conflict where something is another's or changed
        meanwhile, which then says by whom: nothing was written.
        """
        async with index.told(access.session, row):
            await self._write(access, row, files, columns, detail, also)
        await self._tell(access, row.study_instance_uid)

    async def _write(
        self,
        access: PatientAccess,
        row: Arrival,
        files: Sequence[Examined],
        columns: dict[str, Any],
        detail: dict[str, Any],
        also: Also | None,
    ) -> None:
        session, uid = access.session, row.study_instance_uid
        _refuse_anothers(access, row.patient_id if row.state == ArrivalState.LINKED.value else None)
        for each in files:
            await records.refuse_taken_uids(access, each.header, each.sha256)
        before = await state_of(session, uid)
        await access.release()
        await self._orthanc.refuse_shared(uid, row.orthanc_id)
        async with self._gate.database.writing():
            kept = [
                records.Kept(each.header, each.stored, each.sha256, each.described)
                for each in files
            ]
            if kept:
                await records.keep(access, kept)
            else:
                # All of it was linked before, and more is known of it now. No row is filed, which
                # would wait for who merges the patient, or takes them apart, and make them wait.
                await aliases.lock(session, [access.patient.id])
            owner = await session.get(Study, uid, populate_existing=True)
            if owner is None:
                raise Conflict("Nothing of this study can be linked.")
            _refuse_anothers(access, owner.patient_id)
            await records.answer_order(access, uid)
            orders = await orders_of(session, uid)
            await images_changed(session, orders, complete=row.stable, study_instance_uid=uid)
            await copies.refuse_second(session, row.orthanc_id)
            if also is not None:
                await also(session)
            changed = await index.change(
                session,
                row,
                **{**columns, "state": ArrivalState.LINKED.value, "due_at": None, "held": False},
            )
            if not changed:
                raise Conflict("Somebody else changed this study at the same moment.")
            after = await state_of(session, uid)
            await access.done(
                study_instance_uid=uid,
                detail={**detail, "instances": len(files), "before": before, "after": after},
            )
            async with promptly():
                await self._orthanc.refuse_shared(uid, row.orthanc_id)
                held = await self._orthanc.study_instances(row.orthanc_id)
            if not held.issuperset(each.stored.instance_id for each in files):
                # A deletion, or the taking back of an upload, was faster.
                raise Conflict("Images of this study were deleted at the same moment.")
            await session.commit()

    async def _tell(self, access: PatientAccess, uid: str) -> None:
        study = await access.session.get(Study, uid)
        if study is not None:
            (summary,) = await linking.summaries(access, [study])
            self._ready(access, summary)
        await access.release()

    async def unchanged(self, row: Arrival, **columns: Any) -> bool:
        """Nothing of the study is left to link; its orders' images are complete when it is
        stable. False: somebody changed the row meanwhile."""
        async with self._gate.transaction([]) as session, self._gate.database.writing():
            if row.stable:
                uid = row.study_instance_uid
                orders = await orders_of(session, uid)
                await images_changed(session, orders, complete=True, study_instance_uid=uid)
            done = await index.change(session, row, **columns)
            await session.commit()
        return done


def _refuse_anothers(access: PatientAccess, owner: UUID | None) -> None:
    """One patient a study. `owner`: None where it has none. Raises Conflict."""
    if owner not in (None, access.patient.id):
        raise Conflict("The study is linked to another patient already. Undo that link first.")


async def state_of(session: AsyncSession, uid: str) -> dict[str, Any]:
    """Whose a study is, and how much of it, for the record."""
    study = await session.get(Study, uid, populate_existing=True)
    orders = await session.exec(
        select(OrderStudy.order_id)
        .where(OrderStudy.study_instance_uid == uid)
        .order_by(col(OrderStudy.order_id))
    )
    instances = await session.exec(
        select(Instance.sop_instance_uid).where(Instance.study_instance_uid == uid)
    )
    return {
        "patient_id": str(study.patient_id) if study else None,
        "order_ids": [str(each) for each in orders],
        "instance_count": len(instances.all()),
    }
