"""One error shape: RFC 9457 problem+json, whatever went wrong; and the id of every request."""

import logging
import re
import time
from collections.abc import Mapping
from functools import cache
from typing import Any
from uuid import uuid4

import sqlalchemy as sa
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import fhir, logs
from app.aliases import is_of_retired
from app.errors import (
    PROBLEM_TYPE,
    Conflict,
    DatabaseUnavailable,
    LightboxError,
    TooManyRequests,
    Unauthenticated,
    Unavailable,
    Unprocessable,
)
from app.inert import inert_json

logger = logging.getLogger(__name__)
request_logger = logging.getLogger("app.requests")

_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:+=@-]{0,63}")
_METHODS = {"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"}
_TITLES = {404: "Not found", 405: "Method not allowed", 400: "Bad request"}
_DETAILS = {
    404: "There is nothing at this address. See /docs for what there is.",
    405: "This address does not take this method.",
    400: "The request could not be read.",
}


class ProblemResponse(Response):
    media_type = "application/problem+json"


class OperationOutcomeResponse(ProblemResponse):
    media_type = fhir.MEDIA_TYPE


def problem(
    request: Request,
    status: int,
    title: str,
    detail: str,
    *,
    slug: str = "about:blank",
    extra: Mapping[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
) -> ProblemResponse:
    """A problem answer. `slug` becomes `type`; docs/api.md lists them. Below `/fhir/` it is said
    as FHIR has it: an OperationOutcome, and 400 for what is wrong with a request's own form."""
    kept = {"Cache-Control": "no-store", **(headers or {})}
    if request.url.path.startswith("/fhir/"):
        status = 400 if status == 422 else status
        outcome = fhir.operation_outcome(status, slug, title, detail)
        return OperationOutcomeResponse(inert_json(outcome), status, kept)
    body = {
        "type": slug if slug == "about:blank" else f"{PROBLEM_TYPE}{slug}",
        "title": title,
        "status": status,
        "detail": detail,
        "request_id": getattr(request.state, "request_id", ""),
        **(extra or {}),
    }
    return ProblemResponse(inert_json(body), status, kept)


def method_not_allowed(request: Request, allowed: str) -> Response:
    """405, as for any other address; `allowed` are the methods that it does take."""
    return problem(request, 405, _TITLES[405], _DETAILS[405], headers={"Allow": allowed})


def headers_of(error: LightboxError) -> dict[str, str]:
    """What an answer to one of our own errors says in its headers."""
    headers: dict[str, str] = {}
    if isinstance(error, (Unavailable, TooManyRequests)):
        headers["Retry-After"] = str(error.retry_after_seconds)
    if isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = 'Bearer realm="lightbox"'
    return headers


def of_error(request: Request, error: LightboxError) -> ProblemResponse:
    """The answer to one of our own errors."""
    return problem(
        request,
        error.status,
        error.title,
        error.detail,
        slug=error.slug,
        extra=error.extra,
        headers=headers_of(error),
    )


def install(app: FastAPI) -> None:
    """Answer every error of the app in the one shape."""

    async def ours(request: Request, error: Exception) -> Response:
        assert isinstance(error, LightboxError)
        return of_error(request, error)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        # The input itself is not repeated: it may hold a patient's data.
        errors = [
            {"field": ".".join(str(part) for part in each["loc"]), "problem": each["msg"]}
            for each in error.errors()
        ]
        named = "; ".join(f"{each['field']}: {each['problem']}" for each in errors[:5])
        return problem(
            request,
            422,
            "Invalid request",
            f"The request does not fit: {named}.",
            slug="invalid-request",
            extra={"errors": errors},
        )

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        status = error.status_code
        return problem(
            request,
            status,
            _TITLES.get(status, "Error"),
            _DETAILS.get(status, "The request failed."),
            headers=error.headers,
        )

    async def database(request: Request, error: Exception) -> Response:
        logger.error("database: %s", type(error).__name__, exc_info=error)
        return of_error(
            request, DatabaseUnavailable("The database does not answer. Try again in a moment.")
        )

    async def unfit(request: Request, error: Exception) -> Response:
        # PostgreSQL takes no U+0000 and no number beyond a column's range.
        return of_error(
            request, Unprocessable("The request holds a character or number that can't be kept.")
        )

    async def retired(request: Request, error: Exception) -> Response:
        assert isinstance(error, sa.exc.IntegrityError)
        if not is_of_retired(error):
            raise error
        return of_error(
            request,
            Conflict("The patient was merged into another at this moment. Nothing was changed."),
        )

    app.add_exception_handler(LightboxError, ours)
    app.add_exception_handler(sa.exc.IntegrityError, retired)
    app.add_exception_handler(sa.exc.DataError, unfit)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    for kind in (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.TimeoutError):
        app.add_exception_handler(kind, database)


def _unforeseen(request: Request) -> Response:
    return problem(
        request,
        500,
        "Internal error",
        "Lightbox failed at this request; nothing more is known to you. Name the request_id "
        "to whoever runs it.",
        slug="internal-error",
        # The server closes the connection after this; the edge must not use it again.
        headers={"Connection": "close"},
    )


class RequestId:
    """Gives every request an id, the caller's own if it is a sane one, says it back, and logs the
    request in one line: never its address, which names patients, but the route that took it.

    It also answers what nobody foresaw: FastAPI's own handler stands outside of all middleware,
    and its answer would have no id.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _SANE_REQUEST_ID.fullmatch(given) else uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        # For every line of this request; the server runs each in a context of its own.
        logs.request_id.set(request_id)

        started, status, by_edge, began = False, 0, False, time.perf_counter()

        async def named(message: Message) -> None:
            nonlocal started, status, by_edge
            if message["type"] == "http.response.start":
                started, status = True, message["status"]
                headers = MutableHeaders(scope=message)
                by_edge = "x-accel-redirect" in headers
                headers["X-Request-ID"] = request_id
                headers.setdefault("Cache-Control", "no-store")
                headers.setdefault("X-Content-Type-Options", "nosniff")
            await send(message)

        try:
            await self._answer(scope, receive, named)
        except Exception:
            if not started:
                await _unforeseen(Request(scope))(scope, receive, named)
            raise  # to the server's log
        finally:
            # Bytes that the edge sends, hundreds for a viewer, are in its own log.
            if not by_edge:
                _log(scope, status, time.perf_counter() - began)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if b"%00" in scope.get("raw_path", b"") or b"%00" in scope.get("query_string", b""):
            # No value of ours holds NUL, and PostgreSQL stores none.
            said = "An address can't hold NUL."
            refusal = problem(Request(scope), 422, "Invalid request", said, slug="invalid-request")
            await refusal(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def _log(scope: Scope, status: int, seconds: float) -> None:
    """`status` 0: the client went away before there was an answer."""
    level = logging.WARNING if status >= 500 else logging.INFO
    if not request_logger.isEnabledFor(level):
        return
    method = scope["method"] if scope["method"] in _METHODS else "OTHER"
    fields = {
        "method": method,
        "route": _template(getattr(scope.get("route"), "path", "-")),
        "status": status,
        "duration_ms": round(seconds * 1000, 1),
    }
    request_logger.log(level, "request", extra=fields)


@cache
def _template(path: str) -> str:
    """A route's path without its converters; `-` for what no route took."""
    return re.sub(r":\w+}", "}", path)
