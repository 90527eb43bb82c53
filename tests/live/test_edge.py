"""The edge, for real: nginx in front of an app that records what reaches it, and a real Orthanc."""

import http.client
import io
import json
import re
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from app.demo.stack import EDGE_TEMPLATE, LOOPBACK, AppServer, Edge, OrthancServer, free_port

CTX = "abcdefghijklmnop1234"
PASSWORD = "only-for-this-test-9%"
VIEWER_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-embedder-policy": "require-corp",
    "cross-origin-resource-policy": "same-origin",
}


@dataclass
class Answer:
    """What a client of the edge got."""

    status: int
    headers: dict[str, list[str]]
    body: bytes

    def one(self, name: str) -> str | None:
        """The header's value; fails if it was sent twice."""
        values = self.headers.get(name, [])
        assert len(values) <= 1, f"{name} was sent {len(values)} times: {values}"
        return values[0] if values else None

    def problem(self) -> dict[str, object]:
        """The problem+json body, its own status checked."""
        assert self.one("content-type") == "application/problem+json"
        assert "no-store" in ", ".join(self.headers["cache-control"])
        problem: dict[str, object] = json.loads(self.body)
        assert problem["status"] == self.status
        assert problem["request_id"] == self.one("x-request-id")
        told = self.body.lower()
        for internal in (b"orthanc", b"nginx", b"127.0.0.1", b"upstream"):
            assert internal not in told
        return problem


@dataclass
class Recorded:
    """A request as the app saw it."""

    method: str
    path: str
    headers: dict[str, list[str]]
    body: bytes


@dataclass
class RecordingApp:
    """Stands in for the app. `?accel=` makes it answer with X-Accel-Redirect, `?type=` sets the
    type, `?cache=` and `?cookie=` the headers of these names."""

    port: int = 0
    requests: list[Recorded] = field(default_factory=list)


def start_recording_app(app: RecordingApp) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            query = {
                name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()
            }
            body = self.read_body()
            headers: dict[str, list[str]] = {}
            for name, value in self.headers.items():
                headers.setdefault(name.lower(), []).append(value)
            app.requests.append(Recorded(self.command, self.path, headers, body))
            if self.path.startswith("/viewer"):
                query.setdefault("accel", "/_ohif/index.html")
                query.setdefault("type", "text/html; charset=utf-8")
            content = b"" if "accel" in query else b'{"from": "app"}'
            self.send_response(200)
            self.send_header("Content-Type", query.get("type", "application/json"))
            self.send_header("Content-Length", str(len(content)))
            self.send_header("X-Request-ID", "id-of-the-app")
            if "accel" in query:
                self.send_header("X-Accel-Redirect", query["accel"])
            if "cache" in query:
                self.send_header("Cache-Control", query["cache"])
            if "cookie" in query:
                self.send_header("Set-Cookie", query["cookie"])
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def read_body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return body
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
            pass

        do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = answer

    server = ThreadingHTTPServer((LOOPBACK, 0), Handler)
    server.daemon_threads = True
    app.port = server.server_address[1]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.fixture(scope="module")
def recorder() -> Iterator[RecordingApp]:
    app = RecordingApp()
    server = start_recording_app(app)
    yield app
    server.shutdown()
    server.server_close()


@pytest.fixture
def app(recorder: RecordingApp) -> RecordingApp:
    """The recording app with an empty record."""
    recorder.requests.clear()
    return recorder


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OrthancServer]:
    state = tmp_path_factory.mktemp("orthanc")
    with OrthancServer(state, username="lightbox", password=PASSWORD, dicom_port=None) as server:
        yield server


