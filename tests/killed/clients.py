"""Many clients at once, who remember what they were told."""

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx
from pydicom.uid import generate_uid

from app.identity import Role, issue_token
from app.settings import Settings
from tests.images import ct_image
from tests.killed import desk
from tests.killed.desk import Desk

RELATED = {"Content-Type": 'multipart/related; type="application/dicom"; boundary=cut-here'}
PEOPLE = 5
ORDERS = 2
KINDS = {
    "known": 1,
    "upload": 5,
    "duplicate": 3,
    "twice": 1,
    "coerce": 3,
    "stow": 3,
    "delete": 3,
    "order": 2,
    "cancel": 1,
    "care-team": 2,
    "view": 3,
    **desk.KINDS,
}


@dataclass
class Told:
    """What a client heard of one request."""

    kind: str
    request_id: str
    status: int
    answer: Any = None
    sop_uids: tuple[str, ...] = ()


@dataclass
class Sent:
    """A file that was sent at least once."""

    content: bytes
    order_id: str
    study_uid: str
    series_uid: str
    sop_uid: str
    mrn: str


@dataclass
class World:
    """Whom there is, and what has been sent."""

    people: list[tuple[Any, list[Any]]] = field(default_factory=list)
    sent: list[Sent] = field(default_factory=list)
    known: list[Sent] = field(default_factory=list)  # that were in Orthanc before; never deleted
    told: list[Told] = field(default_factory=list)
    unanswered: Counter[str] = field(default_factory=Counter)


