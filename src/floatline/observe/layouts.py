"""Results that a kernel lays out otherwise in memory than its meta function says.

Batch norm writes a contiguous result (or a channels-last one) whatever the strides of its input, on a CPU and by
cuDNN; its meta function keeps the input's strides. Where the input is a transposed tensor, as in models that normalise
(batch, time, channels), the copies that a program makes of the result afterwards are there or not accordingly.

Source: aten/src/ATen/native/Normalization.cpp, `batch_norm_cpu` and `_batch_norm_impl_index`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

if TYPE_CHECKING:
    from floatline.observe.fake import Faking

aten = torch.ops.aten


def like_suggested(mode: Faking, func: Any, args: Any, kwargs: Any) -> Any:
    """The first result is laid out anew: channels last where the input is, else contiguous."""
    out = mode.run(func, args, kwargs)
    first = out[0]
    if not isinstance(first, FakeTensor) or first.is_contiguous() or _channels_last(first):
        return out
    return (torch.empty(first.shape, dtype=first.dtype, device=first.device), *out[1:])


def _channels_last(tensor: torch.Tensor) -> bool:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return tensor.dim() in formats and tensor.is_contiguous(memory_format=formats[tensor.dim()])


LAID_OUT = {
    packet.default: like_suggested
    for packet in (aten.native_batch_norm, aten._native_batch_norm_legit, aten.native_batch_norm_backward)
}
"""Op -> its handler (mode, op, args, kwargs) -> result."""
