"""A workload: what to train, as factories, so that it can be built on real or on fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from floatline.errors import ConfigError
from floatline.step.batch import Batch, LossFunction


@dataclass(frozen=True)
class Workload:
    """A model, a batch, a loss and an optimizer.

    Args:
        model: Factory of the model, or the model itself.
        batch: Factory of a batch (dict -> `model(**batch)`, tuple -> `model(*batch)`), or the batch itself.
        loss: `(model, batch) -> scalar`; None takes `output.loss`, `output["loss"]` or a scalar output.
        optimizer: `callable(params) -> Optimizer`.

    Raises:
        ConfigError: `model` or `batch` is neither a factory nor the thing itself, or `loss` or `optimizer` is not
            callable.

    Example:
        >>> work = Workload(model=lambda: nn.Linear(4, 1), batch=lambda: (torch.ones(2, 4),),
        ...                 loss=lambda model, batch: model(*batch).square().mean())
        >>> work.build_model()
        Linear(in_features=4, out_features=1, bias=True)
    """

    model: nn.Module | Callable[[], nn.Module]
    batch: Batch | Callable[[], Batch]
    loss: LossFunction | None = None
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] = torch.optim.AdamW

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module) and not callable(self.model):
            raise ConfigError(
                f"Workload(model=...) is a {type(self.model).__name__}",
                hint="pass a module or a factory of one",
            )
        if self.loss is not None and not callable(self.loss):
            raise ConfigError(
                f"Workload(loss=...) is a {type(self.loss).__name__}", hint="pass a function (model, batch) -> scalar"
            )
        if not callable(self.optimizer) or isinstance(self.optimizer, torch.optim.Optimizer):
            raise ConfigError(
                f"Workload(optimizer=...) is a {type(self.optimizer).__name__}",
                hint="pass a callable(params) -> Optimizer, e.g. torch.optim.AdamW",
            )

    def build_model(self) -> nn.Module:
        """Return the model, built anew where `model` is a factory."""
        model: Any = self.model if isinstance(self.model, nn.Module) else self.model()
        if not isinstance(model, nn.Module):
            raise ConfigError(f"the model factory returned a {type(model).__name__}", hint="return a torch.nn.Module")
        return model

    def build_batch(self) -> Batch:
        """Return the batch, made anew where `batch` is a factory."""
        batch = self.batch() if callable(self.batch) else self.batch
        if batch is None:
            raise ConfigError("the batch factory returned None", hint="return a dict, a tuple or a tensor")
        return batch

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer over the model's trainable parameters."""
        return self.optimizer([parameter for parameter in model.parameters() if parameter.requires_grad])