class Clients(Desk):
    """The hospital: `work` until the app dies."""

    def __init__(self, settings: Settings, url: str, chance: random.Random) -> None:
        self.settings = settings
        self.chance = chance
        self.world = World()
        self._url = url
        self._tokens = {
            role: issue_token(settings, role, [Role(role)], minutes=60)
            for role in ("service", "technologist", "clinician", "radiologist", "auditor")
        }

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self._url, trust_env=False, timeout=20.0)

    async def ask(
        self,
        client: httpx.AsyncClient,
        kind: str,
        role: str,
        method: str,
        path: str,
        *,
        sop_uids: tuple[str, ...] = (),
        **more: Any,
    ) -> httpx.Response | None:
        """One request; None where the app died over it."""
        headers = {"Authorization": f"Bearer {self._tokens[role]}", **more.pop("headers", {})}
        try:
            answer = await client.request(method, path, headers=headers, **more)
        except (httpx.TransportError, httpx.StreamError):
            self.world.unanswered[kind] += 1
            return None
        is_json = "json" in answer.headers.get("content-type", "")
        self.world.told.append(
            Told(
                kind,
                answer.headers["x-request-id"],
                answer.status_code,
                answer.json() if is_json and answer.content else None,
                sop_uids,
            )
        )
        return answer

    async def prepare(self) -> None:
        """Patients, orders, and an image each, so that every operation has something."""
        async with self.client() as client:
            for _ in range(PEOPLE):
                patient = await desk.register(self, client)
                assert patient is not None
                orders = [await self._order(client, patient) for _ in range(ORDERS)]
                self.world.people.append((patient, orders))
                await self.upload(client)

    async def _order(self, client: httpx.AsyncClient, patient: Any) -> Any:
        body = {
            "patient_id": patient["id"],
            "order_category": "CT",
            "status": "scheduled",
            "requested_by": "clinician",
        }
        answer = await self.ask(client, "order", "service", "POST", "/api/v1/orders", json=body)
        return answer.json() if answer is not None and answer.is_success else None

    async def each_once(self) -> None:
        """Every kind of operation, one after the other."""
        async with self.client() as client:
            for kind in KINDS:
                await getattr(self, kind.replace("-", "_"))(client)

    async def work(self, people: int = 10) -> None:
        """Until the app is dead: every client until its connection breaks."""
        async with self.client() as client:
            await asyncio.gather(*(self._one(client) for _ in range(people)))

    async def _one(self, client: httpx.AsyncClient) -> None:
        kinds, weights = list(KINDS), list(KINDS.values())
        while True:
            before = sum(self.world.unanswered.values())
            (kind,) = self.chance.choices(kinds, weights)
            await getattr(self, kind.replace("-", "_"))(client)
            if sum(self.world.unanswered.values()) > before:
                return

    # ------------------------------------------------------------------------- what is asked

    def fresh(self, mrn: str | None = None, *, of_known_study: bool = True) -> Sent:
        patient, orders = self.chance.choice(self.world.people)
        order = self.chance.choice(orders)
        study, series, sop = (str(generate_uid(None)) for _ in range(3))
        own = [each for each in self.world.sent if each.order_id == order["id"]]
        if of_known_study and own and self.chance.random() < 0.5:  # more of a study that is there
            study, series = own[-1].study_uid, own[-1].series_uid
        content = ct_image(
            patient_id=mrn or patient["mrn"],
            study_uid=study,
            series_uid=series,
            sop_uid=sop,
        )
        return Sent(content, order["id"], study, series, sop, patient["mrn"])

    async def _upload(
        self, client: httpx.AsyncClient, kind: str, sent: Sent, **fields: str
    ) -> None:
        if kind != "known":
            self.world.sent.append(sent)
        await self.ask(
            *(client, kind, "technologist", "POST", "/api/v1/dicom/upload"),
            sop_uids=(sent.sop_uid,),
            files={"file": ("image.dcm", sent.content, "application/dicom")},
            data={"order_id": sent.order_id, **fields},
        )

    async def upload(self, client: httpx.AsyncClient) -> None:
        await self._upload(client, "upload", self.fresh())

    async def known(self, client: httpx.AsyncClient) -> None:
        """What was in Orthanc before, and nobody's."""
        await self._upload(client, "known", self.chance.choice(self.world.known))

    async def duplicate(self, client: httpx.AsyncClient) -> None:
        await self._upload(client, "duplicate", self.chance.choice(self.world.sent))

    async def twice(self, client: httpx.AsyncClient) -> None:
        """The same new file by two clients at once."""
        sent = self.fresh()
        await asyncio.gather(*(self._upload(client, "twice", sent) for _ in range(2)))

    async def coerce(self, client: httpx.AsyncClient) -> None:
        sent = self.fresh(mrn=f"FOREIGN-{self.chance.randrange(100)}")
        await self._upload(client, "coerce", sent, coerce_patient="true")

    async def stow(self, client: httpx.AsyncClient) -> None:
        parts = [self.fresh() for _ in range(self.chance.randint(1, 3))]
        self.world.sent += parts
        head = b"--cut-here\r\nContent-Type: application/dicom\r\n\r\n"
        body = b"\r\n".join(head + each.content for each in parts) + b"\r\n--cut-here--\r\n"
        await self.ask(
            *(client, "stow", "technologist", "POST", "/dicom-web/studies"),
            sop_uids=tuple(each.sop_uid for each in parts),
            headers=RELATED,
            content=body,
        )

    async def delete(self, client: httpx.AsyncClient) -> None:
        uid = self.chance.choice(self.world.sent).study_uid
        path = f"/api/v1/dicom/studies/{uid}?reason=by+a+test"
        await self.ask(client, "delete", "service", "DELETE", path)

    async def order(self, client: httpx.AsyncClient) -> None:
        await self._order(client, self.chance.choice(self.world.people)[0])

    async def cancel(self, client: httpx.AsyncClient) -> None:
        """A new order, and its end."""
        order = await self._order(client, self.chance.choice(self.world.people)[0])
        if order is not None:
            path, body = f"/api/v1/orders/{order['id']}", {"status": "cancelled"}
            await self.ask(client, "cancel", "service", "PATCH", path, json=body)

    async def care_team(self, client: httpx.AsyncClient) -> None:
        patient, _ = self.chance.choice(self.world.people)
        method = self.chance.choice(["PUT", "DELETE"])
        path = f"/api/v1/patients/{patient['id']}/care-team/nurse-{self.chance.randrange(5)}"
        await self.ask(client, "care-team", "service", method, path)

    async def view(self, client: httpx.AsyncClient) -> None:
        """A viewer link, opened, and a frame."""
        sent = self.chance.choice(self.world.sent)
        ctx, cookie = await self._opened(client, "view", sent)
        if not ctx:
            return
        frame = (
            f"/s/{ctx}/dicom-web/studies/{sent.study_uid}/series/{sent.series_uid}"
            f"/instances/{sent.sop_uid}/frames/1"
        )
        await self.ask(client, "frame", "clinician", "GET", frame, headers={"Cookie": cookie})

    async def _opened(self, client: httpx.AsyncClient, kind: str, sent: Sent) -> tuple[str, str]:
        """The name and the cookie of a viewer; empty where there is none."""
        path = f"/api/v1/dicom/viewer/url/{sent.study_uid}"
        link = await self.ask(client, kind, "clinician", "GET", path)
        if link is None or not link.is_success:
            return "", ""
        code = httpx.URL(link.json()["url"]).params["launch"]
        opened = await self.ask(
            client, "open", "clinician", "GET", "/viewer", params={"launch": code}
        )
        if opened is None or opened.status_code != 303:
            return "", ""
        cookie = opened.headers["set-cookie"].partition(";")[0]
        client.cookies.clear()
        return httpx.URL(opened.headers["location"]).params["ctx"], cookie

    async def viewer(self, client: httpx.AsyncClient) -> str:
        """An open one; empty where there is none."""
        ctx, _ = await self._opened(client, "view", self.chance.choice(self.world.sent))
        return ctx
