"""Two records of one patient become one, and are taken apart again; and who tries to use that.

`world`: `mine` is the clinician's, `theirs` is `other`'s. Most tests merge theirs into mine.
"""

import asyncio
import sqlite3
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from pydicom.uid import generate_uid

from app.dicom import Header
from app.intake import Intake
from tests.images import ct_image
from tests.lightbox import Lightbox, World
from tests.tables import REFUSE_RECORDS, change, contents, moment, records, rows

pytestmark = pytest.mark.anyio
API = "/api/v1"
WHY = {"reason": "the same person, registered twice"}


async def merge(lightbox: Lightbox, source: Any, into: Any, **more: Any) -> httpx.Response:
    return await lightbox.ask(
        "service",
        "POST",
        f"{API}/patients/{source['id']}/merge",
        json={"into": into["id"], **WHY},
        **more,
    )


async def merged(lightbox: Lightbox, source: Any, into: Any) -> Any:
    answer = await merge(lightbox, source, into)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def unmerge(lightbox: Lightbox, source: Any, **more: Any) -> httpx.Response:
    return await lightbox.ask(
        "service", "POST", f"{API}/patients/{source['id']}/unmerge", json={**WHY, **more}
    )


async def restrict(lightbox: Lightbox, patient: Any, level: str, *named: str) -> None:
    body = {"level": level, "named": list(named), "reason": "privacy"}
    await lightbox.must("service", "PUT", f"/patients/{patient['id']}/restriction", json=body)


async def restriction(lightbox: Lightbox, patient: Any) -> tuple[str | None, list[str]]:
    said = await lightbox.must("service", "GET", f"/patients/{patient['id']}/restriction")
    return said["level"], said["named"]


async def studies(lightbox: Lightbox, patient: Any) -> list[str]:
    said = await lightbox.must("service", "GET", f"/dicom/studies/patient/{patient['id']}")
    return sorted(each["StudyInstanceUID"] for each in said)


async def may_read(lightbox: Lightbox, sub: str, patient: Any) -> bool:
    answer = await lightbox.ask("clinician", "GET", f"{API}/patients/{patient['id']}", sub=sub)
    assert answer.status_code in (200, 403), answer.text
    return answer.status_code == 200


def standing(lightbox: Lightbox) -> list[str]:
    """All that is kept but what a merge writes of itself, and times of changes."""
    ours = ("patient_merge", "merged_row", "notification", "idempotency_key")
    with_times = '"imaging_order"'
    kept = [
        each
        for each in contents(lightbox)
        if not any(f'INTO "{name}"' in each for name in ours) and with_times not in each
    ]
    orders = rows(lightbox, "SELECT * FROM imaging_order ORDER BY id")
    return sorted([*kept, *(str({**each, "updated_at": ""}) for each in orders)])


# --------------------------------------------------------------------------- what becomes one


async def test_the_survivor_has_the_record_of_both(lightbox: Lightbox, world: World) -> None:
    said = await merged(lightbox, world.theirs, world.mine)
    assert said["merged_into"] == world.mine["id"]
    assert (said["moved"]["study"], said["moved"]["order"]) == (1, 1)
    assert await studies(lightbox, world.mine) == sorted([world.my_study, world.their_study])
    order = await lightbox.must("service", "GET", f"/orders/{world.their_order['id']}")
    assert order["patient_id"] == world.mine["id"]
    # The files keep their PatientID, which a viewer shows: the EHR is told.
    assert said["under_other_number"] == [
        {"StudyInstanceUID": world.their_study, "PatientID": "MRN-VICTIM"}
    ]
    assert "keep the PatientID" in said["warnings"][0]
    # Who treats either treats the one.
    for sub in ("clinician", "other"):
        link = await lightbox.must(
            "clinician", "GET", f"/dicom/viewer/url/{world.my_study}", sub=sub
        )
        assert link["patient_id"] == world.mine["id"]


