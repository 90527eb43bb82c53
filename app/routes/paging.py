"""Lists by `limit` and `cursor`, with the next page in a `Link` header (RFC 8288)."""

import base64
import binascii
from datetime import UTC, datetime
from typing import Annotated
from urllib.parse import urlencode
from uuid import UUID

from fastapi import Query, Request, Response

from app.errors import Unprocessable

Limit = Annotated[int, Query(ge=1, le=200, description="Most rows in the answer.")]
Cursor = Annotated[
    str, Query(max_length=512, description="Where to go on: from the `Link` header of a page.")
]


def read_cursor(cursor: str) -> str:
    """The key that the page before ended with; empty at the start. Raises Unprocessable."""
    try:
        key = base64.b64decode(cursor.encode("ascii"), altchars=b"-_", validate=True).decode()
    except (binascii.Error, UnicodeError) as error:
        raise Unprocessable("`cursor` is not one that this API gave.") from error
    if not key.isprintable():
        raise Unprocessable("`cursor` is not one that this API gave.")
    return key


def uuid_cursor(cursor: str) -> UUID:
    """A cursor that is a UUID. Raises Unprocessable."""
    try:
        return UUID(read_cursor(cursor))
    except ValueError as error:
        raise Unprocessable("`cursor` is not one that this API gave.") from error


def time_cursor(cursor: str) -> tuple[datetime, str]:
    """A cursor that is a time with its zone, a space, and what tells apart those of one moment.
    The time is in UTC. Raises Unprocessable."""
    at, _, key = read_cursor(cursor).partition(" ")
    try:
        moment = datetime.fromisoformat(at)
        if moment.tzinfo is None:
            raise ValueError("no zone")
        return moment.astimezone(UTC), key
    except (ValueError, OverflowError) as error:
        raise Unprocessable("`cursor` is not one that this API gave.") from error


def link_next(request: Request, response: Response, last_key: str | None) -> None:
    """Name the next page; None: this is the last one."""
    if last_key is None:
        return
    cursor = base64.urlsafe_b64encode(last_key.encode()).decode()
    query = [(k, v) for k, v in request.query_params.multi_items() if k != "cursor"]
    url = f"{request.url.path}?{urlencode([*query, ('cursor', cursor)])}"
    response.headers["Link"] = f'<{url}>; rel="next"'
