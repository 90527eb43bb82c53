"""Imports: uploads of many files that outlive a connection, and the process that takes them in."""

from datetime import datetime
from enum import StrEnum
from uuid import UUID, uuid4

import sqlalchemy as sa
from sqlmodel import Field, SQLModel

from app.db import utcnow
from app.models.columns import UtcDateTime


class ImportState(StrEnum):
    """`open`: files come in and are taken in. `stopped`: the caller lost the right to its target.
    What was linked stays linked, whatever becomes of the import."""

    CANCELLED = "cancelled"
    DONE = "done"
    OPEN = "open"
    STOPPED = "stopped"


class FileState(StrEnum):
    """How far a file has come. `received`: all its bytes are here, with the digest that was said.
    `validated`: it passed every check and may be stored. `stored`: it is in Orthanc. `unpacked`: an
    archive, whose files have rows of their own."""

    CANCELLED = "cancelled"
    LINKED = "linked"
    RECEIVED = "received"
    RECEIVING = "receiving"
    REFUSED = "refused"
    STORED = "stored"
    UNPACKED = "unpacked"
    VALIDATED = "validated"


PENDING = (FileState.RECEIVED, FileState.VALIDATED, FileState.STORED)
"""Here, and not yet at its end."""
SPOOLED = (FileState.RECEIVING, *PENDING)
"""Has, or may have, bytes in the spool folder."""


class Import(SQLModel, table=True):
    """An import. It belongs to `actor`, for whom its files are taken in."""

    __tablename__ = "dicom_import"

    id: UUID = Field(default_factory=uuid4, primary_key=True)
    actor: str = Field(max_length=255, index=True)
    principal: str  # JSON: who they were when they last sent something; see app.imports.rows
    client_address: str = Field(default="", max_length=64)
    key: str = Field(default="", max_length=64)  # the caller's own name of it
    order_id: UUID | None = None
    patient_id: UUID | None = None
    file_count: int  # how many files there are to come, archives counted as one
    state: str = Field(default=ImportState.OPEN, max_length=16, index=True)
    reason: str = ""  # why it was stopped or cancelled
    # Counts its changes: a file's `seq` is that of its last one. Whoever adds one holds the row.
    seq: int = Field(default=0, sa_type=sa.BigInteger)
    claimed_by: str = Field(default="", max_length=32)  # the process that takes its files in
    leased_until: datetime = Field(default_factory=utcnow, sa_type=UtcDateTime)
    due_at: datetime = Field(default_factory=utcnow, sa_type=UtcDateTime)
    created_at: datetime = Field(default_factory=utcnow, sa_type=UtcDateTime, index=True)
    fed_at: datetime = Field(default_factory=utcnow, sa_type=UtcDateTime)
    ended_at: datetime | None = Field(default=None, sa_type=UtcDateTime)


class ImportFile(SQLModel, table=True):
    """A file of an import; `entry` 0 is the file that was sent, 1... are those of an archive."""

    __tablename__ = "import_file"

    import_id: UUID = Field(primary_key=True, foreign_key="dicom_import.id", ondelete="CASCADE")
    number: int = Field(primary_key=True)
    entry: int = Field(default=0, primary_key=True)
    name: str = Field(max_length=255)  # the sender's, made safe to show; never a path
    size: int = Field(sa_type=sa.BigInteger)  # bytes
    sha256: str = Field(default="", max_length=64)  # of a file that was sent
    state: str = Field(max_length=16, index=True)
    seq: int = Field(sa_type=sa.BigInteger)
    duplicate: bool = False  # the archive had it already
    study_instance_uid: str = Field(default="", max_length=64)
    sop_instance_uid: str = Field(default="", max_length=64)
    warnings: str = "[]"  # JSON
    error: str = ""
    error_status: int = 0
    error_type: str = Field(default="", max_length=64)
    changed_at: datetime = Field(default_factory=utcnow, sa_type=UtcDateTime)


_files: sa.Table = ImportFile.__table__  # type: ignore[attr-defined]
_sent = _files.c.entry == 0
sa.Index(
    "ix_import_file_sha256",
    *(_files.c.import_id, _files.c.sha256),
    unique=True,
    sqlite_where=_sent,
    postgresql_where=_sent,
)
sa.Index("ix_import_file_seq", _files.c.import_id, _files.c.seq)
