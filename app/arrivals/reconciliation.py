"""What people decide about the studies that wait: confirm, reject, undo.

Each decision is made by the version that was seen, so that of two people at once the second is told
what the first has done; and is on record with what was there before and after.
"""

import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlmodel import select
from sqlmodel.ext.asyncio.session import AsyncSession

from app import linking
from app.access import PatientAccess, RoleAccess, Subject
from app.arrivals import copies, facts, index
from app.arrivals.coercion import Coercion
from app.arrivals.facts import FilesDisagreeError
from app.arrivals.files import DidNotPassError, Examined, Examiner
from app.arrivals.linker import Linker, state_of
from app.arrivals.sight import LISTED, admitted, row_of
from app.audit import Action
from app.db import Database, insert_if_absent, utcnow
from app.errors import Conflict, NotFound
from app.intake import identity, records
from app.models import (
    Arrival,
    ArrivalCandidate,
    ArrivalState,
    Instance,
    Order,
    OrderStatus,
    Study,
)
from app.notifications import Event, Notifications
from app.orthanc import Orthanc


@dataclass(frozen=True)
class Decided:
    """What became of a study. `study_instance_uid` is another one where its tags were coerced."""

    row: Arrival
    study_instance_uid: str
    viewers_ended: int = 0
    warnings: tuple[str, ...] = ()


class Reconciliation:
    """The decisions of people. One per app."""

    def __init__(
        self,
        database: Database,
        orthanc: Orthanc,
        examiner: Examiner,
        linker: Linker,
        coercion: Coercion,
        authority: str,
    ) -> None:
        self._database = database
        self._orthanc = orthanc
        self._examiner = examiner
        self._linker = linker
        self._coercion = coercion
        self._authority = authority

    async def confirm(
        self,
        caller: RoleAccess,
        uid: str,
        version: int,
        subject: Subject,
        key: UUID,
        *,
        reason: str,
        coerce: bool,
    ) -> Decided:
        """Link a waiting study to a patient, or to an order of theirs.

        Raises NotFound; Conflict where somebody was faster, where a file does not pass, or where
        PatientIDs differ and `coerce` is not set; Denial.
        """
        access = await caller.admit(subject, key)
        row = await row_of(caller, uid)
        await admitted(caller, row, record_grant=False)
        async with index.told(caller.session, row):
            await _refuse_confirming(access, row, version)
            await access.release()
            files = await self._files(row)
            differences = await self._differences(access, files, coerce=coerce)
            await access.release()
        columns = _decision(
            access.principal.sub,
            f"confirmed: {reason}" if reason else "confirmed",
            patient_id=access.patient.id,
            order_id=access.order.id if access.order else None,
            rule="confirmed",
        )
        detail: dict[str, Any] = {"rule": "confirmed", "reason": reason, "state": row.state}
        if not identity.names_another(differences):
            if differences:
                detail["differences"] = differences

            async def still(session: AsyncSession) -> None:
                now = await self._differences(access, files, coerce=coerce)
                order = await _order_now(session, access)
                if identity.names_another(now) or order == OrderStatus.CANCELLED:
                    raise Conflict("The patient, or the order, was changed at the same moment.")

            await self._linker.link(access, row, files, columns, detail, still)
            return Decided(row, uid)
        if not coerce:
            raise Conflict(
                "The images carry another PatientID than this patient's. If they really are this "
                "patient's, confirm with `coerce: true`: a copy gets the patient's identifiers.",
                extra={"differences": differences},
            )
        access = await caller.admit(subject, key, Action.STUDY_COERCE)
        copy = await self._coercion.copy(access, row, files, differences, columns, detail)
        warning = (
            "The identity was rewritten at the top level only: sequences, private elements and "
            "the pixels may still show the former one. References between the images follow the "
            "copy; other studies may still refer to the original."
        )
        return Decided(row, copy, warnings=(warning,))

    async def reject(self, caller: RoleAccess, uid: str, version: int, reason: str) -> Decided:
        """Say that a waiting study is nobody's here. It is not linked by itself any more."""
        row = await row_of(caller, uid)
        await admitted(caller, row)
        _refuse_stale(row, version)
        _refuse_decided(row)
        await copies.refuse_linked(caller.session, row.orthanc_id)
        before = row.state
        columns = _decision(
            caller.principal.sub, f"rejected: {reason}", state="rejected", held=True, due_at=None
        )
        async with self._database.writing():
            await _write(caller.session, row, columns)
            await caller.done(
                study_instance_uid=uid,
                reason="rejected",
                detail={
                    "reason": reason,
                    "before": {"state": before, "version": version},
                    "after": {"state": "rejected", "version": version + 1},
                },
            )
            await caller.session.commit()
        return Decided(row, uid)

    async def undo(
        self,
        caller: RoleAccess,
        uid: str,
        version: int,
        reason: str,
        end_viewers: Callable[[PatientAccess], Awaitable[int]],
    ) -> Decided:
        """Unlink a study, and let it wait for a human. `end_viewers` ends those that show it.

        Raises NotFound, Denial; Conflict where somebody was faster.
        """
        if await caller.session.get(Study, uid) is None:
            row = await row_of(caller, uid)
            await admitted(caller, row)
            raise index.stale(row)
        try:
            access = await caller.admit(Subject.STUDY, uid)
        except NotFound:
            row = await row_of(caller, uid)  # somebody else has undone it since
            await admitted(caller, row)
            raise index.stale(row) from None
        session, study = access.session, access.study
        assert study is not None
        found = await session.get(Arrival, study.orthanc_id, populate_existing=True)
        if found is None:
            raise Conflict("The study has not been found in the archive yet; try again soon.")
        row = found
        if row.version != version:
            _refuse_stale(row, -1)
        viewers_ended = await end_viewers(access)
        before = await state_of(session, uid)
        gone = await linking.forget_study(access)
        orders: list[str | None] = [str(each) for each in gone.order_ids]
        columns = _decision(
            access.principal.sub,
            f"undone: {reason}",
            state=ArrivalState.UNMATCHED.value,
            reasons=index.reason("undone", "Its link was undone; only a human links it again."),
            candidates=json.dumps(
                [
                    {
                        "patient_id": str(access.patient.id),
                        "order_id": order,
                        "score": 0,
                        "for": [],
                        "against": [],
                    }
                    for order in (orders or [None])
                ]
            ),
            patient_id=None,
            order_id=None,
            rule="",
            held=True,
            due_at=None,
        )
        await _write(session, row, columns)
        await session.exec(
            insert_if_absent(
                session, ArrivalCandidate, orthanc_id=row.orthanc_id, patient_id=access.patient.id
            )
        )
        await Notifications.add(
            session,
            Event.LINK_UNDONE,
            {
                "study_instance_uid": uid,
                "patient_id": access.patient.id,
                "order_ids": [str(each) for each in gone.order_ids],
            },
        )
        await access.done(
            reason="undone",
            detail={
                "reason": reason,
                "before": before,
                "after": {"patient_id": None, "order_ids": [], "instance_count": 0},
                "sop_instance_uids": gone.sop_instance_uids,
                "orders_open_again": [str(each) for each in gone.reopened],
                "viewers_ended": viewers_ended,
            },
        )
        return Decided(row, uid, viewers_ended)

    async def _files(self, row: Arrival) -> list[Examined]:
        """All files of the study that are not linked, each of them passed."""
        held = await self._orthanc.held(row.orthanc_id)
        if held is None:
            raise Conflict("The image archive does not hold this study any more.")
        if not held.stable:
            raise Conflict("Images of this study are still arriving; confirm it when they are in.")
        row.stable = True
        await self._orthanc.refuse_shared(row.study_instance_uid, row.orthanc_id)
        async with self._database.session() as session:
            known = set(
                await session.exec(
                    select(Instance.orthanc_id).where(
                        Instance.study_instance_uid == row.study_instance_uid
                    )
                )
            )
        new = await self._orthanc.study_instances(row.orthanc_id) - known
        try:
            files = await self._examiner.all(row.orthanc_id, new)
            if files:
                facts.merged([each.says for each in files])
        except DidNotPassError as error:
            raise Conflict(f"A file of the study did not pass the checks: {error.why}") from error
        except FilesDisagreeError as error:
            raise Conflict(f"{error} Nothing was linked.") from error
        return files

    async def _differences(
        self, access: PatientAccess, files: Sequence[Examined], *, coerce: bool
    ) -> dict[str, dict[str, str]]:
        found: dict[str, dict[str, str]] = {}
        ambiguous = await records.is_ambiguous(access)
        former = await records.former_identifiers(access)
        for each in files:
            found |= identity.differences(
                access,
                each.header,
                authority=self._authority,
                ambiguous=ambiguous,
                fill=coerce,
                former=former,
            )
        return found


