"""Kahan summation: pure bf16 training in which small updates add up instead of being rounded away.

Weights, gradients and moments are bf16, and a fourth bf16 tensor keeps what rounding cut off each weight: 10 bytes a
parameter, against 16 for fp32 weights and Adam (optim_steps/wide_step.py says how). Weight and compensation together
resolve 2^-17 of a weight; an update below that is lost as in any Kahan sum.

It is for `bf16-true`. Where the weights are fp32 nothing is rounded away: it then changes no bit, and a note says so.

torch-optimi's Kahan optimizers do all their arithmetic in bf16. They are Adam, AdamW and SGD, their second moment
stands still under beta2 = 0.999, and weight decay below 0.2 % a step is rounded off; so here the step is fp32 instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from floatline.hardware import Hardware
from floatline.techniques.base import Applied, Stage, Technique
from floatline.techniques.optim_steps.partial_step import state_bytes
from floatline.techniques.optim_steps.wide_step import Compensated, Stochastic, WideStep, is_narrow

SHARDED = "the rounding works on whole parameters, not on shards; keep fp32 weights (sharding with bf16-mixed)"


@dataclass(frozen=True, kw_only=True)
class Kahan(Technique):
    """Compensate the rounding of bf16 weights.

    Args:
        moments: Format of the optimizer's moments between steps; "fp32" costs 4 more bytes a parameter with Adam.
        bucket_bytes: Bound on the fp32 copies during a step; a larger parameter is stepped alone.
        seed: Of the moments' stochastic rounding.

    Raises:
        ConfigError: A bucket below 1 byte or a seed below 0 or from 2^63.
    """

    name = "kahan"
    stage = Stage.OPTIMIZER
    conflicts: ClassVar = {
        "low_bit_optimizer": "both replace the update of bf16 weights; write "
        "low_bit_optimizer(stochastic_rounding=True) to keep small updates with low-bit state",
        "stochastic_rounding": "both keep bf16 updates from being rounded away; kahan has no noise and costs 2 bytes a "
        "parameter, stochastic_rounding costs none",
        "sharding": SHARDED,
    }

    moments: Literal["bf16", "fp32"] = "bf16"
    bucket_bytes: int = 64 * 2**20
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least("bucket_bytes", 1)
        self.at_least("seed", 0)
        if self.seed >= 2**63:
            raise self.bad("seed", "give less than 2^63")

    def _apply(self, model: nn.Module, hardware: Hardware) -> Applied:
        return apply_wide_step(self, model, Compensated(), self.moments, self.bucket_bytes, self.seed)


def apply_wide_step(
    technique: Technique,
    model: nn.Module,
    rounding: Compensated | Stochastic,
    moments: Literal["bf16", "fp32"],
    bucket_bytes: int,
    seed: int,
) -> Applied:
    """Return what a technique that only changes how bf16 weights are rounded has to hand back."""
    made: list[WideStep] = []

    def convert(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        wide = WideStep(optimizer, rounding, moments=moments, bucket_bytes=bucket_bytes, seed=seed, name=technique.name)
        made.append(wide)
        return wide

    def undo() -> None:
        for wide in made:
            wide.finish()
        made.clear()

    def facts() -> dict[str, float]:
        return {"state_bytes": float(sum(map(state_bytes, made)))}

    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    narrow = tuple(name for name, parameter in trainable.items() if is_narrow(parameter))
    notes = () if narrow else ("no effect: no trainable parameter is bf16 (it is for precision bf16-true)",)
    touched = narrow or tuple(trainable)
    return Applied(technique=technique, touched=touched, undo=undo, notes=notes, optimizer=convert, facts=facts)
