"""How fast records are written, on a database that waits for its disk, and how fast verified."""

import asyncio
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from time import perf_counter
from typing import Any
from uuid import uuid4

import psycopg
from sqlalchemy.engine import make_url

from app.audit import Action, AuditTrail, Entry, Origin, Outcome
from app.audit.chain import COLUMNS, DIALECTS, GENESIS, Head, follow
from app.audit.verify import verify
from app.db import AUDIT_TABLE, Database, migrate
from app.demo.stack import REPOSITORY
from tests.bench.client import BenchError
from tests.bench.measure import Figure
from tests.bench.postgres import durable_postgres
from tests.bench.site import Site

SECONDS = 4.0
RECORDS_A_SECOND = 1500
ONE_RECORD_MS = 3.0
MILLION, VERIFIED_IN_SECONDS = 1_000_000, 60.0
PORTION = 1000


def rows(site: Site) -> Iterator[Figure]:
    yield Figure(
        name="trail-one",
        title="one audit record, SQLite: 99 % are faster",
        unit="ms",
        target=ONE_RECORD_MS,
        measure=partial(_in_thread, _one_client),
    )
    for name, processes in (("eight", 1), ("processes", 2)):
        yield Figure(
            name=f"trail-{name}",
            title=f"audit records of 8 clients at once in {processes} app process"
            f"{'es' if processes > 1 else ''}, PostgreSQL: time for each "
            f"({RECORDS_A_SECOND:,} a second are {1000 / RECORDS_A_SECOND:.2f} ms)",
            unit="ms",
            target=1000 / RECORDS_A_SECOND,
            measure=partial(_eight_clients, processes),
        )
    many = MILLION // 10 if site.quick else MILLION
    yield Figure(
        name="trail-verify",
        title=f"{many:,} audit records verified, PostgreSQL",
        unit="s",
        target=VERIFIED_IN_SECONDS * many / MILLION,
        measure=partial(_verify, many),
    )


def _entry() -> Entry:
    """As long as they usually are."""
    return Entry(
        action=Action.STUDY_VIEW,
        outcome=Outcome.GRANTED,
        origin=Origin(uuid4().hex, "192.0.2.1"),
        actor="dr.novak",
        actor_roles="clinician",
        patient_id=uuid4(),
        study_instance_uid="2.25.117597055778299430787770094930605779743",
        detail={"by": ["requested an order of the patient"]},
    )


async def _write(url: str, clients: int) -> list[float]:
    """Seconds that each record took, from so many clients that write without a pause."""
    database = Database(url)
    trail = AuditTrail(database)
    took: list[float] = []
    await trail.record(_entry())  # connects
    end = perf_counter() + SECONDS

    async def client() -> None:
        while (began := perf_counter()) < end:
            await trail.record(_entry())
            took.append(perf_counter() - began)

    await asyncio.gather(*(client() for _ in range(clients)))
    await trail.close()
    await database.close()
    return took


async def _one_client() -> float:
    with tempfile.TemporaryDirectory(prefix="lightbox-bench-") as folder:
        url = f"sqlite+aiosqlite:///{folder}/trail.sqlite"
        migrate(url)
        took = sorted(await _write(url, 1))
    return 1000 * took[len(took) * 99 // 100]


def _eight_clients(processes: int) -> float:
    with durable_postgres() as server:
        owner_url, app_url = server.create_database()
        migrate(owner_url, make_url(app_url).username)
        command = [sys.executable, "-m", "tests.bench.trail", app_url, str(8 // processes)]
        writers = [
            subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
            for _ in range(processes)
        ]
        written = sum(int(each.communicate()[0] or 0) for each in writers)
        if any(each.returncode for each in writers):
            raise BenchError("a writer of records failed")
        report = verify(app_url)
    if report.wrong is not None or report.checked != written + processes:
        raise BenchError(f"the chain is not what was written: {report.sentence}")
    return 1000 * SECONDS / written


def _verify(many: int) -> float:
    with durable_postgres() as server:
        owner_url, app_url = server.create_database()
        migrate(owner_url, make_url(app_url).username)
        _fill(app_url, many)
        began = perf_counter()
        report = verify(app_url)
        took = perf_counter() - began
    if (report.wrong, report.checked) != (None, many):
        raise BenchError(f"the chain is not what was written: {report.sentence}")
    return took


def _fill(url: str, many: int) -> None:
    dialect, head = DIALECTS["postgresql"], GENESIS
    entries = [_entry() for _ in range(PORTION)]
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    names = ", ".join((*COLUMNS, "sha256"))
    with (
        psycopg.connect(plain) as connection,
        connection.cursor().copy(f"COPY {AUDIT_TABLE} ({names}) FROM STDIN".encode()) as copy,
    ):
        for _ in range(many // PORTION):
            linked = follow(head, entries)
            head = Head(linked[-1][0][0], linked[-1][1])
            for row in dialect.values(linked):
                copy.write_row(row)


def _in_thread(measure: Any) -> float:
    # The browser's driver has a running event loop in this one.
    with ThreadPoolExecutor(1) as thread:
        value: float = thread.submit(asyncio.run, measure()).result()
    return value


if __name__ == "__main__":
    print(len(asyncio.run(_write(sys.argv[1], int(sys.argv[2])))))
