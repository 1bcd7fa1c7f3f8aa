"""How far a tensor of a low format moves over many small updates, beside its fp64 twin.

    swallowed   share of exact updates that are not 0 and left the low tensor's bits as they were
    progress    <low - start, exact - start> / |exact - start|^2: the share of the way that was made, in its direction
    ratio       |low - start| / |exact - start|
    error       |low - exact| / |exact - start|
    noise       standard error of progress: what of the error lies across the way, over sqrt(elements)

`swallowed` alone is no fault: under stochastic rounding most updates leave the bits alone, and the tensor gets there.
`progress` tells: it is near 1 when what is rounded away comes back or evens out, and far below where it is lost. Noise
of rounding goes into `error` and `noise`, and for the most part not into `progress`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Movement:
    """What a `Track` has seen; all None where the exact tensor did not move."""

    swallowed: float | None = None
    progress: float | None = None
    ratio: float | None = None
    error: float | None = None
    noise: float | None = None


class Track:
    """Follows a pair of tensors.

    Args:
        exact: Returns the fp64 tensor as it is now.
        low: Returns the low one.
    """

    def __init__(self, exact: Callable[[], torch.Tensor], low: Callable[[], torch.Tensor]) -> None:
        self._exact, self._low = exact, low
        self._start = self._last = self._now()
        self._moving = self._kept = torch.zeros((), dtype=torch.long, device=self._last[0].device)

    def _now(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._exact().detach().clone(), self._low().detach().clone()

    def look(self) -> None:
        """Note which elements the update just made has moved."""
        now = self._now()
        moving = now[0] != self._last[0]
        self._kept = self._kept + (moving & (now[1] == self._last[1])).sum()
        self._moving = self._moving + moving.sum()
        self._last = now

    def movement(self) -> Movement:
        """Return the movement since the start, over elements that are finite in both."""
        exact = self._last[0] - self._start[0]
        low = self._last[1].double() - self._start[1].double()
        finite = exact.isfinite() & low.isfinite()
        exact, low = exact[finite], low[finite]
        length, moving = float(exact.norm()), int(self._moving)
        if not moving or not length:
            return Movement()
        progress, error = float((low * exact).sum()) / length**2, float((low - exact).norm()) / length
        return Movement(
            swallowed=int(self._kept) / moving,
            progress=progress,
            ratio=float(low.norm()) / length,
            error=error,
            noise=max(0.0, error**2 - (1 - progress) ** 2) ** 0.5 / low.numel() ** 0.5,
        )

    def median_ratio(self) -> float | None:
        """Return the median of low over exact, where exact is not 0; None where it always is."""
        exact, low = self._last[0], self._last[1].double()
        there = exact != 0
        return float((low[there] / exact[there]).median()) if bool(there.any()) else None
