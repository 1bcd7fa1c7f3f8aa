"""The numbers of one update's gradients, from the device to a report, without making the host wait for each.

They are laid side by side in one tensor: the norm of every gradient, where it is a closer look the largest and the sum
of magnitudes of every gradient, and at the end the loss scale where that is on the device too. One read brings all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from floatline.errors import ConfigError
from floatline.step.gradient_report import BadGradient, GradientReport
from floatline.step.magnitudes import magnitudes_of, nonfinite_counts
from floatline.step.norm import GradientNorms
from floatline.step.readback import Readback


@dataclass(frozen=True)
class Look:
    """One update's numbers, perhaps still on their way.

    Attributes:
        step: Of the monitor.
        names: Of the parameters that had a gradient.
        sizes: Their numbers of elements.
        missing: Names of trainable parameters that had none.
        numbers: What is read.
        closer: Largest and sum of magnitudes are among them.
        scale: The loss scale that the gradients carried, where it is not among them.
    """

    step: int
    names: tuple[str, ...]
    sizes: list[int]
    missing: tuple[str, ...]
    numbers: Readback
    closer: bool
    scale: float | None

    @classmethod
    @torch.no_grad()
    def start(
        cls, step: int, named: Sequence[tuple[str, torch.Tensor]], norms: GradientNorms, scale: Any, closer: bool
    ) -> Look:
        """Compute on the device, and start to read.

        Args:
            step: Of the monitor.
            named: The model's parameters.
            norms: Of their gradients.
            scale: As `GradientMonitor.check` takes it.
            closer: Look at the magnitudes as well, which reads the gradients twice more.
        """
        columns = [norms.each, *(magnitudes_of(norms) if closer else ())]
        factor = _factor(scale)
        if isinstance(factor, torch.Tensor):  # read with the others
            columns.append(factor.detach().to(norms.each.device, torch.float32).reshape(1))
        known = set(norms.names)
        missing = tuple(n for n, p in named if p.grad is None and p.requires_grad and n not in known)
        sizes = [size for group in norms.groups for size in group.sizes]
        known_scale = None if scale is None or isinstance(factor, torch.Tensor) else float(factor)
        return cls(step, norms.names, sizes, missing, Readback(torch.cat(columns)), closer, known_scale)

    def report(
        self, norms: GradientNorms | None, max_grad_norm: float | None
    ) -> tuple[GradientReport, dict[str, float]]:
        """Read; returns the report and the norm of each gradient by name, both without the loss scale.

        Args:
            norms: Where the gradients are still there, so that bad elements can be counted.
            max_grad_norm: For the report.
        """
        numbers, count = self.numbers.tolist(), len(self.names)
        scale_read = len(numbers) > (3 if self.closer else 1) * count
        carried = numbers.pop() if scale_read else self.scale or 1.0
        factor = (
            1.0 / carried if carried else math.inf
        )  # a scale that has fallen to 0: nothing of the gradients is left
        each = [value * factor for value in numbers[:count]]
        total = math.sqrt(sum(norm * norm for norm in each))
        report = GradientReport(
            step=self.step,
            norm=total,
            largest=_largest(numbers[count : 2 * count]) * factor if self.closer else None,
            mean=sum(numbers[2 * count :]) * factor / sum(self.sizes) if self.closer else None,
            bad=() if math.isfinite(total) else self._bad(each, norms),
            missing=self.missing,
            parameters=count,
            max_grad_norm=max_grad_norm,
            scaled=scale_read or self.scale is not None,
        )
        return report, dict(zip(self.names, each, strict=True))

    def _bad(self, each: list[float], norms: GradientNorms | None) -> tuple[BadGradient, ...]:
        sick = [place for place, norm in enumerate(each) if not math.isfinite(norm)]
        counts = nonfinite_counts(norms, {self.names[place] for place in sick}) if norms is not None else {}
        found = []
        for place in sick:
            nan, inf = counts.get(self.names[place], (None, None))
            found.append(BadGradient(self.names[place], nan, inf, self.sizes[place], each[place]))
        return tuple(found)


def _factor(scale: Any) -> Any:
    """Return the loss scale as a number, or a 0-d tensor that is still on the device.

    Raises:
        ConfigError: It is no positive number.
    """
    if isinstance(scale, torch.amp.GradScaler):
        on_device = getattr(scale, "_scale", None)  # get_scale() would wait for it
        return scale.get_scale() if on_device is None or not scale.is_enabled() else on_device
    if isinstance(scale, torch.Tensor) and scale.numel() == 1:
        return scale
    if scale is None or (isinstance(scale, int | float) and 0 < scale < math.inf):
        return scale
    raise ConfigError(f"scale is {scale!r}", hint="give the GradScaler, its scale as a positive number, or nothing")


def _largest(values: list[float]) -> float:
    """Return the largest of magnitudes, NaN if one is: Python's max keeps or drops it by its place."""
    return math.nan if any(value != value for value in values) else max(values)