@pytest.fixture(scope="module")
def viewer_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the built viewer."""
    folder = tmp_path_factory.mktemp("viewer")
    for name in (
        "index.html",
        "app.bundle.0123456789abcdef.js",
        "0123456789abcdef.wasm",
        "app.bundle.css",
        "app-config.js",
        "sw.js",
        "assets/favicon.ico",
    ):
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"built {name}")
    return folder


@pytest.fixture(scope="module")
def edge(
    recorder: RecordingApp,
    orthanc: OrthancServer,
    viewer_files: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Edge]:
    with Edge(
        tmp_path_factory.mktemp("edge"),
        api_port=free_port(),
        viewer_port=free_port(),
        app_port=recorder.port,
        orthanc=orthanc,
        ohif_dir=viewer_files,
    ) as server:
        yield server


@pytest.fixture(scope="module")
def broken_edge(
    viewer_files: Path, tmp_path_factory: pytest.TempPathFactory, recorder: RecordingApp
) -> Iterator[Edge]:
    """An edge whose app answers and whose Orthanc is down."""
    state = tmp_path_factory.mktemp("broken")
    absent = OrthancServer(state / "orthanc", username="lightbox", password=PASSWORD)
    with Edge(
        state / "edge",
        api_port=free_port(),
        viewer_port=free_port(),
        app_port=recorder.port,
        orthanc=absent,
        ohif_dir=viewer_files,
    ) as server:
        yield server


@pytest.fixture(scope="module")
def instance(orthanc: OrthancServer) -> tuple[str, bytes]:
    """Orthanc's id of a stored image, and the bytes of its only frame."""
    pixels = bytes(range(256)) * 8
    image = Dataset()
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = CTImageStorage
    image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    image.StudyInstanceUID = generate_uid()
    image.SeriesInstanceUID = generate_uid()
    image.PatientID = "EDGE"
    image.PatientName = "Edge^Test"
    image.Modality = "CT"
    image.Rows, image.Columns = 32, 32
    image.SamplesPerPixel = 1
    image.PhotometricInterpretation = "MONOCHROME2"
    image.BitsAllocated = image.BitsStored = 16
    image.HighBit = 15
    image.PixelRepresentation = 0
    image.PixelData = pixels
    file = io.BytesIO()
    pydicom.dcmwrite(file, image, enforce_file_format=True)
    stored = httpx.post(
        f"{orthanc.url}/instances",
        content=file.getvalue(),
        headers={"Authorization": orthanc.authorization},
    )
    return str(stored.json()["ID"]), pixels


def ask(
    port: int,
    path: str,
    method: str = "GET",
    headers: dict[str, str] | None = None,
    body: bytes | None = None,
) -> Answer:
    """One request with exactly this path: no client-side tidying."""
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=20)
    try:
        connection.putrequest(method, path, skip_accept_encoding=True)
        for name, value in (headers or {}).items():
            connection.putheader(name, value)
        if body is not None:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        response = connection.getresponse()
        received: dict[str, list[str]] = {}
        for name, value in response.getheaders():
            received.setdefault(name.lower(), []).append(value)
        return Answer(response.status, received, response.read())
    finally:
        connection.close()


def frame_url(instance_id: str, extra: str = "") -> str:
    target = f"/_orthanc/instances/{instance_id}/frames/0/raw"
    kind = "application/octet-stream;%20transfer-syntax=1.2.840.10008.1.2.1"
    return f"/s/{CTX}/dicom-web/frames/1?accel={target}&type={kind}{extra}"


# ------------------------------------------------------------------------------ headers


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/", 200),
        ("/viewer?StudyInstanceUIDs=1.2&ctx=" + CTX, 200),
        (f"/s/{CTX}/status", 200),
        ("/app-config.js", 200),
        ("/init-service-worker.js", 200),
        ("/app.bundle.0123456789abcdef.js", 200),
        ("/favicon.ico", 200),
        ("/sw.js", 404),
        ("/nothing.js", 404),
        ("/notfoundstudy", 404),
        ("/index.html", 404),
        (f"/s/{CTX}/%00", 400),
        (f"/s/{CTX}/frames?accel=/_orthanc/system", 404),
        ("/s/" + "x" * 20_000, 414),
    ],
)
def test_every_answer_of_the_viewer_origin_is_hardened(
    edge: Edge, app: RecordingApp, path: str, status: int
) -> None:
    answer = ask(edge.viewer_port, path)
    assert answer.status == status
    for name, value in VIEWER_HEADERS.items():
        assert answer.one(name) == value
    policy = answer.one("content-security-policy")
    assert policy is not None
    assert "frame-ancestors 'none'" in policy
    assert answer.one("x-request-id")
    assert answer.one("cache-control")
    assert answer.one("server") == "nginx"  # no version


