"""AccessRouter: a route without a guard can't exist."""

from collections.abc import Callable, Iterator
from typing import Any

from fastapi import APIRouter
from fastapi.dependencies.models import Dependant
from fastapi.dependencies.utils import get_dependant

from app.access import Guard


class AccessRouter(APIRouter):
    """An APIRouter that refuses, at import, a route which doesn't declare exactly one guard.

    What the guard asks for is written into OpenAPI as `x-access`.
    """

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
