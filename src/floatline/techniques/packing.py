"""Packing: the samples of a batch one behind the other in one row, without padding between them.

Nothing is computed that is thrown away. Two things must hold for the row to mean what the batch meant:

- A token sees its own sample only. transformers builds block-diagonal masks (SDPA, eager, FlexAttention) or
  variable-length calls (FlashAttention) by itself where `position_ids` start again at 0 in each sample, there is no
  `attention_mask` and no cache; so that is what the row carries. Qwen-VL's three-dimensional positions are computed
  sample by sample from the padded batch, and the plain ones put before them, as its text model takes them: (4, 1, T).
- No sample's last token is asked for the next sample's first one: the label at each sample's start is -100. That label
  was no target in the padded batch either (the loss shifts labels by one), so the count of targets stays.

Samples are laid into as few rows as possible (first-fit decreasing) where `max_tokens` bounds a row; each row is a
micro-batch of its own. SDPA and eager attention compute the masked pairs of a row as well, T^2 of them: bound the row.
FlashAttention and FlexAttention skip them.

Not covered: encoder-decoders, classification heads, models with recurrent or linear-attention layers (their state runs
through the row), masks with holes, `position_ids` of the caller's own, several rows in one micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from floatline.errors import ConfigError, DataError
from floatline.hardware import Hardware
from floatline.hardware.legality import Verdict
from floatline.techniques.base import Applied, Stage, Technique
from floatline.techniques.batches.packable import why_not_packable
from floatline.techniques.batches.rows import cut_rows
from floatline.techniques.batches.tokens import PaddingCounter, spans, token_aligned, token_mask
from floatline.techniques.batching import refuse_ranks

IGNORED = -100
"""The label that cross-entropy leaves out."""


@dataclass(frozen=True, kw_only=True)
class Packing(Technique):
    """Lay the samples of a batch into rows without padding, with attention inside each sample only.

    Args:
        max_tokens: Most tokens of a row; None lays the whole batch into one.

    Raises:
        ConfigError: Below 1.

    >>> print(Packing(max_tokens=2048))
    packing(max_tokens=2048)
    """

    name = "packing"
    stage = Stage.LAYOUT
    conflicts: ClassVar[Mapping[str, str]] = {
        "batching": "packed rows hold no padding, so nothing is left to sort; packing(max_tokens=...) cuts as well"
    }

    max_tokens: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least("max_tokens", 1)

    def supports(self, hardware: Hardware, model: nn.Module) -> Verdict:
        reason = why_not_packable(model)
        return Verdict(reason is None, reason or "samples are told apart by their position_ids")

    def _apply(self, model: nn.Module, hardware: Hardware) -> Applied:
        counter = PaddingCounter()

        def split(batch: Any) -> list[Any]:
            mask = token_mask(batch, self.name)
            refuse_ranks(model, self.name, self.max_tokens)
            rows = pack(model, dict(batch.items()), mask, self.max_tokens)
            tokens = int(mask.sum())
            counter.add(tokens, mask.numel(), tokens)
            return rows

        return Applied(technique=self, touched=("",), split=split, facts=counter.facts)


def pack(model: nn.Module, batch: dict[str, Any], mask: torch.Tensor, max_tokens: int | None) -> list[dict[str, Any]]:
    """Return a padded batch as packed rows, each a micro-batch.

    Args:
        model: Its rotary positions and image tokens.
        batch: `input_ids` (B, L), what is aligned with them, and Qwen-VL's joined image tensors.
        mask: Which positions are tokens, (B, L) bool on the host.
        max_tokens: Most tokens of a row.

    Returns:
        Dicts of (1, T) tensors, with `position_ids` and without `attention_mask`.

    Raises:
        DataError: A sample is longer than `max_tokens`, has padding inside, or the batch holds no token.
        ConfigError: A tensor that cannot be laid into one row.
    """
    first, last = spans(mask)
    lengths = mask.sum(1)
    holes = ((last - first) != lengths) & (lengths > 0)
    if bool(holes.any()):
        raise DataError(
            f"row {int(holes.int().argmax())} of the batch has padding between its tokens",
            hint="pad on the right or on the left, or drop packing",
        )
    if batch.get("position_ids") is not None:
        raise ConfigError("packing sets position_ids itself, the batch has some", hint="leave position_ids out")
    shape = batch["input_ids"].shape
    if (grid := _rotary_positions(model, batch, mask)) is not None:
        batch = {**batch, "position_ids": grid.permute(1, 2, 0)}  # (B, L, 3): cut and packed as the tokens are
    bins = fill_rows(lengths.tolist(), max_tokens)
    return [_row(model, batch, mask, sorted(rows), shape) for rows in bins]


def fill_rows(lengths: Sequence[int], max_tokens: int | None) -> list[list[int]]:
    """Return which samples share a row: the longest first, each into the first row that has room.

    Samples without a token are left out.

    Raises:
        DataError: A sample is longer than `max_tokens`, or there is none at all.

    >>> fill_rows([3, 5, 2, 6], 8)
    [[3, 2], [1, 0]]
    """
    order = sorted((i for i, length in enumerate(lengths) if length), key=lambda i: -lengths[i])
    if not order:
        raise DataError("the batch holds no token", hint="its attention_mask is all zeros")
    if max_tokens is None:
        return [order]
    if lengths[order[0]] > max_tokens:
        raise DataError(
            f"row {order[0]} of the batch has {lengths[order[0]]} tokens, more than packing.max_tokens={max_tokens}",
            hint=f"set packing.max_tokens={lengths[order[0]]} or more, or shorten the sample",
        )
    bins: list[list[int]] = []
    room: list[int] = []
    for index in order:
        at = next((at for at, left in enumerate(room) if left >= lengths[index]), None)
        if at is None:
            at = len(bins)
            bins.append([])
            room.append(max_tokens)
        bins[at].append(index)
        room[at] -= lengths[index]
    return bins


def _row(
    model: nn.Module, batch: dict[str, Any], mask: torch.Tensor, rows: list[int], shape: torch.Size
) -> dict[str, Any]:
    """Lay some samples of a batch into one row; image tensors are in the order of samples already."""
    part = cut_rows(model, batch, torch.tensor(rows)) if len(rows) < shape[0] else batch
    keep = mask[rows].to(batch["input_ids"].device)
    aligned = set(token_aligned(part, torch.Size((len(rows), shape[1]))))
    packed: dict[str, Any] = {}
    for key, value in part.items():
        if key in aligned:
            packed[key] = value[keep][None]
        elif isinstance(value, torch.Tensor) and key not in _JOINED and value.dim():
            raise ConfigError(
                f"{key} of shape {tuple(value.shape)} cannot be laid into one row of tokens",
                hint=f"leave {key} out of the batch, or drop packing",
            )
        else:
            packed[key] = value
    packed.pop("attention_mask", None)
    plain = (keep.long().cumsum(1) - 1)[keep][None]
    if "labels" in packed:
        packed["labels"] = packed["labels"].masked_fill(plain == 0, IGNORED)
    rotary = packed.get("position_ids")
    packed["position_ids"] = plain if rotary is None else torch.cat([plain[None], rotary.permute(2, 0, 1)])
    packed["use_cache"] = False  # with a cache, transformers does not look for packed samples
    return packed


_JOINED = {"pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw"}


def _rotary_positions(model: nn.Module, batch: dict[str, Any], mask: torch.Tensor) -> torch.Tensor | None:
    """Return Qwen-VL's positions in time, height and width, (3, B, L); None where the model would use plain ones."""
    owner = next((module for module in model.modules() if hasattr(module, "get_rope_index")), None)
    grids = {key: batch.get(key) for key in ("image_grid_thw", "video_grid_thw")}
    if owner is None or all(grid is None for grid in grids.values()):
        return None
    ids = batch["input_ids"]
    kinds = {"mm_token_type_ids": batch["mm_token_type_ids"]} if "mm_token_type_ids" in batch else {}
    full = mask.any(1)  # a row without tokens has no positions
    positions = torch.zeros(3, *ids.shape, dtype=torch.long, device=ids.device)
    rows = full.to(ids.device)
    found, _ = owner.get_rope_index(  # type: ignore[operator]
        ids[rows], attention_mask=mask[full].to(ids.device), **grids, **{key: kind[rows] for key, kind in kinds.items()}
    )
    positions[:, rows] = found
    return positions
