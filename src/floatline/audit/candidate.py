"""Audit one lower format: read every op, search for the islands, try the policy jointly.

1. The step with everything lowered, against fp64: its effect, and a meter on all ops.
2. Ops that fail by themselves make their modules islands: what this host's kernels hide (a running sum that they keep
   in fp32) or this batch forgives is no reason to trust it.
3. If the step is not within the tolerance then, the search looks for the cheapest islands that bring it there. Each
   trial is the real step under the real policy.
4. Islands that have children are hollowed out: what is inside of them and did not fail goes back to the lower format,
   if the step stays within the tolerance.
5. The names become patterns; each policy is run as its string says, once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from floatline.audit.exact import Exact
from floatline.audit.judging import Judged, explained, judge
from floatline.audit.metered import Borders, Metered
from floatline.audit.modules import around_of, callable_modules, candidates, cost_shares, with_ties
from floatline.audit.patterns import shortest_patterns
from floatline.audit.search import Found, search
from floatline.audit.subject import Subject
from floatline.audit.tolerance import Effect, Tolerance
from floatline.audit.trials import Outcome, Trial, inside, merged
from floatline.errors import ConfigError, PrecisionError, did_you_mean
from floatline.observe.error import Reading
from floatline.observe.finite import plain_name
from floatline.precision import Policy

NAMES = {"bf16": ("bf16-mixed", "bf16-true", "bf16"), "fp16": ("16-mixed", "16-true", "16")}
"""Candidate -> its policies in mode mixed and true, and what it is called in a rule."""
MODES = ("mixed", "true")
MOST_SEED = 2**62


def check_candidates(candidates: Any) -> None:
    """Refuse what is no sequence of lower formats.

    Raises:
        ConfigError: A text, nothing, or an unknown name.
    """
    if not isinstance(candidates, (tuple, list)) or not candidates:
        raise ConfigError(f"candidates={candidates!r}", hint='give a tuple: candidates=("bf16",)')
    for name in candidates:
        if name not in tuple(NAMES):
            raise ConfigError(f"unknown candidate {name!r}", hint=did_you_mean(str(name), NAMES))


def check_mode(mode: Any) -> None:
    """Refuse what is neither "mixed" nor "true".

    Raises:
        ConfigError: That.
    """
    if mode not in MODES:
        raise ConfigError(f"unknown mode {mode!r}", hint=did_you_mean(str(mode), MODES))


def check_seed(seed: Any) -> None:
    """Refuse what torch takes no seed of.

    Raises:
        ConfigError: That.
    """
    if type(seed) is not int or not 0 <= seed < MOST_SEED:
        raise ConfigError(f"seed={seed!r}", hint="give a whole number, 0 or more and below 2^62")


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """What one format does to the step, and the policy that is safe with it.

    Attributes:
        name: "bf16" or "fp16".
        base: The policy without rules.
        all_lowered: Its effect.
        judged: Every op with its judgement.
        gradient_errors: Parameter -> relative error of its gradient with everything lowered.
        stalled_buffers: Running average -> share of it that stands still.
        unmeasured: Ops without an exact result.
        borders: What was seen at the borders of modules.
        on_cuda: The step ran on a GPU.
        lowering: What has made this, for further policies.
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
    judged: tuple[tuple[Reading, Judged], ...]
    gradient_errors: Mapping[str, float]
    stalled_buffers: Mapping[str, float]
    unmeasured: Mapping[str, int]
    borders: Borders
    on_cuda: bool
    lowering: Lowering
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


