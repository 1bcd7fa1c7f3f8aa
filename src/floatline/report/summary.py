"""The numbers of a run that people ask for, derived from its records.

Step time is given as median and 95th percentile without the first reading, which pays for warm-up (lazy
initialisation, autotuning, compilation) and is reported on its own. A run that reads the device only every n updates
(`run.log_every`) records their average n times: its percentiles are those of averages. An accuracy carries its 95 %
Wilson interval: two runs whose intervals overlap have not been told apart by this test set.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from floatline.report.curves import finite, quantile
from floatline.report.load import RunData
from floatline.report.records import NAN, Eval, Tally, as_list, as_mapping, as_number, as_text
from floatline.report.units import DASH, percent_text, times

STATUSES = {
    "finished": ("✓", "good", "Finished after {}"),
    "running": ("…", "info", "Running, or killed, after {}"),
    "stopped": ("■", "warn", "Stopped after {}"),
    "failed": ("✗", "bad", "Failed after {}"),
}
UNKNOWN_STATUS = ("?", "info", "Status unknown, {}")


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What the head of the report says. Times in seconds, memory in bytes, NaN where nothing is known.

    Args:
        final: The evaluation that counts: the last on test, else the last on validation.
        train_loss: Mean of the last finite losses (a twentieth of the run, at most 50 updates).
        warm_up: How many updates share the first reading of the clock, which pays for warm-up.
        overflows: Updates skipped because scaled fp16 gradients overflowed: routine.
        faults: Updates refused for any other reason.
    """

    status: str
    precision: str
    updates: int
    skipped: int
    overflows: int
    faults: int
    train_loss: float
    validation_loss: float
    best_validation_loss: float
    best_validation_step: int | None
    final: Eval | None
    seconds: float
    peak_memory: float
    tokens_per_s: float
    warm_up: int
    step_median: float
    step_p95: float
    step_first: float
    max_grad_norm: float

    @property
    def accuracy(self) -> float:
        return self.final.accuracy if self.final else NAN

    @property
    def answers(self) -> Tally | None:
        """How many answers the final accuracy stands on, None when nobody counted."""
        if self.final is None or not math.isfinite(self.final.accuracy):
            return None
        total = sum(tally.total for tally in self.final.groups.values())
        if total:
            return Tally(correct=sum(tally.correct for tally in self.final.groups.values()), total=total)
        if math.isfinite(self.final.samples) and self.final.samples >= 1:
            total = int(self.final.samples)
            return Tally(correct=round(self.final.accuracy * total), total=total)
        return None


