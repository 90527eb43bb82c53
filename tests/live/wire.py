"""HTTP byte by byte: requests that no client tidies up, and what reaches Orthanc of them."""

import http.client
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from app.demo.stack import LOOPBACK, OrthancServer

# ------------------------------------------------------------------------------ what is answered


@dataclass(frozen=True)
class Answer:
    """One of the answers that came back on a connection; names of headers in lower case."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str:
        """The header's value; "" where it was not sent. Fails if two different ones were sent.

        nginx prepares the headers of a 416 twice: the same twice.
        """
        values = {value for each, value in self.headers if each == name}
        assert len(values) <= 1, f"{name} is ambiguous: {values}"
        return values.pop() if values else ""


@dataclass(frozen=True)
class Reply:
    """All that came back until the other side closed. No answers: it closed without a word."""

    raw: bytes
    answers: list[Answer]

    @property
    def status(self) -> int:
        """That of the last answer; 0 where there was none."""
        return self.answers[-1].status if self.answers else 0

    @property
    def body(self) -> bytes:
        """That of the last answer."""
        return self.answers[-1].body if self.answers else b""


def send(port: int, request: bytes, *, method: str = "GET") -> Reply:
    """Send these bytes and read to the end. They should ask for `Connection: close`."""
    raw = bytearray()
    with socket.create_connection((LOOPBACK, port), timeout=30) as connection:
        try:
            connection.sendall(request)
        except OSError:
            pass  # refused while we were speaking: what was said is there to be read
        try:
            while chunk := connection.recv(65536):
                raw += chunk
        except ConnectionResetError:
            pass
    return Reply(bytes(raw), list(_answers(bytes(raw), is_head=method == "HEAD")))


def _answers(raw: bytes, *, is_head: bool) -> Iterator[Answer]:
    while raw.startswith(b"HTTP/"):
        head, _, raw = raw.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        status = int(first.split(" ")[1])
        pairs = [line.partition(":")[::2] for line in lines]
        headers = [(name.lower(), value.strip()) for name, value in pairs]
        named = dict(headers)
        body = b""
        if is_head or status < 200 or status in (204, 304):
            pass
        elif named.get("transfer-encoding") == "chunked":
            body, raw = _unchunked(raw)
        elif "content-length" in named:
            size = int(named["content-length"])
            body, raw = raw[:size], raw[size:]
        else:
            body, raw = raw, b""
        yield Answer(status, headers, body)


def _unchunked(raw: bytes) -> tuple[bytes, bytes]:
    body = b""
    while raw:
        size_line, _, raw = raw.partition(b"\r\n")
        size = int(size_line, 16)
        if size == 0:
            return body, raw[2:]
        body, raw = body + raw[:size], raw[size + 2 :]
    return body, raw  # it broke off


# -------------------------------------------------------------------------- what reaches Orthanc


@dataclass
class Recorded:
    """A request as Orthanc got it."""

    line: str
    headers: list[tuple[str, str]]
    body: bytes = b""


@dataclass
class Recorder:
    """Stands before Orthanc, writes down each request, and passes it on."""

    port: int = 0
    requests: list[Recorded] = field(default_factory=list)

    def taken(self) -> list[Recorded]:
        """What came since the last time."""
        found, self.requests = self.requests, []
        return found


@contextmanager
def recording(orthanc: OrthancServer) -> Iterator[Recorder]:
    """A recorder that passes on to `orthanc`."""
    recorder = Recorder()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 10  # of an idle connection
        raw_requestline: bytes

        def parse_request(self) -> bool:
            parsed = super().parse_request()
            line = self.raw_requestline.decode("latin-1").rstrip("\r\n")
            headers: Message = getattr(self, "headers", Message())
            self.recorded = Recorded(line, list(headers.items()))
            recorder.requests.append(self.recorded)
            return parsed

        def pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.recorded.body = body
            connection = http.client.HTTPConnection(LOOPBACK, orthanc.http_port, timeout=30)
            try:
                connection.request(self.command, self.path, body, dict(self.headers.items()))
                answer = connection.getresponse()
                content = answer.read()
            except OSError:
                self.close_connection = True
                return
            finally:
                connection.close()
            self.send_response_only(answer.status, answer.reason)
            for name, value in answer.getheaders():
                if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

        do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = pass_on

    server = ThreadingHTTPServer((LOOPBACK, 0), Handler)
    server.daemon_threads = True
    recorder.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield recorder
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