@pytest.mark.parametrize(
    ("path", "status"),
    [("/api/v1/orders", 200), ("/fhir/metadata", 200), ("/", 404), ("/viewer", 404), ("/s/x", 404)],
)
def test_every_answer_of_the_api_origin_is_hardened(
    edge: Edge, app: RecordingApp, path: str, status: int
) -> None:
    answer = ask(edge.api_port, path)
    assert answer.status == status
    assert answer.one("x-content-type-options") == "nosniff"
    assert answer.one("referrer-policy") == "no-referrer"
    assert (answer.one("content-security-policy") or "").startswith("default-src 'none'")
    assert answer.one("cache-control") == "no-store"
    if status == 404:
        answer.problem()


def test_the_documentation_page_brings_its_own_policy(edge: Edge, app: RecordingApp) -> None:
    answer = ask(edge.api_port, "/docs")
    assert answer.status == 200
    assert answer.one("content-security-policy") is None


def test_the_viewers_bytes_may_be_embedded_by_the_viewer_only(
    edge: Edge, app: RecordingApp, instance: tuple[str, bytes]
) -> None:
    answer = ask(edge.viewer_port, frame_url(instance[0]))
    policy = answer.one("content-security-policy") or ""
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'self'" in policy
    for name, value in VIEWER_HEADERS.items():
        assert answer.one(name) == value


def test_files_named_by_their_content_are_kept_and_the_others_are_asked_for_again(
    edge: Edge,
) -> None:
    for hashed in ("/app.bundle.0123456789abcdef.js", "/0123456789abcdef.wasm"):
        kept = ask(edge.viewer_port, hashed).one("cache-control")
        assert kept == "public, max-age=31536000, immutable"
    for named in ("/app.bundle.css", "/app-config.js", "/assets/favicon.ico"):
        assert ask(edge.viewer_port, named).one("cache-control") == "no-cache"
    assert ask(edge.viewer_port, "/0123456789abcdee.wasm").one("cache-control") == "no-store"


def test_the_configuration_is_ours_and_the_service_worker_is_gone(edge: Edge) -> None:
    configuration = ask(edge.viewer_port, "/app-config.js")
    assert b"window.config" in configuration.body
    assert configuration.one("content-type") == "application/javascript"
    assert ask(edge.viewer_port, "/sw.js").status == 404
    assert b"built" not in ask(edge.viewer_port, "/init-service-worker.js").body


# ------------------------------------------------------------------------------ what passes


def test_the_viewer_origin_passes_cookies_and_no_authorization(
    edge: Edge, app: RecordingApp
) -> None:
    headers = {"Authorization": "Bearer stolen", "Cookie": "lightbox=1"}
    ask(edge.viewer_port, f"/s/{CTX}/status?q=1", headers=headers)
    (seen,) = app.requests
    assert seen.path == f"/s/{CTX}/status?q=1"
    assert "authorization" not in seen.headers
    assert seen.headers["cookie"] == ["lightbox=1"]
    assert seen.headers["x-lightbox-origin"] == ["viewer"]


def test_the_api_origin_passes_authorization_and_no_cookie(edge: Edge, app: RecordingApp) -> None:
    headers = {"Authorization": "Bearer mine", "Cookie": "lightbox=1"}
    ask(edge.api_port, "/api/v1/orders", headers=headers)
    (seen,) = app.requests
    assert seen.headers["authorization"] == ["Bearer mine"]
    assert "cookie" not in seen.headers
    assert seen.headers["x-lightbox-origin"] == ["api"]


