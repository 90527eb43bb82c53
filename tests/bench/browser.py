"""Rows 5 and 6: what a person waits for, in OHIF and headless Chromium."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from time import perf_counter

from playwright.sync_api import Browser, Error, Page

from tests.bench.client import BenchError, fetch
from tests.bench.measure import Better, Row
from tests.bench.site import Site, restart

TIMEOUT_MS = 120_000
POLL_MS = 50
CANVAS = "canvas.cornerstone-canvas"
# Many grey values in the middle: an image, not the empty viewport. A small piece, because reading
# it back costs the browser time.
SHOWN = f"""() => {{
    const canvas = document.querySelector('{CANVAS}');
    if (canvas === null || canvas.width < 64 || canvas.height < 64) return false;
    const x = canvas.width / 2 - 32, y = canvas.height / 2 - 32;
    const pixels = canvas.getContext('2d').getImageData(x, y, 64, 64).data;
    const seen = new Set();
    for (let i = 0; i < pixels.length; i += 4) seen.add(pixels[i]);
    return seen.size > 20;
}}"""
FRAMES = """performance.getEntriesByType('resource').filter(
    each => each.name.includes('/frames/') && each.responseEnd > 0)"""
SCROLLED = f"""slices =>
    document.body.textContent.includes(`(${{slices}}/${{slices}})`)
    && new Set({FRAMES}.map(each => each.name)).size >= slices"""
FRAMES_TOOK = f"""() => {{
    const frames = {FRAMES};
    return Math.max(...frames.map(each => each.responseEnd))
        - Math.min(...frames.map(each => each.startTime));
}}"""


def rows(site: Site) -> Iterator[Row]:
    """Against Orthanc as it comes, which is what people put behind OHIF and which compresses each
    frame that a browser asks for; and against Orthanc as Lightbox sets it up."""
    for against, title in (
        ("defaults", "Orthanc as it comes"),
        ("same", "the same Orthanc, set up as Lightbox's"),
    ):
        yield from _rows(site, against, title)


def _rows(site: Site, against: str, title: str) -> Iterator[Row]:
    for name, how, target, cold in (
        ("cold", "opened for the first time", 0.8, True),
        ("warm", "opened again", 0.6, False),
    ):
        opening = _Opening(site, against)
        yield Row(
            name=f"open-{name}-{against}",
            title=f"a study of {site.slices} slices {how} in OHIF, until the first image is "
            f"shown, against {title}",
            unit="s",
            target=target,
            better=Better.LOWER,
            prepare=opening.prepare,
            before_direct=opening.forget_direct if cold else lambda: None,
            direct=opening.direct,
            before_ours=opening.forget if cold else lambda: None,
            ours=opening.ours,
        )
    scrolling = _Opening(site, against)
    yield Row(
        name=f"scroll-{against}",
        title=f"a study of {site.slices} slices scrolled through for the first time in OHIF, from "
        f"the first frame asked for to the last one's arrival, against {title}",
        unit="s",
        target=0.5,
        better=Better.LOWER,
        prepare=scrolling.prepare,
        before_direct=scrolling.forget_direct,
        direct=scrolling.direct_scrolled,
        before_ours=scrolling.forget,
        ours=scrolling.ours_scrolled,
    )


class _Opening:
    """The CT in a fresh browser profile each time."""

    def __init__(self, site: Site, against: str) -> None:
        self._site = site
        self._defaults = against == "defaults"

    @cached_property
    def _browser(self) -> Browser:
        return self._site.chromium

    def prepare(self) -> None:
        """Once on each side, untimed: the browser's own first time."""
        self._site.wait_until_stable(self._site.ct.study)
        self.direct()
        self.ours()

    def forget(self) -> None:
        """Nothing of the CT is left in Orthanc's, the app's or the edge's memory; the app has
        answered for another study, so that its own first time is over."""
        restart(self._site.orthanc)
        self._site.lightbox.forget()
        other = self._site.small[0]
        session = self._site.open(f"/order/{other.order['id']}")
        for path in (
            f"/studies?StudyInstanceUID={other.study}",
            f"/studies/{other.study}/series",
            f"/studies/{other.study}/series/{other.series}/metadata",
            other.images[0].frame,
        ):
            answer = fetch(session.source, session.root + path)
            if answer.status != 200:
                raise BenchError(f"{path}: {answer.status}")

    def forget_direct(self) -> None:
        """Nothing of the CT is left in the memory of the Orthanc that is asked directly."""
        restart(self._site.default_orthanc if self._defaults else self._site.orthanc)

    def _direct_url(self) -> str:
        plain = self._site.plain_defaults if self._defaults else self._site.plain
        return f"{plain.url}/viewer?StudyInstanceUIDs={self._site.ct.study}"

    def _our_url(self) -> str:
        return self._site.link(f"/order/{self._site.ct.order['id']}")

    def direct(self) -> float:
        return self._opened(self._direct_url())

    def ours(self) -> float:
        return self._opened(self._our_url())

    def direct_scrolled(self) -> float:
        return self._scrolled(self._direct_url())

    def ours_scrolled(self) -> float:
        return self._scrolled(self._our_url())

    def _opened(self, url: str) -> float:
        with self._page() as page:
            return _open(page, url)

    def _scrolled(self, url: str) -> float:
        slices = self._site.slices
        with self._page() as page:
            _open(page, url)
            page.locator(CANVAS).first.hover(force=True)
            for _ in range(slices - 1):
                page.mouse.wheel(0, 120)
            page.wait_for_function(SCROLLED, arg=slices, timeout=TIMEOUT_MS, polling=POLL_MS)
            milliseconds: float = page.evaluate(FRAMES_TOOK)
            return milliseconds / 1000

    @contextmanager
    def _page(self) -> Iterator[Page]:
        context = self._browser.new_context(viewport={"width": 1440, "height": 900})
        try:
            page = context.new_page()
            page.add_init_script("performance.setResourceTimingBufferSize(10000)")
            yield page
        except Error as error:
            raise BenchError(f"in the browser: {error.message.splitlines()[0]}") from error
        finally:
            context.close()


def _open(page: Page, url: str) -> float:
    """Seconds from the navigation to the first image."""
    began = perf_counter()
    page.goto(url, wait_until="commit", timeout=TIMEOUT_MS)
    page.wait_for_function(SHOWN, timeout=TIMEOUT_MS, polling=POLL_MS)
    return perf_counter() - began