async def test_the_old_id_leads_to_the_survivor(lightbox: Lightbox, world: World) -> None:
    await merged(lightbox, world.theirs, world.mine)
    path = f"{API}/patients/{world.theirs['id']}"
    answer = await lightbox.ask("service", "GET", path)
    said = answer.json()
    assert answer.headers["content-location"] == f"{API}/patients/{world.mine['id']}"
    assert (said["id"], said["mrn"]) == (world.mine["id"], world.mine["mrn"])
    assert said["replaces"] == [{"id": world.theirs["id"], "mrn": "MRN-VICTIM", "mrn_issuer": ""}]
    assert await studies(lightbox, world.theirs) == await studies(lightbox, world.mine)
    link = await lightbox.must(
        "clinician", "GET", f"/dicom/viewer/url/patient/{world.theirs['id']}"
    )
    assert link["patient_id"] == world.mine["id"]
    for mrn in ("MRN-VICTIM", world.mine["mrn"]):
        found = await lightbox.must("service", "GET", "/patients", params={"mrn": mrn})
        assert [each["id"] for each in found] == [world.mine["id"]]
    everybody = await lightbox.must("service", "GET", "/patients")
    assert [each["id"] for each in everybody] == [world.mine["id"]]


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/orders", {"patient_id": "{old}"}),
        ("PATCH", "/patients/{old}", {"first_name": "Vera"}),
        ("PUT", "/patients/{old}/care-team/somebody", {}),
        ("DELETE", "/patients/{old}/care-team/other", None),
        ("PUT", "/patients/{old}/restriction", {"level": "vip"}),
        ("DELETE", "/patients/{old}/restriction", None),
        ("POST", "/patients/{old}/merge", {"into": "{new}", **WHY}),
    ],
)
async def test_nothing_is_written_to_the_old_id(
    lightbox: Lightbox, world: World, method: str, path: str, body: Any
) -> None:
    await merged(lightbox, world.theirs, world.mine)
    before = standing(lightbox)
    ids = {"{old}": world.theirs["id"], "{new}": world.mine["id"]}
    filled = body and {name: ids.get(value, value) for name, value in body.items()}
    address = path.replace("{old}", world.theirs["id"])
    answer = await lightbox.ask("service", method, f"{API}{address}", json=filled)
    assert answer.status_code == 409, answer.text
    assert answer.json()["merged_into"] == world.mine["id"]
    assert standing(lightbox) == before


async def test_its_number_is_not_given_away(lightbox: Lightbox, world: World) -> None:
    await merged(lightbox, world.theirs, world.mine)
    person = {"first_name": "N", "last_name": "N", "dob": "1990-01-01", "mrn": "MRN-VICTIM"}
    answer = await lightbox.ask("service", "POST", f"{API}/patients", json=person)
    assert answer.status_code == 409


async def test_files_under_the_retired_number_are_the_survivors(
    lightbox: Lightbox, world: World
) -> None:
    await merged(lightbox, world.theirs, world.mine)
    for fields in (
        {"order_id": world.their_order["id"]},
        {"patient_id": world.mine["id"]},
        {"patient_id": world.theirs["id"]},
        {},
    ):
        sent = await lightbox.upload(ct_image(patient_id="MRN-VICTIM"), **fields)
        assert sent.status_code == 200, sent.text
        assert sent.json()["patient_id"] == world.mine["id"]
        assert sent.json()["coerced"] == {}
    refused = await lightbox.upload(
        ct_image(patient_id="MRN-THIRD"), order_id=world.their_order["id"]
    )
    assert refused.status_code == 409


async def test_it_is_on_record_under_both_ids(lightbox: Lightbox, world: World) -> None:
    await lightbox.must("clinician", "GET", f"/patients/{world.theirs['id']}", sub="other")
    answer = await merge(lightbox, world.theirs, world.mine)
    done = [
        each
        for each in records(lightbox, answer.headers["x-request-id"])
        if each["outcome"] == "done"
    ]
    assert {UUID(hex=each["patient_id"]) for each in done} == {
        UUID(world.mine["id"]),
        UUID(world.theirs["id"]),
    }
    assert all(each["detail"]["reason"] == WHY["reason"] for each in done)
    # The trail's own records stay as they were, and the report covers both.
    kept = await lightbox.audit(patient_id=world.theirs["id"], action="patient:read", actor="other")
    assert len(kept) == 1
    report = await lightbox.must("service", "GET", f"/patients/{world.mine['id']}/access-report")
    assert "other" in str(report)


