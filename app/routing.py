"""AccessRouter: a route without a guard can't exist."""

import re
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.dependencies.models import Dependant
from fastapi.dependencies.utils import get_dependant
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import Message, Receive, Scope, Send

from app import idempotency
from app.access import DirectGuard, Guard
from app.errors import LightboxError, TooLarge, Unprocessable
from app.settings import MEBIBYTE

DirectHandler = Callable[[Any, Request], Awaitable[Response]]
MAX_BODY_BYTES = MEBIBYTE  # of a JSON body; forms with files bound themselves


class GuardedRoute(APIRoute):
    """A route whose body is bounded, and whose guard speaks before the body's faults do.

    FastAPI reads and parses a body first and asks who sent it afterwards.
    """

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """What can be got can be asked for by HEAD (RFC 9110, 9.3.2)."""
        if scope["type"] == "http" and scope["method"] == "HEAD":
            return super().matches({**scope, "method": "GET"})
        return super().matches(scope)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "HEAD" and "GET" in (self.methods or ()):
            scope = {**scope, "method": "GET"}  # the server sends no body all the same
        run = super().handle
        await idempotency.answering(scope, send, lambda watched: run(scope, receive, watched))

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        status = self.status_code or 200
        if self.body_field is None:

            async def bodiless(request: Request) -> Response:
                idempotency.about(request, status, has_body=False)
                return await handle(request)

            return bodiless
        (guard,) = _guards(self.dependant)

        async def guarded(request: Request) -> Response:
            bounded = Request(request.scope, _bounded(request.receive))
            idempotency.about(bounded, status, has_body=True)
            try:
                return await handle(bounded)
            except (RequestValidationError, HTTPException) as error:
                if not _is_unread_body(error):
                    raise
                await guard.before_body(request)
                if isinstance(error.__cause__, LightboxError):
                    raise error.__cause__ from None
                raise Unprocessable("The body can't be read: send JSON, in UTF-8.") from error

        return guarded


class DirectRoute(GuardedRoute):
    """A route on the way of every image: FastAPI describes it, and stays out of its way.

    The guard is asked, the handler called with what it gave and the request, and what it returns is
    sent. Nothing else is injected or validated: the path's converters are all that checks it.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **kwargs: Any) -> None:
        super().__init__(path, endpoint, **kwargs)
        (guard,) = _guards(self.dependant)
        assert isinstance(guard, DirectGuard)
        handler: DirectHandler = endpoint.handler  # type: ignore[attr-defined]

        async def run(scope: Scope, receive: Receive, send: Send) -> None:
            request = Request(scope, receive)
            response = await handler(await guard.enter(request), request)
            await response(scope, receive, send)

        self._run = run

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        methods = self.methods or set()
        if method not in methods:
            raise HTTPException(status_code=405, headers={"Allow": ", ".join(sorted(methods))})
        await self._run(scope, receive, send)


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
                "Caller, Visible, StudyGrant or Public from app.access, ViewerGrant from app.viewer"
            )
        if isinstance(guards[0], DirectGuard):
            kwargs["route_class_override"] = DirectRoute
        if idempotency.may_repeat(endpoint, kwargs.get("methods") or ()):
            endpoint = idempotency.once(endpoint)
        extra = dict(kwargs.pop("openapi_extra", None) or {})
        extra["x-access"] = guards[0].describe()
        super().add_api_route(path, endpoint, openapi_extra=extra, **kwargs)

    def direct(
        self,
        path: str,
        handler: DirectHandler,
        guard: DirectGuard,
        *,
        methods: Sequence[str] = ("GET",),
        media_types: Sequence[str] = (),
        include_in_schema: bool = True,
    ) -> None:
        """Add a `DirectRoute`; see there."""

        async def endpoint(request: Request) -> None:
            raise NotImplementedError("a direct route never runs what describes it")

        endpoint.__name__ = getattr(handler, "__name__", "handler")
        endpoint.__doc__ = handler.__doc__
        endpoint.handler = handler  # type: ignore[attr-defined]
        names = re.findall(r"{([a-z_]+)", self.prefix + path)
        text = {"type": "string"}
        self.add_api_route(
            path,
            endpoint,
            methods=list(methods),
            dependencies=[Depends(guard)],
            response_class=Response,
            include_in_schema=include_in_schema,
            responses={200: {"content": {each: {} for each in media_types}}},
            openapi_extra={
                "parameters": [
                    {"name": name, "in": "path", "required": True, "schema": text} for name in names
                ],
                "security": guard.security,
            },
        )


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
