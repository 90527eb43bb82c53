"""An OpenID provider in a process of its own, for the tests: discovery, JWKS, client credentials.

It signs whatever it is asked to, and misbehaves when it is told to. `OidcProvider` starts and
stops it; `python -m tests.oidc_provider PORT` is the process.
"""

import json
import subprocess
import sys
import time
from asyncio import Event
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Annotated, Any, Self

import httpx
import uvicorn
from anyio.lowlevel import checkpoint
from fastapi import Body, FastAPI, Form, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse, StreamingResponse
from joserfc.jwk import ECKey, Key, OctKey, RSAKey
from joserfc.jws import JWSRegistry
from joserfc.util import urlsafe_b64encode

from app.demo.stack import LOOPBACK, REPOSITORY, free_port

CLIENT_ID, CLIENT_SECRET = "ehr-backend", "a secret of the client"
AUDIENCE = "lightbox"
_START_SECONDS = 30.0

MODES = (
    "ok",
    "error",  # 500
    "garbage",  # 200, and no JSON
    "silent",  # no answer until the mode changes
    "huge",  # a JWKS without an end
    "many",  # a JWKS of 10,000 keys
    "redirect",  # the JWKS is elsewhere
    "other-issuer",  # discovery names another issuer
    "twice",  # `keys` stands twice in the JWKS
    "weak",  # the keys are RSA of 1024 bits
    "private",  # the keys are published with their secret part
    "encryption",  # the keys are for encryption
    "other-operation",  # the keys are there to sign, not to verify
    "other-algorithm",  # the keys are for RS512
    "symmetric",  # the keys are a published secret
)