# --------------------------------------------------------------------------- what is refused


async def test_not_into_itself(lightbox: Lightbox, world: World) -> None:
    assert (await merge(lightbox, world.mine, world.mine)).status_code == 422


async def test_not_in_a_circle_and_not_twice(lightbox: Lightbox, world: World) -> None:
    await merged(lightbox, world.theirs, world.mine)
    third = await lightbox.patient("MRN-3")
    for source, into in (
        (world.mine, world.theirs),  # back
        (third, world.theirs),  # into who is retired
        (world.theirs, third),  # again, elsewhere
        (world.theirs, world.mine),  # again
    ):
        answer = await merge(lightbox, source, into)
        assert answer.status_code == 409, answer.text
        assert answer.json()["merged_into"] == world.mine["id"]


async def test_a_chain_leads_to_its_end_and_is_taken_apart_from_there(
    lightbox: Lightbox, world: World
) -> None:
    third = await lightbox.patient("MRN-3")
    before = standing(lightbox)
    await merged(lightbox, world.theirs, world.mine)
    await merged(lightbox, world.mine, third)
    assert len(await studies(lightbox, world.theirs)) == 2
    said = await lightbox.must("service", "GET", f"/patients/{world.theirs['id']}")
    assert said["id"] == third["id"]
    assert [each["id"] for each in said["replaces"]] == [world.mine["id"], world.theirs["id"]]
    sent = await lightbox.upload(ct_image(patient_id="MRN-VICTIM"), patient_id=third["id"])
    assert sent.status_code == 200, sent.text
    uid = sent.json()["study_instance_uid"]
    await lightbox.must("service", "DELETE", f"/dicom/studies/{uid}", params={"reason": "a test"})
    refused = await unmerge(lightbox, world.theirs)
    assert refused.status_code == 409
    assert refused.json()["first"] == world.mine["id"]
    for each in (world.mine, world.theirs):
        assert (await unmerge(lightbox, each)).status_code == 200
    assert standing(lightbox) == before


@pytest.mark.parametrize("role", ["clinician", "radiologist", "technologist", "admin", "auditor"])
async def test_only_the_ehr_merges(lightbox: Lightbox, world: World, role: str) -> None:
    for verb in ("merge", "unmerge"):
        answer = await lightbox.ask(
            role,
            "POST",
            f"{API}/patients/{world.mine['id']}/{verb}",
            json={"into": world.theirs["id"], **WHY},
        )
        assert answer.status_code == 403


async def test_a_token_for_one_patient_merges_no_other_into_them(
    lightbox: Lightbox, world: World
) -> None:
    claims = {"sub": "ehr", "roles": ["service"], "patient": world.mine["id"]}
    claims["scope"] = "system/*.cruds"
    before = standing(lightbox)
    for source, into in ((world.mine, world.theirs), (world.theirs, world.mine)):
        answer = await lightbox.ask(
            None,
            "POST",
            f"{API}/patients/{source['id']}/merge",
            claims=claims,
            json={"into": into["id"], **WHY},
        )
        assert answer.status_code == 403, answer.text
    assert standing(lightbox) == before


async def test_unknown_patients_are_not_found(lightbox: Lightbox, world: World) -> None:
    nobody = {"id": str(uuid4())}
    assert (await merge(lightbox, nobody, world.mine)).status_code == 404
    assert (await merge(lightbox, world.mine, nobody)).status_code == 404
    assert (await unmerge(lightbox, nobody)).status_code == 404
    assert (await unmerge(lightbox, world.mine)).status_code == 409


async def test_without_its_record_nothing_is_merged(lightbox: Lightbox, world: World) -> None:
    before = standing(lightbox)
    change(
        lightbox, REFUSE_RECORDS.replace("BEGIN SELECT", "WHEN NEW.outcome = 'done' BEGIN SELECT")
    )
    assert (await merge(lightbox, world.theirs, world.mine)).status_code == 503
    assert [each for each in standing(lightbox) if "no_more_records" not in each] == before


