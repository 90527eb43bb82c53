"""What the EHR and its people ask besides images: whose record is whose, and who may see it."""

import random
import uuid
from typing import Any, Protocol

import httpx

KINDS = {
    "correct": 1,
    "restrict": 1,
    "break-glass": 1,
    "merge": 1,
    "sign-out": 1,
    "revoke": 1,
    "open-import": 1,
}
WHY = {"reason": "by a test"}
EMERGENCY = {"reason_code": "emergency-treatment", "reason_text": "Unconscious in the corridor."}


class Asks(Protocol):
    """Who asks the API, and remembers what it said."""

    chance: random.Random

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
    ) -> httpx.Response | None: ...

    async def viewer(self, client: httpx.AsyncClient) -> str: ...


async def register(asks: Asks, client: httpx.AsyncClient) -> Any:
    """A patient whom nobody knows yet; None where the app died over it."""
    body = {
        "first_name": "Jane",
        "last_name": "Doe",
        "dob": "1980-01-01",
        "sex": "F",
        "mrn": f"MRN-{uuid.uuid4().hex[:8]}",
    }
    made = await asks.ask(client, "patient", "service", "POST", "/api/v1/patients", json=body)
    return made.json() if made is not None and made.is_success else None


class Desk:
    """Every kind of write that is no image's; each with patients of its own."""

    async def correct(self: Asks, client: httpx.AsyncClient) -> None:
        patient = await register(self, client)
        if patient is not None:
            path, body = f"/api/v1/patients/{patient['id']}", {"first_name": "Janet"}
            await self.ask(client, "correct", "service", "PATCH", path, json=body)

    async def restrict(self: Asks, client: httpx.AsyncClient) -> None:
        patient = await register(self, client)
        if patient is not None:
            path = f"/api/v1/patients/{patient['id']}/restriction"
            body = {"level": "vip", "named": ["nurse-1"], **WHY}
            await self.ask(client, "restrict", "service", "PUT", path, json=body)
            await self.ask(client, "restrict", "service", "DELETE", path)

    async def break_glass(self: Asks, client: httpx.AsyncClient) -> None:
        """Of a patient who is nobody's, and its review."""
        patient = await register(self, client)
        if patient is None:
            return
        path = f"/api/v1/patients/{patient['id']}/break-glass"
        await self.ask(client, "break-glass", "clinician", "POST", path, json=EMERGENCY)
        queue = await self.ask(
            client, "queue", "auditor", "GET", "/api/v1/audit/break-glass?reviewed=false"
        )
        for each in queue.json() if queue is not None and queue.is_success else ():
            if each["patient_id"] == patient["id"]:
                path, body = f"/api/v1/audit/break-glass/{each['id']}/review", {"comment": "fine"}
                await self.ask(client, "review", "auditor", "POST", path, json=body)

    async def merge(self: Asks, client: httpx.AsyncClient) -> None:
        """Two into one, and apart again."""
        one, other = await register(self, client), await register(self, client)
        if one is None or other is None:
            return
        path = f"/api/v1/patients/{one['id']}"
        into = {"into": other["id"], **WHY}
        await self.ask(client, "merge", "service", "POST", f"{path}/merge", json=into)
        await self.ask(client, "merge", "service", "POST", f"{path}/unmerge", json=WHY)

    async def sign_out(self: Asks, client: httpx.AsyncClient) -> None:
        body = {"sub": f"nurse-{self.chance.randrange(5)}"}
        await self.ask(client, "sign-out", "service", "POST", "/api/v1/viewer/logout", json=body)

    async def revoke(self: Asks, client: httpx.AsyncClient) -> None:
        ctx = await self.viewer(client)
        if ctx:
            path = f"/api/v1/viewer/sessions/{ctx}"
            await self.ask(client, "revoke", "clinician", "DELETE", path)

    async def open_import(self: Asks, client: httpx.AsyncClient) -> None:
        """Opened and cancelled."""
        path, body = "/api/v1/dicom/imports", {"file_count": 1}
        made = await self.ask(client, "open-import", "technologist", "POST", path, json=body)
        if made is not None and made.is_success:
            path = f"{path}/{made.json()['id']}"
            await self.ask(client, "cancel-import", "technologist", "DELETE", path)
