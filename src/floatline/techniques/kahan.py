"""Kahan summation: pure bf16 training in which small updates add up instead of being rounded away.

Weights, gradients and moments are bf16, and a fourth bf16 tensor keeps what rounding cut off each weight: 10 bytes a
parameter, against 16 for fp32 weights and Adam (optim_steps/wide_step.py says how). Weight and compensation together
resolve 2^-17 of a weight; an update below that is lost as in any Kahan sum.

It is for `bf16-true`. Where the weights are fp32 nothing is rounded away: it then changes no bit, and a note says so.

torch-optimi's Kahan optimizers do all their arithmetic in bf16: their second moment stands still under beta2 = 0.999
(0.99 is their default), and weight decay below 0.2 % a step is rounded off; so here the step is fp32 instead.
`library="optimi"` takes their Adam and AdamW, which have Triton kernels (optim_steps/library_adam.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from floatline.hardware import Hardware
from floatline.techniques.optim_steps.library_adam import LibraryAdam, to_optimi
from floatline.techniques.optim_steps.wide_step import Compensated, WideStep
from floatline.techniques.optim_steps.wide_technique import SHARDED, WideTechnique, has_narrow


@dataclass(frozen=True, kw_only=True)
class Kahan(WideTechnique):
    """Compensate the rounding of bf16 weights.

    Args:
        moments: Format of the optimizer's moments between steps; "fp32" costs 4 more bytes a parameter with Adam.
        bucket_bytes: Bound on the fp32 copies during a step; a larger parameter is stepped alone.
        seed: Of the random bits of stochastic rounding, which are none of torch's own.
        library: "floatline", for any optimizer; or "optimi", torch-optimi's Adam or AdamW in place of torch's, which
            has no choice of the other settings.

    Raises:
        ConfigError: A bucket below 1 byte, a seed below 0 or from 2^63, or a setting that torch-optimi has not.
    """

    name = "kahan"
    rounding = Compensated()
    conflicts: ClassVar = {
        "low_bit_optimizer": "both replace the update of bf16 weights; write "
        "low_bit_optimizer(stochastic_rounding=True) to keep small updates with low-bit state",
        "stochastic_rounding": "both keep bf16 updates from being rounded away; kahan has no noise and costs 2 bytes a "
        "parameter, stochastic_rounding costs none",
        "sharding": SHARDED,
    }

    library: Literal["floatline", "optimi"] = "floatline"

    def _converted(
        self, optimizer: torch.optim.Optimizer, model: nn.Module, hardware: Hardware
    ) -> WideStep | LibraryAdam:
        if self.library == "optimi" and has_narrow(optimizer):
            return to_optimi(optimizer)
        return super()._converted(optimizer, model, hardware)
