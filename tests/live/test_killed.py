"""`kill -9` at random moments and at chosen points; the whole of it is `python -m tests.killed`."""

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.demo.stack import OrthancServer
from tests.killed.process import POINTS
from tests.killed.run import run
from tests.live.conftest import DatabaseUrls, command, environment_of, migrated, settings_for
from tests.servers import PostgresServer


@pytest.fixture
def archive_of_its_own(tmp_path: Path) -> Iterator[OrthancServer]:
    with OrthancServer(
        tmp_path / "orthanc", username="lightbox", password=secrets.token_hex(16), dicom_port=None
    ) as server:
        yield server


async def killed(
    urls: DatabaseUrls,
    orthanc: OrthancServer,
    state: Path,
    kills: int,
    mutation: str = "",
    points: tuple[str, ...] = POINTS,
) -> list[str]:
    """What differs, after so many kills."""
    settings = settings_for(
        urls.app,
        orthanc,
        migration_database_url=urls.owner,
        spool_dir=state,
        orthanc_timeout_seconds=3.0,
    )
    report = await run(
        *(settings, urls.sync_owner, orthanc, state),
        kills=kills,
        seed=kills,
        mutation=mutation,
        points=points,
    )
    print("\n".join(report.lines()))
    verified = command("audit", "verify", environment=environment_of(settings))
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert report.unanswered.total() >= kills  # it died over somebody's request, each time
    return report.differences


@pytest.mark.parametrize(
    ("kills", "points"),
    [(2 * len(POINTS), POINTS)],
)
async def test_on_postgres_all_agrees_after_the_last_start(
    postgres: PostgresServer,
    archive_of_its_own: OrthancServer,
    tmp_path: Path,
    kills: int,
    points: tuple[str, ...],
) -> None:
    """Once at each chosen point, and as often at a random moment."""
    urls = migrated(postgres.create_database())
    assert await killed(urls, archive_of_its_own, tmp_path, kills, points=points) == []


async def test_on_sqlite_all_agrees_after_the_last_start(
    sqlite_url: str, archive_of_its_own: OrthancServer, tmp_path: Path
) -> None:
    points = ("posted", "deleted", "committing")
    urls = DatabaseUrls(sqlite_url, sqlite_url)
    assert await killed(urls, archive_of_its_own, tmp_path, 6, points=points) == []


@pytest.mark.parametrize(
    ("mutation", "points", "seen"),
    [
        ("no-recovery", ("posted",), "in Orthanc and linked to nobody"),
        ("no-recovery", ("deleted",), "linked and not in Orthanc"),
        ("link-first", ("posting",), "linked and not in Orthanc"),
    ],
)
async def test_an_app_that_is_broken_is_seen(
    postgres: PostgresServer,
    archive_of_its_own: OrthancServer,
    tmp_path: Path,
    mutation: str,
    points: tuple[str, ...],
    seen: str,
) -> None:
    """The comparison can fail: without recovery, and where the link comes before the file."""
    urls = migrated(postgres.create_database())
    found = await killed(urls, archive_of_its_own, tmp_path, 4, mutation, points)
    assert [each for each in found if each.startswith(seen)]
