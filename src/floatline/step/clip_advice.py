"""Which value to clip gradients at, judged from the norms that the run itself had.

Every finite norm is counted in a bin a sixteenth of an octave wide, so the whole run's distribution is at hand in
bounded memory, with quantiles that are off by at most 2.2 %. There is no right clip value for all models; what can be
measured is which share of the updates each value would have touched, and whether there are outliers to cut at all.

Not covered: whether training would have gone better with another value. Norms under another clip value would have
been others; only a run tells.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_BINS = 16
"""Bins an octave."""
_RECENT = 100
_ENOUGH = 20
"""Updates below which quantiles say nothing."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A clip value and the share of updates whose norm was above it."""

    value: float
    share: float
    what: str


@dataclass(frozen=True, kw_only=True)
class ClipAdvice:
    """What the run's norms say of clip values.

    Attributes:
        updates: Finite updates that the advice is of.
        candidates: Clip values, smallest first, each with the share of updates that it would have clipped.
        suggested: One of their values, None where there is too little to go by.
        text: The advice in sentences.
    """

    updates: int
    candidates: tuple[Candidate, ...]
    suggested: float | None
    text: str

    def __str__(self) -> str:
        rows = [f"  {row.value:<10g} clips {_percent(row.share):>7}   {row.what}" for row in self.candidates]
        return "\n".join([self.text, *rows])


class NormDistribution:
    """Counts total norms of finite updates."""

    def __init__(self) -> None:
        self.bins: Counter[int] = Counter()
        self.zeros = 0
        self.updates = 0
        self.largest = 0.0
        self.recent: deque[float] = deque(maxlen=_RECENT)

    def add(self, norm: float) -> None:
        """Count the norm of one update; it is finite."""
        self.updates += 1
        self.recent.append(norm)
        if norm > 0:
            self.bins[math.floor(math.log2(norm) * _BINS)] += 1
            self.largest = max(self.largest, norm)
        else:
            self.zeros += 1

    def quantile(self, share: float) -> float:
        """Return the norm below which `share` of the updates lie, within 2.2 %; NaN without any."""
        if not self.updates:
            return math.nan
        wanted = share * self.updates
        seen = self.zeros
        if seen >= wanted:
            return 0.0
        for place in sorted(self.bins):
            seen += self.bins[place]
            if seen >= wanted:
                break
        return min(_middle(place), self.largest)

    def share_above(self, value: float) -> float:
        """Return the share of updates with a norm above `value`; NaN without any."""
        if not self.updates:
            return math.nan
        if value >= self.largest:
            return 0.0
        return sum(count for place, count in self.bins.items() if _middle(place) > value) / self.updates

    def state_dict(self) -> dict[str, Any]:
        places = sorted(self.bins)
        return {
            "places": places,
            "counts": [self.bins[place] for place in places],
            "zeros": self.zeros,
            "updates": self.updates,
            "largest": self.largest,
            "recent": list(self.recent),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.bins = Counter(dict(zip(state["places"], state["counts"], strict=True)))
        self.zeros, self.updates, self.largest = state["zeros"], state["updates"], state["largest"]
        self.recent = deque(state["recent"], maxlen=_RECENT)


def _middle(place: int) -> float:
    return 2.0 ** ((place + 0.5) / _BINS)


def advise(norms: NormDistribution, max_grad_norm: float | None) -> ClipAdvice:
    """Judge clip values by a run's norms.

    Args:
        norms: Of the run so far.
        max_grad_norm: The clip value in use, None without clipping.

    Returns:
        The advice, also when there is too little to go by: then it says so.
    """
    if norms.updates < _ENOUGH:
        text = f"{norms.updates} finite updates so far; clip values can be judged from {_ENOUGH} on."
        return ClipAdvice(updates=norms.updates, candidates=(), suggested=None, text=text)
    median, p90, p99 = (norms.quantile(share) for share in (0.5, 0.9, 0.99))
    named = {_round_up(median): "half lie below", _round_up(p90): "90 % lie below", _round_up(p99): "99 % lie below"}
    suggested = _round_up(p90 if norms.largest > 3 * median else norms.largest)
    named.setdefault(suggested, "largest")
    if max_grad_norm is not None:
        named[max_grad_norm] = "in use"
    candidates = tuple(
        Candidate(value=value, share=norms.share_above(value), what=what)
        for value, what in sorted(named.items())
        if value > 0
    )
    sentences = [
        f"Gradient norms of {norms.updates} updates: half lie below {_text(median)}, 90 % below {_text(p90)}, "
        f"99 % below {_text(p99)}, the largest was {_text(norms.largest)}.",
        _of_present(norms, max_grad_norm, median),
        _of_suggestion(norms, suggested, median),
        _of_drift(norms, median),
    ]
    text = " ".join(sentence for sentence in sentences if sentence)
    return ClipAdvice(
        updates=norms.updates, candidates=candidates, suggested=suggested if suggested > 0 else None, text=text
    )


def _of_present(norms: NormDistribution, value: float | None, median: float) -> str:
    if value is None:
        return "Nothing is clipped."
    share = norms.share_above(value)
    if share > 0.5:
        return (
            f"max_grad_norm={value:g} clips {_percent(share)} of them: most updates have the same length, which makes "
            "it a setting of the learning rate more than a guard against outliers."
        )
    if share == 0:
        return f"max_grad_norm={value:g} has clipped none of them."
    return f"max_grad_norm={value:g} clips {_percent(share)} of them."


def _of_suggestion(norms: NormDistribution, value: float, median: float) -> str:
    if not value:
        return "All norms are zero: look at what the loss depends on."
    if norms.largest <= 3 * median:
        return (
            f"There are no outliers, the largest norm is ×{norms.largest / median:.1f} of the median: clipping at "
            f"{value:g} leaves all of them and guards against what may come."
        )
    return (
        f"Clipping at {value:g} would cut the largest {norms.share_above(value):.0%} and leave the others as they are."
    )


def _of_drift(norms: NormDistribution, median: float) -> str:
    if norms.updates < 2 * len(norms.recent) or not median:
        return ""
    recent = sorted(norms.recent)[len(norms.recent) // 2]
    if 0.5 <= recent / median <= 2:
        return ""
    course = "falling" if recent < median else "growing"
    return f"Norms are {course}: the last {len(norms.recent)} have the median {_text(recent)}, so look again later."


def _round_up(value: float) -> float:
    """Return the next value with two digits that is no smaller, as one would write it in a recipe."""
    rounded = float(f"{value:.2g}")
    return rounded if rounded >= value else float(f"{value * 1.05:.2g}")


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _text(value: float) -> str:
    return f"{value:.3g}"
