"""The processes of the demo and the tests, for real: Orthanc, started, asked, stopped, orphaned."""

import gzip
import os
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from app.demo.ohif import check_integrity, ensure_ohif, unpack_viewer, viewer_version
from app.demo.stack import (
    LOOPBACK,
    REPOSITORY,
    AppServer,
    OrthancServer,
    SetupError,
    free_port,
    require_free_port,
)

PASSWORD = "only-for-this-test-9%"


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """True as soon as the condition holds, False if it does not within `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return condition()


def alive(pid: int) -> bool:
    """True while the process runs; a zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OrthancServer]:
    state = tmp_path_factory.mktemp("orthanc")
    with OrthancServer(state, username="lightbox", password=PASSWORD) as server:
        yield server


@pytest.fixture
def pacs(orthanc: OrthancServer) -> Iterator[httpx.Client]:
    headers = {"Authorization": orthanc.authorization}
    with httpx.Client(base_url=orthanc.url, headers=headers, trust_env=False) as client:
        yield client


def test_orthanc_answers_only_with_the_credential(
    orthanc: OrthancServer, pacs: httpx.Client
) -> None:
    assert pacs.get("/system").json()["Name"] == "Lightbox"
    for path in ("/system", "/dicom-web/studies", "/instances"):
        assert httpx.get(orthanc.url + path).status_code == 401
        assert httpx.get(orthanc.url + path, auth=("lightbox", "wrong")).status_code == 401


def test_what_lightbox_does_not_use_is_off(pacs: httpx.Client) -> None:
    assert set(pacs.get("/plugins").json()) <= {"dicom-web", "explorer.js", "worklists"}
    assert pacs.get("/dicom-web/studies").json() == []
    wado_uri = {"requestType": "WADO", "objectUID": "1.2.3"}
    assert pacs.get("/wado", params=wado_uri).status_code == 404
    assert pacs.get("/app/explorer.html").status_code == 404
    assert pacs.request("PROPFIND", "/webdav/").status_code in (400, 404, 405)
    assert pacs.post("/tools/execute-script", content="return 1").status_code == 403


def test_frames_are_not_compressed_by_orthanc(pacs: httpx.Client) -> None:
    answer = pacs.get("/statistics", headers={"Accept-Encoding": "gzip"})
    assert "content-encoding" not in answer.headers