# -------------------------------------------------------------------------- rights, and attacks


@pytest.mark.parametrize("restricted", ["mine", "theirs"])
@pytest.mark.parametrize("level", ["vip", "sealed"])
async def test_a_restriction_is_not_laundered_by_a_merge(
    lightbox: Lightbox, world: World, restricted: str, level: str
) -> None:
    """Either way round: who was not let through sees nothing of the one record; an open viewer
    of theirs ends at its next request."""
    viewer = await lightbox.open(f"/{world.my_study}")
    both = {"mine": world.mine, "theirs": world.theirs}
    if restricted == "theirs":
        await restrict(lightbox, world.theirs, level, "other")
    else:
        await restrict(lightbox, world.mine, level, "other")
        viewer = await lightbox.open(f"/{world.their_study}", sub="other")
        # `other` is named; put them off the list of the one, to see them fall.
        await restrict(lightbox, world.mine, level, "nobody-else")
    said = await merged(lightbox, world.theirs, world.mine)
    assert said["restriction"] == level
    outsider = "clinician" if restricted == "theirs" else "other"
    for patient in both.values():
        assert not await may_read(lightbox, outsider, patient)
    answer = await viewer.get(f"/studies/{viewer.link['study_instance_uids'][0]}/metadata")
    assert answer.status_code == 403
    ended = rows(lightbox, "SELECT ended_because FROM launch_session WHERE ctx = ?", viewer.ctx)
    assert ended == [{"ended_because": "restricted"}]
    # Lifted on the survivor, and taken apart: it is the retired one's again.
    await lightbox.must("service", "DELETE", f"/patients/{world.mine['id']}/restriction")
    assert (await unmerge(lightbox, world.theirs)).status_code == 200
    if restricted == "theirs":
        assert (await restriction(lightbox, world.theirs))[0] == level
        assert not await may_read(lightbox, "clinician", world.theirs)


async def test_of_two_restrictions_the_stricter_holds_for_those_of_both(
    lightbox: Lightbox, world: World
) -> None:
    await restrict(lightbox, world.mine, "vip", "clinician", "both")
    await restrict(lightbox, world.theirs, "sealed", "other", "both")
    await merged(lightbox, world.theirs, world.mine)
    assert await restriction(lightbox, world.mine) == ("sealed", ["both"])
    assert not await may_read(lightbox, "clinician", world.mine)
    assert not await may_read(lightbox, "other", world.mine)
    assert (await unmerge(lightbox, world.theirs)).status_code == 200
    assert await restriction(lightbox, world.mine) == ("vip", ["both", "clinician"])
    assert await restriction(lightbox, world.theirs) == ("sealed", ["both", "other"])


async def test_what_was_tightened_since_holds_for_both(lightbox: Lightbox, world: World) -> None:
    await merged(lightbox, world.theirs, world.mine)
    await restrict(lightbox, world.mine, "sealed", "clinician")
    assert (await unmerge(lightbox, world.theirs)).status_code == 200
    for patient in (world.mine, world.theirs):
        assert await restriction(lightbox, patient) == ("sealed", ["clinician"])
    assert not await may_read(lightbox, "other", world.theirs)


async def test_a_broken_glass_does_not_reach_a_stricter_record(
    lightbox: Lightbox, world: World
) -> None:
    reason = {"reason_code": "emergency-treatment", "reason_text": "Unconscious in the ER."}
    path = f"/patients/{world.theirs['id']}/break-glass"
    await lightbox.must("clinician", "POST", path, sub="third", json=reason)
    await restrict(lightbox, world.mine, "vip", "clinician")
    assert await may_read(lightbox, "third", world.theirs)
    assert not await may_read(lightbox, "third", world.mine)
    await merged(lightbox, world.theirs, world.mine)
    assert not await may_read(lightbox, "third", world.mine)
    assert not await may_read(lightbox, "third", world.theirs)
    assert (await unmerge(lightbox, world.theirs)).status_code == 200
    assert await may_read(lightbox, "third", world.theirs)
    assert not await may_read(lightbox, "third", world.mine)


