"""The EHR decides along: a policy decision point that really runs, and every way to an image."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from tests.images import ct_image
from tests.lightbox import Lightbox, running
from tests.live.conftest import Archive, settings_for, unique
from tests.pdp import SECRET, Pdp
from tests.tables import records


@pytest.fixture(scope="module")
def pdp() -> Iterator[Pdp]:
    with Pdp() as each:
        yield each


@pytest.fixture
async def lightbox(
    sqlite_url: str, archive: Archive, tmp_path: Path, pdp: Pdp
) -> AsyncIterator[Lightbox]:
    """The app, which asks the EHR at every request."""
    pdp.switch()
    settings = settings_for(
        sqlite_url,
        archive.server,
        spool_dir=tmp_path,
        policy_url=pdp.url,
        policy_secret=SecretStr(SECRET),
        policy_timeout_seconds=0.5,
        policy_cache_seconds=0,
    )
    async with running(settings) as each:
        yield each


async def person(lightbox: Lightbox) -> tuple[Any, Any]:
    """A patient of `clinician`, and an image of theirs as upload answered it."""
    mrn = unique()
    made = await lightbox.patient(mrn)
    order = await lightbox.order(made)
    sent = await lightbox.upload(ct_image(patient_id=mrn), order_id=order["id"])
    assert sent.status_code == 200, sent.text
    return made, sent.json()


def frame_of(image: Any) -> str:
    return (
        f"/studies/{image['study_instance_uid']}/series/{image['series_instance_uid']}"
        f"/instances/{image['sop_instance_uid']}/frames/1"
    )


LISTS = (
    "/api/v1/patients",
    "/api/v1/orders",
    "/api/v1/dicom/studies",
    "/dicom-web/studies",
    "/dicom-web/studies?limit=1",
)


async def test_whom_the_ehr_denies_is_nowhere(lightbox: Lightbox, pdp: Pdp) -> None:
    seen, seen_image = await person(lightbox)
    denied, image = await person(lightbox)
    pdp.switch(denied["mrn"])
    for role in ("clinician", "service"):
        for path in LISTS:
            answer = await lightbox.ask(role, "GET", path)
            assert len(answer.json()) == 1, (role, path)
            text = answer.text
            assert denied["mrn"] not in text, path
            assert denied["id"] not in text, path
            assert "link" not in answer.headers, path
            assert answer.headers.get("x-total-count", "1") == "1", path
        for path in (f"/api/v1/patients?mrn={denied['mrn']}", "/api/v1/patients?mrn=NOBODY"):
            assert (await lightbox.ask(role, "GET", path)).json() == []
        read = await lightbox.ask(role, "GET", f"/api/v1/patients/{denied['id']}")
        assert (read.status_code, read.json()["reason"]) == (403, "ehr")
        assert (await lightbox.ask(role, "GET", f"/api/v1/patients/{seen['id']}")).is_success
        for path in (frame_of(image), f"/studies/{image['study_instance_uid']}"):
            hidden = await lightbox.ask(role, "GET", f"/dicom-web{path}")
            assert hidden.status_code == 404
            (record,) = records(lightbox, hidden.headers["x-request-id"])
            assert (record["outcome"], record["reason"]) == ("denied", "ehr")
            assert record["study_instance_uid"] == image["study_instance_uid"]
        shown = await lightbox.ask(role, "GET", f"/dicom-web{frame_of(seen_image)}")
        assert shown.status_code == 200
    (asked,) = [each for each in pdp.asked() if each["action"]["name"] == "study:retrieve"][:1]
    assert asked["resource"]["properties"]["mrn"] == denied["mrn"]
    # A file for them is refused too.
    refused = await lightbox.upload(ct_image(patient_id=denied["mrn"]), patient_id=denied["id"])
    assert refused.status_code == 403


async def test_a_stranger_learns_nothing_and_the_ehr_is_not_asked(
    lightbox: Lightbox, pdp: Pdp
) -> None:
    theirs, image = await person(lightbox)
    pdp.switch()
    answer = await lightbox.ask("clinician", "GET", f"/api/v1/patients/{theirs['id']}", sub="x")
    assert answer.json()["reason"] == "no-relationship"
    hidden = await lightbox.ask("clinician", "GET", f"/dicom-web{frame_of(image)}", sub="x")
    assert hidden.status_code == 404
    assert (await lightbox.ask("clinician", "GET", LISTS[0], sub="x")).json() == []
    assert pdp.asked() == []


async def test_an_open_viewer_ends_when_the_ehr_denies(lightbox: Lightbox, pdp: Pdp) -> None:
    mine, image = await person(lightbox)
    pdp.switch()
    viewer = await lightbox.open(f"/{image['study_instance_uid']}")
    for path in (frame_of(image), "/studies", frame_of(image)):
        assert (await viewer.get(path)).status_code == 200
    asked = pdp.asked()
    assert {each["subject"]["id"] for each in asked} == {"clinician"}
    assert len(asked) >= 5, "link, redemption, and each request of the viewer"
    pdp.switch(mine["mrn"])
    ended = await viewer.get(frame_of(image))
    assert (ended.status_code, ended.json()["reason"]) == (403, "right-lost")
    reasons = {(each["action"], each["reason"]) for each in await lightbox.audit(ctx=viewer.ctx)}
    assert {("study:view", "ehr"), ("session:end", "right-lost")} <= reasons
    pdp.switch()
    for path in (frame_of(image), "/studies"):
        assert (await viewer.get(path)).status_code == 403
    again = await lightbox.open(f"/{image['study_instance_uid']}")
    pdp.switch(mine["mrn"])
    assert (await again.get("/studies")).status_code == 403


@pytest.mark.parametrize("mode", ["error", "silent", "text", "redirect"])
async def test_without_its_answer_nothing_is_shown_and_nothing_lost(
    mode: str, lightbox: Lightbox, pdp: Pdp
) -> None:
    mine, image = await person(lightbox)
    viewer = await lightbox.open(f"/{image['study_instance_uid']}")
    assert (await viewer.get(frame_of(image))).status_code == 200
    pdp.switch(mode=mode)
    study = image["study_instance_uid"]
    asked = [
        await lightbox.ask("clinician", "GET", path)
        for path in (
            *LISTS,
            f"/api/v1/patients/{mine['id']}",
            f"/api/v1/dicom/viewer/url/{study}",
            f"/dicom-web{frame_of(image)}",
            f"/dicom-web/studies/{study}",
        )
    ]
    asked += [await viewer.get(path) for path in (frame_of(image), "/studies")]
    for answer in asked:
        assert answer.status_code == 503, answer.text
        assert answer.json()["type"] == "urn:lightbox:problem:ehr-unavailable"
        assert answer.headers["retry-after"]
        assert mine["mrn"] not in answer.text
        assert pdp.url not in answer.text
        last = records(lightbox, answer.headers["x-request-id"])[-1]
        outcome = "failed" if last["action"].endswith(":list") else "denied"
        assert (last["outcome"], last["reason"]) == (outcome, "ehr-unavailable")
    pdp.switch()
    assert (await viewer.get(frame_of(image))).status_code == 200, "the session lives on"


async def test_the_secret_is_proven(lightbox: Lightbox, pdp: Pdp, tmp_path: Path) -> None:
    mine, _ = await person(lightbox)
    wrong = lightbox.settings.model_copy(update={"policy_secret": SecretStr("guessed")})
    async with running(wrong) as other:
        answer = await other.ask("clinician", "GET", f"/api/v1/patients/{mine['id']}")
        assert answer.status_code == 503


async def test_a_list_of_too_many_is_refused(
    lightbox: Lightbox, pdp: Pdp, monkeypatch: pytest.MonkeyPatch
) -> None:
    await person(lightbox)
    mine, _ = await person(lightbox)
    monkeypatch.setattr("app.access.window.MOST_CANDIDATES", 1)
    for path in LISTS:
        answer = await lightbox.ask("clinician", "GET", path)
        assert answer.status_code == 422
    assert pdp.asked()[-1]["action"]["name"] != "patient:list"
    one = await lightbox.ask("clinician", "GET", f"/api/v1/patients?mrn={mine['mrn']}")
    assert len(one.json()) == 1
