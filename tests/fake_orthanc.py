"""An Orthanc at the transport: enough of it for fast tests, and faults on demand.

What only this has shown is not shown; tests/live does the same against the real one.
"""

import asyncio
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import httpx
import pydicom
import respx
from pydicom.encaps import generate_frames
from pydicom.uid import RLELossless

from app.dicom import orthanc_id

URL = "http://orthanc.test"


@dataclass
class FakeOrthanc:
    """Keeps what was stored, and every request it got. `faults` answer first, one each; then
    `faults_at`, each to all requests whose path ends so."""

    instances: dict[str, pydicom.Dataset] = field(default_factory=dict)
    bodies: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    faults: list[httpx.Response | Exception] = field(default_factory=list)
    faults_at: dict[str, httpx.Response | Exception] = field(default_factory=dict)

    origin: dict[str, str] = field(
        default_factory=lambda: {"Origin": "RestApi", "HttpUsername": "lightbox"}
    )
    """What Orthanc says of where each instance came from."""
    held: asyncio.Event | None = None
    """While it is not set, no request is answered: an Orthanc that hangs."""
    meanwhile: dict[str, Callable[[], None]] = field(default_factory=dict)
    """What happens in Orthanc right after the next request of a method."""

    def install(self, router: respx.Router, url: str = URL) -> None:
        router.route(url__startswith=url).mock(side_effect=self._answer)

    def asked(self, method: str, path: str = "") -> list[tuple[str, str]]:
        """The requests of a method whose path begins so."""
        return [each for each in self.requests if each[0] == method and each[1].startswith(path)]

    async def _answer(self, request: httpx.Request) -> httpx.Response:
        if self.held is not None:
            await self.held.wait()
        answer = self._now(request)
        meanwhile = self.meanwhile.pop(request.method, None)
        if meanwhile is not None:
            meanwhile()
        return answer

    def _now(self, request: httpx.Request) -> httpx.Response:
        method, path = request.method, request.url.path
        self.requests.append((method, path))
        here = [fault for end, fault in self.faults_at.items() if path.endswith(end)]
        if self.faults or here:
            fault = self.faults.pop(0) if self.faults else here[0]
            if isinstance(fault, Exception):
                raise fault
            return fault
        if path == "/system":
            return httpx.Response(200, json={"Version": "1.10.1"})
        if path == "/tools/default-encoding":
            return httpx.Response(200, text="Latin1")
        if path == "/statistics":
            return httpx.Response(200, json=self._statistics())
        if path == "/instances":
            return self._store(request.content)
        if path == "/tools/lookup":
            uid = request.content.decode()
            found = {
                _ids(each)[1] for each in self.instances.values() if each.StudyInstanceUID == uid
            }
            return httpx.Response(200, json=[{"Type": "Study", "ID": each} for each in found])
        match = re.fullmatch(r"/studies/([0-9a-f-]+)/statistics", path)
        if match:
            sizes = [
                len(self.bodies[key])
                for key, each in self.instances.items()
                if _ids(each)[1] == match[1]
            ]
            state = {"CountInstances": len(sizes), "DiskSize": str(sum(sizes))}
            return httpx.Response(200 if sizes else 404, json=state)
        if method == "DELETE":
            return self._delete(path)
        match = re.fullmatch(r"/(studies|series)/([0-9a-f-]+)", path)
        if match:
            level = {"studies": 1, "series": 2}[match[1]]
            ids = [_ids(each) for each in self.instances.values()]
            below = sorted({each[level + 1] for each in ids if each[level] == match[2]})
            named = {"studies": "Series", "series": "Instances"}[match[1]]
            answer: dict[str, Any] = {named: below}
            if below and level == 1:
                first = next(x for x in self.instances.values() if _ids(x)[1] == match[2])
                answer |= _as_study(match[2], first)
            return httpx.Response(200 if below else 404, json=answer)
        match = re.fullmatch(r"/instances/([0-9a-f-]+)/metadata", path)
        if match:
            return httpx.Response(200 if match[1] in self.instances else 404, json=self.origin)
        match = re.fullmatch(r"/instances/([0-9a-f-]+)/attachments/dicom/md5", path)
        if match:
            digest = hashlib.md5(self.bodies[match[1]], usedforsecurity=False).hexdigest()
            return httpx.Response(200, text=digest)
        match = re.fullmatch(r"/instances/([0-9a-f-]+)/(file|frames/.*|content/.*)", path)
        if match:
            return self._bytes(*match.groups())
        match = re.fullmatch(r"/dicom-web/.*/instances/([0-9.]+)/frames/([0-9]+)", path)
        if match:
            return self._decompressed(match[1], int(match[2]))
        match = re.fullmatch(r"/dicom-web/studies/([0-9.]+)/series/([0-9.]+)/metadata", path)
        if match:
            rows = [
                self._row(each)
                for each in self.instances.values()
                if (each.StudyInstanceUID, each.SeriesInstanceUID) == match.groups()
            ]
            return httpx.Response(200 if rows else 404, json=rows)
        return httpx.Response(404, json={"HttpStatus": 404})

    def _store(self, body: bytes) -> httpx.Response:
        image = pydicom.dcmread(BytesIO(body), stop_before_pixels=True)
        _, study, series, instance = _ids(image)
        status = "AlreadyStored" if instance in self.instances else "Success"
        self.instances.setdefault(instance, image)
        self.bodies.setdefault(instance, body)
        answer = {"ID": instance, "ParentSeries": series, "ParentStudy": study, "Status": status}
        return httpx.Response(200, json=answer)

    def _delete(self, path: str) -> httpx.Response:
        kind, _, wanted = path.strip("/").partition("/")
        position = {"studies": 1, "instances": 3}[kind]
        gone = [key for key, each in self.instances.items() if _ids(each)[position] == wanted]
        for key in gone:
            del self.instances[key], self.bodies[key]
        return httpx.Response(200 if gone else 404, json={})

    def _bytes(self, instance: str, what: str) -> httpx.Response:
        """`/file`, `/frames/<from 0>/raw` and `/content/<gggg-eeee>/...` of Orthanc's own API."""
        if instance not in self.instances:
            return httpx.Response(404, json={"HttpStatus": 404})
        body = self.bodies[instance]
        if what == "file":
            return httpx.Response(200, content=body)
        found: Any = pydicom.dcmread(BytesIO(body))
        match = re.fullmatch(r"frames/([0-9]+)/raw", what)
        if match:
            frames = _frames(found)
            if int(match[1]) >= len(frames):
                return httpx.Response(400, json={"HttpStatus": 400})
            return httpx.Response(200, content=frames[int(match[1])])
        if what.endswith("/rendered"):
            known = not found.file_meta.TransferSyntaxUID.is_encapsulated or _decodes(found)
            picture = {"Content-Type": "image/jpeg"}
            return httpx.Response(200 if known else 415, content=b"\xff\xd8\xff", headers=picture)
        for name in what.removeprefix("content/").split("/"):
            if "-" not in name:
                found = found[int(name)] if int(name) < len(found) else None
            else:
                tag = int(name.replace("-", ""), 16)
                found = found[tag].value if tag in found else None
            if found is None:
                return httpx.Response(404, json={"HttpStatus": 404})
        return httpx.Response(200, content=found if isinstance(found, bytes) else str(found))

    def _decompressed(self, sop_uid: str, number: int) -> httpx.Response:
        """A frame as Explicit VR Little Endian, by the DICOMweb plugin; what it has no decoder
        for is an error of its own."""
        for key, each in self.instances.items():
            if sop_uid == each.SOPInstanceUID:
                image = pydicom.dcmread(BytesIO(self.bodies[key]))
                if not _decodes(image):
                    return httpx.Response(400, json={"HttpStatus": 400})
                image.decompress()
                part = b"--b\r\nContent-Type: application/octet-stream\r\n\r\n"
                body = part + _frames(image)[number - 1] + b"\r\n--b--\r\n"
                kind = "multipart/related; type=application/octet-stream; boundary=b"
                return httpx.Response(200, content=body, headers={"Content-Type": kind})
        return httpx.Response(404, json={"HttpStatus": 404})

    def _statistics(self) -> dict[str, Any]:
        ids = [_ids(each) for each in self.instances.values()]
        patients, studies, series, _ = ({each[n] for each in ids} for n in range(4))
        return {
            "CountPatients": len(patients),
            "CountStudies": len(studies),
            "CountSeries": len(series),
            "CountInstances": len(ids),
            "TotalDiskSize": str(sum(len(each) for each in self.bodies.values())),
        }

    def _row(self, image: pydicom.Dataset) -> Any:
        row = json.loads(image.to_json(suppress_invalid_tags=True))
        path = f"studies/{image.StudyInstanceUID}/series/{image.SeriesInstanceUID}"
        bulk = f"http://localhost/dicom-web/{path}/instances/{image.SOPInstanceUID}/bulk/7fe00010"
        row["7FE00010"] = {"vr": "OW", "BulkDataURI": bulk}
        return row


