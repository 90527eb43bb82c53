"""`python -m app notifications`: what the webhook was told, and what it was not."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, TypeVar
from uuid import UUID

import sqlalchemy as sa
import typer
from sqlmodel import col, select

from app.cli.common import fail, read_settings
from app.db import Database
from app.models import Notification
from app.notifications import replay as replay_statement
from app.settings import DatabaseSettings

Result = TypeVar("Result")

cli = typer.Typer(help="Events for the hospital's webhook.", no_args_is_help=True)


@cli.command("list")
def list_(
    every: Annotated[
        bool, typer.Option("--all", help="Delivered ones too; they are kept for 30 days.")
    ] = False,
    limit: Annotated[int, typer.Option(min=1, help="Most lines.")] = 200,
) -> None:
    """What is not delivered, oldest first: waiting, or given up. Tab-separated: id, event, made at,
    state, attempts, last error."""
    statement = select(Notification).order_by(col(Notification.created_at)).limit(limit)
    if not every:
        statement = statement.where(col(Notification.delivered_at).is_(None))

    async def read(database: Database) -> Sequence[Notification]:
        async with database.session() as session:
            return (await session.exec(statement)).all()

    for each in _with_database(read):
        made_at = each.created_at.isoformat(timespec="seconds")
        cells = (each.id, each.event, made_at, _state(each), each.attempts, each.last_error)
        typer.echo("\t".join(str(cell) for cell in cells))


@cli.command()
def replay(
    notification_id: Annotated[
        UUID | None, typer.Argument(help="One notification, delivered or not.", metavar="[ID]")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="All that were given up.")] = False,
) -> None:
    """Send again, by the running app, under the same webhook-id."""
    if (notification_id is None) == (not every):
        fail("Name one notification, or --all.")

    async def write(database: Database) -> int:
        async with database.session() as session:
            changed = await session.exec(replay_statement(notification_id))
            await session.commit()
            return changed.rowcount

    count = _with_database(write)
    if notification_id is not None and count == 0:
        fail("There is no notification of that id.")
    typer.echo(f"{count} due now.")


def _state(each: Notification) -> str:
    if each.delivered_at is not None:
        return "delivered"
    return "waiting" if each.next_attempt_at is not None else "given-up"


def _with_database(work: Callable[[Database], Awaitable[Result]]) -> Result:
    """The result of `work`, or one sentence and the end."""
    database_url = read_settings(DatabaseSettings).database_url

    async def run() -> Result:
        database = Database(database_url)
        try:
            return await work(database)
        finally:
            await database.close()

    try:
        return asyncio.run(run())
    except (sa.exc.SQLAlchemyError, OSError):
        fail("The database does not answer, or is not migrated; check LIGHTBOX_DATABASE_URL.")