def test_orthanc_serves_nobody_from_another_address(
    orthanc: OrthancServer, pacs: httpx.Client
) -> None:
    """Orthanc before 1.12.10 listens everywhere; what it then says to others is a refusal."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # RFC 5737: sends nothing, chooses our own address
            own_address = probe.getsockname()[0]
        except OSError:
            own_address = LOOPBACK
    if own_address.startswith("127."):
        configured = (REPOSITORY / "orthanc" / "orthanc.json").read_text()
        assert '"RemoteAccessAllowed" : ${LIGHTBOX_ORTHANC_REMOTE}' in configured
        return
    address = f"http://{own_address}:{orthanc.http_port}/system"
    try:
        answer = pacs.get(address)
    except httpx.ConnectError:
        return
    assert answer.status_code in (401, 403)


def test_stop_leaves_no_process(tmp_path: Path) -> None:
    server = OrthancServer(tmp_path, username="lightbox", password=PASSWORD, dicom_port=None)
    server.start()
    server.wait_until_ready()
    pid = server.pid
    assert pid is not None
    server.stop()
    assert server.pid is None
    assert not alive(pid)
    require_free_port(server.http_port, "LIGHTBOX_ORTHANC_PORT")
    server.stop()  # again: nothing to do


def test_orthanc_dies_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib, signal\n"
        "from app.demo.stack import OrthancServer\n"
        f"server = OrthancServer(pathlib.Path(sys.argv[1]), username='u', password={PASSWORD!r})\n"
        "server.start()\n"
        "server.wait_until_ready()\n"
        "print(server.pid, flush=True)\n"
        "signal.pause()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert alive(child)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    assert eventually(lambda: not alive(child))


def test_a_busy_port_is_named_with_its_setting() -> None:
    with socket.socket() as taken:
        taken.bind((LOOPBACK, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SetupError) as raised:
            require_free_port(port, "LIGHTBOX_API_PORT")
    assert str(raised.value) == (
        f"Port {port} is in use by another program; set LIGHTBOX_API_PORT to a free one."
    )


def test_a_program_that_ends_early_shows_its_last_words(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('the database is locked'); raise SystemExit(3)"]
    server = AppServer(free_port(), {}, command, state_dir=tmp_path)
    with pytest.raises(SetupError, match=r"exit code 3\): the database is locked"), server:
        pass


def test_a_program_that_never_answers_is_given_up_and_stopped(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    server = AppServer(free_port(), {}, command, state_dir=tmp_path)
    server.start()
    pid = server.pid
    assert pid is not None
    with pytest.raises(SetupError, match=r"did not answer within 0 s"):
        server.wait_until_ready(timeout=0.2)
    server.stop()
    assert not alive(pid)


def test_a_program_that_ignores_sigterm_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.demo.stack._STOP_SECONDS", 0.5)
    script = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "print('deaf', flush=True); time.sleep(60)"
    )
    server = AppServer(free_port(), {}, [sys.executable, "-c", script], state_dir=tmp_path)
    server.start()
    pid = server.pid
    assert pid is not None
    assert eventually(lambda: "deaf" in server.log_path.read_text())
    server.stop()
    assert not alive(pid)


@pytest.mark.parametrize("password", ["", 'quo"te', "back\\slash", "dol$lar", "spa ce", "ümlaut"])
def test_a_password_that_would_break_the_configuration_is_refused(
    tmp_path: Path, password: str
) -> None:
    with pytest.raises(SetupError, match="password"):
        OrthancServer(tmp_path, username="lightbox", password=password)


# ------------------------------------------------------------------------- the viewer's package


def viewer_archive(folder: Path, files: dict[str, str]) -> Path:
    """A .tgz as npm packs it, with these files."""
    archive = folder / "viewer.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        for number, (name, content) in enumerate(files.items()):
            source = folder / f"source-{number}"
            source.write_text(content)
            tar.add(source, arcname=name)
    return archive


def test_only_what_is_served_is_unpacked(tmp_path: Path) -> None:
    archive = viewer_archive(
        tmp_path,
        {
            "package/package.json": "{}",
            "package/dist/index.html": "viewer",
            "package/dist/assets/logo.png": "png",
            "package/dist/app.bundle.js": "let a = 1;\n" * 100,
            "package/dist/tiny.js": "1",
            "package/dist/app-config.js": "a public demo server",
            "package/dist/sw.js": "",
            "package/dist/init-service-worker.js": "",
            "package/dist/app.bundle.js.map": "",
            "package/dist/../../escape.js": "out of the folder",
            "/etc/absolute.js": "out of the folder",
        },
    )
    unpack_viewer(archive, tmp_path / "dist")
    unpacked = {
        str(path.relative_to(tmp_path / "dist"))
        for path in (tmp_path / "dist").rglob("*")
        if path.is_file()
    }
    shown = {"index.html", "assets/logo.png", "app.bundle.js", "app.bundle.js.gz", "tiny.js"}
    assert unpacked == shown
    assert not (tmp_path / "escape.js").exists()
    script = tmp_path / "dist" / "app.bundle.js"
    packed = script.with_name("app.bundle.js.gz")
    assert gzip.decompress(packed.read_bytes()) == script.read_bytes()
    assert packed.stat().st_mtime == script.stat().st_mtime


def test_a_package_with_another_checksum_is_not_used(tmp_path: Path) -> None:
    archive = viewer_archive(tmp_path, {"package/dist/index.html": "not the viewer"})
    with pytest.raises(SetupError, match="not the one pinned"):
        check_integrity(archive, viewer_version().integrity)
    archive.rename(tmp_path / f"ohif-app-{viewer_version().version}.tgz")
    with pytest.raises(SetupError, match="not the one pinned"):
        ensure_ohif(tmp_path, print)
    assert not (tmp_path / viewer_version().folder_name).exists()


def test_without_npm_the_message_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SetupError, match="npm is not installed"):
        ensure_ohif(tmp_path / "cache", lambda sentence: None)
