"""Go back to the last snapshot after a fault: how often, and when to stop instead."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from floatline.errors import FloatlineWarning, NonFiniteError
from floatline.step.guard import Guard
from floatline.step.sentinel import Sentinel
from floatline.step.snapshot import Snapshot, Stateful
from floatline.step.verdict import Skip

NOBODY_HEALS = (
    "guard.on_fault is heal, but nobody diagnoses here (floatline train does, on one rank): it only goes back"
)


class Rollback:
    """Takes snapshots and goes back to them.

    Args:
        guard: How often, and how many times.
        model: The model of the step.
        step: The step.
        any_rank: (flag) -> whether it is set on any rank, so that all of them take a snapshot or none.

    Attributes:
        extras: Name -> what is put back as well: an EMA, a data loader. Fill it before the first update.
        total: How often it went back in all.
    """

    def __init__(
        self, guard: Guard, model: nn.Module, step: Stateful, any_rank: Callable[[bool], bool] = lambda flag: flag
    ) -> None:
        self.extras: dict[str, Stateful] = {}
        self.total = 0
        self._guard = guard
        self._model = model
        self._step = step
        self._any_rank = any_rank
        self._snapshot: Snapshot | None = None
        self._times = 0

    def begin(self) -> None:
        """Take the first snapshot, before the first update. Data that were drawn already do not come again."""
        if self._guard.goes_back and self._snapshot is None:
            self._take()

    def due(self, updates: int) -> bool:
        """Say whether a snapshot is taken after so many updates."""
        return self._guard.goes_back and updates % self._guard.snapshot_every == 0

    def after_update(self, updates: int) -> None:
        """Take a snapshot where one is due: the update is made, and its batch used up."""
        if self.due(updates):
            self._take()

    def at_checkpoint(self) -> None:
        """Take a snapshot where a checkpoint was written: going back to before it would make it one of updates that
        have never been, and a run that is killed goes on from it."""
        if self._guard.goes_back:
            self._take()

    def _take(self) -> None:
        """Snapshots that are not finite do not count."""
        fresh = Snapshot(self._model, self._step, self.extras)
        if not self._any_rank(not fresh.is_finite()):
            self._snapshot, self._times = fresh, 0

    def answer(self, skip: Skip | None, sentinel: Sentinel) -> int | None:
        """Go back if a verdict asks for it; returns the number of updates that were made then, None if it does not.

        Args:
            skip: The verdict, None where nothing was wrong.
            sentinel: What it has counted stays counted. An update after the fault, whose verdict is on its way, has
                never been.

        Raises:
            NonFiniteError: As `go_back`.
        """
        if skip is None or not skip.fault or skip.made or not self._guard.goes_back:
            return None
        if self._guard.on_fault == "heal" and sentinel.on_fault is None and not self.total:
            warnings.warn(f"{skip.reason}; {NOBODY_HEALS}", FloatlineWarning, stacklevel=2)
        counted = sentinel.counts()
        back = self.go_back(skip)
        sentinel.load_state_dict(counted)
        sentinel.skips[-1] = replace(skip, rolled_back_to=back)
        return back

    def go_back(self, skip: Skip) -> int:
        """Put the last snapshot back; returns the number of updates that were made then.

        Raises:
            NonFiniteError: There is none, or it was gone back to too often.
        """
        if self._snapshot is None:
            raise NonFiniteError(
                f"no finite snapshot to go back to: {skip.reason}",
                hint="the weights were not finite when the run began; load others",
            )
        self._times += 1
        self.total += 1
        if self._times > self._guard.max_rollbacks:
            raise NonFiniteError(
                f"stopped after going back {self._guard.max_rollbacks} times to update {self._snapshot.updates}: "
                f"{skip.reason}",
                hint="diagnose the step (fl.diagnose), or raise guard.max_rollbacks",
            )
        snapshot, total = self._snapshot, self.total
        snapshot.restore(self._model, self._step, self.extras)
        self._snapshot, self.total = snapshot, total  # it loads the step, which forgets both
        return snapshot.updates

    def state_dict(self) -> dict[str, Any]:
        """Return how often it went back, for a checkpoint."""
        return {"total": self.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; a snapshot that was taken before is not gone back to."""
        self.total = state["total"]
        self._snapshot = None  # of another time
