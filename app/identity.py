"""From a bearer token to a Principal.

A JWT (RFC 7519) is checked by joserfc against issuer, audience, expiry and a fixed list of
algorithms. Keys come from the OIDC issuer's JWKS, found by discovery and cached; for development
from one shared secret. What the token's own header says about keys (jwk, jku, x5u) is ignored,
and unknown `crit` headers are refused.
"""

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

import httpx
from cryptography.exceptions import UnsupportedAlgorithm
from joserfc import jwt
from joserfc.errors import InvalidKeyIdError, JoseError
from joserfc.jwk import JWKRegistry, Key, KeySet, OctKey

from app.errors import Unauthenticated, Unavailable
from app.settings import IdentitySettings, Settings

logger = logging.getLogger(__name__)

JWKS_FRESH_SECONDS = 3600.0
JWKS_RETRY_SECONDS = 30.0  # an unknown `kid` fetches the keys again, but not more often


class Role(StrEnum):
    ADMIN = "admin"
    AUDITOR = "auditor"
    CLINICIAN = "clinician"
    RADIOLOGIST = "radiologist"
    SERVICE = "service"
    TECHNOLOGIST = "technologist"


@dataclass(frozen=True)
class Principal:
    """Who is calling: `sub` of the token, display name, known roles, site."""

    sub: str
    name: str
    roles: frozenset[Role]
    site: str

    @property
    def roles_text(self) -> str:
        return ",".join(sorted(self.roles))


class KeySource(Protocol):
    """Where verification keys come from."""

    async def keys(self, *, again: bool = False) -> KeySet | OctKey: ...


class SharedSecret:
    """One symmetric key: development and checks."""

    def __init__(self, secret: str) -> None:
        self._key = OctKey.import_key(secret)

    async def keys(self, *, again: bool = False) -> OctKey:
        return self._key


class JwksKeys:
    """The keys of an OIDC issuer (OpenID Connect Discovery 1.0, section 4; RFC 7517)."""

    def __init__(self, issuer: str, client: httpx.AsyncClient) -> None:
        self._issuer = issuer
        self._client = client
        self._keys: KeySet | None = None
        self._fetched_at = 0.0
        self._lock = asyncio.Lock()

    async def keys(self, *, again: bool = False) -> KeySet:
        """The current keys. Raises Unavailable where the issuer doesn't answer usefully."""
        async with self._lock:
            age = time.monotonic() - self._fetched_at
            limit = JWKS_RETRY_SECONDS if again else JWKS_FRESH_SECONDS
            if self._keys is None or age > limit:
                self._keys = await self._fetch()
                self._fetched_at = time.monotonic()
            return self._keys

    async def _fetch(self) -> KeySet:
        try:
            url = f"{self._issuer.rstrip('/')}/.well-known/openid-configuration"
            discovery = (await self._client.get(url)).raise_for_status().json()
            if discovery.get("issuer") != self._issuer:
                raise ValueError("the discovery document names another issuer")
            answer = (await self._client.get(discovery["jwks_uri"])).raise_for_status().json()
            usable = [key for key in map(_usable_key, answer["keys"]) if key is not None]
            if not usable:
                raise ValueError("the JWKS has no key for signatures")
            return KeySet(usable)
        except (
            *(httpx.HTTPError, httpx.InvalidURL),
            *(ValueError, KeyError, TypeError, AttributeError),
        ) as error:
            if self._keys is not None:
                return self._keys
            raise Unavailable(
                "The identity provider does not answer, so nobody can sign in. Try again soon."
            ) from error


class TokenVerifier:
    """Checks tokens and reads the claims the settings name."""

    def __init__(self, settings: Settings, client: httpx.AsyncClient) -> None:
        self._settings = settings
        self._source: KeySource
        if settings.jwt_secret is not None:
            self._source = SharedSecret(settings.jwt_secret.get_secret_value())
            self._algorithms = ["HS256"]
            issuer = settings.jwt_issuer
        else:
            assert settings.oidc_issuer is not None  # settings hold exactly one of the two
            self._source = JwksKeys(settings.oidc_issuer, client)
            self._algorithms = list(settings.jwt_algorithms)
            issuer = settings.oidc_issuer
        self._claims = jwt.JWTClaimsRegistry(
            leeway=settings.jwt_leeway_seconds,
            iss={"essential": True, "value": issuer},
            aud={"essential": True, "value": settings.jwt_audience},
            exp={"essential": True},
            sub={"essential": True},
        )

    async def principal(self, token: str) -> Principal:
        """Who the token speaks for. Raises Unauthenticated; Unavailable without any keys."""
        claims = await self._verified_claims(token)
        sub = claims.get("sub")
        if not isinstance(sub, str) or not 0 < len(sub) <= 255 or not sub.isprintable():
            raise Unauthenticated("The token names no usable subject (`sub`).")
        named = _claim(claims, self._settings.roles_claim)
        roles = [named] if isinstance(named, str) else named if isinstance(named, list) else []
        site = _claim(claims, self._settings.site_claim)
        name = claims.get("name")
        return Principal(
            sub=sub,
            name=name if isinstance(name, str) else sub,
            roles=frozenset(role for role in Role if role.value in roles),
            site=site if isinstance(site, str) and site else self._settings.site,
        )

    async def _verified_claims(self, token: str) -> Mapping[str, Any]:
        try:
            try:
                decoded = jwt.decode(token, await self._source.keys(), algorithms=self._algorithms)
            except InvalidKeyIdError:
                # The issuer may have rotated its keys since we last looked.
                decoded = jwt.decode(
                    token, await self._source.keys(again=True), algorithms=self._algorithms
                )
            self._claims.validate(decoded.claims)
        except (JoseError, ValueError, TypeError, KeyError) as error:
            raise Unauthenticated(
                "The token is not valid: sign in again. (Signature, issuer, audience and "
                "expiry are checked.)"
            ) from error
        return decoded.claims


def _usable_key(key: dict[str, Any]) -> Key | None:
    """A public signature key of a JWKS; None for what is not one, or is not understood (RFC 7517,
    section 5). A symmetric key is never one: it would make the JWKS a secret."""
    if key.get("kty") not in ("RSA", "EC", "OKP") or key.get("use", "sig") != "sig":
        return None
    try:
        return JWKRegistry.import_key(key)
    except (JoseError, UnsupportedAlgorithm, ValueError, KeyError, TypeError):
        logger.warning("a key of the identity provider's JWKS is not understood")
        return None


def issue_token(settings: IdentitySettings, sub: str, roles: list[Role], minutes: int) -> str:
    """A development token. Raises ValueError where no shared secret is configured."""
    if settings.jwt_secret is None:
        raise ValueError("tokens are issued by the OIDC provider here, not by Lightbox")
    now = int(time.time())
    claims: dict[str, Any] = {
        "iss": settings.jwt_issuer,
        "aud": settings.jwt_audience,
        "sub": sub,
        "name": sub,
        "iat": now,
        "exp": now + minutes * 60,
    }
    node = claims
    *parents, leaf = settings.roles_claim.split(".")
    for parent in parents:
        node = node.setdefault(parent, {})
    node[leaf] = [role.value for role in roles]
    key = OctKey.import_key(settings.jwt_secret.get_secret_value())
    return jwt.encode({"alg": "HS256"}, claims, key)


def _claim(claims: Mapping[str, Any], path: str) -> object:
    value: object = claims
    for name in path.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(name)
    return value
