"""A large upload costs the app no more memory than a small one: measured, not argued."""

import re
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from app.db import migrate
from app.demo.stack import AppServer, Edge, OrthancServer, free_port
from app.settings import MEBIBYTE
from tests.images import ct_image
from tests.live.conftest import Archive, Edged, edged, environment_of, settings_for, unique

SMALL, LARGE = 2, 1000  # frames of half a MiB: 1 MiB and 500 MiB
TOLERANCE_MIB = 24


def write_cine(path: Path, patient_id: str, frames: int) -> int:
    """A multi-frame image whose pixels are a hole in the file; its size in bytes.

    The disk holds next to nothing of it, all who read it get half a MiB a frame.
    """
    header = ct_image(
        patient_id=patient_id, NumberOfFrames=frames, Rows=512, Columns=512, PixelData=b""
    )
    pixels = frames * 512 * 512 * 2
    assert header.endswith(bytes(4))  # the length of the empty PixelData
    with path.open("wb") as file:
        file.write(header[:-4] + pixels.to_bytes(4, "little"))
        file.truncate(len(header) + pixels)
    return len(header) + pixels


@dataclass
class Site:
    """Orthanc and the edge, which stay; the app is started afresh for each measurement."""

    app: AppServer
    caller: Edged
    archive: Archive

    def peak_mib(self) -> float:
        """The most memory that the app's process ever had resident (proc(5): VmHWM)."""
        status = Path(f"/proc/{self.app.pid}/status").read_text()
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1]) / 1024


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    viewer_files = tmp_path / "viewer"
    viewer_files.mkdir()
    (viewer_files / "index.html").touch()
    database_url = f"sqlite+aiosqlite:///{tmp_path / 'lightbox.sqlite'}"
    migrate(database_url)
    orthanc = OrthancServer(
        tmp_path / "orthanc", username="lightbox", password=secrets.token_hex(16), dicom_port=None
    )
    api_port, viewer_port, app_port = free_port(), free_port(), free_port()
    settings = settings_for(
        database_url,
        orthanc,
        api_base_url=f"http://localhost:{api_port}",
        viewer_base_url=f"http://localhost:{viewer_port}",
        max_upload_bytes=1024 * MEBIBYTE,
        spool_dir=tmp_path,
    )
    app = AppServer(app_port, environment_of(settings), state_dir=tmp_path / "app")
    edge = Edge(
        tmp_path / "edge",
        api_port=api_port,
        viewer_port=viewer_port,
        app_port=app_port,
        orthanc=orthanc,
        ohif_dir=viewer_files,
    )
    with orthanc, edge:
        async with edged(settings) as caller:
            caller.client.timeout = httpx.Timeout(120.0)
            yield Site(app, caller, Archive(orthanc))


async def peak_after_upload(site: Site, path: Path, frames: int, *, coerce: bool) -> float:
    """Upload one file to a fresh app process; the process's peak in MiB."""
    mrn = unique()
    size = write_cine(path, "SOMEBODY-ELSE" if coerce else mrn, frames)
    with site.app:
        patient = await site.caller.patient(mrn)
        order = await site.caller.order(patient)
        with path.open("rb") as file:
            answer = await site.caller.ask(
                "technologist",
                "POST",
                "/api/v1/dicom/upload",
                files={"file": ("cine.dcm", file, "application/dicom")},
                data={"order_id": order["id"], "coerce_patient": str(coerce).lower()},
            )
        assert answer.status_code == 200, answer.text
        peak = site.peak_mib()
    uploaded = answer.json()
    assert bool(uploaded["coerced"]) == coerce
    stored = f"/instances/{uploaded['orthanc_instance_id']}"
    assert int(site.archive.ask("GET", f"{stored}/attachments/dicom/size").text) >= size - 64
    site.archive.ask("DELETE", stored)
    return peak


@pytest.mark.parametrize("coerce", [False, True], ids=["as-it-is", "coerced"])
async def test_500_mib_cost_no_more_than_one(
    site: Site, tmp_path: Path, coerce: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cine.dcm"
    peaks = []
    for frames in (SMALL, LARGE):
        started = time.monotonic()
        peaks.append(await peak_after_upload(site, path, frames, coerce=coerce))
        with capsys.disabled():
            print(
                f"\n{'coerced' if coerce else 'as it is':>9} {frames // 2:>4} MiB: "
                f"peak of the app {peaks[-1]:6.1f} MiB, {time.monotonic() - started:4.1f} s",
                end="",
            )
    small, large = peaks
    assert large - small < TOLERANCE_MIB
