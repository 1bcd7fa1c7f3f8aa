"""Cross-entropy of logits by recipe, chunk by chunk, with all arguments of `F.cross_entropy`.

Head, recorded ops and loss of a chunk run under `torch.utils.checkpoint`, so forward and backward hold the logits of
one chunk at a time. The mean is taken over all chunks together:

    mean = sum over rows of the loss / D,   D = targets that are not ignored, or the sum of their class weights,
                                                or the number of rows where targets are probabilities

Sums run in fp32 at least, for in fp16 the sum over a chunk would pass 65504.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from floatline.techniques.logits.recipe import Recipe


def chunked_cross_entropy(
    recipe: Recipe,
    target: Any,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> torch.Tensor | None:
    """Return the cross-entropy of logits by recipe.

    Args:
        recipe: Of logits of shape (C,), (N, C) or (N, C, d).
        target: Class indices of shape (), (N,) or (N, d), or probabilities of the logits' shape.
        weight: As the rest, those of `F.cross_entropy`.

    Returns:
        The loss; None where the arguments do not fit each other, of which torch tells best.
    """
    targets = _target_rows(recipe, target)
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    if targets is None or reduction not in ("none", "mean", "sum"):
        return None

    def loss_of(rows: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(
            recipe.of(rows),
            wanted,
            weight,
            ignore_index=ignore_index,
            reduction="none",
            label_smoothing=label_smoothing,
        )

    size = min(recipe.ledger.chunk_tokens, max(1, targets.shape[0]))
    chunks = zip(recipe.hidden.reshape(-1, recipe.hidden.shape[-1]).split(size), targets.split(size), strict=True)
    losses = [checkpoint(loss_of, *c, use_reentrant=False, preserve_rng_state=recipe.random) for c in chunks]
    recipe.ledger.count("losses")
    recipe.ledger.count("chunks", len(losses))
    return _reduced(torch.cat(losses), recipe, reduction, targets, weight, ignore_index)


def _target_rows(recipe: Recipe, target: Any) -> torch.Tensor | None:
    """Return the targets by row, (rows,) or (rows, vocabulary); None where they do not fit the logits."""
    if not isinstance(target, torch.Tensor) or not (recipe.classes_second or recipe.hidden.dim() < 3):
        return None
    if not target.is_floating_point():
        return target.reshape(-1) if target.shape == recipe.hidden.shape[:-1] else None
    if target.shape != recipe.shape:
        return None
    return (target.transpose(1, 2) if recipe.classes_second else target).reshape(-1, recipe.vocabulary)


def _reduced(
    losses: torch.Tensor,
    recipe: Recipe,
    reduction: str,
    targets: torch.Tensor,
    weight: torch.Tensor | None,
    ignore_index: int,
) -> torch.Tensor:
    if reduction == "none":
        return losses.reshape(recipe.hidden.shape[:-1])
    total = losses.sum(dtype=torch.promote_types(losses.dtype, torch.float32))
    if reduction == "mean":
        total = total / _mean_over(targets, weight, ignore_index)
    return total.to(losses.dtype)


def _mean_over(targets: torch.Tensor, weight: torch.Tensor | None, ignore_index: int) -> torch.Tensor | int:
    """Return what the sum of the losses is divided by for their mean."""
    if targets.dim() > 1:
        return targets.shape[0]
    counted = targets != ignore_index
    if weight is None:
        return counted.sum()
    return torch.where(counted, weight[targets.masked_fill(~counted, 0)], 0).sum()
