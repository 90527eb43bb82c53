"""Files that come in: upload, upload-multiple, read-tags, modify-tags."""

import json
import logging
from collections.abc import Iterator
from tempfile import TemporaryFile
from typing import Annotated, Any, BinaryIO
from uuid import UUID

import anyio.to_thread
import sqlalchemy as sa
from fastapi import Depends, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.background import BackgroundTask
from starlette.datastructures import FormData, UploadFile

from app.access import Caller, RoleAccess
from app.audit import Action
from app.dicom import changes_from_json, read_tags, rewrite
from app.errors import DatabaseUnavailable, LightboxError, Unprocessable
from app.intake import Intake, Receipt, Target, archives
from app.intake.archives import ZipLimits
from app.routes.forms import files_of, flag_of, form_schema, multipart_form, text_of, uuid_of
from app.routing import AccessRouter
from app.settings import Settings

router = AccessRouter(prefix="/api/v1/dicom", tags=["images"])

Upload = Annotated[
    RoleAccess, Depends(Caller(Action.STUDY_UPLOAD, patient_in_body=True), scope="function")
]
ReadTags = Annotated[RoleAccess, Depends(Caller(Action.TAGS_READ), scope="function")]
ModifyTags = Annotated[RoleAccess, Depends(Caller(Action.TAGS_MODIFY), scope="function")]

CHUNK_BYTES = 256 * 1024
MAX_FILES = 2000

logger = logging.getLogger(__name__)

_TARGET_FIELDS: dict[str, Any] = {
    "order_id": {"type": "string", "format": "uuid"},
    "patient_id": {"type": "string", "format": "uuid"},
    "coerce_patient": {
        "type": "boolean",
        "default": False,
        "description": "Rewrite the file's identity to the order's patient and accession number.",
    },
}
_FILE = {"type": "string", "format": "binary"}


class Uploaded(BaseModel):
    """One file that is in the archive. `coerced` shows each rewritten value, file and expected;
    `warnings` what differs without being refused."""

    status: str
    study_instance_uid: str
    series_instance_uid: str
    sop_instance_uid: str
    orthanc_study_id: str
    orthanc_instance_id: str
    order_id: UUID | None
    patient_id: UUID
    coerced: dict[str, dict[str, str]]
    warnings: list[str]

    @classmethod
    def of(cls, receipt: Receipt) -> "Uploaded":
        return cls(
            status=receipt.status,
            study_instance_uid=receipt.header.study_instance_uid,
            series_instance_uid=receipt.header.series_instance_uid,
            sop_instance_uid=receipt.header.sop_instance_uid,
            orthanc_study_id=receipt.stored.study_id,
            orthanc_instance_id=receipt.stored.instance_id,
            order_id=receipt.order_id,
            patient_id=receipt.patient_id,
            coerced={keyword: dict(each) for keyword, each in receipt.coerced.items()},
            warnings=list(receipt.warnings),
        )


class FileResult(BaseModel):
    """One file of many: what `Uploaded` says, or why it was refused."""

    filename: str
    status: str  # "uploaded", "duplicate" or "failed"
    study_instance_uid: str | None = None
    series_instance_uid: str | None = None
    sop_instance_uid: str | None = None
    orthanc_study_id: str | None = None
    orthanc_instance_id: str | None = None
    order_id: UUID | None = None
    patient_id: UUID | None = None
    coerced: dict[str, dict[str, str]] = {}
    warnings: list[str] = []
    error: str | None = None
    error_status: int | None = None
    error_type: str | None = None


class UploadedMultiple(BaseModel):
    total_files: int
    successful: int
    failed: int
    results: list[FileResult]


class Tags(BaseModel):
    tags: dict[str, Any]


@router.post("/upload", openapi_extra=form_schema({"file": _FILE, **_TARGET_FIELDS}, ["file"]))
async def upload(caller: Upload, request: Request) -> Uploaded:
    """Store one DICOM file and link it to its order.

    415 not DICOM; 413 too large; 422 truncated, without UIDs or with bad values; 409 another
    patient's, another accession number, or UIDs that are taken. After any of them nothing is
    stored.
    """
    intake: Intake = request.app.state.intake
    async with multipart_form(request, intake.limits.max_bytes) as form:
        (file,) = files_of(form, "file")
        target = _target(form)
        return Uploaded.of(await intake.take(caller, file.file, target))


