"""How to compute logits that were put off: the head's input, and what was done to the logits since.

Row i of the logits depends on row i of the hidden states only. So views, flattening and indexing of the leading
dimensions are applied to the hidden states at once; casts and arithmetic with scalars are recorded and repeated on
the logits of each chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

CASTS = {"to", "float", "half", "bfloat16", "double", "type_as", "contiguous"}
SCALAR_MATHS = {"mul", "multiply", "div", "divide", "true_divide", "add", "sub", "subtract", "rsub", "neg", "tanh",
                "__mul__", "__rmul__", "__truediv__", "__rtruediv__", "__div__", "__rdiv__", "__add__", "__radd__",
                "__sub__", "__rsub__", "__neg__", "clone"}  # fmt: skip


class Rows:
    """Stands for the logits in the arguments of a recorded op."""


@dataclass(frozen=True)
class Ledger:
    """What the deferred logits of one head share.

    Args:
        chunk_tokens: Rows of a chunk.
        counted: Losses in chunks, their chunks, and logits that were computed whole.
        whole: Called with an op's name and the shape when it makes logits whole.
    """

    chunk_tokens: int
    counted: dict[str, float]
    whole: Callable[[str, torch.Size], None]

    def count(self, what: str, by: float = 1.0) -> None:
        self.counted[what] = self.counted.get(what, 0.0) + by


@dataclass(frozen=True)
class Recipe:
    """How to compute logits.

    Args:
        head: (..., hidden) -> (..., vocabulary).
        parameters: The head's, and scalars of recorded ops; those that require grad.
        hidden: Input of the head, (..., hidden), reshaped and sliced as the logits were.
        probe: No rows of the logits, (0, vocabulary): what recorded ops do to the dtype is seen on it.
        random: Whether the head has dropout.
        ledger: Chunk size and counters.
        ops: Recorded elementwise ops, applied in order.
        classes_second: The logits are (N, vocabulary, d) instead of (N, d, vocabulary), as torch's losses take them.
    """

    head: Callable[[torch.Tensor], torch.Tensor]
    parameters: tuple[torch.Tensor, ...]
    hidden: torch.Tensor
    probe: torch.Tensor
    random: bool
    ledger: Ledger
    ops: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = ()
    classes_second: bool = False

    @property
    def vocabulary(self) -> int:
        return self.probe.shape[-1]

    @property
    def shape(self) -> torch.Size:
        shape = [*self.hidden.shape[:-1], self.vocabulary]
        return torch.Size([shape[0], shape[2], shape[1]] if self.classes_second else shape)

    def of(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the logits of some rows of hidden states."""
        logits = self.head(rows)
        for op in self.ops:
            logits = op(logits)
        return logits

    def whole(self) -> torch.Tensor:
        """Return all logits."""
        logits = self.of(self.hidden)
        return logits.transpose(1, 2) if self.classes_second else logits


def with_op(recipe: Recipe, func: Any, name: str, args: Any, kwargs: Any) -> Recipe | None:
    """Record a cast or scalar maths.

    Args:
        recipe: Of the logits.
        func: The op, as torch names it to `__torch_function__`.
        name: Its name, one of CASTS or SCALAR_MATHS.
        args: Its arguments, with `Rows` in the place of the logits.
        kwargs: The same.

    Returns:
        The recipe with the op; the recipe itself if it changes nothing; None if it is not the same for every row.
    """
    args, kwargs = tree_map(lambda leaf: _without_leading_ones(leaf, recipe), (args, kwargs))
    others = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    if name == "type_as":
        func, args, others = torch.Tensor.to, (Rows, others[0].dtype), []
    if "out" in kwargs or (name in SCALAR_MATHS and not all(_same_for_rows(other, recipe) for other in others)):
        return None

    def op(rows: torch.Tensor) -> torch.Tensor:
        given, named = tree_map(lambda leaf: rows if leaf is Rows else leaf, (args, kwargs))
        made: torch.Tensor = func(*given, **named)
        return made

    with torch.no_grad():
        probe = op(recipe.probe)
    if probe.device != recipe.probe.device or probe.shape != recipe.probe.shape:
        return None
    if name in CASTS and probe.dtype == recipe.probe.dtype and not kwargs.get("copy"):
        return recipe
    learned = tuple(other for other in others if other.requires_grad)
    return replace(recipe, probe=probe, ops=(*recipe.ops, op), parameters=(*recipe.parameters, *learned))


