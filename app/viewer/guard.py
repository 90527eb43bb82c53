"""The guards of the viewer origin: a launch cookie instead of a bearer token."""

from collections.abc import AsyncIterator

from fastapi import Request

from app.access import Gate, Guard, PatientAccess, Subject
from app.access.guards import origin_of
from app.dicom import parse_uid
from app.errors import NotFound
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
            launch = await viewer.open_session(
                session, request.path_params["ctx"], request.cookies.get(COOKIE_NAME)
            )
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
        viewer: Viewer = request.app.state.viewer
        async with gate.database.session() as session:
            await viewer.open_session(
                session, request.path_params["ctx"], request.cookies.get(COOKIE_NAME)
            )

    def describe(self) -> dict[str, str]:
        return {"guard": "session-cookie"}


def _refuse_encoded_path(request: Request) -> None:
    """No route of the gateway needs a percent sign: one is a try to be read in two ways."""
    raw: bytes = request.scope.get("raw_path", b"")
    if b"%" in raw or b"\\" in raw or b"//" in raw:
        raise NotFound("There is nothing at this address.")
