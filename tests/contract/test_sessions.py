"""Open viewers under control: who sees them, what keeps them open, and what ends them."""

import asyncio
import time
from typing import Any
from uuid import UUID

import httpx
import pytest
import sqlalchemy as sa
from joserfc import jwt
from joserfc.jwk import OctKey

from app import main
from app.audit import Origin
from app.db import utcnow
from app.errors import DatabaseUnavailable
from app.viewer.usage import Usage
from tests.contract.test_viewer import another_study, frame_of, link_to, redeem, sign_of_life
from tests.lightbox import SECRET, Lightbox, Opened, World
from tests.tables import change, moment, outcomes, records, rows

SESSIONS = "/api/v1/viewer/sessions"
LOGOUT = "/api/v1/viewer/logout"
BACKCHANNEL = "/api/v1/viewer/backchannel-logout"
EVENT = "http://schemas.openid.net/event/backchannel-logout"


async def reason(view: Opened, image: dict[str, Any]) -> str:
    """Why the viewer shows nothing any more; empty while it does."""
    answer = await view.get(frame_of(image))
    if answer.is_success:
        assert "x-accel-redirect" in answer.headers
        return ""
    assert answer.status_code == 403, answer.text
    assert "x-accel-redirect" not in answer.headers
    return str(answer.json()["reason"])


async def open_as(lightbox: Lightbox, world: World, **claims: Any) -> Opened:
    """A viewer of my study, by a token with these claims."""
    claims = {"sub": "clinician", "roles": ["clinician"], **claims}
    path = f"/api/v1/dicom/viewer/url/{world.my_study}"
    link = (await lightbox.ask(None, "GET", path, claims=claims)).json()
    await lightbox.app.state.metadata.settled()
    code = link["url"].partition("launch=")[2]
    answer = await redeem(lightbox, code)
    assert answer.status_code == 303, answer.text
    cookie = answer.headers["set-cookie"].partition(";")[0]
    return Opened(lightbox, link, code, httpx.URL(answer.headers["location"]).params["ctx"], cookie)


# ------------------------------------------------------------------------------------- the list


async def test_my_own_viewers_with_what_they_show(lightbox: Lightbox, world: World) -> None:
    order = world.my_order["id"]
    view = await lightbox.open(f"/order/{order}")
    await lightbox.open(f"/{world.their_study}", sub="other")
    await link_to(lightbox, f"/{world.my_study}")
    answer = await lightbox.ask("clinician", "GET", SESSIONS, headers={"X-Request-ID": "lists"})
    waiting, mine = answer.json()
    assert (waiting["state"], waiting["opened_at"], waiting["order_id"]) == ("waiting", None, None)
    assert (mine["ctx"], mine["state"], mine["order_id"]) == (view.ctx, "open", order)
    assert mine["patient_id"] == world.mine["id"]
    assert mine["study_instance_uids"] == [world.my_study]
    assert mine["created_at"] <= mine["opened_at"] <= mine["last_used_at"] < mine["expires_at"]
    granted, done = records(lightbox, "lists")
    assert (granted["action"], granted["outcome"]) == ("session:list", "granted")
    assert (done["outcome"], done["patient_id"]) == ("done", UUID(world.mine["id"]).hex)
    assert "code" not in answer.text
    assert "cookie" not in answer.text


@pytest.mark.parametrize("role", ["admin", "auditor"])
async def test_overseers_see_who_and_never_whom(
    role: str, lightbox: Lightbox, world: World
) -> None:
    view = await lightbox.open(f"/order/{world.my_order['id']}")
    theirs = await lightbox.open(f"/{world.their_study}", sub="other")
    answer = await lightbox.ask(role, "GET", f"{SESSIONS}?whose=all")
    shown = {each["ctx"]: each for each in answer.json()}
    assert shown.keys() == {view.ctx, theirs.ctx}
    assert shown[view.ctx]["sub"] == "clinician"
    for secret in (
        *(world.mine["id"], world.theirs["id"], world.my_order["id"], world.my_study),
        *(world.their_study, *World.SECRET_WORDS),
    ):
        assert secret not in answer.text
    for each in shown.values():
        assert not {"patient_id", "order_id", "study_instance_uids"} & each.keys()
    (one,) = (await lightbox.ask(role, "GET", f"{SESSIONS}?whose=all&sub=other")).json()
    assert one["ctx"] == theirs.ctx
    assert (await lightbox.ask(role, "GET", SESSIONS)).json() == []


