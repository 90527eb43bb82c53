"""Who tries to take, or to see, a waiting study that is not theirs; or one that waits no longer."""

import base64
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock
from uuid import UUID

import httpx
import pytest
import respx
from pydantic import SecretStr

from app.models import Arrival
from app.routes.paging import read_cursor
from tests.contract.test_break_glass import break_glass
from tests.contract.test_merge import restrict
from tests.contract.test_reconciliation import arrive, decide, one, orthanc_id, similar, waiting
from tests.fake_orthanc import URL, FakeOrthanc
from tests.images import ct_image
from tests.lightbox import Lightbox, make_settings, running
from tests.tables import change, rows

pytestmark = pytest.mark.anyio
PDP = "http://pdp.test"
LIST = "/api/v1/reconciliation"


def version_of(lightbox: Lightbox, uid: str) -> int:
    found = rows(lightbox, "SELECT version FROM arrival WHERE study_instance_uid = ?", uid)
    return int(found[0]["version"])


def denials(lightbox: Lightbox, patient: Any) -> list[tuple[str, str]]:
    found = rows(
        lightbox,
        "SELECT action, reason FROM audit_record"
        " WHERE outcome = 'denied' AND actor = 'radiologist' AND patient_id = ? ORDER BY id",
        UUID(patient["id"]).hex,
    )
    return [(each["action"], each["reason"]) for each in found]


# ------------------------------------------------------------------------- what is linked


async def linked(lightbox: Lightbox, fake: FakeOrthanc) -> tuple[Any, Any, Any, str]:
    """Ann's order, Bea and her order, and Ann's study, which was linked by itself."""
    ann = await lightbox.order(await lightbox.patient())
    bea = await lightbox.patient("MRN-2", first_name="Bea", last_name="Bee")
    bees = await lightbox.order(bea, requested_by="drb")
    image = ct_image(
        study_uid=ann["planned_study_instance_uid"], AccessionNumber=ann["accession_number"]
    )
    return ann, bea, bees, await arrive(lightbox, fake, image)


@pytest.mark.parametrize("named", ["patient_id", "order_id"])
@pytest.mark.parametrize("coerce", [False, True])
async def test_a_linked_study_is_not_confirmed_to_another(
    lightbox: Lightbox, fake_orthanc: FakeOrthanc, named: str, coerce: bool
) -> None:
    ann, bea, bees, uid = await linked(lightbox, fake_orthanc)
    before = rows(lightbox, "SELECT * FROM arrival"), rows(lightbox, "SELECT * FROM order_study")
    body = {named: bea["id"] if named == "patient_id" else bees["id"], "coerce": coerce}
    answer = await decide(lightbox, uid, "confirm", version=version_of(lightbox, uid), **body)
    assert answer.status_code == 409
    assert answer.json()["state"] == "linked"
    assert "undo" in answer.json()["detail"]
    assert before == (
        rows(lightbox, "SELECT * FROM arrival"),
        rows(lightbox, "SELECT * FROM order_study"),
    )
    assert (await lightbox.must("service", "GET", f"/orders/{ann['id']}"))["studies"] == [uid]
    assert (await lightbox.must("service", "GET", f"/orders/{bees['id']}"))["studies"] == []


async def test_a_linked_study_is_not_rejected(
    lightbox: Lightbox, fake_orthanc: FakeOrthanc
) -> None:
    ann, _, _, uid = await linked(lightbox, fake_orthanc)
    version = version_of(lightbox, uid)
    answer = await decide(lightbox, uid, "reject", version=version, reason="nobody's")
    assert (answer.status_code, answer.json()["state"]) == (409, "linked")
    assert rows(lightbox, "SELECT state FROM arrival") == [{"state": "linked"}]
    assert (await lightbox.must("service", "GET", f"/orders/{ann['id']}"))["studies"] == [uid]


async def test_images_of_a_linked_study_that_wait_go_to_nobody_else(
    lightbox: Lightbox, fake_orthanc: FakeOrthanc
) -> None:
    """An image was added that does not pass: the row waits, the others are Ann's still."""
    _, bea, _, uid = await linked(lightbox, fake_orthanc)
    await arrive(lightbox, fake_orthanc, ct_image(study_uid=uid, Rows=4096, Columns=4096))
    change(lightbox, "UPDATE arrival SET state = 'proposed'")
    for coerce in (False, True):
        answer = await decide(
            lightbox,
            uid,
            "confirm",
            version=version_of(lightbox, uid),
            patient_id=bea["id"],
            coerce=coerce,
        )
        assert answer.status_code == 409
        assert "another patient already" in answer.json()["detail"]
    assert len(rows(lightbox, "SELECT * FROM study")) == 1


