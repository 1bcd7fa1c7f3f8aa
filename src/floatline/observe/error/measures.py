"""What one op loses in a lower format, from its result there, in fp32 and in fp64 on the same exact inputs.

    error        sqrt(mean((low - exact)^2)) / sqrt(mean(exact^2)), relative RMSE; the inputs are rounded too
    error_fp32   the same for fp32: what nobody can blame on the lower format
    ulps         error in units of the format's eps: rounding alone is about 0.4 of it
    overflow     share of finite exact values beyond the format's end (or that came out not finite)
    underflow    share of nonzero exact values that are zero there and too small for it. What is zero though the format
                 could hold it has cancelled, or was absorbed by a larger number: that is rounding
    subnormal    share that keeps some bits only
    headroom     bits between the largest exact value and the format's end

Large tensors are sampled for means and shares; extremes and what is not finite are looked for in all of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from floatline.formats import FORMATS, NumberFormat

SAMPLE = 2**16
"""Elements that are looked at of a large tensor, evenly spaced; a relative RMSE of so many is good to 1 %."""
HALVES = frozenset({torch.float16, torch.bfloat16})
ILL = 0.02
"""Relative error in fp32 from which no half format is to blame: all but noise has cancelled. Below it fp32 is worth
keeping, for bf16 is 65,536 times coarser and fp16 8,192 times: nothing would be left of the result there."""
HALF_FILL, AROUND = -65504.0, 256.0
"""fp16's own lowest number is a fill as well, with a score added to it or without."""
FILL = -1e8
"""Values at or below it are taken for the fill of a mask: no activation is there, and -inf masks as well."""
_BY_DTYPE = {f"torch.{fmt.torch_name}": fmt for fmt in FORMATS.values() if fmt.torch_name}


def format_of(dtype: torch.dtype) -> NumberFormat:
    """Return the number format of a floating dtype."""
    return _BY_DTYPE[str(dtype)]


@dataclass(frozen=True, kw_only=True)
class Measure:
    """The loss of one op, or of several calls of it (`joined`).

    Attributes:
        format: Format of its result, by its short name.
        numel: Elements of the result.
        error: Relative RMSE on exact inputs, `inf` where the result is not finite and the exact one is.
        error_fp32: The same in fp32.
        overflow: Share, 0 to 1.
        underflow: Share of the nonzero values.
        underflow_error: Relative RMSE of flushing those alone: whether they carry weight.
        subnormal: Share of the nonzero values.
        headroom: Bits; negative where values lie beyond the end, `inf` where all are zero.
        reached: Relative RMSE of the result in the whole step that is in the lower format: local and propagated.
        power: Sum of the squares of the exact values: what a call weighs among several.
    """

    format: str
    numel: int
    error: float
    error_fp32: float
    overflow: float
    underflow: float
    underflow_error: float
    subnormal: float
    headroom: float
    reached: float
    power: float = 1.0

    @property
    def ulps(self) -> float:
        """Error in units of the format's eps; rounding alone is about 0.4."""
        return self.error / (FORMATS[self.format].eps or 1.0)

    @property
    def sound(self) -> bool:
        """Whether fp32 computes it well."""
        return self.error_fp32 <= ILL

    def worst(self, other: Measure) -> Measure:
        """Return the worse of two calls, number by number."""
        return replace(
            self,
            numel=max(self.numel, other.numel),
            error=max(self.error, other.error),
            error_fp32=max(self.error_fp32, other.error_fp32),
            overflow=max(self.overflow, other.overflow),
            underflow=max(self.underflow, other.underflow),
            underflow_error=max(self.underflow_error, other.underflow_error),
            subnormal=max(self.subnormal, other.subnormal),
            headroom=min(self.headroom, other.headroom),
            reached=max(self.reached, other.reached),
            power=self.power + other.power,
        )

    def joined(self, other: Measure) -> Measure:
        """Return two calls of one line as one: extremes as `worst`, errors as those of one tensor with both results.

        In a loop there is nearly always a turn in which a difference is small by chance and badly off; it weighs
        little in what the loop comes to.
        """
        return replace(
            self.worst(other),
            error=_together(self, other, "error"),
            error_fp32=_together(self, other, "error_fp32"),
            underflow_error=_together(self, other, "underflow_error"),
            reached=_together(self, other, "reached"),
        )


