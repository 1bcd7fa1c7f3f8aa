"""RMS norm as CUDA computes it, on fake CPU tensors: one kernel that keeps its input and one fp32 number a row.

`torch.nn.functional.rms_norm` on a CPU is made of pow, mean, rsqrt and products, and autograd keeps intermediate
results of the input's size. CUDA has a fused kernel for it; where the weight has another format than the input, or
the input is channels-last, CUDA falls back to the same parts. Models that write the parts out themselves (most of
Hugging Face's) run as they are written on both.

Layer and group norm have one kernel on both sides. A CPU's layer norm keeps its statistics in the input's format, CUDA
in fp32: 4 bytes a row, not modelled. Not covered either: cuDNN's batch norm, which may keep a reserve.

Source: ATen/native/layer_norm.cpp and ATen/native/cuda/layer_norm_kernel.cu of torch 2.13.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from floatline.observe.target.kernels import Kernel, is_fake_cpu, kernels_on, own_body


@contextmanager
def target_norms() -> Iterator[None]:
    """Compute RMS norm on fake CPU tensors by CUDA's fused kernel while the context is open."""
    with kernels_on("CompositeImplicitAutograd", {"rms_norm": partial(_rms_norm, own_body("rms_norm"))}):
        yield


def _rms_norm(
    own: Kernel,
    x: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> Any:
    fused = weight is None or weight.dtype == x.dtype
    fits = tuple(x.shape[x.dim() - len(normalized_shape) :]) == tuple(normalized_shape)
    if is_fake_cpu(x, *([] if weight is None else [weight])) and fused and fits and not _channels_last(x):
        return _FusedRmsNorm.apply(x, list(normalized_shape), weight)
    return own(x, normalized_shape, weight, eps)


def _channels_last(x: torch.Tensor) -> bool:
    if x.is_contiguous() or x.dim() not in (4, 5):
        return False
    return x.is_contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


class _FusedRmsNorm(torch.autograd.Function):
    """What the fused kernel allocates and saves; fake tensors have no values to compute."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, shape: list[int], weight: torch.Tensor | None) -> torch.Tensor:
        rows = [*x.shape[: x.dim() - len(shape)], *(1 for _ in shape)]
        wide = x.dtype if x.dtype == torch.float64 else torch.float32
        ctx.save_for_backward(x, weight, x.new_empty(rows, dtype=wide))
        ctx.normalized_shape = shape
        return x.new_empty(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        x, weight, rstd = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[0], weight is not None and ctx.needs_input_grad[2]]
        backward = torch.ops.aten._fused_rms_norm_backward
        dx, dweight = backward(gradients[0], x, ctx.normalized_shape, rstd, weight, wanted)
        return dx if wanted[0] else None, None, dweight if wanted[1] else None
