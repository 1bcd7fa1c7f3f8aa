"""Islands: modules that compute in another format than their surroundings.

An island replaces `module.forward` (on the instance, so it can be taken off again). Inside a region of autocast an
fp32 island switches autocast off and casts its floating inputs up: `autocast(dtype=torch.float32)` is no substitute,
on CUDA ops that no list names would stay in half precision there. Where the weights themselves are cast (`-true`) the
island's own parameters keep the island's format and its outputs are cast back, because the next layer expects them so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from floatline.patch import ForwardPatch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def cast_floats(tree: Any, dtype: torch.dtype) -> Any:
    """Return `tree` (nested dicts, lists, tuples, dataclasses) with every floating tensor cast to `dtype`."""

    def cast(leaf: Any) -> Any:
        if is_dataclass(leaf) and not isinstance(leaf, type):
            fields_ = {field.name: getattr(leaf, field.name) for field in fields(leaf) if field.init}
            return replace(leaf, **cast_floats(fields_, dtype))
        return leaf.to(dtype) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf

    return tree_map(cast, tree)


def make_island(
    module: nn.Module, dtype: torch.dtype, *, device_type: str, outer: torch.dtype | None, by_autocast: bool
) -> ForwardPatch:
    """Make `module` compute in `dtype`.

    Args:
        module: The island. Its parameters must already be fp32 or `dtype`.
        dtype: Format of its arithmetic.
        device_type: "cpu" or "cuda", for autocast.
        outer: Format that the outputs are cast back to; None leaves them as they come (under autocast the next op
            casts what it needs, and an fp32 loss or logits module should stay fp32).
        by_autocast: The weights are fp32 and `dtype` is lower: autocast to it. Inputs are left to autocast then, for
            casting a mask of finfo(fp32).min down to fp16 would make it -inf.
    """

    def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
        def island_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if not by_autocast:
                args, kwargs = cast_floats((args, kwargs), dtype)
            with torch.autocast(device_type, dtype=dtype if by_autocast else None, enabled=by_autocast):
                output = forward(self, *args, **kwargs)
            return output if outer is None else cast_floats(output, outer)

        return island_forward

    return ForwardPatch(module).install(wrap)


def cast_inputs(module: nn.Module, dtype: torch.dtype, keep: frozenset[str]) -> ForwardPatch:
    """Make `module` cast its floating inputs to `dtype`, except keyword arguments named in `keep` (targets)."""

    def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
        def casting_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            kwargs = {name: value if name in keep else cast_floats(value, dtype) for name, value in kwargs.items()}
            return forward(self, *cast_floats(args, dtype), **kwargs)

        return casting_forward

    return ForwardPatch(module).install(wrap)
