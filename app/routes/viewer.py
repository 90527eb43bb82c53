"""Viewer links on the API origin; their opening, and the pages around it, on the viewer's."""

from datetime import datetime
from typing import Annotated
from uuid import UUID

from fastapi import Depends, Query, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from pydantic import BaseModel

from app import linking, problems
from app.access import Grant, PatientAccess, Public, Subject
from app.access.guards import origin_of
from app.audit import Action
from app.db import Database, utcnow
from app.dicom import parse_uid
from app.dicomweb import Metadata
from app.errors import Conflict, LightboxError, Unprocessable
from app.inert import inert_json
from app.limits import Launches
from app.linking import StudySummary
from app.models import OrderStatus
from app.routes.dicomweb import dicom_web_root
from app.routes.studies import StudyUid
from app.routing import AccessRouter
from app.settings import Settings
from app.viewer import (
    COMPARE_LAYOUT,
    EHR_PAGE,
    SessionCookie,
    SignOfLife,
    Viewer,
    page,
    refusals,
)
from app.viewer.glances import Alive
from app.viewer.sessions import COOKIE_NAME, WARN_MINUTES

router = AccessRouter(tags=["viewer"])

ViewStudy = Annotated[
    PatientAccess, Depends(Grant(Action.STUDY_VIEW, of=Subject.STUDY), scope="function")
]
ViewOrder = Annotated[
    PatientAccess, Depends(Grant(Action.STUDY_VIEW, of=Subject.ORDER), scope="function")
]
ViewPatient = Annotated[
    PatientAccess, Depends(Grant(Action.STUDY_VIEW, of=Subject.PATIENT), scope="function")
]
A_PAGE = Depends(Public("a page or a redirect; it shows no patient data"))


class ViewerLink(BaseModel):
    """A link that opens once, until `expires_at`; the viewer it opens ends at the latest at
    `session_expires_at`."""

    url: str
    study_count: int
    study_instance_uids: list[str]
    order_id: UUID | None = None
    patient_id: UUID
    expires_at: datetime
    session_expires_at: datetime


@router.get("/api/v1/dicom/viewer/url/{study_instance_uid}")
async def link_to_study(
    access: ViewStudy,
    study_instance_uid: StudyUid,
    request: Request,
    compare_with: Annotated[
        str, Query(description="A second study of the same patient, shown side by side.")
    ] = "",
) -> ViewerLink:
    """A link that opens one study, or two of the same patient side by side."""
    known = await linking.studies_of(access)
    opened = [_one(known, study_instance_uid)]
    if compare_with:
        try:
            parse_uid(compare_with)
        except ValueError as error:
            raise Unprocessable(f"`compare_with` is not a UID: {error}") from error
        if compare_with == study_instance_uid:
            raise Unprocessable("`compare_with` must be another study.")
        opened.append(_one(known, compare_with))
    return await _link(request, access, opened, known, COMPARE_LAYOUT if compare_with else "")


@router.get("/api/v1/dicom/viewer/url/order/{order_id}")
async def link_to_order(access: ViewOrder, order_id: UUID, request: Request) -> ViewerLink:
    """A link that opens the studies of an order. 404 while there are no images, 409 once the order
    is cancelled."""
    if access.order is not None and access.order.status == OrderStatus.CANCELLED:
        raise Conflict("The order is cancelled; open its images by study or patient instead.")
    opened = await linking.studies_of(access)
    return await _link(request, access, opened, await linking.patient_studies_of(access))


@router.get("/api/v1/dicom/viewer/url/patient/{patient_id}")
async def link_to_patient(access: ViewPatient, patient_id: UUID, request: Request) -> ViewerLink:
    """A link that opens all studies of a patient, newest first. 404 while there are none."""
    opened = await linking.studies_of(access)
    return await _link(request, access, opened, opened)


@router.get("/", dependencies=[A_PAGE], include_in_schema=False)
async def viewer_root(request: Request) -> Response:
    """What somebody sees who opens the viewer's bare address."""
    return HTMLResponse(page(*EHR_PAGE, origin_of(request).request_id))


