"""imports that outlive a connection and a process

Revision: 0008
Revises: 0007
"""

from datetime import datetime

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.create_table(
        "dicom_import",
        sa.Column("id", sa.Uuid(), nullable=False),
        _text("actor", 255),
        _text("principal"),
        _text("client_address", 64),
        _text("key", 64),
        sa.Column("order_id", sa.Uuid(), nullable=True),
        sa.Column("patient_id", sa.Uuid(), nullable=True),
        sa.Column("file_count", sa.Integer(), nullable=False),
        _text("state", 16),
        _text("reason"),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        _text("claimed_by", 32),
        _time("leased_until"),
        _time("due_at"),
        _time("created_at"),
        _time("fed_at"),
        _time("ended_at", nullable=True),
        sa.PrimaryKeyConstraint("id"),
    )
    for name in ("actor", "created_at", "state"):
        op.create_index(f"ix_dicom_import_{name}", "dicom_import", [name], unique=False)
    op.create_table(
        "import_file",
        sa.Column("import_id", sa.Uuid(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("entry", sa.Integer(), nullable=False),
        _text("name", 255),
        sa.Column("size", sa.BigInteger(), nullable=False),
        _text("sha256", 64),
        _text("state", 16),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("duplicate", sa.Boolean(), nullable=False),
        _text("study_instance_uid", 64),
        _text("sop_instance_uid", 64),
        _text("warnings"),
        _text("error"),
        sa.Column("error_status", sa.Integer(), nullable=False),
        _text("error_type", 64),
        _time("changed_at"),
        sa.ForeignKeyConstraint(["import_id"], ["dicom_import.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("import_id", "number", "entry"),
    )
    op.create_index("ix_import_file_state", "import_file", ["state"], unique=False)
    op.create_index("ix_import_file_seq", "import_file", ["import_id", "seq"], unique=False)
    sent = sa.text("entry = 0")
    op.create_index(
        "ix_import_file_sha256",
        "import_file",
        ["import_id", "sha256"],
        unique=True,
        sqlite_where=sent,
        postgresql_where=sent,
    )


def _text(name: str, length: int | None = None) -> sa.Column[str]:
    return sa.Column(name, sa.String(length), nullable=False)


def _time(name: str, *, nullable: bool = False) -> sa.Column[datetime]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable)
