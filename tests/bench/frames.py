"""Rows 1 to 3: frames."""

from collections.abc import Iterator, Mapping
from functools import partial

from app.dicom import orthanc_id
from tests.bench import data
from tests.bench.client import BenchError, NotRun, Source, Walk, fetch, wrk
from tests.bench.measure import Row
from tests.bench.site import BROWSER, MULTIPART, SINGLE_PART, Loaded, Session, Site, restart

DIRECT_ROOT = "/dicom-web"
SEEN_CONNECTIONS = 8


def rows(site: Site) -> Iterator[Row]:
    for name, title, targets in (
        ("new", "uncompressed CT", {1: 2.0, 8: 3.0, 32: 3.0}),
        ("compressed", "JPEG 2000 CT", {1: 1.0, 8: 1.0, 32: 1.0}),
    ):
        for part, accept in (("single", SINGLE_PART), ("multipart", MULTIPART)):
            for connections, target in targets.items():
                measured = _Frames(site, compressed=name == "compressed", accept=accept)
                yield Row(
                    name=f"frames-{name}-{part}-{connections}",
                    title=f"frames never asked for before, {title}, "
                    f"{'single part' if part == 'single' else part}, "
                    f"{connections} connection{'s' if connections > 1 else ''}",
                    unit="frames/s",
                    target=target,
                    prepare=measured.prepare,
                    before_direct=measured.orthanc_reads,
                    direct=partial(measured.direct_once, connections),
                    before_ours=measured.only_orthanc_remembers,
                    ours=partial(measured.ours_once, connections),
                )
    cold = _Frames(site, compressed=False, accept=SINGLE_PART)
    yield Row(
        name="frames-restarted",
        title="frames never asked for before, uncompressed CT, single part, "
        f"{SEEN_CONNECTIONS} connections, from an Orthanc that has just been restarted",
        unit="frames/s",
        target=3.0,
        prepare=cold.prepare,
        before_direct=partial(restart, site.orthanc),
        direct=partial(cold.direct_once, SEEN_CONNECTIONS),
        before_ours=partial(_all_forget, site),
        ours=partial(cold.ours_once, SEEN_CONNECTIONS),
    )
    for part, accept in (("single", SINGLE_PART), ("multipart", MULTIPART)):
        seen = _Frames(site, compressed=False, accept=accept)
        yield Row(
            name=f"frames-seen-{part}",
            title="frames asked for before, uncompressed CT, "
            f"{'single part' if part == 'single' else part}, {SEEN_CONNECTIONS} connections",
            unit="frames/s",
            target=6.0,
            prepare=seen.prepare_seen,
            direct=seen.direct_again,
            ours=seen.ours_again,
        )
    for name, title in (("new", "never asked for before"), ("seen", "asked for before")):
        browser = _BrowserFrames(site, compressed=False, accept=SINGLE_PART)
        new = name == "new"
        yield Row(
            name=f"frames-browser-{name}",
            title=f"frames {title}, with Accept-Encoding as browsers send it, "
            f"{SEEN_CONNECTIONS} connections, against Orthanc's defaults",
            unit="frames/s",
            target=20.0,
            prepare=browser.prepare if new else browser.prepare_seen,
            direct=browser.direct_some,
            before_ours=partial(_all_forget, site) if new else lambda: None,
            ours=partial(browser.ours_once, SEEN_CONNECTIONS) if new else browser.ours_again,
        )


def _all_forget(site: Site) -> None:
    restart(site.orthanc)
    site.lightbox.forget_frames()


