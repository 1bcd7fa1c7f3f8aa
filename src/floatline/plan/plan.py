"""Plan a run: the fastest combination of techniques that fits a GPU, why not the others, and what would fit.

    plan = fl.plan(work, hardware="t4")
    plan.verdict, plan.precision, plan.techniques, plan.estimate, plan.ladder, plan.rejected, plan.recipe()

What the caller has fixed stays fixed. Every number in a plan comes from running the real step on fake tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from floatline.errors import ConfigError
from floatline.hardware import Hardware, resolve
from floatline.plan.advice import Advice, advise
from floatline.plan.allocator import AllocatorSettings
from floatline.plan.estimate import Estimate
from floatline.plan.export import recipe_of
from floatline.plan.ladder import Rejected, Rung
from floatline.plan.parallel import ALONE, Alone
from floatline.plan.probe import Probe, probe
from floatline.plan.search import climb
from floatline.plan.traces import TraceCache, rank_count
from floatline.plan.trial import Trial
from floatline.precision import Policy
from floatline.precision import resolve as resolve_precision
from floatline.step import Workload
from floatline.techniques import Technique, make_technique
from floatline.techniques.registry import technique_class

Progress = Callable[[str, int], None]
"""(what is tried now, how many trials are done) -> None."""
MANY_LAYERS = 20
"""Layers from which a trial takes a second or so."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How to train a workload on a device.

    Attributes:
        hardware: The device.
        precision: The policy, as its string.
        precision_reason: Why it is the one.
        techniques: Texts of the techniques to use, the fixed ones among them.
        estimate: What the run takes with them; where nothing fits, with everything that saves.
        ladder: Each technique added in turn, with the peak and what it saved.
        rejected: What is not used, and why.
        advice: Where nothing fits: what would.
        probe: Facts about the model.
        trials: How many estimates were made.
        ranks: For how many processes that train together.
    """

    hardware: Hardware
    precision: str
    precision_reason: str
    techniques: tuple[str, ...]
    estimate: Estimate
    ladder: tuple[Rung, ...]
    rejected: tuple[Rejected, ...]
    advice: tuple[Advice, ...]
    probe: Probe
    trials: int
    max_grad_norm: float | None = field(default=1.0, repr=False)
    ranks: int = 1

    @property
    def verdict(self) -> str:
        """ "fits", "tight" or "does not fit"."""
        return self.estimate.verdict

    @property
    def fits(self) -> bool:
        """Whether the run fits with the plan's techniques."""
        return bool(self.estimate.fit)

    @property
    def first_fit(self) -> Rung | None:
        """The lowest rung of the ladder on which the run fits."""
        return next((rung for rung in self.ladder if rung.estimate.fit), None)

    def recipe(self) -> dict[str, Any]:
        """Return the part of a recipe that the plan decides: precision, hardware, techniques."""
        return recipe_of(self)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "hardware": self.hardware.name,
            "model": self.probe.model,
            "parameters": self.probe.parameters,
            "trainable": self.probe.trainable,
            "verdict": self.verdict,
            "precision": self.precision,
            "precision_reason": self.precision_reason,
            "techniques": list(self.techniques),
            "estimate": self.estimate.as_dict(),
            "ladder": [
                {
                    "added": rung.added,
                    "needed": rung.estimate.fit.needed,
                    "peak_total": rung.estimate.peak_total,
                    "saved": rung.saved,
                    "slowdown": rung.slowdown,
                    "verdict": rung.estimate.verdict,
                    "kept": rung.kept,
                }
                for rung in self.ladder
            ],
            "rejected": [{"name": rejected.name, "reason": rejected.reason} for rejected in self.rejected],
            "advice": [vars(piece) for piece in self.advice],
            "recipe": self.recipe(),
            "trials": self.trials,
        }


