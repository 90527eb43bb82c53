"""What the tables share: the type of a time, text as searches compare it, defaults."""

import unicodedata
from datetime import UTC, datetime
from secrets import token_hex
from typing import Any

import sqlalchemy as sa
from sqlmodel import Field


class UtcDateTime(sa.types.TypeDecorator[datetime]):
    """A point in time: kept in UTC, and aware on the way out of either database."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Any) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a time without a zone can't be stored")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Any) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def new_generation() -> str:
    """A name that was never used before."""
    return token_hex(8)


def folded(text: str) -> str:
    """Text as searches compare it: without case, accents composed, no padding at the end."""
    return unicodedata.normalize("NFC", text).casefold().rstrip("^ ")


# For rows that were there before the column was.
EMPTY = {"server_default": sa.text("''")}
# DICOM JSON of what else a search shows of a study, series or instance.
ATTRIBUTES: Any = Field(default="{}", sa_column_kwargs={"server_default": "{}"})
