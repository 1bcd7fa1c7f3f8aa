"""What `kahan`, `stochastic_rounding`, `master_weights` have in common: everything but the rounding (wide_step.py)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar, Literal

import torch
from torch import nn

from floatline.hardware import Hardware
from floatline.techniques.base import Applied, Stage, Technique
from floatline.techniques.optim_steps.library_adam import LibraryAdam
from floatline.techniques.optim_steps.partial_step import state_bytes
from floatline.techniques.optim_steps.wide_step import Compensated, MasterCopy, Stochastic, WideStep, is_narrow

SHARDED = "the rounding works on whole parameters, not on shards; keep fp32 weights (sharding with bf16-mixed)"


@dataclass(frozen=True, kw_only=True)
class WideTechnique(Technique):
    """Make the update of bf16 weights in fp32, and round the result in a certain way.

    Args:
        moments: Format of the optimizer's moments between steps; "fp32" costs 4 more bytes a parameter with Adam.
        bucket_bytes: Bound on the fp32 copies during a step; a larger parameter is stepped alone.
        seed: Of the random bits of stochastic rounding, which are none of torch's own.

    Raises:
        ConfigError: A bucket below 1 byte or a seed below 0 or from 2^63.
    """

    stage = Stage.OPTIMIZER
    rounding: ClassVar[Compensated | Stochastic | MasterCopy]

    moments: Literal["bf16", "fp32"] = "bf16"
    bucket_bytes: int = 64 * 2**20
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least("bucket_bytes", 1)
        self.at_least("seed", 0)
        if self.seed >= 2**63:
            raise self.bad("seed", "give less than 2^63")
        library = getattr(self, "library", "floatline")
        ours = {field.name: field.default for field in fields(self) if field.name != "library"}
        for name, default in ours.items() if library != "floatline" else ():
            if getattr(self, name) != default:
                raise self.bad(name, f"{library} has no such choice: leave {name} out, or write library='floatline'")

    def _apply(self, model: nn.Module, hardware: Hardware) -> Applied:
        made: list[WideStep | LibraryAdam] = []

        def convert(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
            made.append(self._converted(optimizer, model, hardware))
            return made[-1]

        def undo() -> None:
            for optimizer in made:
                optimizer.finish()
            made.clear()

        def facts() -> dict[str, float]:
            return {"state_bytes": float(sum(map(state_bytes, made)))}

        trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        narrow = tuple(name for name, parameter in trainable.items() if is_narrow(parameter))
        notes = () if narrow else ("no effect: no trainable parameter is bf16 (it is for precision bf16-true)",)
        touched = narrow or tuple(trainable)
        return Applied(technique=self, touched=touched, undo=undo, notes=notes, optimizer=convert, facts=facts)

    def _converted(
        self, optimizer: torch.optim.Optimizer, model: nn.Module, hardware: Hardware
    ) -> WideStep | LibraryAdam:
        """Return the optimizer that steps in place of `optimizer`."""
        sizes = {"bucket_bytes": self.bucket_bytes, "seed": self.seed}
        return WideStep(optimizer, self.rounding, moments=self.moments, name=self.name, **sizes)


def has_narrow(optimizer: torch.optim.Optimizer) -> bool:
    """Say whether an optimizer has bf16 parameters; without them nothing is rounded, and its step stays as it is."""
    return any(is_narrow(parameter) for group in optimizer.param_groups for parameter in group["params"])
