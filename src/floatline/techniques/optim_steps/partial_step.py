"""Step some of an optimizer's parameters, as if the others were not there.

Three techniques need it: state offload steps bucket by bucket, optimizer-in-backward parameter by parameter, wide
steps (wide_step.py) on fp32 copies of one bucket. `only` narrows `param_groups` in place for the time of a `step()`:
hyperparameters, state and the group objects that a learning-rate schedule writes to stay the same.

It gives the plain step's numbers for optimizers that treat each parameter on its own, as those of torch.optim do
(LBFGS is the exception). An optimizer that counts updates in its groups would count once a bucket, so that is checked.

Not covered: hooks registered on the inner optimizer's `step` run once for each partial step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from floatline.errors import ConfigError

Chunk = list[tuple[dict[str, Any], list[torch.Tensor]]]
"""Parameter groups, each with those of its parameters that are meant."""


@contextmanager
def only(optimizer: torch.optim.Optimizer, chunk: Chunk) -> Iterator[None]:
    """Inside, `optimizer` has the parameters of `chunk` and no others.

    >>> a, b = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    >>> optimizer = torch.optim.SGD([a, b], lr=1.0)
    >>> with only(optimizer, [(optimizer.param_groups[0], [b])]):
    ...     len(optimizer.param_groups[0]["params"])
    1
    >>> len(optimizer.param_groups[0]["params"])
    2
    """
    groups = optimizer.param_groups
    kept = [(group, group["params"]) for group in groups]
    try:
        for group, parameters in chunk:
            group["params"] = parameters
        groups[:] = [group for group, _ in chunk]
        yield
    finally:
        groups[:] = [group for group, _ in kept]
        for group, parameters in kept:
            group["params"] = parameters


def step_only(optimizer: torch.optim.Optimizer, chunk: Chunk) -> None:
    """Run `optimizer.step()` on the parameters of `chunk` alone.

    Raises:
        ConfigError: The step changed something in a parameter group, which then happens once for each chunk.
    """
    before = [_settings(group) for group, _ in chunk]
    with only(optimizer, chunk):
        optimizer.step()
    for (group, _), old in zip(chunk, before, strict=True):
        changed = sorted(key for key, value in _settings(group).items() if old.get(key) != value)
        if changed:
            raise ConfigError(
                f"{type(optimizer).__name__} keeps state in its parameter groups ({', '.join(changed)}), "
                "so it cannot step some parameters at a time",
                hint="use an optimizer of torch.optim, or drop the technique",
            )


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """Return what a group holds besides parameters, comparable without reading a tensor."""
    return {
        key: (id(value), value._version) if isinstance(value, torch.Tensor) else value
        for key, value in group.items()
        if key != "params"
    }


def chunks(optimizer: torch.optim.Optimizer, limit: int, size: Callable[[torch.Tensor], int]) -> list[Chunk]:
    """Cut the parameters that have a gradient into chunks of at most `limit` bytes; a larger one is alone in its chunk.

    Args:
        optimizer: Its groups are read in order.
        limit: Bytes.
        size: Bytes that a parameter counts for.
    """
    made: list[Chunk] = []
    used = 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            need = size(parameter)
            if not made or used + need > limit:
                made.append([])
                used = 0
            if not made[-1] or made[-1][-1][0] is not group:
                made[-1].append((group, []))
            made[-1][-1][1].append(parameter)
            used += need
    return made


def tensor_parts(value: torch.Tensor) -> Sequence[torch.Tensor]:
    """Return the plain tensors that hold the memory of `value`: itself, or those inside a tensor subclass."""
    if not is_traceable_wrapper_subclass(value):
        return [value]
    names, _ = value.__tensor_flatten__()
    parts = [getattr(value, name) for name in names]  # a DTensor names its mesh, too
    return [inner for part in parts if isinstance(part, torch.Tensor) for inner in tensor_parts(part)]


def state_bytes(optimizer: torch.optim.Optimizer, device: str | None = None, smallest: int = 0) -> int:
    """Return the bytes of an optimizer's state tensors; storage that several share counts once.

    Args:
        device: Count only what lies on that type of device, "cpu" or "cuda".
        smallest: Leave out tensors of fewer bytes.
    """
    storages = {
        part.untyped_storage()._cdata: part.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
        for part in tensor_parts(value)
        if (device is None or part.device.type == device) and part.nbytes >= smallest
    }
    return sum(storages.values())
