"""Files on their way in: bounded, read, held against the order's patient, stored, linked.

The order of things is the safety: nothing parses a file before `dicom.scan` has bounded it,
nothing reaches Orthanc before the patient agrees, and nothing is linked that Orthanc didn't take.
Each file is a transaction of its own, committed here (the named exception to "the edge commits"):
if the link can't be committed, what Orthanc newly stored is taken back.
"""

import hashlib
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from tempfile import TemporaryFile
from typing import Any, BinaryIO
from uuid import UUID

import anyio.to_thread
import sqlalchemy as sa
from pydicom import Dataset
from pydicom.datadict import tag_for_keyword
from sqlmodel import col, select

from app.access import Denial, PatientAccess, RoleAccess, Subject
from app.audit import Action
from app.db import insert_if_absent
from app.dicom import (
    Header,
    Limits,
    PatientIdentifier,
    Scan,
    orthanc_id,
    person_name,
    read_header,
    rewrite,
    scan,
)
from app.errors import Conflict, LightboxError, NotFound, PatientMismatch, Unprocessable
from app.models import Instance, Order, OrderStatus, OrderStudy, Patient, Series, Study
from app.orthanc import Orthanc, Stored
from app.settings import Settings

CHUNK_BYTES = 1024 * 1024

logger = logging.getLogger(__name__)

Differences = Mapping[str, Mapping[str, str]]
"""`{keyword: {"file": value in the file, "expected": value of patient or order}}`."""


@dataclass(frozen=True)
class Target:
    """What the sender said the file belongs to. Neither: its PatientID decides."""

    order_id: UUID | None = None
    patient_id: UUID | None = None
    coerce: bool = False


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