@pytest.mark.parametrize("origin", ["api", "viewer"])
def test_what_a_client_says_about_itself_is_replaced(
    edge: Edge, app: RecordingApp, origin: str
) -> None:
    port, path = (
        (edge.api_port, "/api/x") if origin == "api" else (edge.viewer_port, f"/s/{CTX}/status")
    )
    removed = (
        "Forwarded",
        "X-Forwarded-Host",
        "X-HTTP-Method-Override",
        "X-HTTP-Method",
        "X-Method-Override",
        "X-Original-URL",
        "X-Rewrite-URL",
        "X-Real-IP",
    )
    said = dict.fromkeys(removed, "DELETE")
    said |= {
        "X-Lightbox-Origin": "api, viewer",
        "X_Lightbox_Origin": "api",
        "X-Forwarded-For": "10.0.0.1",
        "X-Forwarded-Proto": "https",
        "X-Request-ID": "the-callers.own:id",
    }
    ask(port, path, headers=said)
    (seen,) = app.requests
    assert seen.headers["x-lightbox-origin"] == [origin]
    assert "x_lightbox_origin" not in seen.headers
    assert seen.headers["x-forwarded-for"] == [LOOPBACK]
    assert seen.headers["x-forwarded-proto"] == ["http"]
    assert seen.headers["x-request-id"] == ["the-callers.own:id"]
    assert not {name.lower() for name in removed} & seen.headers.keys()


def test_an_insane_request_id_is_replaced(edge: Edge, app: RecordingApp) -> None:
    ask(edge.api_port, "/api/x", headers={"X-Request-ID": 'x" onload="'})
    assert re.fullmatch(r"[0-9a-f]{32}", app.requests[0].headers["x-request-id"][0])


def test_one_request_id_and_it_is_the_apps(
    edge: Edge, app: RecordingApp, instance: tuple[str, bytes]
) -> None:
    assert ask(edge.api_port, "/api/x").one("x-request-id") == "id-of-the-app"
    for path in (frame_url(instance[0]), "/viewer"):
        assert ask(edge.viewer_port, path).one("x-request-id") == "id-of-the-app"


def test_a_cookie_set_on_the_way_to_the_viewer_arrives(edge: Edge, app: RecordingApp) -> None:
    answer = ask(edge.viewer_port, "/viewer?cookie=a=b")
    assert answer.body == b"built index.html"
    assert answer.one("content-type") == "text/html; charset=utf-8"
    assert answer.one("set-cookie") == "a=b"
    assert answer.one("cache-control") == "no-store"


@pytest.mark.parametrize("method", ["TRACE", "CONNECT", "PROPFIND", "PURGE", "get"])
def test_odd_methods_are_refused(edge: Edge, app: RecordingApp, method: str) -> None:
    for port, path in ((edge.api_port, "/api/x"), (edge.viewer_port, f"/s/{CTX}/status")):
        assert ask(port, path, method).status in (400, 405)
    assert app.requests == []


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_the_viewer_origin_only_reads(edge: Edge, app: RecordingApp, method: str) -> None:
    answer = ask(edge.viewer_port, f"/s/{CTX}/dicom-web/studies", method, body=b"x")
    assert answer.status == 405
    assert answer.one("allow") == "GET, HEAD"
    answer.problem()
    assert app.requests == []


def test_a_large_upload_passes_whole(edge: Edge, app: RecordingApp) -> None:
    body = b"DICM" * (4 * 1024 * 1024)
    answer = ask(edge.api_port, "/api/v1/dicom/upload", "POST", body=body)
    assert answer.status == 200
    assert app.requests[0].body == body


def test_no_body_reaches_the_app_through_the_viewer_origin(edge: Edge, app: RecordingApp) -> None:
    assert ask(edge.viewer_port, f"/s/{CTX}/status", body=b"x" * 100).status == 200
    assert app.requests[0].body == b""
    assert ask(edge.viewer_port, f"/s/{CTX}/status", body=b"x" * 5000).status == 413


# ------------------------------------------------------------------------------ what must not


