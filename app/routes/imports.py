"""Imports: many files over a line that may break. See imports.md; files are sent by tus 1.0.0."""

from contextlib import AbstractContextManager
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any
from uuid import UUID

import anyio.to_thread
import sqlalchemy as sa
from fastapi import Depends, Path, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field
from sqlmodel import col, select
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from app.access import Caller, RoleAccess, Subject
from app.audit import Action
from app.errors import Conflict, Forbidden, NotFound, TooLarge, Unprocessable
from app.identity import Role
from app.imports import Imports, Key, counts, principal_json, tus, watch
from app.imports.events import Streams, shown
from app.models import FileState, Import, ImportFile, ImportState
from app.routes.paging import Cursor, Limit, link_next, read_cursor, time_cursor
from app.routing import AccessRouter
from app.settings import Settings

router = AccessRouter(prefix="/api/v1/dicom/imports", tags=["imports"])

Read = Annotated[RoleAccess, Depends(Caller(Action.IMPORT_READ), scope="function")]
Write = Annotated[RoleAccess, Depends(Caller(Action.IMPORT_WRITE), scope="function")]
Cancel = Annotated[RoleAccess, Depends(Caller(Action.IMPORT_CANCEL), scope="function")]
Number = Annotated[int, Path(ge=1, le=2**31 - 1)]

MOST_FILES = 100_000
NO_SUCH_IMPORT = "You have no import of this id."
NO_SUCH_FILE = "The import has no file of this number."

_BYTES: dict[str, Any] = {
    "requestBody": {
        "content": {tus.CONTENT_TYPE: {"schema": {"type": "string", "format": "binary"}}}
    }
}


def _header(name: str, text: str, *, required: bool = True) -> dict[str, Any]:
    schema = {"type": "string"}
    return {"name": name, "in": "header", "required": required, "description": text} | {
        "schema": schema
    }


_TUS = _header("Tus-Resumable", "`1.0.0`")
_CREATION: dict[str, Any] = {
    **_BYTES,
    "parameters": [
        _TUS,
        _header("Upload-Length", "The size of the file in bytes."),
        _header("Upload-Metadata", "`filename` and `sha256`, each in base64."),
    ],
}
_PATCH: dict[str, Any] = {
    **_BYTES,
    "parameters": [_TUS, _header("Upload-Offset", "Where in the file the bytes begin.")],
}


class Whose(StrEnum):
    OWN = "own"
    ALL = "all"


class ImportIn(BaseModel):
    """`file_count` files are going to be sent, each content once, an archive counted as one."""

    file_count: int = Field(ge=1, le=MOST_FILES)
    order_id: UUID | None = None
    patient_id: UUID | None = None
    key: str = Field(
        default="",
        pattern=r"^[A-Za-z0-9._:+=@-]{0,64}$",
        description="Your own name for it. Made again with the same one while it is open, it is "
        "the same import.",
    )


class FileOut(BaseModel):
    """A file; `entry` is 0, or its place in the archive that is file `number`."""

    number: int
    entry: int
    filename: str
    size: int
    sha256: str
    state: FileState
    duplicate: bool
    study_instance_uid: str
    sop_instance_uid: str
    warnings: list[str]
    error: str | None
    error_status: int | None
    error_type: str | None
    changed_at: datetime


class ImportOut(BaseModel):
    """An import, and how many files are in each state. Whom it is for, and its files, are shown to
    who made it and to nobody else."""

    id: UUID
    sub: str
    state: ImportState
    reason: str
    file_count: int
    counts: dict[FileState, int]
    created_at: datetime
    fed_at: datetime
    ended_at: datetime | None
    key: str | None = None
    order_id: UUID | None = None
    patient_id: UUID | None = None
    files: list[FileOut] | None = None


def _imports(request: Request) -> Imports:
    found: Imports = request.app.state.imports
    return found


