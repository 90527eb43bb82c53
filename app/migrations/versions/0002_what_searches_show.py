"""what searches show, and kept metadata

Revision: 0002
Revises: 0001
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

COLUMNS = ("patient_name", "study_description", "folded_name", "folded_description", "generation")


def upgrade() -> None:
    op.add_column("study", _text("folded_name", "''"))
    op.add_column("study", _text("folded_description", "''"))
    op.add_column("study", _text("folded_referring_physician", "''"))
    op.add_column("study", _text("study_id", "''"))
    op.add_column("study", _text("attributes", "'{}'"))
    op.add_column(
        "study",
        sa.Column("generation", sa.String(32), nullable=False, server_default=sa.text("''")),
    )
    op.add_column("series", _text("attributes", "'{}'"))
    op.add_column("instance", sa.Column("instance_number", sa.Integer(), nullable=True))
    op.add_column("instance", sa.Column("rows", sa.Integer(), nullable=True))
    op.add_column("instance", sa.Column("columns", sa.Integer(), nullable=True))
    op.add_column("instance", _text("attributes", "'{}'"))
    # What is there already: its descriptions folded as far as the database can, its own names.
    postgresql = op.get_bind().dialect.name == "postgresql"
    name = "substr(md5(random()::text), 1, 16)" if postgresql else "lower(hex(randomblob(8)))"
    study = sa.table("study", *map(sa.column, COLUMNS))
    op.execute(
        study.update().values(
            folded_name=sa.func.lower(study.c.patient_name),
            folded_description=sa.func.lower(study.c.study_description),
            generation=sa.text(name),
        )
    )
    op.create_index("ix_study_folded_name", "study", ["folded_name"], unique=False)
    op.create_table(
        "series_metadata",
        sa.Column("series_instance_uid", sa.String(length=64), nullable=False),
        sa.Column("study_instance_uid", sa.String(length=64), nullable=False),
        sa.Column("stamp", sa.String(length=64), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["series_instance_uid"], ["series.series_instance_uid"]),
        sa.ForeignKeyConstraint(["study_instance_uid"], ["study.study_instance_uid"]),
        sa.PrimaryKeyConstraint("series_instance_uid"),
    )
    op.create_index(
        "ix_series_metadata_study_instance_uid",
        "series_metadata",
        ["study_instance_uid"],
        unique=False,
    )


def _text(name: str, default: str) -> sa.Column[str]:
    return sa.Column(name, sa.String(), nullable=False, server_default=sa.text(default))
