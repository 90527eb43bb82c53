"""the trail's chain, and under what right a thing was done

Revision: 0003
Revises: 0002
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("audit_record", _text("purpose_of_use", 16))
    op.add_column("audit_record", _text("sha256", 64))


def _text(name: str, length: int) -> sa.Column[str]:
    return sa.Column(name, sa.String(length), nullable=False, server_default=sa.text("''"))
