"""The EHR's say: after our own yes it is asked, and can only narrow.

The EHR provides a policy decision point after the OpenID AuthZEN Authorization API 1.0: one
question by `POST /access/v1/evaluation`, those of a list by `POST /access/v1/evaluations`. It
answers `{"decision": true}`; anything but a JSON `true` or `false` in time is no answer, and then
nothing is shown. An answer is kept for a short while under all that was asked, and of many who ask
the same at once, one asks the EHR. docs/policy.md has the requests and answers word for word.
"""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any
from uuid import UUID

import httpx
from pydantic import SecretStr

from app.access.policy import BREAK_THE_GLASS, Decision, Reason, Relation
from app.audit import Action
from app.identity import Principal, read_json
from app.settings import Settings

logger = logging.getLogger(__name__)

EHR_SILENT = (
    "The EHR, which has a say in who may see this, does not answer. So nothing is shown; try again "
    "soon."
)
MAX_ANSWER_BYTES = 256 * 1024
MOST_AT_ONCE = 8  # requests to the EHR
MOST_LISTS_AT_ONCE = 2  # of these, so that no frame waits for somebody's long list
MOST_IN_A_BATCH = 100  # questions in one request
MOST_KEPT = 20_000  # answers
SILENCE_KEPT_SECONDS = 1.0  # an EHR that did not answer is left alone for so long


class Verdict(StrEnum):
    """What the EHR said, or that it said nothing that can be relied on."""

    ALLOWED = "allowed"
    DENIED = "denied"
    UNAVAILABLE = "unavailable"


@dataclass(frozen=True, slots=True)
class Question:
    """All that the EHR is told. Two questions that differ anywhere are two."""

    sub: str
    roles: str  # comma-separated
    site: str
    action: Action
    patient_id: UUID
    mrn: str
    mrn_issuer: str
    purpose_of_use: str

    @classmethod
    def of(
        cls,
        principal: Principal,
        action: Action,
        patient_id: UUID,
        mrn: str,
        mrn_issuer: str,
        purpose_of_use: str,
    ) -> "Question":
        return cls(
            principal.sub,
            principal.roles_text,
            principal.site,
            action,
            patient_id,
            mrn,
            mrn_issuer,
            purpose_of_use,
        )

    @property
    def who_and_what(self) -> dict[str, Any]:
        """`subject` and `action` of an evaluation."""
        properties = {"roles": [role for role in self.roles.split(",") if role], "site": self.site}
        return {
            "subject": {"type": "user", "id": self.sub, "properties": properties},
            "action": {"name": self.action.value},
        }

    @property
    def to_whom(self) -> dict[str, Any]:
        """`resource` and `context` of an evaluation."""
        properties = {"mrn": self.mrn, "mrn_issuer": self.mrn_issuer}
        return {
            "resource": {"type": "patient", "id": str(self.patient_id), "properties": properties},
            "context": {"purpose_of_use": self.purpose_of_use},
        }


