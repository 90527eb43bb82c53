"""what became of orders, patients who were merged, and requests that are safe to repeat

A patient who was merged into another is retired: triggers refuse any row of theirs, so that
nothing that was under way while they were merged can be left behind under them.

Revision: 0007
Revises: 0006
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"

OF_A_PATIENT = (
    "study",
    "imaging_order",
    "care_team_member",
    "patient_restriction",
    "named_person",
    "broken_glass",
    "launch_session",
)

_POSTGRES_FUNCTION = """
CREATE FUNCTION refuse_retired_patient() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    survivor uuid;
BEGIN
    -- Waits for a merge that is under way, and then sees it.
    SELECT merged_into INTO survivor FROM patient WHERE id = NEW.patient_id FOR KEY SHARE;
    IF survivor IS NOT NULL THEN
        RAISE EXCEPTION 'patient-retired' USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    RETURN NEW;
END
$$
"""


def upgrade() -> None:
    sqlite = op.get_bind().dialect.name == "sqlite"
    op.add_column(
        "imaging_order",
        sa.Column(
            "ehr_status", sa.String(16), nullable=False, server_default=sa.text("'scheduled'")
        ),
    )
    op.execute("UPDATE imaging_order SET ehr_status = status")
    op.add_column("imaging_order", _time("reopened_at", nullable=True))
    kind = "CHAR(32)" if sqlite else "UUID"
    op.execute(f"ALTER TABLE patient ADD COLUMN merged_into {kind} REFERENCES patient (id)")
    op.create_index("ix_patient_merged_into", "patient", ["merged_into"], unique=False)
    op.create_table(
        "patient_merge",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("patient_id", sa.Uuid(), nullable=False),
        sa.Column("into_id", sa.Uuid(), nullable=False),
        _text("reason"),
        _time("merged_at"),
        _text("merged_by", 255),
        _time("unmerged_at", nullable=True),
        _text("unmerged_by", 255),
        _text("unmerge_reason"),
        sa.ForeignKeyConstraint(["patient_id"], ["patient.id"]),
        sa.ForeignKeyConstraint(["into_id"], ["patient.id"]),
        sa.PrimaryKeyConstraint("id"),
    )
    for name in ("patient_id", "into_id"):
        op.create_index(f"ix_patient_merge_{name}", "patient_merge", [name], unique=False)
    op.create_table(
        "merged_row",
        sa.Column("merge_id", sa.Uuid(), nullable=False),
        _text("kind", 16),
        _text("key", 255),
        _text("detail"),
        sa.ForeignKeyConstraint(["merge_id"], ["patient_merge.id"]),
        sa.PrimaryKeyConstraint("merge_id", "kind", "key"),
    )
    op.create_table(
        "idempotency_key",
        _text("actor", 255),
        _text("key", 255),
        _text("request_sha256", 64),
        _text("request_id", 64),
        _text("claim", 32),
        _time("claimed_at"),
        _time("created_at"),
        _time("answered_at", nullable=True),
        sa.Column("status", sa.Integer(), nullable=False),
        _text("body"),
        _text("patient_ids"),
        sa.PrimaryKeyConstraint("actor", "key"),
    )
    op.create_index("ix_idempotency_key_created_at", "idempotency_key", ["created_at"])
    if not sqlite:
        op.execute(_POSTGRES_FUNCTION)
    for table in OF_A_PATIENT:
        if sqlite:
            _sqlite_triggers(table)
        else:
            op.execute(
                f"CREATE TRIGGER {table}_patient_retired BEFORE INSERT OR UPDATE OF patient_id"
                f" ON {table} FOR EACH ROW EXECUTE FUNCTION refuse_retired_patient()"
            )


def _sqlite_triggers(table: str) -> None:
    for name, when in (("insert", "INSERT"), ("update", "UPDATE OF patient_id")):
        retired = "(SELECT merged_into FROM patient WHERE id = NEW.patient_id) IS NOT NULL"
        op.execute(
            f"CREATE TRIGGER {table}_patient_retired_{name} BEFORE {when} ON {table}"
            f" WHEN {retired} BEGIN SELECT RAISE(ABORT, 'patient-retired'); END"
        )


def _text(name: str, length: int | None = None) -> sa.Column[str]:
    return sa.Column(name, sa.String(length), nullable=False)


def _time(name: str, *, nullable: bool = False) -> sa.Column[Any]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable)
