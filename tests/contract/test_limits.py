"""Who tries too often is told to wait, and nobody else is."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fake_orthanc import URL, FakeOrthanc
from tests.lightbox import Lightbox, World, make_settings, make_world, running

BAD = {"Authorization": "Bearer not-a-token"}


async def test_after_too_many_bad_tokens_a_good_one_of_the_same_address_passes(
    sqlite_url: str, fake_orthanc: FakeOrthanc, tmp_path: Path
) -> None:
    settings = make_settings(sqlite_url, URL, spool_dir=tmp_path, failed_sign_ins_per_minute=5)
    async with running(settings) as lightbox:
        paths = ["/api/v1/patients", "/dicom-web/studies", "/api/v1/audit"]
        answers = []
        for i in range(30):
            headers = BAD if i % 2 else {}  # no token is no better than a bad one
            answers.append(await lightbox.ask(None, "GET", paths[i % 3], headers=headers))
        assert [each.status_code for each in answers] == [401] * 5 + [429] * 25
        refused = answers[-1]
        assert refused.headers["content-type"] == "application/problem+json"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        problem = refused.json()
        assert problem["type"] == "urn:lightbox:problem:too-many-requests"
        assert problem["status"] == 429
        assert problem["request_id"] == refused.headers["x-request-id"]
        # The same address, a valid token: as if nothing were.
        assert (await lightbox.ask("clinician", "GET", "/api/v1/patients")).status_code == 200
        assert (await lightbox.ask(None, "GET", paths[0], headers=BAD)).status_code == 429

        before = await _sign_ins(lightbox)
        assert [each["reason"] for each in before] == [
            *["no-token", "bad-token"] * 2,
            "no-token",
        ]
        await lightbox.app.state.gate.failed_tries.sum_up()
        (summary, *rest) = await _sign_ins(lightbox)
        assert rest == before
        assert summary["reason"] == "too-many-tries"
        assert summary["client_address"] == "127.0.0.1"
        assert summary["detail"]["tries"] == 26


async def _sign_ins(lightbox: Lightbox) -> list[Any]:
    return [each for each in await lightbox.audit() if each["action"] == "sign-in"]


async def test_launch_codes_can_not_be_guessed_in_bursts_and_a_real_one_opens(
    sqlite_url: str, fake_orthanc: FakeOrthanc, tmp_path: Path
) -> None:
    settings = make_settings(sqlite_url, URL, spool_dir=tmp_path, failed_sign_ins_per_minute=3)
    async with running(settings) as lightbox:
        world = await make_world(lightbox)

        async def guess(code: str) -> httpx.Response:
            return await lightbox.client.get("/viewer", params={"launch": code})

        answers = [await guess(f"guess-{i}") for i in range(6)]
        assert [each.status_code for each in answers] == [404] * 3 + [429] * 3
        refused = answers[-1]
        assert refused.headers["content-type"].startswith("text/html")  # a person reads it
        assert "Try again in" in refused.text
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        opened = await lightbox.open(f"/{world.my_study}")  # behind the same address
        # Its code is used up: trying it over and over is no way to fill the trail either.
        assert (await guess(opened.code)).status_code == 429
        # A wrong cookie is one more failed try; the right one passes.
        wrong = await opened.get("/studies", cookie="lightbox=wrong")
        assert wrong.status_code == 429
        assert (await opened.get("/studies")).status_code == 200
        tried = [
            each
            for each in await lightbox.audit()
            if each["outcome"] == "denied" and each["action"] in ("session:open", "sign-in")
        ]
        assert [each["reason"] for each in tried] == ["unknown-code"] * 3


async def test_viewer_links_are_limited_by_person(
    sqlite_url: str, fake_orthanc: FakeOrthanc, tmp_path: Path
) -> None:
    settings = make_settings(sqlite_url, URL, spool_dir=tmp_path, launches_per_minute=3)
    async with running(settings) as lightbox:
        world = await make_world(lightbox)
        path = f"/api/v1/dicom/viewer/url/{world.my_study}"
        answers = [await lightbox.ask("clinician", "GET", path) for _ in range(5)]
        assert [each.status_code for each in answers] == [200] * 3 + [429] * 2
        assert answers[-1].json()["type"] == "urn:lightbox:problem:too-many-requests"
        assert int(answers[-1].headers["retry-after"]) >= 1
        # Somebody else still works, and so does what is open.
        theirs = f"/api/v1/dicom/viewer/url/{world.their_study}"
        assert (await lightbox.ask("clinician", "GET", theirs, sub="other")).status_code == 200
        records = await lightbox.audit(action="study:view", outcome="failed")
        assert [each["reason"] for each in records] == ["too-many-requests"] * 2


@pytest.mark.parametrize("sign", ["\u202e", "\u2066", "\u2028", "\u0085", "\u200b", "\x1b", "\x7f"])
async def test_a_request_id_that_is_not_plain_is_replaced(
    lightbox: Lightbox, world: World, sign: str
) -> None:
    given = f"id-{sign}-1".encode()
    answer = await lightbox.client.get("/api/v1/dicom/health", headers=[(b"x-request-id", given)])
    assert answer.headers["x-request-id"].isalnum()
    assert len(answer.headers["x-request-id"]) == 32