class Ehr:
    """Asks the EHR. One per app; the client is the app's."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        url: str,
        secret: SecretStr,
        *,
        timeout_seconds: float,
        cache_seconds: float,
    ) -> None:
        self._client = client
        self._url = url
        self._secret = secret
        self._timeout_seconds = timeout_seconds
        self._cache_seconds = cache_seconds
        self._kept: dict[Question, tuple[float, Verdict]] = {}  # until when; the oldest first
        self._asking: dict[Question, asyncio.Task[Verdict]] = {}
        self._at_once = asyncio.Semaphore(MOST_AT_ONCE)
        self._lists_at_once = asyncio.Semaphore(MOST_LISTS_AT_ONCE)

    @classmethod
    def from_settings(cls, settings: Settings, client: httpx.AsyncClient) -> "Ehr | None":
        """None where no `policy_url` is set: then the EHR has no say."""
        if settings.policy_url is None or settings.policy_secret is None:
            return None
        return cls(
            client,
            settings.policy_url,
            settings.policy_secret,
            timeout_seconds=settings.policy_timeout_seconds,
            cache_seconds=settings.policy_cache_seconds,
        )

    async def ask(self, question: Question) -> Verdict:
        """What the EHR says. Of many who ask the same at once, one asks for all."""
        kept = self._recall(question)
        if kept is not None:
            return kept
        asking = self._asking.get(question)
        if asking is None:
            asking = asyncio.create_task(self._ask_one(question))
            self._asking[question] = asking
            asking.add_done_callback(lambda _: self._asking.pop(question, None))
        # Whoever goes away meanwhile takes the answer from nobody else.
        return await asyncio.shield(asking)

    async def ask_all(self, questions: Sequence[Question]) -> dict[Question, Verdict]:
        """What the EHR says to each; all are of one caller and one action."""
        answers = {each: kept for each in questions if (kept := self._recall(each)) is not None}
        left = [each for each in dict.fromkeys(questions) if each not in answers]
        batches = [
            left[start : start + MOST_IN_A_BATCH] for start in range(0, len(left), MOST_IN_A_BATCH)
        ]
        for found in await asyncio.gather(*(self._ask_batch(batch) for batch in batches)):
            answers |= found
        return answers

    async def _ask_one(self, question: Question) -> Verdict:
        began = time.monotonic()
        answer = await self._post("evaluation", {**question.who_and_what, **question.to_whom})
        verdict = _verdict(answer)
        self._keep(question, began, verdict)
        return verdict

    async def _ask_batch(self, questions: Sequence[Question]) -> dict[Question, Verdict]:
        began = time.monotonic()
        evaluations = [each.to_whom for each in questions]
        body = {**questions[0].who_and_what, "evaluations": evaluations}
        async with self._lists_at_once:
            answer = await self._post("evaluations", body)
        told = answer.get("evaluations") if isinstance(answer, dict) else None
        if not isinstance(told, list) or len(told) != len(questions):
            if answer is not None:
                logger.error("the EHR's policy answered other evaluations than were asked for")
            told = [None] * len(questions)
        found = {each: _verdict(one) for each, one in zip(questions, told, strict=True)}
        for each, verdict in found.items():
            self._keep(each, began, verdict)
        return found

    async def _post(self, name: str, body: Mapping[str, Any]) -> Any:
        """The answer's JSON; None where there is none that can be relied on."""
        request = self._client.build_request(
            "POST",
            f"{self._url}/access/v1/{name}",
            json=body,
            headers={"Authorization": f"Bearer {self._secret.get_secret_value()}"},
        )
        try:
            async with asyncio.timeout(self._timeout_seconds), self._at_once:
                return await read_json(self._client, request, limit=MAX_ANSWER_BYTES)
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, ValueError) as error:
            logger.error("the EHR's policy does not answer usefully", exc_info=error)
            return None

    def _recall(self, question: Question) -> Verdict | None:
        until, verdict = self._kept.get(question, (0.0, None))
        return verdict if until > time.monotonic() else None

    def _keep(self, question: Question, began: float, verdict: Verdict) -> None:
        """Counted from when it was asked: what the EHR changed since may not be in the answer."""
        seconds = self._cache_seconds
        if verdict is Verdict.UNAVAILABLE:
            began, seconds = time.monotonic(), min(seconds, SILENCE_KEPT_SECONDS)
        self._kept.pop(question, None)
        if seconds <= 0:
            return
        while len(self._kept) >= MOST_KEPT:
            del self._kept[next(iter(self._kept))]
        self._kept[question] = (began + seconds, verdict)


async def narrow(ehr: Ehr | None, decision: Decision, question: Question) -> Decision:
    """Our decision, and the EHR's where we would say yes and it has a say."""
    if ehr is None or not decision.allowed:
        return decision
    verdict = await ehr.ask(question)
    emergency = emergency_of(decision, question, verdict)
    if emergency is None:
        return _narrowed(decision, verdict)
    decision = replace(decision, purpose_of_use=BREAK_THE_GLASS)
    return _narrowed(decision, await ehr.ask(emergency))


async def narrow_all(
    ehr: Ehr | None, decided: Mapping[UUID, tuple[Decision, Question]]
) -> dict[UUID, Decision]:
    """As `narrow`, of many patients; all are of one caller and one action."""
    ours = {key: decision for key, (decision, _) in decided.items()}
    if ehr is None:
        return ours
    asked = {key: question for key, (each, question) in decided.items() if each.allowed}
    verdicts = await ehr.ask_all(list(asked.values()))
    found = {key: verdicts[question] for key, question in asked.items()}
    again = {
        key: emergency
        for key, question in asked.items()
        if (emergency := emergency_of(ours[key], question, found[key])) is not None
    }
    if again:
        verdicts = await ehr.ask_all(list(again.values()))
        for key, question in again.items():
            found[key] = verdicts[question]
            ours[key] = replace(ours[key], purpose_of_use=BREAK_THE_GLASS)
    return ours | {key: _narrowed(ours[key], verdict) for key, verdict in found.items()}


def emergency_of(decision: Decision, question: Question, verdict: Verdict) -> Question | None:
    """What is asked once more where the EHR says no to whoever is tied to the patient, and they
    have broken the glass besides; None: nothing."""
    if verdict is not Verdict.DENIED or question.purpose_of_use == BREAK_THE_GLASS:
        return None
    if Relation.BROKE_GLASS not in decision.by:
        return None
    return replace(question, purpose_of_use=BREAK_THE_GLASS)


def _narrowed(decision: Decision, verdict: Verdict) -> Decision:
    if verdict is Verdict.ALLOWED:
        return decision
    reason = Reason.EHR if verdict is Verdict.DENIED else Reason.EHR_UNAVAILABLE
    return Decision(allowed=False, reason=reason)


def _verdict(answer: object) -> Verdict:
    """Only a JSON `true` allows; only a JSON `false` is a no; the rest is no answer."""
    decision = answer.get("decision") if isinstance(answer, dict) else None
    if decision is True:
        return Verdict.ALLOWED
    if decision is False:
        return Verdict.DENIED
    if answer is not None:
        logger.error("the EHR's policy answered without a decision")
    return Verdict.UNAVAILABLE