@pytest.mark.parametrize("role", ["clinician", "radiologist", "technologist", "service"])
async def test_nobody_else_sees_the_viewers_of_others(
    role: str, lightbox: Lightbox, world: World
) -> None:
    await lightbox.open(f"/{world.their_study}", sub="other")
    for query in ("?whose=all", "?whose=all&sub=other"):
        answer = await lightbox.ask(
            role, "GET", SESSIONS + query, headers={"X-Request-ID": f"pries{query}"[:5]}
        )
        assert answer.status_code == 403, answer.text
    assert (await lightbox.ask(role, "GET", f"{SESSIONS}?sub=other")).json() == []
    assert outcomes(lightbox, "pries")[:2] == [
        ("session:list", "granted"),
        ("session:list", "failed"),
    ]


async def test_an_overseer_who_is_a_clinician_too_gets_no_patients_of_others(
    lightbox: Lightbox, world: World
) -> None:
    await lightbox.open(f"/{world.their_study}", sub="other")
    claims = {"sub": "both", "roles": ["admin", "clinician"]}
    answer = await lightbox.ask(None, "GET", f"{SESSIONS}?whose=all", claims=claims)
    assert len(answer.json()) == 1
    assert world.theirs["id"] not in answer.text


async def test_states_and_pages(lightbox: Lightbox, world: World) -> None:
    views = [await lightbox.open(f"/{world.my_study}") for _ in range(4)]
    await link_to(lightbox, f"/{world.my_study}")
    assert (await lightbox.ask("clinician", "DELETE", f"{SESSIONS}/{views[0].ctx}")).is_success
    change(
        lightbox,
        "UPDATE launch_session SET last_used_at = ? WHERE ctx = ?",
        moment(hours=-2),
        views[1].ctx,
    )

    async def states(query: str) -> list[tuple[str, str | None]]:
        shown = (await lightbox.ask("clinician", "GET", SESSIONS + query)).json()
        return [(each["state"], each["ended_because"]) for each in shown]

    # What is idle is over, though nothing has swept it yet.
    assert sorted(await states("?state=ended"), key=str) == [
        ("ended", "idle"),
        ("ended", "revoked"),
    ]
    assert await states("?state=open") == [("open", None)] * 2
    assert await states("?state=waiting") == [("waiting", None)]
    seen, url = [], f"{SESSIONS}?limit=2"
    while url:
        answer = await lightbox.ask("clinician", "GET", url)
        seen += [each["ctx"] for each in answer.json()]
        url = answer.links.get("next", {}).get("url", "")
    assert len(seen) == len(set(seen)) == 5
    for cursor in ("x", "MjAyNQ==", "MjAyNS0wMS0wMVQwMDowMDowMCBh"):
        bad = await lightbox.ask("clinician", "GET", f"{SESSIONS}?cursor={cursor}")
        assert bad.status_code == 422


# ----------------------------------------------------------------------------------- revocation


async def test_a_revoked_viewer_shows_nothing_more(lightbox: Lightbox, world: World) -> None:
    view, other = [await lightbox.open(f"/{world.my_study}") for _ in range(2)]
    assert [await reason(each, world.my_image) for each in (view, other)] == ["", ""]
    answer = await lightbox.ask(
        "clinician", "DELETE", f"{SESSIONS}/{view.ctx}", headers={"X-Request-ID": "revokes"}
    )
    assert (answer.status_code, answer.content) == (204, b"")
    assert [await reason(each, world.my_image) for each in (view, other)] == ["revoked", ""]
    granted, ended, done = records(lightbox, "revokes")
    assert (granted["action"], granted["outcome"]) == ("session:revoke", "granted")
    assert (ended["action"], ended["reason"], ended["actor"]) == (
        *("session:end", "revoked", "clinician"),
    )
    assert ended["detail"]["studies"][0]["request_count"] == 1
    assert done["detail"] == {"viewer": "clinician", "viewers_ended": 1}
    again = await lightbox.ask("clinician", "DELETE", f"{SESSIONS}/{view.ctx}")
    assert again.status_code == 204


