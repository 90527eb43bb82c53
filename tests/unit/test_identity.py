"""From a token to a Principal: what is refused, and where the keys come from."""

import base64
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID

import httpx
import pytest
import respx
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding
from hypothesis import given
from hypothesis import strategies as st
from joserfc import jws, jwt
from joserfc.jwk import ECKey, Key, OctKey, RSAKey
from pydantic import SecretStr, ValidationError

from app.errors import Unauthenticated, Unavailable
from app.identity import (
    LogoutToken,
    PatientContext,
    Principal,
    Role,
    TokenVerifier,
    issue_token,
    keys,
)
from app.settings import Settings
from tests.lightbox import SECRET, make_settings, signed

ISSUER = "https://login.hospital.test/realms/main"
JWKS = "https://login.hospital.test/keys"
LEEWAY = 30

SHARED = make_settings("sqlite+aiosqlite://", "http://orthanc.test")
OIDC = make_settings(
    "sqlite+aiosqlite://", "http://orthanc.test", jwt_secret=None, oidc_issuer=ISSUER
)

VERIFIER = TokenVerifier(SHARED, cast(httpx.AsyncClient, None))  # a secret needs no client

RSA = RSAKey.generate_key(2048, {"kid": "rsa"})
RSA_NEXT = RSAKey.generate_key(2048, {"kid": "rsa-next"})
EC = ECKey.generate_key("P-256", {"kid": "ec"})
STRANGER = RSAKey.generate_key(2048, {"kid": "rsa"})


def claims(**more: Any) -> dict[str, Any]:
    """Claims that the OIDC verifier takes; None leaves one out."""
    sane = {
        "iss": ISSUER,
        "aud": "lightbox",
        "sub": "dr-who",
        "name": "Dr. Who",
        "roles": ["clinician"],
        "exp": int(time.time()) + 300,
    }
    return {name: value for name, value in {**sane, **more}.items() if value is not None}


def token(key: Key = RSA, *, alg: str = "RS256", header: Any = None, **more: Any) -> str:
    """A token signed by `key`; `header` over `alg` and the key's `kid`."""
    head = {"alg": alg, "kid": key.kid, **(header or {})}
    kept = {name: value for name, value in head.items() if value is not None}
    return jwt.encode(kept, claims(**more), key, algorithms=[alg])


def raw_token(header: Any, payload: Any, signature: bytes = b"") -> str:
    """Three parts, whatever they are."""
    return ".".join(
        base64.urlsafe_b64encode(part).decode().rstrip("=")
        for part in (json.dumps(header).encode(), json.dumps(payload).encode(), signature)
    )


def hs256(header: Any, payload: Any, secret: bytes, digest: Any = hashlib.sha256) -> str:
    """A token signed by a secret, without a library that would refuse to."""
    unsigned = raw_token({"alg": "HS256", **header}, payload).rpartition(".")[0]
    signature = hmac.new(secret, unsigned.encode(), digest).digest()
    return f"{unsigned}.{base64.urlsafe_b64encode(signature).decode().rstrip('=')}"


def rs256(header: Any, payload: Any) -> str:
    """A token with any header, rightly signed by the issuer's key."""
    unsigned = raw_token(header, payload).rpartition(".")[0]
    private: Any = RSA.private_key
    signature = private.sign(unsigned.encode(), padding.PKCS1v15(), hashes.SHA256())
    return f"{unsigned}.{base64.urlsafe_b64encode(signature).decode().rstrip('=')}"


# ------------------------------------------------------------------------------- shared secret


@pytest.fixture
def shared() -> TokenVerifier:
    return VERIFIER


async def test_a_development_token_holds(shared: TokenVerifier) -> None:
    issued = issue_token(SHARED, "dr-who", [Role.CLINICIAN, Role.RADIOLOGIST], minutes=1)
    roles = frozenset({Role.CLINICIAN, Role.RADIOLOGIST})
    assert await shared.principal(issued) == Principal("dr-who", "dr-who", roles, "main")


def test_development_tokens_are_not_issued_beside_an_oidc_issuer() -> None:
    with pytest.raises(ValueError, match="OIDC provider"):
        issue_token(OIDC, "dr-who", [Role.CLINICIAN], minutes=1)


now = int(time.time())
HOUR = 3600


