"""Whether a training job can be gone on from: weights, buffers and optimizer state are finite.

The guard judges losses, gradients and buffers before an update. What the optimizer's own arithmetic spoils (a moment
that was NaN in a checkpoint, an eps that underflows) shows in the weights only, and in the loss one update later. So it
is looked at where something is to rest on it: before a checkpoint is written, and when one has been read.

Not covered: optimizer state that is made of several tensors (8-bit moments).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from floatline.step.live_buffers import masks


def not_finite(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Return the name of a tensor that is not finite, "" where all are.

    Args:
        model: Its parameters and buffers; buffers that may be masks, and what is frozen, may hold infinities.
        optimizer: Its state, and its parameters where they are not the model's (masters). Of shards those of this rank.
    """
    may = masks(model) | {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    for name, tensor in (*model.named_buffers(), *_trained(model, optimizer)):
        if not _is_float(tensor):
            continue
        values = _local(tensor)
        if bool((values.isnan() if name in may else ~values.isfinite()).any()):
            return name
    return ""


def _trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    yield from model.named_parameters()
    for group in optimizer.param_groups:
        for place, parameter in enumerate(group["params"]):
            name = names.get(id(parameter), f"parameter {place} of the optimizer")
            if id(parameter) not in names:
                yield name, parameter
            state = optimizer.state.get(parameter, {})
            yield from ((f"{key} of {name}", value) for key, value in state.items() if isinstance(value, torch.Tensor))


def _is_float(tensor: torch.Tensor) -> bool:
    return type(_local(tensor)) in (torch.Tensor, nn.Parameter) and tensor.is_floating_point()


def _local(tensor: torch.Tensor) -> torch.Tensor:
    local: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local
