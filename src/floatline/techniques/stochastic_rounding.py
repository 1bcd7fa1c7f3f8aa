"""Stochastic rounding: pure bf16 training in which small updates happen with small probability.

A weight is rounded up or down at random so that its mean is the exact result: 8 bytes a parameter with Adam (weights,
gradients and two moments in bf16), half of fp32 training. The price is noise of about half a spacing in each weight;
`kahan` has none and costs 2 bytes more.

It is for `bf16-true` and works with any optimizer of torch.optim; optim_steps/wide_step.py says how. Where the weights
are fp32 it changes no bit, and a note says so. Two runs with the same seed round alike.

torchao's `_AdamW(bf16_stochastic_round=True)` rounds the weights the same way, but its second moment to nearest
(which stands still under beta2 = 0.999), with torch's global random numbers, and for AdamW only. `library="torchao"`
takes it: its step is compiled into one kernel a parameter shape on CUDA (optim_steps/library_adam.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import ClassVar, Literal

import torch
from torch import nn

from floatline.hardware import Hardware
from floatline.techniques.low_bit_optimizer import compiles
from floatline.techniques.optim_steps.library_adam import LibraryAdam, to_torchao_rounding
from floatline.techniques.optim_steps.wide_step import Stochastic, WideStep
from floatline.techniques.optim_steps.wide_technique import SHARDED, WideTechnique, has_narrow
from floatline.techniques.placement import stands_in


@dataclass(frozen=True, kw_only=True)
class StochasticRounding(WideTechnique):
    """Round bf16 weights at random, with the mean unchanged.

    Args:
        moments: Format of the optimizer's moments between steps; "fp32" costs 4 more bytes a parameter with Adam.
        bucket_bytes: Bound on the fp32 copies during a step; a larger parameter is stepped alone.
        seed: Of the random bits of stochastic rounding, which are none of torch's own.
        library: "floatline", for any optimizer; or "torchao", its AdamW in place of torch's, which draws torch's own
            random bits and has no choice of the other settings.

    Raises:
        ConfigError: A bucket below 1 byte, a seed below 0 or from 2^63, or a setting that torchao has not.
    """

    name = "stochastic_rounding"
    rounding = Stochastic()
    conflicts: ClassVar = {
        "low_bit_optimizer": "the low-bit optimizer rounds weights itself; write "
        "low_bit_optimizer(stochastic_rounding=True)",
        "sharding": SHARDED,
    }

    library: Literal["floatline", "torchao"] = "floatline"

    def _converted(
        self, optimizer: torch.optim.Optimizer, model: nn.Module, hardware: Hardware
    ) -> WideStep | LibraryAdam:
        if self.library == "floatline" or not has_narrow(optimizer):
            return super()._converted(optimizer, model, hardware)
        planned = stands_in(model, hardware)
        compiled = compiles(hardware, triton=planned or find_spec("triton") is not None)
        return to_torchao_rounding(optimizer, eager=planned or not compiled, stands_for_kernel=planned and compiled)
