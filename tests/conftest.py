"""Fixtures for all tests. Fast ones run on SQLite and a fake Orthanc; live ones on real parts."""

import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import respx

from app.db import migrate
from tests.fake_orthanc import URL, FakeOrthanc
from tests.lightbox import Lightbox, World, make_settings, make_world, running


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated, empty SQLite database, to be copied."""
    path = tmp_path_factory.mktemp("database") / "empty.sqlite"
    migrate(f"sqlite+aiosqlite:///{path}")
    return path


@pytest.fixture
def sqlite_url(migrated_sqlite: Path, tmp_path: Path) -> str:
    """The URL of an empty database of this test's own."""
    path = tmp_path / "lightbox.sqlite"
    shutil.copy(migrated_sqlite, path)
    return f"sqlite+aiosqlite:///{path}"


@pytest.fixture
def fake_orthanc() -> Iterator[FakeOrthanc]:
    """An Orthanc at the transport."""
    fake = FakeOrthanc()
    with respx.mock(assert_all_called=False) as router:
        fake.install(router)
        yield fake


@pytest.fixture
async def lightbox(
    sqlite_url: str, fake_orthanc: FakeOrthanc, tmp_path: Path
) -> AsyncIterator[Lightbox]:
    """The app on SQLite and the fake Orthanc."""
    async with running(make_settings(sqlite_url, URL, spool_dir=tmp_path)) as each:
        yield each


@pytest.fixture
async def world(lightbox: Lightbox) -> World:
    """Two patients, one of them not the clinician's."""
    return await make_world(lightbox)
