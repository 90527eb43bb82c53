"""Rows 8 and 9: a whole study out, and a series in."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from time import perf_counter

from tests.bench import data
from tests.bench.client import BenchError, Connection, NotRun, Source, Walk, fetch
from tests.bench.measure import AnyRow, Figure, Row
from tests.bench.site import Site

DICOM = 'multipart/related; type="application/dicom"'
MEGABYTE = 1_000_000
MEBIBYTE = 2**20
STEP_BYTES = 10 * MEGABYTE
AT_ONCE = 8
MEMORY_LIMIT_MIB = 16.0


def rows(site: Site) -> Iterator[AnyRow]:
    study = _Study(site)
    megabytes = site.slices * data.FRAME_BYTES // MEGABYTE
    yield Row(
        name="study",
        title=f"a study of {megabytes} MB as DICOM files (WADO-RS)",
        unit="MB/s",
        target=0.9,
        prepare=study.prepare,
        direct=study.direct,
        ours=study.ours,
    )
    yield Figure(
        name="study-memory",
        title=f"growth of app and edge while a study of {megabytes} MB passes",
        unit="MiB",
        target=MEMORY_LIMIT_MIB,
        measure=study.growth,
        note=study.curve,
    )
    uploads = _Uploads(site)
    yield Row(
        name="upload",
        title=f"{site.slices} instances stored, {AT_ONCE} at once",
        unit="instances/s",
        target=0.7,
        direct=uploads.direct,
        ours=uploads.ours,
    )


# ------------------------------------------------------------------------------ a whole study


class _Study:
    def __init__(self, site: Site) -> None:
        self._site = site
        self._curve: list[tuple[int, dict[str, int]]] = []

    @property
    def _path(self) -> str:
        return f"/dicom-web/studies/{self._site.ct.study}"

    @property
    def _direct(self) -> Source:
        return self._site.direct.with_headers(Accept=DICOM)

    @property
    def _ours(self) -> Source:
        token = self._site.token("clinician")
        api = self._site.lightbox.settings.api_base_url
        return Source(api, {"Authorization": f"Bearer {token}", "Accept": DICOM})

    def prepare(self) -> None:
        """A small study first: whatever is loaded at the first request of the kind is there."""
        small = f"/dicom-web/studies/{self._site.small[0].study}"
        answer = fetch(self._ours, small)
        if answer.status in (404, 405, 406):
            raise NotRun(f"the API origin answers {answer.status}: no WADO-RS of a study yet")
        for each in (answer, fetch(self._direct, small)):
            if each.status != 200 or each.body.count(b"DICM") != 1:
                raise BenchError(f"a small study: {each.status}, {each.length} bytes")

    def direct(self) -> float:
        return self._rate(self._direct)

    def ours(self) -> float:
        return self._rate(self._ours)

    def _rate(self, source: Source, on_bytes: Callable[[int], None] | None = None) -> float:
        connection = Connection(source.address, on_bytes=on_bytes)
        try:
            began = perf_counter()
            answer = connection.ask(source.request(self._path))
            seconds = perf_counter() - began
        finally:
            connection.close()
        if answer.status != 200 or answer.length < self._site.slices * data.FRAME_BYTES:
            raise BenchError(f"the study: {answer.status}, {answer.length} bytes")
        return answer.length / MEGABYTE / seconds

    def growth(self) -> float:
        """MiB by which the peaks of app and edge, together, rise above where they stood."""
        self.prepare()
        processes = self._site.lightbox.processes()
        everybody = [pid for pids in processes.values() for pid in pids]
        for pid in everybody:
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # VmHWM starts anew (proc(5))
        before = sum(_memory(pid, "VmRSS") for pid in everybody)
        self._curve = [(0, _resident(processes))]
        received = 0

        def follow(number: int) -> None:
            nonlocal received
            received += number
            if received >= len(self._curve) * STEP_BYTES:
                self._curve.append((received, _resident(processes)))

        self._rate(self._ours, follow)
        self._curve.append((received, _resident(processes)))
        return (sum(_memory(pid, "VmHWM") for pid in everybody) - before) / MEBIBYTE

    def curve(self) -> str:
        """Resident memory as the study passes: the last of the runs."""
        lines = ["| MB sent | app, MiB | edge, MiB |", "|---:|---:|---:|"]
        lines += [
            f"| {sent / MEGABYTE:.0f} | {resident['app'] / MEBIBYTE:.1f} "
            f"| {resident['edge'] / MEBIBYTE:.1f} |"
            for sent, resident in self._curve
        ]
        return "\n".join(lines)


def _resident(processes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    return {name: sum(_memory(pid, "VmRSS") for pid in pids) for name, pids in processes.items()}


def _memory(pid: int, what: str) -> int:
    """Bytes, as proc(5) has them."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


# ------------------------------------------------------------------------------------ uploads


class _Uploads:
    """The CT again and again, each time as a study that nobody has."""

    BOUNDARY = "a-boundary-of-the-benchmark"

    def __init__(self, site: Site) -> None:
        self._site = site
        self._studies = count(1)
        self._originals: list[bytes] = []

    def direct(self) -> float:
        source = self._site.direct.with_headers(Content_Type="application/dicom")
        requests = [
            source.request("/instances", method="POST", body=each) for each in self._fresh()
        ]
        return self._rate(source, requests, "/system")

    def ours(self) -> float:
        order = self._site.order(self._site.ct.patient)
        token = self._site.token("technologist")
        source = Source(
            self._site.lightbox.settings.api_base_url,
            {
                "Authorization": f"Bearer {token}",
                "Content-Type": f"multipart/form-data; boundary={self.BOUNDARY}",
            },
        )
        requests = [
            source.request("/api/v1/dicom/upload", method="POST", body=self._form(each, order))
            for each in self._fresh()
        ]
        return self._rate(source, requests, "/api/v1/dicom/health")

    def _rate(self, source: Source, requests: list[bytes], warm_up: str) -> float:
        return Walk(source.address, requests, AT_ONCE, warm_up=source.request(warm_up)).per_second()

    def _form(self, content: bytes, order: Mapping[str, str]) -> bytes:
        start = (
            f"--{self.BOUNDARY}\r\n"
            'Content-Disposition: form-data; name="order_id"\r\n\r\n'
            f"{order['id']}\r\n"
            f"--{self.BOUNDARY}\r\n"
            'Content-Disposition: form-data; name="file"; filename="image.dcm"\r\n'
            "Content-Type: application/dicom\r\n\r\n"
        )
        return start.encode() + content + f"\r\n--{self.BOUNDARY}--\r\n".encode()

    def _fresh(self) -> Iterator[bytes]:
        """The files of a study that is new to both sides."""
        study = data.uid("upload", next(self._studies))
        series = data.uid(study, "series")
        self._originals = self._originals or list(self._site.ct_files())
        for image, original in zip(self._site.ct.images, self._originals, strict=True):
            yield _renamed(
                original,
                (image.study, study),
                (image.series, series),
                (image.instance, data.uid(study, image.instance)),
            )


def _renamed(content: bytes, *names: tuple[str, str]) -> bytes:
    """A file with other UIDs, which must be as long."""
    for old, new in names:
        assert len(old) == len(new)
        content = content.replace(old.encode(), new.encode())
    return content
