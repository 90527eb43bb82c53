"""`create_app(settings)`: wiring, nothing else."""

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any, Protocol, TypeVar

import httpx
import sqlalchemy as sa
from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

from app import __version__, problems
from app.access import Ehr, Gate, PatientAccess, StudyGate
from app.arrivals import Follower
from app.atna import Feed
from app.audit import Action, AuditTrail, Entry, Origin, Outcome
from app.audit.checkpoints import Checkpoints
from app.db import Database, Reader
from app.dicomweb import Freshness, Metadata
from app.dicomweb.search import Searches
from app.errors import AuditUnavailable
from app.identity import TokenVerifier
from app.imports import Imports
from app.imports.events import Streams
from app.intake import Intake
from app.limits import Launches
from app.linking import StudySummary
from app.notifications import Notifications
from app.orthanc import Orthanc
from app.recovery import Recovery
from app.routes import (
    access_report,
    admin,
    audit,
    break_glass,
    dicomweb,
    fhir,
    health,
    imports,
    merges,
    orders,
    patients,
    reconciliation,
    restrictions,
    sessions,
    stow,
    studies,
    uploads,
    viewer,
    why,
)
from app.settings import Settings
from app.viewer import Viewer
from app.worklist import Worklist

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 2.0
SWEEP_EVERY_FLUSHES = 15

DESCRIPTION = """The imaging adapter of an EHR: orders and patients linked to the studies in
Orthanc, opened in OHIF, by the right people only, on record. Errors are RFC 9457 problem+json."""


def create_app(settings: Settings) -> FastAPI:
    """The application. The lifespan owns engines and clients; nothing connects before it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # What is opened last is closed first.
        async with AsyncExitStack() as stack:
            database = await stack.enter_async_context(_closing(Database(settings.database_url)))
            # A pool of its own: a request that holds a business connection never waits, for its
            # record, on another request that does the same.
            trail_database = await stack.enter_async_context(
                _closing(Database(settings.database_url, beside=database))
            )
            reader = await stack.enter_async_context(_closing(Reader(settings.database_url)))
            orthanc = await stack.enter_async_context(_closing(Orthanc.from_settings(settings)))
            client = await stack.enter_async_context(httpx.AsyncClient(timeout=10.0))
            await database.verify()
            await reader.open()
            vouching = Checkpoints(settings, trail_database)
            await stack.enter_async_context(_running(vouching.run()))
            await stack.enter_async_context(_feeding(Feed(settings, trail_database)))
            trail = await stack.enter_async_context(_closing(AuditTrail(trail_database)))
            await stack.enter_async_context(_on_record(trail))

            verifier = TokenVerifier(settings, client)
            ehr = Ehr.from_settings(settings, client)
            gate = Gate(database, trail, verifier, ehr, settings.failed_sign_ins_per_minute)
            app.state.launches = Launches(settings.launches_per_minute)
            app.state.import_streams = Streams()
            app.state.settings = settings
            app.state.database = database
            app.state.orthanc = orthanc
            app.state.gate = gate
            app.state.intake = Intake(settings, orthanc)
            app.state.studies = StudyGate(reader, gate.trail, ehr)
            app.state.viewer = Viewer(settings, database, gate, orthanc, reader)
            app.state.searches = Searches(reader)
            app.state.freshness = Freshness(orthanc)
            app.state.metadata = Metadata(database, orthanc, app.state.freshness)
            app.state.worklist = Worklist(settings, database, gate.trail, orthanc)
            app.state.follower = _follower(settings, database, gate, orthanc, app)
            recovery = Recovery(settings, gate, orthanc, app.state.viewer, app.state.worklist.wake)
            app.state.recovery = recovery
            await recovery.begin()
            app.state.imports = Imports(settings, gate, orthanc)
            await app.state.imports.open()

            await stack.enter_async_context(_running(recovery.run()))
            stack.push_async_callback(_write_counts, app.state.viewer)
            stack.push_async_callback(app.state.metadata.close)
            for each in (
                gate.failed_tries.run(),
                Notifications(settings, database).run(),
                app.state.worklist.run(),
                app.state.follower.run(),
                app.state.imports.run(),
                _upkeep(app.state.viewer),
            ):
                await stack.enter_async_context(_running(each))
            yield

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
        reconciliation,
        merges,
        restrictions,
        break_glass,
        orders,
        uploads,
        imports,
        studies,
        viewer,
        why,
        sessions,
        health,
        admin,
        audit,
        access_report,
        fhir,
        stow,
    ):
        app.include_router(each.router)
    app.include_router(dicomweb.rest)
    return app


def _follower(
    settings: Settings, database: Database, gate: Gate, orthanc: Orthanc, app: FastAPI
) -> Follower:
    """Whose linked studies are made ready for who opens them, and leave the worklist."""
    metadata: Metadata = app.state.metadata
    worklist: Worklist = app.state.worklist

    def ready(access: PatientAccess, summary: StudySummary) -> None:
        metadata.make_ready(access, [summary], f"{settings.api_base_url}/dicom-web")

    return Follower(settings, database, gate, orthanc, app.state.intake, ready, worklist.wake)


class _Closable(Protocol):
    async def close(self) -> None: ...


_Opened = TypeVar("_Opened", bound=_Closable)


@asynccontextmanager
async def _closing(opened: _Opened) -> AsyncIterator[_Opened]:
    try:
        yield opened
    finally:
        await opened.close()


@asynccontextmanager
async def _running(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Beside the app, for as long as it lives."""
    task = asyncio.create_task(work)
    task.add_done_callback(_say_if_it_failed)
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def _say_if_it_failed(task: asyncio.Task[None]) -> None:
    """At once, and not when the app ends."""
    if not task.cancelled() and (error := task.exception()) is not None:
        what = getattr(task.get_coro(), "__qualname__", "")
        logger.critical("%s has stopped; restart Lightbox", what, exc_info=error)


@asynccontextmanager
async def _feeding(feed: Feed) -> AsyncIterator[None]:
    """It ends by itself, when what it is sending has been sent."""
    task = asyncio.create_task(feed.run())
    try:
        yield
    finally:
        feed.stop()
        await task


@asynccontextmanager
async def _on_record(trail: AuditTrail) -> AsyncIterator[None]:
    """The start of this process, without which it does not run, and its end."""
    await trail.record(_of_process(Action.APPLICATION_START))
    try:
        yield
    finally:
        with suppress(AuditUnavailable):  # logged
            await trail.record(_of_process(Action.APPLICATION_STOP))


def _of_process(action: Action) -> Entry:
    return Entry(action=action, outcome=Outcome.DONE, origin=Origin(request_id="upkeep"))


async def _write_counts(viewer: Viewer) -> None:
    try:
        await viewer.flush()
    except sa.exc.SQLAlchemyError as error:
        logger.error("the last counts were not written: %s", type(error).__name__)


async def _upkeep(viewer: Viewer) -> None:
    """Write the viewers' counts, and end the sessions whose time is over."""
    rounds = 0
    while True:
        await asyncio.sleep(FLUSH_SECONDS)
        rounds += 1
        try:
            await viewer.closing.flush()
            if rounds % SWEEP_EVERY_FLUSHES == 0:
                await viewer.sweep(Origin(request_id="upkeep"))
        except Exception as error:  # whatever it was: sessions must go on ending
            logger.error("viewer upkeep failed, will try again", exc_info=error)
