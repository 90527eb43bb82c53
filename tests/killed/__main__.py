"""`python -m tests.killed --kills 100`: the whole of it, with its figures. Ends with 1 where
something differs."""

import argparse
import asyncio
import secrets
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from sqlalchemy.engine import make_url

from app.db import migrate
from app.demo.stack import OrthancServer
from tests.killed.process import MUTATIONS
from tests.killed.run import run
from tests.live.conftest import command, environment_of, settings_for
from tests.servers import postgres_server


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.killed", description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sqlite", action="store_true")
    parser.add_argument("--mutation", choices=MUTATIONS, default="", help="break the app first")
    given = parser.parse_args()
    with ExitStack() as stack:
        state = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="killed-")))
        if given.sqlite:
            owner = app = f"sqlite+aiosqlite:///{state / 'lightbox.sqlite'}"
        else:
            owner, app = stack.enter_context(postgres_server()).create_database()
        migrate(owner, make_url(app).username)
        orthanc = stack.enter_context(
            OrthancServer(
                state / "orthanc",
                username="lightbox",
                password=secrets.token_hex(16),
                dicom_port=None,
            )
        )
        settings = settings_for(
            app, orthanc, spool_dir=state, orthanc_timeout_seconds=3.0, migration_database_url=owner
        )
        report = asyncio.run(
            run(
                *(settings, owner.replace("sqlite+aiosqlite", "sqlite"), orthanc, state),
                kills=given.kills,
                seed=given.seed,
                mutation=given.mutation,
            )
        )
        verified = command("audit", "verify", environment=environment_of(settings))
        print("\n".join([*report.lines(), verified.stdout.strip() or verified.stderr.strip()]))
        log = (state / "killed.log").read_text(errors="replace")
        if report.differences and log:
            print(log[-4000:])
        return 1 if report.differences or verified.returncode else 0


if __name__ == "__main__":
    sys.exit(main())
