"""Climb the ladder until the run fits, then take off what is not needed.

The fastest plan is the one with the fewest dear techniques. So they are added in the order of what they cost in time;
one that saves nothing here is left out again. When the run fits, each one below the last is taken off on trial, dearest
first, and stays off where the run fits without it; then micro-batches grow as far as they fit. Every trial is a trace
of the real step, none is a formula.

It is a greedy search: it finds a plan from which nothing can be left out, not the best of all combinations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from floatline.errors import FloatlineError
from floatline.plan.estimate import Estimate
from floatline.plan.ladder import Candidate, Rejected, Rung, candidates, most_micro_batches
from floatline.plan.probe import Probe
from floatline.techniques import Technique, make_technique

SAVES_NOTHING = 0.005
"""Share of the peak below which a technique is left out again."""


class Attempt(Protocol):
    """Techniques -> estimate."""

    def __call__(self, techniques: Sequence[Technique]) -> Estimate:
        """Return the estimate."""

    def foresee(self, *combinations: Sequence[Technique]) -> None:
        """Say which may be asked for after the next one, likeliest first, for helpers to begin with."""


@dataclass
class Found:
    """What a search came to.

    Attributes:
        techniques: Those of the plan, the caller's fixed ones among them.
        estimate: With them.
        ladder: What was tried, rung by rung.
        rejected: What is not in the plan, and why.
    """

    techniques: list[Technique]
    estimate: Estimate
    ladder: list[Rung] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)


def climb(probe: Probe, attempt: Attempt, fixed: Sequence[Technique], exclude: Sequence[str], exact: bool) -> Found:
    """Search for the fastest combination that fits.

    Args:
        probe: Facts about the workload.
        attempt: Techniques -> estimate.
        fixed: What the caller has chosen; it stays.
        exclude: Names of techniques that must not be used.
        exact: Leave out what changes the numbers of training.
    """
    bottom = attempt(fixed)
    found = Found(list(fixed), bottom, [Rung(added="", estimate=bottom, saved=0, slowdown=1.0)])
    taken = {technique.name for technique in fixed}
    ladder = candidates(probe)
    for again in (False, True):  # what saved nothing may save now that the peak lies elsewhere
        for place, candidate in enumerate(ladder):
            if found.estimate.fit:
                break
            if candidate.name in taken or (again and candidate.name in {used.name for used in found.techniques}):
                continue
            reason = _excluded(candidate, exclude, exact) or candidate.worth(probe, found.estimate)
            if reason:
                _reject(found, candidate.name, reason)
            else:
                allowed = [c for c in ladder[place:] if c.name not in taken and not _excluded(c, exclude, exact)]
                _foresee(found, [c for c in allowed if not c.worth(probe, found.estimate)], attempt)
                _try(found, candidate, attempt, again)
    if found.estimate.fit:
        _prune(found, attempt, len(fixed), probe)
        _widen(found, attempt, probe)
    _say_unneeded(found, probe, taken)
    _say_changes(found, probe, taken)
    return found


def _excluded(candidate: Candidate, exclude: Sequence[str], exact: bool) -> str:
    if candidate.name in exclude:
        return "excluded by you"
    return f"changes the numbers ({candidate.changes})" if exact and candidate.changes else ""


def _foresee(found: Found, upcoming: Sequence[Candidate], attempt: Attempt) -> None:
    """Foresee the rungs above the first of `upcoming`, as if each one stayed and none were enough."""
    climbed, techniques = [], found.techniques
    for candidate in upcoming:
        techniques = _with(techniques, make_technique(candidate.text))
        climbed.append(techniques)
    attempt.foresee(*climbed[1:])


def _with(techniques: Sequence[Technique], technique: Technique) -> list[Technique]:
    """Return the techniques with one more, in place of its like."""
    return [*(other for other in techniques if other.name != technique.name), technique]


def _try(found: Found, candidate: Candidate, attempt: Attempt, again: bool) -> None:
    technique = make_technique(candidate.text)
    techniques = _with(found.techniques, technique)
    estimate = _survived(attempt, techniques)
    if isinstance(estimate, str):
        _reject(found, candidate.name, estimate)
        return
    before = found.estimate
    saved = before.fit.needed - estimate.fit.needed
    kept = saved > SAVES_NOTHING * before.fit.needed
    slowdown = estimate.time.seconds / found.ladder[0].estimate.time.seconds
    if kept or not again:
        found.ladder.append(Rung(added=str(technique), estimate=estimate, saved=saved, slowdown=slowdown, kept=kept))
    if kept:
        found.techniques, found.estimate = techniques, estimate
    else:
        where = f"the peak lies in {before.timeline.op} of {before.timeline.module or 'the top'}"
        _reject(found, candidate.name, f"saves {max(0, saved) / 2**20:.0f} MiB here: {where}")


def _survived(attempt: Attempt, techniques: Sequence[Technique]) -> Estimate | str:
    """Return the estimate, or why a program that runs without these techniques does not run with them.

    What a model does not survive is not known beforehand: one that keeps state from forward to forward cannot be
    recomputed, and torch says so in an error of its own.
    """
    try:
        return attempt(techniques)
    except FloatlineError as error:
        return error.message
    except Exception as error:
        said = next((line for line in str(error).splitlines() if line.strip()), "")
        return f"the model does not run with it: {type(error).__name__}: {said}"


def _prune(found: Found, attempt: Attempt, fixed: int, probe: Probe) -> None:
    """Take off what the run fits without, the dearest first; the last one added was needed."""
    cost = {rung.added: rung.slowdown for rung in found.ladder}
    trials = sorted(found.techniques[fixed:-1], key=lambda technique: -cost.get(str(technique), 1.0))
    for place, technique in enumerate(trials):
        if technique.name == "accumulation" or _is_needed(found, technique):  # the first is widened instead
            continue
        rest = [other for other in found.techniques if other is not technique]
        off = [other for other in trials[place + 1 :] if other.name != "accumulation" and not _is_needed(found, other)]
        numbers = _numbers(found, probe)
        attempt.foresee(
            *([other for other in rest if other is not later] for later in off),
            *([_cut(rest, numbers[len(numbers) // 2])] if numbers else []),
        )
        estimate = _survived(attempt, rest)
        if not isinstance(estimate, str) and estimate.fit:
            found.techniques, found.estimate = rest, estimate
            _reject(found, technique.name, "the run fits without it, with what came after it on the ladder")


def _is_needed(found: Found, technique: Technique) -> bool:
    """Say whether what a technique takes off the states (it is there at every moment) is more than the room left."""
    below = found.ladder[0].estimate
    for rung in found.ladder[1:]:
        if rung.added == str(technique):
            taken_off = sum(below.states.values()) - sum(rung.estimate.states.values())
            fit = found.estimate.fit
            return taken_off > fit.margin - fit.reserve
        below = rung.estimate if rung.kept else below
    return False


def _widen(found: Found, attempt: Attempt, probe: Probe) -> None:
    """Cut the batch into as few equal micro-batches as fit: search the divisors of its rows."""
    numbers, techniques = _numbers(found, probe), found.techniques
    low, high = 0, len(numbers)  # numbers[high:] fit
    while low < high:
        middle = (low + high) // 2
        halves = [(begin, end) for begin, end in ((middle + 1, high), (low, middle)) if begin < end]
        attempt.foresee(*(_cut(techniques, numbers[(begin + end) // 2]) for begin, end in halves))
        trial = _cut(techniques, numbers[middle])
        estimate = _survived(attempt, trial)
        if not isinstance(estimate, str) and estimate.fit:
            high = middle
            found.techniques, found.estimate = trial, estimate
        else:
            low = middle + 1


def _numbers(found: Found, probe: Probe) -> list[int]:
    """Return the numbers of micro-batches that are fewer than the ladder's; none where it cuts nothing."""
    if not any(rung.added.startswith("accumulation") and rung.kept for rung in found.ladder):
        return []
    return [number for number in range(1, most_micro_batches(probe.rows)) if probe.rows % number == 0]