class Trials:
    """Makes estimates, each combination once, and tells how far it is.

    Args:
        work: What is planned.
        hardware: For which device.
        precision: In which precision.
        settings: Further arguments of `Trial`.
        traces: Traces of the workload.
        progress: Told before each trial.
        helpers: Who makes estimates beside this process.
    """

    def __init__(
        self,
        work: Workload,
        hardware: Hardware,
        precision: str | Policy,
        settings: dict[str, Any],
        traces: TraceCache,
        progress: Progress,
        helpers: Alone = ALONE,
    ) -> None:
        self.work, self.hardware, self.precision = work, hardware, precision
        self.settings, self.traces, self.progress, self.helpers = settings, traces, progress, helpers
        self.known: dict[tuple[str, str, str, int], Estimate] = {}

    def __call__(self, techniques: Sequence[Technique | str]) -> Estimate:
        """Return the estimate with these techniques on the plan's device."""
        return self.ask(self.trial(techniques))

    def foresee(self, *combinations: Sequence[Technique | str]) -> None:
        """Say which techniques may be asked for next, likeliest first; no more than there are helpers."""
        self.helpers.foresee(*map(self.trial, combinations[: self.helpers.count]))

    def trial(
        self,
        techniques: Sequence[Technique | str],
        hardware: Hardware | None = None,
        precision: str | Policy | None = None,
        ranks: int | None = None,
    ) -> Trial:
        """Return the trial of techniques, on the plan's device or another, or on several."""
        hardware, ranks = hardware or self.hardware, ranks or rank_count()
        names = ", ".join(make_technique(technique).name for technique in techniques) or "the plain step"
        return Trial(
            hardware=hardware,
            precision=precision or self.precision,
            techniques=tuple(techniques),
            ranks=ranks,
            told=f"{names} on {ranks if ranks > 1 else ''} {hardware.name}".replace("  ", " "),
            **self.settings,
        )

    def ask(self, trial: Trial) -> Estimate:
        """Return the estimate of a trial."""
        key = (" ".join(sorted(map(str, trial.techniques))), trial.hardware.name, str(trial.precision), trial.ranks)
        if key not in self.known:
            self.progress(trial.told, len(self.known))
            self.known[key] = self.helpers.estimate(trial, lambda: trial.estimate(self.work, self.traces))
        return self.known[key]


def plan(
    work: Workload,
    hardware: str | Hardware = "auto",
    *,
    precision: str | Policy = "auto",
    techniques: Sequence[Technique | str] = (),
    exclude: Sequence[str] = (),
    exact: bool = False,
    max_grad_norm: float | None = 1.0,
    allocator: AllocatorSettings | None = None,
    advice: bool = True,
    traces: TraceCache | None = None,
    progress: Progress = lambda what, done: None,
    helpers: Alone = ALONE,
) -> Plan:
    """Find the fastest combination of techniques with which `work` fits on `hardware`.

    Args:
        work: What is trained; its batch is that of one update.
        hardware: A catalog name, facts about a device, or "auto" for this machine.
        precision: A policy or its string to keep; "auto" takes the best that the hardware can do.
        techniques: Techniques that are in the plan whatever it says.
        exclude: Names of techniques that must not be in it.
        exact: Use only what leaves the numbers of training as they are, to rounding.
        max_grad_norm: As for `TrainStep`.
        allocator: Settings of CUDA's caching allocator; None for torch's defaults.
        advice: Where nothing fits, look for what would (a larger GPU, more of them, adapters).
        traces: Traces of this workload to take from and to add to; GPUs of one capability share them.
        progress: Called before each trial with what is tried and how many are done.
        helpers: Processes that make estimates of the same workload meanwhile; the plan is the same without.

    Returns:
        The plan; `.fits` says whether there is one that fits.

    Raises:
        ConfigError: An unknown name, fixed choices that exclude each other, or one that `exclude` names.
        ModelError: The model cannot run without values.
    """
    hardware = resolve(hardware)
    fixed = [make_technique(technique) for technique in techniques]
    _check_names(exclude, fixed)
    choice = resolve_precision(precision, hardware)
    facts = probe(work)
    if facts.layers >= MANY_LAYERS:
        helpers.start()
    settings = {"max_grad_norm": max_grad_norm, "allocator": allocator}
    trials = Trials(work, hardware, choice.policy, settings, traces or TraceCache(work), progress, helpers)
    found = climb(facts, trials, fixed, exclude, exact)
    pieces = advise(found, trials) if advice and not found.estimate.fit else ()
    return Plan(
        hardware=hardware,
        precision=str(choice.policy),
        precision_reason=choice.reason,
        techniques=tuple(map(str, found.techniques)),
        estimate=found.estimate,
        ladder=tuple(found.ladder),
        rejected=tuple(found.rejected),
        advice=tuple(pieces),
        probe=facts,
        trials=len(trials.known),
        max_grad_norm=max_grad_norm,
        ranks=rank_count(),
    )


def _check_names(exclude: Sequence[str], fixed: Sequence[Technique]) -> None:
    for name in exclude:
        technique_class(name)
        if any(technique.name == name for technique in fixed):
            raise ConfigError(
                f"{name} is excluded, and it is one of the techniques to keep", hint="leave one of them out"
            )
