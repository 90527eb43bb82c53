"""What is under way, so that it is known what was cut off."""

from datetime import datetime

from sqlmodel import Field, SQLModel

from app.db import utcnow
from app.models.columns import UtcDateTime


class OpenOperation(SQLModel, table=True):
    """Something granted whose outcome is not recorded yet; see `app.audit.operations`."""

    __tablename__ = "operation"

    id: str = Field(primary_key=True, max_length=32)
    process: str = Field(max_length=32, index=True)
    state: str = Field(max_length=8)
    started_at: datetime = Field(default_factory=utcnow, sa_type=UtcDateTime)
    asked: str  # JSON: the grant
    # What it does in Orthanc: `store` of an instance, `delete` of a study; empty: nothing.
    kind: str = Field(default="", max_length=8)
    orthanc_id: str = Field(default="", max_length=44)
    there_before: bool = False
    detail: str = ""  # of a deletion: its reason
    # Since when it has been waited for what may still come about.
    seen_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
