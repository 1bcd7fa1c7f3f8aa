"""Running sums that stand still: which increments are lost when the running total is kept in a lower format.

A running total c in a format with m mantissa bits has spacing ulp(c) = 2^(floor(log2 c) - m). An increment of half of
it or less does not change c: bf16 counts to 256, fp16 to 2048, and no further. Whether a kernel keeps its total in the
format of the result or in a wider one differs from device to device, so the share is computed from the exact
increments and totals, not observed.

    cumsum, logcumsumexp     totals along the dimension
    histc, bincount, scatter_add, index_add, index_put(accumulate=True)
                             the total of each cell, if the increments arrive one at a time

`sum`, `mean`, norms and matrix products are not looked at: their kernels keep an fp32 total on CPU and on CUDA.
"""

from __future__ import annotations

from typing import Any

import torch

from floatline.observe.error.measures import HALVES, format_of


def swallowed_share(name: str, args: list[Any], results: list[torch.Tensor]) -> float | None:
    """Return the share of nonzero increments that would be lost.

    Args:
        name: The op's aten name.
        args: Its positional arguments, exact values.
        results: What it gave, in the lower format.

    Returns:
        0 to 1; None for an op that keeps no running total, or keeps it in fp32.
    """
    if not results or results[0].dtype not in HALVES:
        return None
    bits = format_of(results[0].dtype).mantissa_bits
    if name in ("cumsum", "cumsum_"):
        increments, dim = args[0], args[1]
        totals = increments.cumsum(dim)
        return _lost(increments, totals - increments, bits)
    if name in ("scatter_add", "scatter_add_", "index_add", "index_add_"):
        return _lost_in_cells(args, name, bits)
    if name in ("index_put", "index_put_", "_index_put_impl_") and len(args) > 3 and args[3]:
        ones = torch.zeros_like(args[0]).index_put_(tuple(args[1]), torch.ones_like(args[2]), accumulate=True)
        return _lost_in_counts(args[0].index_put(tuple(args[1]), args[2], accumulate=True), ones, bits)
    if name in ("histc", "bincount"):
        return None if results[0].numel() == 0 else _lost_in_counts(results[0].double(), results[0].double(), bits)
    return None


def _lost(increments: torch.Tensor, totals: torch.Tensor, bits: int) -> float:
    nonzero = increments != 0
    small = increments.abs() <= spacing(totals, bits) / 2  # a tie goes to the even total, and stays there
    return float((small & nonzero).sum()) / max(int(nonzero.sum()), 1)


def _lost_in_cells(args: list[Any], name: str, bits: int) -> float:
    start, dim, index, source = args[0], args[1], args[2], args[3]
    ones = torch.ones_like(source)
    add = torch.Tensor.index_add if name.startswith("index") else torch.Tensor.scatter_add
    counts = add(torch.zeros_like(start), dim, index, ones)
    return _lost_in_counts(add(start, dim, index, source), counts, bits)


def _lost_in_counts(totals: torch.Tensor, counts: torch.Tensor, bits: int) -> float:
    """Share of increments that come after a cell's total has grown 2^(bits+1) times its mean increment."""
    arrived = counts.clamp(min=0)
    lost = (arrived - 2.0 ** (bits + 1)).clamp(min=0)
    lost = torch.where(totals == 0, 0.0, lost)
    return float(lost.sum() / arrived.sum().clamp(min=1))


def spacing(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Return one ulp at each value, 0 at zero."""
    _, exponent = torch.frexp(values)
    return torch.where(values == 0, 0.0, torch.ldexp(torch.ones_like(values), exponent - 1 - bits))