TRICKS = [
    "/_orthanc/system",
    "/_orthanc-image/system",
    "/_orthanc/instances/00000000-00000000-00000000-00000000-00000000/file",
    "/%5forthanc/system",
    "/%5Forthanc%2Fsystem",
    "/_ohif/index.html",
    "/_problem",
    "/_page",
    "/%5fohif/index.html",
    "//_ohif/index.html",
    "/s/../_ohif/index.html",
    "/s/%2e%2e/_ohif/index.html",
    "/s/x/..%2f..%2f_ohif/index.html",
    "/s/x/../../api/v1/orders",
    "/s/x/%2e%2e/%2e%2e/api/v1/orders",
    "/s/x/.%2e/.%2E/api/v1/orders",
    "/s/x/..%2f..%2fapi%2fv1%2forders",
    "/s/x/..\\..\\api\\v1\\orders",
    "/s/x/..%5c..%5capi",
    "/s/x/%252e%252e/%252e%252e/api/v1/orders",
    "/s/./x/status",
    "/s//x/status",
    "//s/x/status",
    "/api/../s/x/status",
    "/%73/x/status",
    "/x/../viewer",
    "/%76iewer",
    "/viewer/..;/api",
    "/viewer/",
    "/api/v1/orders",
    "/dicom-web/studies",
    "/openapi.json",
    "/docs",
]


@pytest.mark.parametrize("path", TRICKS)
def test_tricks_at_the_viewer_origin_reach_nobody(edge: Edge, app: RecordingApp, path: str) -> None:
    answer = ask(edge.viewer_port, path)
    assert answer.status in (400, 404)
    assert b"built" not in answer.body
    assert b"Lightbox" not in answer.body
    assert app.requests == []


@pytest.mark.parametrize(
    "path",
    [
        "/_orthanc/system",
        "/%5forthanc/system",
        "/_ohif/index.html",
        "/api/../_orthanc/system",
        "/api/%2e%2e/s/x/status",
        "/api/..%2fs/x/status",
        "/api//v1/orders",
        "/s/../api/v1/orders",
        "/%61pi/v1/orders",
        f"/s/{CTX}/dicom-web/studies",
        "/viewer",
    ],
)
def test_tricks_at_the_api_origin_reach_nobody(edge: Edge, app: RecordingApp, path: str) -> None:
    answer = ask(edge.api_port, path)
    assert answer.status in (400, 404)
    assert app.requests == []


@pytest.mark.parametrize(
    "target",
    [
        "/_orthanc/system",
        "/_orthanc/tools/shutdown",
        "/_orthanc/instances/{id}",
        "/_orthanc/instances/{id}/../../system",
        "/_orthanc/instances/{id}/attachments/dicom/data",
        "/_orthanc/instances/{id}/frames/0/raw/../../../../system",
        "/_orthanc/instances/{id}%2f..%2f..%2fsystem",
        "/_orthanc-image/changes",
        "/_orthanc/studies/{id}/archive",
    ],
)
def test_even_the_app_cannot_send_the_edge_elsewhere_in_orthanc(
    edge: Edge, app: RecordingApp, instance: tuple[str, bytes], target: str
) -> None:
    path = f"/s/{CTX}/dicom-web/x?accel={target.format(id=instance[0])}"
    answer = ask(edge.viewer_port, path)
    assert answer.status == 404
    answer.problem()


# ------------------------------------------------------------------------------ bytes


@pytest.mark.parametrize("origin", ["api", "viewer"])
def test_a_frame_comes_from_orthanc_under_the_apps_headers(
    edge: Edge, app: RecordingApp, instance: tuple[str, bytes], origin: str
) -> None:
    path = frame_url(instance[0], "&cache=private,%20max-age=60")
    if origin == "api":
        answer = ask(edge.api_port, path.replace(f"/s/{CTX}", ""))
    else:
        answer = ask(edge.viewer_port, path, headers={"Accept-Encoding": "gzip"})
    assert answer.status == 200
    assert answer.body == instance[1]
    kind = "application/octet-stream; transfer-syntax=1.2.840.10008.1.2.1"
    assert answer.one("content-type") == kind
    assert answer.one("content-length") == str(len(instance[1]))
    assert answer.one("cache-control") == "private, max-age=60"
    assert "content-encoding" not in answer.headers
    assert "www-authenticate" not in answer.headers


