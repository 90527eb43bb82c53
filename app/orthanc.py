"""The only module that talks to Orthanc.

Everything asked of Orthanc is a canonical request built here from validated UIDs or Orthanc ids;
nothing of a client's path, query or headers is ever passed on. Its answers are checked before
they are believed, and its error bodies never leave this module.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, Self

import anyio.to_thread
import httpx
from pyorthanc import AsyncOrthanc
from python_multipart.multipart import parse_options_header

from app.errors import Conflict, MalformedDicom, NotAcceptable, NotFound, OrthancUnavailable
from app.settings import Settings

CHUNK_BYTES = 256 * 1024
PROMPT_SECONDS = 3.0
_ORTHANC_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{8}){4}")


@dataclass(frozen=True)
class Stored:
    """What Orthanc said to an instance: its ids, and whether it was new."""

    instance_id: str
    series_id: str
    study_id: str
    new: bool


@dataclass(frozen=True)
class Statistics:
    """The archive's totals; `disk_size_mb` in MiB."""

    patients: int
    studies: int
    series: int
    instances: int
    disk_size_mb: float


@dataclass(frozen=True)
class Change:
    """An entry of Orthanc's log of changes. `kind` is `NewStudy`, `StableStudy`, ..."""

    seq: int
    kind: str
    orthanc_id: str
    mark: str  # tells it from another database's change of the same number


@dataclass(frozen=True)
class Held:
    """A study as Orthanc's index has it: the tags of its first file, by keyword."""

    orthanc_id: str
    tags: Mapping[str, str]
    series: tuple[str, ...]
    stable: bool