@pytest.mark.parametrize("broken_for", ["retired", "survivor"])
async def test_a_glass_broken_for_one_vip_opens_no_other(
    broken_for: str, lightbox: Lightbox, world: World
) -> None:
    for each in (world.mine, world.theirs):
        await restrict(lightbox, each, "vip", "nobody")
    of = {"retired": world.theirs, "survivor": world.mine}[broken_for]
    reason = {"reason_code": "emergency-treatment", "reason_text": "Unconscious in the ER."}
    await lightbox.must("clinician", "POST", f"/patients/{of['id']}/break-glass", json=reason)
    assert await may_read(lightbox, "clinician", of)
    await merged(lightbox, world.theirs, world.mine)
    assert not await may_read(lightbox, "clinician", world.mine)
    assert (await unmerge(lightbox, world.theirs)).status_code == 200
    assert await may_read(lightbox, "clinician", of)


async def test_why_of_the_old_id_is_the_survivors(lightbox: Lightbox, world: World) -> None:
    await merged(lightbox, world.theirs, world.mine)
    path = f"/dicom/viewer/why/patient/{world.theirs['id']}"
    assert (await lightbox.must("clinician", "GET", path))["can_open"] is True


async def test_a_link_by_a_token_for_the_retired_one_ends_with_the_merge(
    lightbox: Lightbox, world: World
) -> None:
    claims = {"sub": "clinician", "roles": ["clinician"], "patient": world.mine["id"]}
    path = f"/api/v1/dicom/viewer/url/{world.my_study}"
    links = [(await lightbox.ask(None, "GET", path, claims=claims)).json() for _ in range(2)]
    await lightbox.app.state.metadata.settled()
    codes = [each["url"].partition("launch=")[2] for each in links]
    opened = await lightbox.client.get("/viewer", params={"launch": codes[0]})
    assert opened.status_code == 303
    await merged(lightbox, world.mine, world.theirs)
    answer = await lightbox.client.get("/viewer", params={"launch": codes[1]})
    assert answer.status_code == 403
    ctx = httpx.URL(opened.headers["location"]).params["ctx"]
    cookie = {"Cookie": opened.headers["set-cookie"].partition(";")[0]}
    lightbox.client.cookies.clear()
    answer = await lightbox.client.get(f"/s/{ctx}/dicom-web/studies", headers=cookie)
    assert answer.status_code == 403


async def test_the_glass_is_broken_by_the_old_id(lightbox: Lightbox, world: World) -> None:
    """An emergency knows no merged records."""
    await merged(lightbox, world.theirs, world.mine)
    reason = {"reason_code": "emergency-treatment", "reason_text": "Unconscious in the ER."}
    path = f"/patients/{world.theirs['id']}/break-glass"
    await lightbox.must("clinician", "POST", path, sub="third", json=reason)
    assert await may_read(lightbox, "third", world.mine)


async def test_care_teams_are_joined_and_parted(lightbox: Lightbox, world: World) -> None:
    async def put(patient: Any, sub: str, **body: Any) -> None:
        await lightbox.must(
            "service", "PUT", f"/patients/{patient['id']}/care-team/{sub}", json=body
        )

    soon, late = "2040-01-01T00:00:00Z", "2041-01-01T00:00:00Z"
    await put(world.theirs, "kept", role="nurse")
    await put(world.theirs, "gone-since")
    await put(world.theirs, "shortened", expires_at=late)
    await put(world.mine, "on-both", expires_at=soon)
    await put(world.theirs, "on-both", expires_at=late)
    await merged(lightbox, world.theirs, world.mine)
    team = {
        each["sub"]: each["expires_at"]
        for each in await lightbox.must("service", "GET", f"/patients/{world.mine['id']}/care-team")
    }
    assert team == {"kept": None, "gone-since": None, "shortened": late, "on-both": late}
    assert await may_read(lightbox, "kept", world.mine)
    mine = f"/patients/{world.mine['id']}/care-team"
    await lightbox.must("service", "DELETE", f"{mine}/gone-since")
    await put(world.mine, "shortened", expires_at=soon)
    await put(world.mine, "new")
    assert (await unmerge(lightbox, world.theirs)).status_code == 200
    parted = {
        patient["mrn"]: {
            each["sub"]: each["expires_at"]
            for each in await lightbox.must(
                "service", "GET", f"/patients/{patient['id']}/care-team"
            )
        }
        for patient in (world.mine, world.theirs)
    }
    assert parted["MRN-VICTIM"] == {"kept": None, "shortened": soon, "on-both": late}
    assert parted[world.mine["mrn"]] == {"shortened": soon, "on-both": soon, "new": None}


