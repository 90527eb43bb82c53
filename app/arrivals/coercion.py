"""A copy of a study with a patient's identifiers, for images that came under another PatientID.

All or nothing: the copy has UIDs of its own, made from the original's, and is linked when it is
whole. What is left of one that was not finished is deleted before the next try, and never linked by
itself. The copy says in OriginalAttributesSequence (PS3.3 C.12.1.1.9) what it was before.
"""

import logging
import uuid
from collections.abc import Sequence
from contextlib import suppress
from copy import deepcopy
from datetime import timedelta
from tempfile import TemporaryFile
from typing import Any, BinaryIO

import anyio
import anyio.to_thread
import pydicom
import sqlalchemy as sa
from pydicom import Dataset
from sqlmodel import col

from app.access import PatientAccess
from app.arrivals.files import Examined, Examiner
from app.arrivals.linker import Linker
from app.db import Database, insert_if_absent, utcnow
from app.dicom import orthanc_id, rewrite
from app.errors import Conflict, LightboxError
from app.intake import Intake, identity
from app.intake.identity import Differences
from app.intake.take import digest_of
from app.models import Arrival, ArrivalState
from app.orthanc import Orthanc

logger = logging.getLogger(__name__)

_NAMESPACE = uuid.UUID("8f0a3d1e-7c55-4c0e-9d7b-3a5a1f1e6b42")
_ORIGINAL_ATTRIBUTES = 0x04000561
_UNDER_WAY = "a copy is being made"
_LONGEST = timedelta(minutes=10)  # whoever began it has died


class Coercion:
    """Makes the copies. One per app."""

    def __init__(
        self,
        database: Database,
        orthanc: Orthanc,
        intake: Intake,
        examiner: Examiner,
        linker: Linker,
        *,
        remove_original: bool,
        spool_dir: str,
    ) -> None:
        self._database = database
        self._orthanc = orthanc
        self._intake = intake
        self._examiner = examiner
        self._linker = linker
        self._remove_original = remove_original
        self._spool_dir = spool_dir

    async def copy(
        self,
        access: PatientAccess,
        row: Arrival,
        files: Sequence[Examined],
        differences: Differences,
        columns: dict[str, Any],
        detail: dict[str, Any],
    ) -> str:
        """Make the copy and link it; its StudyInstanceUID. Raises Conflict, OrthancUnavailable:
        then there is no copy, and the original waits as before."""
        patient = access.patient
        former = row.study_instance_uid
        study_uid = renumbered(str(patient.id), former)
        study_id = orthanc_id(patient.mrn, study_uid)
        await self._claim(row, study_id, study_uid, columns)
        await self._orthanc.delete_study(study_id)
        try:
            ids = [await self._copy_one(access, each, differences) for each in files]
            examined = await self._examiner.all(study_id, ids)
            copy_row = await self._row(study_id)
            said = {
                **detail,
                "coerced": dict(differences),
                "original": {
                    "study_instance_uid": former,
                    "orthanc_id": row.orthanc_id,
                    "kept": not self._remove_original,
                    "sop_instance_uids": {
                        renumbered(str(patient.id), each.header.sop_instance_uid): (
                            each.header.sop_instance_uid
                        )
                        for each in files
                    },
                },
            }
            await self._linker.link(access, copy_row, examined, columns, said)
        except BaseException:
            with anyio.CancelScope(shield=True), suppress(LightboxError):
                await self._orthanc.delete_study(study_id)
            with anyio.CancelScope(shield=True), suppress(sa.exc.SQLAlchemyError):
                await self._release(row)
            raise
        await self._close(row, columns, study_uid)
        return study_uid

    async def _copy_one(
        self, access: PatientAccess, each: Examined, differences: Differences
    ) -> str:
        with (
            TemporaryFile(dir=self._spool_dir) as original,
            TemporaryFile(dir=self._spool_dir) as changed,
        ):
            async with self._orthanc.file(each.stored.instance_id) as chunks:
                async for chunk in chunks:
                    await anyio.to_thread.run_sync(original.write, chunk)
            size = await anyio.to_thread.run_sync(
                self._rewrite, access, each, differences, original, changed
            )
            stored = await self._orthanc.store(changed, size)
            if not stored.new:
                raise Conflict("The copy is being made by somebody else at this moment.")
            return stored.instance_id

    def _rewrite(
        self,
        access: PatientAccess,
        each: Examined,
        differences: Differences,
        original: BinaryIO,
        changed: BinaryIO,
    ) -> int:
        """Blocking. The size of what was written."""
        if digest_of(original, "sha256") != each.sha256:
            raise Conflict("A file of the study was changed meanwhile; look at it again.")
        with self._intake.scan(original) as scanned:
            found = {**differences, **_empty(original)}
            changes, _ = identity.coercion(access, each.header, found)
            for keyword, value in (
                ("StudyInstanceUID", each.header.study_instance_uid),
                ("SeriesInstanceUID", each.header.series_instance_uid),
                ("SOPInstanceUID", each.header.sop_instance_uid),
            ):
                setattr(changes, keyword, renumbered(str(access.patient.id), value))
            _remember(original, changes)
            original.seek(0)
            rewrite(original, changed, scanned, changes)
        size = changed.seek(0, 2)
        changed.seek(0)
        return size

    async def _claim(
        self, row: Arrival, study_id: str, study_uid: str, columns: dict[str, Any]
    ) -> None:
        """Of two people one makes the copy. From its first file on it is known, and not linked but
        by who makes it. Raises Conflict."""
        now = utcnow()
        under_way = row.decision == _UNDER_WAY and row.decided_at is not None
        if under_way and row.decided_at and now - row.decided_at < _LONGEST:
            raise Conflict(f"{row.decided_by} is making a copy of this study at this moment.")
        async with self._database.writing_session() as session:
            mine = await session.exec(
                sa.update(Arrival)
                .where(
                    col(Arrival.orthanc_id) == row.orthanc_id, col(Arrival.version) == row.version
                )
                .values(
                    version=row.version + 1,
                    held=True,
                    decision=_UNDER_WAY,
                    decided_at=now,
                    decided_by=columns["decided_by"],
                )
                .execution_options(synchronize_session=False)
            )
            if mine.rowcount != 1:
                raise Conflict("Somebody else changed this study at the same moment.")
            await session.exec(
                insert_if_absent(
                    session,
                    Arrival,
                    orthanc_id=study_id,
                    study_instance_uid=study_uid,
                    state=ArrivalState.REJECTED.value,
                    held=True,
                    due_at=None,
                    decision="a copy that was not finished",
                )
            )
            await session.commit()
        row.version += 1

    async def _release(self, row: Arrival) -> None:
        """It waits as before."""
        async with self._database.writing_session() as session:
            await session.exec(
                sa.update(Arrival)
                .where(col(Arrival.orthanc_id) == row.orthanc_id)
                .values(decision=row.decision, version=row.version + 1, held=row.held)
                .execution_options(synchronize_session=False)
            )
            await session.commit()

    async def _row(self, study_id: str) -> Arrival:
        async with self._database.writing_session() as session:
            # What Orthanc said of it meanwhile is not news.
            await session.exec(
                sa.update(Arrival)
                .where(col(Arrival.orthanc_id) == study_id)
                .values(due_at=None)
                .execution_options(synchronize_session=False)
            )
            await session.commit()
            row = await session.get(Arrival, study_id)
        assert row is not None
        row.stable = True
        return row

    async def _close(self, row: Arrival, columns: dict[str, Any], study_uid: str) -> None:
        """The original waits no longer. It is kept, shown to nobody, or removed."""
        async with self._database.writing_session() as session:
            await session.exec(
                sa.update(Arrival)
                .where(col(Arrival.orthanc_id) == row.orthanc_id)
                .values(
                    state=ArrivalState.REJECTED.value,
                    held=True,
                    due_at=None,
                    version=row.version + 1,
                    decided_by=columns["decided_by"],
                    decided_at=columns["decided_at"],
                    decision=f"coerced: the copy is {study_uid}",
                )
                .execution_options(synchronize_session=False)
            )
            await session.commit()
        if self._remove_original:
            try:
                await self._orthanc.delete_study(row.orthanc_id)
            except LightboxError as error:
                logger.error("an original could not be removed: %s", error.detail)