class Intake:
    """Takes files in. One per app."""

    def __init__(self, settings: Settings, orthanc: Orthanc) -> None:
        self._settings = settings
        self._orthanc = orthanc
        self.limits = Limits(
            max_bytes=settings.max_upload_bytes,
            max_depth=settings.max_sequence_depth,
            max_elements=settings.max_elements,
        )

    def scan(self, file: BinaryIO) -> Scan:
        """Bound a file before anything parses it. Blocking; raises as `dicom.scan` does."""
        return scan(file, self.limits, spool_dir=self._settings.spool_dir)

    async def take(self, caller: RoleAccess, file: BinaryIO, target: Target) -> Receipt:
        """Take one file in and link it.

        Raises NotDicom, TooLarge, Unprocessable for the file; PatientMismatch, Conflict where it
        contradicts what is known; NotFound, Forbidden for the target; OrthancUnavailable. After
        any of them nothing is stored and nothing is linked.
        """
        with await anyio.to_thread.run_sync(self.scan, file) as scanned:
            header = await anyio.to_thread.run_sync(read_header, file, scanned)
            await anyio.to_thread.run_sync(_refuse_wide_big_endian, file, scanned)
            access = await self._admit(caller, header, target)
            differences = self._differences(access, header, fill=target.coerce)
            if differences and not target.coerce:
                _refuse_differences(access, header, differences)
            changes = Dataset()
            if differences:
                # A right of its own: who may upload may not therefore change identities.
                access = await caller.admit(*_subject(access), action=Action.STUDY_COERCE)
                changes, header = _coercion(access, header, differences)
            digest = await anyio.to_thread.run_sync(_sha256, file)
            await self._refuse_taken_uids(access, header, digest)
            if not differences:
                size = await anyio.to_thread.run_sync(_rewind, file)
                stored = await self._orthanc.store(file, size)
            else:
                with TemporaryFile(dir=self._settings.spool_dir) as changed:
                    await anyio.to_thread.run_sync(rewrite, file, changed, scanned, changes)
                    size = await anyio.to_thread.run_sync(_rewind, changed)
                    stored = await self._orthanc.store(changed, size)
            try:
                self._check_ids(header, stored)
                await _link(access, header, stored, digest, differences)
                if not stored.new and not await self._orthanc.holds_instance(stored.instance_id):
                    # Another upload of it failed, and took it back while we relied on it.
                    raise Conflict("The same file was refused at the same moment; send it again.")
                await access.session.commit()
            except BaseException as error:
                await access.session.rollback()
                await self._take_back(access, stored)
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
            coerced=differences if stored.new else {},
            warnings=_warnings(access.patient, header),
        )

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

    def _differences(self, access: PatientAccess, header: Header, *, fill: bool) -> Differences:
        """Where the file's identifiers contradict the patient's and the order's.

        Empty when PatientID, its issuer (where the file has one) and the accession number (where
        the file has one) agree. The demographics that go with an identifier differ with it; alone
        they are only warned about. `fill` counts an absent accession number as a difference.
        """
        patient, order = access.patient, access.order
        ours = PatientIdentifier(patient.mrn, patient.mrn_issuer)
        theirs = header.patient
        pairs: dict[str, tuple[str, str]] = {}
        if theirs is None or theirs.value != ours.value or theirs.issuer not in ("", ours.issuer):
            pairs = {
                "PatientID": (theirs.value if theirs else "", ours.value),
                "IssuerOfPatientID": (theirs.issuer if theirs else "", ours.issuer),
                "PatientName": (
                    header.patient_name,
                    person_name(patient.last_name, patient.first_name),
                ),
                "PatientBirthDate": (header.patient_birth_date, patient.dob.strftime("%Y%m%d")),
                "PatientSex": (header.patient_sex, patient.sex),
            }
        if order is not None and (header.accession_number or fill):
            pairs["AccessionNumber"] = (header.accession_number, order.accession_number)
        return {
            keyword: {"file": file, "expected": expected}
            for keyword, (file, expected) in pairs.items()
            if file != expected
        }

    async def _refuse_taken_uids(self, access: PatientAccess, header: Header, digest: str) -> None:
        """One owner a UID. Raises Conflict."""
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
        ours = orthanc_id(_patient_id(header), uid)
        if any(owner != ours for owner in await self._orthanc.owners(uid)):
            raise Conflict(
                "The image archive already holds this StudyInstanceUID under another PatientID. "
                "Nothing was stored; a radiology administrator must decide whose it is."
            )

    def _check_ids(self, header: Header, stored: Stored) -> None:
        """Orthanc must have filed the instance where its identifiers say, or we don't link it."""
        parts = [_patient_id(header), header.study_instance_uid, header.series_instance_uid]
        expected = (
            orthanc_id(*parts[:2]),
            orthanc_id(*parts),
            orthanc_id(*parts, header.sop_instance_uid),
        )
        if (stored.study_id, stored.series_id, stored.instance_id) != expected:
            raise Conflict(
                "The image archive read other identifiers in this file than Lightbox did, so it "
                "is not safe to keep. Nothing was stored."
            )

    async def _take_back(self, access: PatientAccess, stored: Stored) -> None:
        """Undo a store whose link failed, unless somebody else linked the instance meanwhile."""
        if not stored.new:
            return
        with anyio.CancelScope(shield=True):
            try:
                linked = await access.session.scalar(
                    sa.select(sa.func.count())
                    .select_from(Instance)
                    .where(col(Instance.orthanc_id) == stored.instance_id)
                )
                if not linked:
                    await self._orthanc.delete_instance(stored.instance_id)
            except (LightboxError, sa.exc.SQLAlchemyError):
                # It stays in Orthanc, linked to nothing and so shown to nobody.
                logger.error("instance %s could not be taken back", stored.instance_id)


async def _link(
    access: PatientAccess,
    header: Header,
    stored: Stored,
    digest: str,
    differences: Differences,
) -> None:
    """Write study, series, instance, link and record. Raises Conflict if another was faster."""
    session, uid = access.session, header.study_instance_uid
    await session.exec(
        insert_if_absent(
            session,
            Study,
            study_instance_uid=uid,
            patient_id=access.patient.id,
            orthanc_id=stored.study_id,
            dicom_patient_id=_patient_id(header),
            patient_name=header.patient_name,
            patient_birth_date=header.patient_birth_date,
            patient_sex=header.patient_sex,
            study_date=header.study_date,
            study_time=header.study_time,
            study_description=header.study_description,
            accession_number=header.accession_number,
        )
    )
    await session.exec(
        insert_if_absent(
            session,
            Series,
            series_instance_uid=header.series_instance_uid,
            study_instance_uid=uid,
            modality=header.modality,
            series_number=header.series_number,
            series_description=header.series_description,
        )
    )
    await session.exec(
        insert_if_absent(
            session,
            Instance,
            sop_instance_uid=header.sop_instance_uid,
            series_instance_uid=header.series_instance_uid,
            study_instance_uid=uid,
            orthanc_id=stored.instance_id,
            sop_class_uid=header.sop_class_uid,
            transfer_syntax_uid=header.transfer_syntax_uid,
            number_of_frames=header.number_of_frames,
            received_sha256=digest,
            received_by=access.principal.sub,
        )
    )
    study = await session.get(Study, uid, populate_existing=True)
    series = await session.get(Series, header.series_instance_uid, populate_existing=True)
    instance = await session.get(Instance, header.sop_instance_uid, populate_existing=True)
    if (
        study is None
        or series is None
        or instance is None
        or study.patient_id != access.patient.id
        or series.study_instance_uid != uid
        or instance.orthanc_id != stored.instance_id
    ):
        raise Conflict(
            "The same UIDs were stored for another patient or study at the same moment. "
            "Nothing was kept of this file."
        )
    if access.order is not None:
        await session.exec(
            insert_if_absent(
                session,
                OrderStudy,
                order_id=access.order.id,
                study_instance_uid=uid,
                linked_by=access.principal.sub,
            )
        )
    detail: dict[str, Any] = {
        "sop_instance_uid": header.sop_instance_uid,
        "received_sha256": digest,
        "duplicate": not stored.new,
    }
    if differences and stored.new:
        detail["coerced"] = differences
    await access.done(study_instance_uid=uid, detail=detail)


