"""How sure a verdict is: the same step again with stochastic rounding, and on the other batches.

One run of a step is one draw of its rounding errors. A policy that is within the tolerance by a hair may be outside on
the next batch. So the step is run again, each time with its roundings drawn anew (observe/error/stochastic.py), and the
confidence is the share of runs that come to the same verdict, each run counted, and half a run for either side so that
a few runs never make certainty:

    confidence = (same + 1/2) / (runs + 1)

A step that is not finite is no matter of chance: it is not run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from floatline.audit.exact import Exact
from floatline.audit.report import Noise
from floatline.audit.subject import Subject
from floatline.audit.tolerance import Effect, Tolerance
from floatline.observe.error.stochastic import StochasticRounding
from floatline.precision import Policy


def noise_of(
    subject: Subject, exacts: Sequence[Exact], policy: Policy, effect: Effect, tolerance: Tolerance, repeats: int
) -> Noise:
    """Run a policy again.

    Args:
        subject: What is audited.
        exacts: The exact step of each batch.
        policy: To put on.
        effect: Of the plain run on the first batch.
        tolerance: What is allowed.
        repeats: Runs with stochastic rounding, spread over the batches.

    Returns:
        The ratios of all runs, the plain one first, and the confidence in what it says.
    """
    ratios = [effect.ratio(tolerance)]
    if not effect.finite:
        return Noise(ratios=tuple(ratios), confidence=1.0)
    scale = effect.scale
    for batch in range(1, len(exacts)):
        ratios.append(subject.effect(policy, exacts[batch], batch, what="batches", scale=scale).ratio(tolerance))
    for repeat in range(repeats):
        batch = repeat % len(exacts)
        dice = partial(StochasticRounding, repeat)
        again = subject.effect(policy, exacts[batch], batch, what="noise", scale=scale, around=dice)
        ratios.append(again.ratio(tolerance))
    return Noise(ratios=tuple(ratios), confidence=confidence(ratios))


def confidence(ratios: Sequence[float]) -> float:
    """Return the share of runs that agree with the first one, never quite 0 or 1.

    >>> confidence([0.5, 0.6, 0.4]), confidence([2.0, 0.9, 3.0, 4.0])
    (0.875, 0.7)
    """
    same = sum((ratio <= 1) == (ratios[0] <= 1) for ratio in ratios)
    return (same + 0.5) / (len(ratios) + 1)
