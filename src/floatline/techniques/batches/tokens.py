"""Where the tokens of a padded batch lie, and which of its tensors are aligned with them.

A batch is a dict with `input_ids` (B, L); `attention_mask` (B, L) says which positions are tokens. Without a mask every
position counts as a token: padding that nothing marks cannot be told from text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from floatline.errors import DataError

ROW_AND_TOKEN = "give a dict with input_ids and attention_mask of shape (rows, tokens), or drop {}"


def token_mask(batch: Any, technique: str) -> torch.Tensor:
    """Return which positions of a batch are tokens, (B, L) bool on the host.

    Raises:
        DataError: The batch has no rows of tokens, so its samples have no lengths.
    """
    ids = batch.get("input_ids") if hasattr(batch, "get") else None
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2:
        what = f"input_ids of shape {tuple(ids.shape)}" if isinstance(ids, torch.Tensor) else "no input_ids"
        raise DataError(
            f"{technique} needs the lengths of a batch's samples, but this {type(batch).__name__} has {what}",
            hint=ROW_AND_TOKEN.format(technique),
        )
    mask = batch.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.shape != ids.shape:
        return torch.ones(ids.shape, dtype=torch.bool)
    return mask.bool().cpu()


def spans(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first token of each row and the position behind its last, (B,) int64; all of a row without tokens.

    >>> spans(torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]]).bool())
    (tensor([1, 0]), tensor([3, 4]))
    """
    first = mask.int().argmax(1)
    last = mask.shape[1] - mask.flip(1).int().argmax(1)
    return first, last


def token_aligned(batch: dict[str, Any], shape: torch.Size) -> list[str]:
    """Return the keys whose tensors have one entry for each position: (B, L) and (B, L, ...)."""
    return [key for key, value in batch.items() if isinstance(value, torch.Tensor) and value.shape[:2] == shape]


def transformers_model(model: nn.Module) -> nn.Module | None:
    """Return the transformers model in `model`, which may be wrapped (adapters, compiled); None without one."""
    return next((module for module in model.modules() if is_transformers(module)), None)


def is_transformers(module: nn.Module) -> bool:
    """Say whether a module is a transformers model, without importing transformers."""
    return any(base.__name__ == "PreTrainedModel" for base in type(module).__mro__)


class PaddingCounter:
    """Counts tokens and padding, before and after a technique changed the layout."""

    def __init__(self) -> None:
        self.tokens = 0
        self.given = 0
        self.computed = 0

    def add(self, tokens: int, given: int, computed: int) -> None:
        """Count one batch: its tokens, its positions as it came, and its positions as they are computed."""
        self.tokens += tokens
        self.given += given
        self.computed += computed

    def facts(self) -> dict[str, float]:
        """Return tokens, padding and the share of the padding that was removed."""
        padding = self.given - self.tokens
        removed = 1 - (self.computed - self.tokens) / padding if padding else 0.0
        return {"tokens": self.tokens, "padding": self.computed - self.tokens, "padding_removed": removed}
