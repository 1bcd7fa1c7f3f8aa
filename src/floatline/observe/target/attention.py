"""Attention computed by the kernel that the target GPU would choose, on fake CPU tensors.

On a CPU `torch.nn.functional.scaled_dot_product_attention` (SDPA) takes another kernel with other saved tensors.
Within `target_attention` its body is this one: the choice is made as on the GPU (attention_choice.py), and aten's own
kernel is called, whose meta function allocates what the real one returns and saves: the output and the fp32 logsumexp
of each row (rounded up to 32 rows by the efficient kernel).

What SDPA does around the kernels is done here too, for it can cost more than they do: a mask of bools becomes a mask
of the query's format, a mask whose rows do not start at multiples of 8 elements is copied into a wider one, head dims
are padded to multiples of 8 for flash, and math computes in fp32 on repeated keys and values. Under autocast the
inputs arrive here cast already, as on CUDA.

Real tensors, nested tensors and those of other devices get torch's own body.

Not covered here: the kernels' scratch (attention_scratch.py), and the fast path of
`nn.TransformerEncoderLayer` in inference.

Source: ATen/native/transformers/attention.cpp of torch 2.13.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional as F

from floatline.hardware import Hardware
from floatline.observe.target.attention_choice import Call, Choice, chosen_kernel
from floatline.observe.target.kernels import is_fake_cpu, kernels_on, own_body


@contextmanager
def target_attention(hardware: Hardware) -> Iterator[Counter[Choice]]:
    """Compute SDPA on fake CPU tensors by the kernel that `hardware` would choose, while the context is open.

    Yields:
        How often each kernel was taken, for which reasons.
    """
    name = "scaled_dot_product_attention"
    taken: Counter[Choice] = Counter()
    body = _body(hardware, own_body(name), taken)
    with kernels_on("CompositeImplicitAutograd", {name: body}):
        yield taken


def _body(hardware: Hardware, own: Callable[..., torch.Tensor], taken: Counter[Choice]) -> Callable[..., torch.Tensor]:
    def attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        inputs = (query, key, value)
        if not is_fake_cpu(*inputs) or _left_to_torch(*inputs):
            return own(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        settings: dict[str, Any] = {"dropout": dropout_p, "causal": is_causal, "gqa": enable_gqa}
        choice = chosen_kernel(hardware, *inputs, attn_mask, **settings)
        taken[choice] += 1
        call = Call(query=query, key=key, value=value, mask=attn_mask, **settings)
        return _RUN[choice.name](call, _additive(attn_mask, query.dtype), scale)

    return attention


def _left_to_torch(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Say whether torch's own body shall see a call: one without elements, or one that it refuses in clear words."""
    return 0 in (query.numel(), key.numel(), value.numel()) or not query.dtype == key.dtype == value.dtype


def _additive(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Return a mask of bools as one that is added: 0 where attention is allowed, -inf elsewhere."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.where(mask, 0.0, torch.full((), -torch.inf, dtype=dtype))


def _cudnn(call: Call, mask: torch.Tensor | None, scale: float | None) -> torch.Tensor:
    compute = torch.ops.aten._scaled_dot_product_cudnn_attention
    q, k, v = call.query, call.key, call.value
    return compute(q, k, v, mask, call.needs_grad, call.dropout, call.causal, False, scale=scale)[0]


def _flash(call: Call, _: torch.Tensor | None, scale: float | None) -> torch.Tensor:
    width = call.query.shape[-1]
    q, k, v = (F.pad(t, (0, -width % 8)) if width % 8 else t for t in (call.query, call.key, call.value))
    scale = width**-0.5 if scale is None else scale
    out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, call.dropout, call.causal, False, scale=scale)[0]
    return out[..., :width] if width % 8 else out


def _efficient(call: Call, mask: torch.Tensor | None, scale: float | None) -> torch.Tensor:
    compute = torch.ops.aten._scaled_dot_product_efficient_attention
    q, k, v = call.query, call.key, call.value
    if mask is not None:
        mask = _aligned(mask).expand(*q.shape[:3], k.shape[2])
    return compute(q, k, v, mask, call.needs_grad, call.dropout, call.causal, scale=scale)[0]


def _aligned(mask: torch.Tensor) -> torch.Tensor:
    """Return a mask whose rows start at multiples of 8 elements; it is copied into a wider one where they do not."""
    if mask.stride(-1) == 1 and all(stride % 8 == 0 for stride in mask.stride()[:-1]):
        return mask
    length = mask.shape[-1]
    return F.pad(mask, (0, 8 - length % 8))[..., :length]


def _math(call: Call, mask: torch.Tensor | None, scale: float | None) -> torch.Tensor:
    compute = torch.ops.aten._scaled_dot_product_attention_math
    q, k, v = call.query, call.key, call.value
    return compute(q, k, v, mask, call.dropout, call.causal, None, scale=scale, enable_gqa=call.gqa)[0]


_RUN: dict[str, Callable[[Call, torch.Tensor | None, float | None], torch.Tensor]] = {
    "cudnn": _cudnn,
    "flash": _flash,
    "efficient": _efficient,
    "math": _math,
}
