"""Row 7: how long the app thinks about one request, in this process."""

from collections.abc import Iterator
from functools import partial

from tests.bench.client import NotRun
from tests.bench.measure import Figure
from tests.bench.site import Site

MEDIAN_LIMIT_MS = 0.3
TAIL_LIMIT_MS = 2.0


def rows(site: Site) -> Iterator[Figure]:
    for name, title, limit, percentile in (
        ("p50", "the decision about one request, in the app: half are faster", MEDIAN_LIMIT_MS, 50),
        ("p99", "the decision about one request, in the app: 99 % are faster", TAIL_LIMIT_MS, 99),
    ):
        yield Figure(
            name=f"decision-{name}",
            title=title,
            unit="ms",
            target=limit,
            measure=partial(decision_row, site, percentile),
        )


def decision_row(site: Site, percentile: int) -> float:
    """Milliseconds within which that many percent of the decisions are made."""
    raise NotRun("app.access has no decision that can be timed by itself yet")
