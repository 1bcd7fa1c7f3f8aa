"""Stochastic rounding: pure bf16 training in which small updates happen with small probability.

A weight is rounded up or down at random so that its mean is the exact result: 8 bytes a parameter with Adam (weights,
gradients and two moments in bf16), half of fp32 training. The price is noise of about half a spacing in each weight;
`kahan` has none and costs 2 bytes more.

It is for `bf16-true` and works with any optimizer of torch.optim; optim_steps/wide_step.py says how. Where the weights
are fp32 it changes no bit, and a note says so. Two runs with the same seed round alike.

torchao's `_AdamW(bf16_stochastic_round=True)` rounds the weights the same way, but its second moment to nearest
(which stands still under beta2 = 0.999), with torch's global random numbers, and for AdamW only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from floatline.techniques.optim_steps.wide_step import Stochastic
from floatline.techniques.optim_steps.wide_technique import SHARDED, WideTechnique


@dataclass(frozen=True, kw_only=True)
class StochasticRounding(WideTechnique):
    """Round bf16 weights at random, with the mean unchanged.

    Args:
        moments: Format of the optimizer's moments between steps; "fp32" costs 4 more bytes a parameter with Adam.
        bucket_bytes: Bound on the fp32 copies during a step; a larger parameter is stepped alone.
        seed: Of the random bits of stochastic rounding, which are none of torch's own.

    Raises:
        ConfigError: A bucket below 1 byte or a seed below 0 or from 2^63.
    """

    name = "stochastic_rounding"
    rounding = Stochastic()
    conflicts: ClassVar = {
        "low_bit_optimizer": "the low-bit optimizer rounds weights itself; write "
        "low_bit_optimizer(stochastic_rounding=True)",
        "sharding": SHARDED,
    }
