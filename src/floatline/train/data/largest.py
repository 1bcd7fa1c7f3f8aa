"""The largest update that can be drawn from the data: what a plan must hold for.

A batch is as wide as its longest sample, and its image tensors are as long as its samples' images together. So the
largest batch has the longest sample, and beside it those with the most image tokens. A plan for it holds for every
other batch: none is wider, and none has more image tokens but for what the longest sample may lack.

Where rows are packed without padding, or cut by a budget of tokens, the sum of tokens counts: the longest samples.
"""

from __future__ import annotations

from collections.abc import Sequence

from floatline.train.data.encode import SampleEncoder
from floatline.train.data.lengths import token_lengths
from floatline.train.data.samples import Sample


def sizes_of(samples: Sequence[Sample], encoder: SampleEncoder) -> tuple[list[int], list[int]]:
    """Return the tokens of each sample, and how many of them stand for its images.

    Raises:
        DataError: A sample cannot be encoded.
    """
    lengths = token_lengths(samples, encoder)
    images = [
        length - sum(map(len, encoder.texts(sample))) + len(sample.images) if sample.images else 0
        for sample, length in zip(samples, lengths, strict=True)
    ]
    return lengths, images


def largest_update(lengths: Sequence[int], images: Sequence[int], size: int, *, by_tokens: bool = False) -> list[int]:
    """Return which `size` samples make the largest update, the largest first.

    Args:
        lengths: Tokens of each sample, images included.
        images: Those of them that stand for images.
        size: Samples of an update.
        by_tokens: Rows are not padded to the longest, so the sum of tokens counts.

    >>> largest_update([9, 30, 12, 20], [8, 0, 10, 0], 3)
    [1, 2, 0]
    >>> largest_update([9, 30, 12, 20], [8, 0, 10, 0], 3, by_tokens=True)
    [1, 3, 2]
    """
    order = sorted(range(len(lengths)), key=lambda at: (-lengths[at], -images[at]))
    if by_tokens:
        return order[:size]
    longest, rest = order[0], order[1:]
    return [longest, *sorted(rest, key=lambda at: -images[at])][:size]