def _refuse_wide_big_endian(file: BinaryIO, scanned: Scan) -> None:
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


def _subject(access: PatientAccess) -> tuple[Subject, UUID]:
    if access.order is not None:
        return Subject.ORDER, access.order.id
    return Subject.PATIENT, access.patient.id


def _refuse_differences(access: PatientAccess, header: Header, differences: Differences) -> None:
    """Raises PatientMismatch or Conflict, showing both sides: the file's and what was expected."""
    mend = (
        "Nothing was stored. Send it to the right order, or, if it really is this patient's, a "
        "technologist or radiologist may send it with `coerce_patient=true`."
    )
    extra = {"differences": differences}
    if differences.keys() & {"PatientID", "IssuerOfPatientID"}:
        ours = PatientIdentifier(access.patient.mrn, access.patient.mrn_issuer)
        theirs = f"PatientID {header.patient}" if header.patient else "no PatientID"
        raise PatientMismatch(
            f"The file has {theirs}, the patient here {ours}. {mend}", extra=extra
        )
    numbers = differences["AccessionNumber"]
    raise Conflict(
        f"The file has AccessionNumber {numbers['file']}, the order {numbers['expected']}. {mend}",
        extra=extra,
    )


def _coercion(
    access: PatientAccess, header: Header, differences: Differences
) -> tuple[Dataset, Header]:
    """The elements to rewrite, and the header as it will be."""
    changes = Dataset()
    for keyword, each in differences.items():
        setattr(changes, keyword, each["expected"])
    fields: dict[str, Any] = {
        name: differences[keyword]["expected"]
        for name, keyword in {
            "patient_name": "PatientName",
            "patient_birth_date": "PatientBirthDate",
            "patient_sex": "PatientSex",
            "accession_number": "AccessionNumber",
        }.items()
        if keyword in differences
    }
    if differences.keys() & {"PatientID", "IssuerOfPatientID"}:
        patient = access.patient
        fields["patient"] = PatientIdentifier(patient.mrn, patient.mrn_issuer)
    return changes, replace(header, **fields)


def _warnings(patient: Patient, header: Header) -> tuple[str, ...]:
    """Differences that don't refuse a file whose identifier agrees, but that a human should see."""
    ours = {
        "PatientName": person_name(patient.last_name, patient.first_name).casefold(),
        "PatientBirthDate": patient.dob.strftime("%Y%m%d"),
        "PatientSex": patient.sex,
    }
    theirs = {
        "PatientName": header.patient_name.rstrip("^").casefold(),
        "PatientBirthDate": header.patient_birth_date,
        "PatientSex": header.patient_sex,
    }
    warnings = [
        f"The file's {keyword} differs from the patient's."
        for keyword, value in theirs.items()
        if value and ours[keyword] and value != ours[keyword]
    ]
    if not header.meta_agrees:
        warnings.append(
            "The file meta information names another SOP instance or class than the dataset, "
            "which alone was used."
        )
    return tuple(warnings)


def _patient_id(header: Header) -> str:
    return header.patient.value if header.patient else ""


def _sha256(file: BinaryIO) -> str:
    file.seek(0)
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def _rewind(file: BinaryIO) -> int:
    """The file's size in bytes; leaves it at the start."""
    size = file.seek(0, 2)
    file.seek(0)
    return size
