"""Row 7: how long the app thinks about one request, in this process."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from time import perf_counter

from fastapi import Request

from app.main import create_app
from app.viewer import ViewerGrant
from tests.bench.client import BenchError
from tests.bench.measure import Figure
from tests.bench.site import Site

MEDIAN_LIMIT_MS = 0.3
TAIL_LIMIT_MS = 2.0
DECISIONS = 3000


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
    # The servers end with the thread that started them: this one.
    _ = site.ct
    # A thread of its own: the browser's driver has a running event loop in this one.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, _decide(site, percentile)).result()


async def _decide(site: Site, percentile: int) -> float:
    """The guard of a frame's route, asked as the route asks it, by an app in this process that
    shares the database with the one that runs."""
    ct = site.ct
    session = site.open(f"/order/{ct.order['id']}")
    study, series, instance = ct.images[0].study, ct.images[0].series, ct.images[0].instance
    app = create_app(site.lightbox.settings)
    ctx = session.root.split("/")[2]
    path = f"{session.root}/studies/{study}/series/{series}/instances/{instance}/frames/1"
    scope = {
        "type": "http",
        "app": app,
        "method": "GET",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"cookie", session.source.headers["Cookie"].encode())],
        "client": ("127.0.0.1", 1),
        "state": {"request_id": "bench"},
        "path_params": {
            "ctx": ctx,
            "study_instance_uid": study,
            "series_instance_uid": series,
            "sop_instance_uid": instance,
        },
    }
    guard, took = ViewerGrant(), []
    async with app.router.lifespan_context(app):
        await guard.enter(Request(dict(scope)))  # the first one is recorded
        for _ in range(DECISIONS):
            began = perf_counter()
            access = await guard.enter(Request(dict(scope)))
            took.append(perf_counter() - began)
            if access.instance is None:
                raise BenchError("the decision does not know the instance")
    took.sort()
    return 1000 * took[len(took) * percentile // 100]
