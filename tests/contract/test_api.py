"""The contract's tables, row by row: fields, statuses and pages."""

import asyncio
import re
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import httpx
import pytest

from tests.fake_orthanc import FakeOrthanc
from tests.images import ct_image
from tests.lightbox import Lightbox, Shared, World
from tests.tables import contents, rows

API = "/api/v1"
PERSON = {"first_name": "Zoë", "last_name": "Müller", "mrn": "MRN-9", "dob": "1990-02-03"}


async def refused(
    lightbox: Lightbox, status: int, method: str, path: str, **more: Any
) -> httpx.Response:
    """The service asks in vain, and nothing changes."""
    before = contents(lightbox)
    answer = await lightbox.ask("service", method, f"{API}{path}", **more)
    assert answer.status_code == status, answer.text
    assert contents(lightbox) == before
    return answer


# -------------------------------------------------------------------------------------- patients


async def test_a_patient_is_registered_and_read(lightbox: Lightbox) -> None:
    answer = await lightbox.ask("service", "POST", f"{API}/patients", json={**PERSON, "sex": "O"})
    assert answer.status_code == 201
    said = answer.json()
    assert str(UUID(said["id"])) == said["id"]
    assert datetime.fromisoformat(said["created_at"]).utcoffset() == timedelta(0)
    assert {**said, "id": "", "created_at": ""} == {
        **PERSON,
        "sex": "O",
        "mrn_issuer": "",
        "id": "",
        "created_at": "",
        "replaces": [],
    }
    assert await lightbox.must("service", "GET", f"/patients/{said['id']}") == said
    assert await lightbox.must("service", "GET", "/patients", params={"mrn": "MRN-9"}) == [said]
    assert await lightbox.must("service", "GET", "/patients", params={"mrn": "mrn-9"}) == []


async def test_one_patient_for_a_number_and_its_issuer(lightbox: Lightbox) -> None:
    await lightbox.must("service", "POST", "/patients", json=PERSON)
    await refused(lightbox, 409, "POST", "/patients", json=PERSON)
    await refused(lightbox, 409, "POST", "/patients", json={**PERSON, "mrn": " MRN-9 "})
    other = await lightbox.must("service", "POST", "/patients", json={**PERSON, "mrn_issuer": "B"})
    same_number = await lightbox.must("service", "GET", "/patients?mrn=MRN-9")
    assert len(same_number) == 2
    params = {"mrn": "MRN-9", "mrn_issuer": "B"}
    assert await lightbox.must("service", "GET", "/patients", params=params) == [other]


@pytest.mark.parametrize(
    "wrong",
    [
        {"mrn": ""},
        {"mrn": "  "},
        {"mrn": "a\\b"},
        {"mrn": "a\nb"},
        {"mrn": "a\u202eb"},
        {"mrn": "x" * 65},
        {"mrn": None},
        {"mrn": 7},
        {"mrn_issuer": "a\\b"},
        {"last_name": ""},
        {"last_name": "a^b"},
        {"last_name": "a=b"},
        {"first_name": "a\x00b"},
        {"first_name": "x" * 65},
        {"dob": "1799-12-31"},
        {"dob": "2999-01-01"},
        {"dob": "19900203"},
        {"dob": "1990-02-30"},
        {"dob": None},
        {"sex": "female"},
        {"sex": "m"},
    ],
    ids=str,
)
async def test_a_patient_that_dicom_could_not_hold_is_refused(
    wrong: dict[str, Any], untouched: Shared
) -> None:
    answer = await refused(untouched.lightbox, 422, "POST", "/patients", json={**PERSON, **wrong})
    assert answer.json()["errors"]


@pytest.mark.parametrize("missing", PERSON)
async def test_a_patient_has_name_number_and_birthday(missing: str, untouched: Shared) -> None:
    body = {name: value for name, value in PERSON.items() if name != missing}
    await refused(untouched.lightbox, 422, "POST", "/patients", json=body)


