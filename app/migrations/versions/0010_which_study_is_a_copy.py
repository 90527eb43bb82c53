"""which study is a copy

Revision: 0010
Revises: 0009
"""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    op.create_table(
        "study_copy",
        sa.Column("orthanc_id", sa.String(44), nullable=False),
        sa.Column("original_id", sa.String(44), nullable=False),
        sa.Column("root_id", sa.String(44), nullable=False),
        sa.Column("operation", sa.String(32), nullable=False),
        sa.Column("original_goes", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("orthanc_id"),
    )
    op.create_index("ix_study_copy_root_id", "study_copy", ["root_id"], unique=False)
