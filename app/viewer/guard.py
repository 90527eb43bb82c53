"""The guards of the viewer origin: a launch cookie instead of a bearer token."""

from collections.abc import AsyncIterator

from fastapi import Request
from sqlmodel.ext.asyncio.session import AsyncSession

from app.access import Gate, Guard, PatientAccess, Subject
from app.access.guards import origin_of
from app.audit import Action, Entry, Outcome
from app.dicom import parse_uid
from app.errors import NotFound, Unauthenticated
from app.models import LaunchSession
from app.viewer.sessions import COOKIE_NAME, Viewer


class ViewerGrant(Guard):
    """The launch session may see the study in the path, or, `of` its patient, search.

    Each request decides anew. The first access of the session to a study is recorded before the
    handler runs; later ones are counted.
    """

    def __init__(self, *, of: Subject) -> None:
        self.of = of

    async def __call__(self, request: Request) -> AsyncIterator[PatientAccess]:
        gate: Gate = request.app.state.gate
        viewer: Viewer = request.app.state.viewer
        _refuse_encoded_path(request)
        async with gate.transaction([]) as session:
            launch = await _launch_of(request, session)
            origin = origin_of(request)
            if self.of is Subject.STUDY:
                uid = request.path_params[Subject.STUDY.value]
                try:
                    parse_uid(uid)
                except ValueError as error:
                    raise NotFound("There is nothing at this address.") from error
                yield await viewer.study_access(session, launch, uid, origin)
            else:
                yield await viewer.patient_access(session, launch, origin)

    def describe(self) -> dict[str, str]:
        return {"guard": "viewer-session", "action": "study:view", "of": self.of.value}


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
        return await viewer.open_session(session, request.path_params["ctx"], cookie)
    except Unauthenticated:
        await gate.trail.record(
            Entry(
                action=Action.SIGN_IN,
                outcome=Outcome.DENIED,
                origin=origin_of(request),
                reason="no-cookie" if cookie is None else "bad-cookie",
                detail={"path": request.url.path[:256]},
            )
        )
        raise


def _refuse_encoded_path(request: Request) -> None:
    """No route of the gateway needs a percent sign: one is a try to be read in two ways."""
    raw: bytes = request.scope.get("raw_path", b"")
    if b"%" in raw or b"\\" in raw or b"//" in raw:
        raise NotFound("There is nothing at this address.")
