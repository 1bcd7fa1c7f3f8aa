"""Which attention kernel a GPU chooses for a call of SDPA, with the reasons.

`torch.nn.functional.scaled_dot_product_attention` (SDPA) tries its kernels in order and takes the first that can do the
call. The conditions are the GPU's, so they are written out here, as torch has them only in its CUDA build:

    cudnn       first in order on Hopper and on B200 or B300; fp16 and bf16, masks, grouped heads; from 8.0
    flash       fp16 and bf16, no mask, grouped heads, head dim to 256; from 8.0
    efficient   also fp32, also masks, head dims that tensor cores can load; from 5.0; no grouped heads
    math        plain matmuls in fp32, the matrix of all pairs is kept; always

The switches of `torch.nn.attention.sdpa_kernel` and of `torch.backends.cuda` hold, and so does an order set by them.

Not covered: nested tensors, and FlashAttention-3 where a user activates it. That cuDNN comes first needs cuDNN newer
than 9.15, which the CUDA 13 builds of torch have; with the CUDA 12 builds flash comes first there (both save the same
tensors).

Source: ATen/native/transformers/cuda/sdp_utils.cpp of torch 2.13; sdp_utils_cpp.h as installed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from floatline.errors import ConfigError
from floatline.hardware import Hardware

_HALVES = (torch.float16, torch.bfloat16)
_NEWEST = (12, 1)
"""Newest capability that torch 2.13 builds fused attention for."""
_BY_NUMBER = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn"}
_DEFAULT_ORDER = ("flash", "efficient", "math", "cudnn")


class Choice(NamedTuple):
    """The kernel that a GPU takes for one call of SDPA, and why those before it in the order cannot do the call."""

    name: str
    reasons: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Call:
    """The arguments of one call of SDPA that the choice depends on, shapes as in torch."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None = None
    dropout: float = 0.0
    causal: bool = False
    gqa: bool = False

    @property
    def needs_grad(self) -> bool:
        return torch.is_grad_enabled() and any(t.requires_grad for t in (self.query, self.key, self.value))

    @property
    def dims(self) -> tuple[int, int, int]:
        """Head dims of query, key and value."""
        return self.query.shape[-1], self.key.shape[-1], self.value.shape[-1]


def chosen_kernel(
    hardware: Hardware,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    dropout: float = 0.0,
    causal: bool = False,
    gqa: bool = False,
) -> Choice:
    """Return the kernel that SDPA takes for a call on `hardware`, by the switches and the order set now.

    Args:
        hardware: A CUDA device.
        query: (batch, heads, length, head dim), real, fake or meta; shape, strides, dtype and requires_grad count.
        key: (batch, key heads, key length, head dim).
        value: (batch, key heads, key length, value head dim).
        mask: Of bools or of the query's format, broadcastable to (batch, heads, length, key length).
        dropout: Probability.
        causal: SDPA's `is_causal`.
        gqa: SDPA's `enable_gqa`.

    Returns:
        "cudnn", "flash", "efficient" or "math", and one reason for each kernel that was tried before.

    Raises:
        ConfigError: Every kernel that can do the call is switched off.

    >>> from floatline.hardware import lookup
    >>> q = torch.empty(1, 8, 128, 64, dtype=torch.float16, device="meta")
    >>> chosen_kernel(lookup("t4"), q, q, q)
    Choice(name='efficient', reasons=('flash: t4 has capability 7.5, the kernel needs 8.0 to 12.1',))
    """
    call = Call(query=query, key=key, value=value, mask=mask, dropout=dropout, causal=causal, gqa=gqa)
    reasons: list[str] = []
    for name in kernel_order(hardware):
        reason = _first(_CONDITIONS[name], hardware, call)
        if reason is None:
            return Choice(name, tuple(reasons))
        reasons.append(f"{name}: {reason}")
    raise ConfigError(
        f"no attention kernel on {hardware.name} can compute this call: {'; '.join(reasons)}",
        hint="allow the math kernel too: sdpa_kernel([..., SDPBackend.MATH])",
    )


