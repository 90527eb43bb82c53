"""DICOMweb, for two kinds of caller: nothing but what stands here.

`/dicom-web`          with a bearer token: the rights of the caller
`/s/{ctx}/dicom-web`  with a launch cookie: OHIF, the studies of its session, read-only

Both have the same routes and handlers, below; they differ in their guards, in where a search
starts, and in the root of the addresses they give. Storing is in `app.routes.stow`.
"""

import hashlib
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.resources import files as resources
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.convertors import Convertor, register_url_convertor

from app.access import (
    DirectGuard,
    InstanceFacts,
    Nothing,
    SessionAccess,
    StudyAccess,
    StudyGrant,
    Visible,
    VisiblePatients,
)
from app.audit import Action
from app.db import Database
from app.dicomweb import Freshness, Metadata, files, media, search
from app.dicomweb.files import Chunks, Part, Rendering, SendFile
from app.dicomweb.media import DICOM_JSON, Choice
from app.dicomweb.metadata import Packed
from app.dicomweb.search import Found, Search, Searches, parse_search
from app.errors import NotAcceptable, NotFound
from app.inert import inert_json
from app.models import Instance
from app.orthanc import Orthanc
from app.problems import method_not_allowed
from app.routing import AccessRouter
from app.settings import Settings
from app.viewer import ViewerGrant, ViewerNothing, ViewerSearch


class UidConvertor(Convertor[str]):
    """A UID in a path. Whether it is a valid one doesn't matter: one that isn't names nothing."""

    regex = "[0-9.]{1,64}"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


class AnythingConvertor(UidConvertor):
    """Whatever follows, line ends too: `path` stops at one, and the request would be nobody's."""

    regex = r"[\s\S]*"


register_url_convertor("uid", UidConvertor())
register_url_convertor("anything", AnythingConvertor())

STUDY = "/studies/{study_instance_uid:uid}"
SERIES = STUDY + "/series/{series_instance_uid:uid}"
INSTANCE = SERIES + "/instances/{sop_instance_uid:uid}"

bearer = AccessRouter(prefix="/dicom-web", tags=["dicomweb"])
viewer = AccessRouter(prefix="/s/{ctx}/dicom-web", tags=["dicomweb of the viewer"])

SearchAll = Annotated[
    VisiblePatients,
    Depends(Visible(Action.STUDY_LIST, parses_query=True), scope="function"),
]


class DicomJsonResponse(JSONResponse):
    media_type = DICOM_JSON

    def render(self, content: Any) -> bytes:
        return inert_json(content)


# --------------------------------------------------------------------------------- QIDO-RS


@bearer.get("/studies", response_class=DicomJsonResponse)
async def search_visible_studies(window: SearchAll, request: Request) -> Response:
    """QIDO-RS among the studies of the patients that the caller may see (PS3.18 10.6)."""
    wanted = _search(request, search.STUDY_MATCHING)
    found, patients = await search.visible_studies(window, wanted)
    await window.disclose(patients)
    return _found(found, wanted)


async def search_session_studies(access: SessionAccess, request: Request) -> Response:
    """QIDO-RS among the session's studies; anything else of the patient is not there."""
    wanted = _search(request, search.STUDY_MATCHING)
    return _found(await _searches(request).studies(access, wanted), wanted)


async def search_series(access: StudyAccess, request: Request) -> Response:
    """QIDO-RS among the series of one study."""
    wanted = _search(request, search.SERIES_MATCHING)
    return _found(await _searches(request).series(access, wanted), wanted)


async def search_instances(access: StudyAccess, request: Request) -> Response:
    """QIDO-RS among the instances of one study, or of one of its series."""
    wanted = _search(request, search.INSTANCE_MATCHING)
    series_uid = request.path_params.get("series_instance_uid", "")
    return _found(await _searches(request).instances(access, wanted, series_uid), wanted)


