"""Ways in which an image could end under the wrong patient, order or bytes; each is closed."""

import asyncio
import json
from io import BytesIO
from pathlib import Path
from typing import Any
from uuid import UUID

import pydicom
import pytest
from pydicom.uid import generate_uid

from app.models import Order, OrderStatus
from tests.fake_orthanc import URL, FakeOrthanc
from tests.images import ct_image
from tests.lightbox import Lightbox, World, make_settings, running


async def send(lightbox: Lightbox, content: bytes, order: Any, **fields: str) -> Any:
    return await lightbox.upload(content, order_id=order["id"], **fields)


async def test_an_orphan_with_other_bytes_is_never_taken_for_the_file(
    lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    """A store that timed out, or a modality, left bytes in Orthanc under the same UIDs."""
    uids = {name: generate_uid(None) for name in ("study_uid", "series_uid", "sop_uid")}
    orphan = ct_image(patient_id="MRN-MINE", PixelData=b"\xaa" * 512, **uids)
    fake_orthanc._store(orphan)
    answer = await send(
        lightbox, ct_image(patient_id="MRN-MINE", PixelData=b"\xbb" * 512, **uids), world.my_order
    )
    assert answer.status_code == 409
    study = f"/api/v1/dicom/studies/{uids['study_uid']}"
    assert (await lightbox.ask("clinician", "GET", study)).status_code == 404
    same = await send(lightbox, orphan, world.my_order)
    assert same.json()["status"] == "duplicate"
    assert (await lightbox.ask("clinician", "GET", study)).status_code == 200


async def test_a_file_without_issuer_is_of_the_sites_own_authority(
    sqlite_url: str, fake_orthanc: FakeOrthanc, tmp_path: Path
) -> None:
    settings = make_settings(sqlite_url, URL, spool_dir=tmp_path, assigning_authority="HOSP")
    async with running(settings) as lightbox:
        ours = await lightbox.patient("M1")
        assert ours["mrn_issuer"] == "HOSP"
        theirs = await lightbox.patient("M1", mrn_issuer="OTHER")
        content = ct_image(patient_id="M1")
        refused = await send(lightbox, content, await lightbox.order(theirs))
        assert refused.status_code == 409
        assert refused.json()["differences"]["IssuerOfPatientID"]["expected"] == "OTHER"
        assert fake_orthanc.instances == {}
        taken = await send(lightbox, content, await lightbox.order(ours))
        assert taken.status_code == 200


async def test_without_an_authority_a_number_of_two_issuers_needs_a_human(
    lightbox: Lightbox, fake_orthanc: FakeOrthanc
) -> None:
    first = await lightbox.patient("M1", mrn_issuer="A")
    await lightbox.patient("M1", mrn_issuer="B")
    order = await lightbox.order(first)
    refused = await send(lightbox, ct_image(patient_id="M1"), order)
    assert refused.status_code == 409
    assert fake_orthanc.instances == {}
    named = ct_image(patient_id="M1", IssuerOfPatientID="A")
    assert (await send(lightbox, named, order)).status_code == 200


async def test_coercion_empties_what_else_says_who_it_was(
    lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    content = ct_image(
        patient_id="VICTIM-77",
        PatientName="Former^Name",
        OtherPatientIDs="VICTIM-78",
        OtherPatientNames="Former^Other",
        PatientAddress="1 Former Street",
        PatientComments="called Former",
    )
    answer = await send(lightbox, content, world.my_order, coerce_patient="true")
    assert answer.status_code == 200
    body = fake_orthanc.bodies[answer.json()["orthanc_instance_id"]]
    assert b"Former" not in body
    assert b"VICTIM" not in body
    stored = pydicom.dcmread(BytesIO(body))
    assert (stored.PatientID, stored.OtherPatientNames) == ("MRN-MINE", "")
    assert any("top level only" in each for each in answer.json()["warnings"])
    (record,) = await lightbox.audit(action="study:coerce", outcome="done")
    assert record["detail"]["coerced"]["PatientAddress"]["file"] == "1 Former Street"
    assert "VICTIM-78" in json.dumps(record["detail"]["coerced"])


async def test_the_same_file_coerced_for_a_second_order_is_a_duplicate_and_linked(
    lightbox: Lightbox, world: World
) -> None:
    content = ct_image(patient_id="OTHER-1")
    first = await send(lightbox, content, world.my_order, coerce_patient="true")
    assert first.json()["status"] == "uploaded"
    second_order = await lightbox.order(world.mine)
    second = await send(lightbox, content, second_order, coerce_patient="true")
    assert second.json()["status"] == "duplicate"
    assert second.json()["coerced"] == {}
    order = await lightbox.must("clinician", "GET", f"/orders/{second_order['id']}")
    assert order["study_instance_uid"] == first.json()["study_instance_uid"]


async def test_an_accession_number_of_another_issuer_is_another_number(
    lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    order = await lightbox.order(world.mine, accession_number="ACC-1", accession_issuer="HERE")
    issuer = pydicom.Dataset()
    issuer.LocalNamespaceEntityID = "ELSEWHERE"
    content = ct_image(
        patient_id="MRN-MINE",
        AccessionNumber="ACC-1",
        IssuerOfAccessionNumberSequence=[issuer],
    )
    stored = dict(fake_orthanc.instances)
    answer = await send(lightbox, content, order)
    assert answer.status_code == 409
    assert "ELSEWHERE" in answer.json()["detail"]
    assert fake_orthanc.instances == stored


async def test_a_study_planned_for_another_order_is_told(lightbox: Lightbox, world: World) -> None:
    other = await lightbox.order(world.mine)
    content = ct_image(patient_id="MRN-MINE", study_uid=other["planned_study_instance_uid"])
    answer = await send(lightbox, content, world.my_order)
    assert any("planned for another order" in each for each in answer.json()["warnings"])


@pytest.mark.parametrize("path", ["/order/{order}", "/patient/{patient}"])
async def test_a_cancelled_order_opens_nothing_more(
    lightbox: Lightbox, world: World, path: str
) -> None:
    """By the order never again; by the patient only where another relation stands."""
    cancelled = {"status": "cancelled"}
    await lightbox.must("service", "PATCH", f"/orders/{world.my_order['id']}", json=cancelled)
    filled = path.format(order=world.my_order["id"], patient=world.mine["id"])
    link = f"/api/v1/dicom/viewer/url{filled}"
    assert (await lightbox.ask("clinician", "GET", link)).status_code == 403
    await lightbox.order(world.mine)
    answer = await lightbox.ask("clinician", "GET", link)
    assert answer.status_code == (409 if "order" in path else 200)


async def test_a_deletion_takes_along_what_an_upload_brought_meanwhile(
    lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    """Linked before the deletion committed, stored after Orthanc had deleted: no orphan stays."""
    late = ct_image(patient_id="MRN-MINE", study_uid=world.my_study)

    def upload() -> None:
        fake_orthanc._store(late)

    fake_orthanc.meanwhile["DELETE"] = upload
    path = f"/api/v1/dicom/studies/{world.my_study}?reason=wrong+side"
    assert (await lightbox.ask("radiologist", "DELETE", path)).status_code == 200
    assert not [
        each for each in fake_orthanc.instances.values() if each.StudyInstanceUID == world.my_study
    ]


async def test_an_upload_whose_study_is_deleted_meanwhile_is_not_linked(
    lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    content = ct_image(patient_id="MRN-MINE")

    def delete() -> None:
        for key in list(fake_orthanc.instances):
            if key not in before:
                del fake_orthanc.instances[key], fake_orthanc.bodies[key]

    before = set(fake_orthanc.instances)
    # First comes the look-up of owners, then the store.
    fake_orthanc.meanwhile["POST"] = lambda: fake_orthanc.meanwhile.update(POST=delete)
    answer = await send(lightbox, content, world.my_order)
    assert answer.status_code == 409
    order = await lightbox.must("clinician", "GET", f"/orders/{world.my_order['id']}")
    assert order["studies"] == [world.my_study]


async def test_an_archive_that_hangs_stops_only_who_needs_it(
    lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    """More callers wait for Orthanc than there are database connections; the others go on."""
    fake_orthanc.held = asyncio.Event()
    link = f"/api/v1/dicom/viewer/url/order/{world.my_order['id']}"
    waiting = [asyncio.create_task(lightbox.ask("clinician", "GET", link)) for _ in range(40)]
    async with asyncio.timeout(60):
        for _ in range(3):
            assert (await lightbox.ask("clinician", "GET", "/api/v1/patients")).status_code == 200
    assert not any(each.done() for each in waiting)
    fake_orthanc.held.set()
    assert [each.status_code for each in await asyncio.gather(*waiting)] == [200] * 40


async def test_an_order_cancelled_while_its_link_was_made_opens_nothing(
    lightbox: Lightbox, world: World
) -> None:
    """Cancelled behind the session's back, and the clinician has another order of the patient."""
    await lightbox.order(world.mine)
    opened = await lightbox.open(f"/order/{world.my_order['id']}")
    async with lightbox.app.state.database.session() as session:
        order = await session.get(Order, UUID(world.my_order["id"]))
        order.status = OrderStatus.CANCELLED
        session.add(order)
        await session.commit()
    assert (await opened.get("/studies")).status_code == 403
