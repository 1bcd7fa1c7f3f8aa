"""Round tensors to any format of `formats.py`, on any device, whether or not torch has the dtype.

A value with exponent `e` (clamped from below at the format's smallest normal one, which makes the subnormals) lies on a
grid of step `u = 2^(e - m)`. Two ways to put it there, in fp64, where every step of them is exact:

    nearest, ties to even      (x + c) - c  with c = 1.5 * 2^52 u: the sum has no bits left below u
                               (in fp32 with 2^23 where the format is narrow enough, which takes half the time)
    stochastic                 floor(x / u) * u, one step up with probability frac(x / u)

Above the largest finite value the format's own rule holds: inf for IEEE formats, NaN where the top code is the only
special one (e4m3fn, e8m0), the largest value where there is none (e2m1). torch's own cast to e4m3fn saturates since
2.12 (pytorch#178817) and gave NaN before; pass `saturate=True` for the new behaviour on every version.

Choices: tf32 has no subnormals in this table, so a result below its smallest normal is zero. e8m0 has neither sign nor
zero: negative values become NaN, small ones its smallest power of two, ties go up. NaN stays NaN, even in e2m1, so that
it is not hidden.

Not covered: rounding modes other than these two, hardware that flushes subnormals to zero, block scales.
"""

from __future__ import annotations

import torch

from floatline.errors import ConfigError
from floatline.formats import NumberFormat, TopCodes, number_format

_LAYOUT = {torch.float64: (torch.int64, 0x7FF0000000000000, 52), torch.float32: (torch.int32, 0x7F800000, 23)}
"""How a working dtype is laid out: integer of its size, exponent field, mantissa bits."""
_BY_CAST = {"fp32", "bf16", "fp16"}
"""Formats to which torch rounds fp32 correctly, in one vectorised pass (its casts of fp64 to halves round twice)."""


@torch.no_grad()
def round_to(
    tensor: torch.Tensor,
    fmt: NumberFormat | str,
    *,
    stochastic: bool = False,
    generator: torch.Generator | None = None,
    saturate: bool = False,
) -> torch.Tensor:
    """Return `tensor` with every value rounded to `fmt`, in the dtype that came in.

    Args:
        tensor: fp32 or fp64, any shape and device. It is not changed.
        fmt: A format or its name: fp32, tf32, fp16, bf16, fp8-e4m3, fp8-e5m2, fp4-e2m1, e8m0.
        stochastic: Round up with the probability that makes the expected value exact, instead of to the nearest.
        generator: Random numbers for `stochastic`; torch's own when None.
        saturate: Values out of range, infinities too, become the largest finite one.

    Returns:
        A new tensor without a gradient. Values that `fmt` holds come back bit for bit.

    Raises:
        ConfigError: The tensor is not fp32 or fp64, or the format is unknown.

    >>> round_to(torch.tensor([257.0, 1e-50], dtype=torch.float64), "bf16").tolist()
    [256.0, 0.0]
    """
    fmt = number_format(fmt) if isinstance(fmt, str) else fmt
    if tensor.dtype not in (torch.float32, torch.float64):
        raise ConfigError(
            f"cannot round a tensor of {tensor.dtype}; allowed are float32 and float64",
            hint="widen it first: tensor.float()",
        )
    if _holds_all(fmt, tensor.dtype):
        return tensor.clamp(-fmt.max, fmt.max) if saturate else tensor.clone()
    if fmt.name in _BY_CAST and not stochastic and (tensor.dtype is torch.float32 or fmt.name == "fp32"):
        return _by_cast(tensor, fmt, saturate)
    wide = tensor if _narrow(fmt) and not stochastic else tensor.double()
    # Twice the maximum is out of range as well, and keeps the step of what is far out finite.
    near = wide.clamp(-2 * fmt.max, 2 * fmt.max)
    rounded = _stochastic(near, fmt, generator) if stochastic else _nearest(near, fmt)
    return _settle(rounded, wide, fmt, saturate).to(tensor.dtype)


def _holds_all(fmt: NumberFormat, dtype: torch.dtype) -> bool:
    """Every value of `dtype` is one of the format."""
    return fmt.name == "fp64" or (fmt.name == "fp32" and dtype is torch.float32)


def _narrow(fmt: NumberFormat) -> bool:
    """fp32 has range and bits enough to round to the format by an addition."""
    return fmt.signed and fmt.max * 2.0 ** (25 - fmt.mantissa_bits) < 2.0**127 and fmt.mantissa_bits <= 10


def _by_cast(tensor: torch.Tensor, fmt: NumberFormat, saturate: bool) -> torch.Tensor:
    if saturate:
        tensor = tensor.clamp(-fmt.max, fmt.max)
    return tensor.to(getattr(torch, fmt.torch_name)).to(tensor.dtype)


def _binade(wide: torch.Tensor, fmt: NumberFormat) -> torch.Tensor:
    """Return 2^e of each value: its exponent field read as a number, at least the smallest normal one."""
    integer, exponent_field, _ = _LAYOUT[wide.dtype]
    return (wide.view(integer) & exponent_field).view(wide.dtype).clamp_(min=fmt.min_normal)


def _nearest(wide: torch.Tensor, fmt: NumberFormat) -> torch.Tensor:
    magic = _binade(wide, fmt).mul_(1.5 * 2.0 ** (_LAYOUT[wide.dtype][2] - fmt.mantissa_bits))
    return (wide + magic).sub_(magic)


def _stochastic(wide: torch.Tensor, fmt: NumberFormat, generator: torch.Generator | None) -> torch.Tensor:
    step = _binade(wide, fmt).mul_(2.0**-fmt.mantissa_bits)
    steps = wide / step
    below = steps.floor()
    draw = torch.rand(wide.shape, dtype=torch.float64, device=wide.device, generator=generator)
    return (below + (draw < steps - below)).mul_(step)


def _settle(rounded: torch.Tensor, wide: torch.Tensor, fmt: NumberFormat, saturate: bool) -> torch.Tensor:
    """Do what the format does at its two ends, and give zeros their sign back."""
    if not fmt.signed:
        rounded = rounded.clamp(min=fmt.min_normal).masked_fill_(wide < 0, torch.nan)
    elif fmt.min_subnormal is None:
        rounded = rounded.masked_fill(rounded.abs() < fmt.min_normal, 0.0)
    if saturate or fmt.top is TopCodes.FINITE:
        rounded = rounded.clamp(-fmt.max, fmt.max)
    else:
        beyond = torch.inf if fmt.top is TopCodes.IEEE else torch.nan
        rounded = rounded.masked_fill(rounded.abs() > fmt.max, beyond)
    return rounded.copysign(wide) if fmt.signed else rounded