class _Frames:
    """The frames of one series, asked for on both sides."""

    extra: Mapping[str, str] = {}

    def __init__(self, site: Site, *, compressed: bool, accept: str) -> None:
        self._site = site
        self._compressed = compressed
        self._accept = accept
        self._session: Session | None = None

    @property
    def loaded(self) -> Loaded:
        return self._site.compressed if self._compressed else self._site.ct

    @property
    def session(self) -> Session:
        if self._session is None:
            self._session = self._site.open(f"/order/{self.loaded.order['id']}")
        return self._session

    @property
    def direct(self) -> Source:
        return self._site.direct.with_headers(Accept=MULTIPART, **self.extra)

    @property
    def ours(self) -> Source:
        return self.session.source.with_headers(Accept=self._accept, **self.extra)

    def prepare(self) -> None:
        """Both sides send the very bytes that are stored, each in the form it is asked for."""
        frame = data.first_frame(self.loaded.sample)
        path = self.loaded.images[0].frame
        for side, source, root in (
            ("Orthanc", self.direct, DIRECT_ROOT),
            ("Lightbox", self.ours, self.session.root),
        ):
            answer = fetch(source, root + path)
            if answer.status != 200:
                raise BenchError(f"{side} answers a frame with {answer.status}")
            multipart = answer.headers["content-type"].startswith("multipart/")
            if side == "Lightbox" and multipart != (self._accept == MULTIPART):
                raise NotRun(f"Lightbox answers with {answer.headers['content-type']}")
            compressed = answer.headers.get("content-encoding", "identity") != "identity"
            if not compressed and frame not in answer.body:
                raise BenchError(f"{side} sends another frame than the one that is stored")

    def orthanc_reads(self) -> None:
        """Orthanc keeps what it read last (128 MB of files, and what it made of them) in memory.
        Both sides find it in the same state: it has sent each frame before, by both of its ways."""
        self.direct_once(SEEN_CONNECTIONS)
        own = self._site.direct.with_headers(Accept="*/*")
        requests = [own.request(f"/instances/{each}/frames/0/raw") for each in self._orthanc_ids()]
        Walk(own.address, requests[1:], SEEN_CONNECTIONS, warm_up=requests[0]).per_second()

    def _orthanc_ids(self) -> list[str]:
        mrn = self.loaded.patient["mrn"]
        return [
            orthanc_id(mrn, each.study, each.series, each.instance) for each in self.loaded.images
        ]

    def only_orthanc_remembers(self) -> None:
        self._site.lightbox.forget_frames()
        self.orthanc_reads()

    def prepare_seen(self) -> None:
        self.prepare()
        self.ours_once(SEEN_CONNECTIONS)

    def direct_once(self, connections: int) -> float:
        return self._once(self.direct, DIRECT_ROOT, connections)

    def ours_once(self, connections: int) -> float:
        return self._once(self.ours, self.session.root, connections)

    def direct_again(self) -> float:
        return self._once(self.direct, DIRECT_ROOT, SEEN_CONNECTIONS, times=3)

    def ours_again(self) -> float:
        return self._once(self.ours, self.session.root, SEEN_CONNECTIONS, times=10)

    def _once(self, source: Source, root: str, connections: int, times: int = 1) -> float:
        """Every frame but the first, exactly once or so many times; the first opens the
        connections."""
        first, *others = [source.request(root + each.frame) for each in self.loaded.images]
        walk = Walk(
            source.address,
            others * times,
            connections,
            warm_up=first,
            least=len(data.first_frame(self.loaded.sample)),
        )
        return walk.per_second()


class _BrowserFrames(_Frames):
    """Against an Orthanc that compresses what it sends to whoever can read it."""

    extra: Mapping[str, str] = {"Accept_Encoding": BROWSER}

    @property
    def direct(self) -> Source:
        return Source(self._site.default_orthanc.url, {"Accept": MULTIPART}).with_headers(
            **self.extra
        )

    def direct_some(self) -> float:
        """A few of them: it takes long enough."""
        requests = [
            self.direct.request(DIRECT_ROOT + each.frame) for each in self.loaded.images[:41]
        ]
        walk = Walk(
            self.direct.address,
            requests[1:],
            SEEN_CONNECTIONS,
            warm_up=requests[0],
            least=len(data.first_frame(self.loaded.sample)) // 4,
        )
        return walk.per_second()


def floor(site: Site) -> list[tuple[str, float]]:
    """What the clients themselves manage: a file of a frame's size, from a bare nginx."""
    source = Source(site.plain.url, {})
    request = source.request("/floor")
    count = 400 if site.quick else 2000
    found = [
        (
            f"own client, {connections} connection{'s' if connections > 1 else ''}",
            Walk(
                source.address, [request] * count, connections, request, data.FRAME_BYTES
            ).per_second(),
        )
        for connections in (1, 8, 32)
    ]
    load = wrk(
        source.address, [request], connections=SEEN_CONNECTIONS, seconds=2, folder=site.folder
    )
    return [*found, (f"wrk, {SEEN_CONNECTIONS} connections", load.rate)]
