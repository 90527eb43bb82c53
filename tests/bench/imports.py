"""How long an import takes that is interrupted twice; by hand:

    .venv/bin/python -m tests.bench.imports [FILES]

The client is killed at a fifth of the files, the app (SIGKILL) at half; then all is compared, as in
tests/live/test_imports_live.py.
"""

import asyncio
import sys
import tempfile
import time
from pathlib import Path

from app.db import migrate
from tests.live.conftest import Archive, DatabaseUrls, edged, make_person
from tests.live.test_imports_live import (
    Site,
    exactly_once,
    interrupted_twice,
    make_bad,
    make_study,
    parts,
)


async def measure(folder: Path, count: int) -> None:
    url = f"sqlite+aiosqlite:///{folder / 'lightbox.sqlite'}"
    migrate(url)
    database = DatabaseUrls(url, url)
    settings, orthanc, edge, app = parts(folder, database)
    with orthanc, edge, app:
        async with edged(settings) as caller:
            site = Site(settings, app, caller, Archive(orthanc), database)
            person, other = await make_person(caller), await make_person(caller)
            uids = make_study(folder / "files", person.mrn, count)
            make_bad(folder / "files", person.mrn, other.mrn)
            began = time.monotonic()
            await interrupted_twice(site, person, folder / "files", count)
            seconds = time.monotonic() - began
            exactly_once(site, uids)
            print(
                f"{count} files and 3 bad ones, interrupted twice: {seconds:.1f} s "
                f"({count / seconds:.1f}/s), peak of the app {site.peak_mib():.1f} MiB"
            )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        asyncio.run(measure(Path(name), int(sys.argv[1]) if len(sys.argv) > 1 else 2000))
