"""What kernels allocate inside of one op: memory that is alive at the op's peak and gone when it returns.

A trace on fake tensors sees results only. Kernels need more: a convolution reorders its input, a reduction in bf16
makes an fp32 copy, a sort keeps a second array, attention's backward adds up in fp32. Some also leave a result whose
storage is larger than the tensor. Per device:

    cpu     cpu.py has ATen's own kernels as formulas, libraries.py runs small ops of oneDNN, MKL and LAPACK once for
            real (measure.py) and scales what it finds to the size asked for
    cuda    cuda.py has formulas from ATen's sources; what cuDNN takes is bounded, not known
    shared  shared.py has the kernels that are the same code on both

`benchmarks/scratch.py` prints each rule beside the real allocator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from floatline.hardware import Hardware


class Need(NamedTuple):
    """What one call of an op allocates beyond its results as tensors.

    Attributes:
        extra: Bytes that are alive together with all results and freed before the op returns.
        storages: Bytes of the storage of each result tensor, in order; empty where they are as the tensors say.
    """

    extra: int = 0
    storages: tuple[int, ...] = ()


NOTHING = Need()
Scratch = Callable[[Any, Any, Any, Any], Need]
"""(op, args, kwargs, result) -> what its kernel allocates."""


def scratch_of(hardware: Hardware) -> Scratch:
    """Return the scratch rules of `hardware`.

    >>> import torch
    >>> from floatline.hardware import lookup
    >>> q = torch.empty(1, 4, 1024, 64, dtype=torch.bfloat16, device="meta")
    >>> attend = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
    >>> scratch_of(lookup("h100"))(attend, (q, q, q, q, q, None), {}, (q, q, q)).extra == 4 * 1024 * (64 + 1) * 4
    True
    """
    if hardware.kind == "cuda":
        from floatline.observe.scratch.cuda import CudaScratch

        return CudaScratch()
    from floatline.observe.scratch.cpu import CpuScratch

    return CpuScratch()