def _search(request: Request, allowed: Sequence[str]) -> Search:
    media.for_json(_accept(request))
    return parse_search(request.query_params.multi_items(), allowed)


def _found(found: Found, wanted: Search) -> Response:
    headers = {"X-Total-Count": str(found.total)}
    warnings = []
    more = found.total - wanted.offset - len(found.rows)
    if more > 0:
        warnings.append(f'299 lightbox "There are {more} additional results."')
    if wanted.fuzzy:
        warnings.append(
            '299 lightbox "The fuzzymatching parameter is not supported. Only literal matching '
            'has been performed."'
        )
    if warnings:
        headers["Warning"] = ", ".join(warnings)
    return DicomJsonResponse(found.rows, headers=headers)


# --------------------------------------------------------------------------------- metadata


async def study_metadata(access: StudyAccess, request: Request) -> Response:
    """The metadata of a study."""
    return await _packed(request, partial(_metadata(request).study, access))


async def series_metadata(access: StudyAccess, request: Request) -> Response:
    """The metadata of a series."""
    uid = request.path_params["series_instance_uid"]
    return await _packed(request, partial(_metadata(request).series, access, uid))


async def instance_metadata(access: StudyAccess, request: Request) -> Response:
    """The metadata of an instance."""
    instance = files.instance_of(access)
    uid = request.path_params["series_instance_uid"]
    make = partial(_metadata(request).instance, access, uid, instance.sop_instance_uid)
    return await _packed(request, make)


async def _packed(request: Request, make: Callable[[str], Awaitable[Packed]]) -> Response:
    media.for_json(_accept(request))
    _refuse_parameters(request)
    packed = await make(_root(request))
    headers = {"ETag": f'W/"{packed.stamp}"'}
    if _is_known(request, packed.stamp):
        return Response(status_code=304, headers=headers)
    if media.takes_gzip(request.headers.get("accept-encoding", "")):
        headers |= {"Content-Encoding": "gzip", "Vary": "Accept-Encoding"}
        return Response(packed.body, headers=headers, media_type=DICOM_JSON)
    return Response(packed.plain(), headers=headers, media_type=DICOM_JSON)


# ------------------------------------------------------------------------------------ files


async def retrieve_files(access: StudyAccess, request: Request) -> Response:
    """The DICOM files of a study or series, as they are stored (PS3.18 10.4.1.1.1, .2)."""
    _refuse_parameters(request)
    series_uid = request.path_params.get("series_instance_uid", "")
    async with _database(request).session() as session:
        instances = await files.instances_of(session, access, series_uid)
    choice = media.for_files(
        _accept(request), (each.transfer_syntax_uid for each in instances), one=False
    )
    stamp = await _freshness(request).stamp(access)
    linked = len(instances)
    instances = await _freshness(request).held(access, instances)
    if not instances:
        raise NotFound("The image archive does not hold these images any more.")
    tag = _tag(stamp, request.url.path)
    headers = {"ETag": f'W/"{tag}"'}
    if len(instances) < linked:
        lost = f"The image archive has lost {linked - len(instances)} of the {linked} files."
        headers["Warning"] = f'299 lightbox "{lost}"'
    if _is_known(request, tag):
        return Response(status_code=304, headers=headers)
    boundary = files.new_boundary()
    media_type = files.multipart_type(choice.media_type, boundary)
    if request.method == "HEAD":
        return Response(headers=headers, media_type=media_type)
    body = b"".join(files.assembled(instances, boundary))
    return Response(body, headers=headers, media_type=media_type)


async def retrieve_file(access: StudyAccess, request: Request) -> Response:
    """One DICOM file, as it is stored (PS3.18 10.4.1.1.3)."""
    _refuse_parameters(request)
    instance = files.instance_of(access)
    choice = media.for_files(_accept(request), [instance.transfer_syntax_uid], one=True)
    stamp = await _freshness(request).stamp(access)
    # Each part says its own transfer syntax.
    choice = replace(choice, transfer_syntax=instance.transfer_syntax_uid)
    return _send(request, files.sent(choice, f"/instances/{instance.orthanc_id}/file"), stamp)