async def test_a_care_team_is_put_changed_read_and_emptied(
    lightbox: Lightbox, world: World
) -> None:
    team = f"/patients/{world.mine['id']}/care-team"
    answer = await lightbox.ask("service", "PUT", f"{API}{team}/dr%7Cwho@hospital.test")
    assert answer.status_code == 200
    said = answer.json()
    assert (said["sub"], said["role"], said["expires_at"]) == ("dr|who@hospital.test", "", None)
    assert (said["patient_id"], said["added_by"]) == (world.mine["id"], "service")
    body = {"role": "consultant", "expires_at": "2099-01-01T12:00:00+02:00"}
    changed = await lightbox.must("service", "PUT", f"{team}/dr%7Cwho@hospital.test", json=body)
    assert changed["role"] == "consultant"
    assert changed["expires_at"] == "2099-01-01T10:00:00Z"
    assert await lightbox.must("clinician", "GET", team) == [changed]
    for _ in range(2):  # safe to repeat
        answer = await lightbox.ask("service", "DELETE", f"{API}{team}/dr%7Cwho@hospital.test")
        assert (answer.status_code, answer.content) == (204, b"")
    assert await lightbox.must("service", "GET", team) == []


@pytest.mark.parametrize(
    "body",
    [{"expires_at": "2099-01-01T00:00:00"}, {"expires_at": "soon"}, {"role": "x" * 65}, [], "x"],
    ids=str,
)
async def test_a_member_that_makes_no_sense_is_refused(body: Any, untouched: Shared) -> None:
    path = f"/patients/{untouched.world.mine['id']}/care-team/x"
    await refused(untouched.lightbox, 422, "PUT", path, json=body)


# ---------------------------------------------------------------------------------------- orders

ORDER_FIELDS = {
    "id",
    "patient_id",
    "order_type",
    "order_category",
    "description",
    "status",
    "accession_number",
    "accession_issuer",
    "planned_study_instance_uid",
    "study_instance_uid",
    "studies",
    "scheduled_at",
    "station_ae_title",
    "requested_by",
    "attending",
    "site",
    "procedure_code",
    "procedure_code_system",
    "procedure_code_meaning",
    "protocol_code",
    "protocol_code_system",
    "protocol_code_meaning",
    "performing_physician",
    "referring_physician",
    "requesting_physician",
    "procedure_location",
    "patient_location",
    "patient_state",
    "medical_alerts",
    "allergies",
    "special_needs",
    "patient_weight_kg",
    "pregnancy_status",
    "fulfilled_at",
    "worklist_problem",
    "arriving",
    "created_at",
    "updated_at",
}


async def test_an_order_is_placed_and_read(lightbox: Lightbox) -> None:
    patient = await lightbox.patient()
    body = {
        "patient_id": patient["id"],
        "order_type": "IMAGING",
        "order_category": "CT",
        "description": "CT Schädel",
        "status": "scheduled",
        "accession_number": " ACC-1 ",
        "accession_issuer": "HOSP",
        "scheduled_at": "2030-01-02T03:04:05+01:00",
        "station_ae_title": "CT1",
        "requested_by": "clinician",
    }
    answer = await lightbox.ask("service", "POST", f"{API}/orders", json=body)
    assert answer.status_code == 201
    said = answer.json()
    assert set(said) == ORDER_FIELDS
    changed = {"accession_number": "ACC-1", "scheduled_at": said["scheduled_at"]}
    assert body | changed == {name: said[name] for name in body}
    assert said["scheduled_at"] == "2030-01-02T02:04:05Z"
    assert (said["study_instance_uid"], said["studies"], said["site"]) == (None, [], "main")
    assert re.fullmatch(r"2\.25\.[0-9]{1,39}", said["planned_study_instance_uid"])
    assert await lightbox.must("clinician", "GET", f"/orders/{said['id']}") == said


async def test_an_accession_number_is_made_where_none_is_given(lightbox: Lightbox) -> None:
    patient = await lightbox.patient()
    orders = [await lightbox.order(patient, accession_number=number) for number in ("", " ", None)]
    numbers = {each["accession_number"] for each in orders}
    assert len(numbers) == 3
    assert all(re.fullmatch(r"[0-9]{2}-[0-9A-Z]{13}", each) for each in numbers)
    assert len({each["planned_study_instance_uid"] for each in orders}) == 3