async def test_the_linker_itself_refuses_another_patient(
    lightbox: Lightbox, fake_orthanc: FakeOrthanc
) -> None:
    """Past the first guard: somebody's row says that it waits, and it is Ann's."""
    ann, bea, bees, uid = await linked(lightbox, fake_orthanc)
    change(lightbox, "UPDATE arrival SET state = 'unmatched', patient_id = NULL")
    linker = lightbox.app.state.follower.reconciliation._linker
    gate = lightbox.app.state.gate
    async with gate.database.session() as session:
        row = await session.get(Arrival, orthanc_id(fake_orthanc, uid))
    columns = {"patient_id": UUID(bea["id"]), "order_id": UUID(bees["id"]), "rule": "confirmed"}
    with pytest.raises(Exception, match="another patient already"):
        await linker.link_certain(row, [], columns, AsyncMock())
    (left,) = rows(lightbox, "SELECT order_id FROM order_study")
    assert left["order_id"] == UUID(ann["id"]).hex


async def test_the_database_refuses_an_order_and_a_study_of_two_patients(
    lightbox: Lightbox, fake_orthanc: FakeOrthanc
) -> None:
    _, _, bees, uid = await linked(lightbox, fake_orthanc)
    bees_id = UUID(bees["id"]).hex
    with pytest.raises(Exception, match="order-and-study-of-two-patients"):
        change(lightbox, "UPDATE order_study SET order_id = ?", bees_id)
    with pytest.raises(Exception, match="order-and-study-of-two-patients"):
        change(
            lightbox,
            "INSERT INTO order_study VALUES (?, ?, '2026-01-01 00:00:00.000000', 'somebody')",
            *(bees_id, uid),
        )


# ------------------------------------------------------------------- what may be a sealed one's


@pytest.fixture
async def namesakes(lightbox: Lightbox, fake_orthanc: FakeOrthanc) -> tuple[Any, Any, str]:
    """A sealed patient, whose a waiting study most likely is; and a namesake of the radiologist's
    site."""
    sealed, mine = await lightbox.patient(), await lightbox.patient("MRN-I")
    for each in (sealed, mine):
        await lightbox.order(each)
    uid = await arrive(
        lightbox, fake_orthanc, similar(StudyDescription="HIV clinic", PatientName="Doe^Jane")
    )
    assert [each["StudyInstanceUID"] for each in await waiting(lightbox)] == [uid]
    await restrict(lightbox, sealed, "sealed", "boss")
    return sealed, mine, uid


async def test_a_sealed_patients_study_is_not_shown_to_who_may_see_a_namesake(
    lightbox: Lightbox, namesakes: tuple[Any, Any, str]
) -> None:
    sealed, mine, uid = namesakes
    version = version_of(lightbox, uid)
    nobody = await lightbox.ask("radiologist", "GET", f"{LIST}/1.2.3.4.5.6")
    for role in ("radiologist", "technologist"):
        assert await waiting(lightbox, role) == []
        tries = [
            await lightbox.ask(role, "GET", f"{LIST}/{uid}"),
            *[
                await decide(lightbox, uid, what, role=role, version=version, **body)
                for what, body in (
                    ("confirm", {"patient_id": mine["id"], "coerce": True}),
                    ("confirm", {"patient_id": mine["id"]}),
                    ("reject", {"reason": "nobody's"}),
                    ("undo", {"reason": "wrong patient"}),
                )
            ],
        ]
        for answer in tries:
            assert answer.status_code == 404
            assert answer.json()["detail"] == nobody.json()["detail"]
    assert denials(lightbox, sealed) == [("study:link", "restricted")] * 5
    assert rows(lightbox, "SELECT state, version FROM arrival") == [
        {"state": "proposed", "version": version}
    ]
    # Rejected, it is as hidden; and whoever is named sees it.
    (found,) = await lightbox.must("radiologist", "GET", "/reconciliation", sub="boss")
    assert found["StudyInstanceUID"] == uid
    answer = await lightbox.ask(
        "radiologist",
        "POST",
        f"{LIST}/{uid}/reject",
        sub="boss",
        json={"reason": "a phantom", "version": version},
    )
    assert answer.status_code == 200, answer.text
    assert await waiting(lightbox, state="rejected") == []