async def test_a_link_that_waits_can_be_revoked(lightbox: Lightbox, world: World) -> None:
    link = await link_to(lightbox, f"/{world.my_study}")
    (waiting,) = (await lightbox.ask("clinician", "GET", SESSIONS)).json()
    assert (await lightbox.ask("clinician", "DELETE", f"{SESSIONS}/{waiting['ctx']}")).is_success
    answer = await redeem(lightbox, link["url"].partition("launch=")[2])
    assert answer.status_code == 403
    assert "was ended by you, or by an administrator" in answer.text


@pytest.mark.parametrize("role", ["clinician", "radiologist", "technologist", "service"])
async def test_nobody_revokes_the_viewers_of_others(
    role: str, lightbox: Lightbox, world: World
) -> None:
    theirs = await lightbox.open(f"/{world.their_study}", sub="other")
    foreign = await lightbox.ask(role, "DELETE", f"{SESSIONS}/{theirs.ctx}")
    unknown = await lightbox.ask(role, "DELETE", f"{SESSIONS}/{'x' * 22}")
    assert foreign.status_code == unknown.status_code == 404
    del (one := foreign.json())["request_id"], (two := unknown.json())["request_id"]
    assert one == two
    assert await reason(theirs, world.their_image) == ""


@pytest.mark.parametrize("role", ["admin", "auditor"])
async def test_an_overseer_revokes_anybodys(role: str, lightbox: Lightbox, world: World) -> None:
    theirs = await lightbox.open(f"/{world.their_study}", sub="other")
    assert (await lightbox.ask(role, "DELETE", f"{SESSIONS}/{theirs.ctx}")).status_code == 204
    assert await reason(theirs, world.their_image) == "revoked"


# --------------------------------------------------------------------------------------- logout


async def test_signing_out_ends_my_viewers_and_links_and_nobody_elses(
    lightbox: Lightbox, world: World
) -> None:
    views = [await lightbox.open(f"/{world.my_study}") for _ in range(2)]
    link = await link_to(lightbox, f"/{world.my_study}")
    theirs = await lightbox.open(f"/{world.their_study}", sub="other")
    answer = await lightbox.ask("clinician", "POST", LOGOUT)
    assert (answer.status_code, answer.json()) == (200, {"viewers_ended": 3})
    assert [await reason(each, world.my_image) for each in views] == ["signed-out"] * 2
    assert (await redeem(lightbox, link["url"].partition("launch=")[2])).status_code == 403
    assert await reason(theirs, world.their_image) == ""
    assert (await lightbox.ask("clinician", "POST", LOGOUT)).json() == {"viewers_ended": 0}


async def test_only_a_service_signs_others_out(lightbox: Lightbox, world: World) -> None:
    theirs = await lightbox.open(f"/{world.their_study}", sub="other")
    body = {"sub": "other"}
    for role in ("clinician", "radiologist", "technologist", "admin", "auditor"):
        answer = await lightbox.ask(role, "POST", LOGOUT, json=body)
        assert answer.status_code == 403, role
    assert await reason(theirs, world.their_image) == ""
    answer = await lightbox.ask(
        "service", "POST", LOGOUT, json=body, headers={"X-Request-ID": "logs-out"}
    )
    assert answer.json() == {"viewers_ended": 1}
    assert await reason(theirs, world.their_image) == "signed-out"
    assert records(lightbox, "logs-out")[-1]["detail"] == {"sub": "other", "viewers_ended": 1}


