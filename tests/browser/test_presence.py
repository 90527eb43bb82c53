"""The viewer's page and who sits in front of it: signs of life, and the notice before the end.

`ohif/app-config.js` runs in a page of its own here, under a clock that the test moves.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route, expect

from app.demo.stack import REPOSITORY

CTX = "c" * 22
ORIGIN = "http://viewer.test"
PAGE = """<!doctype html><title>OHIF</title><body><canvas></canvas>
<script src="/app-config.js"></script><script>
for (const kind of ['pointermove', 'pointerdown', 'keydown', 'wheel'])
  window.addEventListener(kind, () => { document.title = 'heard'; });
</script>"""


@dataclass
class Desk:
    """A page with our configuration; what it sent, and how it is answered."""

    page: Page
    left: int = 43_000
    purpose: str = ""
    alive_status: int = 200
    status: int = 204
    sent: list[str] = field(default_factory=list)

    def answer(self, route: Route) -> None:
        path = route.request.url.removeprefix(ORIGIN)
        self.sent.append(path)
        if path == "/app-config.js":
            route.fulfill(path=REPOSITORY / "ohif" / "app-config.js")
        elif path.endswith("/alive"):
            said = {"seconds_left": self.left, "warn_seconds": 600, "purpose_of_use": self.purpose}
            route.fulfill(
                status=self.alive_status, content_type="application/json", body=json.dumps(said)
            )
        elif path.endswith("/status"):
            route.fulfill(status=self.status)
        elif path.endswith("/ended"):
            route.fulfill(content_type="text/html", body="<h1>ended</h1>")
        else:
            route.fulfill(content_type="text/html", body=PAGE)

    def open(self) -> None:
        self.page.goto(f"{ORIGIN}/viewer?StudyInstanceUIDs=1.2&ctx={CTX}")
        self.wait_for_signs(1)

    @property
    def signs(self) -> int:
        return self.sent.count(f"/s/{CTX}/alive")

    def wait_for_signs(self, count: int) -> None:
        """Until so many were sent; they are sent by timers, which only `pass_seconds` moves."""
        with_deadline = 100
        while self.signs < count and with_deadline:
            self.page.evaluate("() => new Promise(done => requestAnimationFrame(done))")
            with_deadline -= 1
        assert self.signs == count

    def pass_seconds(self, seconds: int) -> None:
        self.page.clock.run_for(seconds * 1000)
        # What the timers started has come back by then.
        self.page.evaluate("() => fetch('/ping').then(answer => answer.text())")


@pytest.fixture
def desk(chromium: Browser) -> Iterator[Desk]:
    context = chromium.new_context()
    each = Desk(context.new_page())
    each.page.clock.install()
    each.page.route("**/*", each.answer)
    yield each
    context.close()


def notice(desk: Desk) -> Any:
    return desk.page.locator("#lightbox-closes-soon")


ACTS: dict[str, Any] = {
    "pointer": lambda page: page.mouse.move(100, 120),
    "key": lambda page: page.keyboard.press("ArrowDown"),
    "wheel": lambda page: page.mouse.wheel(0, 120),
    "press": lambda page: page.mouse.down(),
}


@pytest.mark.parametrize("act", ACTS)
def test_whoever_reads_is_heard(desk: Desk, act: str) -> None:
    desk.open()
    for count in (2, 3, 4):
        desk.pass_seconds(40)
        desk.page.evaluate("() => { document.title = 'OHIF'; }")
        ACTS[act](desk.page)
        expect(desk.page).to_have_title("heard")  # the browser takes its time with a wheel
        if act == "press":
            desk.page.mouse.up()
        desk.pass_seconds(21)
        assert desk.signs == count


def test_nobody_there_nothing_sent(desk: Desk) -> None:
    desk.open()
    desk.pass_seconds(3600)
    assert desk.signs == 1
    # Neither does a script's event count.
    desk.page.evaluate("() => window.dispatchEvent(new KeyboardEvent('keydown', {key: 'a'}))")
    desk.page.evaluate("() => window.dispatchEvent(new PointerEvent('pointermove'))")
    desk.pass_seconds(60)
    assert desk.signs == 1
    desk.page.mouse.move(10, 10)
    desk.pass_seconds(21)
    assert desk.signs == 2


def test_one_act_is_one_sign(desk: Desk) -> None:
    desk.open()
    desk.pass_seconds(5)
    desk.page.mouse.move(50, 60)
    desk.pass_seconds(120)
    assert desk.signs == 2


def test_a_session_that_ended_is_left_at_the_next_act(desk: Desk) -> None:
    desk.open()
    desk.alive_status = 403
    desk.page.mouse.move(50, 60)
    desk.page.clock.run_for(21_000)
    expect(desk.page.get_by_role("heading")).to_have_text("ended")


@pytest.mark.parametrize("status", [503, 429, 500])
def test_an_app_that_is_down_for_a_moment_takes_nothing_away(desk: Desk, status: int) -> None:
    desk.open()
    desk.alive_status = status
    desk.page.mouse.move(50, 60)
    desk.pass_seconds(21)
    assert desk.page.url.startswith(f"{ORIGIN}/viewer")
    desk.alive_status = 200
    desk.pass_seconds(21)
    assert desk.signs >= 3, "what was not heard is said again"


def test_the_notice_comes_some_minutes_before_the_end_and_can_be_put_away(desk: Desk) -> None:
    desk.left = 720
    desk.open()
    desk.pass_seconds(60)
    expect(notice(desk)).to_have_count(0)
    desk.pass_seconds(80)
    expect(notice(desk)).to_contain_text("This viewer closes at")
    expect(notice(desk)).to_contain_text("in 10 minutes")
    expect(notice(desk)).to_contain_text("open the images again from the EHR")
    desk.page.get_by_role("button", name="Put this notice away").click()
    expect(notice(desk)).to_have_count(0)
    desk.left = 720 - 60 - 80 - 21
    desk.pass_seconds(300)
    expect(notice(desk)).to_have_count(0)
    desk.pass_seconds(180)
    expect(notice(desk)).to_contain_text("in 2 minutes")  # back, for the last of them
    desk.page.get_by_role("button", name="Put this notice away").click()
    desk.pass_seconds(40)
    expect(notice(desk)).to_have_count(0)


def test_at_the_end_the_page_is_left(desk: Desk) -> None:
    desk.left = 90
    desk.open()
    desk.pass_seconds(21)
    expect(notice(desk)).to_contain_text("in 2 minutes")
    desk.status = 403
    desk.page.clock.run_for(100_000)
    expect(desk.page.get_by_role("heading")).to_have_text("ended")


def test_emergency_access_is_named(desk: Desk) -> None:
    desk.left, desk.purpose = 300, "BTG"
    desk.open()
    desk.pass_seconds(21)
    expect(notice(desk)).to_contain_text("Your emergency access ends at")
