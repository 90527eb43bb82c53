"""`python -m app demo` as the person at the terminal meets it."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from app.demo.stack import REPOSITORY, free_port
from tests.browser.conftest import Demo


def demo_command(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a demo that is expected to refuse."""
    return subprocess.run(
        [sys.executable, "-m", "app", "demo"],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def children_in(state: Path) -> dict[int, str]:
    """The processes that work in a state folder: their ids and command lines."""
    found = {}
    for process in Path("/proc").iterdir():
        try:
            environment = (process / "environ").read_bytes()
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (OSError, UnicodeDecodeError):
            continue  # not a process, or gone meanwhile
        if process.name != str(os.getpid()) and f"LIGHTBOX_STATE_DIR={state}".encode() in (
            environment
        ):
            found[int(process.name)] = command
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_stops_cleanly_and_comes_back_with_the_same_data(
    tmp_path: Path, number: signal.Signals
) -> None:
    first = Demo.start(tmp_path / "state")
    assert children_in(first.state) != {}
    order = first.order("DEMO-CT-1")
    assert order["study_instance_uid"]
    assert first.stop(number) == 0
    assert "Traceback" not in first.printed
    assert not (first.state / "demo.json").exists()
    assert children_in(first.state) == {}
    for port in ("LIGHTBOX_API_PORT", "LIGHTBOX_VIEWER_PORT"):
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", int(first.environment[port]))) != 0
    second = Demo.start(first.state, first.environment)
    try:
        assert {each["id"] for each in second.face["orders"]} == {
            each["id"] for each in first.face["orders"]
        }
        study = second.ask(
            "clinician", "GET", f"/dicom/studies/{order['study_instance_uid']}"
        ).json()
        assert study["NumberOfStudyRelatedInstances"] == 80
    finally:
        second.stop()


def test_demo_json_is_for_its_user_alone_and_names_everybody(demo: Demo) -> None:
    assert (demo.state / "demo.json").stat().st_mode & 0o077 == 0
    assert set(demo.face["tokens"]) == {
        "clinician",
        "other_clinician",
        "radiologist",
        "technologist",
        "admin",
        "auditor",
        "service",
    }
    health = httpx.get(f"{demo.face['api']}/api/v1/dicom/health", trust_env=False)
    assert health.json()["status"] == "healthy"
    mine = {each["id"] for each in demo.ask("clinician", "GET", "/patients").json()}
    others = {each["id"] for each in demo.ask("other_clinician", "GET", "/patients").json()}
    assert mine
    assert others
    assert not mine & others


def test_a_busy_port_is_one_sentence(demo: Demo, tmp_path: Path) -> None:
    busy = demo.environment["LIGHTBOX_API_PORT"]
    ran = demo_command(
        {
            "LIGHTBOX_STATE_DIR": str(tmp_path / "state"),
            "LIGHTBOX_API_PORT": busy,
            "LIGHTBOX_VIEWER_PORT": str(free_port()),
        }
    )
    assert ran.returncode == 1
    assert ran.stderr == (
        f"Port {busy} is in use by another program; set LIGHTBOX_API_PORT to a free one.\n"
    )


def test_a_second_demo_in_the_same_folder_is_one_sentence(demo: Demo) -> None:
    ran = demo_command(demo.environment)
    assert ran.returncode == 1
    assert "is running in" in ran.stderr
    assert len(ran.stderr.splitlines()) == 1
    assert demo.process.poll() is None


def test_a_wrong_port_number_is_one_sentence(tmp_path: Path) -> None:
    ran = demo_command({"LIGHTBOX_STATE_DIR": str(tmp_path), "LIGHTBOX_API_PORT": "eight thousand"})
    assert ran.returncode == 1
    assert ran.stderr == "LIGHTBOX_API_PORT must be a port number from 1 to 65535.\n"


def test_orthanc_dying_ends_the_demo_with_its_log(tmp_path: Path) -> None:
    running = Demo.start(tmp_path / "state")
    (orthanc,) = (pid for pid, each in children_in(running.state).items() if "Orthanc " in each)
    os.kill(orthanc, signal.SIGKILL)
    assert running.process.wait(timeout=30) == 1
    assert "Orthanc ended by itself" in running.printed
    assert children_in(running.state) == {}
    assert not (running.state / "demo.json").exists()


def test_the_link_in_the_terminal_is_not_broken_by_the_terminal(demo: Demo) -> None:
    """Printed whole, on a line of its own, however narrow the terminal is."""
    links = [line.strip() for line in demo.printed.splitlines() if "/viewer?" in line]
    assert len(links) == 7
    for link in links:
        assert link.startswith(demo.face["viewer"])
        assert len(httpx.URL(link).params["launch"]) == 43
