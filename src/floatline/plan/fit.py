"""Does it fit: a probability, not a yes.

A prediction has an error. It is taken to be normal, with a standard deviation that grows with what is predicted: the
weights' bytes are exact, activations, temporaries and fragmentation are not. The chance that the run fits is the chance
that the true peak stays under what the device has, less a reserve for surprises (a longer batch, another process, a
library that takes a buffer of its own).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from floatline.hardware import Hardware

RELATIVE_ERROR = 0.02
"""Standard deviation of what is predicted besides weights, gradients and state, as a share of it."""
ABSOLUTE_ERROR = 64 * 2**20
"""Standard deviation of what is not predicted at all: libraries' own buffers, context."""
RESERVE_SHARE = 0.02
"""Share of the device's memory that is left for surprises."""
FITS, TIGHT = 0.95, 0.5


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Whether a predicted peak fits.

    Attributes:
        capacity: Bytes that the device has.
        needed: Predicted peak in bytes, context included.
        reserve: Bytes left for surprises.
        deviation: Standard deviation of the prediction in bytes.
        chance: Probability that the true peak, with the reserve, stays within the capacity.
    """

    capacity: int
    needed: int
    reserve: int
    deviation: int
    chance: float

    @property
    def margin(self) -> int:
        """Bytes between the predicted peak and the capacity; negative where it is over."""
        return self.capacity - self.needed

    @property
    def verdict(self) -> str:
        """ "fits", "tight" (it may run, a surprise ends it) or "does not fit"."""
        return "fits" if self.chance >= FITS else "tight" if self.chance >= TIGHT else "does not fit"

    @property
    def band(self) -> tuple[int, int]:
        """Bytes between which the true peak lies nine times in ten."""
        return self.needed - round(1.645 * self.deviation), self.needed + round(1.645 * self.deviation)

    def __bool__(self) -> bool:
        return self.chance >= FITS


BAND = (
    f"the error band is assumed: a standard deviation of {RELATIVE_ERROR:.0%} of what is not weights, gradients or "
    f"state, and {ABSOLUTE_ERROR // 2**20} MiB; traces agree with a CPU's allocator, "
    "they were not yet compared with a GPU's"
)
"""What a reader must know of chance and band."""


def fit_of(needed: int, certain: int, hardware: Hardware) -> Fit:
    """Return whether a peak fits.

    Args:
        needed: Predicted peak in bytes, with context.
        certain: Bytes of it whose size is known exactly (weights, gradients, optimizer state).
        hardware: The device.

    >>> from floatline.hardware import resolve
    >>> fit_of(8 * 2**30, 4 * 2**30, resolve("t4")).verdict, fit_of(15 * 2**30, 4 * 2**30, resolve("t4")).verdict
    ('fits', 'does not fit')
    """
    deviation = math.hypot(RELATIVE_ERROR * max(0, needed - certain), ABSOLUTE_ERROR)
    reserve = round(RESERVE_SHARE * hardware.memory)
    spare = hardware.memory - reserve - needed
    chance = 0.5 * math.erfc(-spare / (deviation * math.sqrt(2)))
    return Fit(
        capacity=hardware.memory, needed=needed, reserve=reserve, deviation=round(deviation), chance=round(chance, 4)
    )
