"""The order of things is the safety.

Nothing parses a file before `dicom.scan` has bounded it, nothing reaches Orthanc before the
patient agrees, and nothing is linked that Orthanc didn't take. Each file's link is committed here,
with those of the same moment (the named exception to "the edge commits"): if it can't be, what
Orthanc newly stored is taken back.
"""

import asyncio
import hashlib
import json
import logging
from contextlib import suppress
from dataclasses import dataclass, field
from tempfile import TemporaryFile
from typing import BinaryIO
from uuid import UUID

import anyio.to_thread
import sqlalchemy as sa
from pydicom import Dataset
from pydicom.datadict import tag_for_keyword
from sqlmodel import select

from app import journal
from app.access import Denial, PatientAccess, RoleAccess, Subject
from app.audit import Action
from app.dicom import (
    Described,
    Header,
    Limits,
    Scan,
    describe,
    orthanc_id,
    read_header,
    read_tags,
    rewrite,
    scan,
)
from app.errors import Conflict, LightboxError, NotFound, Unavailable, Unprocessable
from app.intake import identity, records
from app.intake.identity import Differences
from app.intake.iod import Validator
from app.intake.links import Links
from app.intake.records import Kept, Link, patient_id_of
from app.models import OrderStatus, Patient
from app.orthanc import Orthanc, Stored
from app.settings import Settings

CHUNK_BYTES = 1024 * 1024

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """What the sender said the file belongs to. No order and no patient: its PatientID decides."""

    order_id: UUID | None = None
    patient_id: UUID | None = None
    coerce: bool = False
    study_instance_uid: str | None = None  # None: any study


@dataclass(frozen=True)
class Receipt:
    """What became of one file."""

    status: str  # "uploaded" or "duplicate"
    header: Header
    stored: Stored
    patient_id: UUID
    order_id: UUID | None
    coerced: Differences = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Came:
    """A file as it came, and what was read of it."""

    scanned: Scan
    header: Header
    described: Described
    sha256: str


