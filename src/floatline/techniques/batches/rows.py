"""Take rows out of a batch: dicts, tuples and tensors, and the joined image tensors of vision-language models.

And say where the rows of a batch are not each for itself, so that micro-batches cannot add up to it.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from floatline.errors import ConfigError, FloatlineWarning

_IMAGE_KEYS = {"pixel_values": "image_grid_thw", "pixel_values_videos": "video_grid_thw"}
_TOKEN_IDS = {"image_grid_thw": "image_token_id", "video_grid_thw": "video_token_id"}


def rows_of(batch: Any) -> int:
    """Return the number of samples in a batch: the length of `input_ids`, else of its first tensor."""
    if isinstance(batch, dict) and isinstance(batch.get("input_ids"), torch.Tensor):
        return int(batch["input_ids"].shape[0])
    leaves = (leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor) and leaf.dim())
    return next((int(leaf.shape[0]) for leaf in leaves), 1)


def cut_rows(model: nn.Module, batch: Any, rows: torch.Tensor) -> Any:
    """Return the batch of some rows.

    Args:
        model: Its config names image tokens and the merge size.
        batch: A dict, tuple or tensor with one entry a row; Qwen-VL's joined image tensors are cut by image tokens.
        rows: Indices, (n,) int64.

    Raises:
        ConfigError: A tensor's first dimension is neither the number of rows nor that of known image tensors.
    """
    size = rows_of(batch)
    joined = _cut_images(model, batch, rows) if isinstance(batch, dict) and _has_images(batch) else {}

    def cut(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.dim() == 0:
            return leaf
        if leaf.shape[0] == size:
            return _take(leaf, rows)
        raise ConfigError(
            f"{path} of shape {tuple(leaf.shape)} cannot be cut into micro-batches of {size} rows",
            hint="pass a list of micro-batches instead",
        )

    if isinstance(batch, dict):
        rest = {key: tree_map(lambda leaf, key=key: cut(key, leaf), v) for key, v in batch.items() if key not in joined}
        return {key: joined[key] if key in joined else rest[key] for key in batch}
    return tree_map(lambda leaf: cut("a tensor of the batch", leaf), batch)


def coupled_rows(model: nn.Module, technique: str) -> tuple[str, ...]:
    """Return why the loss of a batch is not the mean of its rows' losses, so that micro-batches train otherwise.

    Batch norm and the balance of experts differ a little, for which a note is enough. A contrastive loss (CLIP and its
    kin hold a `logit_scale`) compares the rows with each other, and compares fewer in a micro-batch: that is warned of.
    """
    notes = []
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if norms:
        more = ", ..." if norms[1:] else ""
        notes.append(f"batch norm ({norms[0]}{more}) sees micro-batches, so results differ a little")
    if getattr(getattr(model, "config", None), "output_router_logits", False) is True:
        notes.append("the experts' balance loss (output_router_logits) is taken in each micro-batch, not over all")
    if any(name.rpartition(".")[2] == "logit_scale" for name, _ in model.named_parameters()):
        warnings.warn(
            f"{technique}: {type(model).__name__} has a logit_scale, as models with a contrastive loss have; its rows "
            f"would be compared inside each micro-batch only, which is another loss: drop {technique} for such a loss",
            FloatlineWarning,
            stacklevel=2,
        )
    return tuple(notes)


def _consecutive(rows: torch.Tensor) -> bool:
    return bool((rows.diff() == 1).all())


def _take(tensor: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
    """Return some of a tensor's entries: a view where they are consecutive, else a copy."""
    if _consecutive(entries):
        return tensor[int(entries[0]) : int(entries[-1]) + 1]
    return tensor[entries.to(tensor.device)]


def _has_images(batch: dict[str, Any]) -> bool:
    return any(isinstance(batch.get(grid), torch.Tensor) for grid in _IMAGE_KEYS.values())


def _cut_images(model: nn.Module, batch: dict[str, Any], rows: torch.Tensor) -> dict[str, Any]:
    """Cut joined image tensors: grid (images, 3) of (t, h, w) patches, pixel values (sum of t*h*w, channels).

    An image takes t*h*w / merge_size^2 tokens in its row, images lie in the order of rows (Qwen2-VL and later).
    """
    config: Any = getattr(model, "config", None)
    merge = getattr(getattr(config, "vision_config", None), "spatial_merge_size", 1)
    cut: dict[str, Any] = {}
    for pixels, grids in _IMAGE_KEYS.items():
        grid = batch.get(grids)
        if not isinstance(grid, torch.Tensor):
            continue
        tokens = (batch["input_ids"] == getattr(config, _TOKEN_IDS[grids], -1)).sum(1).cumsum(0).tolist()
        patches = grid.prod(1)
        ends = (patches // merge**2).cumsum(0)
        row_of_image = torch.searchsorted(torch.tensor(tokens), ends.cpu())
        chosen = torch.isin(row_of_image, rows.cpu()).nonzero()[:, 0]
        if not _consecutive(rows) and not bool((rows.diff() > 0).all()):
            raise ConfigError(f"rows {rows.tolist()} of a batch with images are not in order", hint="sort them")
        if not len(chosen):  # a micro-batch without images has no image tensors
            cut[grids], cut[pixels] = None, None
            continue
        cut[grids] = _take(grid, chosen)
        if isinstance(batch.get(pixels), torch.Tensor):
            ends_at, sizes = patches.cumsum(0).tolist(), patches.tolist()
            parts = [torch.arange(ends_at[image] - sizes[image], ends_at[image]) for image in chosen.tolist()]
            cut[pixels] = _take(batch[pixels], torch.cat(parts))
    return cut
