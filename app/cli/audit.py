"""`python -m app audit`: prove the trail, and remove what the law no longer asks for."""

import asyncio
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import httpx
import psycopg
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from app.audit.checkpoints import sink_of
from app.audit.purge import purge as purge_records
from app.audit.signing import (
    BadStatement,
    Keys,
    Signer,
    Statement,
    checked_file,
    make_key,
    read_public_key,
)
from app.audit.verify import Report
from app.audit.verify import verify as verify_trail
from app.cli.common import fail, read_settings
from app.db import utcnow
from app.settings import TrailSettings

KEEP_YEARS = 6

cli = typer.Typer(help="The audit trail: prove it, and its retention.", no_args_is_help=True)

PublicKeys = Annotated[
    list[Path] | None,
    typer.Option(
        "--public-key",
        help="Public key (PEM) of checkpoints; several where the key was changed. By default that "
        "of LIGHTBOX_AUDIT_KEY_FILE.",
    ),
]


@cli.command()
def key(path: Annotated[Path, typer.Argument(help="The new file; never overwritten.")]) -> None:
    """Make the private key that signs checkpoints, and print the public one: keep it elsewhere."""
    try:
        typer.echo(make_key(path), nl=False)
    except OSError as error:
        fail(f"No key was made: {path}: {error.strerror}.")


@cli.command()
def verify(
    start: Annotated[
        int | None, typer.Option("--from", min=1, help="The first record to check.")
    ] = None,
    checkpoints: Annotated[
        list[Path] | None,
        typer.Option(help="Files of checkpoints. By default LIGHTBOX_AUDIT_CHECKPOINT_FILE."),
    ] = None,
    public_key: PublicKeys = None,
) -> None:
    """Check every record against the one before, and the chain against its checkpoints.

    Ends with 1 where anything is wrong, and names the first record that is.
    """
    settings = read_settings(TrailSettings)
    keys = _keys(settings, public_key)
    statements = _statements(settings, checkpoints, keys)
    report = _verified(settings.database_url, statements, keys, start)
    _say(report, bool(statements))


@cli.command()
def purge(
    before: Annotated[
        datetime | None,
        typer.Option(formats=["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"], help="Remove what is older; UTC."),
    ] = None,
    keep_years: Annotated[
        int, typer.Option(min=1, help="Remove what is older than that; not with --before.")
    ] = KEEP_YEARS,
    public_key: PublicKeys = None,
    dry_run: Annotated[bool, typer.Option(help="Say what would be removed.")] = False,
) -> None:
    """Remove the oldest records, as the tables' owner, and leave a signed statement of it.

    The trail is verified first: evidence is not removed. Nobody can write to it meanwhile.
    """
    settings = read_settings(TrailSettings)
    if settings.audit_key_file is None:
        fail("A purge is signed: set LIGHTBOX_AUDIT_KEY_FILE.")
    owner_url = settings.migration_database_url
    if not owner_url:
        if make_url(settings.database_url).get_backend_name() == "postgresql":
            fail("Only the tables' owner may purge: set LIGHTBOX_MIGRATION_DATABASE_URL.")
        owner_url = settings.database_url
    cutoff = _years_ago(keep_years) if before is None else before.replace(tzinfo=UTC)
    keys = _keys(settings, public_key)
    statements = _statements(settings, None, keys)
    report = _verified(owner_url, statements, keys, None)
    if report.wrong is not None:
        _say(report, bool(statements))
    try:
        done = purge_records(
            owner_url,
            cutoff,
            Signer.from_file(settings.audit_key_file),
            _keeper(settings),
            dry_run=dry_run,
        )
    except (ValueError, OSError, httpx.HTTPError) as error:
        fail(f"Nothing was removed: {error}")
    except SQLAlchemyError as error:
        fail(f"Nothing was removed: {str(error).splitlines()[0]}")
    if done is None:
        typer.echo(f"No record is older than {cutoff:%Y-%m-%d %H:%M:%S} UTC.")
        return
    what = "would be" if dry_run else "were"
    typer.echo(f"{done.removed:,} records, up to record {done.through}, {what} removed.")


def _keys(settings: TrailSettings, files: list[Path] | None) -> Keys:
    try:
        if files:
            return {name: key for path in files for name, key in read_public_key(path).items()}
        if settings.audit_key_file is not None:
            return Signer.from_file(settings.audit_key_file).public
    except ValueError as error:
        fail(str(error))
    return {}


def _statements(settings: TrailSettings, files: list[Path] | None, keys: Keys) -> list[Statement]:
    configured = settings.audit_checkpoint_file
    if not files:
        files = [configured] if configured is not None else []
    if files and not keys:
        fail("Checkpoints can't be checked without a key: give --public-key.")
    try:
        return [statement for path in files for statement in checked_file(path, keys)]
    except BadStatement as error:
        fail(f"The checkpoints are not what was signed: {error}.")
    except OSError as error:
        fail(f"The checkpoints can't be read: {error.filename}: {error.strerror}.")


def _verified(url: str, statements: list[Statement], keys: Keys, start: int | None) -> Report:
    try:
        with _bar() as progress:
            return verify_trail(
                url, statements=statements, keys=keys, start=start, progress=progress
            )
    except LookupError as error:
        fail(f"Nothing was checked: {error}.")
    except (psycopg.Error, sqlite3.Error) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        fail(f"The trail can't be read: {lines[0]}")


def _say(report: Report, with_checkpoints: bool) -> None:
    good = report.last_good
    if report.wrong is not None:
        typer.echo(f"The trail is wrong from record {report.wrong} on. {report.sentence}")
        if good is not None:
            typer.echo(f"The last checkpoint that agrees is at record {good.count} ({good.at}).")
        raise typer.Exit(1)
    if not report.checked:
        typer.echo("The trail is empty, and no checkpoint says otherwise.")
        return
    typer.echo(
        f"{report.checked:,} records, {report.first} to {report.last}, are as they were written."
    )
    if good is not None:
        typer.echo(
            f"{len(report.agreed):,} checkpoints agree, the last one at record {good.count} "
            f"({good.at}); {report.last - good.count} records are newer than that."
        )
    elif with_checkpoints:
        typer.echo("No checkpoint is of these records.")
    else:
        typer.echo(
            "There were no checkpoints to compare with: a chain that was computed anew, or lost "
            "its end, looks the same. Give --checkpoints.",
            err=True,
        )


def _keeper(settings: TrailSettings) -> Callable[[str], None]:
    """Keeps the statement where the checkpoints are, if anywhere."""
    sink = sink_of(settings)

    def keep(line: str) -> None:
        if sink is not None:
            asyncio.run(sink.send(line))

    return keep


def _years_ago(years: int) -> datetime:
    now = utcnow()
    try:
        return now.replace(year=now.year - years)
    except ValueError:  # the 29th of February
        return now.replace(year=now.year - years, day=28)


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    columns = (
        TextColumn("Checking records"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    quiet = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=quiet) as bars:
        task = bars.add_task("records", total=None)

        def progress(done: int, total: int) -> None:
            bars.update(task, completed=done, total=total)

        yield progress
