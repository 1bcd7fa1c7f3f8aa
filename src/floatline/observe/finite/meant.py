"""Which infinities a program means, and which ops write without reading.

A mask filled with -inf, the +inf that a minimum starts from, `log` of a mask of zeros and ones: none of them is a
fault. They become one where an op makes NaN of them (softmax over a row that is masked everywhere, inf - inf), or where
nothing else is left after a reduction and it reaches the loss.

`log` of zeros and ones that were computed is no mask: those are probabilities that have saturated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from floatline.observe.finite.numbers import dense, has_nan
from floatline.observe.finite.origins import Made

if TYPE_CHECKING:
    from floatline.observe.finite.ran import Given, Ran

RAW = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted", "resize_",
                 "set_"})  # fmt: skip
"""Ops that hand out memory without writing it."""
OVERWRITING = frozenset({"copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_", "random_", "exponential_",
                         "cauchy_", "log_normal_", "geometric_", "set_"})  # fmt: skip
"""In-place ops whose result does not depend on what was there before."""
MOVING = frozenset({"clone", "contiguous", "cat", "stack", "index", "index_select", "gather", "detach", "copy_",
                    "repeat", "roll", "flip", "select_scatter", "slice_scatter", "select_backward", "slice_backward",
                    "embedding", "unfold_backward", "constant_pad_nd", "_reshape_alias", "_unsafe_view", "lift_fresh",
                    "take", "masked_select", "tril", "triu", "unbind", "split_with_sizes_copy",
                    "permute_copy"})  # fmt: skip
"""Ops that move values and compute none."""
SOFTMAX = frozenset({"_softmax", "_log_softmax", "_safe_softmax"})
"""Ops that make NaN of a row that is masked throughout, however the mask was made."""
LOGS = frozenset({"log", "log2", "log10", "log_", "log2_", "log10_"})


_MASKING = frozenset({"_to_copy", "copy", "ones", "zeros", "ones_like", "zeros_like", "full", "full_like", "new_ones",
                      "new_zeros", "new_full", "tril", "triu", "scatter", "index_put", "index_fill", "fill", "zero",
                      "masked_fill", "where", "eye", "diag", "rsub"})  # fmt: skip
"""Ops that masks are made with, without the underscore of their in-place forms."""


_WRITING = frozenset({"copy", "fill", "index_put", "masked_fill"})


def base(op: str) -> str:
    """Return an op's name without the underscore of its in-place form."""
    return op if op.startswith("_") else op.rstrip("_")


def floats_in(value: Any) -> Iterator[float]:
    """Yield the floats of an op's plain arguments."""
    if isinstance(value, float):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from floats_in(item)


def is_meant(ran: Ran, outputs: list[torch.Tensor], made_by: dict[str, Made]) -> bool:
    """Say whether an op that made infinities out of finite tensors was asked to.

    Args:
        ran: The op.
        outputs: Its results that are not finite.
        made_by: Name of an input -> the op that had made it.
    """
    if any(has_nan(out) for out in outputs):
        return False
    if any(math.isinf(value) for scalar in ran.scalars.values() for value in floats_in(scalar)):
        return True
    return ran.name in LOGS and _is_indicator(ran.inputs[0].before, made_by.get(ran.inputs[0].label))


def _is_indicator(tensor: torch.Tensor, made: Made | None) -> bool:
    """Say whether a tensor is a mask as numbers: zeros and ones only, and not computed."""
    if tensor.requires_grad or (made is not None and base(made.spot.op) not in _MASKING):
        return False
    values = dense(tensor)
    return bool(values.numel()) and bool(((values == 0) | (values == 1)).all())


def is_constant(given: Given, op: str, variable: str) -> bool:
    """Say whether a tensor is a NaN that stands as a number in the program: torch makes a tensor of `h[0] = nan`.

    Args:
        given: The tensor.
        op: The op that met it.
        variable: What the program calls it, "" where it has no name.
    """
    return base(op) in _WRITING and given.tensor.dim() == 0 and not variable and has_nan(given.before)


def is_mask(tensor: torch.Tensor) -> bool:
    """Say whether a tensor that was there before is a mask or a constant that is infinite on purpose.

    One number; or -inf beside zeros (what is added to scores); or infinite everywhere (what a minimum starts from).
    What is trained is none of these.
    """
    values = dense(tensor)
    if has_nan(values) or tensor.requires_grad:
        return False
    finite = torch.isfinite(values)
    if tensor.dim() == 0 or not bool(finite.any()):
        return True
    return not bool((values == float("inf")).any()) and not bool(values[finite].any())