# ----------------------------------------------------------------------------------- frames


async def frames(access: StudyAccess, request: Request) -> Response:
    """Frames of an instance, `1` or `1,2,3`, as they are stored (PS3.18 10.4.1.1.6).

    One alone may be asked for without a multipart envelope.
    """
    if request.url.query:
        _refuse_parameters(request)
    instance = files.instance_of(access)
    numbers = files.frame_numbers(request.path_params.get("frames", ""), instance)
    choice = media.for_frames(_accept(request), instance.transfer_syntax_uid)
    stamp = await _freshness(request).stamp(access)
    if len(numbers) == 1 and not choice.transcode:
        return _send(request, files.frame(instance, numbers[0], choice, stamp), stamp)
    if len(numbers) == 1 and not choice.multipart:
        tag = _tag(stamp, request.url.path, choice)
        if _is_known(request, tag):
            return Response(status_code=304, headers={"ETag": f'"{tag}"'})
        plain = await _orthanc(request).plain_frame(*_uids(request), numbers[0])
        return Response(plain, media_type=choice.part_type, headers={"ETag": f'"{tag}"'})
    parts = (
        Part(choice.part_type, _frame(request, instance, number, choice)) for number in numbers
    )
    return await _parts(request, Choice(choice.media_type, True), parts, stamp)


def _frame(
    request: Request, instance: InstanceFacts, number: int, choice: Choice
) -> Callable[[], Chunks]:
    if choice.transcode:
        return partial(_orthanc(request).plain_frame_chunks, *_uids(request), number)
    return partial(_orthanc(request).raw_frame, instance.orthanc_id, number)


# ----------------------------------------------------------------------------- rendered, icon


async def rendered(access: StudyAccess, request: Request) -> Response:
    """A picture of a frame, by default the first; of a study or series one that stands for it
    (PS3.18 10.4.1.1.3, 8.3.5): `viewport`, `window`, `quality`. A video or an encapsulated PDF as
    what it is."""
    instance, number = await _pictured(access, request)
    rendering = files.parse_rendering(
        request.query_params.multi_items(), ("viewport", "window", "quality")
    )
    if instance is None:
        raise NotFound("There are no pixels here that could be rendered.")
    media_type = media.for_rendered(_accept(request), files.rendered_types(instance))
    return await _picture(access, request, instance, number, rendering, media_type)


async def thumbnail(access: StudyAccess, request: Request) -> Response:
    """A small picture of a study, a series, an instance or a frame (PS3.18 10.4.1.1.4); an icon
    where there are no pixels to show, or none that the archive can decompress."""
    instance, number = await _pictured(access, request)
    rendering = files.parse_rendering(request.query_params.multi_items(), ("viewport",))
    small = files.Rendering(viewport=rendering.viewport or THUMBNAIL)
    if instance is not None and files.has_picture(instance):
        media_type = media.for_rendered(_accept(request), ["image/jpeg", "image/png"])
        try:
            return await _picture(access, request, instance, number, small, media_type)
        except NotAcceptable:
            pass
    media.for_rendered(_accept(request), ["image/png"])
    return Response(ICON, media_type="image/png")


async def _pictured(
    access: StudyAccess, request: Request
) -> tuple[InstanceFacts | Instance | None, int]:
    """The instance and frame that a picture is asked of."""
    path = request.path_params
    if "sop_instance_uid" in path:
        instance = files.instance_of(access)
        number, *more = files.frame_numbers(path.get("frame", "1"), instance)
        if more:
            raise NotFound("A picture is of one frame.")
        return instance, number
    async with _database(request).session() as session:
        found = await files.instances_of(session, access, path.get("series_instance_uid", ""))
    return files.representative(found), 1


