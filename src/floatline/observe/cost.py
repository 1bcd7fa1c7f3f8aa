"""What an op costs: FLOPs by torch's own formulas, bytes as the sizes of what it reads and writes.

FLOPs count matrix products, convolutions and attention (a multiply and an add are two), as
`torch.utils.flop_counter` does; pointwise ops count none, they are bound by memory. Bytes count each argument and each
result once, as if nothing stayed in caches: what a kernel must move at least.
"""

from __future__ import annotations

from typing import Any

from torch.utils.flop_counter import flop_registry

from floatline.observe.real import tensors_in


def cost_of(func: Any, args: Any, kwargs: Any, out: Any) -> tuple[int, int, str]:
    """Return FLOPs, bytes moved, and the dtype of the arithmetic of one call.

    Args:
        func: An `aten` op overload that is not a view.
        args: Its arguments.
        kwargs: Its keyword arguments.
        out: Its result.
    """
    formula = flop_registry.get(func._overloadpacket)
    flops = int(formula(*args, **kwargs, out_val=out)) if formula is not None else 0
    nbytes, dtype = 0, ""
    for tensor in tensors_in(args):
        nbytes += tensor.numel() * tensor.element_size()
        dtype = dtype or str(tensor.dtype)
    for tensor in tensors_in(out):
        nbytes += tensor.numel() * tensor.element_size()
        dtype = dtype or str(tensor.dtype)
    return flops, nbytes, dtype.removeprefix("torch.")