def test_head_of_a_frame(edge: Edge, app: RecordingApp, instance: tuple[str, bytes]) -> None:
    answer = ask(edge.viewer_port, frame_url(instance[0]), "HEAD")
    assert (answer.status, answer.body) == (200, b"")
    assert answer.one("content-length") == str(len(instance[1]))


@pytest.mark.parametrize(
    ("kind", "magic"), [("image/jpeg", b"\xff\xd8\xff"), ("image/png", b"\x89PNG")]
)
@pytest.mark.parametrize("what", ["rendered?width=16&height=16", "frames/0/rendered", "preview"])
def test_a_rendered_image_has_the_type_the_app_promised(
    edge: Edge, app: RecordingApp, instance: tuple[str, bytes], what: str, kind: str, magic: bytes
) -> None:
    target = f"/_orthanc-image/instances/{instance[0]}/{what}".replace("?", "%3F")
    target = target.replace("&", "%26")
    answer = ask(edge.viewer_port, f"/s/{CTX}/dicom-web/r?accel={target}&type={kind}")
    assert answer.status == 200
    assert answer.body.startswith(magic)
    assert answer.one("content-type") == kind


def test_bulk_data_comes_by_its_tag(
    edge: Edge, app: RecordingApp, instance: tuple[str, bytes]
) -> None:
    target = f"/_orthanc/instances/{instance[0]}/content/0010-0020"
    answer = ask(edge.viewer_port, f"/s/{CTX}/dicom-web/b?accel={target}&type=application/pdf")
    assert answer.body.strip() == b"EDGE"
    assert answer.one("content-type") == "application/pdf"
    assert answer.one("cross-origin-embedder-policy") == "require-corp"


@pytest.mark.parametrize(
    ("wanted", "first", "last"),
    [("bytes=0-99", 0, 99), ("bytes=100-", 100, 2047), ("bytes=-10", 2038, 2047)],
)
def test_a_range_is_answered_in_part(
    edge: Edge, app: RecordingApp, instance: tuple[str, bytes], wanted: str, first: int, last: int
) -> None:
    answer = ask(
        edge.viewer_port,
        frame_url(instance[0]).split("&type")[0] + "&type=video/mp4",
        headers={"Range": wanted},
    )
    assert answer.status == 206
    assert answer.body == instance[1][first : last + 1]
    assert answer.one("content-range") == f"bytes {first}-{last}/2048"
    assert answer.one("content-type") == "video/mp4"


def test_a_range_beyond_the_end_is_a_problem(
    edge: Edge, app: RecordingApp, instance: tuple[str, bytes]
) -> None:
    answer = ask(edge.viewer_port, frame_url(instance[0]), headers={"Range": "bytes=9999-"})
    assert answer.status == 416
    # nginx finds out after it has prepared the headers, and prepares them again: the same twice.
    assert json.loads(answer.body)["status"] == 416
    assert set(answer.headers["cross-origin-embedder-policy"]) == {"require-corp"}


# ------------------------------------------------------------------------------ when things fail


def test_what_orthanc_does_not_have_is_not_found(edge: Edge, app: RecordingApp) -> None:
    absent = "-".join(["0" * 8] * 5)
    answer = ask(edge.viewer_port, frame_url(absent, "&cache=private,%20max-age=60"))
    assert answer.status == 404
    answer.problem()


def test_orthanc_down_is_temporarily_unavailable(broken_edge: Edge, app: RecordingApp) -> None:
    absent = "-".join(["0" * 8] * 5)
    answer = ask(broken_edge.viewer_port, frame_url(absent, "&cache=private,%20max-age=60"))
    assert answer.status == 503
    assert answer.one("retry-after")
    answer.problem()


