"""Rows of the table, and the pairs they are made of."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from tests.bench.client import NotRun


class Better(Enum):
    """Which way a ratio should go."""

    HIGHER = ">="
    LOWER = "<="


@dataclass(frozen=True)
class Result:
    """A row as it came out."""

    name: str
    title: str
    unit: str
    direct: list[float]
    ours: list[float]
    ratios: list[float]
    better: Better
    target: float
    note: str = ""

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def reached(self) -> bool:
        if self.better is Better.HIGHER:
            return self.ratio >= self.target
        return self.ratio <= self.target


@dataclass(frozen=True)
class Missing:
    """A row that could not be measured."""

    name: str
    title: str
    why: str


@dataclass(frozen=True)
class Row:
    """What is measured: each side returns one value in `unit`.

    `prepare` runs first, `before_direct` and `before_ours` before each measurement of their side,
    all outside of what is timed. `note` is asked for at the end.
    """

    name: str
    title: str
    unit: str
    target: float
    direct: Callable[[], float]
    ours: Callable[[], float]
    better: Better = Better.HIGHER
    prepare: Callable[[], None] = lambda: None
    before_direct: Callable[[], None] = lambda: None
    before_ours: Callable[[], None] = lambda: None
    note: Callable[[], str] = lambda: ""

    def run(self, pairs: int) -> "Result | Missing":
        """Direct, Lightbox, direct, Lightbox ...: a load from elsewhere hits both alike."""
        try:
            self.prepare()
            direct: list[float] = []
            ours: list[float] = []
            for _ in range(pairs):
                self.before_direct()
                direct.append(self.direct())
                self.before_ours()
                ours.append(self.ours())
        except NotRun as error:
            return Missing(self.name, self.title, str(error))
        ratios = [mine / theirs for theirs, mine in zip(direct, ours, strict=True)]
        return Result(
            self.name,
            self.title,
            self.unit,
            direct,
            ours,
            ratios,
            self.better,
            self.target,
            self.note(),
        )


@dataclass(frozen=True)
class Figure:
    """A row with values of our own side only, in `unit`, each of which has its limit."""

    name: str
    title: str
    unit: str
    target: float
    measure: Callable[[], float]
    note: Callable[[], str] = lambda: ""

    def run(self, pairs: int) -> "Result | Missing":
        try:
            values = [self.measure() for _ in range(pairs)]
        except NotRun as error:
            return Missing(self.name, self.title, str(error))
        return Result(
            self.name,
            self.title,
            self.unit,
            [],
            values,
            values,
            Better.LOWER,
            self.target,
            self.note(),
        )


AnyRow = Row | Figure
