"""Both databases for real: migrations, who may change what, and many requests at once."""

import asyncio
import re
from collections import Counter
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from psycopg import errors
from pydicom.uid import generate_uid
from sqlalchemy.engine import make_url
from sqlmodel import SQLModel

from app import models
from app.db import AUDIT_TABLE, migrate, utcnow
from tests.images import ct_image
from tests.lightbox import Lightbox, running
from tests.live.conftest import (
    Archive,
    DatabaseUrls,
    Person,
    audit_of,
    command,
    environment_of,
    make_person,
    migrated,
    settings_for,
    unique,
)
from tests.servers import PostgresServer

ALL_AT_ONCE_SECONDS = 25.0  # less than a pool waits before it gives up


def connect(url: str) -> psycopg.Connection[Any]:
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    return psycopg.connect(plain, autocommit=True)


# ------------------------------------------------------------------------------- the tables


def test_migrations_make_what_the_models_say(database: DatabaseUrls) -> None:
    """Or the next migration that is generated would hold somebody else's change."""
    engine = sa.create_engine(database.sync_owner)
    with engine.connect() as connection:
        context = MigrationContext.configure(
            connection, opts={"compare_type": True, "compare_server_default": True}
        )
        assert compare_metadata(context, SQLModel.metadata) == []
        tables = set(sa.inspect(connection).get_table_names())
    engine.dispose()
    assert tables == {*SQLModel.metadata.tables, "alembic_version"}
    assert models.AuditRecord.__tablename__ == AUDIT_TABLE


def test_migrating_again_changes_nothing(database: DatabaseUrls) -> None:
    """The demo does it at every start, and compose before every release."""
    role = make_url(database.app).username
    migrate(database.owner, role)
    migrate(database.owner, role)


def test_the_command_line_migrates_and_grants(postgres: PostgresServer, archive: Archive) -> None:
    """`migrate` as an operator runs it; and `serve`, which says in a sentence what is missing."""
    owner_url, app_url = postgres.create_database()
    environment = environment_of(
        settings_for(app_url, archive.server, migration_database_url=owner_url)
    )
    refused = command("serve", "--port", "0", environment=environment)
    assert refused.returncode != 0
    assert "run `python -m app migrate`" in refused.stdout + refused.stderr
    done = command("migrate", environment=environment)
    assert (done.returncode, done.stdout) == (0, "The database is up to date.\n"), done.stderr
    with connect(app_url) as app:
        assert app.execute("SELECT count(*) FROM audit_record").fetchone() == (0,)


async def refusal_to_start(url: str, archive: Archive) -> str:
    with pytest.raises(RuntimeError) as raised:
        async with running(settings_for(url, archive.server)):
            pass
    return str(raised.value)


async def test_it_does_not_start_on_an_unmigrated_sqlite(archive: Archive, tmp_path: Path) -> None:
    said = await refusal_to_start(f"sqlite+aiosqlite:///{tmp_path / 'empty.sqlite'}", archive)
    assert "revision none" in said
    assert "python -m app migrate" in said


async def test_it_does_not_start_on_an_unmigrated_postgresql(
    archive: Archive, postgres: PostgresServer
) -> None:
    _, app_url = postgres.create_database()
    assert "revision none" in await refusal_to_start(app_url, archive)


async def test_it_does_not_start_as_a_role_that_could_change_the_trail(
    archive: Archive, postgres: PostgresServer
) -> None:
    """Owner, superuser, member of the owner's role, or with one right too many."""
    urls = migrated(postgres.create_database())
    superuser = make_url(postgres.admin_url).set(database=make_url(urls.app).database)
    for url in (urls.owner, superuser.render_as_string(hide_password=False)):
        assert "could change the audit trail" in await refusal_to_start(url, archive)
    owner, app = make_url(urls.owner).username, make_url(urls.app).username
    with connect(superuser.render_as_string(hide_password=False)) as admin:
        for grant, revoke in (
            (f"GRANT {owner} TO {app}", f"REVOKE {owner} FROM {app}"),
            *(
                (
                    f"GRANT {right} ON {AUDIT_TABLE} TO {app}",
                    f"REVOKE {right} ON {AUDIT_TABLE} FROM {app}",
                )
                for right in ("UPDATE", "DELETE", "TRUNCATE")
            ),
        ):
            admin.execute(grant)
            said = await refusal_to_start(urls.app, archive)
            assert "could change the audit trail" in said, grant
            admin.execute(revoke)
    async with running(settings_for(urls.app, archive.server)):
        pass


