"""Models and batches without their data."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import _disable_current_modes

from floatline.errors import FloatlineError, ModelError
from floatline.observe.fake import Faking
from floatline.observe.real import is_small
from floatline.observe.values import KNOWN


def fake_model(model: nn.Module | Callable[[], nn.Module], mode: Faking) -> nn.Module:
    """Return a model with fake parameters; one that exists already is copied without its data.

    Raises:
        ModelError: The factory fails on fake tensors.
    """
    made = _copied(model, mode) if isinstance(model, nn.Module) else _built(model)
    fake_parameters(made, mode)
    return made


def _built(factory: Callable[[], nn.Module]) -> nn.Module:
    try:
        return factory()
    except (FloatlineError, TypeError, NameError, AttributeError):
        raise
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(
            f"the model cannot be built without its memory: {str(error).splitlines()[0]}",
            hint="build it on the CPU, from its config, without loading weights or moving it to a GPU",
        ) from error


def _copied(model: nn.Module, mode: Faking) -> nn.Module:
    """Copy a module whose tensors are replaced on the way, each by one stand-in wherever it is held."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and id(tensor) not in memo:
                memo[id(tensor)] = _stand_in(tensor, mode)
    with FakeCopyMode(mode.fake_mode):  # tensors that are neither parameters nor buffers
        return copy.deepcopy(model, memo)


def _stand_in(tensor: torch.Tensor, mode: Faking) -> torch.Tensor:
    """Return a tensor without data; small integers and booleans keep their values, programs branch on them."""
    with _disable_current_modes(), unset_fake_temporarily():
        data = tensor.detach()
        if not isinstance(tensor, nn.Parameter) and not tensor.is_floating_point() and is_small(tensor):
            return data.clone()
    fake = mode.fake(data)
    if isinstance(tensor, nn.Parameter):
        fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
        fake.__dict__.update(tensor.__dict__)
    return fake


def fake_parameters(model: nn.Module, mode: Faking) -> None:
    """Turn the parameters that were small enough to be real into fake ones, in place."""
    known: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not isinstance(parameter, FakeTensor):
                if id(parameter) not in known:
                    fake = nn.Parameter(mode.fake(parameter.detach()), requires_grad=parameter.requires_grad)
                    fake.__dict__.update(parameter.__dict__)
                    known[id(parameter)] = fake
                module._parameters[name] = known[id(parameter)]


def fake_batch(batch: Any, mode: Faking) -> Any:
    """Return a batch with fake floats that know their values; integers and booleans stay real."""
    if isinstance(batch, torch.Tensor):
        if not batch.is_floating_point() and is_small(batch):
            return batch
        fake = mode.fake(batch)
        setattr(fake, KNOWN, batch)
        return fake
    if isinstance(batch, dict):
        values = {key: fake_batch(value, mode) for key, value in batch.items()}
        return type(batch)(values)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(fake_batch(value, mode) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(fake_batch(value, mode) for value in batch)
    return batch
