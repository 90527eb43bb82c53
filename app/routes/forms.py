"""Multipart forms that hold files: parsed after the guard, bounded while they arrive.

FastAPI would read a whole body before it asked who sends it. Here the guard runs first; files go
to disk past 1 MB, and a body larger than the limit is given up while it comes.
"""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

from fastapi import Request
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from app.errors import TooLarge, Unprocessable
from app.settings import MEBIBYTE

_FORM_OVERHEAD_BYTES = MEBIBYTE  # part headers and the small fields


@asynccontextmanager
async def multipart_form(
    request: Request, max_bytes: int, *, max_files: int = 1
) -> AsyncIterator[FormData]:
    """The form of a request; its temporary files are gone when the block ends.

    Raises TooLarge, Unprocessable.
    """
    content_type = request.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() != "multipart/form-data":
        raise Unprocessable("Send the file as multipart/form-data.")
    body = bounded_body(request, max_bytes, " Nothing was stored.")
    parser = MultiPartParser(request.headers, body, max_files=max_files, max_fields=20)
    # What stays in memory of each file: of many, little.
    parser.spool_max_size = MEBIBYTE // max_files
    try:
        yield await _parsed(parser)
    finally:
        # All of them: a file whose part broke off is in no form.
        for file in parser._files_to_close_on_error:
            file.close()


async def bounded_body(
    request: Request, max_bytes: int, consequence: str = ""
) -> AsyncGenerator[bytes, None]:
    """A body with files, as it arrives; `max_bytes` without what stands around the files.

    `consequence` is said where it is larger. Raises TooLarge, ClientDisconnect.
    """
    limit = max_bytes + _FORM_OVERHEAD_BYTES
    too_large = TooLarge(f"The upload is larger than the limit of {max_bytes} bytes.{consequence}")
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and int(declared[:20]) > limit:
        raise too_large
    seen = 0
    async for chunk in request.stream():
        seen += len(chunk)
        if seen > limit:
            raise too_large
        yield chunk


async def _parsed(parser: MultiPartParser) -> FormData:
    try:
        return await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:
        raise Unprocessable(
            "The multipart body can't be read: " + getattr(error, "message", "no boundary.")
        ) from error
    except ClientDisconnect as error:
        raise Unprocessable("The upload broke off before its end. Nothing was stored.") from error


def files_of(form: FormData, name: str) -> list[UploadFile]:
    """The files under a field. Raises Unprocessable where there are none."""
    files = [each for each in form.getlist(name) if isinstance(each, UploadFile)]
    if not files:
        raise Unprocessable(f"The form has no file in the field `{name}`.")
    return files


def text_of(form: FormData, name: str, default: str = "") -> str:
    """A text field. Raises Unprocessable where it is a file, or given twice."""
    values = form.getlist(name)
    if len(values) > 1 or any(not isinstance(each, str) for each in values):
        raise Unprocessable(f"The field `{name}` must be one text.")
    return str(values[0]).strip() if values else default


def uuid_of(form: FormData, name: str) -> UUID | None:
    """A UUID field; None where it is absent or empty. Raises Unprocessable."""
    text = text_of(form, name)
    try:
        return UUID(text) if text else None
    except ValueError as error:
        raise Unprocessable(f"The field `{name}` must be a UUID.") from error


def flag_of(form: FormData, name: str) -> bool:
    """A yes-or-no field, no where it is absent. Raises Unprocessable."""
    text = text_of(form, name, "false").lower()
    if text not in ("true", "false", "1", "0", ""):
        raise Unprocessable(f"The field `{name}` must be `true` or `false`.")
    return text in ("true", "1")


def form_schema(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    """What OpenAPI says of such a form."""
    schema = {"type": "object", "properties": properties, "required": required}
    return {
        "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}
    }