@pytest.mark.parametrize(
    "wrong",
    [
        {"iss": None},
        {"iss": ""},
        {"iss": "lightbox-development/"},
        {"iss": "Lightbox-development"},
        {"iss": ["lightbox-development"]},
        {"aud": None},
        {"aud": ""},
        {"aud": "lightbox2"},
        {"aud": ["other", "others"]},
        {"aud": {"lightbox": True}},
        {"exp": None},
        {"exp": 0},
        {"exp": now - HOUR},
        {"exp": now - LEEWAY - 2},
        {"exp": str(now + HOUR)},
        {"exp": True},
        {"exp": {"at": now + HOUR}},
        {"exp": "never"},
        {"nbf": now + HOUR},
        {"nbf": now + LEEWAY + HOUR},
        {"nbf": "soon"},
        {"iat": now + HOUR},
        {"sub": None},
        {"sub": ""},
    ],
    ids=str,
)
async def test_a_wrong_claim_is_refused(wrong: dict[str, Any], shared: TokenVerifier) -> None:
    with pytest.raises(Unauthenticated, match="token"):
        await shared.principal(signed(SHARED, **wrong))


@pytest.mark.parametrize(
    "fine", [{"aud": ["others", "lightbox"]}, {"jti": "1", "anything": {"else": []}}], ids=str
)
async def test_what_else_a_token_may_say(fine: dict[str, Any], shared: TokenVerifier) -> None:
    assert (await shared.principal(signed(SHARED, **fine))).sub == "clinician"


