"""`create_app(settings)`: wiring, nothing else."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import httpx
import sqlalchemy as sa
from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

from app import __version__, problems
from app.access import Gate, StudyGate
from app.audit import AuditTrail, Origin
from app.db import Database, Reader
from app.dicomweb import Freshness, Metadata
from app.dicomweb.search import Searches
from app.errors import LightboxError
from app.identity import TokenVerifier
from app.intake import Intake
from app.orthanc import Orthanc
from app.routes import (
    admin,
    audit,
    dicomweb,
    health,
    orders,
    patients,
    stow,
    studies,
    uploads,
    viewer,
)
from app.settings import Settings
from app.viewer import Viewer

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 2.0
SWEEP_EVERY_FLUSHES = 15

DESCRIPTION = """The imaging adapter of an EHR: orders and patients linked to the studies in
Orthanc, opened in OHIF, by the right people only, on record. Errors are RFC 9457 problem+json."""


def create_app(settings: Settings) -> FastAPI:
    """The application. The lifespan owns engines and clients; nothing connects before it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        database = Database(settings.database_url)
        # A pool of its own: a request that holds a business connection never waits, for its
        # record, on another request that does the same.
        trail_database = Database(settings.database_url, beside=database)
        reader = Reader(settings.database_url)
        orthanc = Orthanc.from_settings(settings)
        async with httpx.AsyncClient(timeout=10.0) as client:
            try:
                await database.verify()
                await reader.open()
                verifier = TokenVerifier(settings, client)
                gate = Gate(database, AuditTrail(trail_database), verifier)
                app.state.settings = settings
                app.state.database = database
                app.state.orthanc = orthanc
                app.state.gate = gate
                app.state.intake = Intake(settings, orthanc)
                app.state.studies = StudyGate(reader, gate.trail)
                app.state.viewer = Viewer(settings, database, gate, orthanc, reader)
                app.state.searches = Searches(reader)
                app.state.freshness = Freshness(orthanc)
                app.state.metadata = Metadata(database, orthanc, app.state.freshness)
                upkeep = asyncio.create_task(_upkeep(app.state.viewer))
                try:
                    yield
                finally:
                    upkeep.cancel()
                    await app.state.metadata.close()
                    with suppress(asyncio.CancelledError):
                        await upkeep
                    try:
                        await app.state.viewer.flush()
                    except sa.exc.SQLAlchemyError as error:
                        logger.error("the last counts were not written: %s", type(error).__name__)
            finally:
                await orthanc.close()
                await reader.close()
                await database.close()
                await trail_database.close()

    # Swagger UI from its own files: a hospital network reaches no CDN.
    app = FastAPIOffline(
        title="Lightbox",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        redoc_url=None,
        redirect_slashes=False,  # a redirect would carry the token to whatever Host was named
        static_url="/docs/static",
    )
    problems.install(app)
    app.add_middleware(problems.RequestId)
    app.router.routes[:0] = dicomweb.routes
    for each in (
        patients,
        orders,
        uploads,
        studies,
        viewer,
        health,
        admin,
        audit,
        stow,
    ):
        app.include_router(each.router)
    app.include_router(dicomweb.rest)
    return app


async def _upkeep(viewer: Viewer) -> None:
    """Write the viewers' counts, and end the sessions whose time is over."""
    rounds = 0
    while True:
        await asyncio.sleep(FLUSH_SECONDS)
        rounds += 1
        try:
            await viewer.flush()
            if rounds % SWEEP_EVERY_FLUSHES == 0:
                await viewer.sweep(Origin(request_id="upkeep"))
        except (sa.exc.SQLAlchemyError, LightboxError, OSError) as error:
            logger.error("viewer upkeep failed, will try again: %s", type(error).__name__)