class Intake:
    """Takes files in. One per app."""

    def __init__(self, settings: Settings, orthanc: Orthanc) -> None:
        self._settings = settings
        self._orthanc = orthanc
        self._links = Links(orthanc)
        self._validator = Validator(settings)
        self.limits = Limits(
            max_bytes=settings.max_upload_bytes,
            max_depth=settings.max_sequence_depth,
            max_elements=settings.max_elements,
        )

    def scan(self, file: BinaryIO) -> Scan:
        """Bound a file before anything parses it. Blocking; raises as `dicom.scan` does."""
        return scan(file, self.limits, spool_dir=self._settings.spool_dir)

    def _read(self, file: BinaryIO) -> _Came:
        """Read what is needed of a file. Blocking."""
        scanned = self.scan(file)
        try:
            header = read_header(file, scanned)
            described = describe(file, scanned)
            refuse_wide_big_endian(file, scanned)
            return _Came(scanned, header, described, digest_of(file, "sha256"))
        except BaseException:
            scanned.close()
            raise

    async def take(self, caller: RoleAccess, file: BinaryIO, target: Target) -> Receipt:
        """Take one file in and link it.

        Raises NotDicom, TooLarge, Unprocessable, Nonconforming, NotValidated for the file;
        PatientMismatch, Conflict where it contradicts what is known; NotFound, Forbidden for the
        target; OrthancUnavailable. After any of them nothing is linked, and nothing is stored that
        wasn't before.
        """
        came = await anyio.to_thread.run_sync(self._read, file)
        header, described = came.header, came.described
        with came.scanned as scanned:
            if target.study_instance_uid not in (None, header.study_instance_uid):
                raise Conflict(
                    "The file is not of the study it was sent to: its StudyInstanceUID is another. "
                    "Nothing was stored."
                )
            access = await self._admit(caller, header, target)
            numbers = await records.numbers(access)
            found = identity.differences(
                access,
                header,
                authority=self._settings.assigning_authority,
                ambiguous=numbers.ambiguous,
                fill=target.coerce,
                former=numbers.former,
            )
            identity.refuse_other_issuer(access, header)
            if found and not target.coerce:
                identity.refuse(access, header, found)
            warnings = identity.warnings(access, header) if not found else []
            changes = Dataset()
            if found:
                # A right of its own: who may upload may not therefore change identities.
                access = await caller.admit(*_subject(access), action=Action.STUDY_COERCE)
                if identity.names_another(found):
                    found |= await anyio.to_thread.run_sync(_former_identity, file, scanned)
                    warnings.append(
                        "The identity was rewritten at the top level only: sequences, private "
                        "elements and the pixels may still show the former one."
                    )
                changes, header = identity.coercion(access, header, found)
            uids = await records.uids(access, header)
            known = uids.refuse_taken(access, header, came.sha256)
            if uids.planned_for_another_order(access):
                warnings.append(
                    "The StudyInstanceUID was planned for another order of this patient."
                )
            await access.release()
            warnings += await self._validator.check(file, scanned, changes)
            ours = _orthanc_ids(header)[2]
            there_before = await self._study_is_there(header) and (
                known or await self._orthanc.holds_instance(ours)
            )
            await journal.will_store(caller.gate.trail, access, ours, there_before=there_before)
            try:
                if not found:
                    stored = await self._store(file, known=known)
                else:
                    with TemporaryFile(dir=self._settings.spool_dir) as changed:
                        await anyio.to_thread.run_sync(rewrite, file, changed, scanned, changes)
                        stored = await self._store(changed, known=known)
            except (Unavailable, sa.exc.SQLAlchemyError, OSError, asyncio.CancelledError):
                # It may be stored all the same, now or soon.
                journal.leave(access, caller.gate.trail.unsettled)
                raise
        if found and not stored.new:
            warnings = ["The archive keeps the file as it first came; nothing was rewritten."]
        try:
            self._check_ids(header, stored)
            kept = Kept(header, stored, came.sha256, described)
            await self._links.link(caller.gate.database, Link(access, kept, found))
        except BaseException as error:
            await access.session.rollback()
            await self._take_back(caller, access, stored)
            if isinstance(error, sa.exc.IntegrityError):
                raise Conflict(
                    "The study was changed or deleted at the same moment. Nothing was kept "
                    "of this file; send it again."
                ) from error
            raise
        return Receipt(
            status="uploaded" if stored.new else "duplicate",
            header=header,
            stored=stored,
            patient_id=access.patient.id,
            order_id=access.order.id if access.order else None,
            coerced=found if stored.new else {},
            warnings=tuple(warnings),
        )

    async def _store(self, file: BinaryIO, *, known: bool) -> Stored:
        """Store a file, or find that Orthanc has it already.

        Raises Conflict where it has other bytes under the same UIDs, which it keeps, and which
        must not be shown as this file. (A `known` file may have been coerced when it first came.)
        """
        stored = await self._orthanc.store(file, _rewind(file))
        if stored.new or known:
            return stored
        md5 = await anyio.to_thread.run_sync(digest_of, file, "md5")
        if await self._orthanc.instance_md5(stored.instance_id) != md5:
            raise Conflict(
                "The image archive holds other content under the file's SOPInstanceUID. Nothing "
                "was stored. A changed image needs a SOPInstanceUID of its own (PS3.3 C.12.1.1)."
            )
        return stored

    async def _admit(self, caller: RoleAccess, header: Header, target: Target) -> PatientAccess:
        """The access to the patient the file is for."""
        if target.order_id is not None:
            access = await caller.admit(Subject.ORDER, target.order_id)
            if target.patient_id is not None and access.patient.id != target.patient_id:
                raise Conflict("The order and the patient that were named don't belong together.")
            if access.order is not None and access.order.status == OrderStatus.CANCELLED:
                raise Conflict("The order is cancelled; no images can be added to it.")
            return access
        if target.patient_id is not None:
            return await caller.admit(Subject.PATIENT, target.patient_id)
        unnamed = "Name the `order_id` or the `patient_id` that the file belongs to."
        if header.patient is None:
            raise Unprocessable(
                f"The file has no PatientID, and no order or patient was named. {unnamed}"
            )
        issuer = header.patient.issuer or self._settings.assigning_authority
        found = (
            await caller.session.exec(
                select(Patient.id).where(
                    Patient.mrn == header.patient.value, Patient.mrn_issuer == issuer
                )
            )
        ).first()
        if found is not None:
            # A PatientID can be guessed: a patient of others is refused as an unknown one is.
            with suppress(Denial):
                return await caller.admit(Subject.PATIENT, found)
        else:
            await caller.unknown({"PatientID": str(header.patient)})
        raise NotFound(f"No patient here has the file's PatientID {header.patient}. {unnamed}")

    async def _study_is_there(self, header: Header) -> bool:
        """Does the archive hold the study? One owner a UID, as far as it knows: raises Conflict
        where it holds it under another PatientID."""
        uid = header.study_instance_uid
        owners = await self._orthanc.owners(uid)
        if any(owner != _orthanc_ids(header)[0] for owner in owners):
            raise Conflict(
                "The image archive already holds this StudyInstanceUID under another PatientID. "
                "Nothing was stored; a radiology administrator must decide whose it is."
            )
        return bool(owners)

    def _check_ids(self, header: Header, stored: Stored) -> None:
        """Orthanc must have filed the instance where its identifiers say, or we don't link it."""
        if (stored.study_id, stored.series_id, stored.instance_id) != _orthanc_ids(header):
            raise Conflict(
                "The image archive read other identifiers in this file than Lightbox did, so it "
                "is not safe to keep. Nothing was stored."
            )

    async def _take_back(self, caller: RoleAccess, access: PatientAccess, stored: Stored) -> None:
        """Undo a store whose link failed, unless somebody else linked the instance meanwhile."""
        if not stored.new:
            return
        with anyio.CancelScope(shield=True):
            try:
                await journal.take_back(caller.gate.database, self._orthanc, stored.instance_id)
            except (LightboxError, sa.exc.SQLAlchemyError):
                # It is linked to nothing and so shown to nobody until it is taken back.
                logger.error("instance %s could not be taken back yet", stored.instance_id)
                journal.leave(access, caller.gate.trail.unsettled)


