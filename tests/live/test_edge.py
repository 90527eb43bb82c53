"""The edge, for real: nginx in front of an app that records what reaches it, and a real Orthanc."""

import http.client
import io
import json
import os
import re
import resource
import select
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from app.demo.stack import EDGE_TEMPLATES, LOOPBACK, AppServer, Edge, OrthancServer, free_port

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
    type, `?part=` that of the part, `?cache=`, `?cookie=` and `?etag=` the headers of these names;
    it takes `?seconds=`."""

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
            time.sleep(float(query.get("seconds", 0)))
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
            if "etag" in query:
                self.send_header("ETag", query["etag"])
            if "part" in query:
                self.send_header("X-Lightbox-Part", query["part"])
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


def send_raw(port: int, request: bytes) -> Answer:
    """The answer to exactly these bytes; the edge has to close the connection after it."""
    with socket.create_connection((LOOPBACK, port), timeout=20) as connection:
        connection.sendall(request)
        response = http.client.HTTPResponse(connection)
        response.begin()
        received: dict[str, list[str]] = {}
        for name, value in response.getheaders():
            received.setdefault(name.lower(), []).append(value)
        return Answer(response.status, received, response.read())


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


@pytest.mark.parametrize("path", ["/s", "/s?x=1"])
def test_the_parent_of_all_sessions_is_nothing(edge: Edge, app: RecordingApp, path: str) -> None:
    answer, unknown = ask(edge.viewer_port, path), ask(edge.viewer_port, "/notfoundstudy")
    assert (answer.status, answer.one("location")) == (404, None)
    assert answer.one("content-type") == unknown.one("content-type")
    assert answer.body.split(b"Request")[0] == unknown.body.split(b"Request")[0]
    assert app.requests == []


@pytest.mark.parametrize("path", ["/api", "/fhir", "/dicom-web", "/api?x=1"])
def test_a_prefix_of_the_api_is_nothing(edge: Edge, app: RecordingApp, path: str) -> None:
    answer = ask(edge.api_port, path)
    assert (answer.status, answer.one("location")) == (404, None)
    answer.problem()
    assert app.requests == []


@pytest.mark.parametrize("path", ["/viewer", "/notfoundstudy", "/s"])
def test_where_a_person_looks_even_a_refusal_is_our_page(edge: Edge, path: str) -> None:
    answer = ask(edge.viewer_port, path, body=b"x" * 5000)
    assert answer.status == 413
    assert answer.one("content-type") == "text/html; charset=utf-8"
    assert b"nginx" not in answer.body
    assert answer.one("x-request-id")


@pytest.mark.parametrize(
    "tail",
    [
        b"%00",
        b"a%00b",
        b"?mrn=%00",
        b"?mrn=a%00b&x=1",
        b"?%00",
        b"\xc3\xa9",
        b"?mrn=\xe9",
        b"?mrn=\xff\xfe",
        b"?mrn=\x7f",
        b"?mrn=\x01",
        b"#%00",
    ],
)
def test_an_address_holds_neither_nul_nor_raw_bytes(
    edge: Edge, app: RecordingApp, tail: bytes
) -> None:
    for port, path in (
        (edge.api_port, b"/api/v1/patients/"),
        (edge.api_port, b"/dicom-web/studies"),
        (edge.viewer_port, f"/s/{CTX}/dicom-web/studies".encode()),
        (edge.viewer_port, b"/viewer"),
    ):
        line = b"GET " + path + tail + b" HTTP/1.1\r\n"
        answer = send_raw(port, line + b"Host: edge\r\nConnection: close\r\n\r\n")
        assert answer.status == 400
        answer.problem()
    assert app.requests == []


def test_what_only_looks_like_nul_passes(edge: Edge, app: RecordingApp) -> None:
    assert ask(edge.api_port, "/api/v1/patients?q=100%2500&r=%C3%A9").status == 200
    assert app.requests[0].path == "/api/v1/patients?q=100%2500&r=%C3%A9"


def test_an_unknown_transfer_encoding_is_the_clients_fault(edge: Edge, app: RecordingApp) -> None:
    head = b" HTTP/1.1\r\nHost: edge\r\nTransfer-Encoding: xchunked\r\n\r\n"
    for port, line in (
        (edge.api_port, b"POST /api/v1/orders"),
        (edge.api_port, b"POST /api/v1/dicom/upload"),
        (edge.viewer_port, b"GET /viewer"),
        (edge.viewer_port, f"GET /s/{CTX}/status".encode()),
    ):
        answer = send_raw(port, line + head)
        assert answer.status == 400
        assert answer.one("retry-after") is None
        answer.problem()
    assert app.requests == []


@pytest.mark.parametrize("origin", ["api", "viewer"])
def test_http_1_0_needs_no_host_and_http_1_1_does(
    edge: Edge, app: RecordingApp, origin: str
) -> None:
    port, path = (
        (edge.api_port, b"/api/x") if origin == "api" else (edge.viewer_port, b"/s/x/status")
    )
    assert send_raw(port, b"GET " + path + b" HTTP/1.0\r\n\r\n").status == 200
    assert app.requests[0].headers["host"] == ["lightbox"]
    assert ask(port, path.decode()).status == 200
    assert app.requests[1].headers["host"] == [f"{LOOPBACK}:{port}"]
    for host in (b"", b"Host:\r\n"):
        head = b" HTTP/1.1\r\nConnection: close\r\n" + host + b"\r\n"
        answer = send_raw(port, b"GET " + path + head)
        assert answer.status == 400
        answer.problem()
    assert len(app.requests) == 2


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
        "/_orthanc-kept/0123456789abcdef/system",
        "/_orthanc-kept/x/instances/{id}/frames/0/raw",
        "/_orthanc-kept/0123456789abcdef/../system",
        "/_orthanc-part/x/instances/{id}/frames/0/raw",
        "/_orthanc-part/0123456789abcdef0123456789abcdef/system",
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


@pytest.mark.parametrize("origin", ["api", "viewer"])
@pytest.mark.parametrize("kept", ["", "-kept/0123456789abcdef"])
def test_a_part_is_wrapped_between_the_apps_boundaries(
    edge: Edge, app: RecordingApp, instance: tuple[str, bytes], origin: str, kept: str
) -> None:
    boundary, part = "0123456789abcdef" * 2, "application/octet-stream;%20transfer-syntax=1.2"
    target = f"/_orthanc-part/{boundary}{kept}/instances/{instance[0]}/frames/0/raw"
    kind = f'multipart/related;%20type="application/octet-stream";%20boundary={boundary}'
    path = f"/dicom-web/frames/1?accel={target}&type={kind}&part={part}&etag=W/%22x%22"
    port = edge.viewer_port if origin == "viewer" else edge.api_port
    answer = ask(port, f"/s/{CTX}{path}" if origin == "viewer" else path)
    assert answer.status == 200
    head = f"--{boundary}\r\nContent-Type: application/octet-stream; transfer-syntax=1.2\r\n\r\n"
    assert answer.body == head.encode() + instance[1] + f"\r\n--{boundary}--\r\n".encode()
    assert answer.one("content-type") == kind.replace("%20", " ")
    assert answer.one("etag") == 'W/"x"'
    assert "x-lightbox-part" not in answer.headers


def test_what_is_kept_is_sent_to_who_is_led_there_again(
    edge: Edge, app: RecordingApp, instance: tuple[str, bytes]
) -> None:
    """Under the same stamp; each time the app was asked first, and a client never can lead."""
    for stamp in ("00000000000000aa", "00000000000000ab"):
        target = f"/_orthanc-kept/{stamp}/instances/{instance[0]}/frames/0/raw"
        before = len(app.requests)
        for _ in range(3):
            answer = ask(
                edge.viewer_port, f"/s/{CTX}/dicom-web/f?accel={target}&etag=%22{stamp}%22"
            )
            assert (answer.status, answer.body) == (200, instance[1])
            assert answer.one("etag") == f'"{stamp}"'
        assert len(app.requests) == before + 3
        for port in (edge.viewer_port, edge.api_port):
            assert ask(port, target).status == 404
    unknown = "00000000-00000000-00000000-00000000-00000000"
    missing = f"/_orthanc-kept/{stamp}/instances/{unknown}/frames/0/raw"
    for _ in range(2):
        answer = ask(edge.viewer_port, f"/s/{CTX}/dicom-web/f?accel={missing}")
        assert answer.status == 404
        answer.problem()


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


# ------------------------------------------------------------------------------ too much, too slow

MEBIBYTE = 1024 * 1024
FILE_ROUTES = ["upload", "upload-multiple", "read-tags", "modify-tags"]


def test_only_the_file_routes_take_more_than_a_mebibyte(edge: Edge, app: RecordingApp) -> None:
    largest = b"x" * MEBIBYTE
    assert ask(edge.api_port, "/api/v1/orders", "POST", body=largest).status == 200
    assert app.requests.pop().body == largest
    for path in (
        *("/api/v1/orders", "/api/v1/dicom/uploads", "/fhir/x"),
        *("/dicom-web/series", "/dicom-web/studies/", "/dicom-web/studies/1.2/series"),
        *("/dicom-web/studies/x", f"/dicom-web/studies/{'1' * 65}"),
    ):
        answer = ask(edge.api_port, path, "POST", body=largest + b"x")
        assert answer.status == 413
        answer.problem()
    assert app.requests == []
    stores = ("/dicom-web/studies", "/dicom-web/studies/1.2.3")
    for path in (*(f"/api/v1/dicom/{name}" for name in FILE_ROUTES), *stores):
        assert ask(edge.api_port, path + "?x=1", "POST", body=largest * 3).status == 200
        seen = app.requests.pop()
        assert (seen.path, len(seen.body)) == (path + "?x=1", 3 * MEBIBYTE)


@pytest.mark.parametrize("name", ["orders", "dicom/upload"])
def test_a_body_may_come_in_chunks(edge: Edge, app: RecordingApp, name: str) -> None:
    head = f"POST /api/v1/{name} HTTP/1.1\r\nHost: edge\r\nConnection: close\r\n".encode()
    head += b"Transfer-Encoding: chunked\r\n\r\n"
    assert send_raw(edge.api_port, head + b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n").status == 200
    assert app.requests.pop().body == b"abcde"
    large = b"100001\r\n" + b"x" * (MEBIBYTE + 1) + b"\r\n0\r\n\r\n"
    answer = send_raw(edge.api_port, head + large)
    if name == "orders":
        assert answer.status == 413
        answer.problem()
        assert app.requests == []
    else:
        assert answer.status == 200
        assert len(app.requests.pop().body) == MEBIBYTE + 1


def unfinished_post(port: int, path: str, client: str) -> socket.socket:
    """A connection from this address that has sent 1 of 100 bytes."""
    connection = socket.create_connection((LOOPBACK, port), timeout=5, source_address=(client, 0))
    connection.sendall(
        f"POST {path} HTTP/1.1\r\nHost: edge\r\nContent-Length: 100\r\n\r\nx".encode()
    )
    return connection


def unread_bytes(port: int) -> int:
    """What waits in the sockets of a local port to be read (proc(5), /proc/net/tcp)."""
    waiting = 0
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        local, state, queues = (line.split()[column] for column in (1, 3, 4))
        if int(local.partition(":")[2], 16) == port and state == "01":
            waiting += int(queues.partition(":")[2], 16)
    return waiting


def status_for(port: int, path: str, client: str) -> int:
    """How a client with this address is answered."""
    connection = http.client.HTTPConnection(LOOPBACK, port, 5, source_address=(client, 0))
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()


@pytest.fixture
def many_files() -> Iterator[None]:
    """We may have 4,096 files open, or the test is skipped."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))
    except ValueError:
        pytest.skip("this user may not have 4,096 files open")
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_two_thousand_slow_senders_close_nothing(
    edge: Edge, app: RecordingApp, many_files: None
) -> None:
    senders, allowed = 2200, 512
    with ExitStack() as open_connections:
        upload = open_connections.enter_context(
            unfinished_post(edge.api_port, "/api/v1/dicom/upload", "127.0.0.3")
        )
        slow = []
        began = time.monotonic()
        for _ in range(senders):
            connection = unfinished_post(edge.api_port, "/api/v1/orders", LOOPBACK)
            slow.append(open_connections.enter_context(connection))

        refused = ask(edge.api_port, "/api/v1/orders")
        assert refused.status == 429
        assert refused.one("retry-after")
        refused.problem()
        assert status_for(edge.api_port, "/api/v1/orders", "127.0.0.2") == 200
        assert status_for(edge.viewer_port, f"/s/{CTX}/status", LOOPBACK) == 200
        assert len(app.requests) == 2  # these two: none of the unfinished ones

        # Those beyond the limit are answered at once, the others given up after 15 s.
        poll = select.poll()
        for connection in slow:
            poll.register(connection, select.POLLIN)
        while len(poll.poll(0)) < senders - allowed:
            assert time.monotonic() < began + 60, "too many are let in"
            time.sleep(0.1)
        assert len(poll.poll(0)) == senders - allowed
        while len(poll.poll(0)) < senders:
            assert time.monotonic() < began + 90, "slow senders are kept"
            time.sleep(0.1)
        assert time.monotonic() > began + 14
        assert sum(connection.recv(20) == b"" for connection in slow) == allowed
        assert status_for(edge.api_port, "/api/v1/orders", LOOPBACK) == 200

        # An upload may pause for longer.
        upload.sendall(b"x" * 99)
        assert upload.recv(12) == b"HTTP/1.1 200"


