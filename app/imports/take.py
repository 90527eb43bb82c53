"""One file of an import, taken in exactly as an upload is, with its state kept beside it.

What is said to be linked is linked: the row says so in the very transaction of the link. A file
whose process was killed in the middle is taken in again, and found to be there.
"""

import json
import logging
from collections.abc import Generator
from contextlib import closing
from typing import Any, BinaryIO

import anyio.to_thread
import sqlalchemy as sa
from sqlmodel import col

from app.access import Denial, Gate, RoleAccess
from app.access.gate import entry_of
from app.audit import Action, Origin
from app.db import utcnow
from app.dicom import Header
from app.errors import LightboxError, Unavailable
from app.imports.rows import Key, Rows, read_principal
from app.intake import Intake, Target, archives
from app.intake.archives import Entry, ZipLimits
from app.models import PENDING, FileState, Import, ImportFile, ImportState
from app.orthanc import Orthanc, Stored
from app.settings import Settings

logger = logging.getLogger(__name__)


class PutOff(Exception):
    """Something that is needed does not answer: the file stays as it is, and comes again."""


class Over(Exception):
    """The import was cancelled or stopped before this file could be stored."""


class Taker:
    """Takes in the files of imports. One per app."""

    def __init__(self, settings: Settings, gate: Gate, orthanc: Orthanc, rows: Rows) -> None:
        self._settings = settings
        self._gate = gate
        self._orthanc = orthanc
        self._rows = rows

    async def file(self, found: Import, key: Key, file: BinaryIO) -> None:
        """A file that was sent, to its end. Raises PutOff, Over."""
        if await anyio.to_thread.run_sync(archives.is_zip, file):
            await self._archive(found, key, file)
        else:
            await self._take(found, key, file)

    async def _archive(self, found: Import, key: Key, file: BinaryIO) -> None:
        """Each file of an archive, one after the other. Those that are at their end are passed
        over: it may have been begun before."""
        limits = ZipLimits(
            self._settings.max_upload_bytes,
            self._settings.max_zip_files,
            self._settings.max_zip_ratio,
        )
        row = await self._rows.file(key)
        name = row.name if row is not None else ""
        try:
            with closing(archives.entries(file, limits, self._settings.spool_dir)) as unpacking:
                number = 0
                while entry := await anyio.to_thread.run_sync(_next, unpacking):
                    number += 1
                    each = Key(key.import_id, key.number, number)
                    await self._entry(found, each, f"{name}/{entry.name}", entry)
        except LightboxError as error:
            await self._refuse(found, key, error)
            return
        await self._rows.change(key, only=PENDING, state=FileState.UNPACKED.value)

    async def _entry(self, found: Import, key: Key, name: str, entry: Entry) -> None:
        size = await anyio.to_thread.run_sync(_size, entry.file) if entry.file else 0
        row = await self._rows.entry(key, name, size)
        if row is None:
            raise Over
        if row.state not in PENDING:
            return
        if entry.file is None:
            assert entry.refusal is not None
            await self._refuse(found, key, entry.refusal)
        else:
            await self._take(found, key, entry.file)

    async def _take(self, found: Import, key: Key, file: BinaryIO) -> None:
        try:
            await self._link(found, key, file)
        except (PutOff, Over):
            raise
        except Unavailable as error:
            raise PutOff from error
        except (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.TimeoutError) as error:
            raise PutOff from error
        except LightboxError as error:
            await self._refuse(found, key, error)
        except Exception:
            # Nobody foresaw it. The others go on, and this one is seen.
            logger.exception("a file of an import could not be taken in")
            said = LightboxError("Lightbox failed at this file; it was not linked.")
            await self._refuse(found, key, said)

    async def _link(self, found: Import, key: Key, file: BinaryIO) -> None:
        """Decide anew, by who the caller was when they last sent something, and take it in."""
        principal = read_principal(found.principal)
        origin = Origin(f"import-{found.id}", found.client_address)
        grants: list[Any] = []
        unread = entry_of(principal, Action.STUDY_UPLOAD, origin)
        async with self._gate.transaction(grants, unread) as session:
            owner = await session.get(Import, key.import_id)
            row = await session.get(ImportFile, (key.import_id, key.number, key.entry))
            if owner is None or row is None:
                raise Over
            caller = RoleAccess(session, principal, Action.STUDY_UPLOAD, origin, self._gate, grants)
            intake = _Watched(self._settings, self._orthanc, self._rows, key, owner, row)
            target = Target(order_id=found.order_id, patient_id=found.patient_id)
            receipt = await intake.take(caller, file, target)
        if receipt.warnings:
            said = json.dumps(list(receipt.warnings), ensure_ascii=False)
            await self._rows.change(key, only=(FileState.LINKED,), warnings=said)

    async def _refuse(self, found: Import, key: Key, error: LightboxError) -> None:
        await self._rows.change(
            key,
            only=PENDING,
            state=FileState.REFUSED.value,
            error=error.detail,
            error_status=error.status,
            error_type=error.slug,
        )
        named = found.order_id is not None or found.patient_id is not None
        if isinstance(error, Denial) and named:
            # The right to the one target is gone: it is for all the files that are to come.
            await self._rows.end(found.id, ImportState.STOPPED, error.detail)


class _Watched(Intake):
    """Takes one file in, and keeps its row."""

    def __init__(
        self,
        settings: Settings,
        orthanc: Orthanc,
        rows: Rows,
        key: Key,
        owner: Import,
        row: ImportFile,
    ) -> None:
        super().__init__(settings, orthanc)
        self._rows = rows
        self._key = key
        self._owner = owner
        self._row = row
        # It may be in Orthanc already: then it is finished, also where the import is over.
        self._begun = row.state in (FileState.VALIDATED, FileState.STORED)
        # What an earlier process learned when it stored it.
        self._stored_as = row.duplicate if row.state == FileState.STORED else None

    async def _store(self, file: BinaryIO, *, known: bool) -> Stored:
        """Nothing is stored for an import that is over: who cancels it waits for this row."""
        validated = await self._rows.change(
            self._key, only=PENDING, if_open=not self._begun, state=FileState.VALIDATED.value
        )
        if not validated:
            raise Over
        stored = await super()._store(file, known=known)
        if self._stored_as is None:
            self._stored_as = not stored.new
        await self._rows.change(
            self._key,
            only=(FileState.VALIDATED,),
            state=FileState.STORED.value,
            duplicate=self._stored_as,
        )
        return stored

    def _check_ids(self, header: Header, stored: Stored) -> None:
        """What comes next is the transaction of the link: the row is written with it."""
        super()._check_ids(header, stored)
        number: Any = col(Import.seq) + 1
        self._owner.seq = number
        own: Any = (
            sa.select(col(Import.seq)).where(col(Import.id) == self._owner.id).scalar_subquery()
        )
        self._row.seq = own
        self._row.state = FileState.LINKED.value
        self._row.duplicate = bool(self._stored_as)
        self._row.study_instance_uid = header.study_instance_uid
        self._row.sop_instance_uid = header.sop_instance_uid
        self._row.changed_at = utcnow()


Unpacking = Generator[Entry, None, None]


def _next(unpacking: Unpacking) -> Entry | None:
    return next(unpacking, None)


def _size(file: BinaryIO) -> int:
    size = file.seek(0, 2)
    file.seek(0)
    return size
