"""A study that has to be matched, with the truth; and the register of their kinds."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from app.matching import (
    ArrivedStudy,
    Identifier,
    Match,
    OrderCandidate,
    PatientCandidate,
    Verdict,
)
from tests.adversarial.people import AUTHORITY, Maker

ABSENT = Identifier()


@dataclass(frozen=True)
class Case:
    """A study, what is known, and whose it really is.

    `waits`: whatever is true, a human has to decide; certain is wrong.
    """

    study: ArrivedStudy
    orders: tuple[OrderCandidate, ...] = ()
    patients: tuple[PatientCandidate, ...] = ()
    patient: UUID | None = None  # None: nobody known
    answers: frozenset[UUID] = frozenset()  # orders; empty: none of them
    waits: bool = False
    authority: str = AUTHORITY

    def judge(self, found: Match) -> str:
        """What became of it: "order", "patient" (linked rightly), "wrong", or the verdict."""
        if found.verdict is not Verdict.CERTAIN:
            return found.verdict.value
        right = found.patient_id == self.patient and not self.waits
        if found.order_id is not None:
            right = right and found.order_id in self.answers
        return ("order" if found.order_id else "patient") if right else "wrong"

    def ranked_first(self, found: Match) -> bool:
        """Is the truth the first proposal?"""
        if not found.candidates:
            return False
        first = found.candidates[0]
        right = first.patient_id == self.patient
        return right and (not self.answers or first.order_id in self.answers)


def true(order: OrderCandidate, study: ArrivedStudy, *others: Any, **more: Any) -> Case:
    """A case whose study answers the order. `others`: further orders and patients."""
    return Case(
        study=study,
        orders=(order, *(each for each in others if isinstance(each, OrderCandidate))),
        patients=tuple(each for each in others if isinstance(each, PatientCandidate)),
        patient=order.patient.id,
        answers=frozenset({order.id}),
        **more,
    )


def of(patient: PatientCandidate | None, study: ArrivedStudy, *others: Any, **more: Any) -> Case:
    """A case whose study answers none of the orders."""
    patients = [each for each in others if isinstance(each, PatientCandidate)]
    return Case(
        study=study,
        orders=tuple(each for each in others if isinstance(each, OrderCandidate)),
        patients=(*patients, patient) if patient else tuple(patients),
        patient=patient.id if patient else None,
        **more,
    )


Make = Callable[[Maker], Case]
KINDS: dict[str, Make] = {}
INVISIBLE: dict[str, Make] = {}
"""What nobody can see from the headers: counted apart."""


def kind(words: str, into: dict[str, Make] = KINDS) -> Callable[[Make], Make]:
    def put(make: Make) -> Make:
        assert words not in into
        into[words] = make
        return make

    return put


def identifiers_of(m: Maker, order: OrderCandidate, **values: Any) -> ArrivedStudy:
    return m.random.choice((m.study, m.own_uid))(order, **values)
