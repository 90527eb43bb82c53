"""restricted patients, broken glass, sign-ins of launches, what is on its way to others

Revision: 0004
Revises: 0003
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_table(
        "patient_restriction",
        sa.Column("patient_id", sa.Uuid(), nullable=False),
        sa.Column("level", sa.String(16), nullable=False),
        sa.Column("reason", sa.String(), nullable=False),
        _time("set_at"),
        sa.Column("set_by", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(["patient_id"], ["patient.id"]),
        sa.PrimaryKeyConstraint("patient_id"),
    )
    op.create_table(
        "named_person",
        sa.Column("patient_id", sa.Uuid(), nullable=False),
        sa.Column("sub", sa.String(255), nullable=False),
        sa.ForeignKeyConstraint(["patient_id"], ["patient.id"]),
        sa.PrimaryKeyConstraint("patient_id", "sub"),
    )
    op.create_table(
        "broken_glass",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("patient_id", sa.Uuid(), nullable=False),
        sa.Column("sub", sa.String(255), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("roles", sa.String(), nullable=False),
        sa.Column("reason_code", sa.String(64), nullable=False),
        sa.Column("reason_text", sa.String(), nullable=False),
        sa.Column("opens_sealed", sa.Boolean(), nullable=False),
        _time("broken_at"),
        _time("expires_at"),
        _time("reviewed_at", nullable=True),
        sa.Column("reviewed_by", sa.String(), nullable=False),
        sa.Column("review_comment", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(["patient_id"], ["patient.id"]),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "export_position",
        sa.Column("sink", sa.String(255), nullable=False),
        sa.Column("record_id", sa.BigInteger(), nullable=False),
        _time("at"),
        sa.PrimaryKeyConstraint("sink"),
    )
    op.create_table(
        "notification",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("event", sa.String(64), nullable=False),
        sa.Column("body", sa.String(), nullable=False),
        _time("created_at"),
        sa.Column("attempts", sa.Integer(), nullable=False),
        _time("next_attempt_at", nullable=True),
        _time("delivered_at", nullable=True),
        sa.Column("last_error", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "spent_token",
        sa.Column("jti_sha256", sa.String(64), nullable=False),
        _time("spent_at"),
        sa.PrimaryKeyConstraint("jti_sha256"),
    )
    op.create_table(
        "ended_sign_in",
        sa.Column("actor", sa.String(255), nullable=False),
        sa.Column("sid", sa.String(255), nullable=False),
        _time("ended_at"),
        sa.PrimaryKeyConstraint("actor", "sid"),
    )
    op.add_column("launch_session", _time("actor_since", nullable=True))
    op.add_column("launch_session", sa.Column("context_patient_id", sa.Uuid(), nullable=True))
    op.add_column(
        "launch_session",
        sa.Column("actor_sid", sa.String(255), nullable=False, server_default=sa.text("''")),
    )
    op.add_column(
        "launch_session",
        sa.Column("purpose_of_use", sa.String(16), nullable=False, server_default=sa.text("''")),
    )
    for table, *columns in (
        ("broken_glass", "patient_id", "sub", "broken_at"),
        ("notification", "created_at", "next_attempt_at"),
        ("launch_session", "actor", "actor_sid"),
        ("spent_token", "spent_at"),
        ("ended_sign_in", "ended_at"),
    ):
        for column in columns:
            op.create_index(f"ix_{table}_{column}", table, [column], unique=False)


def _time(name: str, *, nullable: bool = False) -> sa.Column[object]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable)
