"""The guards of the viewer origin: a launch cookie instead of a bearer token."""

from fastapi import Request
from sqlmodel.ext.asyncio.session import AsyncSession

from app.access import DirectGuard, Gate, Guard, SessionAccess, StudyAccess, Subject
from app.access.guards import is_plain, origin_of
from app.audit import Action, Entry, Outcome
from app.dicom import parse_uid
from app.errors import NotFound, Unauthenticated
from app.models import LaunchSession
from app.viewer.glances import Alive
from app.viewer.sessions import COOKIE_NAME, Viewer

_NOTHING = "There is nothing at this address."
_DESCRIPTION = {"guard": "viewer-session", "action": Action.STUDY_VIEW.value}


class ViewerSearch(DirectGuard):
    """The launch session may search: among its own studies."""

    async def enter(self, request: Request) -> SessionAccess:
        gate: Gate = request.app.state.gate
        viewer: Viewer = request.app.state.viewer
        ctx, cookie = request.path_params["ctx"], request.cookies.get(COOKIE_NAME)
        access = await viewer.glance_to_search(ctx, cookie) if is_plain(request) else None
        if access is None:
            async with gate.transaction([]) as session:
                launch = await _launch_of(request, session)
                await _refuse_unless_plain(request, launch)
                await viewer.patient_access(session, launch, origin_of(request))
            # Something ended between the two.
            raise NotFound(_NOTHING)
        return access

    def describe(self) -> dict[str, str]:
        return _DESCRIPTION | {"of": Subject.PATIENT.value}


class SignOfLife(DirectGuard):
    """Somebody sits in front of the viewer: their right is decided anew, and the session slides."""

    async def enter(self, request: Request) -> Alive:
        gate: Gate = request.app.state.gate
        viewer: Viewer = request.app.state.viewer
        ctx, cookie = request.path_params["ctx"], request.cookies.get(COOKIE_NAME)
        alive = await viewer.alive(ctx, cookie) if is_plain(request) else None
        if alive is None:
            async with gate.transaction([]) as session:
                launch = await _launch_of(request, session)
                await _refuse_unless_plain(request, launch)
                await viewer.patient_access(session, launch, origin_of(request))
            raise NotFound(_NOTHING)
        return alive

    def describe(self) -> dict[str, str]:
        return _DESCRIPTION | {"of": Subject.PATIENT.value}


class ViewerGrant(DirectGuard):
    """The launch session may see the study in the path.

    Each request is decided anew. The first access of the session to a study is recorded before
    the handler runs; later ones are counted.
    """

    async def enter(self, request: Request) -> StudyAccess:
        viewer: Viewer = request.app.state.viewer
        path, cookie = request.path_params, request.cookies.get(COOKIE_NAME)
        asked = (
            path[Subject.STUDY.value],
            path.get("series_instance_uid", ""),
            path.get("sop_instance_uid", ""),
        )
        access = None
        if is_plain(request):
            access = await viewer.glance(path["ctx"], cookie, *asked)
        if access is None:
            await self._in_full(request, asked[0])
            access = await viewer.glance(path["ctx"], cookie, *asked)
        if access is None:
            # Something ended between the two.
            raise NotFound(_NOTHING)
        return access

    async def _in_full(self, request: Request, study_uid: str) -> None:
        """The way of the first request, and of the refused ones: it records, and says why."""
        gate: Gate = request.app.state.gate
        viewer: Viewer = request.app.state.viewer
        async with gate.transaction([]) as session:
            launch = await _launch_of(request, session)
            await _refuse_unless_plain(request, launch)
            try:
                parse_uid(study_uid)
            except ValueError as error:
                await viewer.refuse(launch, origin_of(request), "not-a-uid")
                raise NotFound(_NOTHING) from error
            await viewer.study_access(session, launch, study_uid, origin_of(request))

    def describe(self) -> dict[str, str]:
        return _DESCRIPTION | {"of": Subject.STUDY.value}


class ViewerNothing(DirectGuard):
    """What stands at no address of a session: refused, and recorded under whose it is."""

    async def enter(self, request: Request) -> None:
        gate: Gate = request.app.state.gate
        viewer: Viewer = request.app.state.viewer
        async with gate.transaction([]) as session:
            launch = await _launch_of(request, session)
            await viewer.refuse(launch, origin_of(request), "not-enumerated")

    def describe(self) -> dict[str, str]:
        return {"guard": "nothing"}


class SessionCookie(Guard):
    """The cookie of a live launch session; no patient data behind it."""

    async def __call__(self, request: Request) -> None:
        gate: Gate = request.app.state.gate
        async with gate.database.session() as session:
            await _launch_of(request, session)

    def describe(self) -> dict[str, str]:
        return {"guard": "session-cookie"}


async def _launch_of(request: Request, session: AsyncSession) -> LaunchSession:
    """The live session that the request's cookie proves. A wrong one is recorded, as a bad token
    is: it may be a stolen address."""
    gate: Gate = request.app.state.gate
    viewer: Viewer = request.app.state.viewer
    cookie = request.cookies.get(COOKIE_NAME)
    try:
        ctx = request.path_params["ctx"]
        return await viewer.open_session(session, ctx, cookie, origin_of(request))
    except Unauthenticated:
        await gate.failed_tries.record(
            Entry(
                action=Action.SIGN_IN,
                outcome=Outcome.DENIED,
                origin=origin_of(request),
                reason="no-cookie" if cookie is None else "bad-cookie",
                detail={"path": request.url.path[:256]},
            )
        )
        raise


async def _refuse_unless_plain(request: Request, launch: LaunchSession) -> None:
    viewer: Viewer = request.app.state.viewer
    if not is_plain(request):
        await viewer.refuse(launch, origin_of(request), "not-plain")
        raise NotFound(_NOTHING)
