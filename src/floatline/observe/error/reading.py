"""What the meter has read of one op of a program: all its calls together."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

from floatline.observe.error.measures import Measure
from floatline.observe.finite.origins import Spot


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One op of a program, all its calls together.

    Attributes:
        spot: Where it is; in the backward the forward op whose derivative it is.
        phase: "forward" or "backward".
        ran: Name of the op that ran: in the backward that of the derivative's formula.
        measure: The worst of its calls; None where it has only decided.
        calls: How many.
        flipped: Decisions that came out otherwise.
        flipped_here: Those that do so on exact inputs, rounded to the format.
        decisions: Decisions in all.
        stalled: Worst share that a running sum would lose (sums.py), or a loop of additions has lost (chains.py); None
            for other ops.
        flops: Of all calls.
    """

    spot: Spot
    phase: str
    ran: str
    measure: Measure | None
    calls: int = 1
    flipped: int = 0
    flipped_here: int = 0
    decisions: int = 0
    stalled: float | None = None
    flops: int = 0

    @property
    def key(self) -> Hashable:
        """What calls of one op have in common."""
        return self.phase, self.spot.module, self.spot.op, self.ran, self.spot.line

    def joined(self, other: Reading) -> Reading:
        """Return both as one."""
        pair = [m for m in (self.measure, other.measure) if m is not None]
        stalls = [s for s in (self.stalled, other.stalled) if s is not None]
        return replace(
            self,
            measure=None if not pair else pair[0] if len(pair) == 1 else pair[0].joined(pair[1]),
            calls=self.calls + other.calls,
            flipped=self.flipped + other.flipped,
            flipped_here=self.flipped_here + other.flipped_here,
            decisions=self.decisions + other.decisions,
            stalled=max(stalls) if stalls else None,
            flops=self.flops + other.flops,
        )
