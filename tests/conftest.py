"""Fixtures for all tests. Fast ones run on SQLite and a fake Orthanc; live ones on real parts."""

import asyncio
import shutil
import ssl
from collections.abc import AsyncIterator, Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
import respx

from app.db import migrate
from tests.fake_orthanc import URL, FakeOrthanc
from tests.lightbox import Lightbox, Shared, World, make_settings, make_world, running
from tests.tables import contents


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated, empty SQLite database, to be copied."""
    path = tmp_path_factory.mktemp("database") / "empty.sqlite"
    migrate(f"sqlite+aiosqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def filled(
    migrated_sqlite: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, FakeOrthanc, World]:
    """The database, the Orthanc and the names of a world, to be copied."""
    path = tmp_path_factory.mktemp("world") / "filled.sqlite"
    shutil.copy(migrated_sqlite, path)
    orthanc = FakeOrthanc()

    async def fill() -> World:
        async with running(make_settings(f"sqlite+aiosqlite:///{path}", URL)) as lightbox:
            return await make_world(lightbox)

    with respx.mock(assert_all_called=False) as router:
        orthanc.install(router)
        world = asyncio.run(fill())
    return path, orthanc, world


@pytest.fixture
def sqlite_url(request: pytest.FixtureRequest, migrated_sqlite: Path, tmp_path: Path) -> str:
    """The URL of a database of this test's own: empty, or filled for a test that asks for the
    `world`."""
    source = migrated_sqlite
    if "world" in request.fixturenames:
        source = request.getfixturevalue("filled")[0]
    path = tmp_path / "lightbox.sqlite"
    shutil.copy(source, path)
    return f"sqlite+aiosqlite:///{path}"


@pytest.fixture
def fake_orthanc(request: pytest.FixtureRequest) -> Iterator[FakeOrthanc]:
    """An Orthanc at the transport: empty, or filled for a test that asks for the `world`."""
    fake = FakeOrthanc()
    if "world" in request.fixturenames:
        source: FakeOrthanc = request.getfixturevalue("filled")[1]
        fake.instances.update(source.instances)
        fake.bodies.update(source.bodies)
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
def world(lightbox: Lightbox, filled: tuple[Path, FakeOrthanc, World]) -> World:
    """Two patients, one of them not the clinician's."""
    return deepcopy(filled[2])


@pytest.fixture(scope="session", autouse=True)
def one_trust_store() -> Iterator[None]:
    """Read the certificate authorities once, not for each client: half of a fast test's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssl, "create_default_context", cache(ssl.create_default_context))
        yield


@pytest.fixture(scope="module")
async def shared(
    migrated_sqlite: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Shared]:
    """One world for all tests of a module that only look at it; its Orthanc has its own address,
    so that a test may have another Lightbox beside it."""
    folder, url = tmp_path_factory.mktemp("shared"), "http://shared-orthanc.test"
    database = shutil.copy(migrated_sqlite, folder / "lightbox.sqlite")
    orthanc = FakeOrthanc()
    with pytest.MonkeyPatch.context() as patch, respx.mock(assert_all_called=False) as router:
        patch.setattr("app.main.FLUSH_SECONDS", 3600.0)  # nothing moves by itself
        orthanc.install(router, url)
        settings = make_settings(f"sqlite+aiosqlite:///{database}", url, spool_dir=folder)
        async with running(settings) as lightbox:
            world = await make_world(lightbox)
            mine = await lightbox.open(f"/{world.my_study}")
            theirs = await lightbox.open(f"/{world.their_study}", sub="other")
            yield Shared(lightbox, world, orthanc, mine, theirs)


@pytest.fixture
def untouched(shared: Shared) -> Iterator[Shared]:
    """The shared world; after the test it has to be what it was, and Orthanc unasked."""
    before, asked_before = contents(shared.lightbox), list(shared.orthanc.requests)
    yield shared
    assert contents(shared.lightbox) == before
    assert shared.orthanc.requests == asked_before