async def test_an_accession_number_is_used_once_by_its_issuer(lightbox: Lightbox) -> None:
    patient = await lightbox.patient()
    await lightbox.order(patient, accession_number="A")
    body = {"patient_id": patient["id"], "accession_number": "A"}
    await refused(lightbox, 409, "POST", "/orders", json=body)
    other = await lightbox.order(patient, accession_number="A", accession_issuer="B")
    found = await lightbox.must("service", "GET", "/orders", params={"accession_number": "A"})
    assert len(found) == 2
    assert other in found


@pytest.mark.parametrize(
    ("wrong", "status"),
    [
        ({"patient_id": str(UUID(int=7))}, 404),
        ({"patient_id": "MRN-1"}, 422),
        ({"patient_id": None}, 422),
        ({"order_type": "LAB"}, 422),
        ({"order_category": "ct"}, 422),
        ({"order_category": "C" * 17}, 422),
        ({"description": "a\\b"}, 422),
        ({"description": "a\nb"}, 422),
        ({"description": "x" * 65}, 422),
        ({"status": "done"}, 422),
        ({"accession_number": "x" * 17}, 422),
        ({"accession_number": "a\\b"}, 422),
        ({"scheduled_at": "2030-01-01T00:00:00"}, 422),
        ({"scheduled_at": "0001-01-01T00:00:00+14:00"}, 422),
        ({"scheduled_at": "9999-12-31T23:59:59-14:00"}, 422),
        ({"station_ae_title": "x" * 17}, 422),
        ({"requested_by": ""}, 422),
        ({"requested_by": "a\x00"}, 422),
    ],
    ids=str,
)
async def test_an_order_that_makes_no_sense_is_refused(
    wrong: dict[str, Any], status: int, untouched: Shared
) -> None:
    body = {"patient_id": untouched.world.mine["id"], **wrong}
    await refused(untouched.lightbox, status, "POST", "/orders", json=body)


async def test_orders_are_found_by_patient_number_and_status(
    lightbox: Lightbox, world: World
) -> None:
    done = await lightbox.order(world.mine, status="completed", accession_number="DONE")
    for params, expected in (
        ({"patient_id": world.mine["id"]}, {world.my_order["id"], done["id"]}),
        ({"accession_number": "DONE"}, {done["id"]}),
        ({"accession_number": "done"}, set()),
        ({"status": "completed"}, {done["id"]}),
        ({"status": "cancelled"}, set()),
        ({"patient_id": world.theirs["id"], "status": "completed"}, set()),
    ):
        found = await lightbox.must("service", "GET", "/orders", params=params)
        assert {each["id"] for each in found} == expected, params


async def test_a_patch_changes_what_it_names_and_nothing_else(
    lightbox: Lightbox, world: World
) -> None:
    order = await lightbox.order(world.mine)  # whose status no image has a say in
    path = f"/orders/{order['id']}"
    before = await lightbox.must("service", "GET", path)
    for change in (
        {"status": "in-progress"},
        {"description": "", "order_category": "MR"},
        {"attending": "dr-who"},
        {"attending": None},
        {"scheduled_at": "2031-01-01T00:00:00Z"},
        {"scheduled_at": None},
        {},
    ):
        after = await lightbox.must("service", "PATCH", path, json=change)
        assert after["updated_at"] >= before["updated_at"]
        assert after == {**before, **change, "updated_at": after["updated_at"]}
        assert await lightbox.must("service", "GET", path) == after
        before = after


@pytest.mark.parametrize(
    "change",
    [
        {"status": None},
        {"description": None},
        {"status": "unknown"},
        {"patient_id": str(UUID(int=7))},
        {"accession_number": "NEW"},
        {"planned_study_instance_uid": "1.2.3"},
        {"study_instance_uid": "1.2.3"},
        {"site": "north"},
        {"id": str(UUID(int=7))},
        {"order_category": "a\\b"},
        {"requested_by": ""},
    ],
    ids=str,
)
async def test_a_patch_cannot_change_what_an_order_is(
    change: dict[str, Any], untouched: Shared
) -> None:
    path = f"/orders/{untouched.world.my_order['id']}"
    await refused(untouched.lightbox, 422, "PATCH", path, json=change)


async def test_cancelled_cannot_be_taken_back(lightbox: Lightbox, world: World) -> None:
    path = f"/orders/{world.my_order['id']}"
    for _ in range(2):
        said = await lightbox.must("service", "PATCH", path, json={"status": "cancelled"})
        assert said["status"] == "cancelled"
    for status in ("scheduled", "in-progress", "completed"):
        await refused(lightbox, 409, "PATCH", path, json={"status": status})
    assert said["studies"] == [world.my_study], "what was stored stays linked"


