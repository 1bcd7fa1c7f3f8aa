"""Audit one lower format: read every op, search for the islands, try the policy jointly.

1. The step with everything lowered, against fp64: its effect, and a meter on all ops.
   A module that raises in the format (no kernel, a constant that it cannot hold) is an island from the start.
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
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from floatline.audit.exact import Exact
from floatline.audit.judging import Judged, explained, harmless, judge
from floatline.audit.lowered import Lowered
from floatline.audit.metered import Metered
from floatline.audit.modules import callable_modules, candidates, cost_shares, module_of_error, with_ties
from floatline.audit.patterns import shortest_patterns
from floatline.audit.search import Found, search
from floatline.audit.settings import NAMES
from floatline.audit.subject import Subject
from floatline.audit.tolerance import Effect, Tolerance
from floatline.audit.trials import Outcome, inside, merged
from floatline.audit.user_code import UserCodeError
from floatline.errors import PrecisionError
from floatline.observe.error import Reading
from floatline.observe.finite import plain_name
from floatline.observe.finite.places import place_of_error
from floatline.precision import Policy

LARGEST_SCALE = 2.0**15
"""The largest loss scale that reaches a loss in fp16: 2^16, where scalers start, is infinite there."""


def _whatever_the_scale(reading: Reading) -> bool:
    """Say whether no loss scale mends a failure that an unscaled step has."""
    return reading.phase == "forward" or (reading.measure is not None and bool(reading.measure.overflow))


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
        self._raising: dict[str, str] = {}

    def run(self) -> Lowered:
        """Do it."""
        everything = self._everything()
        self._scale = everything.scale if everything.finite else None
        metered, judged = self._read(everything.scale) if everything.finite else self._read_infinite(everything)
        costs = dict(cost_shares(self.subject.model, judged))
        known = callable_modules(self.subject.model)
        judged = self._without_harmless(judged, known.keys())
        flagged = _failing(judged) | self._raising.keys()
        averaging = {name.rpartition(".")[0] for name in metered.stalled_buffers}
        flagged = (flagged | averaging) & known.keys()
        fixed = merged(flagged)
        islands, found, reason = self._search(judged, fixed, everything)
        again, policy, effect = frozenset[str](), None, None
        if islands is not None:
            if self.base.endswith("-true"):
                islands = with_ties(self.subject.model, islands)
            known_reasons = averaging | self._raising.keys()
            needed = [name for name in islands if not any(inside(owner, {name}) for owner in known_reasons)]
            judged = explained(judged, needed, self.effect(()).ratio(self.tolerance))
            again = self._hollowed(islands, flagged, judged)
            policy, effect = str(self.policy(islands, again)), self.effect(islands, again)
        return Lowered(
            name=self.name,
            base=self.base,
            all_lowered=everything,
            raising=self._raising,
            judged=judged,
            gradient_errors=metered.gradient_errors,
            stalled_buffers=metered.stalled_buffers,
            unmeasured=metered.unmeasured,
            borders=metered.borders,
            on_cuda=self.subject.device.type == "cuda",
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

    def _without_harmless(
        self, judged: tuple[tuple[Reading, Judged], ...], known: Collection[str]
    ) -> tuple[tuple[Reading, Judged], ...]:
        """Pardon modules that fail by decisions alone, if fp32 there changes no bit of loss and gradients.

        What else the decisions go into (a counter in a buffer, another output) is not looked at.
        """
        flagged = _failing(judged) & frozenset(known)
        for module in sorted(flagged - _failing((r, j) for r, j in judged if not j.decides)):
            rest = flagged - {module}
            if str(self.policy(merged(flagged))) == str(self.policy(merged(rest))):
                continue  # it is inside of another one, or shares its weight: nothing is seen of it alone
            effects = [replace(self.effect(merged(some)), policy="") for some in (flagged, rest)]
            if effects[0].finite and effects[0] == effects[1]:
                judged = tuple((r, harmless(j) if r.spot.module == module and j.decides else j) for r, j in judged)
                flagged = rest
        return judged

    def _everything(self) -> Effect:
        """Run with everything lowered; modules that raise then are in fp32 from here on."""
        while True:
            try:
                effect = self.subject.tried(self.policy(()), self.exact)
            except UserCodeError as error:
                self._keep_high(error)
                continue
            self._known[str(self.policy(()))] = effect
            return Effect(policy=self.base, loss_error=math.inf, scale=effect.scale) if self._raising else effect

    def _keep_high(self, error: UserCodeError) -> None:
        """Note the module that has raised.

        Raises:
            UserCodeError: Tensors of two formats meet, or no module can be blamed: a rule helps neither.
        """
        cause = error.__cause__ or error
        said = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        module = module_of_error(cause, callable_modules(self.subject.model))
        if module is None or module in self._raising or any(word in said for word in ("dtype", "scalar type")):
            raise error
        place = place_of_error(cause)
        self._raising[module] = said + (f" ({place.file}:{place.line})" if place is not None else "")

    def _read_infinite(self, everything: Effect) -> tuple[Metered, tuple[tuple[Reading, Judged], ...]]:
        """Read a step that is not finite, at the loss scale that it would have with the islands that it needs."""
        if not Policy.parse(self.base).base.loss_scaling:
            return self._read(1.0)
        if math.isinf(everything.loss_error) and self.subject.backward:
            _, judged = self._read(1.0, backward=False)  # half the time of all
            effect = self.effect(merged(_failing(judged) & callable_modules(self.subject.model).keys()))
            if effect.finite:
                return self._read(min(effect.scale, LARGEST_SCALE))
        metered, judged = self._read(1.0)
        scale = self._scale_with_islands(judged, everything)
        return (metered, judged) if scale == 1.0 else self._read(scale)

    def _read(self, scale: float, *, backward: bool = True) -> tuple[Metered, tuple[tuple[Reading, Judged], ...]]:
        metered = self.subject.read(self.policy(()), scale, backward=backward)
        idle = self.exact.idle
        return metered, tuple(
            (reading, judge(reading, counts=reading.phase != "backward" or reading.spot.module not in idle))
            for reading in metered.readings
        )

    def _scale_with_islands(self, judged: Sequence[tuple[Reading, Judged]], everything: Effect) -> float:
        """Return the loss scale that a scaler would come to once the step is finite; 1 if it never is.

        Until then the scale has not been tried out, and gradients may overflow that will not in training. Islands are
        what fails in the forward and what overflows in the backward, unscaled; if that is not all, those that the
        search finds; last all modules.
        """
        known = callable_modules(self.subject.model)
        failing = {r.spot.module for r, j in judged if j.failure is not None and _whatever_the_scale(r)} & known.keys()
        islands: frozenset[str] | None = merged(failing)
        if not self.effect(islands or ()).finite:
            islands = self._search(judged, merged(failing), everything)[0]
        effect = self.effect(merged(known) if islands is None else islands)
        return min(effect.scale, LARGEST_SCALE) if effect.finite else 1.0

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
        if self._raising:
            by_itself = f"{', '.join(self._raising)} raises in {self.name}; {by_itself}"
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
        chosen = merged({*islands, *self._raising})
        if self.base.endswith("-true"):
            chosen = with_ties(self.subject.model, chosen)
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


def _failing(judged: Iterable[tuple[Reading, Judged]]) -> frozenset[str]:
    """Return the modules in which an op fails by itself."""
    return frozenset(reading.spot.module for reading, judgement in judged if judgement.failure is not None)