# -------------------------------------------------------------------------- back-channel logout


def logout_token(lightbox: Lightbox, **claims: Any) -> str:
    """A sane logout token, with `claims` over it; None leaves one out."""
    now = int(time.time())
    sane = {
        "iss": lightbox.settings.jwt_issuer,
        "aud": lightbox.settings.jwt_audience,
        "iat": now,
        "exp": now + 120,
        "jti": f"jti-{time.monotonic_ns()}",
        "events": {EVENT: {}},
    }
    kept = {name: value for name, value in {**sane, **claims}.items() if value is not None}
    header = {"alg": "HS256", "typ": "logout+jwt"}
    return jwt.encode(header, kept, OctKey.import_key(SECRET))


async def tell(lightbox: Lightbox, token: str, request_id: str = "told") -> httpx.Response:
    """What the identity provider sends."""
    return await lightbox.ask(
        None,
        "POST",
        BACKCHANNEL,
        data={"logout_token": token},
        headers={"X-Request-ID": request_id},
    )


async def test_a_sign_in_that_ends_takes_its_viewers_with_it(
    lightbox: Lightbox, world: World
) -> None:
    ward = await open_as(lightbox, world, sid="ward")
    home = await open_as(lightbox, world, sid="home")
    unnamed = await open_as(lightbox, world)
    answer = await tell(lightbox, logout_token(lightbox, sid="ward"))
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["cache-control"] == "no-store"
    views = (ward, home, unnamed)
    assert [await reason(each, world.my_image) for each in views] == ["signed-out", "", ""]
    # With the person named as well, a viewer whose sign-in is not known ends too: it may be this.
    assert (await tell(lightbox, logout_token(lightbox, sub="clinician", sid="ward"))).is_success
    assert [await reason(each, world.my_image) for each in views] == [
        "signed-out",
        "",
        "signed-out",
    ]
    assert (await tell(lightbox, logout_token(lightbox, sub="clinician"))).is_success
    assert [await reason(each, world.my_image) for each in views] == ["signed-out"] * 3
    granted, ended, done = records(lightbox, "told")[:3]
    assert (granted["action"], granted["outcome"]) == ("sign-out", "granted")
    assert (ended["action"], ended["reason"]) == ("session:end", "signed-out")
    assert (done["action"], done["outcome"]) == ("sign-out", "done")
    assert done["detail"] == {"sub": "", "sid": "ward", "viewers_ended": 1}