# --------------------------------------------------------------------------------------- studies

STUDY_FIELDS = {
    "StudyInstanceUID",
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "StudyDescription",
    "AccessionNumber",
    "ModalitiesInStudy",
    "NumberOfStudyRelatedSeries",
    "NumberOfStudyRelatedInstances",
    "order_id",
    "order_ids",
    "patient_id",
    "created_at",
}


async def test_a_study_is_told_by_its_keywords(shared: Shared) -> None:
    world, must = shared.world, shared.lightbox.must
    study = await must("clinician", "GET", f"/dicom/studies/{world.my_study}")
    series = study.pop("series")
    assert set(study) == STUDY_FIELDS
    assert {name: value for name, value in study.items() if name != "created_at"} == {
        "StudyInstanceUID": world.my_study,
        "PatientID": "MRN-MINE",
        "PatientName": "Doe^Jane",
        "PatientBirthDate": "19800101",
        "PatientSex": "F",
        "StudyDate": "20250102",
        "StudyTime": "101500",
        "StudyDescription": "CT test",
        "AccessionNumber": "",
        "ModalitiesInStudy": ["CT"],
        "NumberOfStudyRelatedSeries": 1,
        "NumberOfStudyRelatedInstances": 1,
        "order_id": world.my_order["id"],
        "order_ids": [world.my_order["id"]],
        "patient_id": world.mine["id"],
    }
    assert series == [
        {
            "SeriesInstanceUID": world.my_image["series_instance_uid"],
            "Modality": "CT",
            "SeriesNumber": 1,
            "SeriesDescription": "",
            "NumberOfSeriesRelatedInstances": 1,
        }
    ]
    for path in ("", f"/patient/{world.mine['id']}", f"/order/{world.my_order['id']}"):
        assert await must("clinician", "GET", f"/dicom/studies{path}") == [study]


async def test_studies_are_counted_and_ordered(lightbox: Lightbox, world: World) -> None:
    order = world.my_order["id"]
    uids = {"study_uid": world.my_study, "series_uid": world.my_image["series_instance_uid"]}
    for more in (uids, {"study_uid": world.my_study, "Modality": "SR", "SeriesNumber": 2}):
        sent = await lightbox.upload(ct_image(patient_id="MRN-MINE", **more), order_id=order)
        assert sent.is_success, sent.text
    newer = ct_image(patient_id="MRN-MINE", StudyDate="20260101")
    new_uid = (await lightbox.upload(newer, order_id=order)).json()["study_instance_uid"]
    found = await lightbox.must("clinician", "GET", f"/dicom/studies/order/{order}")
    assert [each["StudyInstanceUID"] for each in found] == [world.my_study, new_uid]
    assert found[0]["ModalitiesInStudy"] == ["CT", "SR"]
    assert found[0]["NumberOfStudyRelatedSeries"] == 2
    assert found[0]["NumberOfStudyRelatedInstances"] == 3
    of_patient = await lightbox.must(
        "clinician", "GET", f"/dicom/studies/patient/{world.mine['id']}"
    )
    assert [each["StudyInstanceUID"] for each in of_patient] == [new_uid, world.my_study]


@pytest.mark.parametrize(
    ("params", "found"),
    [
        ({"mrn": "MRN-MINE"}, "mine"),
        ({"mrn": "mrn-mine"}, ""),
        ({"modality": "CT"}, "both"),
        ({"modality": "MR"}, ""),
        ({"modality": "ct"}, ""),
        ({"study_date_from": "2025-01-02"}, "mine"),
        ({"study_date_from": "2025-01-03"}, ""),
        ({"study_date_to": "2025-01-01"}, "theirs"),
        ({"study_date_from": "2024-04-04", "study_date_to": "2024-04-04"}, "theirs"),
        ({"study_date_from": "2025-01-01", "study_date_to": "2024-01-01"}, ""),
        ({"description": "SECRET"}, "theirs"),
        ({"description": "%"}, ""),
        ({"description": "_"}, ""),
        ({"description": "CT", "mrn": "MRN-VICTIM"}, ""),
    ],
    ids=str,
)
async def test_studies_are_searched(params: dict[str, str], found: str, shared: Shared) -> None:
    world = shared.world
    expected = {
        "mine": {world.my_study},
        "theirs": {world.their_study},
        "both": {world.my_study, world.their_study},
        "": set(),
    }
    rows_found = await shared.lightbox.must("service", "GET", "/dicom/studies", params=params)
    assert {each["StudyInstanceUID"] for each in rows_found} == expected[found]


