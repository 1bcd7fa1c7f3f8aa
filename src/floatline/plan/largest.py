"""The largest batch, sequence and image with which a plan still fits.

Each size is raised alone, the others as they are. Memory grows about linearly with it (images and attention's scores
faster), so two traces give a line, the line a guess, and each guess is traced before it is told. What is returned was
traced and fits; how sure it is that nothing larger would, `limited_by` tells.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from floatline.errors import ConfigError, ModelError
from floatline.plan.allocator import AllocatorSettings
from floatline.plan.estimate import Estimate
from floatline.plan.fit import Fit
from floatline.plan.parallel import ALONE, Alone, Piece, together
from floatline.plan.plan import Plan
from floatline.plan.shape import Shape
from floatline.plan.sources import Source
from floatline.plan.traces import rank_count
from floatline.plan.trial import Trial
from floatline.techniques import Technique, make_technique

STEPS = {"batch": 1, "seq": 64, "image": 32}
"""Sizes are multiples of these; images are squares."""
CLOSE = 0.06
"""Share of a size within which the limit is known well enough."""
MOST_TRIALS = 6


@dataclass(frozen=True, kw_only=True)
class Largest:
    """The largest value of one size.

    Attributes:
        key: "batch" (samples a micro-batch), "seq" (tokens) or "image" (pixels a side).
        value: The largest that was traced and fits.
        needed: Bytes that are then compared with the device's memory.
        peak_total: Peak of what the allocator would hold with memory to spare, context included.
        limited_by: "memory" (a little more does not fit), "model" (it takes no more), or "tried" (more may fit; no
            further trial was made).
    """

    key: str
    value: int
    needed: int
    peak_total: int
    limited_by: str


def largest(
    source: Source,
    plan: Plan | Estimate,
    progress: Callable[[str, int], None] = lambda what, done: None,
    *,
    allocator: AllocatorSettings | None = None,
    helpers: Alone = ALONE,
) -> tuple[Largest, ...]:
    """Return the largest sizes that fit with a plan's precision and techniques, those that apply to the model.

    Args:
        source: The model, in the shape that was planned.
        plan: A plan that fits, or an estimate, of inference for one; without a fit the result is empty.
        progress: Called before each trial.
        allocator: Settings of the caching allocator; None for torch's defaults.
        helpers: Processes that make estimates of the same source meanwhile.
    """
    found, clip = (plan, 1.0) if isinstance(plan, Estimate) else (plan.estimate, plan.max_grad_norm)
    if not found.fit:
        return ()
    techniques, shape, cuts = _micro_batch(found, source.shape)
    known: dict[Trial, Estimate] = {}

    def trial(key: str, value: int) -> Trial:
        asked = _open(_with(shape, key, value), key)
        return Trial(
            hardware=found.hardware,
            precision=found.precision,
            techniques=tuple(techniques),
            mode=found.mode,
            max_grad_norm=clip,
            allocator=allocator,
            ranks=rank_count(),
            shape=replace(asked, batch=cuts * (asked.batch or 1)),
            told=f"{key} {value}",
        )

    def ask(trial: Trial) -> Estimate:
        if trial not in known:
            progress(trial.told, len(known))
            assert trial.shape is not None
            shape = trial.shape
            known[trial] = helpers.estimate(trial, lambda: trial.estimate(source.reshaped(shape).work))
        return known[trial]

    climbs = []
    for key in STEPS:
        start = _now(shape, key)
        if start is None or (key == "batch" and source.kind == "module"):
            continue
        climbs.append(_climb(key, start, source.limits.get(key), partial(trial, key)))
    return tuple(piece for piece in together(climbs, ask, helpers) if piece is not None)


def _micro_batch(found: Estimate, shape: Shape) -> tuple[list[Technique], Shape, int]:
    """Return techniques, the shape of one micro-batch, and how many to run: what is asked is how large one may be.

    With accumulation two are run, for the second one meets the gradients of the first.
    """
    techniques = [make_technique(text) for text in found.techniques]
    others = [technique for technique in techniques if technique.name != "accumulation"]
    if found.micro_batches == 1:
        return others, shape, 1
    rows = -(-(shape.batch or 1) // found.micro_batches)
    return [*others, make_technique("accumulation", {"micro_batches": 2})], replace(shape, batch=rows), 2


def _with(shape: Shape, key: str, value: int) -> Shape:
    changed: Any = (value, value) if key == "image" else value
    return replace(shape, **{key: changed})


def _open(shape: Shape, key: str) -> Shape:
    """A larger image has more tokens: the sequence's length is left to follow."""
    return replace(shape, seq=None) if key == "image" else shape


def _now(shape: Shape, key: str) -> int | None:
    value: Any = getattr(shape, key)
    return max(value) if isinstance(value, tuple) else value


def _climb(key: str, start: int, limit: int | None, trial: Callable[[int], Trial]) -> Piece[Largest | None]:
    """Climb with one size; a size that the model does not take ends the way like a limit of its own."""
    try:
        first = yield (trial(start),)
    except (ConfigError, ModelError):
        return None
    if not first.fit:
        return None
    known = {start: first.fit}
    best, least_bad = (start, first), None
    for _ in range(MOST_TRIALS):
        guess = _guess(known, best[0], least_bad, STEPS[key], limit)
        if guess is None or guess == best[0]:
            break
        try:
            tried = yield (trial(guess),)
        except (ConfigError, ModelError):
            least_bad, limit = guess, guess - STEPS[key]
            continue
        known[guess] = tried.fit
        if tried.fit:
            best = (guess, tried)
        else:
            least_bad = guess
    if limit is not None and best[0] >= limit - STEPS[key] + 1:
        by = "model"
    else:
        by = "memory" if least_bad is not None and least_bad - best[0] <= max(STEPS[key], CLOSE * best[0]) else "tried"
    return Largest(key=key, value=best[0], needed=best[1].fit.needed, peak_total=best[1].peak_total, limited_by=by)


def _guess(known: dict[int, Fit], best: int, least_bad: int | None, step: int, limit: int | None) -> int | None:
    """Return the next size to try, None when the limit is known well enough."""
    if limit is not None and best >= limit:
        return None
    if least_bad is not None and least_bad - best <= max(step, CLOSE * best):
        return None
    if len(known) < 2:
        guess = 2 * best
    else:
        (x0, low), (x1, high) = sorted(known.items())[-2:]
        slope = (high.needed - low.needed) / (x1 - x0)
        room = low.capacity - low.reserve - 1.65 * high.deviation
        guess = int(x0 + (room - low.needed) / slope) if slope > 0 else 2 * best
        guess = min(guess, 16 * best)
    further = best + max(step, round(CLOSE * best / step) * step)  # far enough to tell something where it does not fit
    guess = max(further, guess // step * step)
    if least_bad is not None and guess >= least_bad:
        guess = max(best + step, (best + least_bad) // 2 // step * step)
        if guess >= least_bad:
            return None
    return min(guess, limit) if limit is not None else guess