def kernel_order(hardware: Hardware) -> tuple[str, ...]:
    """Return the order in which SDPA tries its kernels on `hardware`: the user's, or torch's default for the GPU."""
    order = tuple(_BY_NUMBER[n] for n in torch._C._get_sdp_priority_order() if n in _BY_NUMBER)
    prefers_cudnn = _capability(hardware) in ((9, 0), (10, 0), (10, 3))
    if order == _DEFAULT_ORDER and prefers_cudnn and os.environ.get("TORCH_CUDNN_SDPA_DEPRIORITIZED") != "1":
        return ("cudnn", "flash", "efficient", "math")
    return order


# The conditions: each returns why its kernel cannot do the call, or None. They are tried in order.

Condition = Callable[[Hardware, Call], str | None]


def _first(conditions: tuple[Condition, ...], hardware: Hardware, call: Call) -> str | None:
    return next((reason for condition in conditions if (reason := condition(hardware, call))), None)


def _capability(hardware: Hardware) -> tuple[int, int]:
    return hardware.capability or (0, 0)


def _allowed(name: str) -> Condition:
    def condition(_: Hardware, call: Call) -> str | None:
        enabled: dict[str, Callable[[], Any]] = {
            "flash": torch.backends.cuda.flash_sdp_enabled,
            "efficient": torch.backends.cuda.mem_efficient_sdp_enabled,
            "math": torch.backends.cuda.math_sdp_enabled,
            "cudnn": torch.backends.cuda.cudnn_sdp_enabled,
        }
        return None if enabled[name]() else "it is switched off"

    return condition


def _built_for(lowest: tuple[int, int]) -> Condition:
    def condition(hardware: Hardware, _: Call) -> str | None:
        have = _capability(hardware)
        if lowest <= have <= _NEWEST:
            return None
        spelled = [".".join(map(str, version)) for version in (have, lowest, _NEWEST)]
        return "{} has capability {}, the kernel needs {} to {}".format(hardware.name, *spelled)

    return condition


def _not_empty(_: Hardware, call: Call) -> str | None:
    return "it needs at least one query and one key" if 0 in (call.query.numel(), call.key.numel()) else None


def _four_dims(_: Hardware, call: Call) -> str | None:
    dims = [call.query.dim(), call.key.dim(), call.value.dim()]
    return None if dims == [4, 4, 4] else f"query, key and value must have 4 dims, they have {dims}"


def _halves(hardware: Hardware, call: Call) -> str | None:
    if call.query.dtype in _HALVES and (call.query.dtype == torch.float16 or _capability(hardware) >= (8, 0)):
        return None
    return f"it multiplies fp16 and, from capability 8.0, bf16, not {call.query.dtype}"


def _halves_or_fp32(hardware: Hardware, call: Call) -> str | None:
    return None if call.query.dtype == torch.float32 else _halves(hardware, call)


def _no_mask(_: Hardware, call: Call) -> str | None:
    return None if call.mask is None else "it takes no mask besides is_causal"


def _cudnn_mask(_: Hardware, call: Call) -> str | None:
    mask = call.mask
    if mask is None:
        return None
    if mask.requires_grad:
        return "it gives no gradient to a mask"
    full = (call.query.shape[0], call.query.shape[1], call.query.shape[2], call.key.shape[2])
    if mask.dim() in (2, 4) and all(have in (1, want) for have, want in zip(mask.shape[::-1], full[::-1])):
        return None
    return f"a mask of shape {tuple(mask.shape)} does not fit {full} as 2 or 4 dims"


def _same_heads(_: Hardware, call: Call) -> str | None:
    sizes = [tuple(t.shape[:2]) for t in (call.query, call.key, call.value)]
    return None if len(set(sizes)) == 1 else f"it needs the same batch and heads in query, key and value, not {sizes}"