@router.post(
    "/upload-multiple",
    openapi_extra=form_schema(
        {"files": {"type": "array", "items": _FILE}, **_TARGET_FIELDS}, ["files"]
    ),
)
async def upload_multiple(caller: Upload, request: Request) -> UploadedMultiple:
    """Store many DICOM files and ZIPs of them: a result for each; a bad one stops no other."""
    intake: Intake = request.app.state.intake
    settings: Settings = request.app.state.settings
    limits = ZipLimits(settings.max_upload_bytes, settings.max_zip_files, settings.max_zip_ratio)
    results: list[FileResult] = []
    async with multipart_form(request, intake.limits.max_bytes, max_files=MAX_FILES) as form:
        target = _target(form)
        for each in files_of(form, "files"):
            name = _shown_name(each)
            if not await anyio.to_thread.run_sync(archives.is_zip, each.file):
                results.append(await _take(caller, intake, name, each.file, target))
                continue
            unpacking = archives.entries(each.file, limits, settings.spool_dir)
            try:
                while entry := await anyio.to_thread.run_sync(next, unpacking, None):
                    entry_name = f"{name}/{entry.name}"
                    if entry.file is None:
                        assert entry.refusal is not None
                        results.append(_failed(entry_name, entry.refusal))
                    else:
                        results.append(await _take(caller, intake, entry_name, entry.file, target))
            except LightboxError as error:
                results.append(_failed(name, error))
            finally:
                unpacking.close()
    failed = sum(each.status == "failed" for each in results)
    return UploadedMultiple(
        total_files=len(results), successful=len(results) - failed, failed=failed, results=results
    )


@router.post("/read-tags", openapi_extra=form_schema({"file": _FILE}, ["file"]))
async def read_file_tags(caller: ReadTags, request: Request) -> Tags:
    """The tags of a DICOM file by keyword. Nothing is stored."""
    intake: Intake = request.app.state.intake
    async with multipart_form(request, intake.limits.max_bytes) as form:
        (file,) = files_of(form, "file")

        def read() -> dict[str, Any]:
            with intake.scan(file.file) as scanned:
                return dict(read_tags(file.file, scanned))

        return Tags(tags=await anyio.to_thread.run_sync(read))


@router.post(
    "/modify-tags",
    openapi_extra=form_schema(
        {
            "file": _FILE,
            "tags": {
                "type": "string",
                "description": 'A JSON object: `{"StudyDescription": "..."}`',
            },
        },
        ["file", "tags"],
    ),
    response_class=StreamingResponse,
    responses={200: {"content": {"application/dicom": {}}}},
)
async def modify_file_tags(caller: ModifyTags, request: Request) -> StreamingResponse:
    """A copy of a DICOM file with tags changed. Nothing is stored."""
    intake: Intake = request.app.state.intake
    settings: Settings = request.app.state.settings
    async with multipart_form(request, intake.limits.max_bytes) as form:
        (file,) = files_of(form, "file")
        try:
            wanted = json.loads(text_of(form, "tags", "{}"))
        except (ValueError, RecursionError) as error:
            raise Unprocessable("The field `tags` must be a JSON object.") from error
        if not isinstance(wanted, dict) or not wanted:
            raise Unprocessable("The field `tags` must be a JSON object with at least one keyword.")
        # Closed when the answer has been sent.
        changed = TemporaryFile(dir=settings.spool_dir)  # noqa: SIM115

        def write() -> None:
            changes = changes_from_json(wanted)
            with intake.scan(file.file) as scanned:
                rewrite(file.file, changed, scanned, changes)
            changed.seek(0)

        try:
            await anyio.to_thread.run_sync(write)
            await caller.done(detail={"keywords": sorted(wanted)})
        except BaseException:
            changed.close()
            raise
    return StreamingResponse(
        _chunks(changed),
        media_type="application/dicom",
        headers={"Content-Disposition": 'attachment; filename="modified.dcm"'},
        background=BackgroundTask(changed.close),
    )


async def take_apart(
    caller: RoleAccess, intake: Intake, file: BinaryIO, target: Target
) -> Receipt | LightboxError:
    """One file of many, in a transaction and a record of its own; or what kept it out."""
    try:
        async with caller.apart() as each:
            return await intake.take(each, file, target)
    except LightboxError as error:
        return error
    except (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.TimeoutError):
        logger.exception("a file of many could not be taken in")
        return DatabaseUnavailable("The database does not answer. Send the file again.")
    except Exception:
        # Not foreseen; the files before it are stored, and their sender must learn that.
        logger.exception("a file of many could not be taken in")
        return LightboxError("Lightbox failed at this file; it was not linked.")


async def _take(
    caller: RoleAccess, intake: Intake, name: str, file: BinaryIO, target: Target
) -> FileResult:
    taken = await take_apart(caller, intake, file, target)
    if isinstance(taken, LightboxError):
        return _failed(name, taken)
    return FileResult(filename=name, **Uploaded.of(taken).model_dump())


def _failed(name: str, error: LightboxError) -> FileResult:
    return FileResult(
        filename=name,
        status="failed",
        error=error.detail,
        error_status=error.status,
        error_type=error.type,
    )


def _target(form: FormData) -> Target:
    return Target(
        order_id=uuid_of(form, "order_id"),
        patient_id=uuid_of(form, "patient_id"),
        coerce=flag_of(form, "coerce_patient"),
    )


def _shown_name(file: UploadFile) -> str:
    """The sender's name of the file, safe to show; it is never used as a path."""
    name = file.filename or "unnamed"
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)[:255]


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(CHUNK_BYTES):
        yield chunk
