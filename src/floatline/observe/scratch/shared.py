"""Kernels that are the same code on every device: composed of other ops in C++, below the dispatcher that a trace sees.

Sources are files of PyTorch under aten/src/ATen/native.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from floatline.observe.real import tensors_in
from floatline.observe.scratch import NOTHING, Need

aten = torch.ops.aten
Rule = Callable[[Any, Any, Any], Need]
"""(args, kwargs, result) -> need."""
HALVES = (torch.bfloat16, torch.float16)


def size_of(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


def up(number: int, multiple: int) -> int:
    """Return a number rounded up to a multiple.

    >>> up(129, 128)
    256
    """
    return -(-number // multiple) * multiple


def argument(args: Any, kwargs: Any, position: int, name: str, default: Any = None) -> Any:
    """Return an argument that is given by position or by name."""
    return args[position] if len(args) > position else kwargs.get(name, default)


def _elementwise_loss(args: Any, kwargs: Any, out: torch.Tensor) -> Need:
    """Loss.cpp, `mse_loss_out` and `smooth_l1_loss_out`: the meta function shapes the result as the input, the kernel
    fills a temporary of that size, and its mean is written into the result, which keeps its large storage."""
    if argument(args, kwargs, 2, "reduction", 1) == 0:
        return NOTHING
    full = max(tensor.numel() for tensor in args[:2]) * out.element_size()
    return Need(full, (full,))


def _huber(args: Any, kwargs: Any, out: torch.Tensor) -> Need:
    """Loss.cpp, `huber_loss`: the loss of each element is one temporary."""
    whole = argument(args, kwargs, 2, "reduction", 1) == 0
    return NOTHING if whole else Need(max(tensor.numel() for tensor in args[:2]) * out.element_size())


def _logits_loss(args: Any, kwargs: Any, out: torch.Tensor) -> Need:
    """Loss.cpp, `binary_cross_entropy_with_logits`: the loss of each element, and log-sigmoid beside it."""
    return Need((1 if argument(args, kwargs, 4, "reduction", 1) == 0 else 2) * size_of(args[0]))


def _logsumexp(args: Any, kwargs: Any, out: torch.Tensor) -> Need:
    """ReduceOps.cpp, `logsumexp_out_impl`: exp(self - maximum) is a temporary, the maxima are another."""
    return Need(size_of(args[0]) + size_of(out))


def _roll(args: Any, kwargs: Any, out: torch.Tensor) -> Need:
    """TensorTransformations.h, `roll_common`: one dimension after the other, each into a new tensor."""
    return Need(size_of(out) if len(args) > 2 and len(args[2]) > 1 else 0)


def _safe_softmax(args: Any, kwargs: Any, out: torch.Tensor) -> Need:
    """transformers/attention.cpp, `_safe_softmax`: which scores are -inf, and which rows are so throughout."""
    return Need(out.numel() + out.numel() // max(1, out.shape[args[1]]))


def plain_sizes(out: Any) -> tuple[int, ...]:
    """Return the storage sizes that a fake result says it has."""
    return tuple(tensor.untyped_storage().nbytes() for tensor in tensors_in(out))


SHARED: dict[Any, Rule] = {
    aten.mse_loss: _elementwise_loss,
    aten.smooth_l1_loss: _elementwise_loss,
    aten.huber_loss: _huber,
    aten.binary_cross_entropy_with_logits: _logits_loss,
    aten.logsumexp: _logsumexp,
    aten.roll: _roll,
    aten._safe_softmax: _safe_softmax,
}
