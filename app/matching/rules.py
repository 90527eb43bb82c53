"""Whose study is it? The rules, in one place.

Certain is what two independent identifiers say and nothing denies, by one of four rules:

1. its StudyInstanceUID is linked already, or 2. was planned for an order; and the PatientID with
   its issuer agrees, or, where the study has none, name and birth date do;
3. accession number and PatientID, each with its issuer, name one order and its patient, and the
   name or the birth date agrees;
4. nothing names an order, the PatientID with its issuer names a patient, and name and birth date
   agree, and no namesake of the same birth date is known. Then the patient is certain, no order.

What denies it stands in FORBIDS and DENIES_PATIENT below. No score makes anything certain.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from uuid import UUID

from app.matching.codes import MEANING, Code
from app.matching.evidence import Prepared, Seen
from app.matching.values import (
    ArrivedStudy,
    Finding,
    Match,
    OrderCandidate,
    PatientCandidate,
    Proposal,
    Rule,
    Verdict,
)

LEAST_SCORE = 15  # what has less is not proposed
FULL_POINTS = 150  # what all from the worklist has, about
MOST_PROPOSALS = 20

DENIES_PATIENT = frozenset(
    {
        Code.PATIENT_ID_DIFFERS,
        Code.PATIENT_ID_ISSUER_DIFFERS,
        Code.NAME_OTHER_FAMILY,
        Code.NAME_OTHER_GIVEN,
        Code.NAME_DIFFERS,
        Code.BIRTH_DATE_DIFFERS,
        Code.SEX_DIFFERS,
    }
)
"""It is somebody else: beside an identifier that says it is this patient, a conflict."""

FORBIDS = DENIES_PATIENT | {
    Code.PATIENT_ID_AMBIGUOUS,
    Code.PATIENT_ID_OTHER,
    Code.PATIENT_ID_NEAR,
    Code.NAME_SIMILAR,
    Code.BIRTH_DATE_NEAR,
    Code.ACCESSION_NEAR,
    Code.ACCESSION_DIFFERS,
    Code.ACCESSION_ISSUER_DIFFERS,
    Code.SEVERAL_ACCESSIONS,
    Code.MODALITY_DIFFERS,
    Code.BODY_PART_DIFFERS,
    Code.ORDER_CANCELLED,
    Code.ORDER_FULFILLED,
    Code.NAMES_ANOTHER_ORDER,
}
"""Any of these, and a human decides."""

_BY_STUDY = frozenset({Code.STUDY_PLANNED, Code.STUDY_LINKED})
_BY_ACCESSION = frozenset({Code.ACCESSION_AGREES, Code.ACCESSION_ISSUER_UNKNOWN})
_NUMBERED = frozenset({Code.PATIENT_ID_AGREES, Code.PATIENT_ID_AMBIGUOUS, Code.PATIENT_ID_FORMER})
_NAMES_ORDER = _BY_STUDY | _BY_ACCESSION | {Code.STUDY_REFERENCED}
_FULL_NAME = frozenset({Code.NAME_AGREES, Code.NAME_SWAPPED})
_WHOLE_NAME = _FULL_NAME | {Code.NAME_COMMON}
_NAME_SAYS_LESS = frozenset(
    {
        Code.NAME_COMMON,
        Code.NAME_PARTLY,
        Code.NAME_SWAPPED,
        Code.NAME_FORMER,
        Code.NAME_TRANSLITERATED,
    }
)
_ANY_NAME = frozenset(each for each in Code if each.name.startswith("NAME_"))


@dataclass(frozen=True)
class Weighed:
    """A candidate with what was seen."""

    patient: PatientCandidate
    order: OrderCandidate | None
    seen: tuple[Seen, ...]
    codes: frozenset[Code]

    @classmethod
    def of(
        cls, patient: PatientCandidate, order: OrderCandidate | None, seen: tuple[Seen, ...]
    ) -> "Weighed":
        return cls(patient, order, seen, frozenset(each.code for each in seen))

    @cached_property
    def points(self) -> int:
        return sum(MEANING[each].points for each in self.codes)

    @property
    def score(self) -> int:
        return max(0, min(100, 100 * self.points // FULL_POINTS))

    @property
    def key(self) -> tuple[int, str, str, tuple[Seen, ...]]:
        """Best first, and the same whatever order the candidates came in."""
        order = str(self.order.id) if self.order else ""
        return (-self.points, str(self.patient.id), order, self.seen)

    def denied(self) -> frozenset[Code]:
        """What says that it is another patient's.

        A new family name alone, with all else of the patient, may come of a marriage.
        """
        found = self.codes & DENIES_PATIENT
        if Code.BIRTH_DATE_AGREES in self.codes:
            found -= {Code.NAME_OTHER_FAMILY}
        return found

    def knows_patient(self) -> bool:
        """Does the identifier agree? One that was merged into it needs name and birth date."""
        both = Code.NAME_AGREES in self.codes and Code.BIRTH_DATE_AGREES in self.codes
        return Code.PATIENT_ID_AGREES in self.codes or (
            Code.PATIENT_ID_FORMER in self.codes and both
        )

    def name_is_enough(self) -> bool:
        """A name that says less leaves room for relatives; few of them share the birth date."""
        return not self.codes & _NAME_SAYS_LESS or Code.BIRTH_DATE_AGREES in self.codes

    def proposal(self) -> Proposal:
        shown = sorted(self.seen, key=lambda each: -abs(MEANING[each.code].points))
        return Proposal(
            patient_id=self.patient.id,
            order_id=self.order.id if self.order else None,
            score=self.score,
            speaks_for=tuple(s.finding() for s in shown if MEANING[s.code].points > 0),
            speaks_against=tuple(s.finding() for s in shown if MEANING[s.code].points <= 0),
        )


def match(
    study: ArrivedStudy,
    orders: Iterable[OrderCandidate],
    patients: Iterable[PatientCandidate] = (),
    *,
    authority: str = "",
) -> Match:
    """Say whose the study is, of these candidates; their order does not count.

    All that `app.matching.look_up` names by an identifier must be among them: whether something
    is the only one is judged by what is here. `authority` is the site's own, the issuer of
    numbers that come without. Never raises for any text.
    """
    return _Matching(study, frozenset(orders), frozenset(patients), authority).decide()


class _Matching:
    """One study among all its candidates."""

    def __init__(
        self,
        study: ArrivedStudy,
        orders: frozenset[OrderCandidate],
        patients: frozenset[PatientCandidate],
        authority: str,
    ) -> None:
        known = patients | {each.patient for each in orders}
        self.study = study
        self.prepared = Prepared(study, known, authority)
        by_patient = {each: self.prepared.of_patient(each) for each in known}
        self.patients = [Weighed.of(each, None, seen) for each, seen in by_patient.items()]
        self.orders = self._weighed(orders, by_patient)
        # Whom the PatientID names.
        self.numbered = [
            each
            for each in self.patients
            if each.codes & {Code.PATIENT_ID_AGREES, Code.PATIENT_ID_AMBIGUOUS}
        ]

    def _weighed(
        self,
        orders: frozenset[OrderCandidate],
        by_patient: dict[PatientCandidate, tuple[Seen, ...]],
    ) -> list[Weighed]:
        seen = [(each, self.prepared.of_order(each)) for each in orders]
        named = {
            kind: {order.id for order, these in seen if any(one.code in kind for one in these)}
            for kind in (_BY_STUDY, _BY_ACCESSION, frozenset({Code.STUDY_REFERENCED}))
        }
        weighed = []
        for order, these in seen:
            all_seen = by_patient[order.patient] + these
            if any(ids and order.id not in ids for ids in named.values()):
                all_seen += (Seen(Code.NAMES_ANOTHER_ORDER),)
            weighed.append(Weighed.of(order.patient, order, all_seen))
        return weighed

    # ------------------------------------------------------------------------- decisions

    def decide(self) -> Match:
        by_study = [each for each in self.orders if each.codes & _BY_STUDY]
        if conflict := self._conflict(by_study):
            return self._answer(Verdict.CONFLICTING, conflict)
        named = by_study or [each for each in self.orders if each.codes & _NAMES_ORDER]
        # Of several sites' orders with one number, the patient's.
        named = [each for each in named if each.codes & _NUMBERED] or named
        if not named:
            return self._without_order()
        doubts = self._doubts(named)
        rules = {self._rule(each) for each in named} if not doubts else set()
        if rules == {Rule.LINKED_STUDY} and len(named) > 1:
            patient = next(each for each in self.patients if each.patient == named[0].patient)
            return self._certain(patient, Rule.LINKED_STUDY)  # it answers several orders
        if len(named) > 1:
            doubts |= {Code.NAMES_ANOTHER_ORDER}
        elif rules and (rule := rules.pop()):
            return self._certain(named[0], rule)
        return self._answer(Verdict.PROPOSED, doubts or frozenset({Code.TOO_LITTLE}))

    def _conflict(self, by_study: Sequence[Weighed]) -> frozenset[Code]:
        """Identifiers that contradict each other, or the demographics."""
        if self.study.under_two_patients:
            return frozenset({Code.TWO_PATIENTS})
        numbered = [each for each in self.numbered if Code.PATIENT_ID_AGREES in each.codes]
        ids = {each.patient.id for each in (*by_study, *numbered)}
        if self.study.owner and ids - {self.study.owner}:
            return frozenset({Code.OWNED_BY_ANOTHER})
        by_accession = {each.patient.id for each in self.orders if each.codes & _BY_ACCESSION}
        if len(ids) > 1 or (ids and by_accession and not ids & by_accession):
            return frozenset({Code.NAMES_ANOTHER_PATIENT})
        return frozenset(code for each in (*by_study, *numbered) for code in each.denied())

    def _doubts(self, named: Sequence[Weighed]) -> frozenset[Code]:
        """What forbids that those who are named be certain."""
        found: set[Code] = set()
        for each in named:
            found |= each.codes & FORBIDS
            if not each.codes & _BY_STUDY:
                found |= each.codes & {Code.DATE_IMPLAUSIBLE}
            if self._name_fits_another(each):
                found.add(Code.NAMESAKE)
            if self._other_number_names_another(each.patient):
                found.add(Code.NAMES_ANOTHER_PATIENT)
        ids = {each.patient.id for each in named}
        if len([each for each in self.patients if each.patient.id in ids]) > 1:
            # Two patients, or two versions of one.
            found.add(Code.NAMES_ANOTHER_PATIENT)
        return frozenset(found)

    def _other_number_names_another(self, patient: PatientCandidate) -> bool:
        """Are other PatientIDs of the study those of another patient here?"""
        return any(
            each.id != patient.id and self.prepared.is_number_of(other, each)
            for other in self.prepared.other_ids
            for each in self.prepared.holders.get(other.value, ())
        )

    def _name_fits_another(self, one: Weighed) -> bool:
        """A twin's name? Identifiers can be picked from the wrong line of a worklist.

        Asked where it is not the whole name of the patient; and where it can't be read beside
        theirs, whatever the birth date.
        """
        if one.codes & _WHOLE_NAME or not self.prepared.name:
            return False
        unread = not one.codes & _ANY_NAME
        return any(
            each.patient.id != one.patient.id
            and each.codes & _WHOLE_NAME
            and (unread or Code.BIRTH_DATE_AGREES in each.codes)
            for each in self.patients
        )

    def _rule(self, one: Weighed) -> Rule | None:
        """Which of the first three rules holds, if any, for the only one that is named."""
        if not one.name_is_enough():
            return None
        codes, knows = one.codes, one.knows_patient()
        name, birth_date = bool(codes & _FULL_NAME), Code.BIRTH_DATE_AGREES in codes
        if codes & _BY_STUDY:
            if knows or (not self.prepared.patient.value and name and birth_date):
                linked = Code.STUDY_LINKED in codes
                return Rule.LINKED_STUDY if linked else Rule.PLANNED_STUDY
            return None
        if Code.ACCESSION_AGREES in codes and knows and (name or birth_date):
            return Rule.ACCESSION_AND_PATIENT
        return None

    def _without_order(self) -> Match:
        """Nothing names an order: is the patient certain? The order may come later."""
        if not self.numbered:
            known = any(each.score >= LEAST_SCORE for each in [*self.orders, *self.patients])
            if known:
                return self._answer(Verdict.PROPOSED, frozenset({Code.TOO_LITTLE}))
            return self._answer(Verdict.UNMATCHED, frozenset({Code.NO_CANDIDATE}))
        if doubts := self._doubts(self.numbered):
            return self._answer(Verdict.PROPOSED, doubts)
        (one,) = self.numbered
        if self.study.owner and one.name_is_enough():
            return self._certain(one, Rule.LINKED_STUDY)
        if not (one.codes & _FULL_NAME and Code.BIRTH_DATE_AGREES in one.codes):
            return self._answer(Verdict.PROPOSED, frozenset({Code.TOO_LITTLE}))
        if self._has_namesake(one.patient):
            return self._answer(Verdict.PROPOSED, frozenset({Code.NAMESAKE}))
        return self._certain(one, Rule.PATIENT)

    def _has_namesake(self, patient: PatientCandidate) -> bool:
        """Then one mistyped number is all that stands between two patients."""
        return any(
            each.patient.id != patient.id
            and each.codes & (_FULL_NAME | _NAME_SAYS_LESS)
            and Code.BIRTH_DATE_AGREES in each.codes
            for each in self.patients
        )

    # --------------------------------------------------------------------------- answers

    def _certain(self, one: Weighed, rule: Rule) -> Match:
        shown = one.proposal()
        return Match(
            verdict=Verdict.CERTAIN,
            patient_id=one.patient.id,
            order_id=one.order.id if one.order else None,
            rule=rule,
            because=shown.speaks_for,
            candidates=self._proposals(),
        )

    def _answer(self, verdict: Verdict, because: frozenset[Code]) -> Match:
        proposals = self._proposals(all_named=verdict is Verdict.CONFLICTING)
        if verdict is Verdict.PROPOSED and not proposals:
            verdict = Verdict.UNMATCHED
        said = {f.code: f for p in proposals[:1] for f in (*p.speaks_for, *p.speaks_against)}
        found = [said.get(code) or _plainly(code) for code in sorted(because)]
        return Match(verdict=verdict, because=tuple(found), candidates=proposals)

    def _proposals(self, *, all_named: bool = False) -> tuple[Proposal, ...]:
        """The best; of a conflict all whom an identifier names, however little speaks for them."""
        named = _BY_STUDY | _BY_ACCESSION | _NUMBERED if all_named else frozenset()
        shown = [
            each
            for each in (*self.orders, *self.patients)
            if each.score >= LEAST_SCORE or each.codes & named
        ]
        shown.sort(key=lambda each: each.key)
        proposals = [each.proposal() for each in shown]
        # Each patient's best stays, whoever else has many orders: a restricted one's hides the row.
        best: dict[UUID, Proposal] = {}
        for each in proposals:
            best.setdefault(each.patient_id, each)
        kept = {id(each) for each in best.values()} | set(map(id, proposals[:MOST_PROPOSALS]))
        return tuple(each for each in proposals if id(each) in kept)


def _plainly(code: Code) -> Finding:
    return Finding(code, MEANING[code].words.replace(" {theirs}", "").replace(" {ours}", ""))
