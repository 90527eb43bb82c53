"""AccessRouter: a route without a guard can't exist."""

from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.dependencies.models import Dependant
from fastapi.dependencies.utils import get_dependant
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive

from app.access import Guard
from app.errors import LightboxError, TooLarge, Unprocessable
from app.settings import MEBIBYTE

MAX_BODY_BYTES = MEBIBYTE  # of a JSON body; forms with files bound themselves


class GuardedRoute(APIRoute):
    """A route whose body is bounded, and whose guard speaks before the body's faults do.

    FastAPI reads and parses a body first and asks who sent it afterwards.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle
        (guard,) = _guards(self.dependant)

        async def guarded(request: Request) -> Response:
            try:
                return await handle(Request(request.scope, _bounded(request.receive)))
            except (RequestValidationError, HTTPException) as error:
                if not _is_unread_body(error):
                    raise
                await guard.before_body(request)
                if isinstance(error.__cause__, LightboxError):
                    raise error.__cause__ from None
                raise Unprocessable("The body can't be read: send JSON, in UTF-8.") from error

        return guarded


class AccessRouter(APIRouter):
    """An APIRouter that refuses, at import, a route which doesn't declare exactly one guard.

    What the guard asks for is written into OpenAPI as `x-access`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(route_class=GuardedRoute, **kwargs)

    def add_api_route(self, path: str, endpoint: Callable[..., Any], **kwargs: Any) -> None:
        guards = list(_guards(get_dependant(path=path, call=endpoint)))
        guards += [
            each.dependency
            for each in kwargs.get("dependencies") or ()
            if isinstance(each.dependency, Guard)
        ]
        if len(guards) != 1:
            raise TypeError(
                f"{path}: a route declares exactly one guard, this one {len(guards)}; use Grant, "
                "Caller, Visible, ViewerGrant or Public from app.access"
            )
        extra = dict(kwargs.pop("openapi_extra", None) or {})
        extra["x-access"] = guards[0].describe()
        super().add_api_route(path, endpoint, openapi_extra=extra, **kwargs)


def _guards(dependant: Dependant) -> Iterator[Guard]:
    for each in dependant.dependencies:
        if isinstance(each.call, Guard):
            yield each.call
        yield from _guards(each)


def _bounded(receive: Receive) -> Receive:
    seen = 0

    async def bounded() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > MAX_BODY_BYTES:
            raise TooLarge(f"The body is larger than {MAX_BODY_BYTES} bytes.")
        return message

    return bounded


def _is_unread_body(error: RequestValidationError | HTTPException) -> bool:
    """Did FastAPI fail at the body itself, before it ran the guard?"""
    if isinstance(error, HTTPException):
        return error.status_code == 400
    return any(each["type"] == "json_invalid" for each in error.errors())
