"""Gradient accumulation: one update from several micro-batches, so that activations of only one exist at a time.

The step weights each micro-batch's mean loss by its number of targets, so the sum is the full batch's loss, which
`loss / N` is not when the counts differ (transformers#34191). Activations shrink to 1/N; gradients, weights and
optimizer state stay. The result equals the full batch to rounding where each row is for itself. Batch norm, losses that
compare rows (contrastive ones) and random numbers drawn once a batch see smaller batches, so with them it differs.

A batch is cut along its rows. Tensors with one entry a row are cut with them. Image tensors of vision-language models
(`pixel_values` and `image_grid_thw`, joined over the rows) are cut where the image tokens of `input_ids` say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from floatline.hardware import Hardware
from floatline.techniques.base import Applied, Stage, Technique
from floatline.techniques.batches.rows import coupled_rows, cut_rows, rows_of


@dataclass(frozen=True, kw_only=True)
class Accumulation(Technique):
    """Cut each batch into micro-batches of one update.

    Args:
        micro_batches: Their number; a batch with fewer rows gets one a row.

    Raises:
        ConfigError: Fewer than 1.
    """

    name = "accumulation"
    stage = Stage.BATCH

    micro_batches: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least("micro_batches", 1)

    def _apply(self, model: nn.Module, hardware: Hardware) -> Applied:
        def split(batch: Any) -> list[Any]:
            rows = rows_of(batch)
            if rows < 2:
                return [batch]
            parts = torch.arange(rows).tensor_split(min(self.micro_batches, rows))
            return [cut_rows(model, batch, part) for part in parts]

        return Applied(technique=self, touched=("",), split=split, notes=coupled_rows(model, self.name))
