"""Refuse what real kernels refuse and fake ones let pass: products and writes of tensors of different dtypes.

A model that keeps a part in bf16 under `32-true`, or multiplies by a buffer in fp64, stops at its first step; torch's
fake kernels go on with the dtype of one of the operands. A plan must not say "fits" of such a run.

Norms are not looked at: CUDA's take weights of another dtype than the input's.
"""

from __future__ import annotations

from typing import Any

import torch

from floatline.errors import ModelError
from floatline.observe.real import where

_aten = torch.ops.aten
_ALIKE = {
    _aten.mm.default: (0, 1),
    _aten.addmm.default: (0, 1, 2),
    _aten.mv.default: (0, 1),
    _aten.addmv.default: (0, 1, 2),
    _aten.convolution.default: (0, 1),
    _aten.index_put.default: (0, 2),
    _aten.index_put_.default: (0, 2),
    _aten.index_add.default: (0, 3),
    _aten.index_add_.default: (0, 3),
}
"""Op -> the places of its tensors that must have one dtype."""


def check_operands(func: Any, args: Any) -> None:
    """Raise where a real kernel would not take the dtypes of an op's tensors together.

    Raises:
        ModelError: It would not.
    """
    places = _ALIKE.get(func)
    if places is None or max(places) >= len(args):
        return
    tensors = [args[place] for place in places]
    if any(tensor.layout is not torch.strided for tensor in tensors):
        return  # autocast has its own way with sparse ones
    given = [tensor.dtype for tensor in tensors]
    if given.count(given[0]) < len(given):
        names = " and ".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in given))
        raise ModelError(
            f"{func} takes tensors of one dtype, but got {names}{where() or ''}",
            hint="cast one of them where they meet, or plan the precision in which they agree",
        )