# ------------------------------------------------------------------------- the trail's tables

RECORD = (
    "INSERT INTO audit_record (id, at, request_id, action, outcome, reason, actor, actor_roles, "
    "client_address, study_instance_uid, ctx, detail) VALUES (1, '2025-01-01 00:00:00+00', 'r', "
    "'study:view', 'granted', '', 'somebody', '', '', '', '', '{}')"
)
FORBIDDEN_TO_THE_APP = [
    "UPDATE audit_record SET actor = 'nobody'",
    "DELETE FROM audit_record",
    "TRUNCATE audit_record",
    "DROP TABLE audit_record",
    "ALTER TABLE audit_record DISABLE TRIGGER ALL",
    "ALTER TABLE audit_record RENAME TO forgotten",
    "DROP TRIGGER audit_record_append_only ON audit_record",
    "DROP FUNCTION refuse_change() CASCADE",
    "CREATE OR REPLACE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN END'",
    "SET session_replication_role = replica",
    "CREATE TABLE own (text text)",
    "CREATE RULE forget AS ON INSERT TO audit_record DO INSTEAD NOTHING",
    "UPDATE alembic_version SET version_num = '0000'",
]
FORBIDDEN_TO_ALL = [
    "UPDATE audit_record SET actor = 'nobody'",
    "DELETE FROM audit_record",
    "TRUNCATE audit_record",
]


def test_the_application_can_only_add_to_the_trail(postgres: PostgresServer) -> None:
    urls = migrated(postgres.create_database())
    with connect(urls.app) as app:
        app.execute(RECORD)
        for statement in FORBIDDEN_TO_THE_APP:
            with pytest.raises(errors.InsufficientPrivilege):
                app.execute(statement)
        # PostgreSQL warns, and grants nothing.
        app.execute("GRANT UPDATE ON audit_record TO CURRENT_USER")
        with pytest.raises(errors.InsufficientPrivilege):
            app.execute("UPDATE audit_record SET actor = 'nobody'")
        assert app.execute("SELECT actor FROM audit_record").fetchall() == [("somebody",)]


def test_a_trigger_stops_even_the_owner(database: DatabaseUrls) -> None:
    """A slip of an administrator, not an attack: who owns the table can drop the trigger."""
    engine = sa.create_engine(database.sync_owner)
    with engine.begin() as connection:
        connection.execute(sa.text(RECORD))
    for statement in FORBIDDEN_TO_ALL if database.is_postgres else FORBIDDEN_TO_ALL[:2]:
        with (
            pytest.raises(sa.exc.DBAPIError, match="audit records are never changed"),
            engine.begin() as connection,
        ):
            connection.execute(sa.text(statement))
    with engine.connect() as connection:
        actors = connection.execute(sa.text("SELECT actor FROM audit_record")).scalars().all()
    engine.dispose()
    assert actors == ["somebody"]


async def test_an_order_and_a_study_of_two_patients_are_never_linked(live: Lightbox) -> None:
    """Whatever the code says: `answer_order` is the first to refuse it, the database the last."""
    one, other = await make_person(live), await make_person(live)
    uid = uid_of(one.mrn)
    sent = await live.upload(ct_image(patient_id=one.mrn, study_uid=uid), order_id=one.order["id"])
    assert sent.status_code == 200, sent.text
    theirs = {"order_id": UUID(other.order["id"]), "study_instance_uid": uid}
    table: sa.Table = models.OrderStudy.__table__  # type: ignore[attr-defined]
    for statement in (
        sa.insert(table).values(**theirs, linked_at=utcnow(), linked_by="somebody"),
        sa.update(table).where(table.c.study_instance_uid == uid).values(**theirs),
    ):
        async with live.app.state.database.writing_session() as session:
            connection = await session.connection()
            with pytest.raises(sa.exc.IntegrityError, match="order-and-study-of-two-patients"):
                await connection.execute(statement)
    assert (await live.must("service", "GET", f"/orders/{other.order['id']}"))["studies"] == []


# ------------------------------------------------------------------------- many at the same time