@pytest.mark.parametrize(
    "query",
    [
        "patient_id=MRN-1",
        "study_date_from=20250101",
        "study_date_from=2025-13-01",
        "modality=" + "C" * 17,
        "limit=0",
        "limit=201",
        "limit=x",
        "order_id=" + str(UUID(int=7)),
    ],
)
async def test_a_search_that_makes_no_sense_is_refused(query: str, untouched: Shared) -> None:
    await refused(untouched.lightbox, 422, "GET", f"/dicom/studies?{query}")


async def test_pages_show_every_row_once(pages: Lightbox) -> None:
    lists = {"/patients": "id", "/orders": "id", "/dicom/studies": "StudyInstanceUID"}
    for path, key in lists.items():
        everything = [each[key] for each in await pages.must("service", "GET", f"{path}?limit=200")]
        assert len(everything) == 7
        for limit in (1, 2, 3, 7, 8):
            link: str | None = f"{API}{path}?limit={limit}"
            seen: list[str] = []
            while link is not None:
                answer = await pages.ask("service", "GET", link)
                page = [each[key] for each in answer.json()]
                following = answer.headers.get("link")
                assert len(page) == limit or following is None
                assert page, "no page is empty"
                seen += page
                link = following and following[1:].partition(">")[0]
            assert seen == everything


async def test_a_next_page_keeps_the_filter(pages: Lightbox) -> None:
    answer = await pages.ask("service", "GET", f"{API}/orders?limit=2&status=arriving")
    link = answer.headers["link"][1:].partition(">")[0]
    assert dict(httpx.URL(link).params).keys() == {"limit", "status", "cursor"}
    answer = await pages.ask("service", "GET", f"{API}/orders?limit=2&status=completed")
    assert answer.json() == []
    assert "link" not in answer.headers


async def test_fifty_rows_are_a_page_by_default(lightbox: Lightbox) -> None:
    patient = await lightbox.patient()
    for _ in range(51):
        await lightbox.order(patient)
    answer = await lightbox.ask("service", "GET", f"{API}/orders")
    assert len(answer.json()) == 50
    assert "link" in answer.headers


@pytest.fixture
async def pages(lightbox: Lightbox) -> Lightbox:
    """Seven patients, with an order and a study each."""
    for n in range(7):
        patient = await lightbox.patient(f"MRN-{n}")
        order = await lightbox.order(patient)
        sent = await lightbox.upload(ct_image(patient_id=f"MRN-{n}"), order_id=order["id"])
        assert sent.is_success
    return lightbox


# -------------------------------------------------------------------------------------- deletion


async def test_a_deletion_needs_a_reason(untouched: Shared) -> None:
    path = f"/dicom/studies/{untouched.world.my_study}"
    for query in ("", "?reason=", "?reason=%20%20%20%20", "?reason=no", "?reason=" + "x" * 501):
        answer = await refused(untouched.lightbox, 422, "DELETE", path + query)
        assert "reason" in answer.json()["detail"]
    await refused(untouched.lightbox, 422, "DELETE", path, params={"why": "because"})


