"""fp16 products on a CPU: computed in fp32 and rounded once, as tensor cores do it.

Most CPUs have no fp16 instructions, and torch's kernels for fp16 matrices are 10 to 20 times slower there than those
for fp32. They too add up in fp32 and round the result once, so that both ways differ in the order of the sums alone; an
audit, which runs the step dozens of times, takes the fast one.

    op(a, b) in fp16   ->   op(a.float(), b.float()).half()

A product beyond 65504 is infinite in both. bf16 has kernels of its own that are fast.

Not covered: attention kernels, which stay as they are; GPUs, which have fp16 units.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type
from torch.utils._pytree import tree_map

from floatline.observe.real import tensors_in

_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})
_PRODUCTS = frozenset(
    {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "convolution", "convolution_backward", "mkldnn_convolution"}
)


class FP16Products(TorchDispatchMode):
    """The mode. Enter it before a meter, so that the meter's own runs go through it as well."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(kind not in _PLAIN and is_traceable_wrapper_subclass_type(kind) for kind in types):
            return NotImplemented
        if not _is_slow(func, args):
            return func(*args, **kwargs)
        return tree_map(_narrowed, func(*tree_map(_widened, args), **kwargs))


def _is_slow(func: Any, args: Any) -> bool:
    return (
        isinstance(func, torch._ops.OpOverload)
        and func._overloadpacket.__name__ in _PRODUCTS
        and func._overloadname == "default"
        and all(t.dtype == torch.float16 and t.device.type == "cpu" for t in tensors_in(args))
    )


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) else value


def _narrowed(value: Any) -> Any:
    return value.half() if isinstance(value, torch.Tensor) else value