def renumbered(patient_id: str, uid: str) -> str:
    """The UID that a copy for this patient has for it: always the same (PS3.5 B.2)."""
    return f"2.25.{uuid.uuid5(_NAMESPACE, f'{patient_id} {uid}').int}"


def _read(file: BinaryIO, keywords: Sequence[Any]) -> Dataset:
    """Some elements of a file that the scan has bounded."""
    file.seek(0)
    return pydicom.dcmread(file, stop_before_pixels=True, force=True, specific_tags=list(keywords))


def _empty(file: BinaryIO) -> dict[str, dict[str, str]]:
    """What else the file says of who the patient was."""
    there = _read(file, identity.FORMER_IDENTITY)
    return {
        keyword: {"file": str(there[keyword].value), "expected": ""}
        for keyword in identity.FORMER_IDENTITY
        if keyword in there and not there[keyword].is_empty
    }


def _remember(file: BinaryIO, changes: Dataset) -> None:
    """Add what is changed, as it was, to OriginalAttributesSequence."""
    before = _read(file, [*(each.tag for each in changes), _ORIGINAL_ATTRIBUTES])
    modified = Dataset()
    for each in changes:
        if each.tag in before:
            modified.add(deepcopy(before[each.tag]))
    item = Dataset()
    item.ModifiedAttributesSequence = [modified]
    item.AttributeModificationDateTime = utcnow().strftime("%Y%m%d%H%M%S.%f+0000")
    item.ModifyingSystem = "Lightbox"
    item.SourceOfPreviousValues = ""
    item.ReasonForTheAttributeModification = "CORRECT"
    earlier = (
        list(before.get(_ORIGINAL_ATTRIBUTES, Dataset()).value or [])
        if (_ORIGINAL_ATTRIBUTES in before)
        else []
    )
    changes.OriginalAttributesSequence = [*earlier, item]
