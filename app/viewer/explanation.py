"""An explanation: the checks before images are shown, and what came of each."""

from dataclasses import dataclass, field
from enum import StrEnum
from uuid import UUID

from app.access import Subject
from app.viewer import words


class Check(StrEnum):
    """What has to hold before images are shown, in the order in which it is checked."""

    ROLE = "role"
    RELATIONSHIP = "relationship"
    RESTRICTION = "restriction"
    ORDER = "order"
    IMAGES = "images"
    ARCHIVE = "archive"
    ONE_PATIENT = "one-patient"
    SESSION = "session"


class State(StrEnum):
    PASSED = "passed"
    FAILED = "failed"
    NOT_CHECKED = "not-checked"


@dataclass(frozen=True)
class Step:
    """One check and what came of it. `sentence` is empty where it was not made."""

    check: Check
    state: State
    sentence: str = ""


@dataclass
class Explanation:
    """The chain, up to what fails first; what is said of it, and what to do next.

    `breakable`: the caller's role may break the glass, and that might help. `patient_id` and
    `purpose_of_use` are for the record, not for the caller.
    """

    subject: Subject
    steps: list[Step] = field(default_factory=list)
    next_step: str = words.OPEN_AGAIN
    breakable: bool = False
    patient_id: UUID | None = None
    purpose_of_use: str = ""

    @property
    def failed(self) -> Step | None:
        return next((each for each in self.steps if each.state is State.FAILED), None)

    @property
    def can_open(self) -> bool:
        """Would a new viewer open? An old one that has ended is in nobody's way."""
        return self.failed is None or self.failed.check is Check.SESSION

    @property
    def chain(self) -> list[Step]:
        """Every check, those that were not made too."""
        made = {each.check: each for each in self.steps}
        of_order = self.subject is Subject.ORDER
        return [
            made.get(check, Step(check, State.NOT_CHECKED))
            for check in Check
            if check is not Check.ORDER or of_order
        ]

    def passed(self, check: Check, sentence: str) -> None:
        self.steps.append(Step(check, State.PASSED, sentence))

    def fails(self, check: Check, sentence: str, next_step: str) -> "Explanation":
        self.steps.append(Step(check, State.FAILED, sentence))
        self.next_step = next_step
        return self
