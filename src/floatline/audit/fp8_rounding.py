"""Operands of a product rounded to fp8, with one scale a tensor, a row or a block; and what that should cost.

The scale sends the largest value of its group to the largest of the format, `s = max / amax`; a value becomes
`round(x s) / s`. The groups:

    tensor   the whole tensor                          torchao "tensorwise"
    row      one value for each index that is kept,    torchao "rowwise"; s rounded down to a power of two
             over the whole dim that is summed
    block    128 values along the dim that is summed,  DeepSeek-V3
             128 x 128 for weights

What rounding should cost: in a binade [2^e, 2^(e+1)) the step is 2^(e-m), so the error has variance (2^(e-m))^2 / 12.
With values spread evenly over a binade's logarithm, their mean square is 1.5 / ln 2 in units of 2^(2e). So one rounding
is off by

    r(m) = 2^-m / sqrt(12) / sqrt(1.5 / ln 2)        e4m3 2.5 %, e5m2 4.9 %, bf16 0.15 %

in relative RMS (the often quoted 2^-(m+1) / sqrt(3) is its value at the bottom of a binade). In a product of two
rounded operands the two errors are independent, and a sum keeps the share as long as its terms do not cancel:

    expected = sqrt(r(a)^2 + r(b)^2)                 e4m3 with e4m3 3.5 %, with e5m2 5.5 %

Not covered: scales of MX formats (one for 32 values), the accumulator's own rounding (14 bits on Hopper, which is why
DeepSeek-V3 sums every 128 products in fp32).

Source: torchao.float8; DeepSeek-V3, arXiv:2412.19437, section 3.3.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import hypot, log, sqrt

import torch
from torch.nn import functional as F

from floatline.formats import NumberFormat, number_format
from floatline.observe.error.rounding import round_to

BLOCK = 128
SMALLEST_AMAX = 1e-12
"""A group of zeros gets this one's scale, as in torchao."""


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """One way to multiply in fp8.

    Args:
        name: "tensor", "row" or "block": what shares a scale.
        values: Format of inputs and weights.
        gradients: Format of output gradients.
    """

    name: str
    values: str = "fp8-e4m3"
    gradients: str = "fp8-e4m3"


SCHEMES = (Scheme(name="tensor", gradients="fp8-e5m2"), Scheme(name="row"), Scheme(name="block"))
"""torchao's tensorwise and rowwise recipes, and DeepSeek-V3's tiles."""


def rounding_rms(fmt: NumberFormat | str) -> float:
    """Return the relative RMS error of one rounding to the nearest value of a format.

    >>> round(rounding_rms("fp8-e4m3"), 4), round(rounding_rms("fp8-e5m2"), 4)
    (0.0245, 0.0491)
    """
    fmt = number_format(fmt) if isinstance(fmt, str) else fmt
    return 2.0**-fmt.mantissa_bits / sqrt(12) / sqrt(1.5 / log(2))


def expected_error(left: str, right: str) -> float:
    """Return the relative RMS error of a product whose operands were rounded to two formats."""
    return hypot(rounding_rms(left), rounding_rms(right))


def quantised(values: torch.Tensor, fmt: str, scaling: str, dim: int, *, square: bool = False) -> torch.Tensor:
    """Return a matrix rounded to fp8 and scaled back.

    Args:
        values: (rows, columns), fp32 or fp64.
        fmt: "fp8-e4m3" or "fp8-e5m2".
        scaling: "tensor", "row", "block", or "none" for a bare cast that saturates.
        dim: The dim that the product sums over: 0 or 1.
        square: Blocks of 128 x 128, as weights have them.
    """
    if scaling == "none":
        return round_to(values, fmt, saturate=True)
    scale = _scales(values, number_format(fmt).max, scaling, dim, square)
    return round_to(values * scale, fmt, saturate=True).div_(scale)


def _scales(values: torch.Tensor, largest: float, scaling: str, dim: int, square: bool) -> torch.Tensor:
    if scaling == "tensor":
        return largest / values.abs().amax().clamp(min=SMALLEST_AMAX)
    if scaling == "row":
        scale = largest / values.abs().amax(dim, keepdim=True).clamp(min=SMALLEST_AMAX)
        return scale.log2().floor().exp2()
    amax = _block_amax(values, dim, square)
    return (largest / amax.clamp(min=SMALLEST_AMAX))[: values.shape[0], : values.shape[1]]


def _block_amax(values: torch.Tensor, dim: int, square: bool) -> torch.Tensor:
    """Return the largest magnitude of each value's block, at every value of a matrix padded to whole blocks."""
    height, width = (BLOCK, BLOCK) if square else (BLOCK, 1) if dim == 0 else (1, BLOCK)
    rows, columns = values.shape
    padded = F.pad(values.abs(), (0, -columns % width, 0, -rows % height))
    blocks = padded.view(padded.shape[0] // height, height, padded.shape[1] // width, width)
    return blocks.amax((1, 3)).repeat_interleave(height, 0).repeat_interleave(width, 1)


@dataclass(frozen=True, kw_only=True)
class OperandError:
    """What rounding did to one operand.

    Attributes:
        underflow: Share of the values other than zero that became zero.
        saturated: Share of the values that were beyond the format's largest.
        sqnr_db: Signal to quantisation noise in dB; inf where nothing was rounded.
    """

    underflow: float
    saturated: float
    sqnr_db: float


def operand_error(values: torch.Tensor, fmt: str, scaling: str, dim: int, *, square: bool = False) -> OperandError:
    """Measure `quantised` with the same arguments."""
    rounded = quantised(values, fmt, scaling, dim, square=square)
    size = values.abs().amax().clamp(min=torch.finfo(values.dtype).tiny)  # squares of what is left cannot overflow
    signal, noise = (((part / size).square().sum()).item() for part in (values, rounded - values))
    there = values.count_nonzero().item()
    lost = (there - rounded.count_nonzero().item()) / max(there, 1)
    beyond = int((values.abs() > number_format(fmt).max).sum()) / values.numel() if scaling == "none" else 0.0
    ratio = signal / noise if noise else float("inf")
    return OperandError(underflow=lost, saturated=beyond, sqnr_db=10 * log(ratio, 10) if ratio > 0 else 0.0)
