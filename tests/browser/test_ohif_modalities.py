"""What OHIF makes of each kind of object: uploaded for an order, opened by its clinician.

Each test looks at what a person sees: the drawn pixels, the text, the document. None of them may
leave an error in the console, a DICOMweb request that failed, or a request to anywhere else.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any
from uuid import uuid4

import pydicom
import pytest
from playwright.sync_api import Page, Request, Response, expect

from tests.browser.conftest import Demo, Watched
from tests.browser.test_open_an_order import CANVAS, MANY_GREYS, PICTURE, picture, wait_for_picture
from tests.live.conftest import stored_frame
from tests.modalities import (
    cine_pictures,
    ct_slices,
    encapsulated_pdf,
    found,
    measurement_report,
    of_order,
    segmentation,
    shipped,
    structure_set,
    tiny_pdf,
    to_bytes,
    ultrasound_cine,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom")

SLOW = 60_000  # milliseconds; only reached where something is wrong
NEEDS_SAMPLES = "needs DICOM samples; name their folder in LIGHTBOX_DICOM_SAMPLES"
# How many of the canvas's pixels are of a colour: `test` is an expression of r, g and b.
COUNT = """test => {
    const canvas = document.querySelector('canvas.cornerstone-canvas');
    if (canvas === null) return -1;
    const {width, height} = canvas;
    const pixels = canvas.getContext('2d').getImageData(0, 0, width, height).data;
    const wanted = new Function('r', 'g', 'b', 'return ' + test);
    let count = 0;
    for (let i = 0; i < pixels.length; i += 4) {
        if (wanted(pixels[i], pixels[i + 1], pixels[i + 2])) count += 1;
    }
    return count;
}"""
# In how many hundredths of the canvas's width something bright is drawn.
BRIGHT_COLUMNS = """() => {
    const canvas = document.querySelector('canvas.cornerstone-canvas');
    if (canvas === null) return 0;
    const {width, height} = canvas;
    const pixels = canvas.getContext('2d').getImageData(0, 0, width, height).data;
    const seen = new Set();
    for (let i = 0; i < pixels.length; i += 4) {
        if (pixels[i] > 150 && pixels[i + 1] > 150 && pixels[i + 2] > 150) {
            seen.add(Math.floor(100 * ((i / 4) % width) / width));
        }
    }
    return seen.size;
}"""
RED = "r > 90 && r > g + 60 && r > b + 60"


@dataclass
class Opened:
    """The images of an order of their own, in the browser."""

    demo: Demo
    watched: Watched
    files: list[bytes]
    responses: list[Response] = field(default_factory=list)
    unanswered: list[str] = field(default_factory=list)

    @property
    def page(self) -> Page:
        return self.watched.page

    def of_dicomweb(self, ending: str) -> list[Response]:
        """The answers to DICOMweb requests whose path ends like this."""
        return [
            each
            for each in self.responses
            if "/dicom-web/" in each.url and re.search(f"{ending}$", each.url.partition("?")[0])
        ]

    def open_series(self, modality: str) -> None:
        """Double-click a series that has no thumbnail."""
        entry = self.page.locator('[data-cy="study-browser-thumbnail-no-image"]')
        entry.filter(has_text=modality).dblclick()

    def wait_for_colour(self, test: str, least: int) -> None:
        """Until the viewport holds more than `least` pixels of a colour."""
        self.page.wait_for_function(
            f"([test, least]) => ({COUNT})(test) > least", arg=[test, least], timeout=SLOW
        )

    def check(self, screenshot: Path) -> None:
        """Nothing went wrong that a person may not see at once."""
        self.page.screenshot(path=screenshot)
        failed = [
            (each.status, each.url)
            for each in self.responses
            if each.status >= 400 and each.url.startswith(self.demo.face["viewer"])
        ]
        assert failed == []
        assert self.unanswered == []
        assert self.of_dicomweb("/metadata"), "OHIF asked for no metadata"
        assert self.watched.console_errors == []
        viewer = str(self.demo.face["viewer"])
        # Chromium's own PDF viewer is made of such pages.
        built_in = ("chrome://", "chrome-extension://")
        outside = self.watched.outside(viewer, self.demo.face["api"])
        assert [each for each in outside if not each.startswith(built_in)] == []
        to_api = f"{self.demo.face['api']}/"
        # The link itself aside, the page never leaves the viewer's origin.
        assert [each for each in self.watched.requests if each.startswith(to_api)] == []


Open = Callable[[Sequence[bytes]], Opened]


@pytest.fixture
def opened(demo: Demo, watched: Watched) -> Open:
    """Upload files for an order of a new patient, and open them as the clinician."""

    def open_files(files: Sequence[bytes]) -> Opened:
        person = {"first_name": "Jane", "last_name": "Doe", "dob": "1980-01-01", "sex": "F"}
        mrn = f"OHIF-{uuid4().hex[:10]}"
        patient = must(demo, "service", "/patients", json={**person, "mrn": mrn})
        order = must(
            demo,
            "service",
            "/orders",
            json={
                "patient_id": patient["id"],
                "order_type": "IMAGING",
                "order_category": "OT",
                "description": "Modalities",
                "status": "scheduled",
                "requested_by": "dr.lee",
            },
        )
        each = Opened(demo, watched, of_order(files, patient, order))
        for content in each.files:
            file = {"file": ("image.dcm", content, "application/dicom")}
            fields = {"order_id": order["id"]}
            uploaded = must(demo, "technologist", "/dicom/upload", files=file, data=fields)
            assert uploaded["status"] == "uploaded"

        def lost(request: Request) -> None:
            # OHIF stops reading a frame once it has as many bytes as were announced, which
            # Chromium calls a failure. One that was never answered is one.
            if "/dicom-web/" in request.url and request.response() is None:
                each.unanswered.append(request.url)

        def answered(response: Response) -> None:
            each.responses.append(response)

        watched.page.on("response", answered)
        watched.page.on("requestfailed", lost)
        link = demo.ask("clinician", "GET", f"/dicom/viewer/url/order/{order['id']}")
        assert link.status_code == 200, link.text
        watched.page.goto(link.json()["url"])
        expect(watched.page.get_by_text("Doe, Jane")).to_be_visible(timeout=SLOW)
        watched.page.get_by_text("Confirm and hide").click()
        return each

    return open_files


def must(demo: Demo, who: str, path: str, **more: Any) -> Any:
    """The JSON of a POST that has to succeed."""
    answer = demo.ask(who, "POST", path, **more)
    assert answer.is_success, f"{path}: {answer.status_code} {answer.text}"
    return answer.json()


def read(content: bytes) -> pydicom.Dataset:
    return pydicom.dcmread(BytesIO(content))


# --------------------------------------------------------------------------------- images


def test_a_ct_series(opened: Open, tmp_path: Path) -> None:
    """All slices are fetched, the first is shown, and scrolling shows another."""
    each = opened([to_bytes(image) for image in ct_slices()])
    wait_for_picture(each.page)
    expect(each.page.get_by_text("(1/8)")).to_be_visible()
    before = picture(each.page)
    each.page.locator(CANVAS).first.hover()
    for _ in range(3):
        each.page.mouse.wheel(0, 120)
    expect(each.page.get_by_text("(4/8)")).to_be_visible(timeout=SLOW)
    each.page.wait_for_function(f"before => ({PICTURE})() !== before", arg=before, timeout=SLOW)
    each.check(tmp_path / "ct.png")
    frames = {answer.url for answer in each.of_dicomweb("/frames/1")}
    assert len(frames) == 8


def fetched(page: Page, url: str) -> bytes:
    """What the page gets at an address. (The browser forgets the bodies of what OHIF asked for: it
    ends a request as soon as it has all of it.)"""
    content = page.evaluate(
        """async url => {
            const answer = await fetch(url, {headers: {Accept: '*/*'}});
            return Array.from(new Uint8Array(await answer.arrayBuffer()));
        }""",
        url,
    )
    return bytes(content)


@pytest.mark.parametrize(
    "name",
    [
        "CT_small.dcm",
        "MR_small.dcm",
        "MR_small_jp2klossless.dcm",
        "MR_small_jpeg_ls_lossless.dcm",
    ],
)
def test_a_single_image(opened: Open, tmp_path: Path, name: str) -> None:
    """Real CT and MR, compressed too; what came is the frame as it lies in the file."""
    each = opened([shipped(name)])
    wait_for_picture(each.page)
    each.check(tmp_path / f"{name}.png")
    frame, *_ = each.of_dicomweb("/frames/1")
    assert stored_frame(each.files[0], 1)[0].rstrip(b"\0") in fetched(each.page, frame.url)


def test_an_mr_series_of_a_scanner(opened: Open, tmp_path: Path) -> None:
    files = found("mr/series_adc_20slices/*.dcm")
    if not files:
        pytest.skip(NEEDS_SAMPLES)
    each = opened(files)
    wait_for_picture(each.page)
    expect(each.page.get_by_text("(1/20)")).to_be_visible()
    each.check(tmp_path / "mr.png")


def test_an_ultrasound_cine_in_colour(opened: Open, tmp_path: Path) -> None:
    """Uncompressed RGB: the right colours, every frame of it, and it plays."""
    each = opened([ultrasound_cine(cine_pictures())])
    wait_for_picture(each.page)
    expect(each.page.get_by_text("(1/12)")).to_be_visible()
    # The square that is drawn in (200, 40, 40).
    red = "r > 180 && g > 20 && g < 60 && b > 20 && b < 60"
    assert each.page.evaluate(COUNT, red) > 1000
    plays(each)
    each.check(tmp_path / "us.png")
    numbers = {answer.url.rpartition("/")[2] for answer in each.of_dicomweb(r"/frames/\d+")}
    assert numbers == {str(number) for number in range(1, 13)}


def test_an_ultrasound_cine_in_jpeg(opened: Open, tmp_path: Path) -> None:
    """A real echocardiogram of 30 frames."""
    each = opened([shipped("examples_ybr_color.dcm")])
    wait_for_picture(each.page)
    expect(each.page.get_by_text("(1/30)")).to_be_visible()
    plays(each)
    each.check(tmp_path / "us-jpeg.png")
    numbers = {answer.url.rpartition("/")[2] for answer in each.of_dicomweb(r"/frames/\d+")}
    assert numbers == {str(number) for number in range(1, 31)}


def plays(each: Opened) -> None:
    """Start the cine: another frame comes, with another picture."""
    page = each.page
    expect(page.get_by_text("FPS")).to_be_visible()
    before = picture(page)
    page.locator('[data-cy="cine-player-play-pause"]').click()
    expect(page.get_by_text(re.compile(r"\((?!1/)\d+/\d+\)"))).to_be_visible(timeout=SLOW)
    page.wait_for_function(f"before => ({PICTURE})() !== before", arg=before, timeout=SLOW)
    page.wait_for_function(MANY_GREYS, timeout=SLOW)
    page.locator('[data-cy="cine-player-play-pause"]').click()


# --------------------------------------------------------------------------------- the others


def test_a_twelve_lead_ecg(opened: Open, tmp_path: Path) -> None:
    """The traces run over the whole width, and are drawn from the file's own samples."""
    each = opened([shipped("waveform_ecg.dcm")])
    each.page.wait_for_function(f"() => ({BRIGHT_COLUMNS})() > 95", timeout=SLOW)
    each.check(tmp_path / "ecg.png")
    (samples,) = each.of_dicomweb("/bulk/54000100/1/54001010")
    recorded = read(each.files[0]).WaveformSequence[0]
    assert recorded.NumberOfWaveformChannels == 12
    assert recorded.WaveformData in fetched(each.page, samples.url)