def _as_study(study_id: str, image: pydicom.Dataset) -> dict[str, Any]:
    """What Orthanc's index says of a study, by its first file."""
    patient = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex")
    study = ("StudyInstanceUID", "StudyDate", "StudyTime", "StudyDescription", "AccessionNumber")
    return {
        "ID": study_id,
        "IsStable": True,
        "PatientMainDicomTags": {each: str(image.get(each, "")) for each in patient},
        "MainDicomTags": {each: str(image.get(each, "")) for each in study},
    }


def _decodes(image: pydicom.Dataset) -> bool:
    return bool(image.file_meta.TransferSyntaxUID == RLELossless)


def _frames(image: pydicom.Dataset) -> list[bytes]:
    """The frames as they are stored."""
    count = int(image.get("NumberOfFrames") or 1)
    if image.file_meta.TransferSyntaxUID.is_encapsulated:
        return list(generate_frames(image.PixelData, number_of_frames=count))
    size = len(image.PixelData) // count
    return [image.PixelData[n * size : (n + 1) * size] for n in range(count)]


def _ids(image: pydicom.Dataset) -> tuple[str, str, str, str]:
    parts = [
        str(image.PatientID).strip(),
        str(image.StudyInstanceUID),
        str(image.SeriesInstanceUID),
        str(image.SOPInstanceUID),
    ]
    patient, study, series, instance = (orthanc_id(*parts[: n + 1]) for n in range(4))
    return patient, study, series, instance