class Lowering:
    """The audit of one format.

    Args:
        subject: What is audited.
        exact: The step in fp64.
        name: "bf16" or "fp16".
        mode: "mixed" or "true".
        tolerance: What is allowed.
        most_trials: Joint evaluations at most.
    """

    def __init__(
        self, subject: Subject, exact: Exact, name: str, mode: str, tolerance: Tolerance, most_trials: int | None
    ) -> None:
        self.subject = subject
        self.exact = exact
        self.name = name
        self.base = NAMES[name][mode == "true"]
        self.tolerance = tolerance
        self._most = most_trials
        self._scale: float | None = None
        self._known: dict[str, Effect] = {}

    def run(self) -> Lowered:
        """Do it."""
        everything = self.effect(())
        self._scale = everything.scale if everything.finite else None
        metered, judged = self._read(everything.scale)
        if not everything.finite and (scale := self._scale_with_islands(judged, everything.scale)) != everything.scale:
            metered, judged = self._read(scale)
        costs = dict(cost_shares(self.subject.model, judged))
        known = callable_modules(self.subject.model)
        flagged = frozenset(r.spot.module for r, j in judged if j.failure is not None)
        flagged |= {name.rpartition(".")[0] for name in metered.stalled_buffers}
        flagged &= known.keys()
        fixed = merged(flagged)
        islands, found, reason = self._search(judged, fixed, everything)
        again, policy, effect = frozenset[str](), None, None
        if islands is not None:
            if self.base.endswith("-true"):
                islands = with_ties(self.subject.model, islands)
            judged = explained(judged, islands, everything.ratio(self.tolerance))
            again = self._hollowed(islands, flagged, judged)
            policy, effect = str(self.policy(islands, again)), self.effect(islands, again)
        return Lowered(
            name=self.name,
            base=self.base,
            all_lowered=everything,
            judged=judged,
            gradient_errors=metered.gradient_errors,
            stalled_buffers=metered.stalled_buffers,
            unmeasured=metered.unmeasured,
            borders=metered.borders,
            on_cuda=self.subject.device.type == "cuda",
            lowering=self,
            flagged=flagged,
            islands=islands,
            lowered_again=again,
            policy=policy,
            effect=effect,
            found=found,
            trials=tuple(self._known.values()),
            costs=costs,
            reason=reason,
        )

    def _read(self, scale: float) -> tuple[Metered, tuple[tuple[Reading, Judged], ...]]:
        metered = self.subject.read(Policy.parse(self.base), scale)
        return metered, tuple((reading, judge(reading)) for reading in metered.readings)

    def _scale_with_islands(self, judged: Sequence[tuple[Reading, Judged]], scale: float) -> float:
        """Return the loss scale that a scaler would come to once the forward is finite; the given one if it never is.

        Until then the scale has not been tried out, and gradients may overflow that will not in training. Islands are
        what fails in the forward, then the modules around that, last all.
        """
        known = callable_modules(self.subject.model)
        islands = {r.spot.module for r, j in judged if j.failure is not None and r.phase == "forward"} & known.keys()
        while True:
            effect = self.effect(merged(islands or known))
            if effect.finite or not islands:
                return effect.scale if effect.finite else scale
            islands = {around for name in islands if (around := around_of(name, known))}

    # The search

    def _search(
        self,
        judged: Sequence[tuple[Reading, Judged]],
        fixed: frozenset[str],
        everything: Effect,
    ) -> tuple[frozenset[str] | None, Found | None, str]:
        if not fixed and everything.ratio(self.tolerance) <= 1:
            return frozenset(), None, f"with everything in {self.name} the step is within the tolerance"
        items = candidates(self.subject.model, judged, fixed, around=self.base.endswith("-true"))

        def evaluate(islands: frozenset[str]) -> Outcome:
            ratio = self.effect(fixed | islands).ratio(self.tolerance)
            return Outcome(passes=ratio <= 1, error=ratio)

        found = search(items, evaluate, most_trials=self._most)
        if found.islands is None:
            return None, found, "not even with all of its modules in fp32 is the step within the tolerance"
        islands = merged(fixed | found.islands)
        by_itself = f"{len(fixed)} fail by themselves" if fixed else "none fails by itself"
        return islands, found, f"{by_itself}; {found.reason}"

    def _hollowed(
        self, islands: frozenset[str], flagged: frozenset[str], judged: Sequence[tuple[Reading, Judged]]
    ) -> frozenset[str]:
        """Return modules inside of islands that may be lowered again."""
        seen = {reading.spot.module for reading, _ in judged}
        inner = [
            name
            for name in callable_modules(self.subject.model)
            if name in seen
            and inside(name, islands, strictly=True)
            and not any(inside(failing, {name}) for failing in flagged)
        ]
        if self.base.endswith("-true"):  # a weight that others use as well stays in one format
            inner = [name for name in inner if with_ties(self.subject.model, [name]) == {name}]
        again = merged(inner)
        if not again:
            return again
        effect = self.effect(islands, again)
        return again if effect.ratio(self.tolerance) <= 1 else frozenset()

    # Policies

    def policy(self, islands: Iterable[str], again: Iterable[str] = ()) -> Policy:
        """Return the policy with islands, and with modules inside of them in the lower format again."""
        names = [plain_name(name) for name, _ in self.subject.model.named_modules()]
        low = NAMES[self.name][2]
        chosen = with_ties(self.subject.model, islands) if self.base.endswith("-true") else islands
        rules = [f"{pattern}=32" for pattern in shortest_patterns(frozenset(chosen), names)]
        rules += [f"{pattern}={low}" for pattern in shortest_patterns(frozenset(again), names)]
        return Policy.parse("; ".join([self.base, *rules]))

    def effect(self, islands: Iterable[str], again: Iterable[str] = ()) -> Effect:
        """Return the effect of such a policy, run once; one that the model cannot run under is infinitely off."""
        policy = self.policy(islands, again)
        if str(policy) not in self._known:
            try:
                effect = self.subject.effect(policy, self.exact, scale=self._scale)
            except PrecisionError:  # one weight would have two formats
                if not policy.rules:
                    raise
                effect = Effect(policy=str(policy), loss_error=math.inf)
            self._known[str(policy)] = effect
        return self._known[str(policy)]
