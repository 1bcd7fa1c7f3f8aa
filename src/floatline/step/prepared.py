"""A model made ready to be trained: techniques and precision on it, then the optimizer over what they have left.

The order matters. Adapters come before the weights are cast, sharding after; the optimizer is made when no parameter
is replaced any more; master weights take their exact values from before the cast. All of it can be undone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from floatline.errors import ConfigError
from floatline.hardware import Hardware
from floatline.hardware import resolve as resolve_hardware
from floatline.precision import (
    AppliedPrecision,
    LossScaling,
    MasterWeights,
    NoLossScaling,
    NoMasterWeights,
    Policy,
    apply_precision,
)
from floatline.precision import resolve as resolve_precision
from floatline.step.optimizers import OptimizerFactory, make_optimizer, names_of, rebind
from floatline.techniques import Stack, Technique
from floatline.techniques.base import hardware_of
from floatline.techniques.distributed.shards import laid_out_like
from floatline.techniques.precision import asked_precision


class Prepared:
    """What a step trains with.

    Args:
        model: Changed in place.
        optimizer: An optimizer, or a `callable(params) -> Optimizer`.
        precision: A policy, its string, or "auto".
        max_grad_norm: Some techniques cannot clip.
        techniques: Techniques or their texts.
        hardware: Whose rules hold; None is the device that the model is on.

    Attributes:
        device: The model's.
        policy: Of precision; `reason` says why it was chosen.
        precision: As it was applied.
        stack: The techniques.
        optimizer: With the techniques on it.
        masters: The fp32 weights of a half-precision model, or their null object.
        scaling: The loss scale, or its null object.

    Raises:
        PrecisionError: The policy is malformed, illegal on the hardware, or does not fit the model.
        ConfigError: The model has nothing to train, a technique cannot be applied, or no hardware has that name.
    """

    precision: AppliedPrecision
    optimizer: torch.optim.Optimizer
    masters: MasterWeights | NoMasterWeights

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | OptimizerFactory,
        precision: str | Policy,
        max_grad_norm: float | None,
        techniques: Sequence[Technique | str],
        hardware: Hardware | str | None,
    ) -> None:
        self._model = model
        self.device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        self.stack = Stack(techniques)
        self.hardware = hardware_of(model) if hardware is None else resolve_hardware(hardware)
        choice = resolve_precision(asked_precision(precision, self.stack.find("precision")), self.hardware)
        self.policy, self.reason = choice.policy, choice.reason
        self.stack.refuse(self.policy, max_grad_norm)
        self._exact: dict[str, torch.Tensor] = {}
        before = names_of(model)
        self.stack.apply(model, self.hardware, self._apply_precision, self.policy)
        self._names = names_of(model)
        try:
            self._prepare_optimizer(optimizer, before)
        except BaseException:  # an optimizer that a technique cannot convert
            self.stack.undo()
            raise
        self.scaling = LossScaling(self.device.type) if self.policy.base.loss_scaling else NoLossScaling()

    def _apply_precision(self) -> Callable[[], None]:
        trainable = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        if not trainable:
            kind = type(self._model).__name__
            raise ConfigError(f"{kind} has no trainable parameters", hint="unfreeze some of them")
        if self.policy.base.master_weights:
            self._exact = {name: parameter.detach().clone() for name, parameter in trainable.items()}
        self.precision = apply_precision(self._model, self.policy, self.hardware)
        return self.precision.undo

    def _prepare_optimizer(self, optimizer: torch.optim.Optimizer | OptimizerFactory, before: dict[int, str]) -> None:
        made = make_optimizer(optimizer, self._model, before)
        self.masters = MasterWeights(made, self._exact_now()) if self.policy.base.master_weights else NoMasterWeights()
        self._exact.clear()
        self.optimizer = self.stack.convert(made)

    def _exact_now(self) -> dict[torch.Tensor, torch.Tensor]:
        """Return the values from before the cast of each parameter that is there now, in its layout."""
        now: dict[str, Any] = dict(self._model.named_parameters())
        return {
            now[name]: laid_out_like(value, now[name])
            for name, value in self._exact.items()
            if now[name].shape == value.shape
        }

    def undo(self) -> None:
        """Take precision and techniques off the model again; the optimizer gets the model's parameters back."""
        self.masters.undo()
        self.stack.undo()
        rebind(self.optimizer, self._names, self._model)