def test_app_down_is_temporarily_unavailable(
    orthanc: OrthancServer, viewer_files: Path, tmp_path: Path
) -> None:
    with Edge(
        tmp_path,
        api_port=free_port(),
        viewer_port=free_port(),
        app_port=free_port(),
        orthanc=orthanc,
        ohif_dir=viewer_files,
    ) as edge:
        for port, path in ((edge.api_port, "/api/x"), (edge.viewer_port, f"/s/{CTX}/status")):
            answer = ask(port, path + "?code=secret-code")
            assert answer.status == 503
            assert answer.one("retry-after")
            answer.problem()
        page = ask(edge.viewer_port, "/viewer?launch=secret-code")
        assert page.status == 503
        assert page.one("content-type") == "text/html; charset=utf-8"
        assert page.one("retry-after")
    for log in (edge.access_log_path, edge.log_path):
        assert "secret-code" not in log.read_text()


REFUSING_APP = """
async def app(scope, receive, send):
    if scope["type"] == "http":
        status = 413 if scope["method"] == "POST" else 200
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b""})
"""


def test_an_upload_refused_early_is_answered(
    orthanc: OrthancServer, viewer_files: Path, tmp_path: Path
) -> None:
    """The app, on its real server, answers 413 without reading the body; the caller learns it."""
    (tmp_path / "refusing.py").write_text(REFUSING_APP)
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "--app-dir", str(tmp_path), "refusing:app"]
    command += ["--port", str(port), "--lifespan", "off"]
    app = AppServer(port, {}, command, state_dir=tmp_path / "app")
    edge = Edge(
        tmp_path / "edge",
        api_port=free_port(),
        viewer_port=free_port(),
        app_port=port,
        orthanc=orthanc,
        ohif_dir=viewer_files,
    )
    url = f"http://{LOOPBACK}:{edge.api_port}/api/v1/dicom/upload"
    with app, edge:
        for _ in range(5):
            answer = httpx.post(url, content=b"x" * (32 * 1024 * 1024), trust_env=False)
            assert answer.status_code == 413


# ------------------------------------------------------------------------------ logs, template


def test_the_log_tells_no_query_and_no_cookie(edge: Edge, app: RecordingApp) -> None:
    headers = {"Cookie": "lightbox=cookie-value", "X-Request-ID": "logged-request"}
    ask(edge.viewer_port, "/viewer?launch=one-time-code", headers=headers)
    ask(edge.api_port, "/api/v1/patients?mrn=MRN-4711", headers=headers)
    deadline = time.monotonic() + 5  # nginx writes the line after the answer
    while edge.access_log_path.read_text().count("logged-request") < 2:
        assert time.monotonic() < deadline, "the requests were not logged"
        time.sleep(0.02)
    log = edge.access_log_path.read_text()
    lines = [json.loads(line) for line in log.splitlines()]
    mine = [line for line in lines if line["request_id"] == "logged-request"]
    assert [line["path"] for line in mine] == ["/viewer", "/api/v1/patients"]
    assert [line["origin"] for line in mine] == ["viewer", "api"]
    for secret in ("one-time-code", "MRN-4711", "cookie-value"):
        assert secret not in log


def test_the_rendered_configuration_is_private_and_the_template_holds_no_secret(
    edge: Edge,
) -> None:
    rendered = edge.state_dir / "nginx.conf"
    assert rendered.stat().st_mode & 0o077 == 0
    assert edge.orthanc.authorization in rendered.read_text()
    assert "Basic " not in EDGE_TEMPLATE.read_text().replace("`Basic ...`", "")


def test_the_template_documents_each_of_its_variables() -> None:
    template = EDGE_TEMPLATE.read_text()
    used = set(re.findall(r"\$\{(\w+)\}", template))
    documented = set(re.findall(r"^#   (LIGHTBOX_\w+) ", template, re.MULTILINE))
    assert used == documented
