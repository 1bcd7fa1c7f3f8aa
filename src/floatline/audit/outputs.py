"""What a function returned: its tensors by name, and how far each is from the exact one."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils._pytree import keystr, tree_flatten_with_path

from floatline.audit.function_report import OutputError
from floatline.audit.value import is_dense
from floatline.errors import ModelError

Tensors = dict[str, torch.Tensor]


def path_name(path: Any, root: str) -> str:
    """Return the name of a leaf: `image` for inputs['image'], else as Python would index it."""
    if root == "inputs" and len(path) == 1 and isinstance(getattr(path[0], "key", None), str):
        return str(path[0].key)
    return root + keystr(path)


def outputs_of(out: Any, source: str) -> Tensors:
    """Return the tensors that a function returned, by name."""
    leaves, _ = tree_flatten_with_path(out)
    found = {path_name(path, "output"): leaf for path, leaf in leaves if isinstance(leaf, torch.Tensor)}
    found = {name: value for name, value in found.items() if is_dense(value) and value.numel()}
    if not found:
        kinds = ", ".join(sorted({type(leaf).__name__ for _, leaf in leaves})) or type(out).__name__
        raise ModelError(
            f"{source} returned no tensor with real values in it ({kinds})",
            hint="return the tensors themselves, not .item() or .numpy() of them; of complex ones torch.view_as_real",
        )
    return found


def output_error(name: str, value: torch.Tensor, exact: torch.Tensor) -> OutputError:
    """Hold an output against the exact one, whole.

    Args:
        name: Of the output.
        value: In any format.
        exact: In fp64; of integers and booleans in their own. Another shape is as wrong as can be.
    """
    if value.shape != exact.shape:
        count = exact.numel() if not exact.is_floating_point() else 0
        return OutputError(name=name, relative=math.inf, largest=math.inf, cosine=None, flipped=count, decisions=count)
    if not exact.is_floating_point():
        flipped = int((value.to(exact.dtype) != exact).sum())
        return OutputError(name=name, relative=0.0, largest=0.0, cosine=None, flipped=flipped, decisions=exact.numel())
    wide = value.double()
    finite = torch.isfinite(exact)
    off = torch.where(wide == exact, 0.0, (wide - exact).abs())
    off = torch.where(torch.isnan(off), math.inf, off)
    truth, got = torch.where(finite, exact, 0.0), torch.where(finite, wide, 0.0)
    size, error = float(truth.square().sum().sqrt()), float(off.square().sum().sqrt())
    length = float(got.square().sum().sqrt())
    return OutputError(
        name=name,
        relative=error / size if size else (math.inf if error else 0.0),
        largest=float(off.max()),
        cosine=float((truth * got).sum()) / (size * length) if size and 0 < length < math.inf else None,
    )
