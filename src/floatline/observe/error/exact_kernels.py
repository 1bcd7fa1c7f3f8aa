"""fp64 versions of ops that torch has no fp64 kernel for."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch


def grouped_mm(
    left: torch.Tensor,
    right: torch.Tensor,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Matrix products by groups, as `torch._grouped_mm` (mixtures of experts) computes them.

    Args:
        left: (tokens, k), (groups, m, k) or, for a weight's gradient, (m, tokens).
        right: (groups, k, n), (k, tokens) or (tokens, n).
        offs: int32 ends of the groups along the dimension that has no group axis.
        bias: As torch takes it: none so far.
        out_dtype: Not used: the result is in the inputs' format.
    """
    if left.dim() == 3 and right.dim() == 3:
        return torch.bmm(left, right)
    assert offs is not None
    starts = [0, *offs.tolist()]
    spans = [slice(start, end) for start, end in pairwise(starts)]
    if left.dim() == 2 and right.dim() == 3:
        out = left.new_zeros(left.shape[0], right.shape[2])
        for group, span in enumerate(spans):
            out[span] = left[span] @ right[group]
        return out
    if left.dim() == 2:
        return torch.stack([left[:, span] @ right[span] for span in spans])
    out = left.new_zeros(left.shape[1], right.shape[1])
    for group, span in enumerate(spans):
        out[:, span] = left[group] @ right[:, span]
    return out


EXACT_KERNELS: dict[str, Callable[..., Any]] = {"_grouped_mm": grouped_mm}
"""aten name -> what runs in its place in fp64."""
