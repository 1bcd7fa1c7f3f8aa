"""A run's gradients over time in bounded memory, however long the run.

Points. Each kept point covers a stretch of updates: one at first, and twice as many each time the room is used up, when
neighbours are merged. Merging takes the largest of the maxima, means of means, and sums of counts, so a spike and every
non-finite update survive it; only where exactly in its stretch it happened is lost.

Rows. Norms by layer or parameter at an interval, thinned the same way: two neighbours become one row of the larger
norms, in which a NaN stays NaN. The interval doubles with it.

Values of non-finite updates do not enter maxima and means of a stretch that has finite ones; they are counted.

Not covered: exact values of single updates long ago (metrics.jsonl of a run has them).
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

ABSENT = -1.0
"""In a row of norms: this parameter or layer had no gradient."""
MAX_CELLS = 250_000
"""Numbers that all rows together may hold: 1 MB."""
_FP32_MAX = 3.4028234e38


@dataclass(slots=True)
class Point:
    """What a stretch of updates was like.

    Attributes:
        step: The first update of the stretch.
        updates: How many it covers.
        norm: Total 2-norm, mean over the finite updates.
        top_norm: Largest total 2-norm.
        looked: Finite updates whose elements were looked at, for the next two.
        largest: Largest magnitude of any element; NaN where nobody looked.
        mean: Mean magnitude of the elements, mean over the updates; likewise.
        bad_updates: Updates with NaN or Inf in a gradient.
        bad_parameters: Parameters with NaN or Inf, summed over the updates.
        bad_elements: Non-finite elements likewise; at least one a bad parameter where they were not counted.
    """

    step: int
    updates: int
    norm: float
    top_norm: float
    looked: int = 0
    largest: float = math.nan
    mean: float = math.nan
    bad_updates: int = 0
    bad_parameters: int = 0
    bad_elements: int = 0

    def merge(self, other: Point) -> None:
        """Take in the stretch that follows."""
        fine, its_fine = self.updates - self.bad_updates, other.updates - other.bad_updates
        self.norm, self.top_norm = _merged((self.norm, self.top_norm, fine), (other.norm, other.top_norm, its_fine))
        self.mean, self.largest = _merged(
            (self.mean, self.largest, self.looked), (other.mean, other.largest, other.looked)
        )
        self.updates += other.updates
        self.looked += other.looked
        self.bad_updates += other.bad_updates
        self.bad_parameters += other.bad_parameters
        self.bad_elements += other.bad_elements


def _merged(one: tuple[float, float, int], other: tuple[float, float, int]) -> tuple[float, float]:
    """Return mean and largest of two stretches, each given as (mean, largest, updates); one of none counts not."""
    (mean, top, weight), (its_mean, its_top, its_weight) = one, other
    if not weight or not its_weight:
        return (its_mean, its_top) if its_weight else (mean, top)
    return (mean * weight + its_mean * its_weight) / (weight + its_weight), max(top, its_top)


class Points:
    """At most `room` points over the whole run.

    Args:
        room: An even number of at least 2.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self.stretch = 1
        self.kept: list[Point] = []

    def add(self, point: Point) -> None:
        """Take the point of one more update."""
        if self.kept and self.kept[-1].updates < self.stretch:
            self.kept[-1].merge(point)
            return
        if len(self.kept) == self.room:
            for first, second in zip(self.kept[::2], self.kept[1::2], strict=True):
                first.merge(second)
            del self.kept[1::2]
            self.stretch *= 2
        self.kept.append(point)

    def state_dict(self) -> dict[str, Any]:
        return {"stretch": self.stretch, "kept": [asdict(point) for point in self.kept]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.stretch = state["stretch"]
        self.kept = [Point(**point) for point in state["kept"]]
        while len(self.kept) > self.room:  # it was recorded with more room
            kept, self.kept, self.stretch = self.kept, [], self.stretch * 2
            for point in kept:
                self.add(point)


class Rows:
    """Norms of named layers or parameters at some updates, at most `room` rows over the whole run.

    Args:
        room: Rows, fewer where there are very many names; an even number of at least 2.
        every: Updates between rows, until they are thinned.
    """

    def __init__(self, room: int, every: int) -> None:
        self.room = room
        self.every = every
        self.names: list[str] = []
        self.steps: list[int] = []
        self.kept: list[array[float]] = []
        self._place: dict[str, int] = {}

    def due(self, step: int) -> bool:
        """Say whether update `step` (the first is 1) is one to keep."""
        return not self.steps or step >= self.steps[-1] + self.every

    def add(self, step: int, norms: Mapping[str, float]) -> None:
        """Keep the norms of update `step`; between two that are due they are merged into the last row."""
        for name in norms:
            if name not in self._place:
                self._place[name] = len(self.names)
                self.names.append(name)
        row = array("f", [ABSENT]) * len(self.names)
        for name, norm in norms.items():
            row[self._place[name]] = math.inf if norm > _FP32_MAX else norm
        if not self.due(step):
            self.kept[-1] = _larger(self.kept[-1], row)
            return
        while len(self.kept) >= max(2, min(self.room, MAX_CELLS // len(self.names)) // 2 * 2):
            self._thin()
        self.steps.append(step)
        self.kept.append(row)

    def _thin(self) -> None:
        ends = [*self.kept, array("f")] if len(self.kept) % 2 else self.kept
        self.kept = [_larger(first, second) for first, second in zip(ends[::2], ends[1::2], strict=True)]
        self.steps = self.steps[::2]
        self.every *= 2

    def table(self) -> list[list[float]]:
        """Return the rows, all as long as `names`."""
        return [[*row, *[ABSENT] * (len(self.names) - len(row))] for row in self.kept]

    def state_dict(self) -> dict[str, Any]:
        table = [[_short(value) for value in row] for row in self.table()]
        return {"every": self.every, "names": list(self.names), "steps": list(self.steps), "norms": table}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.every = state["every"]
        self.names = list(state["names"])
        self._place = {name: place for place, name in enumerate(self.names)}
        self.steps = list(state["steps"])
        self.kept = [array("f", row) for row in state["norms"]]


def _short(value: float) -> float:
    """Return a value with the digits that fp32 has, so that it reads well in a file."""
    return float(f"{value:.7g}")


def _larger(one: Sequence[float], other: Sequence[float]) -> array[float]:
    """Return the larger of two rows place by place, NaN where one of them is; the shorter one lacks its end."""
    if len(one) < len(other):
        one, other = other, one
    rest = one[len(other) :]
    return array("f", [a if a >= b or math.isnan(a) else b for a, b in zip(one, other)]) + array("f", rest)