def _grouped(same_key_and_value: bool) -> Condition:
    def condition(hardware: Hardware, call: Call) -> str | None:
        if not call.gqa or len({t.shape[0] for t in (call.query, call.key, call.value)}) > 1:
            return _same_heads(hardware, call)
        heads, keys, values = (t.shape[1] for t in (call.query, call.key, call.value))
        if (same_key_and_value and keys != values) or heads % keys or heads % values:
            return f"{heads} query heads cannot be grouped over {keys} key heads and {values} value heads"
        return None

    return condition


def _unit_strides(ignore_single: bool) -> Condition:
    def condition(_: Hardware, call: Call) -> str | None:
        inputs = all(t.stride(-1) == 1 for t in (call.query, call.key, call.value))
        inputs = inputs or (ignore_single and call.query.shape[-1] == 1)
        if inputs and (call.mask is None or call.mask.stride(-1) == 1):
            return None
        return "the last dim of its inputs must be contiguous"

    return condition


def _flash_dims(_: Hardware, call: Call) -> str | None:
    if len(set(call.dims)) == 1 and call.dims[0] <= 256:
        return None
    return f"head dims must be equal and at most 256, they are {call.dims}"


def _flash_training(hardware: Hardware, call: Call) -> str | None:
    """Flash's backward needs more shared memory than these GPUs have: (192, 224], and above with dropout."""
    capability, width = _capability(hardware), call.query.shape[-1]
    small = (8, 6) <= capability <= (8, 9) or (12, 0) <= capability <= (12, 1)
    if small and call.needs_grad and (192 < width <= 224 or (width > 224 and call.dropout > 0)):
        return f"it has no backward for head dim {width} with dropout {call.dropout:g} on {hardware.name}"
    return None


def _square_if_causal(_: Hardware, call: Call) -> str | None:
    lengths = call.query.shape[2], call.key.shape[2]
    return f"is_causal needs equal lengths, not {lengths}" if call.causal and lengths[0] != lengths[1] else None


def _efficient_dims(hardware: Hardware, call: Call) -> str | None:
    alignment = _alignment(hardware, call.query.dtype)
    query, key, value = call.dims
    if query == key and not query % alignment and not value % alignment:
        return None
    return f"head dims must be multiples of {alignment} in {call.query.dtype}, they are {call.dims}"


def _alignment(hardware: Hardware, dtype: torch.dtype) -> int:
    """Return how many elements a row must be a multiple of, so that tensor cores can load it 16 bytes at a time."""
    major, half = _capability(hardware)[0], dtype in _HALVES
    tensor_cores = major >= 8 or (major == 7 and half)
    return max(4 if major >= 8 else 1, (8 if half else 4) if tensor_cores else 1)


def _cudnn_dims(hardware: Hardware, call: Call) -> str | None:
    query, _, value = call.dims
    limit = 256 if _capability(hardware) == (9, 0) else 128
    if _capability(hardware)[0] == 10 and (query, value) == (192, 128):
        limit = 192
    if max(query, value) > limit or query % 8 or value % 8:
        return f"head dims must be multiples of 8 and at most {limit}, they are {call.dims}"
    if call.key.shape[2] == 1 or (call.query.shape[2] == 1 and call.dropout > 0):
        return "it does not do a length of 1"
    return None


def _deterministic(_: Hardware, call: Call) -> str | None:
    strict = torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    return "it is not deterministic, and torch.use_deterministic_algorithms is on" if strict else None


_CONDITIONS: dict[str, tuple[Condition, ...]] = {
    "cudnn": (
        *(_allowed("cudnn"), _four_dims, _not_empty, _deterministic, _halves, _cudnn_mask, _built_for((8, 0))),
        *(_unit_strides(True), _grouped(False), _cudnn_dims),
    ),
    "flash": (
        *(_allowed("flash"), _four_dims, _not_empty, _no_mask, _flash_dims, _built_for((8, 0)), _flash_training),
        *(_square_if_causal, _halves, _grouped(True), _unit_strides(True)),
    ),
    "efficient": (
        *(_allowed("efficient"), _built_for((5, 0)), _four_dims, _not_empty, _efficient_dims),
        *(_unit_strides(False), _same_heads, _halves_or_fp32),
    ),
    "math": (_allowed("math"),),
}
