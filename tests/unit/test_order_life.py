"""The life of an order: the table itself, and an order driven by random events."""

import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from hypothesis.strategies import sampled_from

from app.errors import Conflict
from app.models import OrderStatus
from app.orderlife import BY_EHR, BY_IMAGES, LIFE, OrderEvent, Stand, after, allowed, event_of

S, P, A, V, C, X = (
    OrderStatus.SCHEDULED,
    OrderStatus.IN_PROGRESS,
    OrderStatus.ARRIVING,
    OrderStatus.AVAILABLE,
    OrderStatus.COMPLETED,
    OrderStatus.CANCELLED,
)

# Written from docs/orders.md, not from the table: what each status becomes; - is a refusal, the
# EHR's last word is "said".
TABLE = """
            scheduled in-progress completed cancelled images-arriving images-complete images-gone
scheduled   scheduled in-progress completed cancelled arriving        available       scheduled
in-progress scheduled in-progress completed cancelled arriving        available       in-progress
arriving    -         arriving    completed cancelled arriving        available       said
available   scheduled in-progress completed cancelled available       available       said
completed   scheduled in-progress completed cancelled completed       completed       completed
cancelled   -         -           -         cancelled cancelled       cancelled       cancelled
"""


def rows() -> list[tuple[OrderStatus, OrderEvent, str]]:
    head, *body = (line.split() for line in TABLE.strip().splitlines())
    return [
        (OrderStatus(status), OrderEvent(event), cell)
        for status, *cells in body
        for event, cell in zip(head, cells, strict=True)
    ]


@pytest.mark.parametrize(("status", "event", "becomes"), rows())
def test_each_event_in_each_state(status: OrderStatus, event: OrderEvent, becomes: str) -> None:
    for said in (S, P):
        stand = Stand(status, status if status in (S, P, C, X) else said)
        if becomes == "-":
            with pytest.raises(Conflict) as refused:
                after(stand, event)
            assert refused.value.extra["allowed"] == allowed(status)
            assert event.value not in allowed(status)
            continue
        found = after(stand, event)
        assert found.status == (stand.said if becomes == "said" else OrderStatus(becomes))
        assert found.said == (event.value if event in BY_EHR else stand.said)


def test_every_state_and_event_is_in_the_table() -> None:
    assert {(status, event) for status, event, _ in rows()} == {
        (status, event) for status in OrderStatus for event in OrderEvent
    }


@pytest.mark.parametrize("event", BY_IMAGES)
def test_what_arrives_is_never_refused(event: OrderEvent) -> None:
    assert all(event in LIFE[status] for status in OrderStatus)


@pytest.mark.parametrize("status", OrderStatus)
@pytest.mark.parametrize("wanted", [A, V])
def test_the_ehr_can_only_repeat_what_images_brought_about(
    status: OrderStatus, wanted: OrderStatus
) -> None:
    stand = Stand(status)
    if wanted is status:
        assert event_of(stand, wanted) is None
        return
    with pytest.raises(Conflict):
        event_of(stand, wanted)


class AnOrder(RuleBasedStateMachine):
    """An order among studies that come, grow, become stable and go, and an EHR that says things.
    The model knows the images; the order has to agree with them."""

    def __init__(self) -> None:
        super().__init__()
        self.stand = Stand()
        self.stable: list[bool] = []  # of each linked study
        self.complete = False  # since they last had to come
        self.wants_more = False

    def _images(self) -> None:
        if not self.stable:
            event, self.complete = OrderEvent.IMAGES_GONE, False
        elif all(self.stable):
            event, self.complete = OrderEvent.IMAGES_COMPLETE, True
        else:
            event = OrderEvent.IMAGES_ARRIVING
        self.wants_more = False
        self.stand = after(self.stand, event)

    @rule(wanted=sampled_from(OrderStatus))
    def the_ehr_says(self, wanted: OrderStatus) -> None:
        before = self.stand
        try:
            event = event_of(before, wanted)
            self.stand = before if event is None else after(before, event)
        except Conflict:
            assert self.stand == before
            return
        finally:
            refused = wanted in (A, V) or OrderEvent(wanted.value) not in LIFE[before.status]
            assert refused <= (self.stand == before)
        if self.stand.status is not before.status and self.stand.status in (S, P):
            self.wants_more, self.complete = bool(self.stable), False

    @rule()
    def a_study_is_linked(self) -> None:
        self.stable.append(False)
        self._images()

    @rule()
    def a_study_is_stable(self) -> None:
        if self.stable:
            self.stable = [True, *sorted(self.stable[1:])]
            self._images()

    @rule()
    def all_are_stable(self) -> None:
        if self.stable:
            self.stable = [True] * len(self.stable)
            self._images()

    @rule()
    def a_study_grows_again(self) -> None:
        if self.stable:
            self.stable[0] = False
            self._images()

    @rule()
    def a_study_is_unlinked(self) -> None:
        if self.stable:
            self.stable.pop()
            self._images()

    @invariant()
    def available_means_images_that_are_complete(self) -> None:
        open_ = self.stand.said in (S, P) and not self.wants_more
        assert (self.stand.status is V) == (bool(self.stable) and self.complete and open_)

    @invariant()
    def arriving_means_images_that_are_not(self) -> None:
        open_ = self.stand.said in (S, P) and not self.wants_more
        assert (self.stand.status is A) == (bool(self.stable) and not self.complete and open_)

    @invariant()
    def the_ehrs_last_word_is_one_it_can_say(self) -> None:
        assert self.stand.said in (S, P, C, X)
        assert (self.stand.status in (C, X)) == (self.stand.said in (C, X))

    @invariant()
    def nothing_revives_what_was_cancelled(self) -> None:
        if self.stand.status is X:
            assert allowed(X) == ["cancelled"]


TestAnOrder = AnOrder.TestCase
TestAnOrder.settings = settings(max_examples=300, stateful_step_count=30, deadline=None)
