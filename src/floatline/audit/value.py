"""What of a model's output is audited: its loss, else the first floating tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeGuard

import torch
from torch.utils._pytree import tree_leaves

from floatline.errors import ModelError


def output_of(output: Any, source: str) -> torch.Tensor:
    """Return the loss of what a model returned, else its first floating tensor."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if is_floating(loss):
        return loss
    if is_dataclass(output) and not isinstance(output, (Mapping, type)):
        output = {field.name: getattr(output, field.name) for field in fields(output)}
    leaves = tree_leaves(dict(output) if isinstance(output, Mapping) else output)
    for leaf in leaves:
        if is_floating(leaf):
            return leaf
    kinds = ", ".join(sorted({kind(leaf) for leaf in leaves})) or kind(output)
    raise ModelError(
        f"{source} returned no floating tensor ({kinds})",
        hint="pass loss=(model, batch) -> tensor that makes one of it",
    )


def is_floating(value: Any) -> TypeGuard[torch.Tensor]:
    """Say whether a value is a dense tensor of floats."""
    return isinstance(value, torch.Tensor) and value.is_floating_point() and is_dense(value)


def is_dense(tensor: torch.Tensor) -> bool:
    """Say whether a tensor holds real values one by one: is not sparse, nested or complex."""
    return tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_complex()


def kind(value: Any) -> str:
    """Return what a value is, for errors."""
    if isinstance(value, torch.Tensor):
        sort = "nested" if value.is_nested else str(value.layout).removeprefix("torch.").removesuffix("_coo")
        return f"{'' if sort == 'strided' else sort + ' '}tensor of {str(value.dtype).removeprefix('torch.')}"
    return type(value).__name__
