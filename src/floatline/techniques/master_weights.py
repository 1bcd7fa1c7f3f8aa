"""fp32 master weights: bf16 weights for forward and backward, and an fp32 copy that the optimizer steps.

The classic recipe of training in a half format: the update is added to the copy, where nothing is rounded away, and
the weights are the copy rounded to nearest. 16 bytes a parameter with Adam (weights and gradients in bf16, copy and two
moments in fp32), as many as fp32 training; what it saves against `bf16-mixed` is autocast's casts of the weights in
each forward, and half of the memory and traffic of gradients. `kahan` resolves 16 bits for 10 bytes.

It is for `bf16-true`; `16-true` keeps fp32 copies by itself (precision/master.py), which also start from the fp32
weights that were cast down. Here they start from the bf16 weights. Where the weights are fp32 already it changes no
bit, and a note says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from floatline.techniques.optim_steps.wide_step import MasterCopy
from floatline.techniques.optim_steps.wide_technique import SHARDED, WideTechnique

_TWO_CURES = "both keep bf16 updates from being rounded away; master_weights loses none, for 4 bytes a parameter"


@dataclass(frozen=True, kw_only=True)
class Fp32Master(WideTechnique):
    """Step an fp32 copy of bf16 weights.

    Args:
        moments: Format of the optimizer's moments between steps; "bf16" saves 4 bytes a parameter with Adam, and
            rounds them stochastically.
        bucket_bytes: Bound on the fp32 copies of gradients during a step; a larger parameter is stepped alone.
        seed: Of the random bits of bf16 moments, which are none of torch's own.

    Raises:
        ConfigError: A bucket below 1 byte or a seed below 0 or from 2^63.
    """

    name = "master_weights"
    rounding = MasterCopy()
    conflicts: ClassVar = {
        "low_bit_optimizer": "both replace the update of bf16 weights; write "
        "low_bit_optimizer(stochastic_rounding=True) to keep small updates with low-bit state",
        "kahan": _TWO_CURES,
        "stochastic_rounding": _TWO_CURES,
        "sharding": SHARDED,
    }

    moments: Literal["bf16", "fp32"] = "fp32"