@router.get("/viewer", dependencies=[A_PAGE], response_class=HTMLResponse)
async def open_viewer(
    request: Request,
    launch: str = "",
    ctx: str = "",
) -> Response:
    """Trade a one-time code for a cookie and a clean URL; then serve OHIF at that URL."""
    viewer: Viewer = request.app.state.viewer
    database: Database = request.app.state.database
    settings: Settings = request.app.state.settings
    origin = origin_of(request)
    if launch:
        try:
            redeemed = await viewer.redeem(launch, origin)
        except LightboxError as error:
            said = await refusals.of_link(viewer, database, launch, error, origin.request_id)
            return HTMLResponse(said, status_code=error.status, headers=problems.headers_of(error))
        answer = RedirectResponse(redeemed.clean_path, status_code=303)
        answer.set_cookie(
            COOKIE_NAME,
            redeemed.cookie_value,
            max_age=redeemed.max_age_seconds,
            path=redeemed.cookie_path,
            httponly=True,
            secure=settings.viewer_base_url.startswith("https://"),
            samesite="strict",
        )
        return answer
    if not ctx:
        return HTMLResponse(page(*EHR_PAGE, origin.request_id), status_code=404)
    if not await viewer.is_live(ctx):
        if await viewer.is_known(ctx):
            # There its cookie comes along, and more can be said.
            return RedirectResponse(f"/s/{ctx}/ended", status_code=303)
        said = page(refusals.REFUSED, refusals.NOT_YOURS, origin.request_id)
        return HTMLResponse(said, status_code=403)
    return Response(headers={"X-Accel-Redirect": "/_ohif/index.html"}, media_type="text/html")


@router.get("/s/{ctx}/status", dependencies=[Depends(SessionCookie())], status_code=204)
async def session_status(ctx: str) -> None:
    """204 while this browser's viewing session lives."""


async def _alive(alive: Alive, _request: Request) -> Response:
    """A sign of life: somebody sits in front of the viewer. How long it may still be open."""
    left = max(0, int((alive.expires_at - utcnow()).total_seconds()))
    answer = {
        "seconds_left": left,
        "warn_seconds": WARN_MINUTES * 60,
        "purpose_of_use": alive.purpose_of_use,
    }
    return Response(inert_json(answer), media_type="application/json")


router.direct("/s/{ctx}/alive", _alive, SignOfLife(), media_types=["application/json"])


@router.get("/s/{ctx}/ended", dependencies=[A_PAGE], response_class=HTMLResponse)
async def session_ended(request: Request, ctx: str) -> Response:
    """The page that a viewer turns to when its session doesn't answer any more."""
    viewer: Viewer = request.app.state.viewer
    cookie, request_id = request.cookies.get(COOKIE_NAME), origin_of(request).request_id
    said = await refusals.of_session(viewer, request.app.state.database, ctx, cookie, request_id)
    return HTMLResponse(said)


def _one(known: list[StudySummary], uid: str) -> StudySummary:
    """The study among the patient's own. Raises Conflict: two patients are never shown in one."""
    for summary in known:
        if summary.study.study_instance_uid == uid:
            return summary
    raise Conflict("The two studies are not both of this patient; they can't be shown together.")


async def _link(
    request: Request,
    access: PatientAccess,
    opened: list[StudySummary],
    known: list[StudySummary],
    layout: str = "",
) -> ViewerLink:
    launches: Launches = request.app.state.launches
    launches.count(access.principal.sub)
    viewer: Viewer = request.app.state.viewer
    launch = await viewer.launch(access, opened, known, layout=layout)
    metadata: Metadata = request.app.state.metadata
    metadata.make_ready(access, opened, dicom_web_root(launch.ctx))
    return ViewerLink(
        url=launch.url,
        study_count=len(launch.study_instance_uids),
        study_instance_uids=launch.study_instance_uids,
        order_id=access.order.id if access.order else None,
        patient_id=access.patient.id,
        expires_at=launch.expires_at,
        session_expires_at=launch.session_expires_at,
    )
