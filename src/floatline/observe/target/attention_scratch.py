"""What attention's backward kernels allocate inside, for as long as they run, which no meta function shows.

All of them sum the gradient of the queries over blocks of keys, in fp32, in a buffer apart from the result: twice the
size of the queries in half precision. A recorder of allocations adds it to the op's own.

    flash      dQ in fp32 with lengths rounded up to 128 and head dims to 32, a number a row, and for grouped heads the
               gradients of keys and values once for each query head
    efficient  dQ in fp32 in tiles of 64 x 64 with 16 bytes of locks each (not for fp32 on Pascal), and a number a row
    cudnn      not published; counted as dQ in fp32, which is an assumption

Not covered: deterministic flash (one dQ for each split, whose number depends on the GPU's multiprocessors), efficient's
staging of dK and dV where a head is wider than its block, tiles of 128 rows.

Source: mha_bwd in ATen/native/transformers/cuda/flash_attn/flash_api.cpp; workspace_size in mem_eff_attention/
kernel_backward.h, installed with torch.
"""

from __future__ import annotations

import torch

from floatline.hardware import Hardware

_FP32 = 4


def attention_scratch(hardware: Hardware, op: str, query: torch.Tensor, key: torch.Tensor) -> int:
    """Return the bytes that an attention kernel allocates inside while it runs.

    Args:
        hardware: The target.
        op: Name of the aten op without overload, e.g. "_scaled_dot_product_flash_attention_backward".
        query: (batch, heads, length, head dim), as the op got it.
        key: (batch, key heads, key length, head dim).

    Returns:
        0 for every other op; forward kernels allocate nothing of note.

    >>> from floatline.hardware import lookup
    >>> q = torch.empty(1, 8, 1024, 64, dtype=torch.bfloat16, device="meta")
    >>> attention_scratch(lookup("a100"), "_scaled_dot_product_flash_attention_backward", q, q) / q.nbytes
    2.03125
    """
    if op == "_scaled_dot_product_flash_attention_backward":
        return _flash(query, key)
    if op == "_scaled_dot_product_efficient_attention_backward":
        return _efficient(hardware, query)
    if op == "_scaled_dot_product_cudnn_attention_backward":
        return query.numel() * _FP32
    return 0


def _flash(query: torch.Tensor, key: torch.Tensor) -> int:
    batch, heads, length, width = query.shape
    rows = batch * heads * _up(length, 128)
    wide = _up(width, 32) if width <= 192 else 256
    grouped = 2 * batch * heads * key.shape[2] * width * query.element_size() if key.shape[1] != heads else 0
    return rows * (wide + 1) * _FP32 + grouped


def _efficient(hardware: Hardware, query: torch.Tensor) -> int:
    batch, heads, length, width = query.shape
    row_sums = batch * heads * length * _FP32
    if query.dtype == torch.float32 and (hardware.capability or (0, 0)) < (7, 0):
        return row_sums
    tiles = batch * heads * (_up(length, 64) // 64) * (_up(width, 64) // 64)
    return row_sums + tiles * (64 * 64 * _FP32 + 16)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