def _cut(techniques: Sequence[Technique], number: int) -> list[Technique]:
    """Return the techniques with the batch cut into `number` micro-batches; 1 leaves it whole."""
    others = [technique for technique in techniques if technique.name != "accumulation"]
    return [*others, make_technique("accumulation", {"micro_batches": number})] if number > 1 else others


def _reject(found: Found, name: str, reason: str) -> None:
    found.rejected = [other for other in found.rejected if other.name != name]
    found.rejected.append(Rejected(name=name, reason=reason))


def _say_unneeded(found: Found, probe: Probe, fixed: set[str]) -> None:
    used = {technique.name for technique in found.techniques}
    known = {rejected.name for rejected in found.rejected}
    found.rejected = [rejected for rejected in found.rejected if rejected.name not in used]
    for candidate in candidates(probe):
        if found.estimate.fit and candidate.name not in used | known:
            known.add(candidate.name)
            found.rejected.append(Rejected(name=candidate.name, reason="not needed, the run fits without it"))


def _say_changes(found: Found, probe: Probe, fixed: set[str]) -> None:
    """Tell of techniques that the search chose although they change the numbers of training."""
    used = {technique.name for technique in found.techniques} - fixed
    notes = [
        f"{candidate.name} changes the numbers ({candidate.changes}); exact plans do without it"
        for candidate in candidates(probe)
        if candidate.changes and candidate.name in used
    ]
    if notes:
        found.estimate = replace(found.estimate, notes=(*found.estimate.notes, *notes))
