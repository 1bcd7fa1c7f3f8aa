"""Tell a loss that jumps from one that is merely noisy: a robust z-score against the losses before it."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque

WINDOW = 64
"""Losses that a spike is measured against; none is called before half of them are there."""
SPIKE = 12.0
"""Robust z-score of a spike. Losses of small batches have heavier tails than a normal distribution."""
RANGE = 4.0
"""Standard deviations that the highest of a window's losses counts for: a spike is three times as far out."""


class Spikes:
    """Calls a loss that is far above what it was.

    >>> spikes = Spikes()
    >>> for loss in [2.0, 2.1, 1.9, 2.05] * 10:
    ...     assert spikes.score(loss) is None
    >>> spikes.score(9.0) > 12
    True
    """

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._sorted: list[float] = []
        self._row = 0

    def score(self, loss: float) -> float | None:
        """Return the robust z-score of a loss that is a spike, else None; a spike is not added to the window."""
        if len(self._recent) >= WINDOW // 2 and loss > self._sorted[-1]:
            middle = self._sorted[len(self._sorted) // 2]
            z = (loss - middle) / self._spread(middle)
            if z > SPIKE:
                self._row += 1
                if self._row == WINDOW // 2:  # no spike: the loss lies there now
                    self._recent.clear()
                    self._sorted.clear()
                    self._row = 0
                return z
        self._row = 0
        if len(self._recent) == WINDOW:
            del self._sorted[bisect_left(self._sorted, self._recent[0])]
        self._recent.append(loss)
        insort(self._sorted, loss)
        return None

    def _spread(self, middle: float) -> float:
        """Return the window's spread in standard deviations of a normal distribution.

        The largest of MAD, mean deviation (a loss that is 0 mostly has a MAD of 0) and a part of the range, which is
        wide for losses with a heavy tail.
        """
        away = sorted(abs(other - middle) for other in self._sorted)
        mad, mean = away[len(away) // 2], sum(away) / len(away)
        reach = (self._sorted[-1] - middle) / RANGE
        return max(1.4826 * mad, 1.2533 * mean, reach) + 1e-2 * abs(middle) + 1e-12
