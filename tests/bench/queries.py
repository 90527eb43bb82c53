"""Rows 4, 10 and 11: metadata and searches."""

from collections.abc import Callable, Iterator
from functools import partial

from tests.bench.client import BenchError, Source, fetch, wrk
from tests.bench.measure import Row
from tests.bench.site import GZIP, Session, Site

DIRECT_ROOT = "/dicom-web"
JSON = "application/dicom+json"


def rows(site: Site) -> Iterator[Row]:
    metadata = _Metadata(site)
    yield Row(
        name="metadata",
        title=f"metadata of a series of {site.slices} instances, 8 connections",
        unit="requests/s",
        target=300.0,
        prepare=metadata.prepare,
        direct=metadata.direct,
        ours=metadata.ours,
    )
    searches = Searches(site)
    for name, title, path in (
        ("study", "a study by its StudyInstanceUID", searches.study),
        ("series", "the series of a study", searches.series),
        ("priors", "the studies of a patient", searches.priors),
    ):
        for connections in (1, 8):
            yield Row(
                name=f"search-{name}-{connections}",
                title=f"search for {title}, "
                f"{connections} connection{'s' if connections > 1 else ''}",
                unit="requests/s",
                target=1.0,
                prepare=partial(searches.prepare, path),
                direct=partial(searches.direct, path, connections),
                ours=partial(searches.ours, path, connections),
            )


class _Metadata:
    def __init__(self, site: Site) -> None:
        self._site = site
        self._session: Session | None = None

    @property
    def _path(self) -> str:
        ct = self._site.ct
        return f"/studies/{ct.study}/series/{ct.series}/metadata"

    def _sources(self) -> tuple[Source, Source, str]:
        if self._session is None:
            self._session = self._site.open(f"/order/{self._site.ct.order['id']}")
        headers = {"Accept": JSON, "Accept_Encoding": GZIP}
        return (
            self._site.direct.with_headers(**headers),
            self._session.source.with_headers(**headers),
            self._session.root,
        )

    def prepare(self) -> None:
        """Both know the series, which has been complete for a while: a stable study."""
        direct, ours, root = self._sources()
        for source, path in ((direct, DIRECT_ROOT + self._path), (ours, root + self._path)):
            answer = fetch(source, path)
            if answer.status != 200:
                raise BenchError(f"metadata: {answer.status}")
        self._site.wait_until_stable(self._site.ct.study)
        fetch(ours, root + self._path)

    def direct(self) -> float:
        source, _, _ = self._sources()
        return self._rate(source, DIRECT_ROOT + self._path)

    def ours(self) -> float:
        _, source, root = self._sources()
        return self._rate(source, root + self._path)

    def _rate(self, source: Source, path: str) -> float:
        return wrk(
            source.address,
            [source.request(path)],
            connections=8,
            seconds=2 if self._site.quick else 5,
            folder=self._site.folder,
        ).rate


class Searches:
    """Searches among small studies; each request asks for another one than the last."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._sessions: list[Session] = []

    def study(self, index: int) -> str:
        return f"/studies?StudyInstanceUID={self._site.small[index].study}"

    def series(self, index: int) -> str:
        return f"/studies/{self._site.small[index].study}/series"

    def priors(self, index: int) -> str:
        return f"/studies?PatientID={self._site.small[index].patient['mrn']}"

    @property
    def sessions(self) -> list[Session]:
        """A viewer for each of the first ten patients, with all their studies."""
        if not self._sessions:
            mine = self._site.small[: 10 * 5 : 5]
            self._sessions = [self._site.open(f"/patient/{each.patient['id']}") for each in mine]
        return self._sessions

    def prepare(self, path: Callable[[int], str]) -> None:
        direct = fetch(self._direct, DIRECT_ROOT + path(0))
        session = self.sessions[0]
        ours = fetch(session.source, session.root + path(0))
        for answer in (direct, ours):
            if answer.status != 200:
                raise BenchError(f"a search: {answer.status}")
        found = [each.body.count(b'"0020000D"') for each in (direct, ours)]
        if found[0] != found[1] or not found[0]:
            raise BenchError(f"a search finds {found[0]} directly and {found[1]} here")

    @property
    def _direct(self) -> Source:
        return self._site.direct.with_headers(Accept=JSON)

    def direct(self, path: Callable[[int], str], connections: int) -> float:
        asked = range(0, 5 * len(self.sessions), 5)
        requests = [self._direct.request(DIRECT_ROOT + path(index)) for index in asked]
        return self._rate(self._direct, requests, connections)

    def ours(self, path: Callable[[int], str], connections: int) -> float:
        requests = [
            each.source.with_headers(Accept=JSON).request(each.root + path(5 * index))
            for index, each in enumerate(self.sessions)
        ]
        return self._rate(self.sessions[0].source, requests, connections)

    def _rate(self, source: Source, requests: list[bytes], connections: int) -> float:
        return wrk(
            source.address,
            requests,
            connections=connections,
            seconds=2 if self._site.quick else 4,
            folder=self._site.folder,
        ).rate