@router.post("", status_code=202, response_model_exclude_unset=True)
async def make_import(
    access: Write, request: Request, response: Response, body: ImportIn
) -> ImportOut:
    """Begin an import. Its files are sent to `/files` below the address in `Location`.

    403, 404 and 409 where a named order or patient takes no files of yours; each file is decided
    about again when it is taken in.
    """
    if body.order_id is not None:
        admitted = await access.admit(Subject.ORDER, body.order_id, Action.STUDY_UPLOAD)
        if body.patient_id not in (None, admitted.patient.id):
            raise Conflict("The order and the patient that were named don't belong together.")
    elif body.patient_id is not None:
        await access.admit(Subject.PATIENT, body.patient_id, Action.STUDY_UPLOAD)
    await access.session.commit()  # only read so far
    principal = access.principal
    made = await _imports(request).rows.create(
        Import(
            actor=principal.sub,
            principal=principal_json(principal),
            client_address=access.origin.client_address,
            key=body.key,
            order_id=body.order_id,
            patient_id=body.patient_id,
            file_count=body.file_count,
        )
    )
    response.headers["Location"] = f"{request.url.path}/{made.id}"
    found = await _imports(request).rows.counts(made.id)
    await access.done(detail={"import_id": str(made.id), "file_count": made.file_count})
    return _shown(made, found, in_full=True)


@router.get("", response_model_exclude_unset=True)
async def list_imports(
    access: Read,
    request: Request,
    response: Response,
    whose: Annotated[Whose, Query(description="`all` is for administrators.")] = Whose.OWN,
    state: ImportState | None = None,
    limit: Limit = 50,
    cursor: Cursor = "",
) -> list[ImportOut]:
    """Imports, newest first. Of others an administrator sees counts, and nothing of patients."""
    query = select(Import)
    if whose is Whose.OWN:
        query = query.where(Import.actor == access.principal.sub)
    elif Role.ADMIN not in access.principal.roles:
        raise Forbidden("Only administrators see other people's imports.")
    if state is not None:
        query = query.where(Import.state == state.value)
    if cursor:
        at, import_id = _read_key(cursor)
        query = query.where(
            sa.tuple_(col(Import.created_at), col(Import.id))
            < sa.tuple_(sa.literal(at, Import.created_at.type), sa.literal(import_id, sa.Uuid()))  # type: ignore[attr-defined]
        )
    query = query.order_by(col(Import.created_at).desc(), col(Import.id).desc())
    found = (await access.session.exec(query.limit(limit + 1))).all()
    page = found[:limit]
    last = f"{page[-1].created_at.isoformat()} {page[-1].id}" if len(found) > limit else None
    link_next(request, response, last)
    in_each = await counts(access.session, [each.id for each in page])
    own = access.principal.sub
    return [_shown(each, in_each.get(each.id, {}), in_full=each.actor == own) for each in page]


@router.get("/{import_id}", response_model_exclude_unset=True)
async def show_import(
    access: Read,
    import_id: UUID,
    request: Request,
    response: Response,
    state: FileState | None = None,
    limit: Limit = 50,
    cursor: Cursor = "",
) -> ImportOut:
    """One import with a page of its files, by number; `state` filters them."""
    found = await _find(access, import_id, overseen=True)
    in_each = (await counts(access.session, [import_id])).get(import_id, {})
    if found.actor != access.principal.sub:
        return _shown(found, in_each, in_full=False)
    query = select(ImportFile).where(ImportFile.import_id == import_id)
    if state is not None:
        query = query.where(ImportFile.state == state.value)
    order = (col(ImportFile.number), col(ImportFile.entry))
    if cursor:
        query = query.where(sa.tuple_(*order) > _read_place(cursor))
    files = (await access.session.exec(query.order_by(*order).limit(limit + 1))).all()
    page = files[:limit]
    link_next(
        request,
        response,
        f"{page[-1].number} {page[-1].entry}" if len(files) > limit else None,
    )
    return _shown(found, in_each, in_full=True, files=page)