class ExhaustedEdge(Edge):
    """An edge that runs out of connections soon."""

    def _render(self, template: Path) -> str:
        text = super()._render(template).replace("worker_processes 2;", "worker_processes 1;")
        return text.replace("worker_connections 8192;", "worker_connections 32;")


def test_an_exhausted_edge_logs_no_launch_code(
    recorder: RecordingApp, orthanc: OrthancServer, viewer_files: Path, tmp_path: Path
) -> None:
    edge = ExhaustedEdge(
        tmp_path,
        api_port=free_port(),
        viewer_port=free_port(),
        app_port=recorder.port,
        orthanc=orthanc,
        ohif_dir=viewer_files,
    )
    request = b"GET /viewer?seconds=1&launch=one-time-code HTTP/1.1\r\nHost: edge\r\n"
    request += b"Connection: close\r\n\r\n"
    with edge, ExitStack() as open_connections:
        waiting = []
        for _ in range(20):
            connection = socket.create_connection((LOOPBACK, edge.viewer_port), timeout=5)
            waiting.append(open_connections.enter_context(connection))
            connection.sendall(request[:-2])
        deadline = time.monotonic() + 60
        while unread_bytes(edge.viewer_port) > 0:  # until nginx has read them all
            assert time.monotonic() < deadline, "nginx does not read"
            time.sleep(0.01)
        for connection in waiting:
            connection.sendall(request[-2:])
        answers = [connection.recv(12) for connection in waiting]
    assert b"HTTP/1.1 200" in answers
    assert b"HTTP/1.1 503" in answers  # it had no connection left to ask the app by
    for log in (edge.access_log_path, edge.log_path):
        assert "one-time-code" not in log.read_text()