async def test_open_viewers_go_on_while_the_right_stands(lightbox: Lightbox, world: World) -> None:
    mine = await lightbox.open(f"/{world.my_study}")
    theirs = await lightbox.open(f"/{world.their_study}", sub="other")
    await merged(lightbox, world.theirs, world.mine)
    for viewer, uid in ((mine, world.my_study), (theirs, world.their_study)):
        assert (await viewer.get(f"/studies/{uid}/metadata")).status_code == 200
    # Neither shows more than it was opened for.
    assert (await mine.get(f"/studies/{world.their_study}/metadata")).status_code == 404
    # One that shows both ends when they are taken apart.
    both = await lightbox.open(f"/patient/{world.mine['id']}")
    assert (await both.get(f"/studies/{world.their_study}/metadata")).status_code == 200
    said = (await unmerge(lightbox, world.theirs)).json()
    assert said["viewers_ended"] == 1
    assert (await both.get(f"/studies/{world.my_study}/metadata")).status_code == 403
    assert (await theirs.get(f"/studies/{world.their_study}/metadata")).status_code == 200
    assert (await mine.get(f"/studies/{world.my_study}/metadata")).status_code == 200


async def test_an_upload_under_way_is_not_left_under_the_retired(
    lightbox: Lightbox, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file was the retired patient's when it came, and is stored after the merge: it is
    refused and taken back, and sent again it is the survivor's."""
    waits, go = asyncio.Event(), asyncio.Event()
    there = Intake._study_is_there

    async def late(self: Intake, header: Header) -> bool:
        waits.set()
        await go.wait()
        return await there(self, header)

    monkeypatch.setattr(Intake, "_study_is_there", late)
    uid = generate_uid(None)
    image = ct_image(patient_id="MRN-VICTIM", study_uid=uid)
    sending = asyncio.create_task(lightbox.upload(image, patient_id=world.theirs["id"]))
    await asyncio.wait_for(waits.wait(), 10)
    try:
        await merged(lightbox, world.theirs, world.mine)
    finally:
        go.set()
    refused = await sending
    assert refused.status_code == 409, refused.text
    assert uid not in str(rows(lightbox, "SELECT study_instance_uid FROM study"))
    assert (await lightbox.upload(image, patient_id=world.theirs["id"])).status_code == 200
    assert uid in await studies(lightbox, world.mine)


async def test_the_database_itself_refuses_rows_of_the_retired(
    lightbox: Lightbox, world: World
) -> None:
    await lightbox.open(f"/{world.my_study}")
    await merged(lightbox, world.theirs, world.mine)
    retired = UUID(world.theirs["id"]).hex
    for statement in (
        "INSERT INTO care_team_member VALUES (?, 'x', '', NULL, '2026-01-01 00:00:00.0', 'x')",
        "INSERT INTO patient_restriction VALUES (?, 'vip', '', '2026-01-01 00:00:00.000000', 'x')",
        "INSERT INTO named_person VALUES (?, 'x')",
        "UPDATE study SET patient_id = ?",
        "UPDATE imaging_order SET patient_id = ?",
        "UPDATE launch_session SET patient_id = ?",
    ):
        with pytest.raises(sqlite3.IntegrityError, match="patient-retired"):
            change(lightbox, statement, retired)


async def test_merges_at_the_same_moment_end_in_one_survivor(lightbox: Lightbox) -> None:
    a, b, c = [await lightbox.patient(f"MRN-{n}") for n in range(3)]
    answers = await asyncio.gather(
        merge(lightbox, a, b), merge(lightbox, b, c), merge(lightbox, c, a)
    )
    assert {each.status_code for each in answers} <= {200, 409}
    assert sum(each.status_code == 200 for each in answers) == 2
    ends = {
        (await lightbox.must("service", "GET", f"/patients/{each['id']}"))["id"]
        for each in (a, b, c)
    }
    assert len(ends) == 1


# ------------------------------------------------------------------------------------- apart


async def test_taking_apart_restores_what_was_there(lightbox: Lightbox, world: World) -> None:
    await restrict(lightbox, world.theirs, "vip", "other")
    await lightbox.must("service", "PUT", f"/patients/{world.theirs['id']}/care-team/other")
    before = standing(lightbox)
    await merged(lightbox, world.theirs, world.mine)
    assert standing(lightbox) != before
    answer = await unmerge(lightbox, world.theirs)
    assert answer.status_code == 200, answer.text
    after = standing(lightbox)
    times = ("patient_restriction",)  # written anew, with the time of that
    assert [each for each in after if not any(t in each for t in times)] == [
        each for each in before if not any(t in each for t in times)
    ]
    assert await restriction(lightbox, world.theirs) == ("vip", ["other"])
    assert await studies(lightbox, world.theirs) == [world.their_study]
    assert await studies(lightbox, world.mine) == [world.my_study]
    assert not await may_read(lightbox, "clinician", world.theirs)
    again = await unmerge(lightbox, world.theirs)
    assert again.status_code == 409


async def test_what_came_since_stays_but_for_the_retired_number(
    lightbox: Lightbox, world: World
) -> None:
    await merged(lightbox, world.theirs, world.mine)
    new_order = await lightbox.order(world.mine)
    uids = {}
    for mrn in ("MRN-VICTIM", "MRN-MINE"):
        sent = await lightbox.upload(ct_image(patient_id=mrn), patient_id=world.mine["id"])
        uids[mrn] = sent.json()["study_instance_uid"]
    answer = await unmerge(lightbox, world.theirs)
    assert answer.status_code == 200, answer.text
    assert await studies(lightbox, world.theirs) == sorted([world.their_study, uids["MRN-VICTIM"]])
    assert await studies(lightbox, world.mine) == sorted([world.my_study, uids["MRN-MINE"]])
    said = await lightbox.must("service", "GET", f"/orders/{new_order['id']}")
    assert said["patient_id"] == world.mine["id"]


async def test_what_nobody_can_tell_has_to_be_decided(lightbox: Lightbox, world: World) -> None:
    """An order that came since has images under the retired number; and one is linked to a study
    of the other."""
    await merged(lightbox, world.theirs, world.mine)
    since = await lightbox.order(world.mine)
    sent = await lightbox.upload(ct_image(patient_id="MRN-VICTIM"), order_id=since["id"])
    uid = sent.json()["study_instance_uid"]
    change(
        lightbox,
        "INSERT INTO order_study VALUES (?, ?, ?, 'somebody')",
        *(UUID(world.my_order["id"]).hex, world.their_study, moment()),
    )
    before = standing(lightbox)
    answer = await unmerge(lightbox, world.theirs)
    assert answer.status_code == 409
    undecided = answer.json()["undecided"]
    assert sorted(undecided, key=str) == sorted(
        [
            {
                "order_id": since["id"],
                "order": "survivor",
                "study_instance_uid": uid,
                "study": "retired",
            },
            {
                "order_id": world.my_order["id"],
                "order": "survivor",
                "study_instance_uid": world.their_study,
                "study": "retired",
            },
        ],
        key=str,
    )
    assert standing(lightbox) == before
    # The one is decided; the other can only be a wrong link.
    orders = {since["id"]: True}
    assert len((await unmerge(lightbox, world.theirs, orders=orders)).json()["undecided"]) == 1
    wrong = {"order_id": world.my_order["id"], "study_instance_uid": world.their_study}
    answer = await unmerge(lightbox, world.theirs, orders=orders, unlink=[wrong])
    assert answer.status_code == 200, answer.text
    said = await lightbox.must("service", "GET", f"/orders/{since['id']}")
    assert (said["patient_id"], said["studies"]) == (world.theirs["id"], [uid])
    said = await lightbox.must("service", "GET", f"/orders/{world.my_order['id']}")
    assert (said["patient_id"], said["studies"]) == (world.mine["id"], [world.my_study])


async def test_of_equal_numbers_nobody_can_tell(lightbox: Lightbox) -> None:
    """By two issuers; images that carry none could be of either."""
    a = await lightbox.patient("MRN-7", mrn_issuer="NORTH")
    b = await lightbox.patient("MRN-7", mrn_issuer="SOUTH")
    await merged(lightbox, a, b)
    sent = await lightbox.upload(
        ct_image(patient_id="MRN-7", IssuerOfPatientID="NORTH"),
        role="service",
        patient_id=b["id"],
    )
    assert sent.status_code == 200, sent.text
    uid = sent.json()["study_instance_uid"]
    answer = await unmerge(lightbox, a)
    assert answer.status_code == 409
    assert [each["study_instance_uid"] for each in answer.json()["undecided"]] == [uid]
    assert (await unmerge(lightbox, a, studies={uid: True})).status_code == 200
    assert await studies(lightbox, a) == [uid]


async def test_what_is_not_to_be_decided_is_refused(lightbox: Lightbox, world: World) -> None:
    await merged(lightbox, world.theirs, world.mine)
    pair = {"order_id": world.my_order["id"], "study_instance_uid": world.my_study}
    for decisions in (
        {"orders": {world.their_order["id"]: False}},  # it was the retired one's
        {"orders": {world.my_order["id"]: True}},  # it was the survivor's
        {"studies": {world.my_study: True}},
        {"studies": {world.their_study: False}},
        {"unlink": [pair]},
    ):
        answer = await unmerge(lightbox, world.theirs, **decisions)
        assert answer.status_code == 422, decisions
    assert await studies(lightbox, world.theirs) == sorted([world.my_study, world.their_study])


# -------------------------------------------------------------------------------- corrections


async def test_a_correction_lists_what_contradicts_it_and_ends_its_viewers(
    lightbox: Lightbox, world: World
) -> None:
    viewer = await lightbox.open(f"/{world.my_study}")
    path = f"/patients/{world.mine['id']}"
    said = await lightbox.must("service", "PATCH", path, json={"first_name": "Janet"})
    assert (said["contradictions"], said["viewers_ended"]) == ([], 0)
    assert (await viewer.get(f"/studies/{world.my_study}/metadata")).status_code == 200
    said = await lightbox.must("service", "PATCH", path, json={"dob": "1955-05-05"})
    (found,) = said["contradictions"]
    assert found["StudyInstanceUID"] == world.my_study
    assert found["new"]
    assert found["differences"]["PatientBirthDate"]["patient"] == "19550505"
    assert said["viewers_ended"] == 1
    assert (await viewer.get(f"/studies/{world.my_study}/metadata")).status_code == 403
    # It is known now: a viewer may be opened, and goes on at the next correction.
    viewer = await lightbox.open(f"/{world.my_study}")
    said = await lightbox.must("service", "PATCH", path, json={"dob": "1955-05-06"})
    assert [each["new"] for each in said["contradictions"]] == [False]
    assert (await viewer.get(f"/studies/{world.my_study}/metadata")).status_code == 200


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"mrn": "MRN-OTHER"}, 409),
        ({"mrn_issuer": "NORTH"}, 409),
        ({"mrn": "MRN-MINE"}, 200),
        ({"dob": "1700-01-01"}, 422),
        ({"dob": None}, 422),
        ({"last_name": ""}, 422),
        ({"last_name": "A^B"}, 422),
        ({"sex": "X"}, 422),
        ({"id": str(uuid4())}, 422),
    ],
)
async def test_what_a_correction_takes(
    lightbox: Lightbox, world: World, body: Any, status: int
) -> None:
    path = f"{API}/patients/{world.mine['id']}"
    before = rows(lightbox, "SELECT * FROM patient")
    answer = await lightbox.ask("service", "PATCH", path, json=body)
    assert answer.status_code == status, answer.text
    assert rows(lightbox, "SELECT * FROM patient") == before