class _Stream(StreamingResponse):
    """Counted from its first byte to its end, however it ends; one too many is refused before."""

    def __init__(self, counted: AbstractContextManager[None], *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._counted = counted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._counted:
            await super().__call__(scope, receive, send)


@router.get("/{import_id}/events", response_class=StreamingResponse)
async def watch_import(access: Read, import_id: UUID, request: Request) -> StreamingResponse:
    """Progress as server-sent events: `file`, `progress`, and at the end `done`. Where it ends
    without that, come again with `Last-Event-ID`."""
    await _find(access, import_id)
    last = request.headers.get("last-event-id", "0")
    if not (last.isascii() and last.isdigit() and len(last) < 16):
        raise Unprocessable("`Last-Event-ID` is not one that this API gave.")
    streams: Streams = request.app.state.import_streams
    return _Stream(
        streams.one(access.principal.sub),
        watch(access.gate.database, import_id, int(last)),
        media_type="text/event-stream",
        headers={"X-Accel-Buffering": "no"},  # to nginx: each event as it comes
    )


@router.delete("/{import_id}", status_code=204)
async def cancel_import(access: Cancel, import_id: UUID, request: Request) -> None:
    """Cancel an import: one's own; an administrator, anybody's. What is linked stays linked. Safe
    to repeat."""
    found = await _find(access, import_id, overseen=True)
    await access.session.commit()  # only read so far
    said = f"Cancelled by {access.principal.sub}."
    ended = await _imports(request).end(import_id, ImportState.CANCELLED, said)
    detail = {"import_id": str(import_id), "owner": found.actor, "ended": ended}
    await access.done(detail=detail)


@router.post(
    "/{import_id}/files", status_code=201, openapi_extra=_CREATION, response_class=Response
)
async def announce_file(access: Write, import_id: UUID, request: Request) -> Response:
    """A file that is going to be sent (tus creation), or is in the body as far as it gets (tus
    creation-with-upload). The same content again is the same file, at the offset it has got to."""
    _speak_tus(request)
    file = tus.announced(request.headers)
    imports = _imports(request)
    _refuse_large(request, file.size)
    await _find(access, import_id)
    await access.session.commit()  # only read so far
    most = imports.settings.import_spool_bytes
    row = await imports.rows.announce(import_id, access.principal, file, most)
    if tus.has_bytes(request.headers) and row.state == FileState.RECEIVING:
        offset = await _offset(imports, row)
        if offset == 0:
            await _receive(imports, row, 0, request)
    row = await imports.settle(row)
    location = f"{request.url.path}/{row.number}"
    return Response(status_code=201, headers=await _headers(imports, row, location))


@router.get("/{import_id}/files/{number}")
async def show_file(
    access: Read, import_id: UUID, number: Number, request: Request, response: Response
) -> FileOut:
    """A file that was sent; by HEAD, how much of it is here (tus `Upload-Offset`)."""
    row = await _file(access, import_id, number)
    imports = _imports(request)
    row = await imports.settle(row)
    for name, value in (await _headers(imports, row)).items():
        response.headers[name] = value
    return FileOut.model_validate(shown(row))


@router.patch(
    "/{import_id}/files/{number}", status_code=204, openapi_extra=_PATCH, response_class=Response
)
async def send_bytes(access: Write, import_id: UUID, number: Number, request: Request) -> Response:
    """More of a file (tus core). 409 where `Upload-Offset` is not how much of it is here."""
    _speak_tus(request)
    offset = tus.offset(request.headers)
    imports = _imports(request)
    row = await _file(access, import_id, number)
    if row.state == FileState.RECEIVING:
        await imports.rows.feed(import_id, access.principal)
        await _receive(imports, row, offset, request)
        row = await imports.settle(row)
    elif offset != row.size:
        raise Conflict(f"`Upload-Offset` must be {row.size}: all of the file is here.")
    return Response(status_code=204, headers=await _headers(imports, row))


@router.delete("/{import_id}/files/{number}", status_code=204, response_class=Response)
async def forget_file(access: Write, import_id: UUID, number: Number, request: Request) -> Response:
    """Throw away a file that has not come whole (tus termination)."""
    _speak_tus(request)
    row = await _file(access, import_id, number)
    imports = _imports(request)
    if not await imports.rows.forget(Key(import_id, number)):
        raise Conflict(f"The file is {row.state}; only one that has not come whole can be removed.")
    await anyio.to_thread.run_sync(imports.spool.remove, import_id, number)
    return Response(status_code=204, headers={"Tus-Resumable": tus.VERSION})


async def _receive(imports: Imports, row: ImportFile, offset: int, request: Request) -> None:
    """Add the body to the file, each piece as it comes. What came before a break stays. Raises
    Conflict, TooLarge, ClientDisconnect."""
    run = anyio.to_thread.run_sync
    writing = imports.spool.writing(row.import_id, row.number)
    file = await run(writing.__enter__)
    try:
        here = await _offset(imports, row)
        if here != offset:
            raise Conflict(f"`Upload-Offset` must be {here}: so much of the file is here.")
        async for chunk in request.stream():
            here += len(chunk)
            if here > row.size:
                raise TooLarge(f"More came than the {row.size} bytes that were announced.")
            if chunk:
                await run(file.write, chunk)
    finally:
        await run(writing.__exit__, None, None, None)


async def _offset(imports: Imports, row: ImportFile) -> int:
    return await anyio.to_thread.run_sync(imports.spool.offset, row.import_id, row.number)


async def _headers(imports: Imports, row: ImportFile, location: str = "") -> dict[str, str]:
    """How much of a file is here, as tus says it."""
    here = await _offset(imports, row) if row.state == FileState.RECEIVING else row.size
    return {
        "Tus-Resumable": tus.VERSION,
        "Upload-Offset": str(here),
        "Upload-Length": str(row.size),
        "Cache-Control": "no-store",
        **({"Location": location} if location else {}),
    }


async def _find(access: RoleAccess, import_id: UUID, *, overseen: bool = False) -> Import:
    """The caller's own import; with `overseen`, anybody's to an administrator. Raises NotFound,
    on record: one of others is as one that isn't there."""
    found = await access.session.get(Import, import_id)
    admin = overseen and Role.ADMIN in access.principal.roles
    if found is None or not (found.actor == access.principal.sub or admin):
        await access.session.rollback()
        await access.unknown({"import_id": str(import_id)})
        raise NotFound(NO_SUCH_IMPORT)
    return found


async def _file(access: RoleAccess, import_id: UUID, number: int) -> ImportFile:
    """A file that was sent to the caller's own import. Raises NotFound."""
    await _find(access, import_id)
    row = await access.session.get(ImportFile, (import_id, number, 0))
    await access.session.commit()  # only read so far
    if row is None:
        raise NotFound(NO_SUCH_FILE)
    return row


def _speak_tus(request: Request) -> None:
    if not tus.speaks(request.headers):
        headers = {"Tus-Version": tus.VERSION, "Tus-Extension": tus.EXTENSIONS}
        raise HTTPException(status_code=412, headers=headers)


def _refuse_large(request: Request, size: int) -> None:
    settings: Settings = request.app.state.settings
    most = min(settings.max_upload_bytes, settings.import_spool_bytes)
    if size > most:
        raise TooLarge(f"The file is larger than the limit of {most} bytes.")


def _shown(
    found: Import,
    in_each: dict[str, int],
    *,
    in_full: bool,
    files: Any = None,
) -> ImportOut:
    more: dict[str, Any] = {}
    if in_full:
        more = {"key": found.key, "order_id": found.order_id, "patient_id": found.patient_id}
    if files is not None:
        more["files"] = [FileOut.model_validate(shown(each)) for each in files]
    return ImportOut(
        id=found.id,
        sub=found.actor,
        state=ImportState(found.state),
        reason=found.reason,
        file_count=found.file_count,
        counts={FileState(state): count for state, count in in_each.items()},
        created_at=found.created_at,
        fed_at=found.fed_at,
        ended_at=found.ended_at,
        **more,
    )


def _read_key(cursor: str) -> tuple[datetime, UUID]:
    at, import_id = time_cursor(cursor)
    try:
        return at, UUID(import_id)
    except ValueError as error:
        raise Unprocessable("`cursor` is not one that this API gave.") from error


def _read_place(cursor: str) -> tuple[int, int]:
    number, _, entry = read_cursor(cursor).partition(" ")
    if not (number.isdecimal() and entry.isdecimal() and len(cursor) < 40):
        raise Unprocessable("`cursor` is not one that this API gave.")
    return int(number), int(entry)