async def at_once(*requests: Any) -> list[Any]:
    """All of them, before any pool would have given up waiting."""
    return await asyncio.wait_for(asyncio.gather(*requests), ALL_AT_ONCE_SECONDS)


async def test_parallel_uploads_of_a_study_link_it_once(live: Lightbox, archive: Archive) -> None:
    person = await make_person(live)
    study = uid_of(person.mrn)
    series = [uid_of(study, number) for number in (1, 2)]
    answers = await at_once(
        *(
            live.upload(
                ct_image(
                    patient_id=person.mrn,
                    study_uid=study,
                    series_uid=series[number % 2],
                    InstanceNumber=number + 1,
                ),
                order_id=person.order["id"],
            )
            for number in range(16)
        )
    )
    assert Counter(each.status_code for each in answers) == {200: 16}, [a.text for a in answers]
    order = await live.must("clinician", "GET", f"/orders/{person.order['id']}")
    assert order["studies"] == [study]
    (found,) = await live.must(
        "clinician", "GET", f"/dicom/studies?patient_id={order['patient_id']}"
    )
    assert found["NumberOfStudyRelatedSeries"] == 2
    assert found["NumberOfStudyRelatedInstances"] == 16
    assert archive.owners(study) == [person.mrn]


def uid_of(*seeds: object) -> str:
    """The UID that belongs to these seeds."""
    return str(generate_uid(entropy_srcs=[str(each) for each in seeds]))


async def test_the_same_file_in_parallel_is_stored_once(live: Lightbox) -> None:
    """A sender that did not wait for the answer and tried again."""
    person = await make_person(live)
    content = ct_image(patient_id=person.mrn)
    answers = await at_once(*(live.upload(content, order_id=person.order["id"]) for _ in range(8)))
    assert [each.status_code for each in answers] == [200] * 8
    assert sorted(each.json()["status"] for each in answers) == ["duplicate"] * 7 + ["uploaded"]
    (found,) = await live.must("clinician", "GET", f"/dicom/studies/order/{person.order['id']}")
    assert found["NumberOfStudyRelatedInstances"] == 1


@pytest.mark.parametrize("same_image", [False, True], ids=["own-image", "same-image"])
@pytest.mark.parametrize("same_mrn", [False, True], ids=["own-mrn", "same-mrn"])
async def test_of_two_patients_racing_for_a_study_one_wins(
    live: Lightbox, archive: Archive, same_mrn: bool, same_image: bool
) -> None:
    """The loser's file is nowhere: not linked, and not left in the archive; the winner's is.

    With the same MRN, of two issuers, both are one patient to Orthanc: only our tables decide.
    """
    for _ in range(3):
        mrn, study = unique(), uid_of(unique())
        racers = []
        for issuer in ("site-1", "site-2"):
            patient = await live.patient(mrn if same_mrn else unique(), mrn_issuer=issuer)
            racers.append(Person(patient["mrn"], patient, await live.order(patient)))
        same = {"series_uid": uid_of(study, 1), "sop_uid": uid_of(study, 2)} if same_image else {}
        answers = await at_once(
            *(
                live.upload(
                    ct_image(
                        patient_id=each.mrn,
                        study_uid=study,
                        IssuerOfPatientID=each.patient["mrn_issuer"],
                        **same,
                    ),
                    order_id=each.order["id"],
                )
                for each in racers
            )
        )
        by_status = {answer.status_code: index for index, answer in enumerate(answers)}
        assert set(by_status) == {200, 409}, [each.text for each in answers]
        winner, loser = racers[by_status[200]], racers[by_status[409]]
        assert archive.owners(study) == [winner.mrn]
        instances = archive.ask("GET", f"/dicom-web/studies/{study}/instances").json()
        assert [each["00080018"]["Value"][0] for each in instances] == [
            answers[by_status[200]].json()["sop_instance_uid"]
        ]
        for person, studies in ((winner, [study]), (loser, [])):
            order = await live.must("clinician", "GET", f"/orders/{person.order['id']}")
            assert order["studies"] == studies
        # Nobody is locked out by the other's try.
        link = await live.ask("clinician", "GET", f"/api/v1/dicom/viewer/url/{study}")
        assert link.status_code == 200, link.text