def _orthanc_ids(header: Header) -> tuple[str, str, str]:
    """Of study, series and instance, as Orthanc makes them of the identifiers."""
    parts = [patient_id_of(header), header.study_instance_uid, header.series_instance_uid]
    return (
        orthanc_id(*parts[:2]),
        orthanc_id(*parts),
        orthanc_id(*parts, header.sop_instance_uid),
    )


def refuse_wide_big_endian(file: BinaryIO, scanned: Scan) -> None:
    """Raises Unprocessable for big endian samples of more than 16 bits.

    Orthanc 1.10 hands them out with each 16 bits swapped instead of each sample: a
    plausible, wrong picture. Explicit VR Big Endian is retired (PS3.5 A.3); nothing is lost.
    """
    bits = scanned.element(tag_for_keyword("BitsAllocated") or 0)
    if scanned.little_endian or bits is None or bits.end - bits.value != 2:
        return
    source = scanned.source(file)
    source.seek(bits.value)
    allocated = int.from_bytes(source.read(2), "big")
    if allocated > 16:
        raise Unprocessable(
            f"The file is in Explicit VR Big Endian with {allocated} bits a sample, which the "
            "image archive would show wrongly. Nothing was stored; convert it to little endian."
        )


def _former_identity(file: BinaryIO, scanned: Scan) -> dict[str, dict[str, str]]:
    """What else the file says of who the patient was, to be emptied."""
    there = [
        keyword
        for keyword in identity.FORMER_IDENTITY
        if (element := scanned.element(tag_for_keyword(keyword) or 0)) is not None
        and element.end > element.value
    ]
    tags = read_tags(file, scanned) if there else {}
    return {keyword: {"file": _text(tags.get(keyword)), "expected": ""} for keyword in there}


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _subject(access: PatientAccess) -> tuple[Subject, UUID]:
    if access.order is not None:
        return Subject.ORDER, access.order.id
    return Subject.PATIENT, access.patient.id


def digest_of(file: BinaryIO, algorithm: str) -> str:
    """Of the whole file, in hexadecimal. MD5 only to compare with what Orthanc says."""
    file.seek(0)
    digest = hashlib.new(algorithm, usedforsecurity=False)
    while chunk := file.read(CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def _rewind(file: BinaryIO) -> int:
    """The file's size in bytes; leaves it at the start."""
    size = file.seek(0, 2)
    file.seek(0)
    return size
