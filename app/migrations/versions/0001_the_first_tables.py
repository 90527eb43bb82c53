"""the first tables

Revision: 0001
Revises: nothing
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "audit_record",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("request_id", sa.String(length=64), nullable=False),
        sa.Column("action", sa.String(length=64), nullable=False),
        sa.Column("outcome", sa.String(length=16), nullable=False),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("actor", sa.String(length=255), nullable=False),
        sa.Column("actor_roles", sa.String(), nullable=False),
        sa.Column("client_address", sa.String(), nullable=False),
        sa.Column("patient_id", sa.Uuid(), nullable=True),
        sa.Column("order_id", sa.Uuid(), nullable=True),
        sa.Column("study_instance_uid", sa.String(length=64), nullable=False),
        sa.Column("ctx", sa.String(length=64), nullable=False),
        sa.Column("detail", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_audit_record_actor", "audit_record", ["actor"], unique=False)
    op.create_index("ix_audit_record_at", "audit_record", ["at"], unique=False)
    op.create_index("ix_audit_record_patient_id", "audit_record", ["patient_id"], unique=False)
    op.create_index("ix_audit_record_request_id", "audit_record", ["request_id"], unique=False)
    op.create_index(
        "ix_audit_record_study_instance_uid", "audit_record", ["study_instance_uid"], unique=False
    )

    op.create_table(
        "patient",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("mrn", sa.String(length=64), nullable=False),
        sa.Column("mrn_issuer", sa.String(length=64), nullable=False),
        sa.Column("first_name", sa.String(), nullable=False),
        sa.Column("last_name", sa.String(), nullable=False),
        sa.Column("dob", sa.Date(), nullable=False),
        sa.Column("sex", sa.String(length=1), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("mrn", "mrn_issuer", name="uq_patient_identifier"),
    )
    op.create_table(
        "care_team_member",
        sa.Column("patient_id", sa.Uuid(), nullable=False),
        sa.Column("sub", sa.String(length=255), nullable=False),
        sa.Column("role", sa.String(), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("added_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("added_by", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(
            ["patient_id"],
            ["patient.id"],
        ),
        sa.PrimaryKeyConstraint("patient_id", "sub"),
    )
    op.create_index("ix_care_team_member_sub", "care_team_member", ["sub"], unique=False)

    op.create_table(
        "imaging_order",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("patient_id", sa.Uuid(), nullable=False),
        sa.Column("order_type", sa.String(), nullable=False),
        sa.Column("order_category", sa.String(), nullable=False),
        sa.Column("description", sa.String(), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("accession_number", sa.String(length=16), nullable=False),
        sa.Column("accession_issuer", sa.String(length=64), nullable=False),
        sa.Column("planned_study_instance_uid", sa.String(length=64), nullable=False),
        sa.Column("scheduled_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("station_ae_title", sa.String(length=16), nullable=False),
        sa.Column("requested_by", sa.String(length=255), nullable=True),
        sa.Column("attending", sa.String(length=255), nullable=True),
        sa.Column("site", sa.String(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["patient_id"],
            ["patient.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("accession_number", "accession_issuer", name="uq_order_accession"),
        sa.UniqueConstraint("planned_study_instance_uid"),
    )
    op.create_index("ix_imaging_order_attending", "imaging_order", ["attending"], unique=False)
    op.create_index("ix_imaging_order_patient_id", "imaging_order", ["patient_id"], unique=False)
    op.create_index(
        "ix_imaging_order_requested_by", "imaging_order", ["requested_by"], unique=False
    )

    op.create_table(
        "study",
        sa.Column("study_instance_uid", sa.String(length=64), nullable=False),
        sa.Column("patient_id", sa.Uuid(), nullable=False),
        sa.Column("orthanc_id", sa.String(length=44), nullable=False),
        sa.Column("dicom_patient_id", sa.String(length=64), nullable=False),
        sa.Column("patient_name", sa.String(), nullable=False),
        sa.Column("patient_birth_date", sa.String(), nullable=False),
        sa.Column("patient_sex", sa.String(), nullable=False),
        sa.Column("study_date", sa.String(), nullable=False),
        sa.Column("study_time", sa.String(), nullable=False),
        sa.Column("study_description", sa.String(), nullable=False),
        sa.Column("accession_number", sa.String(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["patient_id"],
            ["patient.id"],
        ),
        sa.PrimaryKeyConstraint("study_instance_uid"),
    )
    op.create_index("ix_study_accession_number", "study", ["accession_number"], unique=False)
    op.create_index("ix_study_created_at", "study", ["created_at"], unique=False)
    op.create_index("ix_study_patient_id", "study", ["patient_id"], unique=False)
    op.create_index("ix_study_study_date", "study", ["study_date"], unique=False)

    op.create_table(
        "launch_session",
        sa.Column("ctx", sa.String(length=64), nullable=False),
        sa.Column("code_sha256", sa.String(length=64), nullable=False),
        sa.Column("cookie_sha256", sa.String(length=64), nullable=True),
        sa.Column("actor", sa.String(length=255), nullable=False),
        sa.Column("actor_name", sa.String(), nullable=False),
        sa.Column("actor_roles", sa.String(), nullable=False),
        sa.Column("actor_site", sa.String(), nullable=False),
        sa.Column("patient_id", sa.Uuid(), nullable=False),
        sa.Column("order_id", sa.Uuid(), nullable=True),
        sa.Column("opens", sa.String(), nullable=False),
        sa.Column("layout", sa.String(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("code_expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("last_used_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("redeemed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("ended_because", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(
            ["order_id"],
            ["imaging_order.id"],
        ),
        sa.ForeignKeyConstraint(
            ["patient_id"],
            ["patient.id"],
        ),
        sa.PrimaryKeyConstraint("ctx"),
        sa.UniqueConstraint("code_sha256"),
    )
    op.create_index("ix_launch_session_ended_at", "launch_session", ["ended_at"], unique=False)
    op.create_index("ix_launch_session_order_id", "launch_session", ["order_id"], unique=False)
    op.create_index("ix_launch_session_patient_id", "launch_session", ["patient_id"], unique=False)

    op.create_table(
        "order_study",
        sa.Column("order_id", sa.Uuid(), nullable=False),
        sa.Column("study_instance_uid", sa.String(length=64), nullable=False),
        sa.Column("linked_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("linked_by", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(
            ["order_id"],
            ["imaging_order.id"],
        ),
        sa.ForeignKeyConstraint(
            ["study_instance_uid"],
            ["study.study_instance_uid"],
        ),
        sa.PrimaryKeyConstraint("order_id", "study_instance_uid"),
    )
    op.create_index(
        "ix_order_study_study_instance_uid", "order_study", ["study_instance_uid"], unique=False
    )

    op.create_table(
        "series",
        sa.Column("series_instance_uid", sa.String(length=64), nullable=False),
        sa.Column("study_instance_uid", sa.String(length=64), nullable=False),
        sa.Column("modality", sa.String(), nullable=False),
        sa.Column("series_number", sa.Integer(), nullable=True),
        sa.Column("series_description", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(
            ["study_instance_uid"],
            ["study.study_instance_uid"],
        ),
        sa.PrimaryKeyConstraint("series_instance_uid"),
    )
    op.create_index("ix_series_study_instance_uid", "series", ["study_instance_uid"], unique=False)

    op.create_table(
        "instance",
        sa.Column("sop_instance_uid", sa.String(length=64), nullable=False),
        sa.Column("series_instance_uid", sa.String(length=64), nullable=False),
        sa.Column("study_instance_uid", sa.String(length=64), nullable=False),
        sa.Column("orthanc_id", sa.String(length=44), nullable=False),
        sa.Column("sop_class_uid", sa.String(length=64), nullable=False),
        sa.Column("transfer_syntax_uid", sa.String(length=64), nullable=False),
        sa.Column("number_of_frames", sa.Integer(), nullable=False),
        sa.Column("received_sha256", sa.String(length=64), nullable=False),
        sa.Column("received_by", sa.String(), nullable=False),
        sa.Column("received_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["series_instance_uid"],
            ["series.series_instance_uid"],
        ),
        sa.ForeignKeyConstraint(
            ["study_instance_uid"],
            ["study.study_instance_uid"],
        ),
        sa.PrimaryKeyConstraint("sop_instance_uid"),
    )
    op.create_index(
        "ix_instance_series_instance_uid", "instance", ["series_instance_uid"], unique=False
    )
    op.create_index(
        "ix_instance_study_instance_uid", "instance", ["study_instance_uid"], unique=False
    )

    op.create_table(
        "launch_study",
        sa.Column("ctx", sa.String(length=64), nullable=False),
        sa.Column("study_instance_uid", sa.String(length=64), nullable=False),
        sa.Column("first_accessed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("last_accessed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("request_count", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(
            ["ctx"],
            ["launch_session.ctx"],
        ),
        sa.PrimaryKeyConstraint("ctx", "study_instance_uid"),
    )
    op.create_index(
        "ix_launch_study_study_instance_uid", "launch_study", ["study_instance_uid"], unique=False
    )
    _forbid_changes("audit_record")


def _forbid_changes(table: str) -> None:
    """Records are added and read: whatever the role, an UPDATE, DELETE or TRUNCATE fails."""
    if op.get_bind().dialect.name == "postgresql":
        op.execute(
            "CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'audit records are never changed'; END $$"
        )
        op.execute(
            f"CREATE TRIGGER {table}_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON {table} "
            "FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()"
        )
        return
    # REPLACE deletes a row without asking the triggers for that.
    op.execute(
        f"CREATE TRIGGER {table}_no_replace BEFORE INSERT ON {table} "  # noqa: S608
        f"WHEN NEW.id IN (SELECT id FROM {table}) "
        "BEGIN SELECT RAISE(ABORT, 'audit records are never changed'); END"
    )
    for event in ("UPDATE", "DELETE"):
        op.execute(
            f"CREATE TRIGGER {table}_no_{event.lower()} BEFORE {event} ON {table} "
            "BEGIN SELECT RAISE(ABORT, 'audit records are never changed'); END"
        )
