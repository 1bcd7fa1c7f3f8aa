"""What a sharded model's watcher must be told where CPU tensors stand for a GPU's.

FSDP2 frees a gathered weight by resizing its storage to nothing, and gathers into it again: no operation shows that.
And under its offload to CPU the shards, their gradients and the update are on the host, which on CPU tensors is no
move at all. Here both are told (placement.py), and nothing is computed otherwise.

Not covered: the copy of a shard on its way from the host into a gather, a layer's share at a time; buffers that FSDP2's
CUDA streams hold until a later layer has waited for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import nn

from floatline.techniques.distributed.shards import is_sharded, on_this_rank
from floatline.techniques.placement import moved_to_host, resized, within_kernel


@contextmanager
def telling_of_gathers() -> Iterator[None]:
    """Context in which FSDP2 tells of each storage that it frees or allocates by resizing."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group

    with ExitStack() as stack:
        for module in (_fsdp_param, _fsdp_param_group):
            for name in ("alloc_storage", "free_storage"):
                function = getattr(module, name, None)
                if function is not None:
                    setattr(module, name, _telling(function))
                    stack.callback(setattr, module, name, function)
        yield


@contextmanager
def leaving_out_shadows() -> Iterator[None]:
    """Context in which what DTensor allocates to work out an op's whole shape has no memory.

    It runs each new op once on fake tensors of the unsharded shape, in the fake mode that is active: the one that is
    watched here.
    """
    from torch.distributed.tensor._sharding_prop import ShardingPropagator

    name = "_propagate_tensor_meta_non_cached"
    function = getattr(ShardingPropagator, name)

    @wraps(function)
    def shadow(*args: Any, **kwargs: Any) -> Any:
        with within_kernel():
            return function(*args, **kwargs)

    setattr(ShardingPropagator, name, shadow)
    try:
        yield
    finally:
        setattr(ShardingPropagator, name, function)


def _telling(function: Callable[[torch.Tensor], None]) -> Callable[[torch.Tensor], None]:
    @wraps(function)
    def told(tensor: torch.Tensor) -> None:
        before = tensor.untyped_storage().size()
        function(tensor)
        if tensor.untyped_storage().size() != before:
            resized(tensor)

    return told


def tell_of_shards(model: nn.Module) -> None:
    """Tell that the shards of a model lie in host memory, and each gradient that reaches one as soon as it does."""
    for parameter in filter(is_sharded, model.parameters()):
        moved_to_host(on_this_rank(parameter.detach()))
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_tell_of_gradient)  # FSDP2 calls it; it goes with the shard


def _tell_of_gradient(parameter: torch.Tensor) -> None:
    if parameter.grad is not None:
        moved_to_host(on_this_rank(parameter.grad))


def tell_of_masters(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Tell that what an optimizer steps is on the host: shards, or masters that were made of them; returns it."""
    for group in optimizer.param_groups:
        for parameter in filter(is_sharded, group["params"]):
            moved_to_host(on_this_rank(parameter.detach()))
    return optimizer