def test_a_pdf(opened: Open, tmp_path: Path) -> None:
    """The browser's own viewer shows the very document."""
    pdf = tiny_pdf("Discharge letter")
    each = opened([encapsulated_pdf(pdf)])
    shown = each.page.locator("object")
    expect(shown).to_be_visible(timeout=SLOW)
    content = each.page.evaluate(
        """async url => Array.from(
            new Uint8Array(await (await fetch(url)).arrayBuffer())
        )""",
        shown.get_attribute("data"),
    )
    assert bytes(content).rstrip(b"\0") == pdf.rstrip(b"\0")
    each.check(tmp_path / "pdf.png")
    (document,) = each.of_dicomweb("/bulk/00420011")
    assert pdf in fetched(each.page, document.url)


def test_a_report_in_words(opened: Open, tmp_path: Path) -> None:
    """A Basic Text SR is read as text."""
    each = opened([shipped("reportsi.dcm")])
    expect(each.page.get_by_text("Document Title")).to_be_visible(timeout=SLOW)
    expect(each.page.get_by_text("Report Text:")).to_be_visible()
    each.check(tmp_path / "sr.png")


def test_a_report_of_measurements(opened: Open, tmp_path: Path) -> None:
    """A TID 1500 report: listed, and drawn onto the slice it was measured on."""
    images = ct_slices()
    report = measurement_report(images[3], 100, 150)
    each = opened([*[to_bytes(image) for image in images], report])
    wait_for_picture(each.page)
    each.open_series("SR")
    expect(each.page.get_by_text("Do you want to continue tracking")).to_be_visible(timeout=SLOW)
    expect(each.page.get_by_text("(4/8)")).to_be_visible(timeout=SLOW)
    expect(each.page.get_by_text("75.00 mm")).to_be_visible(timeout=SLOW)
    wait_for_picture(each.page)
    each.check(tmp_path / "measurements.png")


