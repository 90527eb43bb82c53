"""The command line: `python -m app --help`."""

import asyncio
import os
import tempfile
from typing import Annotated

import typer
import uvicorn
from rich.console import Console
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from app import logs
from app.audit.signing import Signer
from app.cli import audit, imports, notifications, worklist
from app.cli.common import fail as _fail
from app.cli.common import read_settings as _settings
from app.db import Database
from app.db import migrate as migrate_database
from app.demo.run import kept_jwt_secret, run_demo
from app.demo.stack import SetupError
from app.errors import DatabaseUnavailable
from app.identity import Role, issue_token
from app.main import create_app
from app.settings import DatabaseSettings, IdentitySettings, Settings

cli = typer.Typer(
    help="Lightbox: the imaging adapter of an EHR. Settings are read from LIGHTBOX_... "
    "environment variables; docs/configuration.md lists them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
cli.add_typer(audit.cli, name="audit")
cli.add_typer(notifications.cli, name="notifications")
cli.add_typer(worklist.cli, name="worklist")
cli.command("import")(imports.import_files)


def main() -> None:
    """Run the command line; known failures are one sentence on standard error."""
    cli(prog_name="python -m app")


@cli.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8080,
    trusted_edge: Annotated[
        str, typer.Option(help="Addresses whose X-Forwarded-For is believed, or `*`.")
    ] = "127.0.0.1",
) -> None:
    """Run the application. The edge (nginx) stands in front of it."""
    settings = _settings(Settings)
    _refuse_unfit(settings)
    logs.configure(settings.log_level, settings.log_format)
    tempfile.tempdir = str(settings.spool_dir)  # where multipart files spill over to
    uvicorn.run(
        create_app(settings),
        host=host,
        port=port,
        access_log=False,  # app.problems logs requests, without their addresses
        proxy_headers=True,
        forwarded_allow_ips=trusted_edge,
        server_header=False,
        date_header=False,
        log_config=None,
        timeout_graceful_shutdown=10,
    )


@cli.command()
def migrate() -> None:
    """Bring the database to this version, and grant the application's role what it needs."""
    settings = _settings(DatabaseSettings)
    owner_url = settings.migration_database_url or settings.database_url
    app_role = make_url(settings.database_url).username
    if app_role == make_url(owner_url).username:
        app_role = None
    try:
        migrate_database(owner_url, app_role)
    except SQLAlchemyError as error:
        _fail(f"The database can't be migrated: {str(error).splitlines()[0]}")
    typer.echo("The database is up to date.")


@cli.command()
def token(
    sub: Annotated[str, typer.Option(help="Who the token speaks for.")],
    role: Annotated[list[Role], typer.Option(help="A role; may be given several times.")],
    minutes: Annotated[int, typer.Option(help="How long it holds.", min=1)] = 60,
) -> None:
    """Print a development token; only where LIGHTBOX_JWT_SECRET is set, or the demo was started."""
    configured = {"LIGHTBOX_JWT_SECRET", "LIGHTBOX_OIDC_ISSUER"} & os.environ.keys()
    demo_secret = None if configured else kept_jwt_secret()
    settings = (
        IdentitySettings(jwt_secret=demo_secret) if demo_secret else _settings(IdentitySettings)
    )
    try:
        typer.echo(issue_token(settings, sub, role, minutes))
    except ValueError as error:
        _fail(str(error))


@cli.command()
def demo() -> None:
    """Run the whole of it on this machine, with made-up patients; `make demo` installs first."""
    console = Console()
    try:
        run_demo(console)
    except SetupError as error:
        _fail(str(error))


def _refuse_unfit(settings: Settings) -> None:
    """End with a sentence where the database is not there, not migrated, not safe to use,
    or the trail's key can't be read."""
    try:
        if settings.audit_key_file is not None:
            Signer.from_file(settings.audit_key_file)
    except ValueError as error:
        _fail(f"LIGHTBOX_AUDIT_KEY_FILE: {error}")

    async def verify() -> None:
        database = Database(settings.database_url)
        try:
            await database.ping()
            await database.verify()
        finally:
            await database.close()

    try:
        asyncio.run(verify())
    except DatabaseUnavailable:
        _fail("The database does not answer; check LIGHTBOX_DATABASE_URL.")
    except (RuntimeError, SQLAlchemyError) as error:
        _fail(str(error).splitlines()[0])