def _without_leading_ones(other: Any, recipe: Recipe) -> Any:
    """Return one value a class as (vocabulary,), which it may come as (1, vocabulary) or (1, 1, vocabulary) (BART)."""
    if not isinstance(other, torch.Tensor) or not 2 <= other.dim() <= recipe.hidden.dim():
        return other
    return other.reshape(-1) if other.numel() == other.shape[-1] == recipe.vocabulary else other


def _same_for_rows(other: torch.Tensor, recipe: Recipe) -> bool:
    """Say whether an operand is the same for each row: a scalar, or one value a class in the last dimension."""
    if other.dim() == 0:
        return True
    return other.dim() == 1 and not recipe.classes_second and other.shape[0] in (1, recipe.vocabulary)


def with_view(recipe: Recipe, name: str, args: Any, kwargs: Any) -> Recipe | None:
    """Take a view, or an index of the leading dimensions.

    Args:
        recipe: Of the logits.
        name: The op's name.
        args: Its arguments after the logits.
        kwargs: Its keyword arguments.

    Returns:
        The recipe of the view; None where the op is not one, or does not keep the classes in the last dimension.
    """
    dims = recipe.hidden.dim()
    if dims == 3 and not kwargs and _swaps_classes(name, args):
        return replace(recipe, classes_second=not recipe.classes_second)
    if recipe.classes_second or kwargs.keys() - {"start_dim", "end_dim"}:
        return None
    hidden = None
    if name in ("view", "reshape"):
        hidden = _viewed(recipe, args[0] if len(args) == 1 and not isinstance(args[0], int) else args)
    elif name == "flatten":
        start = args[0] if args else kwargs.get("start_dim", 0)
        end = args[1] if len(args) > 1 else kwargs.get("end_dim", -1)
        hidden = recipe.hidden.flatten(start, end) if end % dims < dims - 1 else None
    elif name == "__getitem__" and _leaves_classes(args[0], dims):
        hidden = recipe.hidden[args[0]]
    return None if hidden is None else replace(recipe, hidden=hidden)


def _swaps_classes(name: str, args: Any) -> bool:
    """Say whether an op on three dimensions swaps the last two."""
    dims = [value % 3 if isinstance(value, int) else -1 for value in tree_leaves(args)]
    return sorted(dims) == [1, 2] if name == "transpose" else name == "permute" and dims == [0, 2, 1]


def _viewed(recipe: Recipe, shape: Any) -> torch.Tensor | None:
    """Return the hidden states for logits viewed as `shape`, whose last dimension must be the vocabulary."""
    if not isinstance(shape, Iterable) or not all(isinstance(size, int) for size in tuple(shape)):
        return None
    numel = recipe.shape.numel()
    known = math.prod(size for size in shape if size != -1)
    sizes = tuple(numel // max(known, 1) if size == -1 else size for size in shape)
    if not sizes or math.prod(sizes) != numel or sizes[-1] != recipe.vocabulary:
        return None
    return recipe.hidden.reshape(*sizes[:-1], recipe.hidden.shape[-1])


def _leaves_classes(index: Any, dims: int) -> bool:
    """Say whether an index takes all of the last dimension and leaves it last."""
    parts = list(index) if isinstance(index, tuple) else [index]
    taken = sum(_dims_taken(part) for part in parts)
    if any(part is ... for part in parts[:-1]):  # what follows an ellipsis ends at the last dimension
        return _is_all(parts[-1])
    return taken < dims or (taken == dims and _is_all(parts[-1]))


def _is_all(part: Any) -> bool:
    return isinstance(part, slice) and part == slice(None)


def _dims_taken(part: Any) -> int:
    if part is None or part is ...:
        return 0
    return part.dim() if isinstance(part, torch.Tensor) and part.dtype == torch.bool else 1
