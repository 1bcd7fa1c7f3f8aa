"""What the search must know of a workload before it tries anything: found out on a model without memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import _disable_current_modes

from floatline.errors import ConfigError
from floatline.observe.failures import explained
from floatline.observe.fake import faking
from floatline.observe.fake_model import fake_model
from floatline.step import Workload
from floatline.techniques import attention_hf
from floatline.techniques.attention import attention_modules
from floatline.techniques.batches.rows import rows_of
from floatline.techniques.layers import repeated_layers


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Facts about a workload.

    Attributes:
        model: Class name.
        parameters: Their number, shared ones once.
        trainable: How many of them train.
        layers: How many repeated layers it has.
        layer_classes: Their class names.
        samples: Rows of an update; of a list of micro-batches those of all.
        rows: Of the batch.
        optimizer: Class name.
        adam: It is torch's Adam or AdamW.
        eager: It multiplies attention out although it could do otherwise.
        attention_note: What its attention is.
    """

    model: str
    parameters: int
    trainable: int
    layers: int
    rows: int
    optimizer: str
    adam: bool
    eager: bool
    attention_note: str
    layer_classes: tuple[str, ...] = ()
    samples: int = 1


def probe(work: Workload) -> Probe:
    """Look at a workload's model, batch and optimizer.

    Raises:
        ConfigError: The model has no parameters.
        ModelError: The model cannot be built without memory, or one of the factories fails.
    """
    with explained(), faking() as mode:
        model = fake_model(work, mode)
        optimizer = _optimizer(work, model)
        with _disable_current_modes(), unset_fake_temporarily():
            batch = work.build_batch()
        layers = repeated_layers(model)
        implementations = attention_hf.implementations(model)
        return Probe(
            model=type(model).__name__,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            trainable=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
            layers=len(layers),
            layer_classes=tuple(dict.fromkeys(type(layer).__name__ for layer in layers.values())),
            rows=_rows(batch),
            samples=sum(map(rows_of, batch)) if isinstance(batch, list) else rows_of(batch),
            optimizer=type(optimizer).__name__,
            adam=isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW),
            eager="eager" in implementations,
            attention_note=_attention_note(implementations, attention_modules(model)),
        )


def _optimizer(work: Workload, model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer; of a model that is frozen as a whole, for adapters to come, over all of it."""
    parameters = list(model.parameters())
    if not parameters:
        raise ConfigError(
            f"{type(model).__name__} has no parameters, there is nothing to train", hint="plan a model that has some"
        )
    return work.optimizer([parameter for parameter in parameters if parameter.requires_grad] or parameters)


def _rows(batch: Any) -> int:
    return len(batch) if isinstance(batch, list) else rows_of(batch)


def _attention_note(implementations: set[str], modules: tuple[str, ...]) -> str:
    if not modules:
        return "the model has no attention"
    names = ", ".join(sorted(implementations)) or "scaled_dot_product_attention"
    return f"the model uses {names} already, which takes the best kernel of the GPU by itself"