async def test_a_deleted_study_is_gone_for_whoever_could_see_it(
    lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    view = await lightbox.open(f"/{world.my_study}")
    path = f"/dicom/studies/{world.my_study}"
    said = await lightbox.must("service", "DELETE", path, params={"reason": "wrong patient"})
    assert said == {
        "status": "deleted",
        "study_instance_uid": world.my_study,
        "series_deleted": 1,
        "instances_deleted": 1,
        "order_ids": [world.my_order["id"]],
        "viewers_ended": 1,
    }
    assert len(fake_orthanc.instances) == 1, "the other patient's"
    for role in ("clinician", "service", "radiologist"):
        for where in (path, f"/dicom/viewer/url/{world.my_study}"):
            assert (await lightbox.ask(role, "GET", f"{API}{where}")).status_code == 404
    order = await lightbox.must("clinician", "GET", f"/orders/{world.my_order['id']}")
    assert (order["study_instance_uid"], order["studies"]) == (None, [])
    for where in (f"order/{world.my_order['id']}", f"patient/{world.mine['id']}"):
        assert await lightbox.must("clinician", "GET", f"/dicom/studies/{where}") == []
    assert await lightbox.must("clinician", "GET", "/dicom/studies") == []
    assert (await view.get(f"/studies/{world.my_study}/series")).status_code == 403
    await refused(lightbox, 404, "DELETE", f"{path}?reason=again")


async def test_a_deleted_study_may_be_sent_again(
    lightbox: Lightbox, world: World, fake_orthanc: FakeOrthanc
) -> None:
    body = fake_orthanc.bodies[world.my_image["orthanc_instance_id"]]
    path = f"/dicom/studies/{world.my_study}?reason=to+be+sent+again"
    await lightbox.must("service", "DELETE", path)
    said = await lightbox.upload(body, order_id=world.my_order["id"])
    assert said.json() == world.my_image


# ------------------------------------------------------------------------------ health and numbers


async def test_health_is_public_and_names_nobody(shared: Shared) -> None:
    answer = await shared.lightbox.client.get(f"{API}/dicom/health")
    assert answer.status_code == 200
    said = answer.json()
    assert (said["status"], said["orthanc_version"]) == ("healthy", "1.10.1")
    assert (said["orthanc"], said["database"], said["problems"]) == ("up", "up", [])
    assert rows(shared.lightbox, "SELECT * FROM audit_record WHERE action = 'health'") == []


async def test_numbers_are_numbers_only(shared: Shared) -> None:
    said = await shared.lightbox.must("admin", "GET", "/dicom/stats")
    size = said.pop("disk_size_mb")
    assert 0 < size < 1
    assert said == {
        "total_patients": 2,
        "total_studies": 2,
        "total_series": 2,
        "total_instances": 2,
        "registered_patients": 2,
        "orders": 2,
        "orders_with_images": 2,
        "linked_studies": 2,
        "follower": {
            "following": False,
            "position": 0,
            "listed": 0,
            "to_list": 0,
            "to_look_at": 0,
            "waiting": 0,
            "problem": "",
        },
    }


async def test_the_document_names_every_path_of_the_contract(shared: Shared) -> None:
    answer = await shared.lightbox.client.get("/openapi.json")
    said = answer.json()
    contract = {
        "/patients": {"get", "post"},
        "/patients/{patient_id}": {"get"},
        "/patients/{patient_id}/care-team/{sub}": {"put", "delete"},
        "/orders": {"get", "post"},
        "/orders/{order_id}": {"get", "patch"},
        "/dicom/upload": {"post"},
        "/dicom/upload-multiple": {"post"},
        "/dicom/read-tags": {"post"},
        "/dicom/modify-tags": {"post"},
        "/dicom/studies": {"get"},
        "/dicom/studies/{study_instance_uid}": {"get", "delete"},
        "/dicom/studies/patient/{patient_id}": {"get"},
        "/dicom/studies/order/{order_id}": {"get"},
        "/dicom/viewer/url/{study_instance_uid}": {"get"},
        "/dicom/viewer/url/order/{order_id}": {"get"},
        "/dicom/viewer/url/patient/{patient_id}": {"get"},
        "/dicom/health": {"get"},
        "/dicom/stats": {"get"},
        "/audit": {"get"},
    }
    for path, methods in contract.items():
        assert methods <= said["paths"][f"{API}{path}"].keys(), path
    assert (await shared.lightbox.client.get("/docs")).status_code == 200


async def test_two_may_put_the_same_person_on_a_care_team_at_once(
    lightbox: Lightbox, world: World
) -> None:
    path = f"{API}/patients/{world.mine['id']}/care-team/dr.new"
    answers = await asyncio.gather(
        *(lightbox.ask("service", "PUT", path, json={"role": f"r{each}"}) for each in range(8))
    )
    assert {each.status_code for each in answers} == {200}
    team = await lightbox.must("service", "GET", f"/patients/{world.mine['id']}/care-team")
    assert [each["sub"] for each in team].count("dr.new") == 1
