"""`python -m app worklist ...`: for whoever runs it."""

import asyncio

import typer
from sqlalchemy.exc import SQLAlchemyError

from app.audit import AuditTrail
from app.cli.common import fail, read_settings
from app.db import Database
from app.errors import LightboxError
from app.orthanc import Orthanc
from app.settings import Settings
from app.worklist import Report, Worklist

cli = typer.Typer(help="The modality worklist that Orthanc serves.", no_args_is_help=True)


@cli.callback()
def _group() -> None:
    """The modality worklist that Orthanc serves."""


@cli.command()
def rebuild() -> None:
    """Make the folder what the database says, every file compared; beside a running app too."""
    settings = read_settings(Settings)
    if settings.worklist_dir is None:
        fail("There is no worklist: LIGHTBOX_WORKLIST_DIR is not set.")
    try:
        report = asyncio.run(_rebuild(settings))
    except (LightboxError, OSError) as error:
        fail(f"The worklist can't be rebuilt: {error}")
    except SQLAlchemyError as error:
        fail(f"The worklist can't be rebuilt; the database: {type(error).__name__}.")
    typer.echo(
        f"{report.listed} orders are on the worklist: {len(report.changes.written)} written, "
        f"{len(report.changes.removed)} taken off."
    )
    for order_id, problem in report.withheld.items():
        typer.echo(f"Order {order_id} is not: {problem}", err=True)


async def _rebuild(settings: Settings) -> Report:
    database = Database(settings.database_url)
    trail_database = Database(settings.database_url, beside=database)
    trail = AuditTrail(trail_database)
    orthanc = Orthanc.from_settings(settings)
    try:
        await database.verify()
        made = Worklist(settings, database, trail, orthanc)
        await made.ask_orthanc()
        return await made.reconcile(read_all=True)
    finally:
        await trail.close()
        await orthanc.close()
        await database.close()
        await trail_database.close()
