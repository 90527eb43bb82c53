"""A route without a guard can't exist, and a parameter that would be ignored is refused."""

import ast
from pathlib import Path
from typing import Annotated, Any

import pytest
from fastapi import Depends
from starlette.requests import Request
from starlette.responses import Response

import app
from app.access import Caller, Grant, PatientAccess, Public, Subject
from app.audit import Action
from app.errors import Unprocessable
from app.routes.paging import link_next, read_cursor, uuid_cursor
from app.routing import AccessRouter


def test_a_route_without_a_guard_cannot_be_made() -> None:
    router = AccessRouter()

    async def unguarded() -> None: ...

    with pytest.raises(TypeError, match="exactly one guard, this one 0"):
        router.get("/open")(unguarded)
    with pytest.raises(TypeError, match="exactly one guard, this one 0"):
        router.add_api_route("/open", unguarded)
    assert router.routes == []


def test_a_route_with_two_guards_cannot_be_made() -> None:
    router = AccessRouter()
    grant = Annotated[PatientAccess, Depends(Grant(Action.ORDER_READ, of=Subject.ORDER))]

    async def nested(access: grant) -> PatientAccess:
        return access

    async def doubled(
        access: Annotated[PatientAccess, Depends(nested)],
        caller: Annotated[Any, Depends(Caller(Action.ORDER_READ))],
    ) -> None: ...

    async def guarded(access: grant) -> None: ...

    with pytest.raises(TypeError, match="exactly one guard, this one 2"):
        router.get("/{order_id}")(doubled)
    with pytest.raises(TypeError, match="exactly one guard, this one 2"):
        router.get("/{order_id}", dependencies=[Depends(Public("for a test"))])(guarded)
    assert router.routes == []


def test_no_route_is_made_around_the_access_router() -> None:
    """Whoever needs a route takes AccessRouter; FastAPI itself is for `main` alone."""
    makers = {"APIRouter", "FastAPI", "Router", "Route", "Mount", "APIRoute", "WebSocketRoute"}
    allowed = {
        ("routing.py", "APIRouter"),
        ("routing.py", "APIRoute"),
        ("main.py", "FastAPI"),
        ("problems.py", "FastAPI"),
    }
    adders = {"add_route", "add_api_route", "add_websocket_route", "mount", "api_route"}
    found = []
    root = Path(app.__file__).parent
    for file in root.rglob("*.py"):
        name = file.relative_to(root).as_posix()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                ("fastapi", "starlette")
            ):
                found += [(name, each.name) for each in node.names if each.name in makers]
            if isinstance(node, ast.Attribute) and node.attr in adders and name != "routing.py":
                found.append((name, node.attr))
    assert set(found) <= allowed


def test_no_access_is_made_outside_the_guards() -> None:
    with pytest.raises(TypeError, match="made by the guards"):
        PatientAccess(None, None, Action.STUDY_VIEW, None, None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="made by the guards"):
        PatientAccess(None, None, Action.STUDY_VIEW, None, None, seal=object())  # type: ignore[arg-type]


@pytest.mark.parametrize("key", ["0", "2.25.1", "5e3b5f0e-7d6b-4a53-8a35-1c8d7d9d6c55", "ü/?&="])
def test_a_cursor_leads_back_to_its_key(key: str) -> None:
    scope = {"type": "http", "path": "/list", "query_string": b"limit=2&cursor=old&mrn=a%26b"}
    request, response = Request({**scope, "headers": []}), Response()
    link_next(request, response, key)
    link = response.headers["link"]
    assert link.startswith("</list?limit=2&mrn=a%26b&cursor=")
    assert link.endswith('>; rel="next"')
    following = Request(
        {**scope, "headers": [], "query_string": link[1:].partition(">")[0].split("?")[1].encode()}
    )
    assert read_cursor(following.query_params["cursor"]) == key
    assert len(following.query_params.getlist("cursor")) == 1


def test_the_last_page_names_no_next() -> None:
    response = Response()
    link_next(Request({"type": "http", "headers": []}), response, None)
    assert "link" not in response.headers


@pytest.mark.parametrize("cursor", ["!", "MA", "M A=", "MA==\n", "é", "_w==", "MA==MA=="])
def test_a_cursor_that_was_not_given_is_refused(cursor: str) -> None:
    with pytest.raises(Unprocessable, match="cursor"):
        read_cursor(cursor)


def test_a_cursor_of_another_list_is_refused() -> None:
    with pytest.raises(Unprocessable, match="cursor"):
        uuid_cursor("MA==")
