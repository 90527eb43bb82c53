"""what a modality's worklist says of an order, and since when

Revision: 0005
Revises: 0004
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

TEXTS = {
    "procedure_code": 16,
    "procedure_code_system": 16,
    "procedure_code_meaning": 64,
    "protocol_code": 16,
    "protocol_code_system": 16,
    "protocol_code_meaning": 64,
    "performing_physician": 64,
    "referring_physician": 64,
    "requesting_physician": 64,
    "procedure_location": 16,
    "patient_location": 64,
    "patient_state": 64,
    "medical_alerts": 64,
    "allergies": 64,
    "special_needs": 64,
    "worklist_problem": 512,
}


def upgrade() -> None:
    for name, length in TEXTS.items():
        text = sa.Column(name, sa.String(length), nullable=False, server_default=sa.text("''"))
        op.add_column("imaging_order", text)
    op.add_column("imaging_order", sa.Column("patient_weight_kg", sa.Float(), nullable=True))
    op.add_column("imaging_order", sa.Column("pregnancy_status", sa.Integer(), nullable=True))
    for name in ("fulfilled_at", "worklist_published_at"):
        moment = sa.Column(name, sa.DateTime(timezone=True), nullable=True)
        op.add_column("imaging_order", moment)
    # The worklist asks for what is recent, several times a second all copies together.
    for name in ("scheduled_at", "created_at"):
        op.create_index(f"ix_imaging_order_{name}", "imaging_order", [name], unique=False)
