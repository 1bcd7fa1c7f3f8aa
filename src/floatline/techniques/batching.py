"""Dynamic batching: micro-batches of rows of like length, as many rows as a budget of padded tokens allows.

A batch is as wide as its longest row. Cut into micro-batches by a number of rows, memory follows the longest row and
time the padding; cut by rows times width, memory is bounded and little is padded. The step weights micro-batches by
their targets, so loss and gradients are those of the full batch to rounding.

It acts in two places. Given to `TrainStep`, it cuts each padded batch: rows are sorted by length, cut by `max_tokens`,
and every micro-batch is trimmed to its longest row, on whichever side the padding lies. In training from a recipe, it
orders the samples as well (batches/buckets.py): `window` updates' samples are sorted by length before they are cut, so
that an update's samples fit each other. `TokenBudgetSampler` does that for a DataLoader of your own.

Positions stay what they were: models that count positions from the first column (GPT-2's `wpe`) are told the columns
that are left; rotary positions are relative.

Not covered: labels on the first token of left-padded rows, which the padding before it would have to predict; models
whose computation mixes rows (batch norm, contrastive losses): told, not refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from floatline.errors import ConfigError, DataError
from floatline.hardware import Hardware
from floatline.hardware.legality import Verdict
from floatline.techniques.base import MARK, Applied, Stage, Technique
from floatline.techniques.batches.buckets import cut_by_tokens
from floatline.techniques.batches.rows import coupled_rows, cut_rows
from floatline.techniques.batches.tokens import PaddingCounter, spans, token_aligned, token_mask


@dataclass(frozen=True, kw_only=True)
class Batching(Technique):
    """Cut batches by padded tokens into micro-batches of rows of like length, and trim their padding.

    Args:
        max_tokens: Most rows times width of a micro-batch; None leaves each batch whole and only trims it.
        window: In training from a recipe, updates whose samples are sorted together by length; 1 leaves each update's
            samples random.

    Raises:
        ConfigError: A number below 1.

    >>> print(Batching(max_tokens=4096))
    batching(max_tokens=4096)
    """

    name = "batching"
    stage = Stage.LAYOUT
    conflicts: ClassVar[Mapping[str, str]] = {
        "packing": "packed rows hold no padding, so nothing is left to sort; packing(max_tokens=...) cuts as well"
    }

    max_tokens: int | None = None
    window: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least("max_tokens", 1)
        self.at_least("window", 1)

    def supports(self, hardware: Hardware, model: nn.Module) -> Verdict:
        if not any(isinstance(module, nn.Embedding) for module in model.modules()):
            return Verdict(False, f"{type(model).__name__} has no token embedding, so its samples have no lengths")
        return Verdict(True, "rows of tokens have lengths")

    def _apply(self, model: nn.Module, hardware: Hardware) -> Applied:
        counter = PaddingCounter()
        notes = () if self.max_tokens is None else coupled_rows(model, self.name)

        def split(batch: Any) -> list[Any]:
            mask = token_mask(batch, self.name)
            first, last = spans(mask)
            groups = self._groups(first, last, mask.shape[1])
            refuse_ranks(model, self.name, self.max_tokens)
            parts = [_part(model, dict(batch.items()), rows, first, last, mask.shape) for rows in groups]
            counter.add(int(mask.sum()), mask.numel(), sum(part["input_ids"].numel() for part in parts))
            return parts

        return Applied(technique=self, touched=("",), split=split, notes=notes, facts=counter.facts)

    def _groups(self, first: torch.Tensor, last: torch.Tensor, width: int) -> list[list[int]]:
        """Rows of each micro-batch; the rows of one are in the batch's order, as its images are."""
        lengths = _widths(first, last)
        if self.max_tokens is not None and (longest := max(lengths, default=0)) > self.max_tokens:
            raise DataError(
                f"row {lengths.index(longest)} of the batch has {longest} tokens, "
                f"more than batching.max_tokens={self.max_tokens}",
                hint=f"set batching.max_tokens={longest} or more, or shorten the sample",
            )
        return [sorted(group) for group in cut_by_tokens(range(len(lengths)), lengths, self.max_tokens)]


def _widths(first: torch.Tensor, last: torch.Tensor) -> list[int]:
    """How wide a micro-batch must be for each row: its tokens, and padding on the side where others have none."""
    start, end = first.min(), last.max()
    if bool((first == start).all()):
        return (last - start).tolist()
    if bool((last == end).all()):
        return (end - first).tolist()
    return [int(end - start)] * len(first)  # padded on both sides: rows do not line up


def _part(
    model: nn.Module,
    batch: dict[str, Any],
    rows: list[int],
    first: torch.Tensor,
    last: torch.Tensor,
    shape: torch.Size,
) -> dict[str, Any]:
    """Return some rows of a batch without the columns that are padding in all of them."""
    part = cut_rows(model, batch, torch.tensor(rows)) if len(rows) < shape[0] else batch
    start, end = int(first[rows].min()), int(last[rows].max())
    if end - start == shape[1]:
        return part
    aligned = set(token_aligned(part, torch.Size((len(rows), shape[1]))))
    part = {key: value[:, start:end] if key in aligned else value for key, value in part.items()}
    if start and "position_ids" not in part and _counts_columns(model):
        columns = torch.arange(start, end, device=part["input_ids"].device)
        part["position_ids"] = columns.expand(len(rows), -1)
    return part


def _counts_columns(model: nn.Module) -> bool:
    """Say whether a model learns an embedding for each column and is not told otherwise: GPT-2 and its kin."""
    return any(name.rpartition(".")[2] == "wpe" for name, _ in model.named_modules())


def refuse_ranks(model: nn.Module, technique: str, max_tokens: int | None) -> None:
    """Raise where several ranks would each cut their own batch, and nobody evens out their numbers of micro-batches.

    Under `sharding` the step does (step/exchange.py); other ways to train on several ranks (DistributedDataParallel)
    wait in each backward for a rank that has none.

    Args:
        model: What it is applied to.
        technique: Its name, for the error.
        max_tokens: Its budget; None cuts nothing.

    Raises:
        ConfigError: There are several ranks and a budget, but no `sharding`.
    """
    distributed = torch.distributed
    if max_tokens is None or not distributed.is_available() or not distributed.is_initialized():
        return
    if distributed.get_world_size() > 1 and "sharding" not in getattr(model, MARK, {}):
        raise ConfigError(
            f"{technique}.max_tokens would cut each rank's batch into another number of micro-batches, "
            "and ranks that wait for each other would hang",
            hint="add sharding, whose step evens them out; or hand each step as long a list of micro-batches as "
            "TokenBudgetSampler(ranks=...) draws",
        )
