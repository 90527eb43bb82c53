"""Health, for whoever asks: is everything there that is needed to show an image?"""

import asyncio
from collections.abc import Awaitable
from typing import Literal

from fastapi import Depends, Request, Response
from pydantic import BaseModel

from app import __version__
from app.access import Public
from app.db import Database
from app.errors import LightboxError
from app.orthanc import Orthanc
from app.routing import AccessRouter

router = AccessRouter(prefix="/api/v1/dicom", tags=["health"])

PATIENCE_SECONDS = 5.0


class Health(BaseModel):
    """`problems` says what is wrong, a sentence each; empty while healthy."""

    status: Literal["healthy", "unhealthy"]
    version: str
    orthanc: Literal["up", "down"]
    orthanc_version: str | None
    database: Literal["up", "down"]
    problems: list[str]


@router.get(
    "/health",
    dependencies=[Depends(Public("load balancers and people ask it; it names no patient"))],
    responses={503: {"model": Health}},
)
async def read_health(request: Request, response: Response) -> Health:
    """Healthy where Orthanc and the database answer."""
    orthanc: Orthanc = request.app.state.orthanc
    database: Database = request.app.state.database
    problems: list[str] = []

    async def ask(what: Awaitable[str | None]) -> tuple[bool, str | None]:
        try:
            return True, await asyncio.wait_for(what, PATIENCE_SECONDS)
        except LightboxError as error:
            problems.append(error.detail)
        except TimeoutError:
            problems.append("The image archive or the database takes too long to answer.")
        return False, None

    (orthanc_up, version), (database_up, _) = await asyncio.gather(
        ask(orthanc.version()), ask(database.ping())
    )
    healthy = orthanc_up and database_up
    if not healthy:
        response.status_code = 503
        response.headers["Retry-After"] = "5"
    return Health(
        status="healthy" if healthy else "unhealthy",
        version=__version__,
        orthanc="up" if orthanc_up else "down",
        orthanc_version=version,
        database="up" if database_up else "down",
        problems=problems,
    )
