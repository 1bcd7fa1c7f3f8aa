"""Find the cheapest set of modules that must stay fp32, by trying whole sets.

Which modules look bad one by one (their suspicion) only says where to look first: errors add up, cancel, and some
modules help only together. So each answer comes from the step run with a whole set of islands:

1. No island. If that passes, nothing is needed.
2. All candidates. If that fails, what is wrong lies outside of them.
3. Galloping over prefixes of the candidates by suspicion (2, 8, 32, ...), then bisection: the shortest prefix that
   passes. Its last module is needed, given those before it. That one is fixed, and the search goes on among those
   before it, until the fixed ones pass by themselves (successive bisection, as in delta debugging).
   The first three take about log2(rank) + 1 trials each, further ones that are ranked one after the other one each.
   None can be left out of what is kept.
4. Refinement: split an island into modules inside it; exchange an island for any cheaper modules; leave islands
   out although a failed trial says that they are needed. It ends after 2 log2(N) + 10 trials in all, or where step 3
   took more, after as many again.

It is a local search: nothing can be left out of what it finds, and no island of it could be split or exchanged as in
step 4 where the trials sufficed (the reason says when they did not). Not covered: several islands exchanged at once, as
two for one that is dearer than each; finding the cheapest of all sets takes 2^N trials. Where more islands can be
worse, the result still is a set that passed in a trial, but a cheaper one is missed more often. An outcome is taken to
be exact: where two runs of one set can differ, the oracle has to repeat them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from math import log2

from floatline.audit.trials import Item, Outcome, Spent, Trial, Trials, inside, merged
from floatline.errors import ConfigError

__all__ = ["Found", "Item", "Outcome", "Trial", "search"]

FIRST_PREFIX, GROWTH = 2, 4
FEW = 16
"""Up to this many candidates plain bisection needs no more trials than galloping."""
MANY = 4
"""After this many needed modules the next one is taken to be near: many are needed."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search came to.

    Attributes:
        islands: Modules to keep in fp32, none inside another; the set passed in a trial. None where no trial passed.
        trials: All trials in the order they were made; no set twice.
        front: Those that no other beats in both cost and error, by ascending cost.
        cut_short: More trials were wanted than allowed.
        reason: Why these islands, as a sentence.
    """

    islands: frozenset[str] | None
    trials: tuple[Trial, ...]
    front: tuple[Trial, ...]
    cut_short: bool
    reason: str


def search(
    items: Sequence[Item], evaluate: Callable[[frozenset[str]], Outcome], *, most_trials: int | None = None
) -> Found:
    """Find the cheapest set of fp32 islands that passes.

    Args:
        items: The candidates; those inside another one are tried in its place.
        evaluate: Names of the islands (none inside another) -> outcome. Called once for each set.
        most_trials: Calls of `evaluate` that are allowed, at least 2; None for as many as it takes.

    Returns:
        Found. The same for the same outcomes, in whatever order the items are given.

    Raises:
        ConfigError: Two items of one name; `most_trials` below 2.

    >>> items = [Item(name=f"layers.{i}", cost=1.0, suspicion=-i) for i in range(100)]
    >>> found = search(items, lambda islands: Outcome(passes="layers.70" in islands, error=0.5))
    >>> sorted(found.islands), len(found.trials)
    (['layers.70'], 12)
    """
    _validate(items, most_trials)
    ranked = [item.name for item in sorted(items, key=lambda item: (-item.suspicion, item.cost, item.name))]
    trials = Trials(items, evaluate, most_trials, enough_trials(len(items)))
    cut_short = False
    try:
        if not trials.passes(()) and _some_prefix_passes(trials, ranked):
            _refine(trials, ranked)
    except Spent:
        cut_short = True
    best = trials.best()
    return Found(
        islands=None if best is None else best.islands,
        trials=tuple(trials.made.values()),
        front=trials.front(),
        cut_short=cut_short,
        reason=_reason(trials, len(items), cut_short),
    )


def enough_trials(candidates: int) -> int:
    """Return the number of trials after which a set that passes is refined no more: 2 log2(candidates) + 10."""
    return int(2 * log2(max(candidates, 1)) + 10)


def _validate(items: Sequence[Item], most_trials: int | None) -> None:
    names = [item.name for item in items]
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise ConfigError(f"candidate islands given twice: {', '.join(twice)}", hint="give each module once")
    if most_trials is not None and most_trials < 2:
        raise ConfigError(
            f"most_trials is {most_trials}", hint="at least 2: one without islands and one with all of them"
        )


def _some_prefix_passes(trials: Trials, ranked: Sequence[str]) -> bool:
    """Keep what is needed of all candidates; where they fail together, of the first galloping prefix that passes."""
    prefixes = [ranked]
    length = FIRST_PREFIX
    while length < len(ranked):
        prefixes.append(ranked[:length])
        length *= GROWTH
    for prefix in prefixes:
        if trials.try_out(prefix).outcome.passes:  # not inferred: errors may cancel where fewer are fp32
            _keep_needed(trials, frozenset(), prefix)
            return True
    return False


def _keep_needed(trials: Trials, fixed: frozenset[str], pool: Sequence[str], below: float = float("inf")) -> None:
    """Try sets until one passes that consists of `fixed` and needed modules of `pool` (all of them together pass).

    Ends early where the needed ones cost as much as `below`.
    """
    for found in count():
        if trials.cost(fixed) >= below:
            return
        pool = _that_change_something(pool, fixed)
        length = (_shortest_passing if found < MANY else _shortest_from_the_top)(trials, fixed, pool)
        if length == 0:
            return
        fixed = merged((*fixed, pool[length - 1]))
        pool = pool[: length - 1]


def _that_change_something(pool: Sequence[str], fixed: frozenset[str]) -> list[str]:
    """Return the pool without modules inside a fixed one or inside one that comes before them."""
    kept: list[str] = []
    seen = set(fixed)
    for name in pool:
        if not inside(name, seen):
            kept.append(name)
            seen.add(name)
    return kept


def _shortest_passing(trials: Trials, fixed: frozenset[str], pool: Sequence[str]) -> int:
    """Return a length at which the pool's prefix passes beside the fixed ones, and fails when one shorter.

    First the fixed ones alone, then galloping, then cuts of the range that is left: in halves while it is among the
    first few (rounded up, because a later place leaves more to search), else at the harmonic mean. That cuts the
    chances in halves if a place's chance falls with the square of its rank.
    """
    if trials.passes(fixed):
        return 0
    low, high = 0, len(pool)  # low fails, high passes
    length = FIRST_PREFIX if high > FEW else high
    while length < high:
        if trials.passes((*fixed, *pool[:length])):
            high = length
        else:
            low, length = length, length * GROWTH
    while high - low > 1:
        even = low == 0 or high <= FEW
        middle = (low + high + 1) // 2 if even else max(low + 1, 2 * low * high // (low + high))
        if trials.passes((*fixed, *pool[:middle])):
            high = middle
        else:
            low = middle
    return high


def _shortest_from_the_top(trials: Trials, fixed: frozenset[str], pool: Sequence[str]) -> int:
    """Return the same where many are needed: small errors that add up. Then one trial is enough for most of them."""
    low, high, step = -1, len(pool), 1
    while low < 0 < high:
        length = max(0, high - step)
        if trials.passes((*fixed, *pool[:length])):
            high, step = length, 2 * step
        else:
            low = length
    while high - low > 1:
        middle = (low + high) // 2
        if trials.passes((*fixed, *pool[:middle])):
            high = middle
        else:
            low = middle
    return high


def _refine(trials: Trials, ranked: Sequence[str]) -> None:
    """Look for cheaper sets near the best one, until none is found or enough trials are made."""
    if len(trials.made) > trials.enough:
        trials.enough = 2 * len(trials.made)
    while True:
        best = trials.best()
        assert best is not None
        _leave_out(trials, best)
        if trials.best() is best:
            with trials.refining():
                _split(trials, best, ranked)
                _exchange(trials, best, ranked)
                _leave_out(trials, best, doubting=True)
        if trials.best() is best:
            return


def _leave_out(trials: Trials, best: Trial, *, doubting: bool = False) -> None:
    """Try the best set without each island in turn, the dearest first; `doubting`: even where it surely fails."""
    for name in _dearest_first(trials, best):
        rest = best.islands - {name}
        if trials.try_out(rest).outcome.passes if doubting else trials.passes(rest):
            return


def _split(trials: Trials, best: Trial, ranked: Sequence[str]) -> None:
    """Try modules inside an island in its place: the most suspicious one, then the needed ones of all.

    Before that, the most suspicious ones of all islands at once: with good suspicions one trial splits them all.
    """
    within = {
        name: [other for other in ranked if inside(other, {name}, strictly=True)]
        for name in _dearest_first(trials, best)
    }
    if trials.passes(others[0] if others else name for name, others in within.items()):
        return
    for name, others in within.items():
        rest = best.islands - {name}
        if others and not trials.passes((*rest, others[0])) and trials.passes((*rest, *others)):
            _keep_needed(trials, rest, others, below=best.cost)
        if trials.best() is not best:
            return


def _exchange(trials: Trials, best: Trial, ranked: Sequence[str]) -> None:
    """Try cheaper modules in place of an island: all of them at once, so that one trial tells when there are none."""
    by_cost = sorted(ranked, key=trials.costs.__getitem__)  # the last one needed is then as cheap as can be
    for name in _dearest_first(trials, best):
        rest = best.islands - {name}
        cheaper = [other for other in by_cost if trials.costs[other] < trials.costs[name]]
        if cheaper and trials.passes((*rest, *cheaper)):
            _keep_needed(trials, rest, cheaper, below=best.cost)
        if trials.best() is not best:
            return


def _dearest_first(trials: Trials, best: Trial) -> list[str]:
    return sorted(best.islands, key=lambda name: (-trials.costs[name], name))


def _reason(trials: Trials, candidates: int, cut_short: bool) -> str:
    best, (without, *_) = trials.best(), trials.made.values()
    before = f"{without.outcome.error:.3g} times the tolerance"
    if best is None:
        text = f"not even all {candidates} candidates in fp32 help (without: {before}): what is wrong is elsewhere"
    elif not best.islands:
        text = f"nothing is needed: without islands the error is {before}"
    else:
        total = trials.cost(trials.costs)
        text = (
            f"{len(best.islands)} of {candidates} candidates in fp32 (cost {best.cost:.3g} of {total:.3g}) "
            f"bring the error from {before} to {best.outcome.error:.3g}"
        )
    if not trials.monotone:
        text += "; some larger sets failed where smaller ones passed, so errors cancel: try other batches too"
    if trials.unrefined:
        text += f"; refinement ended after {len(trials.made)} trials"
    if cut_short:
        text += f"; stopped after {len(trials.made)} trials, there may be more to find"
    return text