async def _order_now(session: AsyncSession, access: PatientAccess) -> OrderStatus | None:
    """The status of the order that the access names, as it is now."""
    if access.order is None:
        return None
    now = (await session.exec(select(Order.status).where(Order.id == access.order.id))).first()
    return OrderStatus(now) if now is not None else None


async def _refuse_confirming(access: PatientAccess, row: Arrival, version: int) -> None:
    """Raises Conflict where the study is not one to be linked to this patient, or order."""
    session, uid = access.session, row.study_instance_uid
    await _one_owner(session, uid)
    _refuse_stale(row, version)
    _refuse_decided(row)
    owner = await session.get(Study, uid, populate_existing=True)
    if owner is not None and owner.patient_id != access.patient.id:
        raise Conflict(
            "Images of this study are linked to another patient already. Undo that link first."
        )
    if access.order is not None and access.order.status == OrderStatus.CANCELLED:
        raise Conflict("The order is cancelled; no images can be linked to it.")
    await copies.refuse_linked(session, row.orthanc_id)


async def _one_owner(session: AsyncSession, uid: str) -> None:
    rows = await session.exec(
        select(Arrival.orthanc_id).where(
            Arrival.study_instance_uid == uid, Arrival.state != ArrivalState.GONE.value
        )
    )
    if len(rows.all()) > 1:
        raise Conflict(
            "The image archive holds this StudyInstanceUID under two PatientIDs. One of them has "
            "to be removed or renumbered in the archive before either can be linked."
        )


def _refuse_stale(row: Arrival, version: int) -> None:
    if row.version != version or row.state == ArrivalState.ARRIVING.value:
        raise index.stale(row)


def _refuse_decided(row: Arrival) -> None:
    """Only what waits, or was rejected, is decided about. Raises Conflict."""
    if row.state not in LISTED:
        raise Conflict(
            f"The study is {row.state}; there is nothing to decide about it. If that is wrong, "
            "undo its link first.",
            extra={"state": row.state, "version": row.version},
        )


async def _write(session: AsyncSession, row: Arrival, columns: dict[str, Any]) -> None:
    if not await index.change(session, row, **columns):
        await index.refuse_changed(session, row)


def _decision(sub: str, decision: str, **columns: Any) -> dict[str, Any]:
    return {**columns, "decided_by": sub, "decided_at": utcnow(), "decision": decision}
