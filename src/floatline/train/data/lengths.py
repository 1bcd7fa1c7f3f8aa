"""How many tokens each sample becomes, without making them: what length bucketing has to know beforehand.

Texts are tokenised. An image becomes as many tokens as the processor says it would for its size, which stands in the
file's header; decoding and patching thousands of images would take longer than many a run. transformers' processors
answer that in `_get_num_multimodal_tokens` (inference servers rely on it as well). It is held against real encodings of
the first samples with images, and of one with the most; a processor that has no answer, or another one, is not asked
again, and samples with images are encoded in full.

Not covered: lengths kept from run to run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from floatline.techniques import Batching, padding_report
from floatline.techniques.batches.buckets import bucketed_updates, cut_by_tokens
from floatline.train.data.encode import SampleEncoder
from floatline.train.data.images import BadImage, image_size
from floatline.train.data.samples import Sample

COMPARED = 3
"""Samples with images that are encoded in full, to see whether the short way counts right."""


def token_lengths(samples: Sequence[Sample], encoder: SampleEncoder) -> list[int]:
    """Return the number of tokens of each sample, as `encoder.encode` would make them.

    Args:
        samples: What will be trained on, in the data set's order.
        encoder: How it is encoded.

    Raises:
        DataError: A sample cannot be encoded.
        ModelError: The chat template does not fit (see encode.py).

    Source: what `len(encoder.encode(sample)["input_ids"])` gives; the tests hold them against each other.
    """

    def encoded(sample: Sample) -> int:
        return len(encoder.encode(sample)["input_ids"])

    def counted(sample: Sample) -> int:
        return sum(map(len, encoder.texts(sample))) + _image_tokens(sample, encoder.processor)

    count = counted if _counts_right(samples, counted, encoded) else encoded
    return [count(sample) if sample.images else counted(sample) for sample in samples]


def _image_tokens(sample: Sample, processor: Any) -> int:
    """Tokens that a sample's images add to their placeholders, one each."""
    if not sample.images:
        return 0
    try:
        sizes = [image_size(path) for path in sample.images]
    except BadImage as problem:
        raise sample.error(problem.reason, problem.hint) from None
    return sum(processor._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens) - len(sizes)


def _counts_right(
    samples: Sequence[Sample], counted: Callable[[Sample], int], encoded: Callable[[Sample], int]
) -> bool:
    """Say whether the short way agrees with the encoder on a few samples with images."""
    seen = [sample for sample in samples if sample.images]
    if not seen:
        return True
    compared = [*seen[:COMPARED], max(seen, key=lambda sample: len(sample.images))]
    try:
        return all(counted(sample) == encoded(sample) for sample in compared)
    except (AttributeError, TypeError, ValueError, KeyError, NotImplementedError):  # the processor has no such answer
        return False


def padding_of(lengths: Sequence[int], batching: Batching, *, batch_size: int, micro_batch_size: int, seed: int) -> str:
    """Return in words how much of the first epoch is padding, and how much it would be without `batching`.

    Args:
        lengths: As `token_lengths` gives them.
        batching: The technique.
        batch_size: Samples an update.
        micro_batch_size: Samples a forward where no budget of tokens decides.
        seed: Of the order of samples.
    """

    def updates(window: int) -> list[list[int]]:
        return bucketed_updates(lengths, batch_size=batch_size, window=window, seed=seed, epoch=0)

    def by_size(update: list[int]) -> list[list[int]]:
        ordered = sorted(update, key=lengths.__getitem__)
        return [ordered[at : at + micro_batch_size] for at in range(0, len(ordered), micro_batch_size)]

    def cut(update: list[int]) -> list[list[int]]:
        return cut_by_tokens(update, lengths, batching.max_tokens) if batching.max_tokens else by_size(update)

    drawn = [part for update in updates(batching.window) for part in cut(update)]
    plain = [part for update in updates(1) for part in by_size(update)]
    return str(padding_report(lengths, drawn, baseline=plain))