@pytest.mark.parametrize(
    ("claim", "seconds"),
    [("exp", -LEEWAY // 2), ("nbf", -HOUR), ("nbf", LEEWAY // 2), ("iat", 0)],
)
async def test_clocks_may_differ_a_little(claim: str, seconds: int, shared: TokenVerifier) -> None:
    """Counted from now, not from when the tests were collected."""
    times = {claim: int(time.time()) + seconds}
    assert (await shared.principal(signed(SHARED, **times))).sub == "clinician"


@pytest.mark.parametrize(
    "header",
    [
        {"alg": "none"},
        {"alg": "None"},
        {"alg": ""},
        {"alg": "hs256"},
        {"alg": "HS512"},
        {"alg": "HS256", "crit": ["exp"], "exp": 1},
        {"alg": "HS256", "crit": ["unknown"], "unknown": True},
        {"alg": "HS256", "b64": False, "crit": ["b64"]},
        {"alg": ["HS256"]},
        {"alg": None},
        {},
    ],
    ids=str,
)
async def test_another_header_is_refused(header: dict[str, Any], shared: TokenVerifier) -> None:
    """Each is signed with the secret, where that means anything."""
    payload = {"iss": SHARED.jwt_issuer, "aud": "lightbox", "sub": "x", "exp": now + HOUR}
    digest = hashlib.sha512 if header.get("alg") == "HS512" else hashlib.sha256
    whole = {"alg": None, **header}
    for forged in (hs256(whole, payload, SECRET.encode(), digest), raw_token(header, payload)):
        with pytest.raises(Unauthenticated):
            await shared.principal(forged)
    assert (await shared.principal(hs256({}, payload, SECRET.encode()))).sub == "x"


async def test_a_signature_must_be_whole(shared: TokenVerifier) -> None:
    good = signed(SHARED)
    head, payload, signature = good.split(".")
    other = signed(SHARED, roles=["service"]).split(".")[1]
    for forged in (
        f"{head}.{payload}.",
        f"{head}.{payload}",
        f"{head}.{other}.{signature}",
        f"{head}.{payload}.{signature[:-2]}",
        f"{head}.{payload}.{signature}.{signature}",
        signed(SHARED.model_copy(update={"jwt_audience": "x"})),
        jwt.encode({"alg": "HS256"}, claims(iss=SHARED.jwt_issuer), OctKey.import_key("x" * 40)),
    ):
        with pytest.raises(Unauthenticated):
            await shared.principal(forged)


@pytest.mark.parametrize(
    "forged",
    [
        "",
        ".",
        "..",
        "....",
        "a.b.c",
        "é.é.é",
        "\x00",
        "null.null.null",
        raw_token([], []),
        raw_token("HS256", {}),
        raw_token({"alg": "HS256"}, "x"),
        raw_token({"alg": "HS256"}, []),
        base64.urlsafe_b64encode(b"[" * 100_000).decode() + ".e30.e30",
        base64.urlsafe_b64encode(b'{"alg":' * 100_000).decode() + ".e30.e30",
        "e30." * 1000,
        "A" * 100_000,
    ],
    ids=lambda each: each[:12],
)
async def test_garbage_is_refused(forged: str, shared: TokenVerifier) -> None:
    with pytest.raises(Unauthenticated):
        await shared.principal(forged)


@pytest.mark.parametrize("payload", [b"[" * 100_000, b"not JSON", b"[]", b'"text"', b"\xff", b""])
async def test_a_signed_payload_that_is_no_object_is_refused(
    payload: bytes, shared: TokenVerifier
) -> None:
    forged = jws.serialize_compact({"alg": "HS256"}, payload, OctKey.import_key(SECRET))
    with pytest.raises(Unauthenticated):
        await shared.principal(forged)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
NAMES = st.sampled_from(["iss", "aud", "exp", "nbf", "iat", "sub", "name", "roles", "site"])


@given(text=st.text(max_size=200) | st.binary(max_size=100).map(lambda each: each.decode("latin1")))
async def test_no_text_raises_anything_else(text: str) -> None:
    with pytest.raises(Unauthenticated):
        await VERIFIER.principal(text)


@given(header=JSON, payload=JSON, signature=st.binary(max_size=64))
async def test_no_parts_raise_anything_else(header: Any, payload: Any, signature: bytes) -> None:
    with pytest.raises(Unauthenticated):
        await VERIFIER.principal(raw_token(header, payload, signature))


@given(wrong=st.dictionaries(NAMES, JSON, max_size=4))
async def test_no_signed_claims_raise_anything_else(wrong: dict[str, Any]) -> None:
    """A provider may say anything: a principal that can be recorded, or 401."""
    try:
        who = await VERIFIER.principal(signed(SHARED, **wrong))
    except Unauthenticated:
        return
    assert who.sub.isprintable()
    assert 0 < len(who.sub) <= 255
    assert isinstance(who.name, str)
    assert who.roles <= set(Role)
    assert who.site


# --------------------------------------------------------------------------------------- claims


@pytest.mark.parametrize(
    ("path", "given_claims", "roles"),
    [
        ("roles", {"roles": ["admin"]}, {Role.ADMIN}),
        ("realm_access.roles", {"realm_access": {"roles": ["admin", "x"]}}, {Role.ADMIN}),
        ("realm_access.roles", {"realm_access.roles": ["admin"]}, set()),
        ("realm_access.roles", {"roles": ["admin"]}, set()),
        ("realm_access.roles", {"realm_access": ["admin"]}, set()),
        ("realm_access.roles", {"realm_access": None}, set()),
        ("realm_access.roles", {"realm_access": {"roles": {"admin": 1}}}, set()),
        ("a.b.c", {"a": {"b": {"c": "auditor"}}}, {Role.AUDITOR}),
    ],
)
async def test_roles_are_read_where_the_settings_say(
    path: str, given_claims: dict[str, Any], roles: set[Role]
) -> None:
    settings = SHARED.model_copy(update={"roles_claim": path})
    verifier = TokenVerifier(settings, cast(httpx.AsyncClient, None))
    who = await verifier.principal(signed(settings, **given_claims))
    assert who.roles == roles


async def test_an_issued_token_carries_roles_where_they_are_read() -> None:
    settings = SHARED.model_copy(update={"roles_claim": "realm_access.roles"})
    issued = issue_token(settings, "ada", [Role.ADMIN], minutes=1)
    verifier = TokenVerifier(settings, cast(httpx.AsyncClient, None))
    assert (await verifier.principal(issued)).roles == {Role.ADMIN}


@pytest.mark.parametrize(
    ("given_claims", "name", "site"),
    [
        ({"name": "Dr. Who"}, "Dr. Who", "main"),
        ({"name": None}, "clinician", "main"),
        ({"name": {"first": "X"}}, "clinician", "main"),
        ({"name": "N", "site": "north"}, "N", "north"),
        ({"name": "N", "site": ""}, "N", "main"),
        ({"name": "N", "site": ["north"]}, "N", "main"),
    ],
)
async def test_name_and_site_have_a_default(
    given_claims: dict[str, Any], name: str, site: str, shared: TokenVerifier
) -> None:
    who = await shared.principal(signed(SHARED, **given_claims))
    assert (who.name, who.site) == (name, site)


@pytest.mark.parametrize(
    "wrong",
    [
        {"jwt_secret": SecretStr("short")},
        {"jwt_secret": None},
        {"oidc_issuer": ISSUER},
        {"jwt_secret": None, "oidc_issuer": ISSUER, "jwt_algorithms": "HS256"},
        {"jwt_secret": None, "oidc_issuer": ISSUER, "jwt_algorithms": "RS256,none"},
        {"jwt_secret": None, "oidc_issuer": ISSUER, "jwt_algorithms": ""},
    ],
    ids=str,
)
def test_settings_that_would_be_unsafe_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        make_settings("sqlite+aiosqlite://", "http://orthanc.test", **wrong)


# ----------------------------------------------------------------------------------------- JWKS


@dataclass
class Provider:
    """An OIDC provider at the transport, and a verifier that trusts it."""

    verifier: TokenVerifier
    discovery: Any = field(default_factory=lambda: {"issuer": ISSUER, "jwks_uri": JWKS})
    keys: Any = field(default_factory=lambda: {"keys": [public(RSA), public(EC)]})
    fault: Exception | httpx.Response | None = None
    fetched: int = 0  # how often the keys were asked for
    clock: float = 1000.0

    def answer(self, request: httpx.Request) -> httpx.Response:
        self.fetched += str(request.url) == JWKS
        if isinstance(self.fault, Exception):
            raise self.fault
        if self.fault is not None:
            return self.fault
        told = {f"{ISSUER}/.well-known/openid-configuration": self.discovery, JWKS: self.keys}
        return httpx.Response(200, json=told[str(request.url)])


def public(key: Key, **more: Any) -> dict[str, Any]:
    return {**key.as_dict(private=False), "use": "sig", **more}


@pytest.fixture
async def provider(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Provider]:
    async with httpx.AsyncClient() as client:
        made = Provider(TokenVerifier(OIDC, client))
        monkeypatch.setattr(keys, "time", SimpleNamespace(monotonic=lambda: made.clock))
        with respx.mock(assert_all_called=False) as router:
            router.route(host="login.hospital.test").mock(side_effect=made.answer)
            router.route().mock(side_effect=httpx.UnsupportedProtocol("only http and https"))
            yield made


async def test_a_token_of_the_issuer_holds(provider: Provider) -> None:
    for good in (token(), token(EC, alg="ES256")):
        who = await provider.verifier.principal(good)
        assert who == Principal("dr-who", "Dr. Who", frozenset({Role.CLINICIAN}), "main")
    assert provider.fetched == 1


def confused() -> Iterator[tuple[str, str]]:
    """Tokens that name a key or an algorithm of the attacker's choice."""
    for form in ("PEM", "DER"):
        known = RSA.as_pem(private=False) if form == "PEM" else RSA.as_der(private=False)
        yield f"HS256 with the public key in {form}", hs256({"kid": "rsa"}, claims(), known)
    yield "HS256 with the shared secret", hs256({"kid": "rsa"}, claims(), SECRET.encode())
    yield "none", raw_token({"alg": "none", "kid": "rsa"}, claims())
    yield "another RSA key of that kid", token(STRANGER)
    embedded = {"jwk": STRANGER.as_dict(private=False)}
    yield "its own key in the header", token(STRANGER, header={**embedded, "kid": None})
    yield "its own key and a known kid", token(STRANGER, header=embedded)
    yield "a jku", token(STRANGER, header={"jku": "https://evil.test/keys"})
    yield "an x5u", token(STRANGER, header={"x5u": "https://evil.test/cert", "kid": "evil"})
    yield "a kid that is a path", token(STRANGER, header={"kid": "../../etc/passwd"})
    yield "an unknown kid", token(RSA_NEXT)
    yield "no kid", token(RSA, header={"kid": None})
    yield "an RSA key for ES256", raw_token({"alg": "ES256", "kid": "rsa"}, claims(), b"x" * 64)
    yield "an EC key for RS256", raw_token({"alg": "RS256", "kid": "ec"}, claims(), b"x" * 256)
    yield "RS384, not in the settings", token(RSA, alg="RS384")
    yield "PS256, not in the settings", token(RSA, alg="PS256")
    yield "the issuer of development", token(iss="lightbox-development")
    yield "another issuer", token(iss="https://evil.test")
    yield "another audience", token(aud="account")
    crit = {"alg": "RS256", "kid": "rsa", "crit": ["urn:x"], "urn:x": 1}
    yield "unknown crit", rs256(crit, claims())


CONFUSED = dict(confused())


@pytest.mark.parametrize("how", CONFUSED)
async def test_a_token_cannot_choose_its_key(how: str, provider: Provider) -> None:
    with pytest.raises(Unauthenticated):
        await provider.verifier.principal(CONFUSED[how])
    assert provider.fetched <= 2


async def test_what_the_header_says_of_keys_is_ignored(provider: Provider) -> None:
    header = {"alg": "RS256", "kid": "rsa", "jwk": public(EC), "jku": "https://evil.test"}
    assert (await provider.verifier.principal(rs256(header, claims()))).sub == "dr-who"
    assert provider.fetched == 1


async def test_an_unknown_kid_fetches_the_keys_again_once(provider: Provider) -> None:
    await provider.verifier.principal(token())
    provider.keys = {"keys": [public(RSA_NEXT)]}
    with pytest.raises(Unauthenticated):  # asked a moment ago: not again
        await provider.verifier.principal(token(RSA_NEXT))
    assert provider.fetched == 1
    provider.clock += keys.JWKS_RETRY_SECONDS + 1
    assert (await provider.verifier.principal(token(RSA_NEXT))).sub == "dr-who"
    assert provider.fetched == 2
    for _ in range(5):
        with pytest.raises(Unauthenticated):  # the old key has been taken away
            await provider.verifier.principal(token(RSA))
    assert provider.fetched == 2


async def test_keys_are_looked_at_again_after_an_hour(provider: Provider) -> None:
    await provider.verifier.principal(token())
    provider.keys = {"keys": [public(EC)]}
    provider.clock += keys.JWKS_FRESH_SECONDS - 1
    await provider.verifier.principal(token())
    provider.clock += 2
    with pytest.raises(Unauthenticated):
        await provider.verifier.principal(token())
    assert provider.fetched == 2


FAULTS: dict[str, Exception | httpx.Response] = {
    "refused": httpx.ConnectError("refused at 10.0.0.1"),
    "timeout": httpx.ReadTimeout("slow"),
    "cut": httpx.RemoteProtocolError("peer closed connection"),
    "500": httpx.Response(500),
    "404": httpx.Response(404, json={}),
    "HTML": httpx.Response(200, html="<html>Sign in</html>"),
    "a list": httpx.Response(200, json=[]),
    "null": httpx.Response(200, json=None),
    "half a JSON": httpx.Response(200, content=b'{"issuer": "'),
    "a redirect": httpx.Response(302, headers={"Location": "https://evil.test/"}),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_without_keys_nobody_signs_in(fault: str, provider: Provider) -> None:
    provider.fault = FAULTS[fault]
    with pytest.raises(Unavailable) as caught:
        await provider.verifier.principal(token())
    assert "identity provider" in caught.value.detail
    assert "10.0.0.1" not in caught.value.detail
    provider.fault = None
    provider.clock += keys.JWKS_RETRY_WITHOUT_SECONDS + 1
    assert (await provider.verifier.principal(token())).sub == "dr-who"


@pytest.mark.parametrize("fault", FAULTS)
async def test_known_keys_go_on_working(fault: str, provider: Provider) -> None:
    await provider.verifier.principal(token())
    provider.fault = FAULTS[fault]
    provider.clock += keys.JWKS_FRESH_SECONDS + 1
    assert (await provider.verifier.principal(token())).sub == "dr-who"
    with pytest.raises(Unauthenticated):
        await provider.verifier.principal(token(STRANGER))


@pytest.mark.parametrize(
    "discovery",
    [
        {"issuer": "https://evil.test", "jwks_uri": JWKS},
        {"issuer": ISSUER + "/", "jwks_uri": JWKS},
        {"jwks_uri": JWKS},
        {"issuer": ISSUER},
        {"issuer": ISSUER, "jwks_uri": None},
        {"issuer": ISSUER, "jwks_uri": 7},
        {"issuer": ISSUER, "jwks_uri": ""},
        {"issuer": ISSUER, "jwks_uri": "file:///etc/passwd"},
        {"issuer": ISSUER, "jwks_uri": "https://login.hospital.test:port/"},
    ],
    ids=str,
)
async def test_a_wrong_discovery_document_is_not_followed(
    discovery: Any, provider: Provider
) -> None:
    provider.discovery = discovery
    with pytest.raises(Unavailable):
        await provider.verifier.principal(token())
    assert provider.fetched == 0


@pytest.mark.parametrize(
    "keys",
    [
        {},
        [],
        {"keys": None},
        {"keys": []},
        {"keys": ["rsa"]},
        {"keys": [{"kty": "RSA"}]},
        {"keys": [{"kty": "oct", "k": "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0LXNlY3JldA"}]},
        {"keys": [{"kty": "RSA", "n": "!", "e": "AQAB", "kid": "rsa"}]},
        {"keys": [public(RSA, use="enc")]},
    ],
    ids=lambda each: str(each)[:40],
)
async def test_keys_without_a_usable_one_are_none(keys: Any, provider: Provider) -> None:
    provider.keys = keys
    with pytest.raises(Unavailable):
        await provider.verifier.principal(token())


@pytest.mark.parametrize(
    "strange",
    [
        {"kty": "AKP", "kid": "post-quantum", "alg": "ML-DSA-44", "pub": "eA"},
        {"kty": "RSA", "kid": "no modulus"},
        {"kty": "EC", "kid": "curve", "crv": "P-999", "x": "eA", "y": "eA"},
        {"kty": "EC", "kid": "not on it", "crv": "P-256", "x": "eA", "y": "eA"},
        {"kty": "OKP", "kid": "short", "crv": "Ed25519", "x": "eA"},
        {"kty": "OKP", "kid": "other", "crv": "X999", "x": "eA"},
        {"kty": "RSA", "kid": 7, "n": 1, "e": 2},
        {"kid": "no type"},
        {"kty": ["RSA"]},
    ],
    ids=str,
)
async def test_one_key_that_is_not_understood_harms_no_other(
    strange: dict[str, Any], provider: Provider
) -> None:
    """RFC 7517, section 5: such a key is passed over."""
    provider.keys = {"keys": [strange, public(RSA)]}
    assert (await provider.verifier.principal(token())).sub == "dr-who"


async def test_a_symmetric_key_in_a_jwks_signs_nothing(provider: Provider) -> None:
    secret = OctKey.import_key("everybody can read this, it is public")
    published = {**secret.as_dict(private=True), "kid": "oct", "use": "sig"}
    provider.keys = {"keys": [published, public(RSA)]}
    forged = jwt.encode({"alg": "HS256", "kid": "oct"}, claims(), secret, algorithms=["HS256"])
    with pytest.raises(Unauthenticated):
        await provider.verifier.principal(forged)
    assert (await provider.verifier.principal(token())).sub == "dr-who"


async def test_one_key_needs_no_kid(provider: Provider) -> None:
    """RFC 7515, section 4.1.4: `kid` is optional; with one key there is nothing to choose."""
    provider.keys = {"keys": [public(RSA)]}
    who = await provider.verifier.principal(token(header={"kid": None}))
    assert who.sub == "dr-who"


def test_settings_name_one_source_of_keys() -> None:
    assert isinstance(OIDC, Settings)
    assert OIDC.jwt_algorithms == ("RS256", "ES256")


# --------------------------------------------------------------------------- the edges of times


@pytest.fixture
def at_noon(monkeypatch: pytest.MonkeyPatch) -> int:
    """A second that stands still for who checks tokens."""
    noon = 1_800_000_000
    frozen = SimpleNamespace(time=lambda: noon)
    monkeypatch.setattr("joserfc._rfc7519.claims.time", frozen)
    return noon


@pytest.mark.parametrize(
    ("claim", "seconds", "holds"),
    [
        ("exp", 1, True),
        ("exp", 0, True),
        ("exp", 1 - LEEWAY, True),
        ("exp", -LEEWAY, False),
        ("exp", -LEEWAY - 1, False),
        ("nbf", 0, True),
        ("nbf", LEEWAY, True),
        ("nbf", LEEWAY + 1, False),
        ("iat", LEEWAY, True),
        ("iat", LEEWAY + 1, False),
    ],
)
async def test_the_leeway_is_exact(
    claim: str, seconds: int, holds: bool, at_noon: int, shared: TokenVerifier
) -> None:
    made = signed(SHARED, **{"exp": at_noon + HOUR, claim: at_noon + seconds})
    if holds:
        assert (await shared.principal(made)).sub == "clinician"
    else:
        with pytest.raises(Unauthenticated):
            await shared.principal(made)


@pytest.mark.parametrize("claim", ["exp", "nbf", "iat"])
@pytest.mark.parametrize("wrong", [True, "1", [], {}, float("1e400")], ids=str)
async def test_a_time_is_a_number(claim: str, wrong: Any, shared: TokenVerifier) -> None:
    with pytest.raises(Unauthenticated):
        await shared.principal(signed(SHARED, **{claim: wrong}))


# ------------------------------------------------------------------------------- kinds of tokens


@pytest.mark.parametrize("typ", ["JWT", "jwt", "at+jwt", "application/at+jwt", "AT+JWT"])
async def test_an_access_token_may_say_what_it_is(typ: str, provider: Provider) -> None:
    assert (await provider.verifier.principal(token(header={"typ": typ}))).sub == "dr-who"


@pytest.mark.parametrize(
    "typ", ["logout+jwt", "dpop+jwt", "secevent+jwt", "id_token+jwt", "Bearer", "JWT\n", "", 7]
)
async def test_a_token_of_another_kind_signs_nobody_in(typ: Any, provider: Provider) -> None:
    made = rs256({"alg": "RS256", "kid": "rsa", "typ": typ}, claims())
    if typ == "":
        assert (await provider.verifier.principal(made)).sub == "dr-who"
        return
    with pytest.raises(Unauthenticated):
        await provider.verifier.principal(made)


async def test_a_logout_token_signs_nobody_in(provider: Provider) -> None:
    for header in (None, {"typ": "logout+jwt"}):
        with pytest.raises(Unauthenticated):
            await provider.verifier.principal(logout(header=header))


LOGOUT_EVENT = "http://schemas.openid.net/event/backchannel-logout"


def logout(*, header: Any = None, **more: Any) -> str:
    """A logout token of the issuer; None leaves a claim out."""
    sane: dict[str, Any] = {
        "name": None,
        "roles": None,
        "iat": int(time.time()),
        "jti": "once",
        "sid": "sign-in-1",
        "events": {LOGOUT_EVENT: {}},
    }
    return token(header=header, **{**sane, **more})


@pytest.mark.parametrize("typ", [None, "JWT", "logout+jwt", "Logout+JWT", "application/logout+jwt"])
async def test_a_logout_token_names_who_signs_out(typ: str | None, provider: Provider) -> None:
    told = await provider.verifier.logout_token(logout(header={"typ": typ} if typ else None))
    assert told == LogoutToken("dr-who", "sign-in-1", "once")


async def test_a_logout_token_names_a_person_or_a_sign_in(provider: Provider) -> None:
    verifier = provider.verifier
    assert await verifier.logout_token(logout(sid=None)) == LogoutToken("dr-who", "", "once")
    assert await verifier.logout_token(logout(sub=None)) == LogoutToken("", "sign-in-1", "once")


@pytest.mark.parametrize(
    "wrong",
    [
        {"sub": None, "sid": None},
        {"sub": "", "sid": None},
        {"sid": ""},
        {"sid": 7},
        {"sid": "x" * 256},
        {"sub": ["dr-who"]},
        {"sub": "a\nb"},
        {"jti": None},
        {"jti": ""},
        {"jti": 7},
        {"iat": None},
        {"iat": now + HOUR},
        {"exp": None},
        {"exp": now - HOUR},
        {"aud": "another"},
        {"iss": "https://evil.test"},
        {"nonce": "n"},
        {"nonce": ""},
        {"events": None},
        {"events": {}},
        {"events": [LOGOUT_EVENT]},
        {"events": LOGOUT_EVENT},
        {"events": {LOGOUT_EVENT: True}},
        {"events": {LOGOUT_EVENT: []}},
        {"events": {LOGOUT_EVENT.upper(): {}}},
        {"events": {"urn:other": {}}},
        {"header": {"typ": "at+jwt"}},
        {"header": {"typ": "secevent+jwt"}},
    ],
    ids=str,
)
async def test_a_wrong_logout_token_signs_nobody_out(
    wrong: dict[str, Any], provider: Provider
) -> None:
    with pytest.raises(Unauthenticated):
        await provider.verifier.logout_token(logout(**wrong))


@pytest.mark.parametrize("how", CONFUSED)
async def test_a_logout_token_cannot_choose_its_key(how: str, provider: Provider) -> None:
    with pytest.raises(Unauthenticated):
        await provider.verifier.logout_token(CONFUSED[how])


async def test_the_sign_in_is_named(provider: Provider) -> None:
    for sid, expected in (("s-1", "s-1"), (None, ""), (7, ""), ("", ""), ("x" * 256, "")):
        assert (await provider.verifier.principal(token(sid=sid))).sid == expected


# --------------------------------------------------------------------------- more about the keys


async def test_two_keys_may_share_a_kid_if_their_kinds_differ(provider: Provider) -> None:
    """RFC 7517, section 4.5."""
    twin = ECKey.generate_key("P-256", {"kid": "rsa"})
    provider.keys = {"keys": [public(twin), public(RSA)]}
    assert (await provider.verifier.principal(token())).sub == "dr-who"
    assert (await provider.verifier.principal(token(twin, alg="ES256"))).sub == "dr-who"


async def test_a_curve_is_for_its_algorithm_alone(provider: Provider) -> None:
    wide = ECKey.generate_key("P-384", {"kid": "wide"})
    provider.keys = {"keys": [public(wide)]}
    forged_token = raw_token({"alg": "ES256", "kid": "wide"}, claims(), b"x" * 96)
    with pytest.raises(Unauthenticated):
        await provider.verifier.principal(forged_token)


@pytest.mark.parametrize(
    "weak",
    [
        {"e": "AQ"},  # 1: everybody can sign
        {"e": "Ag"},  # 2
        {"e": "AQAA"},  # even
        {"n": RSA.as_dict(private=False)["n"][:170]},
    ],
    ids=str,
)
async def test_a_weak_key_is_none(weak: dict[str, str], provider: Provider) -> None:
    provider.keys = {"keys": [{**public(RSA), **weak}]}
    with pytest.raises(Unavailable):
        await provider.verifier.principal(token())


async def test_keys_of_an_https_issuer_come_by_https(provider: Provider) -> None:
    provider.discovery = {"issuer": ISSUER, "jwks_uri": JWKS.replace("https", "http")}
    with pytest.raises(Unavailable):
        await provider.verifier.principal(token())
    assert provider.fetched == 0


async def test_known_keys_hold_for_a_day_without_the_issuer(provider: Provider) -> None:
    await provider.verifier.principal(token())
    provider.fault = httpx.ConnectError("refused")
    provider.clock += keys.JWKS_STALE_SECONDS
    assert (await provider.verifier.principal(token())).sub == "dr-who"
    provider.clock += 1
    with pytest.raises(Unavailable):
        await provider.verifier.principal(token())


# ----------------------------------------------------------------------------- SMART on FHIR


ID = "83f66213-0412-4df3-a4cc-43cb50b1ffa3"


@pytest.mark.parametrize(
    ("claim", "context"),
    [
        (ID, PatientContext(patient_id=UUID(ID))),
        (ID.upper(), PatientContext(patient_id=UUID(ID))),
        (f"{{{ID}}}", PatientContext(mrn=f"{{{ID}}}", mrn_issuer="HOSPITAL")),
        ("MRN-1", PatientContext(mrn="MRN-1", mrn_issuer="HOSPITAL")),
        ("CLINIC|MRN-1", PatientContext(mrn="MRN-1", mrn_issuer="CLINIC")),
        ("|MRN-1", PatientContext(mrn="MRN-1")),
        (f"CLINIC|{ID}", PatientContext(mrn=ID, mrn_issuer="CLINIC")),
        ("CLINIC|", PatientContext()),
        ("CLINIC|a|b", PatientContext()),
        ("", PatientContext()),
        (" MRN-1", PatientContext()),
        ("MRN-1\n", PatientContext()),
        ("x" * 65, PatientContext()),
        (7, PatientContext()),
        ([ID], PatientContext()),
    ],
    ids=str,
)
async def test_the_patient_in_context(
    claim: Any, context: PatientContext, provider: Provider
) -> None:
    settings = OIDC.model_copy(update={"assigning_authority": "HOSPITAL"})
    async with httpx.AsyncClient() as client:
        who = await TokenVerifier(settings, client).principal(token(patient=claim))
    assert who.patient == context


async def test_a_token_without_limits_has_none(provider: Provider) -> None:
    who = await provider.verifier.principal(token(scope="openid fhirUser launch"))
    assert (who.patient, who.scopes) == (None, None)


@pytest.mark.parametrize(
    ("path", "given_claims", "limited"),
    [
        ("patient", {}, False),
        ("patient", {"ctx": {"patient": "M"}}, False),
        ("ctx.patient", {"ctx": {}}, False),
        ("ctx.patient", {"ctx": {"patient": "M"}}, True),
        ("ctx.patient", {"ctx": "M"}, True),  # what stands in the way is no absence
        ("ctx.patient", {"ctx": []}, True),
    ],
)
async def test_the_patient_is_read_where_the_settings_say(
    path: str, given_claims: dict[str, Any], limited: bool, provider: Provider
) -> None:
    settings = OIDC.model_copy(update={"patient_claim": path})
    async with httpx.AsyncClient() as client:
        who = await TokenVerifier(settings, client).principal(token(**given_claims))
    assert (who.patient is not None) is limited


async def test_a_null_is_a_limit(provider: Provider) -> None:
    made = rs256({"alg": "RS256", "kid": "rsa"}, {**claims(), "patient": None, "scope": None})
    who = await provider.verifier.principal(made)
    assert (who.patient, who.scopes) == (PatientContext(), frozenset())


@given(patient=JSON, scope=JSON)
async def test_no_limit_is_lost_on_the_way(patient: Any, scope: Any) -> None:
    try:
        who = await VERIFIER.principal(signed(SHARED, patient=patient, scope=scope))
    except Unauthenticated:  # a number that is none
        return
    assert (who.patient is None) is (patient is None)
    if scope is not None:
        words = scope.split(" ") if isinstance(scope, str) else scope
        plain = isinstance(words, list) and all(isinstance(word, str) for word in words)
        levels = ("patient/", "user/", "system/")
        limits = not plain or any(word.startswith(levels) for word in words)
        assert (who.scopes is not None) is limits
