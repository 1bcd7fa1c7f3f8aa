"""What one lower format does to a step, as candidate.py finds it out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from floatline.audit.judging import Judged
from floatline.audit.metered import Borders
from floatline.audit.search import Found
from floatline.audit.tolerance import Effect
from floatline.audit.trials import Trial
from floatline.observe.error import Reading


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """What one format does to the step, and the policy that is safe with it.

    Attributes:
        name: "bf16" or "fp16".
        base: The policy without rules.
        all_lowered: Its effect.
        raising: Module -> what it raises in the format, and where; kept in fp32 in all else that is said.
        judged: Every op with its judgement.
        gradient_errors: Parameter -> relative error of its gradient with everything lowered.
        stalled_buffers: Running average -> share of it that stands still.
        unmeasured: Ops without an exact result.
        borders: What was seen at the borders of modules.
        on_cuda: The step ran on a GPU.
        flagged: Modules with an op that fails by itself.
        islands: Modules that are kept in fp32; None where nothing helps.
        lowered_again: Modules inside of islands that are not.
        policy: The string of all that; None where nothing helps.
        effect: Of that string.
        found: The search; None where none was needed.
        trials: Effects of all policies that were tried jointly, in order.
        costs: Module -> its share of FLOPs.
        reason: Why these.
    """

    name: str
    base: str
    all_lowered: Effect
    raising: Mapping[str, str]
    judged: tuple[tuple[Reading, Judged], ...]
    gradient_errors: Mapping[str, float]
    stalled_buffers: Mapping[str, float]
    unmeasured: Mapping[str, int]
    borders: Borders
    on_cuda: bool
    flagged: frozenset[str]
    islands: frozenset[str] | None
    lowered_again: frozenset[str]
    policy: str | None
    effect: Effect | None
    found: Found | None
    trials: tuple[Effect, ...]
    costs: dict[str, float]
    reason: str

    def front(self) -> tuple[Trial, ...]:
        """Return the trials that no other one beats in cost and error, by ascending cost."""
        trials = sorted(self.found.trials if self.found is not None else (), key=lambda t: (t.cost, t.outcome.error))
        best: list[Trial] = []
        for trial in trials:
            if not best or trial.outcome.error < best[-1].outcome.error:
                best.append(trial)
        return tuple(best)
