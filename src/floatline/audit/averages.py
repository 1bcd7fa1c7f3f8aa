"""Whether a running average still moves in a format: BatchNorm statistics, averages of weights, loss meters.

    average <- decay * average + (1 - decay) * value

changes the average by (1 - decay) times its distance to the value. Once that is less than half an ulp, rounding to
nearest gives the old bits again, so the average stalls at a distance of up to ulp / (2 (1 - decay)): under decay 0.999
in bf16 that is 2 to 4 times the average itself, and an average that falls never gets anywhere. decay 0.99 leaves 20 to
40 %, 0.9 (BatchNorm's usual momentum of 0.1) 2 to 4 %.

The update is `Tensor.lerp_`, one rounding, the way torch.optim.swa_utils writes it; two roundings (`mul_`, then
`add_`) do no better.

Not covered: bias correction; averages that are kept as a sum and a count.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from floatline.audit.movement import Movement, Track
from floatline.audit.update_run import torch_dtype
from floatline.errors import ConfigError, did_you_mean

HALVES = ("fp32", "bf16", "fp16")
ARRIVED = 0.01
"""Share of the way that is left when a constant target counts as reached, in fp64."""
MOST = 20_000
"""Updates towards a constant target."""
STUCK = 0.9
"""Share of the way below which an average counts as stalled."""


@dataclass(frozen=True, kw_only=True)
class AverageReport:
    """What became of a running average.

    Attributes:
        format: Of the average.
        decay: What is kept of it in an update.
        steps: Updates made.
        movement: How it moved beside fp64; `swallowed` is the share of updates without effect.
        stalled_at: Update after which no element changed its bits; None if some did in the last one.
        off_by: Largest distance to the fp64 average at the end, in units of the average's largest value.
        non_finite: Some element left the format.
    """

    format: str
    decay: float
    steps: int
    movement: Movement
    stalled_at: int | None
    off_by: float
    non_finite: bool

    @property
    def failure(self) -> Literal["stagnation", "range"] | None:
        """The kind of failure, None where the average follows."""
        if self.non_finite:
            return "range"
        progress = self.movement.progress
        return "stagnation" if self.movement.swallowed and progress is not None and progress < STUCK else None

    @property
    def advice(self) -> str:
        """What to change, in one sentence; empty where nothing is asked for."""
        if self.failure == "range":
            return f"keep this average in fp32: its values leave {self.format}"
        if self.failure is None:
            return ""
        if self.format == "fp32":
            return (
                f"keep this average in fp64, or lower its decay ({self.decay:g}): an update is below what fp32 resolves"
            )
        return f"keep this average in fp32: under decay {self.decay:g} an update is below what {self.format} resolves"

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**asdict(self), "failure": self.failure, "advice": self.advice}


def audit_average(
    values: Sequence[torch.Tensor] | tuple[Any, Any], decay: float, format: str = "bf16", *, steps: int | None = None
) -> AverageReport:
    """Say whether a running average with this decay moves in a format as it does in fp64.

    Args:
        values: A list of tensors of one shape, averaged in order, the first one being the start; or a tuple
            (start, target) of numbers or tensors, for an average on its way to a value that stays.
        decay: What is kept in an update: 0.9 for BatchNorm's momentum of 0.1, 0.999 for an average of weights.
        format: Of the average: "fp32", "bf16" or "fp16".
        steps: Updates towards a target; None makes as many as fp64 needs for 99 % of the way, at most 20,000.

    Returns:
        How it moved, and where it stalled.

    Raises:
        ConfigError: A decay outside of (0, 1), an unknown format, or values that are no such tensors or not finite.

    >>> report = audit_average((1.0, 0.5), decay=0.999, format="bf16")
    >>> report.failure, report.stalled_at
    ('stagnation', 0)
    >>> audit_average((1.0, 0.5), decay=0.999, format="fp32").failure is None
    True
    """
    if not (isinstance(decay, (int, float)) and 0 < decay < 1):
        raise ConfigError(f"decay={decay!r} is not between 0 and 1", hint="BatchNorm's momentum m is a decay of 1 - m")
    if format not in HALVES:
        raise ConfigError(f"unknown format of an average {format!r}", hint=did_you_mean(str(format), HALVES))
    if steps is not None and steps < 1:
        raise ConfigError(f"steps={steps!r} is not a count", hint="give 1 or more")
    start, stream, count = _stream(values, decay, steps)
    return _run(start, stream, count, decay, format)


def _stream(values: Any, decay: float, steps: int | None) -> tuple[torch.Tensor, Iterable[torch.Tensor], int]:
    """Return the start in fp64, what is averaged, and how many updates that makes."""
    is_way = isinstance(values, tuple) and len(values) == 2
    tensors = [torch.as_tensor(value).detach().double() for value in values]
    if len(tensors) < 2:
        raise ConfigError(f"{len(tensors)} values make no average", hint="give 2 or more tensors, or (start, target)")
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) > 1 or not tensors[0].numel():
        raise ConfigError(f"values of an average have shapes {sorted(shapes)}", hint="give tensors of one shape")
    if not all(torch.isfinite(tensor).all() for tensor in tensors):
        raise ConfigError(
            "values of an average hold NaN or infinity already", hint="find the origin: floatline diagnose"
        )
    if not is_way:
        return tensors[0], tensors[1:], len(tensors) - 1
    count = steps or min(MOST, math.ceil(math.log(ARRIVED) / math.log(decay)))
    return tensors[0], (tensors[1] for _ in range(count)), count


def _run(start: torch.Tensor, stream: Iterable[torch.Tensor], count: int, decay: float, name: str) -> AverageReport:
    low = start.to(torch_dtype(name))
    exact = low.double()  # both start from the same value
    track = Track(lambda: exact, lambda: low)
    last_change = 0
    for step, value in enumerate(stream, start=1):
        before = low.clone()
        exact.lerp_(value, 1 - decay)
        low.lerp_(value.to(low.dtype), 1 - decay)
        track.look()
        last_change = step if not torch.equal(before, low) else last_change
    finite = bool(low.isfinite().all())
    off = float((low.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-300)) if finite else math.inf
    return AverageReport(
        format=name,
        decay=decay,
        steps=count,
        movement=track.movement(),
        stalled_at=last_change if last_change < count else None,
        off_by=off,
        non_finite=not finite,
    )
