"""Dropout and half-precision softmax as CUDA computes them, on fake CPU tensors.

Dropout: a CPU multiplies by noise in the input's format, and keeps that noise for backward: 2 or 4 bytes an element.
CUDA's fused kernel keeps a mask of bools, one byte. Alpha and feature dropout are the same on both.

Softmax of fp16 with an fp32 result (what autocast asks for, and `softmax(x, dtype=torch.float32)`): CUDA's kernel
converts while it reads; a CPU makes an fp32 copy of the input first. For fp16 logits over a large vocabulary that
copy can be the peak of the step. For bf16 both make the copy, and so does this.

Real tensors get torch's own bodies.

Source: ATen/native/Dropout.cpp and SoftMax.cpp of torch 2.13.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from floatline.observe.target.kernels import Kernel, is_fake_cpu, kernels_on, own_body

_SOFTMAX = {"softmax.int": "_softmax", "log_softmax.int": "_log_softmax"}


@contextmanager
def target_pointwise() -> Iterator[None]:
    """Compute dropout and softmax on fake CPU tensors by CUDA's kernels while the context is open."""
    table: dict[str, Kernel] = {"dropout": partial(_dropout, own_body("dropout"))}
    for name, converting in _SOFTMAX.items():
        table[name] = partial(_softmax, own_body(name), getattr(torch.ops.aten, converting).default)
    with kernels_on("CompositeImplicitAutograd", table):
        yield


def _dropout(own: Kernel, x: torch.Tensor, p: float, train: bool) -> Any:
    if is_fake_cpu(x) and train and 0 < p < 1 and x.numel():
        return torch.ops.aten.native_dropout(x, p, train)[0]
    return own(x, p, train)


def _softmax(own: Kernel, converting: Kernel, x: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> Any:
    if is_fake_cpu(x) and x.dtype == torch.float16 and dtype == torch.float32:
        return converting(x, dim, True)
    return own(x, dim, dtype)