@pytest.mark.parametrize("by", ["token", "ehr"])
async def test_a_sign_out_that_is_cut_off_is_on_record(
    by: str, lightbox: Lightbox, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has committed before its viewers end refuses new links from then on."""

    async def fail(*args: Any, **more: Any) -> int:
        raise DatabaseUnavailable("The database does not answer.")

    monkeypatch.setattr("app.viewer.closing.Closing.where", fail)
    if by == "token":
        answer = await tell(lightbox, logout_token(lightbox, sub="clinician"), "cut")
    else:
        sub, headers = {"sub": "clinician"}, {"X-Request-ID": "cut"}
        answer = await lightbox.ask("service", "POST", LOGOUT, json=sub, headers=headers)
    assert answer.status_code == 503
    assert [(each["action"], each["outcome"]) for each in records(lightbox, "cut")] == [
        ("sign-out", "granted"),
        ("sign-out", "failed"),
    ]
    assert rows(lightbox, "SELECT count(*) AS open FROM operation") == [{"open": 0}]
    assert [each["actor"] for each in rows(lightbox, "SELECT actor FROM ended_sign_in")] == [
        "clinician"
    ]


async def test_a_sid_of_somebody_else_ends_nothing(lightbox: Lightbox, world: World) -> None:
    view = await open_as(lightbox, world, sid="ward")
    assert (await tell(lightbox, logout_token(lightbox, sub="other", sid="ward"))).is_success
    assert (await tell(lightbox, logout_token(lightbox, sid="wards"))).is_success
    assert await reason(view, world.my_image) == ""


async def test_a_logout_token_is_good_once(lightbox: Lightbox, world: World) -> None:
    token = logout_token(lightbox, sub="clinician")
    answers = await asyncio.gather(*(tell(lightbox, token, f"told-{n}") for n in range(5)))
    assert sorted(each.status_code for each in answers) == [200] + [400] * 4
    view = await open_as(lightbox, world, iat=int(time.time()) + 1)
    again = await tell(lightbox, token, "replays")
    assert (again.status_code, again.json()["error"]) == (400, "invalid_request")
    assert again.headers["cache-control"] == "no-store"
    assert await reason(view, world.my_image) == "", "a token that leaked ends nothing"
    (record,) = records(lightbox, "replays")
    assert (record["action"], record["outcome"], record["reason"]) == (
        *("sign-out", "denied", "replayed"),
    )
    assert "jti-" not in str(rows(lightbox, "SELECT * FROM spent_token"))


@pytest.mark.parametrize(
    "claims",
    [
        {"sub": None},
        {"jti": None},
        {"events": None},
        {"events": {}},
        {"events": [EVENT]},
        {"nonce": "n"},
        {"exp": 1},
        {"exp": None},
        {"iat": None},
        {"iss": "https://evil.example"},
        {"aud": "another"},
        {"sub": 7},
    ],
    ids=str,
)
async def test_a_logout_token_that_does_not_hold_ends_nothing(
    claims: dict[str, Any], lightbox: Lightbox, world: World
) -> None:
    view = await open_as(lightbox, world)
    answer = await tell(lightbox, logout_token(lightbox, **{"sub": "clinician", **claims}))
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_request")
    assert answer.headers["cache-control"] == "no-store"
    assert await reason(view, world.my_image) == ""
    (record,) = records(lightbox, "told")
    assert (record["outcome"], record["reason"]) == ("denied", "bad-token")


async def test_what_is_no_logout_token_is_400(lightbox: Lightbox, world: World) -> None:
    view = await open_as(lightbox, world)
    access_token = lightbox.token("clinician")
    forged = logout_token(lightbox, sub="clinician")[:-4] + "AAAA"
    for token in ("", "x", "a.b.c", access_token, forged):
        assert (await tell(lightbox, token)).status_code == 400
    bodies: list[dict[str, Any]] = [
        {"json": {"logout_token": logout_token(lightbox, sub="clinician")}},
        {"data": {"token": logout_token(lightbox, sub="clinician")}},
        {"params": {"logout_token": logout_token(lightbox, sub="clinician")}},
        {},
    ]
    for body in bodies:
        assert (await lightbox.ask(None, "POST", BACKCHANNEL, **body)).status_code == 400, body
    assert await reason(view, world.my_image) == ""


# --------------------------------------------------------------------------------- signs of life


async def test_somebody_who_only_looks_keeps_the_session(lightbox: Lightbox, world: World) -> None:
    view = await lightbox.open(f"/{world.my_study}")
    change(lightbox, "UPDATE launch_session SET last_used_at = ?", moment(minutes=-59))
    answer = await sign_of_life(view)
    assert answer.status_code == 200
    said = answer.json()
    assert said["purpose_of_use"] == ""
    assert 43_190 <= said["seconds_left"] <= 43_200
    assert said["warn_seconds"] == 600
    await lightbox.app.state.viewer.flush()
    (launch,) = rows(lightbox, "SELECT last_used_at FROM launch_session")
    assert launch["last_used_at"] > moment(minutes=-1)


async def test_a_sign_of_life_revives_nothing(lightbox: Lightbox, world: World) -> None:
    idle, expired, revoked, lost = [await lightbox.open(f"/{world.my_study}") for _ in range(4)]
    old = "UPDATE launch_session SET {} = ? WHERE ctx = ?"
    change(lightbox, old.format("last_used_at"), moment(minutes=-61), idle.ctx)
    change(lightbox, old.format("expires_at"), moment(seconds=-1), expired.ctx)
    await lightbox.must("clinician", "DELETE", f"/viewer/sessions/{revoked.ctx}")
    for view, because in ((idle, "idle"), (expired, "expired"), (revoked, "revoked")):
        answer = await sign_of_life(view)
        assert (answer.status_code, answer.json()["reason"]) == (403, because)
    assert (await sign_of_life(lost)).status_code == 200
    change(lightbox, "UPDATE imaging_order SET requested_by = 'x'")
    answer = await sign_of_life(lost)
    assert (answer.status_code, answer.json()["reason"]) == (403, "right-lost")


async def test_the_limit_is_told_as_it_comes_nearer(lightbox: Lightbox, world: World) -> None:
    view = await lightbox.open(f"/{world.my_study}")
    change(lightbox, "UPDATE launch_session SET expires_at = ?", moment(minutes=5))
    assert 290 <= (await sign_of_life(view)).json()["seconds_left"] <= 300


# ------------------------------------------------------------------ what is over says so, on record


@pytest.mark.parametrize("path", ["/studies", "frame", "alive", "status"])
async def test_each_request_after_the_end_leaves_a_record(
    path: str, lightbox: Lightbox, world: World
) -> None:
    view = await lightbox.open(f"/{world.my_study}")
    await lightbox.must("clinician", "POST", "/viewer/logout")
    headers = {"X-Request-ID": "too-late"}
    for _ in range(2):
        if path in ("alive", "status"):
            answer = await lightbox.client.get(
                f"/s/{view.ctx}/{path}", headers={"Cookie": view.cookie, **headers}
            )
        else:
            where = frame_of(world.my_image) if path == "frame" else path
            answer = await view.get(where, headers=headers)
        assert answer.status_code == 403
    assert [
        (each["action"], each["outcome"], each["reason"], each["actor"], each["patient_id"])
        for each in records(lightbox, "too-late")
    ] == [("study:view", "denied", "signed-out", "clinician", UUID(world.mine["id"]).hex)] * 2


# -------------------------------------------------------------------------- restriction, in flight


async def test_sealing_the_patient_ends_the_viewers_of_who_is_not_named(
    lightbox: Lightbox, world: World
) -> None:
    await lightbox.must("service", "PUT", f"/patients/{world.mine['id']}/care-team/other")
    view = await lightbox.open(f"/{world.my_study}")
    named = await lightbox.open(f"/{world.my_study}", sub="other")
    for each in (view, named):
        assert await reason(each, world.my_image) == ""
    seal(lightbox, world.mine["id"], named="other")
    assert await reason(view, world.my_image) == "restricted"
    assert await reason(named, world.my_image) == ""
    # Who merely has the address learns nothing of the restriction.
    stranger = await lightbox.client.get(f"/s/{view.ctx}/ended")
    assert "restricted" not in stranger.text.lower()
    assert "no longer have access" in stranger.text
    own = await lightbox.client.get(f"/s/{view.ctx}/ended", headers={"Cookie": view.cookie})
    assert "restricted to named people" in own.text


def seal(lightbox: Lightbox, patient_id: str, *, named: str, level: str = "sealed") -> None:
    """As the service would."""
    key = UUID(patient_id).hex
    change(
        lightbox,
        "INSERT INTO patient_restriction (patient_id, level, reason, set_at, set_by)"
        " VALUES (?, ?, '', ?, 'ehr')",
        *(key, level, moment()),
    )
    change(lightbox, "INSERT INTO named_person (patient_id, sub) VALUES (?, ?)", key, named)


# ---------------------------------------------------------------------------------- counts, upkeep


async def test_counts_of_a_failed_flush_come_with_the_next_and_hold_up_no_end(
    lightbox: Lightbox, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = await lightbox.open(f"/{world.my_study}")
    for _ in range(3):
        await view.get(frame_of(world.my_image))
    write = Usage._write

    async def fails(*args: Any) -> None:
        raise sa.exc.OperationalError("UPDATE", {}, Exception("disk I/O error"))

    monkeypatch.setattr(Usage, "_write", fails)
    with pytest.raises(sa.exc.OperationalError):
        await lightbox.app.state.viewer.flush()
    await view.get(frame_of(world.my_image))
    answer = await lightbox.ask("clinician", "DELETE", f"{SESSIONS}/{view.ctx}")
    assert answer.status_code == 204
    assert await reason(view, world.my_image) == "revoked", "an end doesn't wait for its counts"
    monkeypatch.setattr(Usage, "_write", write)
    await lightbox.app.state.viewer.flush()
    (study,) = rows(lightbox, "SELECT * FROM launch_study WHERE first_accessed_at IS NOT NULL")
    assert study["request_count"] == 4
    await lightbox.app.state.viewer.flush()
    (study,) = rows(lightbox, "SELECT * FROM launch_study WHERE first_accessed_at IS NOT NULL")
    assert study["request_count"] == 4, "and none comes twice"


async def test_what_is_used_while_the_sweep_begins_is_not_swept(
    lightbox: Lightbox, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its use is in memory and not yet written: neither idle, nor a link that nobody opened."""
    view = await lightbox.open(f"/{world.my_study}")
    assert await reason(view, world.my_image) == ""
    viewer = lightbox.app.state.viewer
    await viewer.flush()
    change(lightbox, "UPDATE launch_session SET last_used_at = ?", moment(minutes=-61))
    viewer._usage.touch(view.ctx, utcnow())

    async def later() -> None:
        return None

    monkeypatch.setattr(viewer._usage, "flush_if_possible", later)
    assert await viewer.sweep(Origin("sweeps")) == 0
    assert await reason(view, world.my_image) == ""


async def test_upkeep_goes_on_whatever_happens(
    lightbox: Lightbox, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main, "FLUSH_SECONDS", 0.0)
    monkeypatch.setattr(main, "SWEEP_EVERY_FLUSHES", 1)
    tried = asyncio.Event()

    class Viewer:
        """Fails in a way nobody foresaw; the third time it is well again."""

        calls = 0

        @property
        def closing(self) -> "Viewer":
            return self

        async def flush(self) -> None:
            self.calls += 1
            if self.calls < 3:
                raise KeyError("nobody foresaw it")

        async def sweep(self, origin: Origin) -> int:
            tried.set()
            return 0

    upkeep = asyncio.create_task(main._upkeep(Viewer()))  # type: ignore[arg-type]
    try:
        await asyncio.wait_for(tried.wait(), timeout=5)
        assert not upkeep.done()
    finally:
        upkeep.cancel()


async def test_a_prior_counts_for_itself(lightbox: Lightbox, world: World) -> None:
    other = await another_study(lightbox, world)
    view = await lightbox.open(f"/{world.my_study}")
    for image in (world.my_image, other, other):
        await view.get(frame_of(image))
    await sign_of_life(view)
    await lightbox.app.state.viewer.flush()
    counted = rows(lightbox, "SELECT study_instance_uid, request_count FROM launch_study")
    assert {each["study_instance_uid"]: each["request_count"] for each in counted} == {
        world.my_study: 1,
        other["study_instance_uid"]: 2,
    }


# ------------------------------------------------------------------ a sign-out that holds


async def test_a_token_from_before_the_sign_out_opens_nothing(
    lightbox: Lightbox, world: World
) -> None:
    path = f"/api/v1/dicom/viewer/url/{world.my_study}"
    bearer = {"Authorization": f"Bearer {lightbox.token('clinician')}"}
    assert (await lightbox.client.get(path, headers=bearer)).status_code == 200
    assert (await lightbox.client.post(LOGOUT, headers=bearer)).status_code == 200
    again = await lightbox.client.get(path, headers=bearer)
    assert (again.status_code, again.json()["reason"]) == (403, "signed-out")
    unsaid = await lightbox.ask(
        None, "GET", path, claims={"sub": "clinician", "roles": ["clinician"]}
    )
    assert unsaid.status_code == 403, "a token that doesn't say when it was issued"
    await open_as(lightbox, world, iat=int(time.time()) + 1)
    change(lightbox, "UPDATE ended_sign_in SET ended_at = ?", moment(minutes=-25 * 60))
    await lightbox.app.state.viewer.sweep(Origin("sweep", ""))
    assert not rows(lightbox, "SELECT * FROM ended_sign_in")


async def test_a_sign_in_that_ended_opens_nothing_and_others_do(
    lightbox: Lightbox, world: World
) -> None:
    assert (await tell(lightbox, logout_token(lightbox, sid="S1"))).status_code == 200
    path = f"/api/v1/dicom/viewer/url/{world.my_study}"
    who = {"sub": "clinician", "roles": ["clinician"], "iat": int(time.time()) - 5}
    for sid, status in (("S1", 403), ("S2", 200)):
        answer = await lightbox.ask(None, "GET", path, claims={**who, "sid": sid})
        assert answer.status_code == status, sid


async def test_a_launch_under_way_at_the_sign_out_opens_nothing(
    lightbox: Lightbox, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    orthanc = lightbox.app.state.viewer._orthanc
    ask = orthanc.refuse_shared

    async def meanwhile(*args: Any) -> Any:
        assert (await lightbox.ask("clinician", "POST", LOGOUT)).status_code == 200
        return await ask(*args)

    monkeypatch.setattr(orthanc, "refuse_shared", meanwhile)
    path = f"/api/v1/dicom/viewer/url/{world.my_study}"
    answer = await lightbox.ask("clinician", "GET", path)
    assert (answer.status_code, answer.json()["reason"]) == (403, "signed-out")
    assert not rows(lightbox, "SELECT * FROM launch_session")


async def test_a_link_that_a_sign_out_did_not_see_opens_nothing(
    lightbox: Lightbox, world: World
) -> None:
    """Committed after the sign-out had looked for links."""
    _, code = await _linked(lightbox, world)
    await lightbox.ask("clinician", "POST", LOGOUT)
    change(lightbox, "UPDATE launch_session SET ended_at = NULL, ended_because = ''")
    assert (await redeem(lightbox, code)).status_code == 403
    assert rows(lightbox, "SELECT ended_because AS b FROM launch_session") == [{"b": "signed-out"}]


async def test_a_link_that_ends_while_it_is_opened_opens_nothing(
    lightbox: Lightbox, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, code = await _linked(lightbox, world)
    viewer = lightbox.app.state.viewer
    decide = viewer._still_allowed

    async def meanwhile(session: Any, *args: Any) -> Any:
        access = await decide(session, *args)
        await session.commit()
        change(
            lightbox,
            "UPDATE launch_session SET ended_at = ?, ended_because = 'revoked'",
            moment(minutes=0),
        )
        return access

    monkeypatch.setattr(viewer, "_still_allowed", meanwhile)
    answer = await redeem(lightbox, code)
    assert (answer.status_code, "set-cookie" in answer.headers) == (403, False)


async def _linked(lightbox: Lightbox, world: World, **claims: Any) -> tuple[Any, str]:
    who = {"sub": "clinician", "roles": ["clinician"], "iat": int(time.time()), **claims}
    path = f"/api/v1/dicom/viewer/url/{world.my_study}"
    link = (await lightbox.ask(None, "GET", path, claims=who)).json()
    await lightbox.app.state.metadata.settled()
    return link, link["url"].partition("launch=")[2]


async def test_my_list_names_nobody_whom_i_may_not_see(lightbox: Lightbox, world: World) -> None:
    await lightbox.open(f"/order/{world.my_order['id']}")
    seal(lightbox, world.mine["id"], named="somebody")
    answer = await lightbox.ask("clinician", "GET", SESSIONS, headers={"X-Request-ID": "sealed"})
    (one,) = answer.json()
    assert not {"patient_id", "order_id", "study_instance_uids"} & one.keys()
    for word in (world.mine["id"], world.my_order["id"], world.my_study):
        assert word not in answer.text
    assert outcomes(lightbox, "sealed") == [("session:list", "granted")]