async def test_a_broken_glass_shows_it_on_record_and_decides_nothing(
    lightbox: Lightbox, namesakes: tuple[Any, Any, str]
) -> None:
    patient, mine, uid = namesakes
    await restrict(lightbox, patient, "vip", "boss")
    assert await waiting(lightbox) == []
    broken = await break_glass(lightbox, patient["id"], role="radiologist")
    assert broken.status_code in (200, 201), broken.text
    (found,) = await waiting(lightbox)
    assert found["StudyInstanceUID"] == uid
    shown = {  # the latest of each
        each["patient_id"]: each["purpose_of_use"]
        for each in reversed(await lightbox.audit(action="arrival:list", outcome="done"))
        if each["patient_id"]
    }
    assert shown[patient["id"]] == "BTG"
    assert shown[mine["id"]] == ""
    for what, body in (
        ("confirm", {"patient_id": mine["id"], "coerce": True}),
        ("reject", {"reason": "nobody's"}),
    ):
        answer = await decide(lightbox, uid, what, version=found["version"], **body)
        assert answer.status_code == 404
    assert await waiting(lightbox, "technologist") == []


async def test_a_sealed_patients_study_that_does_not_pass_is_not_shown_either(
    lightbox: Lightbox, fake_orthanc: FakeOrthanc
) -> None:
    """It is quarantined before the matcher has looked at its files."""
    sealed = await lightbox.patient()
    await lightbox.order(sealed)
    await restrict(lightbox, sealed, "sealed", "boss")
    uid = await arrive(lightbox, fake_orthanc, ct_image(Rows=4096, Columns=4096))
    assert rows(lightbox, "SELECT state FROM arrival") == [{"state": "quarantined"}]
    assert await waiting(lightbox) == []
    assert (await lightbox.ask("radiologist", "GET", f"{LIST}/{uid}")).status_code == 404
    assert denials(lightbox, sealed) == [("study:link", "restricted")]
    assert len(await lightbox.must("radiologist", "GET", "/reconciliation", sub="boss")) == 1


async def test_a_study_that_was_not_looked_at_is_told_to_nobody(
    lightbox: Lightbox, fake_orthanc: FakeOrthanc
) -> None:
    await lightbox.order(await lightbox.patient())
    uid = await arrive(lightbox, fake_orthanc, similar())
    change(lightbox, "UPDATE arrival SET state = 'arriving'")
    change(lightbox, "DELETE FROM arrival_candidate")
    for answer in (
        await lightbox.ask("radiologist", "GET", f"{LIST}/{uid}"),
        await decide(lightbox, uid, "reject", version=1, reason="nobody's"),
    ):
        assert answer.status_code == 404


# -------------------------------------------------------------------- a token for one patient


async def test_what_comes_near_nobody_is_not_for_a_token_of_one_patient(
    lightbox: Lightbox, fake_orthanc: FakeOrthanc
) -> None:
    patient = await lightbox.patient()
    await lightbox.order(patient)
    uid = await arrive(lightbox, fake_orthanc, ct_image(patient_id="N", PatientName="Roe^Rita"))
    assert (await one(lightbox, uid))["candidates"] == []
    limited = {"sub": "radiologist", "roles": ["radiologist"], "patient": patient["id"]}
    listed = await lightbox.ask(None, "GET", LIST, claims=limited)
    assert (listed.status_code, listed.json()) == (200, [])
    read = await lightbox.ask(None, "GET", f"{LIST}/{uid}", claims=limited)
    assert (read.status_code, read.json()["reason"]) == (403, "out-of-context")
    body = {"patient_id": patient["id"], "version": version_of(lightbox, uid)}
    taken = await lightbox.ask(None, "POST", f"{LIST}/{uid}/confirm", claims=limited, json=body)
    assert taken.status_code == 403
    near = await arrive(lightbox, fake_orthanc, similar())
    listed = await lightbox.ask(None, "GET", LIST, claims=limited)
    assert [each["StudyInstanceUID"] for each in listed.json()] == [near]


# --------------------------------------------------------------------------------- the EHR


