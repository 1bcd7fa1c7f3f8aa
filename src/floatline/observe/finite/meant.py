"""Which infinities a program means, and which ops write without reading.

A mask filled with -inf, the +inf that a minimum starts from, `log` of a mask of zeros and ones: none of them is a fault.
They become one where an op makes NaN of them (softmax over a row that is masked everywhere, inf - inf), or where nothing
else is left after a reduction and it reaches the loss.

`log` of zeros and ones that hang on a parameter is no mask: those are probabilities that have saturated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from floatline.observe.finite.numbers import dense, has_nan

RAW = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted", "resize_",
                 "_efficientzerotensor", "set_"})  # fmt: skip
"""Ops that hand out memory without writing it."""
OVERWRITING = frozenset({"copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_", "random_", "exponential_",
                         "cauchy_", "log_normal_", "geometric_", "set_"})  # fmt: skip
"""In-place ops whose result does not depend on what was there before."""
MOVING = frozenset({"clone", "contiguous", "cat", "stack", "index", "index_select", "gather", "detach", "copy_", "repeat",
                    "roll", "flip", "select_scatter", "slice_scatter", "select_backward", "slice_backward", "embedding",
                    "unfold_backward", "constant_pad_nd", "_reshape_alias", "_unsafe_view", "lift_fresh", "take",
                    "masked_select", "tril", "triu", "unbind", "split_with_sizes_copy", "permute_copy"})  # fmt: skip
"""Ops that move values and compute none."""
LOGS = frozenset({"log", "log2", "log10", "log_", "log2_", "log10_"})


def floats_in(value: Any) -> Iterator[float]:
    """Yield the floats of an op's plain arguments."""
    if isinstance(value, float):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from floats_in(item)


def is_meant(name: str, scalars: dict[str, Any], inputs: list[tuple[str, torch.Tensor]], outputs: list[Any]) -> bool:
    """Say whether an op that made infinities out of finite tensors was asked to.

    Args:
        name: The op.
        scalars: Its plain arguments.
        inputs: Its tensors.
        outputs: Its results that are not finite.
    """
    if any(has_nan(out) for out in outputs):
        return False
    if any(math.isinf(value) for scalar in scalars.values() for value in floats_in(scalar)):
        return True
    return name in LOGS and bool(inputs) and _is_indicator(inputs[0][1])


def _is_indicator(tensor: torch.Tensor) -> bool:
    """Say whether a tensor holds zeros and ones only and hangs on no parameter: a mask as numbers."""
    values = dense(tensor)
    return not tensor.requires_grad and bool(values.numel()) and bool(((values == 0) | (values == 1)).all())


def is_mask(tensor: torch.Tensor) -> bool:
    """Say whether a tensor that was there before is a mask or a constant that is infinite on purpose.

    One number; or -inf beside zeros (what is added to scores); or infinite everywhere (what a minimum starts from).
    """
    values = dense(tensor)
    if has_nan(values):
        return False
    finite = torch.isfinite(values)
    if tensor.dim() == 0 or not bool(finite.any()):
        return True
    return not bool((values == float("inf")).any()) and not bool(values[finite].any())
