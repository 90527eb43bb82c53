"""What the matcher makes of the cases, kind by kind."""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from app.matching import Match, Verdict, match
from tests.adversarial import mixed, numbers, ordinary, relatives, stations  # noqa: F401, they register
from tests.adversarial.case import KINDS, Case, Make
from tests.adversarial.people import Maker

COMMON = {
    "all from the worklist": 700,
    "from the worklist, no issuers said": 120,
    "name written in another way": 40,
    "other modality that can answer the order": 20,
    "sex unknown or other on one side": 10,
    "garbage around the values": 10,
    "StudyInstanceUID of its own, accession and PatientID": 30,
    "no order, number, name and birth date agree": 15,
    "more images of a fulfilled order's study": 15,
    "name misspelled": 5,
    "accession mistyped, hits nobody": 5,
    "PatientID mistyped, hits nobody": 5,
    "order cancelled": 3,
    "images of two orders in one study": 8,
    "brought from elsewhere: another issuer's number, our patient's name": 8,
    "A's entry taken, name put right by hand": 3,
    "twins: one's identifiers, the other's name": 1,
    "name and birth date alone": 2,
}
"""How often each happens where modalities have a worklist; an assumption, of 1000."""


@dataclass
class Row:
    """What became of the cases of one kind."""

    counts: Counter[str] = field(default_factory=Counter)
    first: int = 0  # of those not linked: the truth is the first proposal
    findable: int = 0  # of those not linked: there is a truth to be found

    @property
    def cases(self) -> int:
        return self.counts.total()

    def add(self, case: Case, found: Match) -> None:
        became = case.judge(found)
        self.counts[became] += 1
        if found.verdict is not Verdict.CERTAIN and case.patient:
            self.findable += 1
            self.first += case.ranked_first(found)

    def __iadd__(self, other: "Row") -> "Row":
        self.counts += other.counts
        self.first += other.first
        self.findable += other.findable
        return self


def cases(kinds: dict[str, Make], each: int, seed: int) -> Iterator[tuple[str, Case]]:
    """`each` cases of each kind, among patients and orders that have nothing to do with it."""
    for words, make in kinds.items():
        for n in range(each):
            yield words, one_case(make, f"{seed} {words} {n}")


def one_case(make: Make, seed: str) -> Case:
    maker = Maker(random.Random(seed))
    case = make(maker)
    noise = tuple(maker.order(maker.patient()) for _ in range(maker.random.randrange(12)))
    return replace(case, orders=case.orders + noise)


def decide(case: Case) -> Match:
    return match(case.study, case.orders, case.patients, authority=case.authority)


def tally(kinds: dict[str, Make], each: int, seed: int = 1) -> dict[str, Row]:
    rows = {words: Row() for words in kinds}
    for words, case in cases(kinds, each, seed):
        rows[words].add(case, decide(case))
    return rows


def common_day(studies: int, seed: int = 1) -> Row:
    """Studies as they come."""
    chosen = random.Random(f"common {seed}").choices([*COMMON], [*COMMON.values()], k=studies)
    row = Row()
    for n, words in enumerate(chosen):
        case = one_case(KINDS[words], f"common {seed} {n}")
        row.add(case, decide(case))
    return row


def line(words: str, row: Row) -> str:
    became = ("order", "patient", "proposed", "conflicting", "unmatched", "wrong")
    counts = " | ".join(str(row.counts[each] or "") for each in became)
    first = f"{100 * row.first / row.findable:.0f} %" if row.findable else ""
    return f"| {words} | {row.cases} | {counts} | {first} |"


HEAD = (
    "| kind of case | cases | certain, order | certain, patient | proposed | conflicting "
    "| unmatched | wrong | truth first |\n|---|---|---|---|---|---|---|---|---|"
)