def measure(
    exact: torch.Tensor,
    low: torch.Tensor,
    fp32: torch.Tensor | None,
    reached: torch.Tensor | None,
    *,
    excused: bool = False,
) -> Measure:
    """Compare one result of an op.

    Args:
        exact: fp64, of exact inputs.
        low: In the lower format, of the same inputs rounded.
        fp32: In fp32, of the same inputs; None where that could not be run.
        reached: In the step that really ran.
        excused: Its inputs do not fit in the format that it was given: what it makes of their infinities is no fault
            of its own, only what of its exact result does not fit either.

    Returns:
        Its measure.
    """
    number_format = format_of(low.dtype)
    lowest, highest = _ends(exact)
    lost = not excused and not _is_finite(low) and _lost(low, exact)
    plain = not _may_fill(lowest) and math.isfinite(highest)
    largest = max(abs(highest), abs(lowest)) if plain else _largest(exact)
    samples = [None if t is None else sampled(t).double() for t in (low, fp32, reached)]
    e, l_, f, r = _unmasked(lowest, sampled(exact), *samples)
    size = e.abs()
    scale = _rms(e)
    l_ = e if excused else l_
    end = _end(number_format)
    beyond = (size > end) & torch.isfinite(e)
    least = number_format.min_subnormal or number_format.min_normal
    zeros = (l_ == 0) & (e != 0) & (size < least)
    nonzero = max(int((e != 0).sum()), 1)
    small = (size < number_format.min_normal) & (e != 0) & ~zeros
    return Measure(
        format=number_format.name,
        numel=exact.numel(),
        error=math.inf if lost else _error(l_, e, scale),
        error_fp32=_error(f, e, scale) if f is not None else 0.0,
        overflow=max(float(beyond.sum()) / max(e.numel(), 1), 1 / exact.numel() if lost else 0.0),
        underflow=float(zeros.sum()) / nonzero,
        underflow_error=_rms(torch.where(zeros, e, 0.0)) / scale if scale else 0.0,
        subnormal=float(small.sum()) / nonzero,
        headroom=math.log2(number_format.max / largest) if largest else math.inf,
        reached=_error(r, e, scale) if r is not None else 0.0,
        power=scale**2 * exact.numel(),
    )


def _together(one: Measure, other: Measure, name: str) -> float:
    parts = [(getattr(m, name), m.power) for m in (one, other)]
    if not one.power + other.power or not all(math.isfinite(error) for error, _ in parts):
        return max(error for error, _ in parts)
    return math.sqrt(sum(error**2 * power for error, power in parts) / sum(power for _, power in parts))


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the relative RMSE of a tensor; `inf` where it has another shape, or is not finite and the exact one is."""
    if value.shape != exact.shape:
        return math.inf
    if not _is_finite(value) and _lost(value, exact):
        return math.inf
    value, exact = sampled(value).double(), sampled(exact).double()
    return _error(value, exact, _rms(exact))


def overflows(exact: torch.Tensor, dtype: torch.dtype) -> bool:
    """Say whether a finite value that is no mask's fill becomes infinite in a dtype."""
    if not exact.numel():
        return False
    end = _end(format_of(dtype))
    lowest, highest = _ends(exact)
    return not (lowest >= -end and highest <= end) and _largest(exact) > end


def sampled(tensor: torch.Tensor) -> torch.Tensor:
    """Return at most about `SAMPLE` elements of a tensor, flat and evenly spaced."""
    if tensor.numel() <= SAMPLE:
        return tensor.detach().reshape(-1)
    step = -(-tensor.numel() // SAMPLE)
    if tensor.is_contiguous():
        return tensor.detach().view(-1)[::step]
    places = torch.arange(0, tensor.numel(), step, device=tensor.device)
    return tensor.detach()[torch.unravel_index(places, tensor.shape)]


def _end(fmt: NumberFormat) -> float:
    """Return the largest value that does not round to infinity."""
    return fmt.max * (1 + (fmt.eps or 0.0) / 4)


def _rms(tensor: torch.Tensor) -> float:
    finite = torch.where(torch.isfinite(tensor), tensor, 0.0)
    return float(finite.square().mean().sqrt()) if tensor.numel() else 0.0


def _error(value: torch.Tensor, exact: torch.Tensor, scale: float) -> float:
    """Infinities that both have are no error; mask fills beside which all else is tiny count by their own size."""
    if not value.numel():
        return 0.0
    same = value == exact
    difference = torch.where(same | (torch.isnan(value) & torch.isnan(exact)), 0.0, value - exact)
    error = float(difference.square().mean().sqrt())
    if math.isnan(error) or math.isinf(error):
        return math.inf
    return error / scale if scale else (math.inf if error else 0.0)


def _unmasked(lowest: float, exact: torch.Tensor, *others: torch.Tensor | None) -> tuple[Any, ...]:
    """Return the tensors with zeros where the exact one is the fill of a mask."""
    if not _may_fill(lowest):
        return (exact, *others)
    fill = _fills(exact)
    return tuple(None if tensor is None else tensor.masked_fill(fill, 0) for tensor in (exact, *others))


def _may_fill(lowest: float) -> bool:
    return lowest <= HALF_FILL + AROUND


def _fills(exact: torch.Tensor) -> torch.Tensor:
    """Say which values are the fill of a mask."""
    return (exact <= FILL) | ((exact - HALF_FILL).abs() <= AROUND)


def _ends(tensor: torch.Tensor) -> tuple[float, float]:
    """Return the smallest and the largest value; NaN where there is one."""
    low, high = torch.aminmax(tensor)
    return float(low), float(high)


def _is_finite(tensor: torch.Tensor) -> bool:
    return not tensor.numel() or all(map(math.isfinite, _ends(tensor)))


def _lost(value: torch.Tensor, exact: torch.Tensor) -> bool:
    """Say whether any element is not finite though the exact one is, and is no fill."""
    return bool((~torch.isfinite(value) & torch.isfinite(exact) & ~_fills(exact)).any())


def _largest(exact: torch.Tensor) -> float:
    """Return the largest magnitude among the finite values that are no fill."""
    return float(torch.where(torch.isfinite(exact) & ~_fills(exact), exact, 0.0).abs().amax())