@pytest.fixture
async def told(
    migrated_sqlite: Path, tmp_path: Path
) -> AsyncIterator[tuple[Lightbox, FakeOrthanc, set[str]]]:
    """A Lightbox whose EHR has a say, and the ids of the patients whom it denies."""
    path = shutil.copy(migrated_sqlite, tmp_path / "lightbox.sqlite")
    denied: set[str] = set()

    def allowed(evaluation: Any) -> dict[str, bool]:
        return {"decision": evaluation["resource"]["id"] not in denied}

    def evaluate(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json=allowed(json.loads(request.content)))

    def evaluate_all(request: httpx.Request) -> httpx.Response:
        asked = json.loads(request.content)["evaluations"]
        return httpx.Response(200, json={"evaluations": [allowed(each) for each in asked]})

    fake = FakeOrthanc()
    settings = make_settings(
        f"sqlite+aiosqlite:///{path}",
        URL,
        spool_dir=tmp_path,
        policy_url=PDP,
        policy_secret=SecretStr("x" * 40),
        policy_cache_seconds=0,
    )
    with respx.mock(assert_all_called=False) as router:
        fake.install(router)
        router.post(f"{PDP}/access/v1/evaluation").mock(side_effect=evaluate)
        router.post(f"{PDP}/access/v1/evaluations").mock(side_effect=evaluate_all)
        async with running(settings) as lightbox:
            yield lightbox, fake, denied


async def test_the_ehrs_denial_holds_for_each_decision(
    told: tuple[Lightbox, FakeOrthanc, set[str]],
) -> None:
    lightbox, fake, denied = told
    victim = await lightbox.patient(first_name="Vera", last_name="Victim")
    mine = await lightbox.patient("MRN-77", first_name="Ann", last_name="Own")
    for each in (victim, mine):
        await lightbox.order(each)
    uid = await arrive(lightbox, fake, similar(PatientName="Victim^Vera"))
    version = version_of(lightbox, uid)
    denied.add(victim["id"])
    assert await waiting(lightbox) == []
    for what, body in (
        ("confirm", {"patient_id": mine["id"]}),
        ("confirm", {"patient_id": mine["id"], "coerce": True}),
        ("reject", {"reason": "nobody's"}),
        ("undo", {"reason": "wrong patient"}),
    ):
        answer = await decide(lightbox, uid, what, version=version, **body)
        assert (answer.status_code, answer.json()["reason"]) == (403, "ehr")
        assert "Victim" not in answer.text
    assert denials(lightbox, victim) == [("study:link", "ehr")] * 4
    # A namesake whom it allows does not show the other's.
    twin = await lightbox.patient("MRN-I", first_name="Vera", last_name="Victim")
    await lightbox.order(twin)
    await lightbox.app.state.follower.look(orthanc_id(fake, uid))
    assert await waiting(lightbox) == []
    assert (await lightbox.ask("radiologist", "GET", f"{LIST}/{uid}")).status_code == 403
    denied.clear()
    assert len(await waiting(lightbox)) == 1


async def test_pages_are_full_and_their_cursor_names_nobody(
    told: tuple[Lightbox, FakeOrthanc, set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the EHR takes rows away between those that are shown."""
    monkeypatch.setattr("app.arrivals.waiting._BATCH", 2)
    lightbox, fake, denied = told
    victim = await lightbox.patient(first_name="Vera", last_name="Mid")
    await lightbox.order(victim)
    denied.add(victim["id"])
    hidden = [
        await arrive(lightbox, fake, similar(PatientName="Mid^Vera", StudyDescription=f"{n}"))
        for n in range(5)
    ]
    for n, name in enumerate(("Ax^A", "Bx^B", "Yx^Y", "Zx^Z")):
        image = ct_image(patient_id=f"N-{n}", PatientName=name, PatientBirthDate="19300101")
        await arrive(lightbox, fake, image)
    seen: list[str] = []
    url, pages = f"{LIST}?limit=1&sort=name", 0
    while url:
        answer = await lightbox.ask("radiologist", "GET", url)
        assert answer.status_code == 200, answer.text
        assert len(answer.json()) == 1
        seen += [each["PatientName"] for each in answer.json()]
        url, pages = answer.links["next"]["url"] if "next" in answer.links else "", pages + 1
        if url:
            cursor = httpx.URL(url).params["cursor"]
            last = answer.json()[0]["StudyInstanceUID"]
            assert read_cursor(cursor) == orthanc_id(fake, last)
    assert (seen, pages) == (["Ax^A", "Bx^B", "Yx^Y", "Zx^Z"], 4)
    # Where a row that is not shown stands is told to nobody who names it.
    for key in (orthanc_id(fake, hidden[0]), "no such row"):
        cursor = base64.urlsafe_b64encode(key.encode()).decode()
        answer = await lightbox.ask("radiologist", "GET", LIST, params={"cursor": cursor})
        assert answer.status_code == 422
    # So many are taken away that none is found.
    monkeypatch.setattr("app.arrivals.waiting._MOST_BATCHES", 1)
    answer = await lightbox.ask("radiologist", "GET", f"{LIST}?limit=1&sort=arrived_at")
    assert answer.status_code == 422
