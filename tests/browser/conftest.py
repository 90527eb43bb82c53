"""The demo as a person starts it, and a headless Chromium to look at it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, sync_playwright

from app.demo.stack import REPOSITORY, find_program, free_port

START_SECONDS = 120.0


@dataclass
class Demo:
    """A running `python -m app demo` with a state folder and ports of its own."""

    state: Path
    environment: dict[str, str]
    process: subprocess.Popen[bytes]
    face: dict[str, Any] = field(default_factory=dict)  # demo.json

    @classmethod
    def start(cls, state: Path, environment: dict[str, str] | None = None) -> "Demo":
        """Start it and wait for demo.json. Fails with what it printed if it ends before."""
        wanted = environment or {
            **os.environ,
            "LIGHTBOX_STATE_DIR": str(state),
            "LIGHTBOX_API_PORT": str(free_port()),
            "LIGHTBOX_VIEWER_PORT": str(free_port()),
        }
        state.mkdir(exist_ok=True)
        with (state / "demo.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "app", "demo"],
                cwd=REPOSITORY,
                env=wanted,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        demo = cls(state, wanted, process)
        deadline = time.monotonic() + START_SECONDS
        while not (state / "demo.json").exists():
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                pytest.fail(f"the demo did not come up: {demo.printed}")
            time.sleep(0.05)
        demo.face = json.loads((state / "demo.json").read_text())
        return demo

    @property
    def printed(self) -> str:
        return (self.state / "demo.log").read_text(errors="replace")

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Ask it to end; its exit code."""
        self.process.send_signal(number)
        return self.process.wait(timeout=30)

    def ask(self, who: str, method: str, path: str, **more: Any) -> httpx.Response:
        """One API request with a token of demo.json."""
        headers = {"Authorization": f"Bearer {self.face['tokens'][who]}"}
        url = f"{self.face['api']}/api/v1{path}"
        return httpx.request(method, url, headers=headers, timeout=30.0, trust_env=False, **more)

    def order(self, accession_number: str) -> Any:
        """An order of the demo."""
        (order,) = (
            each for each in self.face["orders"] if each["accession_number"] == accession_number
        )
        return order

    def link(self, accession_number: str, who: str = "clinician") -> str:
        """A fresh viewer link to an order's images."""
        order = self.order(accession_number)
        answer = self.ask(who, "GET", f"/dicom/viewer/url/order/{order['id']}")
        assert answer.status_code == 200, answer.text
        url: str = answer.json()["url"]
        return url


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    """One demo for all browser tests."""
    running = Demo.start(tmp_path_factory.mktemp("demo"))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """Debian's Chromium, rendering in software as there is no GPU.

    For a module, not the session: while it lives, Playwright's event loop does, too, and no
    asynchronous test can run.
    """
    program = find_program("chromium", ("/usr/bin/chromium",), "chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=program,
            args=[
                "--use-gl=angle",
                "--use-angle=swiftshader",
                "--enable-unsafe-swiftshader",
                "--no-sandbox",  # tests may run as root, where Chromium's own sandbox can't
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--no-first-run",
            ],
        )
        yield browser
        browser.close()


@dataclass
class Watched:
    """A page, and what a person would not see of it."""

    page: Page
    console_errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def outside(self, *origins: str) -> list[str]:
        """The requests that went elsewhere. blob: and data: stay in the browser."""
        inside = tuple(f"{origin}/" for origin in origins)
        return [each for each in self.requests if not each.startswith((*inside, "blob:", "data:"))]


@pytest.fixture
def watched(chromium: Browser) -> Iterator[Watched]:
    """A fresh browser profile with one page."""
    context = chromium.new_context(viewport={"width": 1440, "height": 900})
    each = Watched(context.new_page())

    def hear(message: ConsoleMessage) -> None:
        if message.type == "error":
            each.console_errors.append(message.text)

    def see(request: Request) -> None:
        each.requests.append(request.url)

    each.page.on("console", hear)
    each.page.on("pageerror", lambda error: each.console_errors.append(str(error)))
    each.page.on("request", see)
    yield each
    context.close()
