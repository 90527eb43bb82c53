"""What all commands share: settings from the environment, and failing with one sentence."""

from typing import NoReturn, TypeVar

import typer
from pydantic import ValidationError

from app.settings import DatabaseSettings, IdentitySettings, Settings, TrailSettings

Kind = TypeVar("Kind", DatabaseSettings, IdentitySettings, TrailSettings, Settings)


def read_settings(kind: type[Kind]) -> Kind:
    """The settings of the environment; where they are not complete, what lacks, and the end."""
    try:
        return kind()
    except ValidationError as error:
        lines = [
            f"  LIGHTBOX_{'_'.join(str(part) for part in each['loc']).upper()}: {each['msg']}"
            if each["loc"]
            else f"  {each['msg'].removeprefix('Value error, ')}"
            for each in error.errors()
        ]
        fail("The configuration is not complete:\n" + "\n".join(lines))


def fail(sentence: str) -> NoReturn:
    """End with a sentence on standard error."""
    typer.echo(sentence, err=True)
    raise typer.Exit(1)
