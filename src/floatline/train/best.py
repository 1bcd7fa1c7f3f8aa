"""Which checkpoint is the best so far, by the recipe's metric on the validation split."""

from __future__ import annotations

import math
from typing import Any

from floatline.train.evaluate import Evaluation


class Best:
    """The best evaluation so far.

    Args:
        metric: "loss", the lower the better, or "accuracy", where equal ones are told apart by their loss.
        kept: What `kept` was, of a checkpoint.

    Attributes:
        kept: Plain numbers for a checkpoint; None before the first evaluation that counts.
    """

    def __init__(self, metric: str, kept: dict[str, Any] | None = None) -> None:
        self.kept = kept
        self._metric = metric

    @property
    def step(self) -> int | None:
        """The update after which it was."""
        return int(self.kept["best_step"]) if self.kept is not None else None

    def note(self, evaluation: Evaluation, done: int) -> bool:
        """Take note of an evaluation after `done` updates; say whether it is the best. A NaN never is."""
        value = evaluation.accuracy if self._metric == "accuracy" else evaluation.loss
        if value is None or not math.isfinite(value):
            return False
        rank = [value if self._metric == "accuracy" else -value, -evaluation.loss]
        if self.kept is not None and rank <= self.kept["rank"]:
            return False
        self.kept = {"best_step": done, "metric": self._metric, "value": value, "rank": rank}
        return True

    def record(self) -> dict[str, Any] | None:
        """Return what the result says of it."""
        return {key: value for key, value in self.kept.items() if key != "rank"} if self.kept is not None else None
