"""Which layers are nearest to overflow: bits between the largest output of a module and the end of its half format.

One bit is a factor of 2. The guard samples a step now and then (`guard.sample_every`) and logs the modules that have
the least; of those the table tells how low each was over the whole run, and how it stands.

Not covered: what lies between two samples, and outputs inside of a module.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from floatline.report.load import RunData

MOST = 8


@dataclass(frozen=True, kw_only=True)
class Tight:
    """One module.

    Attributes:
        module: Its dotted name.
        least: Bits, the least of all samples.
        at: The update of that sample.
        last: Bits in the last sample that tells of it.
    """

    module: str
    least: float
    at: int
    last: float

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """As text for a table."""
        return self.module, f"{self.least:.1f}", str(self.at), f"{self.last:.1f}"


def tightest(run: RunData, most: int = MOST) -> list[Tight]:
    """Return the modules with the least headroom, the least first.

    Args:
        run: The run.
        most: At most so many.
    """
    found: dict[str, Tight] = {}
    for sample in run.headroom:
        for module, bits in sample.bits.items():
            known = found.get(module, Tight(module=module, least=bits, at=sample.step, last=bits))
            lower = replace(known, least=bits, at=sample.step) if bits < known.least else known
            found[module] = replace(lower, last=bits)
    return sorted(found.values(), key=lambda tight: (tight.least, tight.module))[:most]
