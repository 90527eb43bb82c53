"""A clinician opens the images of an order, in a real browser, and sees them."""

import httpx
import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import Demo, Watched

CANVAS = "canvas.cornerstone-canvas"
GREYS = """canvas => {
    const {width, height} = canvas;
    const pixels = canvas.getContext('2d').getImageData(0, 0, width, height).data;
    const seen = new Array(256).fill(0);
    for (let i = 0; i < pixels.length; i += 4) seen[pixels[i]] += 1;
    return seen;
}"""
PICTURE = f"() => JSON.stringify(({GREYS})(document.querySelector('{CANVAS}')))"
MANY_GREYS = f"""() => {{
    const canvas = document.querySelector('{CANVAS}');
    return canvas !== null && ({GREYS})(canvas).filter(count => count > 20).length > 40;
}}"""


def picture(page: Page) -> str:
    """What the first viewport shows: how often each grey value stands in it, as JSON."""
    return str(page.evaluate(PICTURE))


def wait_for_picture(page: Page) -> None:
    """Until the canvas holds an image: many grey values, not one."""
    page.wait_for_function(MANY_GREYS, timeout=60_000)


def test_the_ct_is_shown_and_scrolls(demo: Demo, watched: Watched) -> None:
    page = watched.page
    page.goto(demo.link("DEMO-CT-1"))
    wait_for_picture(page)
    assert "launch=" not in page.url
    before = picture(page)
    expect(page.get_by_text("(1/80)")).to_be_visible()
    page.locator(CANVAS).first.hover()
    for _ in range(10):
        page.mouse.wheel(0, 120)
    expect(page.get_by_text("(11/80)")).to_be_visible(timeout=30_000)
    page.wait_for_function(f"before => ({PICTURE})() !== before", arg=before, timeout=30_000)
    wait_for_picture(page)
    assert watched.console_errors == []
    assert watched.outside(demo.face["api"], demo.face["viewer"]) == []


@pytest.mark.parametrize("accession_number", ["DEMO-US-1", "DEMO-MR-1"])
def test_other_images_open(demo: Demo, watched: Watched, accession_number: str) -> None:
    watched.page.goto(demo.link(accession_number))
    wait_for_picture(watched.page)
    assert watched.console_errors == []


def test_a_link_opens_once(demo: Demo, watched: Watched) -> None:
    link = demo.link("DEMO-CT-1")
    assert httpx.get(link, trust_env=False).status_code == 303
    answer = watched.page.goto(link)
    assert answer is not None
    assert answer.status == 410
    expect(watched.page.get_by_role("heading")).to_have_text("These images can't be opened")
    expect(watched.page.get_by_text("This link has been used already")).to_be_visible()


def test_another_clinician_gets_no_link(demo: Demo) -> None:
    order = demo.order("DEMO-CT-1")
    answer = demo.ask("other_clinician", "GET", f"/dicom/viewer/url/order/{order['id']}")
    assert answer.status_code == 403
    assert "Bergstrom" not in answer.text


def test_the_copied_address_is_of_no_use_elsewhere(demo: Demo, watched: Watched) -> None:
    """The clean URL in another browser: no cookie, so a page that says so, and no image."""
    clean = httpx.get(demo.link("DEMO-CT-1"), trust_env=False).headers["location"]
    watched.page.goto(f"{demo.face['viewer']}{clean}")
    watched.page.wait_for_url("**/ended", timeout=30_000)
    expect(watched.page.get_by_text("belongs to another browser")).to_be_visible()
    assert watched.page.locator("canvas").count() == 0


def test_losing_the_right_ends_the_open_viewer(demo: Demo, watched: Watched) -> None:
    """Taken off the care team while reading: the viewer turns to the page that says why."""
    (patient,) = (each for each in demo.face["patients"] if each["mrn"] == "LB-1003")
    member = f"/patients/{patient['id']}/care-team/dr.lee"
    assert demo.ask("service", "PUT", member, json={}).status_code == 200
    watched.page.goto(demo.link("DEMO-CT-3"))
    wait_for_picture(watched.page)
    assert demo.ask("service", "DELETE", member).status_code == 204
    watched.page.reload()
    watched.page.wait_for_url("**/ended", timeout=30_000)
    expect(watched.page.get_by_text("You no longer have access")).to_be_visible()


def test_the_bare_viewer_lists_nothing(demo: Demo, watched: Watched) -> None:
    watched.page.goto(demo.face["viewer"])
    expect(watched.page.get_by_role("heading")).to_have_text("Open the images from the EHR")
