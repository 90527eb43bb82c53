"""The DICOMweb that OHIF gets: `/s/{ctx}/dicom-web`, read-only, nothing but what stands here."""

from typing import Annotated

from fastapi import Depends, Path, Query, Request
from fastapi.responses import JSONResponse, Response

from app import dicomweb, linking
from app.access import PatientAccess, Subject
from app.dicomweb import SERIES_MATCHING, STUDY_MATCHING, SendFile
from app.routing import AccessRouter
from app.viewer import Viewer, ViewerGrant

router = AccessRouter(prefix="/s/{ctx}/dicom-web", tags=["dicomweb"])

SearchSession = Annotated[PatientAccess, Depends(ViewerGrant(of=Subject.PATIENT), scope="function")]
ViewStudy = Annotated[PatientAccess, Depends(ViewerGrant(of=Subject.STUDY), scope="function")]
Uid = Annotated[str, Path(pattern=r"^[0-9.]{1,64}$")]
INSTANCE = "/studies/{study_instance_uid}/series/{series_instance_uid}/instances/{sop_instance_uid}"


class DicomJsonResponse(JSONResponse):
    media_type = "application/dicom+json"


@router.get("/studies", response_class=DicomJsonResponse)
async def search_studies(access: SearchSession, ctx: str, request: Request) -> Response:
    """QIDO-RS among the session's studies; anything else of the patient is not there."""
    viewer: Viewer = request.app.state.viewer
    search = dicomweb.parse_search(request.query_params.multi_items(), STUDY_MATCHING)
    allowed = await viewer.session_studies(access)
    studies = [
        each
        for each in await linking.studies_of(access)
        if each.study.study_instance_uid in allowed
    ]
    return DicomJsonResponse(dicomweb.search_studies(studies, search))


@router.get("/studies/{study_instance_uid}/series", response_class=DicomJsonResponse)
async def search_series(
    access: ViewStudy, ctx: str, study_instance_uid: Uid, request: Request
) -> Response:
    """QIDO-RS among the series of one study."""
    search = dicomweb.parse_search(request.query_params.multi_items(), SERIES_MATCHING)
    return DicomJsonResponse(dicomweb.search_series(await linking.study_of(access), search))


@router.get(
    "/studies/{study_instance_uid}/series/{series_instance_uid}/metadata",
    response_class=DicomJsonResponse,
)
async def series_metadata(
    access: ViewStudy,
    ctx: str,
    study_instance_uid: Uid,
    series_instance_uid: Uid,
    request: Request,
) -> Response:
    """The metadata of a series."""
    metadata = await dicomweb.series_metadata(
        access, request.app.state.orthanc, series_instance_uid, f"/s/{ctx}/dicom-web"
    )
    return Response(metadata, media_type="application/dicom+json")


@router.get(INSTANCE + "/frames/{number}", response_class=Response)
async def frame(
    access: ViewStudy,
    ctx: str,
    study_instance_uid: Uid,
    series_instance_uid: Uid,
    sop_instance_uid: Uid,
    number: Annotated[int, Path(ge=1, le=1_000_000)],
) -> Response:
    """One frame, as it is stored."""
    return _send(await dicomweb.frame(access, series_instance_uid, sop_instance_uid, number))


@router.get(INSTANCE + "/rendered", response_class=Response)
async def rendered(
    access: ViewStudy,
    ctx: str,
    study_instance_uid: Uid,
    series_instance_uid: Uid,
    sop_instance_uid: Uid,
    viewport: Annotated[str, Query(max_length=16)] = "",
) -> Response:
    """The first frame as a picture, or the video."""
    return _send(await dicomweb.rendered(access, series_instance_uid, sop_instance_uid, viewport))


@router.get(INSTANCE + "/bulk/{path:path}", response_class=Response)
async def bulk_data(
    access: ViewStudy,
    ctx: str,
    study_instance_uid: Uid,
    series_instance_uid: Uid,
    sop_instance_uid: Uid,
    path: str,
) -> Response:
    """The bytes of one element: a PDF, a waveform, an overlay."""
    return _send(await dicomweb.bulk_data(access, series_instance_uid, sop_instance_uid, path))


def _send(file: SendFile) -> Response:
    """Leave the bytes to the edge, which gets them from Orthanc."""
    return Response(headers={"X-Accel-Redirect": file.location}, media_type=file.media_type)
