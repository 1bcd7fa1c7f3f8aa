from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from floatline.errors import ConfigError, DataError
from floatline.train.data import Collator, MicroBatches, TokenCounts, token_counts


def encoded(ids: list[int], images: int = 0) -> dict[str, torch.Tensor]:
    """A sample as the encoder makes it; each image has 4 patches of 3 values."""
    tokens = torch.tensor(ids)
    sample = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens * 2}
    if images:
        sample["mm_token_type_ids"] = torch.ones_like(tokens)
        sample["pixel_values"] = torch.arange(images * 12.0).reshape(images * 4, 3) + ids[0]
        sample["image_grid_thw"] = torch.tensor([[1, 2, 2]] * images)
    return sample


def test_each_tensor_has_its_own_filling():
    batch = Collator(9)([encoded([1, 2, 3], images=1), encoded([4])])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[2, 4, 6], [8, -100, -100]]
    assert batch["mm_token_type_ids"].tolist() == [[1, 1, 1], [0, 0, 0]]
    assert batch["pixel_values"].shape == (4, 3)
    assert batch["image_grid_thw"].tolist() == [[1, 2, 2]]


def test_left_padding_is_for_generation():
    batch = Collator(9, padding_side="left")([encoded([1, 2, 3]), encoded([4])])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [9, 9, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


def test_the_length_can_be_a_multiple():
    assert Collator(0, pad_to_multiple_of=8)([encoded([1] * 9)])["input_ids"].shape == (1, 16)
    assert Collator(0, pad_to_multiple_of=8)([encoded([1] * 8)])["input_ids"].shape == (1, 8)


def test_bad_settings_are_named():
    with pytest.raises(ConfigError, match=r"padding_side='top'"):
        Collator(0, padding_side="top")
    with pytest.raises(ConfigError, match=r"pad_to_multiple_of=0"):
        Collator(0, pad_to_multiple_of=0)


def test_image_tensors_that_do_not_fit_are_named():
    other = {**encoded([4], images=1), "pixel_values": torch.zeros(4, 5)}
    with pytest.raises(DataError, match=r"pixel_values .* shapes \(4, 3\), \(4, 5\)") as caught:
        Collator(0)([encoded([1, 2], images=1), other])
    assert "train.micro_batch_size=1" in caught.value.hint


def test_micro_batches_hold_every_sample_once():
    samples = [encoded([1]), encoded([2, 2]), encoded([3])]
    batches = MicroBatches(Collator(0), 2)(samples)
    assert [batch["input_ids"].tolist() for batch in batches] == [[[1], [3]], [[2, 2]]]
    assert MicroBatches(Collator(0), 3)(samples)["input_ids"].tolist() == [[1, 0], [2, 2], [3, 0]]


def test_micro_batches_by_tokens():
    samples = [encoded([1] * length) for length in (2, 7, 3, 4)]
    batches = MicroBatches(Collator(0), max_tokens=8)(samples)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(1, 7), (2, 4), (1, 2)]
    assert MicroBatches(Collator(0), max_tokens=28)(samples)["input_ids"].shape == (4, 7)
    wide = MicroBatches(Collator(0, pad_to_multiple_of=8), max_tokens=16)(samples)
    assert [tuple(batch["input_ids"].shape) for batch in wide] == [(2, 8), (2, 8)]
    with pytest.raises(DataError, match="sample 1 has 7 tokens, more than max_tokens=6"):
        MicroBatches(Collator(0), max_tokens=6)(samples)
    for limits in ({}, {"size": 2, "max_tokens": 8}):
        with pytest.raises(ConfigError, match="give one of the two"):
            MicroBatches(Collator(0), **limits)


def test_token_counts_leave_out_padding_and_prompt():
    sample = {**encoded([1, 2, 3]), "labels": torch.tensor([-100, -100, 3])}
    batch = Collator(0)([sample, encoded([4])])
    assert token_counts(batch) == TokenCounts(targets=2, tokens=4)
    assert token_counts({"attention_mask": torch.ones(2, 3)}) == TokenCounts(targets=0, tokens=6)


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 99), min_size=1, max_size=9), st.integers(0, 2)), min_size=1, max_size=5
    ),
    st.sampled_from(["right", "left"]),
    st.sampled_from([None, 1, 4]),
)
@settings(max_examples=100, deadline=None)
def test_unpadding_gives_back_the_samples(shapes, side, multiple):
    samples = [encoded(ids, images) for ids, images in shapes]
    batch = Collator(7, padding_side=side, pad_to_multiple_of=multiple)(samples)
    patches = 0
    for row, sample in enumerate(samples):
        kept = batch["attention_mask"][row].bool()
        for key in ("input_ids", "labels", "mm_token_type_ids"):
            if key in sample:
                assert torch.equal(batch[key][row][kept], sample[key])
                assert len(set(batch[key][row][~kept].tolist())) <= 1
        count = len(sample.get("pixel_values", ()))
        if count:
            assert torch.equal(batch["pixel_values"][patches : patches + count], sample["pixel_values"])
        patches += count
    assert patches == len(batch.get("pixel_values", ()))
