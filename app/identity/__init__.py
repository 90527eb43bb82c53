"""From a bearer token to a Principal.

A JWT (RFC 7519) is checked by joserfc against issuer, audience, times and a fixed list of
algorithms; `keys` says where verification keys come from, `tokens` what a token must look like
and what is read from it, `smart` what SMART on FHIR puts into it.
"""

from app.identity.answers import TooMuch, read_json, strict_json
from app.identity.keys import JwksKeys, KeySource, SharedSecret
from app.identity.principal import LogoutToken, PatientContext, Principal, Role, Scope
from app.identity.tokens import TokenVerifier, issue_token

__all__ = [
    "JwksKeys",
    "KeySource",
    "LogoutToken",
    "PatientContext",
    "Principal",
    "Role",
    "Scope",
    "SharedSecret",
    "TokenVerifier",
    "TooMuch",
    "issue_token",
    "read_json",
    "strict_json",
]
