"""STOW-RS (PS3.18 10.5): DICOM instances from clients that speak DICOMweb.

Each part is taken in by itself, as soon as it is whole, by the checks of every upload; its
PatientID decides whose it is, and nothing is rewritten. A part that is refused hides none that is
stored. Where the body itself breaks off or grows too large, what was stored before stays and is
reported, and the break is one more failure; where nothing was, the break is the answer.

Status (PS3.18 table 10.5.3-1):

200  every part is stored; one that was there already counts as stored
202  some are stored, and there are failures or warnings
400  none is stored, and none could be read: no DICOM files, or malformed ones
409  none is stored, for other reasons or a mixture
503  none is stored, because Orthanc, database or trail did not answer: send it again

What is wrong with the request itself, and nothing of it stored, is a problem as everywhere: 401,
403, 406, 413, 415, 422.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Annotated, Any, BinaryIO

import anyio.to_thread
from fastapi import Depends, Request
from fastapi.responses import Response
from python_multipart.multipart import parse_options_header

from app.access import Caller, RoleAccess
from app.audit import Action
from app.dicom import Header, parse_uid, read_header
from app.dicomweb import media
from app.dicomweb.media import DICOM, DICOM_JSON
from app.errors import (
    Conflict,
    Forbidden,
    LightboxError,
    MalformedDicom,
    Nonconforming,
    NotDicom,
    NotFound,
    TooLarge,
    Unavailable,
    Unprocessable,
    UnsupportedMediaType,
)
from app.inert import inert_json
from app.intake import Intake, Receipt, Target
from app.routes.forms import bounded_body
from app.routes.related import Part, boundary_of, related_parts, single_part
from app.routes.uploads import MAX_FILES, take_apart
from app.routing import AccessRouter
from app.settings import Settings

router = AccessRouter(prefix="/dicom-web", tags=["dicomweb"])

Store = Annotated[
    RoleAccess, Depends(Caller(Action.STUDY_UPLOAD, patient_in_body=True), scope="function")
]

FAILURE_REASONS: tuple[tuple[type[LightboxError], int], ...] = (
    (Unavailable, 0xA700),  # refused, out of resources: send it again
    (TooLarge, 0xA713),  # refused, out of resources: it is too large
    (UnsupportedMediaType, 0xC000),  # cannot understand: not what a part may be
    (NotDicom, 0xC000),
    (Unprocessable, 0xC000),  # and MalformedDicom
    (NotFound, 0xC404),  # no patient here, to whom the caller may add images, has the PatientID
    (Conflict, 0xC409),  # contradicts what is stored, or the study in the address
    (Forbidden, 0x0124),  # refused, not authorized
    (Nonconforming, 0xA900),  # dataset does not match SOP class
    (LightboxError, 0x0110),  # processing failure
)
"""FailureReason (0008,1197), the first that fits. PS3.18 I.2.2 has A7xx, A9xx, Cxxx and 0110, PS3.7
C.5 has 0124; the last digits of A7xx, A9xx and Cxxx are ours to say."""

DIFFERS = 0xB001
"""WarningReason (0008,1196), of ours: stored as it came, but a person should look at it."""

_UNREADABLE = (NotDicom, MalformedDicom, UnsupportedMediaType)
_SENT_BADLY = (*_UNREADABLE, Unprocessable)

_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": 'DICOM files (PS3.10): `multipart/related; type="application/dicom"; '
        "boundary=...` with a part for each, or one alone as `application/dicom`.",
        "content": {
            "multipart/related": {"schema": {"type": "string", "format": "binary"}},
            DICOM: {"schema": {"type": "string", "format": "binary"}},
        },
    }
}
_ANSWERS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {DICOM_JSON: {"schema": {"type": "object"}}}}
    for status, text in {
        200: "Every instance is stored.",
        202: "Some are stored, and there are failures or warnings.",
        400: "None is stored, and none could be read.",
        409: "None is stored.",
    }.items()
}


@router.post("/studies", openapi_extra=_BODY, responses=_ANSWERS, response_class=Response)
async def store_instances(caller: Store, request: Request) -> Response:
    """Store DICOM instances (STOW-RS), each for the patient of its PatientID.

    The answer lists what is stored, and what is not with a FailureReason and, as (0009,1001) of
    the private creator LIGHTBOX, a sentence.
    """
    return await _store(caller, request, Target())


@router.post(
    "/studies/{study_instance_uid}",
    openapi_extra=_BODY,
    responses=_ANSWERS,
    response_class=Response,
)
async def store_instances_of_a_study(
    caller: Store, study_instance_uid: str, request: Request
) -> Response:
    """Store DICOM instances of one study; those of another are refused."""
    try:
        uid = parse_uid(study_instance_uid)
    except ValueError as error:
        raise Unprocessable(f"The study's UID in the path is not valid: {error}") from error
    return await _store(caller, request, Target(study_instance_uid=uid))


async def _store(caller: RoleAccess, request: Request, target: Target) -> Response:
    intake: Intake = request.app.state.intake
    settings: Settings = request.app.state.settings
    # Before anything is stored.
    media.for_json(", ".join(request.headers.getlist("accept")))
    answer = _Answer(f"{settings.api_base_url}/dicom-web")
    try:
        async with aclosing(_parts(request, intake, settings)) as parts:
            async for part in parts:
                taken = await _take(caller, intake, part, target)
                if isinstance(taken, Receipt):
                    answer.stored.append((part.number, taken))
                else:
                    answer.failed.append(taken)
    except LightboxError as error:
        # Of the body: each part's own are in the answer.
        if not answer.stored:
            raise
        answer.failed.append(_Failure(error))
    return answer.response()


def _parts(request: Request, intake: Intake, settings: Settings) -> AsyncGenerator[Part, None]:
    """The files of the body. Raises UnsupportedMediaType, Unprocessable."""
    said, parameters = parse_options_header(request.headers.get("content-type", ""))
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise UnsupportedMediaType("Send the body as it is, without a Content-Encoding.")
    body = bounded_body(request, intake.limits.max_bytes)
    if said == DICOM.encode():
        return single_part(body, DICOM, spool_dir=settings.spool_dir)
    kind = parameters.get(b"type", b"").strip().lower()
    if said != b"multipart/related" or kind != DICOM.encode():
        metadata = kind in (b"application/dicom+json", b"application/dicom+xml")
        raise UnsupportedMediaType(
            ("Metadata with its bulk data apart is not taken. " if metadata else "")
            + 'Send DICOM files as `multipart/related; type="application/dicom"; boundary=...`, '
            "or one alone as `application/dicom`."
        )
    return related_parts(
        body, boundary_of(parameters), max_parts=MAX_FILES, spool_dir=settings.spool_dir
    )


@dataclass(frozen=True)
class _Failure:
    """What was not stored, and why."""

    error: LightboxError
    number: int | None = None  # of the part; None: the body itself
    header: Header | None = None  # None: it could not be read


async def _take(
    caller: RoleAccess, intake: Intake, part: Part, target: Target
) -> Receipt | _Failure:
    if part.media_type not in (DICOM, ""):
        return _Failure(UnsupportedMediaType("A part is application/dicom."), part.number)
    taken = await take_apart(caller, intake, part.file, target)
    if isinstance(taken, Receipt):
        return taken
    header = await anyio.to_thread.run_sync(_header, intake, part.file, taken)
    return _Failure(taken, part.number, header)


def _header(intake: Intake, file: BinaryIO, error: LightboxError) -> Header | None:
    """The header of a file that was refused, to name it; None where the reason is the file."""
    if isinstance(error, (*_UNREADABLE, TooLarge)):
        return None
    try:
        with intake.scan(file) as scanned:
            return read_header(file, scanned)
    except LightboxError:
        return None


@dataclass
class _Answer:
    """The Store Instances Response (PS3.18 I) in the making."""

    root: str  # of DICOMweb, as clients see it
    stored: list[tuple[int, Receipt]] = field(default_factory=list)
    failed: list[_Failure] = field(default_factory=list)

    def response(self) -> Response:
        """Raises Unavailable where that is why nothing is stored."""
        errors = [each.error for each in self.failed]
        if not self.stored and all(isinstance(each, Unavailable) for each in errors):
            raise errors[0]
        return Response(inert_json(self.content()), self.status(), media_type=DICOM_JSON)

    def status(self) -> int:
        if self.stored:
            warned = any(receipt.warnings for _, receipt in self.stored)
            return 202 if self.failed or warned else 200
        return 400 if all(isinstance(each.error, _SENT_BADLY) for each in self.failed) else 409

    def content(self) -> dict[str, Any]:
        """As DICOM JSON (PS3.18 F)."""
        studies = {receipt.header.study_instance_uid for _, receipt in self.stored}
        named = [each for each in self.failed if each.header is not None]
        others = [each for each in self.failed if each.header is None]
        content: dict[str, Any] = {}
        if len(studies) == 1:
            content["00081190"] = _value("UR", f"{self.root}/studies/{studies.pop()}")
        for tag, items in (
            ("00081198", [self._failed(each) for each in named]),  # FailedSOPSequence
            ("00081199", [self._stored(*each) for each in self.stored]),  # ReferencedSOPSequence
            ("0008119A", [self._failed(each) for each in others]),  # OtherFailuresSequence
        ):
            if items:
                content[tag] = _value("SQ", *items)
        return content

    def _stored(self, number: int, receipt: Receipt) -> dict[str, Any]:
        header = receipt.header
        url = (
            f"{self.root}/studies/{header.study_instance_uid}/series/{header.series_instance_uid}"
            f"/instances/{header.sop_instance_uid}"
        )
        item = {**_reference(header), "00081190": _value("UR", url)}
        if receipt.warnings:
            item["00081196"] = _value("US", DIFFERS)
            item |= _sentence(number, " ".join(receipt.warnings))
        return item

    def _failed(self, failure: _Failure) -> dict[str, Any]:
        error = failure.error
        reason = next(code for kind, code in FAILURE_REASONS if isinstance(error, kind))
        detail = error.detail
        if isinstance(error, NotFound):
            # What intake says instead is for senders who can name an order.
            detail = (
                "No patient here, to whom you may add images, has this file's PatientID and issuer."
            )
        return {
            **(_reference(failure.header) if failure.header else {}),
            "00081197": _value("US", reason),
            **_sentence(failure.number, detail),
        }


def _reference(header: Header) -> dict[str, Any]:
    return {
        "00081150": _value("UI", header.sop_class_uid),
        "00081155": _value("UI", header.sop_instance_uid),
    }


def _sentence(number: int | None, text: str) -> dict[str, Any]:
    """For a person, in a private block: ErrorComment (0000,0902) is short, and of commands only."""
    said = text if number is None else f"Part {number}: {text}"
    return {"00090010": _value("LO", "LIGHTBOX"), "00091001": _value("UT", said)}


def _value(vr: str, *values: Any) -> dict[str, Any]:
    return {"vr": vr, "Value": list(values)}