def summarize(run: RunData) -> Summary:
    """Derive the headline numbers of one run.

    Args:
        run: What `load_run` returned; any part of it may be empty.

    Returns:
        The numbers, NaN or None where the run does not say.
    """
    losses = finite([step.loss for step in run.steps])
    tail = losses[-max(1, min(50, len(losses) // 20)) :]
    validations = [item for item in run.evals if item.split == "validation"]
    tests = [item for item in run.evals if item.split == "test"]
    best = min((item for item in validations if math.isfinite(item.loss)), key=lambda item: item.loss, default=None)
    warm_up = _warm_up(run)
    steady = [step.step_s for step in run.steps[warm_up:]]
    overflows = sum(fault.what == "overflow" for fault in run.faults)
    return Summary(
        status=as_text(run.info.get("status")),
        precision=precision_of(run),
        updates=run.steps[-1].step if run.steps else 0,
        skipped=_skipped(run),
        overflows=overflows,
        faults=len(run.faults) - overflows,
        train_loss=sum(tail) / len(tail) if tail else NAN,
        validation_loss=validations[-1].loss if validations else NAN,
        best_validation_loss=best.loss if best else NAN,
        best_validation_step=best.step if best else None,
        final=(tests or validations)[-1] if tests or validations else None,
        seconds=_seconds(run),
        peak_memory=_peak_memory(run),
        tokens_per_s=quantile([step.tokens_per_s for step in run.steps[warm_up:]], 0.5),
        warm_up=warm_up,
        step_median=quantile(steady, 0.5),
        step_p95=quantile(steady, 0.95),
        step_first=run.steps[0].step_s if run.steps else NAN,
        max_grad_norm=as_number(as_mapping(run.recipe.get("train")).get("max_grad_norm")),
    )


def precision_of(run: RunData) -> str:
    """Return the precision a run used: the recipe's, or where that says auto, the one chosen."""
    stated = run.recipe.get("precision")
    if isinstance(stated, Mapping):
        stated = stated.get("policy") or stated.get("name") or next(iter(stated.values()), None)
    chosen = [as_text(choice.get("value")) for choice in choices_of(run) if choice.get("key") == "precision"]
    if stated in (None, "", "auto") and chosen:
        return chosen[-1]
    return as_text(stated)


def choices_of(run: RunData) -> list[Mapping[str, Any]]:
    """Return the automatic choices, each with key, value and reason."""
    return [as_mapping(choice) for choice in as_list(run.info.get("choices")) if isinstance(choice, Mapping)]


def techniques_of(run: RunData) -> list[tuple[str, str, str]]:
    """Return what each technique was, what it touched and what it chose, as texts."""
    found = [as_mapping(item) for item in as_list(run.info.get("techniques")) if isinstance(item, Mapping)]
    return [(as_text(t.get("technique")), _touched(as_list(t.get("touched"))), _notes(t)) for t in found]


def _touched(names: list[Any]) -> str:
    if not names:
        return "nothing"
    first = as_text(names[0]) if names[0] != "" else "the whole model"
    return first if len(names) == 1 else f"{len(names)} parts, first {first}"


def _notes(technique: Mapping[str, Any]) -> str:
    return "; ".join(as_text(note) for note in as_list(technique.get("notes")))


def resumed_at(run: RunData) -> list[int]:
    """Return the updates at which the run was taken up again."""
    places = [as_number(as_mapping(item).get("at_step")) for item in as_list(run.info.get("resumed"))]
    return [int(place) for place in places if math.isfinite(place)]


def status_words(status: str) -> tuple[str, str, str]:
    """Return symbol, tone and words of a status; the words have a place for how many updates were made."""
    return STATUSES.get(status, UNKNOWN_STATUS)


def _skipped(run: RunData) -> int:
    """Return how many updates were not made; one that a rollback took back was made again later."""
    refused = sum(fault.action != "leave out" for fault in run.faults)
    return max(refused, sum(not step.applied for step in run.steps))


def verdict(summary: Summary) -> str:
    """Return the run in one sentence, for the head of the page and the terminal."""
    _, _, words = status_words(summary.status)
    parts = [words.format(times(summary.updates, "update") if summary.updates else "no update")]
    if summary.final and math.isfinite(summary.accuracy):
        where = "unseen test questions" if summary.final.split == "test" else f"{summary.final.split} questions"
        parts.append(f"{percent_text(summary.accuracy)} of the {where} answered right")
    if summary.faults:
        parts.append(f"{times(summary.faults, 'fault')} kept from the weights")
    elif summary.updates and not summary.skipped:
        parts.append("every update was finite")
    elif summary.updates and summary.overflows:
        parts.append(f"{times(summary.overflows, 'update')} skipped while the loss scale settled (routine in fp16)")
    return "; ".join(parts) + "."


def wilson(tally: Tally) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share, which stays inside 0 to 1 also near the ends.

    Args:
        tally: Right answers among all answers.

    Returns:
        Lower and upper bound; (NaN, NaN) without answers.

    Source: Wilson (1927), J. Am. Stat. Assoc. 22.

    >>> [round(bound, 3) for bound in wilson(Tally(correct=98, total=100))]
    [0.93, 0.994]
    """
    n, z = tally.total, 1.959964
    if not n:
        return NAN, NAN
    share = min(max(tally.share, 0.0), 1.0)
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max((middle - half) / (1 + z * z / n), 0.0), min((middle + half) / (1 + z * z / n), 1.0)


def interval_text(tally: Tally | None) -> str:
    """Return the interval as people read it, a dash without answers.

    >>> interval_text(Tally(correct=98, total=100))
    '93.0–99.4 %'
    """
    if tally is None or not tally.total:
        return DASH
    low, high = wilson(tally)
    return f"{low * 100:.1f}–{high * 100:.1f} %"


def _warm_up(run: RunData) -> int:
    """Count the updates of the first reading; 0 when there is no other, so that something is left to count."""
    first = run.steps[0].step_s if run.steps else NAN
    shared = 1
    while shared < len(run.steps) and run.steps[shared].step_s == first:
        shared += 1
    return shared if any(math.isfinite(step.step_s) for step in run.steps[shared:]) else 0


def _seconds(run: RunData) -> float:
    recorded = as_number(run.info.get("seconds"))
    if recorded > 0 and run.info.get("status") != "running":
        return recorded
    # run.json of a killed run may be older than its last update, so the longer of the two is nearer the truth.
    spent = finite([step.step_s for step in run.steps]) + finite([item.seconds for item in run.evals])
    return max((time for time in (recorded, sum(spent)) if time > 0), default=NAN)


def _peak_memory(run: RunData) -> float:
    recorded = as_number(run.info.get("peak_memory_bytes"))
    if recorded > 0:
        return recorded
    return max(finite([step.memory_bytes for step in run.steps]), default=NAN)
