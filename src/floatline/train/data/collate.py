"""Make a batch of encoded samples: token sequences are padded, image tensors are joined.

A tensor is token-aligned when it has one dimension and, in every sample that has it, the length of `input_ids`. All
others (`pixel_values`, `image_grid_thw` ...) belong to images and are concatenated along their first dimension in the
order of samples, as Hugging Face's vision-language models take them. A sample without images simply adds none.

Pad on the right for training and on the left for generation, where each prompt must end at its row's end.

Not covered: image tensors whose other dimensions differ between samples (processors that tile without flattening).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from floatline.errors import ConfigError, DataError
from floatline.step.batch import IGNORED

Encoded = Mapping[str, Tensor]


@dataclass(frozen=True)
class Collator:
    """Turns a list of encoded samples into a batch.

    Args:
        pad_token_id: For `input_ids`. Labels are padded with -100, the attention mask and all others with 0.
        padding_side: "right" or "left".
        pad_to_multiple_of: Round the padded length up to a multiple of this; None does not.

    Raises:
        ConfigError: A setting that is not allowed.

    >>> batch = Collator(0)([{"input_ids": torch.tensor([5, 6])}, {"input_ids": torch.tensor([7])}])
    >>> batch["input_ids"].tolist()
    [[5, 6], [7, 0]]
    """

    pad_token_id: int
    padding_side: Literal["right", "left"] = "right"
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        if self.padding_side not in ("right", "left"):
            raise ConfigError(f"padding_side={self.padding_side!r} is unknown", hint="allowed: right, left")
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise ConfigError(f"pad_to_multiple_of={self.pad_to_multiple_of} is below 1", hint="give 8, 64 or None")

    def __call__(self, samples: Sequence[Encoded]) -> dict[str, Tensor]:
        """Return the batch of encoded samples: token-aligned (B, L), image tensors concatenated.

        Raises:
            DataError: Image tensors that do not fit together.
        """
        keys = dict.fromkeys(key for sample in samples for key in sample)
        length = self.padded_length(max(len(sample["input_ids"]) for sample in samples))
        return {
            key: self._pad(key, samples, length) if _token_aligned(key, samples) else _join(key, samples)
            for key in keys
        }

    def padded_length(self, longest: int) -> int:
        """Return the width of a batch whose longest sample has so many tokens."""
        multiple = self.pad_to_multiple_of or 1
        return -(-longest // multiple) * multiple

    def _pad(self, key: str, samples: Sequence[Encoded], length: int) -> Tensor:
        """Stack into (B, L); a sample without this key (no image in it) is all filling."""
        fill = {"input_ids": self.pad_token_id, "labels": IGNORED}.get(key, 0)
        dtype = next(sample[key].dtype for sample in samples if key in sample)
        batch = torch.full((len(samples), length), fill, dtype=dtype)
        for row, sample in zip(batch, samples):
            if key in sample:
                size = len(sample[key])
                row[:size] = sample[key]
                if self.padding_side == "left":
                    row.copy_(row.roll(length - size))
        return batch


def _token_aligned(key: str, samples: Sequence[Encoded]) -> bool:
    return all(sample[key].shape == sample["input_ids"].shape for sample in samples if key in sample)


def _join(key: str, samples: Sequence[Encoded]) -> Tensor:
    tensors = [sample[key] for sample in samples if key in sample]
    try:
        return torch.cat(tensors)
    except RuntimeError:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise DataError(
            f"{key} of this batch cannot be joined: shapes {shapes}",
            hint="give all images one size, or train with train.micro_batch_size=1",
        ) from None


class TokenCounts(NamedTuple):
    """Tokens of a batch.

    Attributes:
        targets: Labels that count in the loss.
        tokens: Tokens that are not padding.
    """

    targets: int
    tokens: int


def token_counts(batch: Mapping[str, Any]) -> TokenCounts:
    """Return the target tokens and the non-padding tokens of a collated batch.

    >>> labels = torch.tensor([[-100, 4, 2]])
    >>> token_counts({"labels": labels, "attention_mask": torch.ones_like(labels)})
    TokenCounts(targets=2, tokens=3)
    """
    targets = int((batch["labels"] != IGNORED).sum()) if "labels" in batch else 0
    return TokenCounts(targets, int(batch["attention_mask"].sum()))
