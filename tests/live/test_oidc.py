"""Sign-in against an OpenID provider that really runs, as the API's callers meet it."""

import asyncio
import base64
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from joserfc import jwe, jwt
from joserfc.jwk import RSAKey

from app.identity import keys
from tests.images import ct_image
from tests.lightbox import Lightbox, running
from tests.live.conftest import Archive, settings_for, unique
from tests.oidc_provider import AUDIENCE, CLIENT_ID, OidcProvider
from tests.tables import records

ME = "/api/v1/patients"
STRANGER = RSAKey.generate_key(2048, {"kid": "stranger"})


@pytest.fixture(scope="module")
def provider() -> Iterator[OidcProvider]:
    with OidcProvider() as each:
        yield each


@pytest.fixture(autouse=True)
def well_behaved(provider: OidcProvider) -> Iterator[None]:
    provider.switch("ok")
    yield
    provider.switch("ok")


@pytest.fixture
async def lightbox(
    sqlite_url: str, archive: Archive, tmp_path: Path, provider: OidcProvider
) -> AsyncIterator[Lightbox]:
    """The app on real parts, with no keys yet."""
    settings = settings_for(
        sqlite_url,
        archive.server,
        spool_dir=tmp_path,
        jwt_secret=None,
        oidc_issuer=provider.issuer,
        service_accounts=CLIENT_ID,
        assigning_authority="HOSPITAL",
        failed_sign_ins_per_minute=10_000,
    )
    async with running(settings) as each:
        yield each


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Time as the keys see it; `clock.ahead` moves it."""
    moved = SimpleNamespace(ahead=0.0)
    monkeypatch.setattr(
        keys, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + moved.ahead)
    )
    return moved


async def ask(
    lightbox: Lightbox, token: str, path: str = ME, method: str = "GET", **more: Any
) -> httpx.Response:
    headers = {"Authorization": f"Bearer {token}", **more.pop("headers", {})}
    return await lightbox.ask(None, method, path, headers=headers, **more)


async def status(lightbox: Lightbox, token: str) -> int:
    return (await ask(lightbox, token)).status_code


# ------------------------------------------------------------------------------------- it works


async def test_tokens_of_the_provider_sign_in(lightbox: Lightbox, provider: OidcProvider) -> None:
    before = provider.asked()
    for alg in ("RS256", "ES256"):
        assert await status(lightbox, provider.mint(alg=alg)) == 200
    assert await status(lightbox, provider.mint(aud=["other", AUDIENCE])) == 200
    assert await status(lightbox, provider.mint(header={"typ": "at+jwt"})) == 200
    assert await status(lightbox, provider.mint(header={"pi.atm": "1"})) == 200
    assert await status(lightbox, provider.mint(roles=["nobody"])) == 403
    assert provider.asked() - before == 1


async def test_a_service_account_signs_in_by_client_credentials(
    lightbox: Lightbox, provider: OidcProvider
) -> None:
    assert provider.client_token("another secret").status_code == 401
    token = provider.client_token().json()["access_token"]
    person = {"first_name": "A", "last_name": "B", "dob": "1980-01-01", "mrn": unique()}
    made = await ask(lightbox, token, method="POST", json=person)
    assert made.status_code == 201
    (granted, *_) = records(lightbox, made.headers["x-request-id"])
    assert (granted["actor"], granted["actor_roles"]) == (CLIENT_ID, "service")


@pytest.mark.parametrize(
    "claims",
    [
        {"azp": CLIENT_ID, "roles": None},
        {"client_id": CLIENT_ID, "azp": CLIENT_ID, "roles": []},
        {"sub": CLIENT_ID.upper(), "roles": None},
        {"sub": f"{CLIENT_ID} ", "roles": None},
        {"azp": CLIENT_ID, "idtyp": "user", "roles": None},
        {"azp": "another", "idtyp": "app", "roles": None},
        {"azp": [CLIENT_ID], "idtyp": "app", "roles": None},
    ],
    ids=str,
)
async def test_a_person_who_uses_the_ehr_is_not_the_ehr(
    claims: dict[str, Any], lightbox: Lightbox, provider: OidcProvider
) -> None:
    answer = await ask(lightbox, provider.mint(**claims))
    assert (answer.status_code, answer.json().get("reason")) == (403, "role")


@pytest.mark.parametrize("marker", [{"idtyp": "app"}, {"gty": "client-credentials"}], ids=str)
async def test_a_client_that_the_provider_says_speaks_for_itself(
    marker: dict[str, str], lightbox: Lightbox, provider: OidcProvider
) -> None:
    claims: dict[str, Any] = {"sub": "5f2e-of-the-principal", "azp": CLIENT_ID, "roles": None}
    claims |= marker
    assert await status(lightbox, provider.mint(**claims)) == 200


# -------------------------------------------------------------------------------- attack vectors


def b64(part: bytes) -> str:
    return base64.urlsafe_b64encode(part).decode().rstrip("=")


def forged(
    header: dict[str, Any], payload: bytes, sign: Callable[[bytes], bytes] = lambda _: b""
) -> str:
    unsigned = f"{b64(json.dumps(header).encode())}.{b64(payload)}"
    return f"{unsigned}.{b64(sign(unsigned.encode()))}"


def hmac_by(secret: bytes) -> Callable[[bytes], bytes]:
    return lambda text: hmac.new(secret, text, hashlib.sha256).digest()


def attacks(provider: OidcProvider) -> Iterator[tuple[str, str]]:
    """Tokens that must sign nobody in."""
    good = provider.mint()
    head, payload_text, signature = good.split(".")
    payload = base64.urlsafe_b64decode(payload_text + "==")
    rsa, ec = provider.keys()
    public = RSAKey.import_key(rsa)
    kid = rsa["kid"]
    for alg in ("none", "nOnE", "NONE", ""):
        yield f"alg {alg!r}", forged({"alg": alg, "kid": kid}, payload)
        yield (
            f"alg {alg!r}, with a signature",
            forged({"alg": alg, "kid": kid}, payload, lambda _: b"x" * 256),
        )
    secrets = {
        "PEM": public.as_pem(private=False),
        "PEM without its last line end": public.as_pem(private=False).strip(),
        "DER": public.as_der(private=False),
        "JWK": json.dumps(rsa).encode(),
        "modulus": rsa["n"].encode(),
        "nothing": b"",
    }
    for name, secret in secrets.items():
        yield (
            f"HS256 with the public key as {name}",
            forged({"alg": "HS256", "kid": kid}, payload, hmac_by(secret)),
        )
    stranger = {"alg": "RS256", "kid": kid}
    claims = json.loads(payload)
    yield "a stranger's key", jwt.encode(stranger, claims, STRANGER)
    own = STRANGER.as_dict(private=False)
    elsewhere = f"{provider.issuer}/published-as-keys"
    named_keys: dict[str, Any] = {
        "jwk": own,
        "jku": elsewhere,
        "x5u": elsewhere,
        "x5c": [base64.b64encode(STRANGER.as_der(private=False)).decode()],
        "x5t": "stranger",
    }
    for name, value in named_keys.items():
        for named in (kid, "stranger"):
            header = {**stranger, name: value, "kid": named}
            yield f"{name} in the header, kid {named}", jwt.encode(header, claims, STRANGER)
    yield "crit", provider.mint(header={"crit": ["exp"], "exp": 1})
    yield "crit of nothing", provider.mint(header={"crit": []})
    yield "b64 true", provider.mint(header={"b64": True})
    yield "b64 with crit", provider.mint(header={"b64": True, "crit": ["b64"]})
    yield "the type of a logout token", provider.mint(header={"typ": "logout+jwt"})
    yield "an event", provider.mint(events={"urn:x": {}})
    now = int(time.time())
    wrongs: dict[str, dict[str, Any]] = {
        "iss": {"iss": provider.issuer + "/"},
        "no iss": {"iss": None},
        "aud": {"aud": "lightbox2"},
        "no aud": {"aud": None},
        "aud of others": {"aud": ["a", "b"]},
        "aud nested": {"aud": [[AUDIENCE]]},
        "expired": {"exp": now - 31},
        "no exp": {"exp": None},
        "exp as text": {"exp": str(now + 300)},
        "not yet": {"nbf": now + 90},
        "of the future": {"iat": now + 90},
        "no sub": {"sub": None},
        "empty sub": {"sub": ""},
        "sub of two lines": {"sub": "dr\nwho"},
        "sub as a list": {"sub": ["dr-who"]},
        "sub as a number": {"sub": 7},
    }
    for name, wrong in wrongs.items():
        yield name, provider.mint(**wrong)
    yield (
        "ECDSA with r = s = 0",
        forged({"alg": "ES256", "kid": ec["kid"]}, payload, lambda _: bytes(64)),
    )
    order = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
    both = order.to_bytes(32, "big") * 2
    yield (
        "ECDSA with r = s = n",
        forged({"alg": "ES256", "kid": ec["kid"]}, payload, lambda _: both),
    )
    yield "an EC key for RS256", forged({"alg": "RS256", "kid": ec["kid"]}, payload, lambda _: both)
    yield "an RSA key for ES256", forged({"alg": "ES256", "kid": kid}, payload, lambda _: both)
    for_encryption = RSAKey.import_key(public.as_pem(private=False))
    encrypted = jwe.encrypt_compact(
        {"alg": "RSA-OAEP", "enc": "A256GCM", "kid": kid}, payload, for_encryption
    )
    yield "JWE", encrypted
    for name, changed in {
        "no signature": f"{head}.{payload_text}.",
        "two parts": f"{head}.{payload_text}",
        "four parts": f"{good}.{signature}",
        "an empty part more": f"{good}.",
        "a letter more": f"{good}A",
        "padding": f"{good}==",
        "a line end": f"{good}%0A",
        "a blank within": f"{head}. {payload_text}.{signature}",
        "another payload": f"{head}.{b64(payload.replace(b'dr-who', b'dr-who2'))}.{signature}",
        "plus for minus": good.replace("-", "+").replace("_", "/") + "+",
        "very long": f"{head}.{payload_text}{'A' * 20_000}.{signature}",
    }.items():
        yield name, changed


async def test_no_attack_signs_anybody_in(lightbox: Lightbox, provider: OidcProvider) -> None:
    assert await status(lightbox, provider.mint()) == 200
    before, tried = provider.asked(), 0
    for how, token in attacks(provider):
        request_id = uuid4().hex
        answer = await ask(lightbox, token, headers={"X-Request-ID": request_id})
        assert answer.status_code == 401, how
        (record,) = records(lightbox, request_id)
        assert (record["action"], record["outcome"]) == ("sign-in", "denied"), how
        assert (record["reason"], record["actor"]) == ("bad-token", ""), how
        tried += 1
    assert tried > 50
    assert provider.asked() == before, "an unknown kid was asked for within the half minute"
    assert await status(lightbox, provider.mint()) == 200


async def test_claims_that_stand_twice_hold_for_nobody(
    lightbox: Lightbox, provider: OidcProvider
) -> None:
    """Signed by the provider, and read in two ways: which `sub` is it?"""
    payload = json.dumps(
        {"iss": provider.issuer, "aud": AUDIENCE, "sub": "dr-who", "exp": int(time.time()) + 300}
    )
    more = payload[:-1] + ', "roles": ["clinician"]}'
    assert await status(lightbox, provider.mint(payload=more)) == 200
    for doubled in (
        more[:-1] + ', "sub": "dr-who"}',
        more[:-1] + ', "roles": ["service"]}',
        more[:-1] + ', "a": {"b": 1, "b": 2}}',
        more[:-1] + ', "nbf": NaN}',
        more[:-1] + ', "nbf": -Infinity}',
        more + more,
        more + " {}",
        f"[{more}]",
        "[" * 10_000,
        '{"a":' * 10_000,
    ):
        assert await status(lightbox, provider.mint(payload=doubled)) == 401, doubled[-60:]
    header = b'{"alg":"RS256","alg":"RS256","kid":"x"}'
    token = f"{b64(header)}.{provider.mint().partition('.')[2]}"
    assert await status(lightbox, token) == 401


# ------------------------------------------------------------------------------------------ keys


async def test_rotated_keys_are_fetched_and_old_ones_forgotten(
    lightbox: Lightbox, provider: OidcProvider, clock: SimpleNamespace
) -> None:
    old = provider.mint()
    assert await status(lightbox, old) == 200
    provider.rotate()
    new = provider.mint()
    assert await status(lightbox, new) == 401, "asked a moment ago: not again"
    clock.ahead += keys.JWKS_RETRY_SECONDS + 1
    assert await status(lightbox, new) == 200
    assert await status(lightbox, old) == 401


async def test_a_flood_of_unknown_kids_does_not_reach_the_provider(
    lightbox: Lightbox, provider: OidcProvider, clock: SimpleNamespace
) -> None:
    good = provider.mint()
    assert await status(lightbox, good) == 200
    before = provider.asked()
    for _ in range(3):
        clock.ahead += keys.JWKS_RETRY_SECONDS + 1
        flood = [provider.mint(header={"kid": uuid4().hex}) for _ in range(20)]
        found = await asyncio.gather(*(status(lightbox, each) for each in [*flood, good]))
        assert found == [*[401] * 20, 200]
    assert provider.asked() - before == 3


@pytest.mark.parametrize(
    "mode",
    [
        *("error", "garbage", "silent", "huge", "many", "redirect", "other-issuer", "twice"),
        *("weak", "private", "encryption", "other-operation", "symmetric"),
    ],
)
async def test_keys_of_a_provider_that_misbehaves(
    mode: str,
    lightbox: Lightbox,
    provider: OidcProvider,
    clock: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(keys, "JWKS_TIMEOUT_SECONDS", 1.0)
    good = provider.mint()
    provider.switch(mode)
    refused = await ask(lightbox, good)
    assert refused.status_code == 503
    assert refused.headers["retry-after"]
    assert provider.issuer not in refused.text
    # Nobody waits for what has just failed, and nobody asks again at once.
    before = provider.asked()
    found = await asyncio.gather(*(status(lightbox, good) for _ in range(10)))
    assert set(found) == {503}
    assert provider.asked() == before
    # And then it is well again.
    provider.switch("ok")
    clock.ahead += keys.JWKS_RETRY_WITHOUT_SECONDS + 1
    assert await status(lightbox, good) == 200
    # Keys that are known go on while it misbehaves once more: for a day.
    provider.switch(mode)
    for _ in range(2):
        clock.ahead += keys.JWKS_FRESH_SECONDS + 1
        assert await status(lightbox, good) == 200
    clock.ahead += keys.JWKS_STALE_SECONDS
    assert await status(lightbox, good) == 503


@pytest.mark.parametrize("alg", ["RS256", "HS256"])
@pytest.mark.parametrize(
    "mode",
    ["weak", "private", "encryption", "other-operation", "other-algorithm", "symmetric"],
)
async def test_such_keys_sign_nobody_in(
    mode: str, alg: str, lightbox: Lightbox, provider: OidcProvider
) -> None:
    provider.switch(mode)
    expected = 401 if mode == "other-algorithm" or alg == "HS256" else 503
    assert await status(lightbox, provider.mint(alg=alg)) == expected


async def test_a_provider_that_is_gone_and_comes_back(
    lightbox: Lightbox, provider: OidcProvider, clock: SimpleNamespace
) -> None:
    old = provider.mint()
    assert await status(lightbox, old) == 200
    provider.stop()
    try:
        clock.ahead += keys.JWKS_FRESH_SECONDS + 1
        assert await status(lightbox, old) == 200
    finally:
        provider.start()
    new = provider.mint()  # the process has other keys now
    assert await status(lightbox, new) == 401
    clock.ahead += keys.JWKS_RETRY_SECONDS + 1
    # The new `rsa-1` is another key under the same name: asked for again with the hour, not before.
    clock.ahead += keys.JWKS_FRESH_SECONDS
    assert await status(lightbox, new) == 200
    assert await status(lightbox, old) == 401


# ----------------------------------------------------------------------- what a token is limited to


async def test_a_token_for_one_patient_opens_that_one_alone(
    lightbox: Lightbox, provider: OidcProvider
) -> None:
    service = provider.client_token().json()["access_token"]
    patients, studies = [], []
    for mrn in (unique(), unique()):
        person = {"first_name": "A", "last_name": "B", "dob": "1980-01-01", "mrn": mrn}
        made = (await ask(lightbox, service, method="POST", json=person)).json()
        order = {"patient_id": made["id"], "requested_by": "dr-who", "order_category": "CT"}
        ordered = await ask(lightbox, service, "/api/v1/orders", "POST", json=order)
        image = ct_image(patient_id=mrn, PatientName="B^A", PatientBirthDate="19800101")
        sent = await ask(
            lightbox,
            service,
            "/api/v1/dicom/upload",
            "POST",
            files={"file": ("a.dcm", image, "application/dicom")},
            data={"order_id": ordered.json()["id"]},
        )
        assert sent.status_code == 200, sent.text
        patients.append(made)
        studies.append(sent.json())
    mine, other = patients
    ways = {
        "id": mine["id"],
        "ID": mine["id"].upper(),
        "issuer|mrn": f"HOSPITAL|{mine['mrn']}",
        "mrn": mine["mrn"],
    }
    for how, claim in ways.items():
        token = provider.mint(patient=claim)
        listed = (await ask(lightbox, token)).json()
        assert [each["id"] for each in listed] == [mine["id"]], how
        seen = (await ask(lightbox, token, "/api/v1/dicom/studies")).json()
        assert [each["patient_id"] for each in seen] == [mine["id"]], how
        found = (await ask(lightbox, token, "/dicom-web/studies")).headers["x-total-count"]
        assert found == "1", how
        for patient, image, expected in (
            (mine, studies[0], (200, 200, 200, 200)),
            (other, studies[1], (403, 403, 404, 404)),
        ):
            asked = [
                await ask(lightbox, token, path)
                for path in (
                    f"/api/v1/patients/{patient['id']}",
                    f"/api/v1/dicom/viewer/url/{image['study_instance_uid']}",
                    frame_of(image),
                    f"/dicom-web/studies/{image['study_instance_uid']}",
                )
            ]
            assert tuple(each.status_code for each in asked) == expected, how
            if expected[0] == 403:
                reasons = {
                    records(lightbox, each.headers["x-request-id"])[0]["reason"] for each in asked
                }
                assert reasons == {"out-of-context"}, how
    for nobody in NOBODY:
        token = provider.mint(patient=nobody)
        assert (await ask(lightbox, token)).json() == [], nobody
        assert (await ask(lightbox, token, frame_of(studies[0]))).status_code == 404, nobody
        answer = await ask(lightbox, token, f"/api/v1/patients/{mine['id']}")
        assert answer.json()["reason"] == "out-of-context", nobody
    # The service too, and what is about no patient.
    for token in (
        provider.mint(sub=CLIENT_ID, patient=mine["id"]),
        provider.mint(roles=["service", "auditor", "admin"], patient=mine["id"]),
    ):
        assert [each["id"] for each in (await ask(lightbox, token)).json()] == [mine["id"]]
        person = {"first_name": "A", "last_name": "B", "dob": "1980-01-01", "mrn": unique()}
        made = await ask(lightbox, token, method="POST", json=person)
        assert made.json()["reason"] == "out-of-context"
    whole = provider.mint(roles=["auditor"], patient=mine["id"])
    assert (await ask(lightbox, whole, "/api/v1/audit")).json()["reason"] == "out-of-context"


NOBODY: list[Any] = [
    *("", " ", "|", "HOSPITAL|", "|x", "a|b|c", "*", "%", str(UUID(int=1)), "x" * 65),
    *(0, 7, True, [], ["x"], {"id": "x"}, "Patient/1", "MRN\n", "MRN\x00"),
]


def frame_of(image: Any) -> str:
    return (
        f"/dicom-web/studies/{image['study_instance_uid']}/series/{image['series_instance_uid']}"
        f"/instances/{image['sop_instance_uid']}/frames/1"
    )


@pytest.mark.parametrize(
    ("scope", "patients", "studies"),
    [
        ("openid profile launch/patient", 200, 200),
        ("user/ImagingStudy.rs", 403, 200),
        ("user/ImagingStudy.read", 403, 200),
        ("openid user/Patient.rs", 200, 403),
        ("user/*.read", 200, 200),
        ("user/*.*", 200, 200),
        ("system/*.cruds", 200, 200),
        ("user/*.write", 403, 403),
        ("patient/*.rs", 403, 403),  # no patient in context
        ("user/ImagingStudy.rs?modality=CT", 403, 403),
        ("user/ImagingStudy.sr", 403, 403),
        ("user/imagingstudy.rs", 403, 403),
        ("user/ImagingStudy.", 403, 403),
        ("user/", 403, 403),
        (["user/ImagingStudy.rs"], 403, 200),
        ([7], 403, 403),
        ({"user/*.rs": True}, 403, 403),
        (7, 403, 403),
    ],
    ids=str,
)
async def test_scopes_limit_a_token(
    scope: Any, patients: int, studies: int, lightbox: Lightbox, provider: OidcProvider
) -> None:
    token = provider.mint(scope=scope)
    for path, expected in ((ME, patients), ("/api/v1/dicom/studies", studies)):
        answer = await ask(lightbox, token, path)
        assert answer.status_code == expected, answer.text
        if expected == 403:
            assert answer.json()["reason"] == "scope"
    # A study nobody has: refused for the scope, or not there.
    frame = await ask(lightbox, token, "/dicom-web/studies/2.25.1/metadata")
    assert frame.status_code == (404 if studies == 200 else 403)