class ConfinedEdge(Edge):
    """An edge that may open fewer files than it would like to."""

    def _prepare(self) -> tuple[Sequence[str | Path], Mapping[str, str]]:
        command, environment = super()._prepare()
        confined = ["prlimit", "--nofile=1024:1024", "--"]
        if os.geteuid() == 0:  # root may raise a hard limit, unless it is told not to
            confined += ["setpriv", "--bounding-set=-sys_resource", "--"]
        return [*confined, *command], environment


def test_the_edge_starts_where_fewer_files_may_be_open(
    recorder: RecordingApp, orthanc: OrthancServer, viewer_files: Path, tmp_path: Path
) -> None:
    with ConfinedEdge(
        tmp_path,
        api_port=free_port(),
        viewer_port=free_port(),
        app_port=recorder.port,
        orthanc=orthanc,
        ohif_dir=viewer_files,
    ) as edge:
        assert ask(edge.api_port, "/api/x").status == 200
        assert "setrlimit(RLIMIT_NOFILE, 16384) failed" in edge.log_path.read_text()


# ------------------------------------------------------------------------------ logs, template


def test_the_log_tells_no_query_and_no_cookie(edge: Edge, app: RecordingApp) -> None:
    headers = {"Cookie": "lightbox=cookie-value", "X-Request-ID": "logged-request"}
    ask(edge.viewer_port, "/viewer?launch=one-time-code", headers=headers)
    ask(edge.api_port, "/api/v1/patients?mrn=MRN-4711", headers=headers)
    deadline = time.monotonic() + 60  # nginx writes the line after the answer
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
    said = ""
    for template in EDGE_TEMPLATES:
        rendered = edge.state_dir / template.stem
        assert rendered.stat().st_mode & 0o077 == 0
        said += rendered.read_text()
        assert "Basic " not in template.read_text().replace("`Basic ...`", "")
    assert edge.orthanc.authorization in said


def test_the_template_documents_each_of_its_variables() -> None:
    template = "".join(each.read_text() for each in EDGE_TEMPLATES)
    used = set(re.findall(r"\$\{(\w+)\}", template))
    documented = set(re.findall(r"^#   (LIGHTBOX_\w+) ", template, re.MULTILINE))
    assert used == documented
