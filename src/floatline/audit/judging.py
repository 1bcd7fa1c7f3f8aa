"""Which way an op fails in a lower format, if it does: range, rounding or stagnation.

    range        finite values overflow; what is flushed to zero carries more than 10 % of the result's RMS
    rounding     the result on exact inputs is off by more than 10 % (25 times what bf16's rounding alone makes of it,
                 200 times fp16's; 50 % in the backward), and fp32 is not; or more than 1 % of its decisions come out
                 otherwise
    stagnation   more than 5 % of a running sum's increments are lost, or of what a loop of additions comes to

What fp32 cannot compute either (an exact zero by cancellation: the gradient of a key bias in attention) is nobody's
fault. Thresholds are on the op alone, on exact inputs; what comes together over the step is the effect's matter
(tolerance.py): `explained` names the op that a module is needed for where the search has found it and no op of it fails
by itself.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from floatline.audit.trials import inside
from floatline.formats import FORMATS
from floatline.observe.error import Measure, Reading
from floatline.observe.error.chains import ADDING

Failure = Literal["range", "rounding", "stagnation"]

ROUNDING = 0.1
GRADIENT = 0.5
"""The same in the backward. Where gradients of single samples nearly cancel, what is left of them is off by more; it is
also within what the choice of the batch makes of it. So one gradient has the tolerance of one parameter (tolerance.py).
"""
FLUSHED = 0.1
STALLED = 0.05
FLIPPED = 0.01
HALVES = ("fp16", "bf16")
_FINITE = sys.float_info.max


@dataclass(frozen=True, kw_only=True)
class Judged:
    """How an op fails.

    Attributes:
        failure: Which way; None where it does not.
        severity: The worst number in units of its threshold; above 1 it fails.
        why: One sentence.
        decides: It fails by decisions that come out otherwise, and by nothing else.
    """

    failure: Failure | None
    severity: float
    why: str = ""
    decides: bool = False


def judge(reading: Reading, *, counts: bool = True) -> Judged:
    """Return how an op fails, by the first of range, stagnation and rounding that is above its threshold.

    Args:
        reading: What was measured of it.
        counts: Whether its result matters; where it does not, only what is infinitely off is a failure.
    """
    found = [*_range(reading.measure), *_stagnation(reading), *_rounding(reading), *_decisions(reading)]
    worst = max((judged.severity for judged in found), default=0.0)
    failing = next((judged for judged in found if judged.severity > (1 if counts else _FINITE)), None)
    return failing or Judged(failure=None, severity=worst)


def suspicion(reading: Reading, judged: Judged) -> float:
    """Return how much an op is suspected: by how it fails, else by what it makes of exact inputs."""
    if judged.failure is not None:
        return 1e6 if math.isinf(judged.severity) else 1e3 * judged.severity
    return min(reading.measure.error, 1e2) if reading.measure is not None and reading.measure.sound else 0.0


def explained(
    judged: Sequence[tuple[Reading, Judged]], islands: Iterable[str], ratio: float
) -> tuple[tuple[Reading, Judged], ...]:
    """Say of islands in which no op fails by itself which op they are needed for: the one with the largest error.

    Args:
        judged: All ops.
        islands: Modules that have to be kept high.
        ratio: Error of the step with everything lowered, in units of the tolerance.
    """
    found = list(judged)
    for island in islands:
        within = [place for place, (reading, _) in enumerate(found) if inside(reading.spot.module, {island})]
        if within and all(found[place][1].failure is None for place in within):
            worst = max(within, key=lambda place: _suspect(found[place][0]))
            found[worst] = found[worst][0], _needed(found[worst][0], ratio)
    return tuple(found)


def _suspect(reading: Reading) -> tuple[float, float]:
    measure = reading.measure
    local = min(measure.error, 1e9) if measure is not None and measure.sound else 0.0
    likely = (1 if reading.phase == "backward" else 2) * (1 if reading.ran == "_to_copy" else 2)  # of about equal ones
    return reading.flipped / max(reading.decisions, 1), local * likely


def _needed(reading: Reading, ratio: float) -> Judged:
    together = "is not finite" if math.isinf(ratio) else f"is {ratio:.3g} times the tolerance off"
    if reading.flipped:
        alone = f"{reading.flipped} of {reading.decisions} decisions come out otherwise"
    else:
        alone = f"by itself {percent(reading.measure.error if reading.measure is not None else 0.0)} off"
    failure: Failure = "range" if math.isinf(ratio) else "rounding"
    return Judged(failure=failure, severity=ratio, why=f"{alone}; the step {together} without this module in fp32")


def _range(measure: Measure | None) -> list[Judged]:
    if measure is None or measure.format not in HALVES or not measure.sound:
        return []
    end = FORMATS[measure.format].max
    found = []
    if measure.overflow:
        over = f"values reach {2**-measure.headroom * end:.3g}" if measure.headroom < 0 else "an intermediate overflows"
        why = f"{over}, {measure.format} ends at {end:.5g} ({percent(measure.overflow)} of them lost)"
        found.append(Judged(failure="range", severity=math.inf, why=why))
    why = f"{percent(measure.underflow)} of the values are zero in {measure.format} and carry "
    why += f"{percent(measure.underflow_error)} of the result"
    return [*found, Judged(failure="range", severity=measure.underflow_error / FLUSHED, why=why)]


def _stagnation(reading: Reading) -> list[Judged]:
    if reading.stalled is None or reading.measure is None:
        return []
    lost = percent(reading.stalled)
    why = f"{lost} of the increments are below half an ulp of the running sum and are lost"
    if reading.ran in ADDING:
        why = f"over {reading.calls} turns of a loop {lost} of the result are lost: increments are below half an ulp"
    return [Judged(failure="stagnation", severity=reading.stalled / STALLED, why=why)]


def _rounding(reading: Reading) -> list[Judged]:
    measure = reading.measure
    if measure is None or not measure.sound:
        return []
    why = f"exact inputs give a result that is {percent(measure.error)} off; in fp32 {measure.error_fp32:.1e}"
    allowed = GRADIENT if reading.phase == "backward" else ROUNDING
    return [Judged(failure="rounding", severity=measure.error / allowed, why=why)]


def _decisions(reading: Reading) -> list[Judged]:
    if not reading.flipped_here:
        return []
    share = reading.flipped_here / reading.decisions
    why = f"{reading.flipped_here} of {reading.decisions} decisions come out otherwise on rounded inputs"
    return [Judged(failure="rounding", severity=share / FLIPPED, why=why, decides=True)]


def harmless(judged: Judged) -> Judged:
    """Return the judgement of decisions that come out otherwise where nothing of the step hangs on them: a metric."""
    return replace(judged, failure=None, severity=1.0, why=f"{judged.why}; loss and gradients are the same to the bit")


def percent(share: float) -> str:
    """Return a share as text, with two digits.

    >>> percent(0.25), percent(0.00012), percent(5.914), percent(math.inf)
    ('25 %', '0.012 %', '591 %', 'all')
    """
    if math.isinf(share):
        return "all"
    return f"{share * 100:.0f} %" if share >= 1 else f"{share * 100:.2g} %"