async def test_two_browsers_that_redeem_one_code(live: Lightbox) -> None:
    """One gets the cookie, the other the page that says so; and both are on record."""
    person = await make_person(live)
    await live.upload(ct_image(patient_id=person.mrn), order_id=person.order["id"])
    for _ in range(3):
        link = await live.must("clinician", "GET", f"/dicom/viewer/url/order/{person.order['id']}")
        code = link["url"].partition("launch=")[2]
        answers = await at_once(
            *(live.client.get("/viewer", params={"launch": code}) for _ in range(4))
        )
        live.client.cookies.clear()
        statuses = sorted(each.status_code for each in answers)
        assert statuses == [303, 410, 410, 410], [each.text for each in answers]
        refused = [each for each in answers if each.status_code == 410]
        assert all("set-cookie" not in each.headers for each in refused)
        assert all("used already" in each.text for each in refused)
    opened = await live.audit(patient_id=person.patient["id"], action="session:open")
    assert len(audit_of(opened, "session:open", "granted")) == 3
    assert [each["reason"] for each in audit_of(opened, "session:open", "denied")] == ["used"] * 9


async def test_a_first_access_is_recorded_once(live: Lightbox) -> None:
    """However many frames a viewer asks for at the same moment (PS3.15 A.5)."""
    person = await make_person(live)
    uploaded = (
        await live.upload(ct_image(patient_id=person.mrn), order_id=person.order["id"])
    ).json()
    opened = await live.open(f"/order/{person.order['id']}")
    series = f"/series/{uploaded['series_instance_uid']}"
    frame = (
        f"/studies/{uploaded['study_instance_uid']}{series}"
        f"/instances/{uploaded['sop_instance_uid']}/frames/1"
    )
    answers = await at_once(*(opened.get(frame) for _ in range(20)))
    assert [each.status_code for each in answers] == [200] * 20
    (location,) = {each.headers["x-accel-redirect"] for each in answers}
    inner = f"/instances/{uploaded['orthanc_instance_id']}/frames/0/raw"
    assert re.fullmatch(f"/_orthanc-kept/[0-9a-f]{{16}}{inner}", location)
    records = await live.audit(patient_id=person.patient["id"], action="study:view")
    (first,) = [
        each for each in records if each["ctx"] == opened.ctx and each["outcome"] == "granted"
    ]
    assert first["study_instance_uid"] == uploaded["study_instance_uid"]
    assert first["actor"] == "clinician"
    # The others are counted, and summarised when the viewer ends.
    await live.must(
        "service", "PATCH", f"/orders/{person.order['id']}", json={"status": "cancelled"}
    )
    (ended,) = await live.audit(patient_id=person.patient["id"], action="session:end")
    (study,) = ended["detail"]["studies"]
    assert study["request_count"] == 20
    assert (await opened.get(frame)).status_code == 403


async def test_sixty_requests_at_once_do_not_wait_for_each_other(live: Lightbox) -> None:
    """Each holds a connection while it waits for its record: the trail has a pool of its own."""
    person = await make_person(live)
    uploaded = (
        await live.upload(ct_image(patient_id=person.mrn), order_id=person.order["id"])
    ).json()
    uid = uploaded["study_instance_uid"]
    answers = await at_once(
        *(live.ask("clinician", "GET", f"/api/v1/dicom/studies/{uid}") for _ in range(20)),
        *(live.ask("clinician", "GET", f"/api/v1/dicom/viewer/url/{uid}") for _ in range(20)),
        *(
            live.upload(ct_image(patient_id=person.mrn, study_uid=uid), order_id=person.order["id"])
            for _ in range(10)
        ),
        *(
            live.ask("clinician", "GET", f"/api/v1/dicom/studies/{uid}", sub="stranger")
            for _ in range(10)
        ),
    )
    statuses = [each.status_code for each in answers]
    assert statuses == [200] * 50 + [403] * 10, Counter(statuses)


async def test_orders_with_one_accession_number_collide(live: Lightbox) -> None:
    """The table decides, not a look before the insert."""
    person = await make_person(live)
    number = unique("A")[:16]
    body = {"patient_id": person.patient["id"], "accession_number": number}
    answers = await at_once(
        *(live.ask("service", "POST", "/api/v1/orders", json=body) for _ in range(4))
    )
    assert sorted(each.status_code for each in answers) == [201, 409, 409, 409]
