"""The app in this process, spoken to as its callers do."""

import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from fastapi import FastAPI
from joserfc import jwt
from joserfc.jwk import OctKey
from pydantic import SecretStr

from app.identity import Role, issue_token
from app.main import create_app
from app.settings import Settings
from tests.fake_orthanc import FakeOrthanc
from tests.images import ct_image

SECRET = "a secret for tests, of 32 characters or more"


def make_settings(database_url: str, orthanc_url: str, **more: Any) -> Settings:
    """Settings for tests; `more` replaces what it names."""
    values: dict[str, Any] = {
        "database_url": database_url,
        "orthanc_url": orthanc_url,
        "orthanc_username": "lightbox",
        "orthanc_password": SecretStr("orthanc-password"),
        "jwt_secret": SecretStr(SECRET),
        "max_upload_bytes": 8 * 1024 * 1024,
        "follow_orthanc": False,  # nothing moves by itself, but for tests of that
        "failed_sign_ins_per_minute": 1_000_000,  # all tests come from one address
    }
    return Settings(**{**values, **more})


def signed(settings: Settings, **claims: Any) -> str:
    """A token by the shared secret: sane claims, with `claims` over them; None leaves one out."""
    now = int(time.time())
    sane = {
        "iss": settings.jwt_issuer,
        "aud": settings.jwt_audience,
        "sub": "clinician",
        "exp": now + 300,
    }
    kept = {name: value for name, value in {**sane, **claims}.items() if value is not None}
    return jwt.encode({"alg": "HS256"}, kept, OctKey.import_key(SECRET))


