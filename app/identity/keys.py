"""Where verification keys come from: an OIDC issuer's JWKS, or one shared secret.

The keys of an issuer are found by discovery and kept for an hour. A token with an unknown `kid`
has them fetched again, but not more often than every 30 seconds, whoever asks how much. While
the issuer doesn't answer, the keys known last hold for a day from when they were fetched; after
that nobody signs in.
"""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol
from urllib.parse import urlsplit

import httpx
from cryptography.exceptions import UnsupportedAlgorithm
from joserfc.errors import JoseError
from joserfc.jwk import ECKey, JWKRegistry, Key, OctKey, OKPKey, RSAKey
from joserfc.util import base64_to_int

from app.errors import Unavailable
from app.identity.answers import read_json

logger = logging.getLogger(__name__)

JWKS_FRESH_SECONDS = 3600.0
JWKS_RETRY_SECONDS = 30.0  # between two fetches while some keys are known
JWKS_RETRY_WITHOUT_SECONDS = 2.0  # and while none are
JWKS_STALE_SECONDS = 24 * 3600.0  # how long the last known keys hold without the issuer
JWKS_TIMEOUT_SECONDS = 5.0  # for discovery and keys together
MAX_JWKS_BYTES = 1024 * 1024
MAX_JWKS_KEYS = 100
MIN_RSA_BITS = 2048
_CURVES = {"ES256": "P-256", "ES384": "P-384", "ES512": "P-521"}
_PRIVATE = ("d", "p", "q", "dp", "dq", "qi", "oth", "k")


class NoSuchKey(ValueError):
    """The issuer has no key of that `kid` that signs by that algorithm."""


class KeySource(Protocol):
    """Where verification keys come from."""

    async def key(self, kid: str | None, algorithm: str) -> Key:
        """The key to check a signature with. Raises NoSuchKey; Unavailable."""
        ...


class SharedSecret:
    """One symmetric key: development and checks."""

    def __init__(self, secret: str) -> None:
        self._key = OctKey.import_key(secret)

    async def key(self, kid: str | None, algorithm: str) -> Key:
        return self._key


class JwksKeys:
    """The keys of an OIDC issuer (OpenID Connect Discovery 1.0, section 4; RFC 7517)."""

    def __init__(self, issuer: str, client: httpx.AsyncClient) -> None:
        self._issuer = issuer
        self._client = client
        self._keys: Sequence[Key] = ()
        self._fetched_at = float("-inf")
        self._tried_at = float("-inf")
        self._lock = asyncio.Lock()

    async def key(self, kid: str | None, algorithm: str) -> Key:
        """The issuer's key of that `kid`; without a `kid`, its only one (RFC 7515, 4.1.4).

        Raises NoSuchKey; Unavailable where the issuer doesn't answer usefully.
        """
        keys = await self._current()
        if kid is None:
            named = keys if len(keys) == 1 else ()
        else:
            named = [each for each in keys if each.kid == kid]
            if not named:
                # The issuer may have rotated its keys since we last looked.
                named = [each for each in await self._current(again=True) if each.kid == kid]
        for each in named:
            if _signs_by(each, algorithm):
                return each
        raise NoSuchKey("no key of that kid signs by that algorithm")

    async def _current(self, *, again: bool = False) -> Sequence[Key]:
        if not self._is_due(again):
            return self._usable()
        if self._lock.locked() and not again and self._holds():
            return self._keys  # somebody is fetching them
        async with self._lock:
            if self._is_due(again):
                self._tried_at = time.monotonic()
                fetched = await self._fetch()
                if fetched:
                    self._keys, self._fetched_at = fetched, time.monotonic()
            return self._usable()

    def _is_due(self, again: bool) -> bool:
        now = time.monotonic()
        if self._keys and now - self._fetched_at <= JWKS_FRESH_SECONDS and not again:
            return False
        wait = JWKS_RETRY_SECONDS if self._holds() else JWKS_RETRY_WITHOUT_SECONDS
        return now - self._tried_at > wait

    def _holds(self) -> bool:
        return bool(self._keys) and time.monotonic() - self._fetched_at <= JWKS_STALE_SECONDS

    def _usable(self) -> Sequence[Key]:
        if not self._holds():
            raise Unavailable(
                "The identity provider does not answer, so nobody can sign in. Try again soon."
            )
        return self._keys

    async def _fetch(self) -> Sequence[Key]:
        """The issuer's usable keys; none where it doesn't answer usefully."""
        try:
            async with asyncio.timeout(JWKS_TIMEOUT_SECONDS):
                url = f"{self._issuer.rstrip('/')}/.well-known/openid-configuration"
                discovery = await self._get(url)
                if discovery.get("issuer") != self._issuer:
                    raise ValueError("the discovery document names another issuer")
                keys = (await self._get(discovery["jwks_uri"]))["keys"]
            if not isinstance(keys, list) or len(keys) > MAX_JWKS_KEYS:
                raise ValueError(f"the JWKS is no list of at most {MAX_JWKS_KEYS} keys")
            usable = [key for key in map(usable_key, keys) if key is not None]
            if not usable:
                raise ValueError("the JWKS has no key for signatures")
        except (
            *(httpx.HTTPError, httpx.InvalidURL, TimeoutError),
            *(ValueError, KeyError, TypeError, AttributeError),
        ) as error:
            logger.error("the identity provider's keys can't be fetched: %r", error)
            return ()
        return usable

    async def _get(self, url: str) -> Any:
        if urlsplit(self._issuer).scheme == "https" and urlsplit(url).scheme != "https":
            raise ValueError("the keys of an https issuer come by https")
        request = self._client.build_request("GET", url)
        return await read_json(self._client, request, limit=MAX_JWKS_BYTES)


def usable_key(jwk: Mapping[str, Any]) -> Key | None:
    """A public signature key of a JWKS; None for what is not one, or is not understood (RFC 7517,
    section 5). A key that is published with its secret part signs for anybody, so for nobody."""
    if jwk.get("kty") not in ("RSA", "EC", "OKP") or jwk.get("use", "sig") != "sig":
        return None
    operations = jwk.get("key_ops", ["verify"])
    if not isinstance(operations, list) or "verify" not in operations:
        return None
    if any(name in jwk for name in _PRIVATE):
        logger.error("the identity provider's JWKS publishes a private key: it is not used")
        return None
    try:
        if jwk["kty"] == "RSA" and not _is_strong(jwk):
            logger.error("a key of the identity provider's JWKS is too weak: it is not used")
            return None
        key = JWKRegistry.import_key(dict(jwk))
        key.ensure_kid()
    except (JoseError, UnsupportedAlgorithm, ValueError, KeyError, TypeError):
        logger.warning("a key of the identity provider's JWKS is not understood")
        return None
    return key


def _is_strong(jwk: Mapping[str, Any]) -> bool:
    """Of a length that can't be factored, and with an exponent that hides something."""
    modulus, exponent = base64_to_int(jwk["n"]), base64_to_int(jwk["e"])
    return modulus.bit_length() >= MIN_RSA_BITS and exponent >= 3 and exponent % 2 == 1


def _signs_by(key: Key, algorithm: str) -> bool:
    """Is the key of the kind that the algorithm takes, and for no other (RFC 7517, 4.4)?"""
    if key.get("alg", algorithm) != algorithm:
        return False
    if algorithm.startswith(("RS", "PS")):
        return isinstance(key, RSAKey)
    if algorithm.startswith("ES"):
        return isinstance(key, ECKey) and key.get("crv") == _CURVES.get(algorithm, key.get("crv"))
    return algorithm.startswith("Ed") and isinstance(key, OKPKey)