async def _picture(
    access: StudyAccess,
    request: Request,
    instance: InstanceFacts | Instance,
    number: int,
    rendering: Rendering,
    media_type: str,
) -> Response:
    stamp = await _freshness(request).stamp(access)
    if media_type.startswith("image/") and instance.transfer_syntax_uid not in media.UNCOMPRESSED:
        # Whether the archive has a decoder shows only when it is asked.
        picture = await _orthanc(request).rendered(
            instance.orthanc_id, number, rendering.query, media_type
        )
        return Response(picture, media_type=media_type)
    return _send(request, files.rendered(instance, number, rendering, media_type, stamp), stamp)


THUMBNAIL = (128, 128)  # width, height in pixels
ICON = resources("app.dicomweb").joinpath("no-picture.png").read_bytes()


# -------------------------------------------------------------------------------- bulk data


async def bulk_data(access: StudyAccess, request: Request) -> Response:
    """The bytes of one element: a PDF, a waveform, an overlay (PS3.18 10.4.1.1.5)."""
    _refuse_parameters(request)
    instance = files.instance_of(access)
    tags = files.bulk_path(request.path_params["path"])
    choice = media.for_bytes(_accept(request), files.bulk_type(instance, tags))
    stamp = await _freshness(request).stamp(access)
    path = f"/instances/{instance.orthanc_id}/content/{'/'.join(tags)}"
    return _send(request, files.sent(choice, path), stamp)


_STORES = re.compile(r"/dicom-web/studies(/[0-9.]{1,64})?")


async def nothing(_: None, request: Request) -> Response:
    """What is not enumerated is not there, or does not take the method."""
    if request.method in ("GET", "HEAD"):
        raise NotFound("There is nothing at this address.")
    stores = _STORES.fullmatch(request.url.path)
    return method_not_allowed(request, "GET, HEAD, POST" if stores else "GET, HEAD")


# ----------------------------------------------------------------------------------- answers


def _send(request: Request, file: SendFile, stamp: str) -> Response:
    """Leave the bytes to the edge, which gets them from Orthanc, or has kept them."""
    path = file.location.replace(file.boundary, "") if file.boundary else file.location
    tag = _tag(stamp, path, file.media_type)
    if _is_known(request, tag):
        return Response(status_code=304, headers={"ETag": f'"{tag}"'})
    headers = {"X-Accel-Redirect": file.location, "ETag": f'"{tag}"'}
    if not file.boundary:
        return Response(headers=headers, media_type=file.media_type)
    headers |= {"ETag": f'W/"{tag}"', "X-Lightbox-Part": file.media_type}
    return Response(
        headers=headers, media_type=files.multipart_type(file.media_type, file.boundary)
    )


async def _parts(request: Request, choice: Choice, parts: Iterable[Part], stamp: str) -> Response:
    """Stream the parts through the app."""
    tag = _tag(stamp, request.url.path, choice)
    headers = {"ETag": f'W/"{tag}"'}
    if _is_known(request, tag):
        return Response(status_code=304, headers=headers)
    boundary = files.new_boundary()
    media_type = files.multipart_type(choice.media_type, boundary)
    if request.method == "HEAD":
        return Response(headers=headers, media_type=media_type)
    body = await files.begun(files.in_parts(parts, boundary))
    return StreamingResponse(body, headers=headers, media_type=media_type)


def _tag(*parts: object) -> str:
    """The entity tag of what is named by these; the study's stamp is the first."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _is_known(request: Request, tag: str) -> bool:
    """Does the client have it already (RFC 9110 13.1.2)? It was authorized like any other."""
    header = request.headers.get("if-none-match")
    if not header:
        return False
    known = [each.strip().removeprefix("W/") for each in header.split(",")]
    return f'"{tag}"' in known or header.strip() == "*"


def _refuse_parameters(request: Request) -> None:
    files.parse_rendering(request.query_params.multi_items(), ())


def _accept(request: Request) -> str:
    return ", ".join(request.headers.getlist("accept"))


def dicom_web_root(ctx: str) -> str:
    """The root of a session's DICOMweb, on the viewer origin."""
    return f"/s/{ctx}/dicom-web"


