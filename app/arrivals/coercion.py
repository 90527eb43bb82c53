"""A copy of a study with a patient's identifiers, for images that came under another PatientID.

All or nothing: the copy has UIDs of its own, made from the original's, so that references between
its images follow; it is linked when it is whole, in the transaction that closes the original. What
is left of one that was not finished is deleted (`app.arrivals.leftovers`), and never linked. The
copy says in OriginalAttributesSequence (PS3.3 C.12.1.1.9) what it was before.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from tempfile import TemporaryFile
from typing import Any, BinaryIO

import anyio
import anyio.to_thread
import pydicom
import sqlalchemy as sa
from pydicom import Dataset
from sqlmodel.ext.asyncio.session import AsyncSession

from app.access import PatientAccess
from app.arrivals import copies, index
from app.arrivals.copies import Making
from app.arrivals.files import Examined, Examiner
from app.arrivals.leftovers import Leftovers
from app.arrivals.linker import Linker
from app.arrivals.references import ORIGINAL_ATTRIBUTES, following, renumbered
from app.db import Database, utcnow
from app.dicom import orthanc_id, rewrite
from app.errors import Conflict, LightboxError
from app.intake import Intake, identity
from app.intake.identity import Differences
from app.intake.take import digest_of
from app.models import Arrival
from app.orthanc import Orthanc, promptly

logger = logging.getLogger(__name__)


class Coercion:
    """Makes the copies. One per app."""

    def __init__(
        self,
        database: Database,
        orthanc: Orthanc,
        intake: Intake,
        examiner: Examiner,
        linker: Linker,
        leftovers: Leftovers,
        *,
        remove_original: bool,
        spool_dir: str,
    ) -> None:
        self._database = database
        self._orthanc = orthanc
        self._intake = intake
        self._examiner = examiner
        self._linker = linker
        self._leftovers = leftovers
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
        assert access.operation is not None
        uids = _new_uids(str(access.patient.id), files)
        study_uid = renumbered(str(access.patient.id), row.study_instance_uid)
        making = Making(
            orthanc_id(access.patient.mrn, study_uid),
            study_uid,
            access.operation,
            self._remove_original,
        )
        await self._claim(row, making)
        said = {
            **detail,
            "coerced": dict(differences),
            "original": {
                "study_instance_uid": row.study_instance_uid,
                "orthanc_id": row.orthanc_id,
                "kept": not self._remove_original,
                "sop_instance_uids": {
                    uids[each.header.sop_instance_uid]: each.header.sop_instance_uid
                    for each in files
                },
            },
        }
        try:
            async with index.told(access.session, row):
                await self._make(access, row, making, files, differences, uids, columns, said)
        except BaseException:
            with (
                anyio.CancelScope(shield=True),
                suppress(LightboxError, sa.exc.SQLAlchemyError, OSError),
            ):
                await access.session.rollback()  # which may hold what is waited for next
                await self._leftovers.take_back(making)
            raise
        if self._remove_original:
            await self._remove(making, files)
        return study_uid

    async def _make(
        self,
        access: PatientAccess,
        row: Arrival,
        making: Making,
        files: Sequence[Examined],
        differences: Differences,
        uids: Mapping[str, str],
        columns: dict[str, Any],
        said: dict[str, Any],
    ) -> None:
        await self._orthanc.delete_study(making.orthanc_id)
        ids = [await self._copy_one(access, each, differences, uids) for each in files]
        examined = await self._examiner.all(making.orthanc_id, ids)
        closed = {
            "decided_by": columns["decided_by"],
            "decided_at": columns["decided_at"],
            "decision": f"coerced: the copy is {making.study_instance_uid}",
        }
        copied = {each.stored.instance_id for each in files}

        async def finish(session: AsyncSession) -> None:
            await copies.finish(session, row, making, closed)
            async with promptly():
                held = await self._orthanc.study_instances(row.orthanc_id)
            if held - copied:
                raise Conflict("Images of this study arrived at the same moment. Look at it again.")

        copy_row = await self._row(making)
        await self._linker.link(access, copy_row, examined, columns, said, finish)

    async def _copy_one(
        self,
        access: PatientAccess,
        each: Examined,
        differences: Differences,
        uids: Mapping[str, str],
    ) -> str:
        with (
            TemporaryFile(dir=self._spool_dir) as original,
            TemporaryFile(dir=self._spool_dir) as changed,
        ):
            async with self._orthanc.file(each.stored.instance_id) as chunks:
                async for chunk in chunks:
                    await anyio.to_thread.run_sync(original.write, chunk)
            size = await anyio.to_thread.run_sync(
                self._rewrite, access, each, differences, uids, original, changed
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
        uids: Mapping[str, str],
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
                setattr(changes, keyword, uids[value])
            _remember(original, changes)
            references = following(original, scanned, uids)
            original.seek(0)
            rewrite(original, changed, scanned, changes, references)
        size = changed.seek(0, 2)
        changed.seek(0)
        return size

    async def _claim(self, row: Arrival, making: Making) -> None:
        async with self._database.writing_session() as session:
            await copies.claim(session, row, making)
            await session.commit()

    async def _row(self, making: Making) -> Arrival:
        async with self._database.session() as session:
            row = await session.get(Arrival, making.orthanc_id)
        assert row is not None
        row.stable, row.due_at = True, None  # as `copies.finish` leaves it
        return row

    async def _remove(self, making: Making, files: Sequence[Examined]) -> None:
        """The originals of what was copied; if that fails, `Leftovers` does it later."""
        try:
            for each in files:
                await self._orthanc.delete_instance(each.stored.instance_id)
            await self._leftovers.removed(making.orthanc_id)
        except LightboxError as error:
            logger.error("an original could not be removed yet: %s", error.detail)


def _new_uids(patient_id: str, files: Sequence[Examined]) -> dict[str, str]:
    """Of the study, its series and images: former and new."""
    named = [
        uid
        for each in files
        for uid in (
            each.header.study_instance_uid,
            each.header.series_instance_uid,
            each.header.sop_instance_uid,
        )
    ]
    return {uid: renumbered(patient_id, uid) for uid in named}


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
    before = _read(file, [*(each.tag for each in changes), ORIGINAL_ATTRIBUTES])
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
        list(before.get(ORIGINAL_ATTRIBUTES, Dataset()).value or [])
        if (ORIGINAL_ATTRIBUTES in before)
        else []
    )
    changes.OriginalAttributesSequence = [*earlier, item]
