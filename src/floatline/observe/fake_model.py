"""Models and batches without their data."""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, unset_fake_temporarily
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from floatline.errors import ConfigError, FloatlineError, ModelError
from floatline.observe.fake import Faking
from floatline.observe.real import is_small
from floatline.observe.values import KNOWN
from floatline.step.batch import default_loss
from floatline.step.workload import Workload


def fake_model(work: Workload, mode: Faking) -> nn.Module:
    """Return a workload's model with fake parameters; one that exists already is copied without its data.

    Raises:
        ConfigError: It is no workload, or its factory returns no module.
        ModelError: The factory fails on fake tensors.
    """
    if not isinstance(work, Workload):
        raise ConfigError(f"a {type(work).__name__} is not a Workload", hint="wrap it: fl.Workload(model, batch, loss)")
    made = work.model if isinstance(work.model, nn.Module) else _built(work.build_model)
    if any(is_lazy(parameter) for parameter in made.parameters()):
        if made is work.model:
            raise ModelError(
                f"{type(made).__name__} holds lazy modules without shapes, which cannot be copied",
                hint="run one batch through it first, or pass a factory of the model",
            )
        made = _copied(_filled(work), mode)
    elif made is work.model:
        made = _copied(made, mode)
    fake_parameters(made, mode)
    return made


def _built(factory: Callable[[], nn.Module]) -> nn.Module:
    try:
        return factory()
    except FloatlineError:
        raise
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(
            f"the model cannot be built without its memory: {str(error).splitlines()[0]}",
            hint="build it on the CPU, from its config, without loading weights or moving it to a GPU",
        ) from error


def _filled(work: Workload) -> nn.Module:
    """Return a model of lazy modules after a first forward, which gives them their shapes. It runs for real."""
    with _disable_current_modes(), unset_fake_temporarily(), torch.no_grad():
        model = work.build_model()
        (work.loss or default_loss)(model, work.build_batch())
        return model


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
        steers = not isinstance(tensor, nn.Parameter) and not tensor.is_floating_point() and is_small(tensor)
        if steers and not tensor.is_meta:
            return data.to("cpu", copy=True)
    return _like(tensor, fake_on_cpu(data, mode))


def _like(tensor: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Return `fake` as a parameter with the attributes of `tensor` where that is one."""
    if isinstance(tensor, nn.Parameter):
        fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
        fake.__dict__.update({name: value for name, value in tensor.__dict__.items() if name not in fake.__dict__})
    return fake


def fake_on_cpu(tensor: torch.Tensor, mode: Faking) -> torch.Tensor:
    """Return a fake CPU tensor like one of any device, the meta device too: the target's tensors are CPU tensors."""
    if tensor.device.type == "cpu":
        return mode.fake(tensor)
    with _disable_current_modes(), unset_fake_temporarily():
        shape = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")
    return FakeTensor(mode.fake_mode, shape, torch.device("cpu"))


def fake_parameters(model: nn.Module, mode: Faking) -> None:
    """Turn the parameters that were small enough to be real into fake ones, in place, and bring all to the CPU."""
    known: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None or _is_in_place(tensor):
                    continue
                if id(tensor) not in known:
                    known[id(tensor)] = _like(tensor, fake_on_cpu(tensor.detach(), mode))
                held[name] = known[id(tensor)]  # type: ignore[assignment]


def _is_in_place(tensor: torch.Tensor) -> bool:
    """Say whether a model's tensor is as a trace wants it: parameters fake, buffers on the CPU."""
    return tensor.device.type == "cpu" and (isinstance(tensor, FakeTensor) or not isinstance(tensor, nn.Parameter))


def fake_batch(batch: Any, mode: Faking, made: dict[int, Any] | None = None) -> Any:
    """Return a copy of a batch with fake floats that know their values; integers and booleans stay real.

    Args:
        batch: Tensors in dicts, lists, tuples, mappings (transformers' BatchEncoding) and dataclasses.
        mode: The mode to use them in.
        made: Copies by the id of what they are copies of: a tensor that is there twice stays one.
    """
    made = {} if made is None else made
    if isinstance(batch, torch.Tensor):
        if id(batch) not in made:
            made[id(batch)] = _fake_input(batch, mode)
        return made[id(batch)]
    if isinstance(batch, dict):
        values = {key: fake_batch(value, mode, made) for key, value in batch.items()}
        return type(batch)(values)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(fake_batch(value, mode, made) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(fake_batch(value, mode, made) for value in batch)
    if isinstance(batch, Mapping | UserDict):
        return {key: fake_batch(value, mode, made) for key, value in batch.items()}
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        copied = copy.copy(batch)
        for name, value in vars(batch).items():
            object.__setattr__(copied, name, fake_batch(value, mode, made))
        return copied
    return batch


def _fake_input(tensor: torch.Tensor, mode: Faking) -> torch.Tensor:
    with _disable_current_modes(), unset_fake_temporarily():
        known = None if tensor.is_meta else tensor.detach().to("cpu", copy=True)  # the program may write into it
    if known is not None and not tensor.is_floating_point() and is_small(tensor):
        return known
    fake = fake_on_cpu(tensor.detach() if known is None else known, mode)
    if known is not None:
        setattr(fake, KNOWN, known)
    return fake.requires_grad_(tensor.requires_grad)


def tensors_of(batch: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of a batch as `fake_batch` returns it."""
    for leaf in tree_leaves(batch):
        if isinstance(leaf, torch.Tensor):
            yield leaf
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            yield from tensors_of(vars(leaf))