def _root(request: Request) -> str:
    """What the addresses in an answer begin with."""
    ctx = request.path_params.get("ctx")
    if ctx is not None:
        return dicom_web_root(ctx)
    settings: Settings = request.app.state.settings
    return f"{settings.api_base_url}/dicom-web"


def _uids(request: Request) -> tuple[str, str, str]:
    path: Mapping[str, str] = request.path_params
    return path["study_instance_uid"], path["series_instance_uid"], path["sop_instance_uid"]


def _searches(request: Request) -> Searches:
    searches: Searches = request.app.state.searches
    return searches


def _database(request: Request) -> Database:
    database: Database = request.app.state.database
    return database


def _orthanc(request: Request) -> Orthanc:
    orthanc: Orthanc = request.app.state.orthanc
    return orthanc


def _freshness(request: Request) -> Freshness:
    freshness: Freshness = request.app.state.freshness
    return freshness


def _metadata(request: Request) -> Metadata:
    metadata: Metadata = request.app.state.metadata
    return metadata


# ------------------------------------------------------------------------------------ routes

_PICTURES = ("image/jpeg", "image/png")
_PARTS = ("multipart/related",)


def _add(router: AccessRouter, see: DirectGuard, fetch: DirectGuard) -> None:
    """The routes of a root: `see` guards what is shown, `fetch` whole files."""
    add = router.direct
    # The most frequent first.
    add(INSTANCE + "/frames/{frames}", frames, see, media_types=(media.OCTETS, *_PARTS))
    add(SERIES + "/metadata", series_metadata, see, media_types=(DICOM_JSON,))
    add(INSTANCE + "/frames", frames, see, media_types=_PARTS)
    for path in (STUDY, SERIES, INSTANCE, INSTANCE + "/frames/{frame}"):
        add(path + "/rendered", rendered, see, media_types=_PICTURES)
    add(INSTANCE + "/bulk/{path:path}", bulk_data, see, media_types=(media.OCTETS, *_PARTS))
    add(STUDY + "/series", search_series, see, media_types=(DICOM_JSON,))
    add(STUDY + "/instances", search_instances, see, media_types=(DICOM_JSON,))
    add(SERIES + "/instances", search_instances, see, media_types=(DICOM_JSON,))
    add(STUDY + "/metadata", study_metadata, see, media_types=(DICOM_JSON,))
    add(INSTANCE + "/metadata", instance_metadata, see, media_types=(DICOM_JSON,))
    for path in (STUDY, SERIES, INSTANCE, INSTANCE + "/frames/{frame}"):
        add(path + "/thumbnail", thumbnail, see, media_types=_PICTURES)
    add(STUDY, retrieve_files, fetch, media_types=_PARTS)
    add(SERIES, retrieve_files, fetch, media_types=_PARTS)
    add(INSTANCE, retrieve_file, fetch, media_types=(media.DICOM, *_PARTS))


_add(bearer, StudyGrant(Action.STUDY_VIEW), StudyGrant(Action.STUDY_RETRIEVE))
_add(viewer, ViewerGrant(), ViewerGrant())
viewer.direct("/studies", search_session_studies, ViewerSearch(), media_types=(DICOM_JSON,))

routes = [*viewer.routes, *bearer.routes]
"""To stand before all others: what is asked for most is looked for first."""

_ALL = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
rest = AccessRouter()
"""What is asked for below the roots and is none of the above; to be included last."""
rest.direct("/dicom-web/{rest:anything}", nothing, Nothing(), methods=_ALL, include_in_schema=False)
rest.direct(
    "/s/{ctx}/dicom-web/{rest:anything}",
    nothing,
    ViewerNothing(),
    methods=_ALL,
    include_in_schema=False,
)
