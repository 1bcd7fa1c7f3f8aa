"""Stochastic rounding in fp32, quick enough for large weights.

    steps = x / 2^(e - m)              of the format; exact, for it divides by a power of two
    floor(steps), one more with the probability steps - floor(steps), times 2^(e - m)

is what observe/error/rounding.py does in fp64, for every format of the catalog and with 53 bits of randomness. fp32
holds all of it for the half formats (a step is split into 2^13 parts at least), and takes a fraction of the time. On a
model with a vocabulary of 50,000 most of what a step under stochastic rounding costs is the cast of one matrix.

Values that are not finite stay as they are; beyond the format's end they become infinite, as in rounding to nearest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map

from floatline.observe.error.measures import format_of
from floatline.observe.error.meter import HALVES
from floatline.observe.error.stochastic import StochasticRounding, _rounds, _widened
from floatline.observe.real import tensors_in

_EXPONENT = 0x7F800000


class Dice(StochasticRounding):
    """`StochasticRounding` with this rounding."""

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        if not _rounds(func, args, kwargs, out):
            return out
        try:
            wide = func(*tree_map(_widened, args), **tree_map(_widened, kwargs))
        except Exception:  # no kernel for it
            return out
        for result, exact in zip(tensors_in(out), tensors_in(wide)):
            if result.dtype in HALVES and result.shape == exact.shape and exact.dtype == torch.float32:
                result.copy_(rounded_by_dice(exact, result.dtype, self._bits(result)))
        return out


def rounded_by_dice(wide: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Round values up or down at random, so that the mean is exact.

    Args:
        wide: fp32.
        dtype: A half format.
        generator: Of the random bits.

    Returns:
        The rounded values in `dtype`.
    """
    fmt = format_of(dtype)
    step = (wide.contiguous().view(torch.int32) & _EXPONENT).view(torch.float32).clamp_(min=fmt.min_normal)
    step.mul_(2.0**-fmt.mantissa_bits)
    share = wide / step
    below = share.floor()
    draw = torch.rand(wide.shape, device=wide.device, generator=generator, dtype=torch.float32)
    rounded = below.add_(draw < share.sub_(below)).mul_(step)
    return torch.where(torch.isfinite(wide), rounded, wide).to(dtype)
