"""Tells what an audit is doing: each forward pass is counted by what it is for, and told before it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from floatline.audit.subject import Passes

Progress = Callable[[str, int], None]
"""What is done next, and how many forward passes were run."""
WORDS = {
    "checks": "two runs alike",
    "exact": "the step in fp64",
    "joint": "the step under one policy",
    "metered": "every op against fp64",
    "probes": "one module lowered alone",
    "noise": "stochastic rounding",
    "updates": "gradients for the optimizer",
    "fp8": "linear layers in fp8",
}
"""Purpose of a pass -> what a user reads."""


@dataclass(kw_only=True)
class ToldPasses(Passes):
    """Counts forward passes, and tells of each.

    Attributes:
        progress: Called with what is done, and how many were run.
    """

    progress: Progress

    def add(self, what: str) -> None:
        self.progress(WORDS.get(what, what), self.total)
        super().add(what)
