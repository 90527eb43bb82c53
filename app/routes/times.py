"""Times on the wire: RFC 3339, in any zone on the way in, in UTC from there on."""

from datetime import UTC, datetime
from typing import Annotated

from pydantic import AfterValidator, AwareDatetime


def _in_utc(moment: datetime) -> datetime:
    try:
        return moment.astimezone(UTC)
    except OverflowError as error:  # the first day of year 1, east of Greenwich
        raise ValueError("the time is beyond what can be kept") from error


UtcTime = Annotated[AwareDatetime, AfterValidator(_in_utc)]
