"""What the EHR says, and everything it might say instead: only a true in time allows."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import httpx
import pytest
import respx
from pydantic import SecretStr, ValidationError

from app.access import ehr
from app.access.ehr import Ehr, Question, Verdict, narrow
from app.access.policy import Decision, Reason
from app.audit import Action
from tests.lightbox import make_settings

URL = "https://ehr.hospital.test/pdp"
ONE = Question(
    sub="dr-who",
    roles="clinician,radiologist",
    site="main",
    action=Action.STUDY_VIEW,
    patient_id=UUID(int=1),
    mrn="MRN-1",
    mrn_issuer="HOSPITAL",
    purpose_of_use="",
)
ALLOWED, DENIED, UNAVAILABLE = Verdict.ALLOWED, Verdict.DENIED, Verdict.UNAVAILABLE


@dataclass
class Pdp:
    """A policy decision point at the transport."""

    ehr: Ehr
    answer: Any = field(default_factory=lambda: httpx.Response(200, json={"decision": True}))
    asked: list[httpx.Request] = field(default_factory=list)
    clock: float = 1000.0
    held: asyncio.Event | None = None
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    async def told(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        self.arrived.set()
        if self.held is not None:
            await self.held.wait()
        if isinstance(self.answer, Exception):
            raise self.answer
        answer: httpx.Response = self.answer(request) if callable(self.answer) else self.answer
        return answer

    def body(self) -> Any:
        return json.loads(self.asked[-1].content)


@pytest.fixture
async def pdp(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Pdp]:
    async with httpx.AsyncClient() as client:
        asks = Ehr(client, URL, SecretStr("hush"), timeout_seconds=0.2, cache_seconds=10)
        made = Pdp(asks)
        monkeypatch.setattr(ehr, "time", SimpleNamespace(monotonic=lambda: made.clock))
        with respx.mock(assert_all_called=False) as router:
            router.post(url__startswith=URL).mock(side_effect=made.told)
            yield made


async def test_the_question_is_an_authzen_evaluation(pdp: Pdp) -> None:
    assert await pdp.ehr.ask(ONE) is ALLOWED
    (request,) = pdp.asked
    assert str(request.url) == f"{URL}/access/v1/evaluation"
    assert request.headers["authorization"] == "Bearer hush"
    assert pdp.body() == {
        "subject": {
            "type": "user",
            "id": "dr-who",
            "properties": {"roles": ["clinician", "radiologist"], "site": "main"},
        },
        "action": {"name": "study:view"},
        "resource": {
            "type": "patient",
            "id": str(UUID(int=1)),
            "properties": {"mrn": "MRN-1", "mrn_issuer": "HOSPITAL"},
        },
        "context": {"purpose_of_use": ""},
    }


NO_ANSWERS: dict[str, Any] = {
    "500": httpx.Response(500, json={"decision": True}),
    "404": httpx.Response(404, json={"decision": True}),
    "201": httpx.Response(201, json={"decision": True}),
    "401": httpx.Response(401, json={"decision": False}),
    "a redirect": httpx.Response(307, headers={"Location": f"{URL}/yes"}, json={"decision": True}),
    "garbage": httpx.Response(200, html="<html>yes</html>"),
    "nothing": httpx.Response(200),
    "half": httpx.Response(200, content=b'{"decision": tr'),
    "text": httpx.Response(200, json={"decision": "true"}),
    "one": httpx.Response(200, json={"decision": 1}),
    "null": httpx.Response(200, json={"decision": None}),
    "a list": httpx.Response(200, json=[{"decision": True}]),
    "only true": httpx.Response(200, json=True),
    "another word": httpx.Response(200, json={"Decision": True}),
    "both": httpx.Response(200, content=b'{"decision": false, "decision": true}'),
    "UTF-16": httpx.Response(200, content='{"decision": true}'.encode("utf-16")),
    "nested": httpx.Response(200, content=b"[" * 100_000),
    "huge": httpx.Response(200, content=b'{"decision": true}' + b" " * 300_000),
    "refused": httpx.ConnectError("refused at 10.0.0.1"),
    "cut": httpx.RemoteProtocolError("peer closed connection"),
    "timeout": httpx.ReadTimeout("slow"),
    "bad address": httpx.UnsupportedProtocol("ftp"),
}


@pytest.mark.parametrize("how", NO_ANSWERS)
async def test_what_is_no_answer_allows_nothing(how: str, pdp: Pdp) -> None:
    pdp.answer = NO_ANSWERS[how]
    assert await pdp.ehr.ask(ONE) is UNAVAILABLE
    assert await pdp.ehr.ask_all([ONE]) == {ONE: UNAVAILABLE}
    decision = await narrow(pdp.ehr, Decision(allowed=True), ONE)
    assert decision == Decision(allowed=False, reason=Reason.EHR_UNAVAILABLE)
    assert all(str(each.url).startswith(f"{URL}/access/") for each in pdp.asked)


async def test_an_answer_that_takes_too_long_is_none(pdp: Pdp) -> None:
    pdp.held = asyncio.Event()
    assert await pdp.ehr.ask(ONE) is UNAVAILABLE
    assert await pdp.ehr.ask_all([replace(ONE, mrn="2")]) == {replace(ONE, mrn="2"): UNAVAILABLE}


async def test_the_ehr_can_only_narrow(pdp: Pdp) -> None:
    no = Decision(allowed=False, reason=Reason.NO_RELATIONSHIP)
    assert await narrow(pdp.ehr, no, ONE) == no
    assert pdp.asked == []
    yes = Decision(allowed=True, purpose_of_use="BTG")
    assert await narrow(pdp.ehr, yes, ONE) == yes
    assert await narrow(None, yes, ONE) == yes
    pdp.answer = httpx.Response(200, json={"decision": False})
    pdp.clock += 11
    assert await narrow(pdp.ehr, yes, ONE) == Decision(allowed=False, reason=Reason.EHR)


OTHERS: dict[str, Any] = {
    "sub": "DR-WHO",
    "roles": "clinician",
    "site": "north",
    "action": Action.STUDY_READ,
    "patient_id": UUID(int=2),
    "mrn": "MRN-2",
    "mrn_issuer": "",
    "purpose_of_use": "BTG",
}


@pytest.mark.parametrize("name", list(Question.__dataclass_fields__))
async def test_an_answer_is_kept_for_the_very_same_question(name: str, pdp: Pdp) -> None:
    assert await pdp.ehr.ask(ONE) is ALLOWED
    pdp.answer = httpx.Response(200, json={"decision": False})
    assert await pdp.ehr.ask(replace(ONE)) is ALLOWED
    assert len(pdp.asked) == 1
    other = replace(ONE, **{name: OTHERS[name]})
    assert await pdp.ehr.ask(other) is DENIED
    assert await pdp.ehr.ask_all([ONE, other]) == {ONE: ALLOWED, other: DENIED}
    assert len(pdp.asked) == 2


async def test_an_answer_is_kept_for_a_while_and_no_longer(pdp: Pdp) -> None:
    assert await pdp.ehr.ask(ONE) is ALLOWED
    pdp.answer = httpx.Response(200, json={"decision": False})
    pdp.clock += 9.9
    assert await pdp.ehr.ask(ONE) is ALLOWED
    pdp.clock += 0.1
    assert await pdp.ehr.ask(ONE) is DENIED
    assert len(pdp.asked) == 2


async def test_an_answer_counts_from_when_it_was_asked_for(pdp: Pdp) -> None:
    def slow(request: httpx.Request) -> httpx.Response:
        pdp.clock += 8
        return httpx.Response(200, json={"decision": True})

    pdp.answer = slow
    assert await pdp.ehr.ask(ONE) is ALLOWED
    pdp.clock += 1.9
    assert await pdp.ehr.ask(ONE) is ALLOWED
    assert len(pdp.asked) == 1
    pdp.clock += 0.1
    await pdp.ehr.ask(ONE)
    assert len(pdp.asked) == 2


async def test_silence_is_kept_for_a_second(pdp: Pdp) -> None:
    pdp.answer = httpx.ConnectError("refused")
    assert await pdp.ehr.ask(ONE) is UNAVAILABLE
    pdp.answer = httpx.Response(200, json={"decision": True})
    pdp.clock += 0.9
    assert await pdp.ehr.ask(ONE) is UNAVAILABLE
    assert len(pdp.asked) == 1
    pdp.clock += 0.2
    assert await pdp.ehr.ask(ONE) is ALLOWED


async def test_without_a_cache_the_ehr_is_asked_every_time(pdp: Pdp) -> None:
    asks = Ehr(pdp.ehr._client, URL, SecretStr("hush"), timeout_seconds=1, cache_seconds=0)
    for decision, verdict in ((True, ALLOWED), (False, DENIED), (True, ALLOWED)):
        pdp.answer = httpx.Response(200, json={"decision": decision})
        assert await asks.ask(ONE) is verdict
    assert len(pdp.asked) == 3


async def test_of_many_who_ask_the_same_one_asks(pdp: Pdp) -> None:
    pdp.held = asyncio.Event()
    asking = [asyncio.create_task(pdp.ehr.ask(ONE)) for _ in range(50)]
    await pdp.arrived.wait()
    asking[0].cancel()  # whoever was first goes away: the others get their answer
    pdp.held.set()
    found = await asyncio.gather(*asking, return_exceptions=True)
    assert isinstance(found[0], asyncio.CancelledError)
    assert found[1:] == [ALLOWED] * 49
    assert len(pdp.asked) == 1


async def test_what_is_kept_is_bounded(pdp: Pdp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ehr, "MOST_KEPT", 3)
    many = [replace(ONE, sub=str(each)) for each in range(5)]
    for each in many:
        await pdp.ehr.ask(each)
    assert len(pdp.ehr._kept) == 3
    await pdp.ehr.ask(many[4])
    assert len(pdp.asked) == 5
    await pdp.ehr.ask(many[0])  # the oldest went
    assert len(pdp.asked) == 6


# ------------------------------------------------------------------------------------------ lists


def odd_ones(request: httpx.Request) -> httpx.Response:
    told = [
        {"decision": UUID(each["resource"]["id"]).int % 2 == 1}
        for each in json.loads(request.content)["evaluations"]
    ]
    return httpx.Response(200, json={"evaluations": told})


async def test_a_list_is_asked_about_in_batches(pdp: Pdp) -> None:
    pdp.answer = odd_ones
    many = [replace(ONE, patient_id=UUID(int=each), mrn=str(each)) for each in range(250)]
    many[7] = replace(many[7], purpose_of_use="BTG")
    found = await pdp.ehr.ask_all(many)
    assert found == {each: ALLOWED if each.patient_id.int % 2 == 1 else DENIED for each in many}
    assert [str(each.url) for each in pdp.asked] == [f"{URL}/access/v1/evaluations"] * 3
    first = json.loads(pdp.asked[0].content)
    assert first["action"] == {"name": "study:view"}
    assert len(first["evaluations"]) == 100
    assert first["evaluations"][7]["context"] == {"purpose_of_use": "BTG"}
    assert await pdp.ehr.ask_all(many) == found
    assert await pdp.ehr.ask(many[3]) is ALLOWED
    assert len(pdp.asked) == 3
    assert await pdp.ehr.ask_all([]) == {}


@pytest.mark.parametrize(
    ("evaluations", "verdicts"),
    [
        ([{"decision": True}, {"decision": False}], [ALLOWED, DENIED]),
        ([{"decision": True}, {"decision": "true"}], [ALLOWED, UNAVAILABLE]),
        ([{"decision": True}, True], [ALLOWED, UNAVAILABLE]),
        ([{"decision": True}], [UNAVAILABLE, UNAVAILABLE]),
        ([{"decision": True}] * 3, [UNAVAILABLE, UNAVAILABLE]),
        ({"0": {"decision": True}}, [UNAVAILABLE, UNAVAILABLE]),
        (None, [UNAVAILABLE, UNAVAILABLE]),
    ],
    ids=str,
)
async def test_answers_about_others_are_none(
    evaluations: Any, verdicts: list[Verdict], pdp: Pdp
) -> None:
    pdp.answer = httpx.Response(200, json={"evaluations": evaluations, "decision": True})
    two = [ONE, replace(ONE, mrn="MRN-2")]
    assert await pdp.ehr.ask_all(two) == dict(zip(two, verdicts, strict=True))


# --------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "wrong",
    [
        {"policy_url": URL},
        {"policy_secret": SecretStr("hush")},
        {"policy_url": f"{URL}/", "policy_secret": SecretStr("hush")},
        {"policy_url": "ehr.hospital.test", "policy_secret": SecretStr("hush")},
        {"policy_timeout_seconds": 0},
        {"policy_cache_seconds": -1},
        {"policy_cache_seconds": 3600},
    ],
    ids=str,
)
def test_settings_that_would_be_unsafe_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        make_settings("sqlite+aiosqlite://", "http://orthanc.test", **wrong)


async def test_without_an_address_the_ehr_has_no_say() -> None:
    settings = make_settings("sqlite+aiosqlite://", "http://orthanc.test")
    async with httpx.AsyncClient() as client:
        assert Ehr.from_settings(settings, client) is None
