"""Which way an op fails in a lower format, if it does: range, rounding or stagnation.

    range        finite values overflow; what is flushed to zero carries more than 10 % of the result's RMS
    rounding     the result on exact inputs is off by more than 10 % (25 times what bf16's rounding alone makes of it,
                 200 times fp16's), and fp32 is not; or more than 1 % of its decisions come out otherwise
    stagnation   more than 5 % of a running sum's increments are lost

What fp32 cannot compute either (an exact zero by cancellation: the gradient of a key bias in attention) is nobody's
fault. Thresholds are on the op alone, on exact inputs; what comes together over the step is the effect's matter
(tolerance.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from floatline.formats import FORMATS
from floatline.observe.error import Measure, Reading

Failure = Literal["range", "rounding", "stagnation"]

ROUNDING = 0.1
FLUSHED = 0.1
STALLED = 0.05
FLIPPED = 0.01
HALVES = ("fp16", "bf16")


@dataclass(frozen=True, kw_only=True)
class Judged:
    """How an op fails.

    Attributes:
        failure: Which way; None where it does not.
        severity: The worst number in units of its threshold; above 1 it fails.
        why: One sentence.
    """

    failure: Failure | None
    severity: float
    why: str = ""


def judge(reading: Reading) -> Judged:
    """Return how an op fails, by the first of range, stagnation and rounding that is above its threshold."""
    found = [*_range(reading.measure), *_stagnation(reading), *_rounding(reading.measure), *_decisions(reading)]
    worst = max((judged.severity for judged in found), default=0.0)
    failing = next((judged for judged in found if judged.severity > 1), None)
    return failing or Judged(failure=None, severity=worst)


def _range(measure: Measure | None) -> list[Judged]:
    if measure is None or measure.format not in HALVES or not measure.sound:
        return []
    end = FORMATS[measure.format].max
    found = []
    if measure.overflow:
        over = f"values reach {2**-measure.headroom * end:.3g}" if measure.headroom < 0 else "an intermediate overflows"
        why = f"{over}, {measure.format} ends at {end:.5g} ({_percent(measure.overflow)} of them lost)"
        found.append(Judged(failure="range", severity=math.inf, why=why))
    why = f"{_percent(measure.underflow)} of the values are zero in {measure.format} and carry "
    why += f"{_percent(measure.underflow_error)} of the result"
    return [*found, Judged(failure="range", severity=measure.underflow_error / FLUSHED, why=why)]


def _stagnation(reading: Reading) -> list[Judged]:
    if reading.stalled is None or reading.measure is None:
        return []
    why = f"{_percent(reading.stalled)} of the increments are below half an ulp of the running sum and are lost"
    return [Judged(failure="stagnation", severity=reading.stalled / STALLED, why=why)]


def _rounding(measure: Measure | None) -> list[Judged]:
    if measure is None or not measure.sound:
        return []
    why = f"exact inputs give a result that is {_percent(measure.error)} off; in fp32 {measure.error_fp32:.1e}"
    return [Judged(failure="rounding", severity=measure.error / ROUNDING, why=why)]


def _decisions(reading: Reading) -> list[Judged]:
    if not reading.flipped_here:
        return []
    share = reading.flipped_here / reading.decisions
    why = f"{reading.flipped_here} of {reading.decisions} decisions come out otherwise on rounded inputs"
    return [Judged(failure="rounding", severity=share / FLIPPED, why=why)]


def _percent(share: float) -> str:
    """Return a share as text.

    >>> _percent(0.25), _percent(0.00012), _percent(math.inf)
    ('25 %', '0.012 %', 'all')
    """
    return "all" if math.isinf(share) else f"{share * 100:.2g} %"