class Orthanc:
    """Orthanc's REST API and DICOMweb, with its failures told apart.

    Every method raises OrthancUnavailable where Orthanc doesn't answer, answers with an error
    we didn't provoke, or with something that makes no sense.
    """

    def __init__(self, client: AsyncOrthanc, transfers: AsyncOrthanc) -> None:
        self._client = client
        # Connections of their own for what slow readers may hold up.
        self._transfers = transfers

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        def client(connections: int) -> AsyncOrthanc:
            return AsyncOrthanc(
                settings.orthanc_url,
                username=settings.orthanc_username,
                password=settings.orthanc_password.get_secret_value(),
                return_raw_response=True,
                timeout=httpx.Timeout(settings.orthanc_timeout_seconds, connect=5.0),
                # Orthanc closes idle connections after 1 s: drop ours earlier, or a request meets
                # a closed one.
                limits=httpx.Limits(max_connections=connections, keepalive_expiry=0.8),
                trust_env=False,
                headers={"Accept-Encoding": "identity"},
            )

        return cls(client(20), client(12))

    async def close(self) -> None:
        await self._client.aclose()
        await self._transfers.aclose()

    async def version(self) -> str:
        """Orthanc's version."""
        system = _json(await self._ask("GET", "/system"))
        return str(_field(system, "Version", str))

    async def default_encoding(self) -> str:
        """Orthanc's name of the character set that it answers C-FIND in, `Latin1`."""
        return (await self._ask("GET", "/tools/default-encoding")).text.strip('"\r\n ')

    async def statistics(self) -> Statistics:
        """The archive's totals."""
        answer = _json(await self._ask("GET", "/statistics"))
        try:
            return Statistics(
                patients=int(answer["CountPatients"]),
                studies=int(answer["CountStudies"]),
                series=int(answer["CountSeries"]),
                instances=int(answer["CountInstances"]),
                disk_size_mb=round(int(answer["TotalDiskSize"]) / (1024 * 1024), 3),
            )
        except (KeyError, ValueError, TypeError) as error:
            raise _nonsense() from error

    async def store(self, file: BinaryIO, size: int) -> Stored:
        """Store one DICOM file, streamed from where `file` stands.

        Raises MalformedDicom where Orthanc finds the file bad.
        """
        response = await self._ask(
            "POST",
            "/instances",
            content=_chunks(file),
            headers={"Content-Type": "application/dicom", "Content-Length": str(size)},
            pass_on=(400,),
        )
        if response.status_code == 400:
            raise MalformedDicom("The archive can't read this file as DICOM; nothing was stored.")
        answer = _json(response)
        status = _field(answer, "Status", str)
        if status not in ("Success", "AlreadyStored"):
            raise OrthancUnavailable(
                "The image archive did not store the file. Nothing was linked; try again later."
            )
        return Stored(
            instance_id=_orthanc_id(answer, "ID"),
            series_id=_orthanc_id(answer, "ParentSeries"),
            study_id=_orthanc_id(answer, "ParentStudy"),
            new=status == "Success",
        )

    async def owners(self, study_instance_uid: str) -> list[str]:
        """The Orthanc ids of all studies with this StudyInstanceUID.

        More than one: the UID is in the archive under several PatientIDs.
        """
        response = await self._ask("POST", "/tools/lookup", content=study_instance_uid.encode())
        found = _json(response, list)
        return [
            _orthanc_id(each, "ID")
            for each in found
            if isinstance(each, dict) and each.get("Type") == "Study"
        ]

    async def refuse_shared(self, study_instance_uid: str, orthanc_id: str) -> None:
        """One owner a UID: raises Conflict unless the archive holds the study as this one alone.

        Somebody may have sent images with the same StudyInstanceUID and another PatientID
        straight to Orthanc; until a human has decided, the study is shown to nobody.
        """
        if await self.owners(study_instance_uid) != [orthanc_id]:
            raise Conflict(
                "The image archive does not hold this study under this patient alone (it may "
                "have been removed there, or stored for another patient as well). It can't be "
                "shown until a radiology administrator has looked at it."
            )

    async def study_state(self, orthanc_id: str) -> tuple[int, str]:
        """Number and size in bytes of a study's files: one changes whenever one of them does.

        Raises NotFound.
        """
        path = f"/studies/{_valid_id(orthanc_id)}/statistics"
        response = await self._ask("GET", path, pass_on=(404,))
        if response.status_code == 404:
            raise NotFound("The image archive does not hold this study any more.")
        answer = _json(response)
        return _field(answer, "CountInstances", int), _field(answer, "DiskSize", str)

    async def study_instances(self, orthanc_id: str) -> set[str]:
        """The Orthanc ids of a study's instances; none where it has gone."""
        found: set[str] = set()
        for series in await self._children("studies", orthanc_id, "Series"):
            found.update(await self._children("series", series, "Instances"))
        return found

    async def changes(self, since: int, limit: int) -> tuple[list[Change], int]:
        """The changes after number `since`, and the number of the last one: of these, or of all
        there were where there are none. What was deleted has no changes any more."""
        answer = _json(await self._ask("GET", f"/changes?since={since}&limit={limit}"))
        return [_change(each) for each in _field(answer, "Changes", list)], _field(
            answer, "Last", int
        )

    async def held(self, orthanc_id: str) -> Held | None:
        """A study; None where it has gone."""
        path = f"/studies/{_valid_id(orthanc_id)}"
        response = await self._ask("GET", path, pass_on=(404,))
        return None if response.status_code == 404 else _held(_json(response))

    async def all_held(self, since: int, limit: int) -> list[Held]:
        """Some of all studies, in no certain order."""
        path = f"/studies?expand&since={since}&limit={limit}"
        return [_held(each) for each in _json(await self._ask("GET", path), list)]

    async def study_ids(self) -> set[str]:
        """The Orthanc ids of all studies."""
        return set(_json(await self._ask("GET", "/studies"), list))

    async def series_modality(self, orthanc_id: str) -> str:
        """Modality of a series; empty where there is none, or it has gone."""
        path = f"/series/{_valid_id(orthanc_id)}"
        response = await self._ask("GET", path, pass_on=(404,))
        found = {} if response.status_code == 404 else _json(response)
        return str(found.get("MainDicomTags", {}).get("Modality", ""))

    @asynccontextmanager
    async def file(self, orthanc_id: str) -> AsyncIterator[AsyncIterator[bytes]]:
        """An instance as it is stored, in chunks. Raises NotFound."""
        async with self._stream(f"/instances/{_valid_id(orthanc_id)}/file") as chunks:
            yield chunks

    async def _children(self, level: str, orthanc_id: str, field: str) -> list[str]:
        path = f"/{level}/{_valid_id(orthanc_id)}"
        response = await self._ask("GET", path, pass_on=(404,))
        return [] if response.status_code == 404 else list(_field(_json(response), field, list))

    @asynccontextmanager
    async def raw_frame(self, orthanc_id: str, number: int) -> AsyncIterator[AsyncIterator[bytes]]:
        """A frame as it is stored, `number` from 1, in chunks. Raises NotFound."""
        path = f"/instances/{_valid_id(orthanc_id)}/frames/{number - 1}/raw"
        async with self._stream(path) as chunks:
            yield chunks

    async def plain_frame(
        self, study_uid: str, series_uid: str, sop_uid: str, number: int
    ) -> bytes:
        """A compressed frame, decompressed (Explicit VR Little Endian). The UIDs must be valid.

        Raises NotAcceptable where Orthanc has no decoder for it.
        """
        path = (
            f"/dicom-web/studies/{study_uid}/series/{series_uid}/instances/{sop_uid}"
            f"/frames/{number}"
        )
        response = await self._ask(
            "GET",
            path,
            headers={
                "Accept": 'multipart/related; type="application/octet-stream"; '
                "transfer-syntax=1.2.840.10008.1.2.1"
            },
            pass_on=(400, 404, 406, 415, 500, 501),
        )
        if response.status_code != 200:
            raise NotAcceptable(
                "The image archive can't decompress this frame; ask for it as it is stored, with "
                "`transfer-syntax=*`."
            )
        return _only_part(response)

    @asynccontextmanager
    async def plain_frame_chunks(
        self, study_uid: str, series_uid: str, sop_uid: str, number: int
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """As `plain_frame`, in one chunk."""
        frame = await self.plain_frame(study_uid, series_uid, sop_uid, number)

        async def chunk() -> AsyncIterator[bytes]:
            yield frame

        yield chunk()

    async def rendered(self, orthanc_id: str, number: int, query: str, media_type: str) -> bytes:
        """A frame as a picture, `number` from 1; `query` are Orthanc's own arguments.

        Raises NotAcceptable where Orthanc has no decoder for it.
        """
        response = await self._ask(
            "GET",
            f"/instances/{_valid_id(orthanc_id)}/frames/{number - 1}/rendered{query}",
            headers={"Accept": media_type},
            pass_on=(400, 404, 406, 415, 500, 501),
        )
        if response.status_code != 200:
            raise NotAcceptable(
                "The image archive can't decompress these pixels, so there is no picture of them; "
                "ask for the frame as it is stored."
            )
        return response.content

    @asynccontextmanager
    async def _stream(self, path: str) -> AsyncIterator[AsyncIterator[bytes]]:
        try:
            async with self._transfers.stream("GET", f"{self._transfers.url}{path}") as response:
                # What Orthanc can't cut into frames now it will not be able to later either.
                if response.status_code in (400, 404, 406, 415):
                    raise NotFound("The image archive does not hold this, or can't cut it out.")
                if response.status_code != 200:
                    raise OrthancUnavailable("The image archive answered with an error.")
                yield response.aiter_raw(CHUNK_BYTES)
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise OrthancUnavailable(
                "The image archive does not answer. Try again in a moment."
            ) from error

    async def instance_md5(self, orthanc_id: str) -> str:
        """MD5 of an instance's file as it is stored, in hexadecimal; empty if it has gone."""
        path = f"/instances/{_valid_id(orthanc_id)}/attachments/dicom/md5"
        response = await self._ask("GET", path, pass_on=(404,))
        return response.text.strip() if response.status_code == 200 else ""

    async def holds_instance(self, orthanc_id: str) -> bool:
        """Is the instance in the archive?"""
        path = f"/instances/{_valid_id(orthanc_id)}/metadata"
        return (await self._ask("GET", path, pass_on=(404,))).status_code == 200

    async def came_from(self, orthanc_id: str, username: str) -> bool:
        """Did this user store the instance by the REST API? Not what came by DICOM, or has gone."""
        path = f"/instances/{_valid_id(orthanc_id)}/metadata?expand"
        response = await self._ask("GET", path, pass_on=(404,))
        if response.status_code == 404:
            return False
        said = _json(response)
        return (said.get("Origin"), said.get("HttpUsername")) == ("RestApi", username)

    async def delete_study(self, orthanc_id: str) -> None:
        """Delete a study. One that is gone already is as good."""
        await self._ask("DELETE", f"/studies/{_valid_id(orthanc_id)}", pass_on=(404,))

    async def delete_instance(self, orthanc_id: str) -> None:
        """Delete an instance. One that is gone already is as good."""
        await self._ask("DELETE", f"/instances/{_valid_id(orthanc_id)}", pass_on=(404,))

    async def series_metadata(self, study_instance_uid: str, series_instance_uid: str) -> bytes:
        """The DICOM JSON of a series (PS3.18 10.4.1.1.2, F.2), as Orthanc says it.

        The UIDs must be valid. Raises NotFound.
        """
        response = await self._ask(
            "GET",
            f"/dicom-web/studies/{study_instance_uid}/series/{series_instance_uid}/metadata",
            headers={"Accept": "application/dicom+json"},
            pass_on=(404,),
        )
        if response.status_code == 404:
            raise NotFound("The image archive does not hold this series any more.")
        return response.content

    async def _ask(
        self,
        method: str,
        path: str,
        *,
        content: bytes | AsyncIterator[bytes] | None = None,
        headers: dict[str, str] | None = None,
        pass_on: tuple[int, ...] = (),
    ) -> httpx.Response:
        try:
            response: httpx.Response = await self._client.request(
                method, f"{self._client.url}{path}", content=content, headers=headers
            )
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise OrthancUnavailable(
                "The image archive does not answer. Try again in a moment."
            ) from error
        status = response.status_code
        if status in pass_on or 200 <= status < 300:
            return response
        if status in (401, 403):
            raise OrthancUnavailable(
                "The image archive refused Lightbox's credentials: an administrator must check "
                "LIGHTBOX_ORTHANC_USERNAME and LIGHTBOX_ORTHANC_PASSWORD."
            )
        if status == 507:
            raise OrthancUnavailable("The image archive has no room left. Nothing was stored.")
        raise OrthancUnavailable("The image archive answered with an error. Try again in a moment.")


@asynccontextmanager
async def promptly() -> AsyncIterator[None]:
    """For what is asked while a database lock is held: other callers wait for that lock.

    Raises OrthancUnavailable after `PROMPT_SECONDS`.
    """
    try:
        async with asyncio.timeout(PROMPT_SECONDS):
            yield
    except TimeoutError as error:
        raise OrthancUnavailable("The image archive takes too long. Try again soon.") from error


async def _chunks(file: BinaryIO) -> AsyncIterator[bytes]:
    while chunk := await anyio.to_thread.run_sync(file.read, CHUNK_BYTES):
        yield chunk


def _json(response: httpx.Response, kind: type = dict) -> Any:
    try:
        answer = json.loads(response.content)
    except ValueError as error:
        raise _nonsense() from error
    if not isinstance(answer, kind):
        raise _nonsense()
    return answer


def _field(answer: dict[str, Any], name: str, kind: type) -> Any:
    value = answer.get(name)
    if not isinstance(value, kind):
        raise _nonsense()
    return value


def _orthanc_id(answer: dict[str, Any], name: str) -> str:
    value = answer.get(name)
    if not isinstance(value, str) or not _ORTHANC_ID.fullmatch(value):
        raise _nonsense()
    return value


def _change(entry: Any) -> Change:
    try:
        kind, orthanc_id = str(entry["ChangeType"]), str(entry["ID"])
        return Change(int(entry["Seq"]), kind, orthanc_id, f"{orthanc_id} {entry['Date']}")
    except (KeyError, TypeError, ValueError) as error:
        raise _nonsense() from error


def _held(answer: Any) -> Held:
    try:
        tags = {**answer.get("PatientMainDicomTags", {}), **answer["MainDicomTags"]}
        return Held(
            orthanc_id=_orthanc_id(answer, "ID"),
            tags={str(key): str(value) for key, value in tags.items()},
            series=tuple(str(each) for each in answer["Series"]),
            stable=bool(answer.get("IsStable", True)),
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise _nonsense() from error


def _valid_id(orthanc_id: str) -> str:
    if not _ORTHANC_ID.fullmatch(orthanc_id):
        raise ValueError(f"not an Orthanc id: {orthanc_id!r}")
    return orthanc_id


def _only_part(response: httpx.Response) -> bytes:
    """The body of the one part of a multipart answer, whole or not at all."""
    _, options = parse_options_header(response.headers.get("content-type", ""))
    boundary = b"--" + options.get(b"boundary", b"")
    head, blank, rest = response.content.partition(b"\r\n\r\n")
    body, end, _ = rest.rpartition(b"\r\n" + boundary + b"--")
    if len(boundary) <= 2 or not blank or not end or not head.lstrip().startswith(boundary):
        raise _nonsense()
    return body


def _nonsense() -> OrthancUnavailable:
    return OrthancUnavailable(
        "The image archive gave an answer that makes no sense; is it really Orthanc?"
    )