def test_a_segmentation(opened: Open, tmp_path: Path) -> None:
    """Drawn over its CT, in its own colour, and named in the panel."""
    images = ct_slices()
    each = opened([*[to_bytes(image) for image in images], segmentation(images, "Test box")])
    wait_for_picture(each.page)
    assert each.page.evaluate(COUNT, RED) == 0
    each.open_series("SEG")
    each.page.get_by_role("button", name="Yes", exact=True).click(timeout=SLOW)
    each.wait_for_colour(RED, 20_000)
    each.page.locator('[data-cy="panelSegmentation-btn"]').click()
    expect(each.page.get_by_text("Test box")).to_be_visible(timeout=SLOW)
    each.check(tmp_path / "seg.png")


def test_overlapping_segments_of_a_real_ct(opened: Open, tmp_path: Path) -> None:
    files = [*found("ct/study_janct_with_seg/*.dcm"), *found("seg/partial_overlaps.dcm")]
    if not files:
        pytest.skip(NEEDS_SAMPLES)
    each = opened(files)
    wait_for_picture(each.page)
    each.open_series("SEG")
    each.page.get_by_role("button", name="Yes", exact=True).click(timeout=SLOW)
    each.wait_for_colour("g > 90 && g > r + 20 && g > b + 20", 3_000)
    each.page.locator('[data-cy="panelSegmentation-btn"]').click()
    expect(each.page.get_by_text("GREEN", exact=True)).to_be_visible(timeout=SLOW)
    expect(each.page.get_by_text("DARK_BLUE", exact=True)).to_be_visible(timeout=SLOW)
    each.check(tmp_path / "overlaps.png")


def test_a_structure_set(opened: Open, tmp_path: Path) -> None:
    """Radiotherapy contours, drawn as lines and named in the panel."""
    images = ct_slices()
    each = opened([*[to_bytes(image) for image in images], structure_set(images, "Test contour")])
    wait_for_picture(each.page)
    each.open_series("RTSTRUCT")
    each.page.get_by_role("button", name="Yes", exact=True).click(timeout=SLOW)
    each.page.locator('[data-cy="panelSegmentation-btn"]').click()
    expect(each.page.get_by_text("Test contour")).to_be_visible(timeout=SLOW)
    # Contours are lines above the picture.
    line = each.page.locator("svg.svg-layer path").first
    expect(line).to_be_attached(timeout=SLOW)
    assert "255, 0, 0" in (line.get_attribute("stroke") or "")
    each.check(tmp_path / "rtstruct.png")