class OidcProvider:
    """The process, between `with`. Its tokens, and its switches."""

    def __init__(self) -> None:
        self.port = free_port()
        self.issuer = f"http://{LOOPBACK}:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None
        self._client = httpx.Client(base_url=self.issuer, trust_env=False, timeout=10.0)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
        self._client.close()

    def start(self) -> None:
        """Start it, with new keys, at the same address."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.oidc_provider", str(self.port)], cwd=REPOSITORY
        )
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            try:
                if self._client.get("/asked").is_success:
                    return
            except httpx.TransportError:
                if self._process.poll() is not None:
                    break
                time.sleep(0.05)
        raise RuntimeError("the OIDC provider of the tests did not start")

    def stop(self) -> None:
        assert self._process is not None
        self._process.terminate()
        self._process.wait(10)

    def switch(self, mode: str) -> None:
        """How it behaves from now on: one of MODES."""
        assert mode in MODES
        self._client.post("/switch", json={"mode": mode}).raise_for_status()

    def rotate(self) -> None:
        """New keys; the ones before are published no more."""
        self._client.post("/rotate").raise_for_status()

    def asked(self) -> int:
        """How often the keys were asked for."""
        return int(self._client.get("/asked").json()["keys"])

    def keys(self) -> list[dict[str, Any]]:
        """What it publishes, whatever the mode."""
        found: list[dict[str, Any]] = self._client.get("/published").json()
        return found

    def mint(
        self,
        *,
        alg: str = "RS256",
        header: dict[str, Any] | None = None,
        payload: str = "",
        **claims: Any,
    ) -> str:
        """A token by its present key: sane claims, with `claims` over them; None leaves one out.
        Or whatever `payload` is."""
        body = {"alg": alg, "header": header or {}, "claims": claims, "payload": payload}
        return self._client.post("/mint", json=body).raise_for_status().text

    def client_token(self, secret: str = CLIENT_SECRET) -> httpx.Response:
        """What the token endpoint answers to the service account (RFC 6749, 4.4)."""
        form = {"grant_type": "client_credentials"}
        return self._client.post("/token", data=form, auth=(CLIENT_ID, secret))


# -------------------------------------------------------------------------------- the process


class _Keys:
    """The present keys, and what a broken provider would have in their place."""

    def __init__(self, generation: int) -> None:
        self.rsa = RSAKey.generate_key(2048, {"kid": f"rsa-{generation}"})
        self.ec = ECKey.generate_key("P-256", {"kid": f"ec-{generation}"})
        self.weak = RSAKey.generate_key(1024, {"kid": f"rsa-{generation}"})
        self.secret = OctKey.generate_key(256, {"kid": f"rsa-{generation}"})

    def signing(self, alg: str, mode: str) -> Key:
        if alg.startswith("HS"):
            return self.secret
        if alg.startswith("ES"):
            return self.ec
        return self.weak if mode == "weak" else self.rsa

    def published(self, mode: str = "ok") -> list[dict[str, Any]]:
        private = mode in ("private", "symmetric")
        keys: list[Key] = [self.rsa, self.ec]
        if mode == "weak":
            keys = [self.weak]
        if mode == "symmetric":
            keys = [self.secret]
        broken: dict[str, dict[str, Any]] = {
            "encryption": {"use": "enc"},
            "other-operation": {"key_ops": ["sign"]},
            "other-algorithm": {"use": "sig", "alg": "RS512"},
        }
        more = broken.get(mode, {"use": "sig"})
        return [{**each.as_dict(private=private), **more} for each in keys]


def provider(issuer: str) -> FastAPI:
    """The provider's application."""
    app = FastAPI(openapi_url=None)
    state: dict[str, Any] = {"mode": "ok", "keys": 0, "generation": 1, "changed": Event()}
    keys = _Keys(1)

    @app.get("/.well-known/openid-configuration")
    async def discovery() -> Any:
        named = "https://elsewhere.example" if state["mode"] == "other-issuer" else issuer
        return {
            "issuer": named,
            "jwks_uri": f"{issuer}/keys",
            "token_endpoint": f"{issuer}/token",
            "id_token_signing_alg_values_supported": ["RS256", "ES256"],
        }

    @app.get("/keys")
    async def jwks() -> Response:
        state["keys"] += 1
        mode = state["mode"]
        if mode == "error":
            return JSONResponse({"keys": keys.published()}, 500)
        if mode == "garbage":
            return Response("<html>Sign in</html>", media_type="application/json")
        if mode == "silent":
            await state["changed"].wait()
        if mode == "huge":
            return StreamingResponse(_endless(), media_type="application/json")
        if mode == "many":
            (first, *_) = keys.published()
            many = [{**first, "kid": f"{each}"} for each in range(10_000)]
            return JSONResponse({"keys": [*many, *keys.published()]})
        if mode == "redirect":
            return RedirectResponse("/published-as-keys", 307)
        if mode == "twice":
            told = json.dumps(keys.published())
            return Response(f'{{"keys": [], "keys": {told}}}', media_type="application/json")
        return JSONResponse({"keys": keys.published(mode)})

    @app.get("/published-as-keys")
    async def elsewhere() -> Any:
        return {"keys": keys.published()}

    @app.get("/published")
    async def published() -> Any:
        return keys.published()

    @app.get("/asked")
    async def asked() -> Any:
        return {"keys": state["keys"]}

    @app.post("/switch")
    async def switch(mode: Annotated[str, Body(embed=True)]) -> None:
        state["mode"] = mode
        state["changed"].set()
        state["changed"] = Event()

    @app.post("/rotate")
    async def rotate() -> None:
        nonlocal keys
        state["generation"] += 1
        keys = _Keys(state["generation"])

    @app.post("/mint")
    async def mint(request: Request) -> Response:
        asked_for = await request.json()
        alg = asked_for["alg"]
        if asked_for.get("payload"):
            key = keys.signing(alg, state["mode"])
            return Response(_compact(alg, key, asked_for["header"], asked_for["payload"]))
        return Response(sign(alg, asked_for["header"], asked_for["claims"]))

    @app.post("/token")
    async def token(request: Request, grant_type: Annotated[str, Form()]) -> Response:
        expected = httpx.BasicAuth(CLIENT_ID, CLIENT_SECRET)._auth_header
        if request.headers.get("authorization") != expected:
            return JSONResponse({"error": "invalid_client"}, 401)
        if grant_type != "client_credentials":
            return JSONResponse({"error": "unsupported_grant_type"}, 400)
        # RFC 9068, 2.2: without a person, `sub` is the client.
        claims = {"sub": CLIENT_ID, "client_id": CLIENT_ID, "azp": CLIENT_ID, "roles": None}
        signed = sign("RS256", {"typ": "at+jwt"}, claims)
        return JSONResponse({"access_token": signed, "token_type": "Bearer", "expires_in": 300})

    def sign(alg: str, header: dict[str, Any], claims: dict[str, Any]) -> str:
        now = int(time.time())
        sane = {
            "iss": issuer,
            "aud": AUDIENCE,
            "sub": "dr-who",
            "name": "Dr. Who",
            "roles": ["clinician"],
            "iat": now,
            "exp": now + 300,
        }
        kept = {key: value for key, value in {**sane, **claims}.items() if value is not None}
        key = keys.signing(alg, state["mode"])
        return _compact(alg, key, header, json.dumps(kept))

    return app


def _compact(alg: str, key: Key, header: dict[str, Any], payload: str) -> str:
    """A signed token, also where a library would refuse to write its header or payload."""
    whole = json.dumps({"alg": alg, "kid": key.kid, **header})
    unsigned = b".".join(urlsafe_b64encode(each.encode()) for each in (whole, payload))
    signature = JWSRegistry.algorithms[alg].sign(unsigned, key)
    return b".".join((unsigned, urlsafe_b64encode(signature))).decode()


async def _endless() -> AsyncIterator[bytes]:
    yield b'{"keys": ['
    while True:
        await checkpoint()  # whoever has gone away ends it here
        yield b'{"kty": "RSA"},' * 1000


if __name__ == "__main__":
    uvicorn.run(
        provider(f"http://{LOOPBACK}:{sys.argv[1]}"),
        host=LOOPBACK,
        port=int(sys.argv[1]),
        log_level="error",
        timeout_graceful_shutdown=1,
    )
