"""studies as they are found in Orthanc, and how far its changes were followed

Revision: 0006
Revises: 0005
"""

from datetime import datetime

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.create_table(
        "arrival",
        _text("orthanc_id", 44),
        _text("study_instance_uid", 64),
        _text("state", 16),
        _text("dicom_patient_id", 64),
        _text("patient_name", 256),
        _text("folded_name", 256),
        _text("patient_birth_date", 16),
        _text("patient_sex", 16),
        _text("accession_number", 64),
        _text("study_date", 16),
        _text("study_time", 32),
        _text("study_description", 256),
        _text("modalities", 256),
        _text("facts"),
        _number("series_count"),
        _number("instance_count"),
        _text("disk_size", 24),
        _text("reasons"),
        _text("candidates"),
        sa.Column("patient_id", sa.Uuid(), nullable=True),
        sa.Column("order_id", sa.Uuid(), nullable=True),
        _text("rule", 32),
        _flag("stable"),
        _flag("backlog"),
        _flag("held"),
        _text("decided_by", 255),
        _time("decided_at", nullable=True),
        _text("decision"),
        _number("version"),
        _time("due_at", nullable=True),
        _number("attempts"),
        _flag("told"),
        _time("arrived_at"),
        _time("changed_at"),
        _time("checked_at"),
        sa.ForeignKeyConstraint(["patient_id"], ["patient.id"]),
        sa.ForeignKeyConstraint(["order_id"], ["imaging_order.id"]),
        sa.PrimaryKeyConstraint("orthanc_id"),
    )
    for name in (
        "study_instance_uid",
        "state",
        "dicom_patient_id",
        "patient_birth_date",
        "accession_number",
        "patient_id",
        "order_id",
        "due_at",
        "arrived_at",
        "checked_at",
    ):
        op.create_index(f"ix_arrival_{name}", "arrival", [name], unique=False)
    op.create_table(
        "arrival_candidate",
        _text("orthanc_id", 44),
        sa.Column("patient_id", sa.Uuid(), nullable=False),
        sa.ForeignKeyConstraint(["orthanc_id"], ["arrival.orthanc_id"], ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["patient_id"], ["patient.id"]),
        sa.PrimaryKeyConstraint("orthanc_id", "patient_id"),
    )
    op.create_index(
        "ix_arrival_candidate_patient_id", "arrival_candidate", ["patient_id"], unique=False
    )
    op.create_table(
        "follower_position",
        _text("name", 16),
        sa.Column("position", sa.BigInteger(), nullable=False),
        _text("mark", 128),
        _flag("listing"),
        _number("listed"),
        _number("to_list"),
        _time("orders_seen_at"),
        _time("swept_at", nullable=True),
        _time("followed_at"),
        sa.PrimaryKeyConstraint("name"),
    )
    _one_patient_a_link()
    op.create_index("ix_imaging_order_updated_at", "imaging_order", ["updated_at"], unique=False)
    op.create_index("ix_patient_created_at", "patient", ["created_at"], unique=False)
    op.create_index("ix_patient_dob", "patient", ["dob"], unique=False)


_POSTGRES_FUNCTION = """
CREATE FUNCTION refuse_link_of_two_patients() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF (SELECT patient_id FROM study WHERE study_instance_uid = NEW.study_instance_uid)
        <> (SELECT patient_id FROM imaging_order WHERE id = NEW.order_id)
    THEN
        RAISE EXCEPTION 'order-and-study-of-two-patients'
            USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    RETURN NEW;
END
$$
"""


def _one_patient_a_link() -> None:
    """An order is answered by studies of its own patient alone, whatever the code says. Where one
    of both is missing, the foreign key refuses it."""
    if op.get_bind().dialect.name != "sqlite":
        op.execute(_POSTGRES_FUNCTION)
        op.execute(
            "CREATE TRIGGER order_study_one_patient BEFORE INSERT OR UPDATE ON order_study"
            " FOR EACH ROW EXECUTE FUNCTION refuse_link_of_two_patients()"
        )
        return
    study = "(SELECT patient_id FROM study WHERE study_instance_uid = NEW.study_instance_uid)"
    order = "(SELECT patient_id FROM imaging_order WHERE id = NEW.order_id)"
    for event in ("INSERT", "UPDATE"):
        op.execute(
            f"CREATE TRIGGER order_study_one_patient_{event.lower()} BEFORE {event} ON order_study"
            f" WHEN {study} <> {order}"
            " BEGIN SELECT RAISE(ABORT, 'order-and-study-of-two-patients'); END"
        )


def _text(name: str, length: int | None = None) -> sa.Column[str]:
    return sa.Column(name, sa.String(length), nullable=False)


def _number(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.Integer(), nullable=False)


def _flag(name: str) -> sa.Column[bool]:
    return sa.Column(name, sa.Boolean(), nullable=False)


def _time(name: str, *, nullable: bool = False) -> sa.Column[datetime]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable)
