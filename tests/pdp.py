"""The EHR's policy decision point in a process of its own, for the tests (OpenID AuthZEN).

It allows everything but what it was told to deny, and misbehaves when it is told to.
`python -m tests.pdp PORT` is the process.
"""

import subprocess
import sys
import time
from asyncio import Event
from types import TracebackType
from typing import Annotated, Any, Self

import httpx
import uvicorn
from fastapi import Body, FastAPI, Request, Response
from fastapi.responses import JSONResponse

from app.demo.stack import LOOPBACK, REPOSITORY, free_port

SECRET = "the secret that Lightbox shows to the EHR"
MODES = ("ok", "error", "silent", "text", "redirect")
_START_SECONDS = 30.0


class Pdp:
    """The process, between `with`."""

    def __init__(self) -> None:
        port = free_port()
        self.url = f"http://{LOOPBACK}:{port}"
        self._client = httpx.Client(base_url=self.url, trust_env=False, timeout=10.0)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.pdp", str(port)], cwd=REPOSITORY
        )

    def __enter__(self) -> Self:
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            try:
                if self._client.get("/asked").is_success:
                    return self
            except httpx.TransportError:
                if self._process.poll() is not None:
                    break
                time.sleep(0.05)
        raise RuntimeError("the policy decision point of the tests did not start")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.terminate()
        self._process.wait(10)
        self._client.close()

    def switch(self, *deny: str, mode: str = "ok") -> None:
        """Deny the patients of these MRNs from now on, and be asked by nobody yet."""
        assert mode in MODES
        self._client.post("/switch", json={"deny": deny, "mode": mode}).raise_for_status()

    def asked(self) -> list[Any]:
        """What it was asked since the last switch."""
        found: list[Any] = self._client.get("/asked").json()
        return found


def pdp() -> FastAPI:
    """The application of the process."""
    app = FastAPI(openapi_url=None)
    state: dict[str, Any] = {"mode": "ok", "deny": [], "asked": [], "changed": Event()}

    async def told(request: Request) -> Any:
        """The question; or an answer that is none."""
        question = await request.json()
        state["asked"].append(question)
        if request.headers.get("authorization") != f"Bearer {SECRET}":
            return JSONResponse({"decision": True}, 401)
        if state["mode"] == "error":
            return JSONResponse({"decision": True}, 500)
        if state["mode"] == "silent":
            await state["changed"].wait()
        if state["mode"] == "redirect":
            return Response(status_code=307, headers={"Location": "/yes"})
        return question

    def decide(resource: Any) -> Any:
        allowed = resource["properties"]["mrn"] not in state["deny"]
        return {"decision": str(allowed).lower() if state["mode"] == "text" else allowed}

    @app.post("/access/v1/evaluation", response_model=None)
    async def evaluation(request: Request) -> Any:
        question = await told(request)
        return question if isinstance(question, Response) else decide(question["resource"])

    @app.post("/access/v1/evaluations", response_model=None)
    async def evaluations(request: Request) -> Any:
        question = await told(request)
        if isinstance(question, Response):
            return question
        return {"evaluations": [decide(each["resource"]) for each in question["evaluations"]]}

    @app.post("/yes")
    async def yes() -> Any:
        return {"decision": True}

    @app.get("/asked")
    async def asked() -> Any:
        return state["asked"]

    @app.post("/switch")
    async def switch(deny: Annotated[list[str], Body()], mode: Annotated[str, Body()]) -> None:
        state.update(deny=deny, mode=mode, asked=[])
        state["changed"].set()
        state["changed"] = Event()

    return app


if __name__ == "__main__":
    uvicorn.run(
        pdp(),
        host=LOOPBACK,
        port=int(sys.argv[1]),
        log_level="error",
        timeout_graceful_shutdown=1,
    )
