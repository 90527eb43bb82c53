"""The two clients: one that walks a fixed list of requests once, and `wrk`.

The first is for work that must not repeat, such as frames never asked for before. Each connection
is a thread that sends a prepared request and lets the kernel fill one buffer: next to no Python
happens for a byte. `floor` in the report says what it costs against a bare nginx.
"""

import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

TIMEOUT_SECONDS = 120.0
_RECEIVE_BYTES = 1024 * 1024


class BenchError(Exception):
    """What was measured is not what was meant: nothing that follows would be true."""


class NotRun(Exception):
    """A row that can't be measured here; the text says why."""


@dataclass(frozen=True)
class Source:
    """A side of a comparison: an origin, and the headers that all its requests have."""

    origin: str
    headers: Mapping[str, str]

    def with_headers(self, **more: str) -> "Source":
        added = {name.replace("_", "-"): value for name, value in more.items()}
        return Source(self.origin, {**self.headers, **added})

    @property
    def address(self) -> tuple[str, int]:
        url = urlsplit(self.origin)
        assert url.hostname is not None
        assert url.port is not None
        return url.hostname.replace("localhost", "127.0.0.1"), url.port

    def request(self, path: str, *, method: str = "GET", body: bytes | None = None) -> bytes:
        """A whole HTTP/1.1 request."""
        lines = [f"{method} {path} HTTP/1.1", f"Host: {urlsplit(self.origin).netloc}"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        if body is not None:
            lines.append(f"Content-Length: {len(body)}")
        return "\r\n".join([*lines, "", ""]).encode() + (body or b"")


@dataclass
class Answer:
    """What came back. `body` is empty unless it was asked to be kept."""

    status: int
    headers: dict[str, str]
    length: int
    body: bytes = b""


class Connection:
    """One keep-alive connection; it connects anew where the server closed it, as browsers do."""

    def __init__(self, address: tuple[str, int], *, on_bytes: Callable[[int], None] | None = None):
        self._address = address
        self._socket: socket.socket | None = None
        self._buffer = bytearray(_RECEIVE_BYTES)
        self._view = memoryview(self._buffer)
        self._on_bytes = on_bytes

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def ask(self, request: bytes, *, keep: bool = False) -> Answer:
        """Send a request and read its answer to the end."""
        fresh = self._socket is None
        try:
            return self._ask(request, keep)
        except (ConnectionError, EOFError):
            # An idle connection that the server gave up: once more on a new one.
            self.close()
            if fresh:
                raise
            return self._ask(request, keep)

    def _ask(self, request: bytes, keep: bool) -> Answer:
        if self._socket is None:
            self._socket = socket.create_connection(self._address, TIMEOUT_SECONDS)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.sendall(request)
        head, rest = self._read_head()
        lines = head.decode("latin-1").split("\r\n")
        headers = {
            name.strip().lower(): value.strip()
            for name, _, value in (line.partition(":") for line in lines[1:])
        }
        answer = Answer(int(lines[0].split(" ", 2)[1]), headers, 0)
        kept: list[bytes] | None = [] if keep else None
        if "chunked" in headers.get("transfer-encoding", ""):
            answer.length = self._read_chunks(rest, kept)
        elif "content-length" in headers:
            answer.length = int(headers["content-length"])
            _take(rest, kept)
            self._read_exactly(answer.length - len(rest), kept)
        elif answer.status not in (204, 304):
            answer.length = self._read_to_end(rest, kept)
        if headers.get("connection", "").lower() == "close":
            self.close()
        if kept is not None:
            answer.body = b"".join(kept)
        return answer

    def _receive(self, wanted: int, flags: int = 0) -> int:
        assert self._socket is not None
        count = self._socket.recv_into(self._view, min(wanted, _RECEIVE_BYTES), flags)
        if count and self._on_bytes is not None:
            self._on_bytes(count)
        return count

    def _read_head(self) -> tuple[bytes, bytes]:
        got = b""
        while True:
            count = self._receive(16384)
            if not count:
                raise EOFError("the server closed the connection")
            got += bytes(self._view[:count])
            head, separator, rest = got.partition(b"\r\n\r\n")
            if separator:
                return head, rest

    def _read_exactly(self, length: int, kept: list[bytes] | None) -> None:
        # One system call for all of it, unless somebody wants to follow the bytes.
        flags = socket.MSG_WAITALL if self._on_bytes is None else 0
        while length > 0:
            count = self._receive(length, flags)
            if not count:
                raise BenchError("an answer ended before its announced length")
            if kept is not None:
                kept.append(bytes(self._view[:count]))
            length -= count

    def _read_to_end(self, rest: bytes, kept: list[bytes] | None) -> int:
        length = len(rest)
        _take(rest, kept)
        while count := self._receive(_RECEIVE_BYTES):
            length += count
            if kept is not None:
                kept.append(bytes(self._view[:count]))
        self.close()
        return length

    def _read_chunks(self, rest: bytes, kept: list[bytes] | None) -> int:
        """The chunked coding (RFC 9112 7.1), without trailers."""
        length = 0
        while True:
            while b"\r\n" not in rest:
                count = self._receive(65536)
                if not count:
                    raise BenchError("a chunked answer ended early")
                rest += bytes(self._view[:count])
            line, _, rest = rest.partition(b"\r\n")
            size = int(line.partition(b";")[0], 16)
            missing = size + 2 - len(rest)
            if missing > 0:
                _take(rest[:size], kept)
                self._read_exactly(max(0, size - len(rest)), kept)
                tail = 2 - max(0, len(rest) - size)
                self._read_exactly(tail, None)
                rest = b""
            else:
                _take(rest[:size], kept)
                rest = rest[size + 2 :]
            length += size
            if size == 0:
                return length


def _take(some: bytes, kept: list[bytes] | None) -> None:
    if kept is not None and some:
        kept.append(some)


def fetch(source: Source, path: str) -> Answer:
    """One request by itself, with its body."""
    connection = Connection(source.address)
    try:
        return connection.ask(source.request(path), keep=True)
    finally:
        connection.close()


@dataclass
class Walk:
    """A list of requests, each to be sent exactly once, over some connections.

    `least` is the shortest body that can be right: less, or another status than 200, ends the
    benchmark.
    """

    address: tuple[str, int]
    requests: Sequence[bytes]
    connections: int
    warm_up: bytes | None = None
    least: int = 1
    _errors: list[BaseException] = field(default_factory=list)

    def seconds(self) -> float:
        """Send them all; from the moment that all connections are up to the last byte."""
        todo = iter(self.requests)
        lock = threading.Lock()
        ready = threading.Barrier(self.connections + 1)

        def work() -> None:
            connection = Connection(self.address)
            try:
                try:
                    if self.warm_up is not None:
                        self._check(connection.ask(self.warm_up))
                finally:
                    ready.wait(TIMEOUT_SECONDS)
                while True:
                    with lock:
                        request = next(todo, None)
                    if request is None:
                        return
                    self._check(connection.ask(request))
            except Exception as error:  # noqa: BLE001  (told by the thread that waits)
                self._errors.append(error)
            finally:
                connection.close()

        threads = [threading.Thread(target=work, daemon=True) for _ in range(self.connections)]
        for thread in threads:
            thread.start()
        ready.wait(TIMEOUT_SECONDS)
        began = time.perf_counter()
        for thread in threads:
            thread.join()
        ended = time.perf_counter()
        if self._errors:
            raise BenchError(f"a request failed: {self._errors[0]!r}") from self._errors[0]
        return ended - began

    def per_second(self) -> float:
        return len(self.requests) / self.seconds()

    def _check(self, answer: Answer) -> None:
        if answer.status != 200 or answer.length < self.least:
            raise BenchError(f"status {answer.status}, {answer.length} bytes")


# ---------------------------------------------------------------------------------------- wrk

_SCRIPT = """\
local requests = {}
local next_one = 0
function init(args)
  local file = io.open(args[1], "rb")
  for each in string.gmatch(file:read("*a"), "[^%z]+") do
    requests[#requests + 1] = each
  end
  file:close()
end
function request()
  next_one = next_one % #requests + 1
  return requests[next_one]
end
function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format("rate %f p50 %f p99 %f errors %d\\n",
    summary.requests * 1e6 / summary.duration,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
"""


@dataclass(frozen=True)
class Load:
    """What `wrk` saw: requests a second, and milliseconds."""

    rate: float
    p50: float
    p99: float


def wrk(
    address: tuple[str, int],
    requests: Sequence[bytes],
    *,
    connections: int,
    seconds: int,
    folder: Path,
) -> Load:
    """Send the requests in turn, again and again, for some seconds."""
    program = shutil.which("wrk")
    if program is None:
        raise NotRun("wrk is not installed: make setup-test")
    listed, script = folder / "wrk-requests", folder / "wrk.lua"
    listed.write_bytes(b"\0".join(requests))
    script.write_text(_SCRIPT)
    host, port = address
    command = [program, "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "60s"]
    command += ["-s", str(script), f"http://{host}:{port}", "--", str(listed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    told = re.search(r"rate (\S+) p50 (\S+) p99 (\S+) errors (\d+)", done.stdout)
    if done.returncode != 0 or told is None:
        raise BenchError(f"wrk failed: {done.stdout}{done.stderr}")
    if int(told[4]):
        raise BenchError(f"wrk saw errors: {done.stdout}")
    return Load(float(told[1]), float(told[2]), float(told[3]))
