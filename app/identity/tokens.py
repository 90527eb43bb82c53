"""Tokens: what holds, and what is read from it.

What a token's own header says about keys (jwk, jku, x5u, x5c) is ignored. Extensions that would
change what is signed (`crit`, `b64`) are refused, as is a token of another kind (RFC 8725, 3.11).
"""

import re
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import httpx
from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import OctKey
from joserfc.jws import JWSRegistry
from joserfc.util import urlsafe_b64decode

from app.errors import Unauthenticated
from app.identity.answers import StrictDecoder, strict_json
from app.identity.keys import JwksKeys, KeySource, SharedSecret
from app.identity.principal import LogoutToken, Principal, Role
from app.identity.smart import patient_context, resource_scopes
from app.settings import IdentitySettings, Settings

MAX_TOKEN_CHARS = 16 * 1024
ACCESS_TYPES = frozenset({"", "jwt", "at+jwt", "application/at+jwt"})
LOGOUT_TYPES = frozenset({"", "jwt", "logout+jwt", "application/logout+jwt"})
LOGOUT_EVENT = "http://schemas.openid.net/event/backchannel-logout"
_COMPACT = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
_ABSENT = object()


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
        # Names of headers that aren't known are passed over (RFC 7515, section 4).
        self._registry = JWSRegistry(algorithms=self._algorithms, strict_check_header=False)
        named = {"iss": issuer, "aud": settings.jwt_audience}
        self._claims = _required(("exp", "sub"), named, settings.jwt_leeway_seconds)
        self._logout_claims = _required(("exp", "iat", "jti"), named, settings.jwt_leeway_seconds)

    async def principal(self, token: str) -> Principal:
        """Who the token speaks for. Raises Unauthenticated; Unavailable without any keys."""
        claims = await self._verified_claims(token, ACCESS_TYPES, self._claims)
        if "events" in claims:
            raise Unauthenticated("This token tells of an event; it signs nobody in.")
        sub = _name(claims, "sub")
        if not sub:
            raise Unauthenticated("The token names no usable subject (`sub`).")
        settings = self._settings
        site = _claim(claims, settings.site_claim)
        name = claims.get("name")
        patient = _claim(claims, settings.patient_claim)
        scope = claims.get("scope", _ABSENT)
        return Principal(
            sub=sub,
            name=name if isinstance(name, str) else sub,
            roles=self._roles(claims, sub),
            site=site if isinstance(site, str) and site else settings.site,
            sid=_name(claims, "sid"),
            patient=None
            if patient is _ABSENT
            else patient_context(patient, settings.assigning_authority),
            scopes=None if scope is _ABSENT else resource_scopes(scope),
            issued_at=_moment(claims.get("iat")),
        )

    async def logout_token(self, token: str) -> LogoutToken:
        """Whose sign-ins end (OpenID Connect Back-Channel Logout 1.0, section 2.6).

        That a `jti` comes once is for the caller to see to. Raises Unauthenticated; Unavailable
        without any keys.
        """
        claims = await self._verified_claims(token, LOGOUT_TYPES, self._logout_claims)
        events = claims.get("events")
        if not isinstance(events, dict) or not isinstance(events.get(LOGOUT_EVENT), dict):
            raise Unauthenticated("This is no logout token: its `events` don't say so.")
        if "nonce" in claims:
            raise Unauthenticated("A logout token has no `nonce`.")
        for claim in ("sub", "sid"):
            if claim in claims and not _name(claims, claim):
                raise Unauthenticated(f"The logout token's `{claim}` can't be read.")
        told = LogoutToken(_name(claims, "sub"), _name(claims, "sid"), _name(claims, "jti"))
        if not told.jti or not (told.sub or told.sid):
            raise Unauthenticated("A logout token has a `jti`, and a `sub` or a `sid`.")
        return told

    def _roles(self, claims: Mapping[str, Any], sub: str) -> frozenset[Role]:
        """The known roles among those named; and `service` for a configured account."""
        named = _claim(claims, self._settings.roles_claim)
        roles = [named] if isinstance(named, str) else named if isinstance(named, list) else []
        found = {role for role in Role if role.value in roles}
        if self._is_service_account(claims, sub):
            found.add(Role.SERVICE)
        return frozenset(found)

    def _is_service_account(self, claims: Mapping[str, Any], sub: str) -> bool:
        """Does the token speak for a configured account, and not for a person who uses it?

        In people's tokens too `azp` and `client_id` name the program they signed in with. So they
        count only where the provider says that the client speaks for itself.
        """
        accounts = self._settings.service_accounts
        if sub in accounts:
            return True
        for_itself = claims.get("idtyp") == "app" or claims.get("gty") == "client-credentials"
        return for_itself and any(claims.get(name) in accounts for name in ("azp", "client_id"))

    async def _verified_claims(
        self, token: str, types: frozenset[str], registry: jwt.JWTClaimsRegistry
    ) -> Mapping[str, Any]:
        try:
            header = _header(token)
            if str(header.get("typ", "")).lower() not in types:
                raise ValueError("a token of another kind")
            algorithm, kid = header.get("alg"), header.get("kid")
            if algorithm not in self._algorithms:
                raise ValueError("an algorithm that is not accepted")
            if kid is not None and not isinstance(kid, str):
                raise ValueError("the kid is no text")
            key = await self._source.key(kid, algorithm)
            decoded = jwt.decode(
                token,
                key,
                algorithms=self._algorithms,
                registry=self._registry,
                decoder_cls=StrictDecoder,
            )
            registry.validate(decoded.claims)
        except (JoseError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise Unauthenticated(
                "The token is not valid: sign in again. (Signature, issuer, audience and "
                "expiry are checked.)"
            ) from error
        return decoded.claims


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


def _required(
    present: tuple[str, ...], named: Mapping[str, str], leeway: int
) -> jwt.JWTClaimsRegistry:
    """Claims that must be there, some of them with a value."""
    options: dict[str, jwt.ClaimsOption] = {name: {"essential": True} for name in present}
    for name, value in named.items():
        options[name] = {"essential": True, "value": value}
    return jwt.JWTClaimsRegistry(None, leeway, **options)


def _header(token: str) -> Mapping[str, Any]:
    """The header of a signed token in its compact form. Raises ValueError for anything else."""
    if len(token) > MAX_TOKEN_CHARS or not _COMPACT.fullmatch(token):
        raise ValueError("no signed token in compact form")
    header = strict_json(urlsafe_b64decode(token.partition(".")[0].encode()))
    if not isinstance(header, dict) or "crit" in header or "b64" in header:
        raise ValueError("a header that is no object, or asks for extensions")
    return header


def _name(claims: Mapping[str, Any], claim: str) -> str:
    """A claim that names somebody or something; empty where it is absent or unusable."""
    value = claims.get(claim)
    if not isinstance(value, str) or not 0 < len(value) <= 255 or not value.isprintable():
        return ""
    return value


def _moment(value: object) -> datetime | None:
    """A NumericDate (RFC 7519, section 2); None where there is none that can be read."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return datetime.fromtimestamp(value, UTC)
    except (OverflowError, OSError, ValueError):
        return None


def _claim(claims: Mapping[str, Any], path: str) -> object:
    """The claim at a path; dots go down. `_ABSENT` where it isn't there; None where something
    else stands in its way."""
    value: object = claims
    for name in path.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(name, _ABSENT)
        if value is _ABSENT:
            return _ABSENT
    return value