@dataclass
class Lightbox:
    """A running app. `get`, `post`... go out as `role`, with `sub` the role's name by default."""

    app: FastAPI
    settings: Settings
    client: httpx.AsyncClient

    def token(self, role: str, sub: str | None = None) -> str:
        return issue_token(self.settings, sub or role, [Role(role)], minutes=5)

    async def ask(
        self,
        role: str | None,
        method: str,
        path: str,
        *,
        sub: str | None = None,
        claims: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> httpx.Response:
        """One request as a role, or with `claims` of its own; neither: without a token. No
        cookies are kept."""
        headers = dict(more.pop("headers", {}))
        if claims is not None:
            headers["Authorization"] = f"Bearer {signed(self.settings, **claims)}"
        elif role is not None:
            headers["Authorization"] = f"Bearer {self.token(role, sub)}"
        answer = await self.client.request(method, path, headers=headers, **more)
        self.client.cookies.clear()
        return answer

    async def must(
        self, role: str, method: str, path: str, *, sub: str | None = None, **more: Any
    ) -> Any:
        """The JSON of a request that has to succeed."""
        answer = await self.ask(role, method, f"/api/v1{path}", sub=sub, **more)
        assert answer.is_success, f"{method} {path}: {answer.status_code} {answer.text}"
        return answer.json() if answer.content else None

    async def patient(self, mrn: str = "MRN-1", **more: Any) -> Any:
        """A registered patient."""
        person = {"first_name": "Jane", "last_name": "Doe", "dob": "1980-01-01", "sex": "F"}
        return await self.must("service", "POST", "/patients", json={**person, "mrn": mrn, **more})

    async def order(self, patient: Any, **more: Any) -> Any:
        """A scheduled CT order of a patient, requested by `clinician`."""
        order = {
            "patient_id": patient["id"],
            "order_type": "IMAGING",
            "order_category": "CT",
            "description": "CT test",
            "status": "scheduled",
            "requested_by": "clinician",
        }
        return await self.must("service", "POST", "/orders", json={**order, **more})

    async def upload(
        self,
        content: bytes,
        *,
        role: str = "technologist",
        sub: str | None = None,
        filename: str = "image.dcm",
        **fields: str,
    ) -> httpx.Response:
        """POST /upload of one file; `fields` are the form's."""
        return await self.ask(
            role,
            "POST",
            "/api/v1/dicom/upload",
            sub=sub,
            files={"file": (filename, content, "application/dicom")},
            data=fields,
        )

    async def open(self, path: str, *, role: str = "clinician", sub: str | None = None) -> "Opened":
        """Ask for a viewer link at `/viewer/url` + path, and open it as a browser does."""
        link = await self.must(role, "GET", f"/dicom/viewer/url{path}", sub=sub)
        # So that no test that looks into the tables meets a writer.
        await self.app.state.metadata.settled()
        code = link["url"].partition("launch=")[2]
        answer = await self.client.get("/viewer", params={"launch": code})
        assert answer.status_code == 303, answer.text
        cookie = answer.headers["set-cookie"].partition(";")[0]
        self.client.cookies.clear()
        ctx = httpx.URL(answer.headers["location"]).params["ctx"]
        return Opened(self, link, code, ctx, cookie)

    async def audit(self, **filters: str) -> list[Any]:
        """The trail, newest first, without the reading itself."""
        found = await self.must("auditor", "GET", "/audit", params={"limit": "200", **filters})
        return [each for each in found if each["action"] != "audit:read"]


@dataclass
class Opened:
    """An open viewer: `get` is what OHIF asks below its DICOMweb root."""

    lightbox: Lightbox
    link: Any
    code: str
    ctx: str
    cookie: str

    async def get(self, path: str, *, cookie: str | None = None, **more: Any) -> httpx.Response:
        headers = {**more.pop("headers", {}), "Cookie": cookie or self.cookie}
        answer = await self.lightbox.client.get(
            f"/s/{self.ctx}/dicom-web{path}", headers=headers, **more
        )
        self.lightbox.client.cookies.clear()
        return answer


@dataclass
class World:
    """Two patients with an order and a study each; `clinician` requested mine, `other` theirs."""

    mine: Any
    my_order: Any
    my_study: str
    my_image: Any  # what upload answered
    theirs: Any
    their_order: Any
    their_study: str
    their_image: Any

    SECRET_WORDS = ("Victim", "Vera", "MRN-VICTIM", "20240404", "secret study")
    """What stands in the other patient's data and must never reach `clinician`."""


async def make_world(lightbox: Lightbox) -> World:
    """Fill an empty Lightbox."""
    mine = await lightbox.patient("MRN-MINE")
    my_order = await lightbox.order(mine)
    my_upload = await lightbox.upload(ct_image(patient_id="MRN-MINE"), order_id=my_order["id"])
    assert my_upload.status_code == 200, my_upload.text
    theirs = await lightbox.patient("MRN-VICTIM", first_name="Vera", last_name="Victim")
    their_order = await lightbox.order(theirs, requested_by="other", description="secret study")
    their_upload = await lightbox.upload(
        ct_image(
            patient_id="MRN-VICTIM",
            PatientName="Victim^Vera",
            StudyDate="20240404",
            StudyDescription="secret study",
        ),
        order_id=their_order["id"],
    )
    assert their_upload.status_code == 200, their_upload.text
    return World(
        mine=mine,
        my_order=my_order,
        my_study=my_upload.json()["study_instance_uid"],
        my_image=my_upload.json(),
        theirs=theirs,
        their_order=their_order,
        their_study=their_upload.json()["study_instance_uid"],
        their_image=their_upload.json(),
    )


@dataclass(frozen=True)
class Shared:
    """A world that many tests look at and none changes, with two viewers open."""

    lightbox: Lightbox
    world: World
    orthanc: FakeOrthanc
    mine: Opened  # my patient's study, in the browser of `clinician`
    theirs: Opened  # the other patient's study, in the browser of who treats them


@asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[Lightbox]:
    """The app between start and shutdown."""
    app = create_app(settings)
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://lightbox.test"
        ) as client:
            yield Lightbox(app, settings, client)
