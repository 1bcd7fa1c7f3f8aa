"""Batching: micro-batches by padded tokens are the full batch, on either side of padding."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import floatline as fl
from floatline.errors import ConfigError, DataError
from floatline.techniques import Batching, Packing, Stack, fake_ranks
from floatline.techniques.base import hardware_of


def run(case, techniques, batch, precision="32-true"):
    model = case.build()
    step = fl.TrainStep(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        precision=precision,
        max_grad_norm=None,
        loss=case.loss,
        techniques=techniques,
    )
    return step(batch), step


def left_padded(batch):
    """The same rows, padding moved to the left: each token-aligned tensor rolled row by row."""
    rows, length = batch["input_ids"].shape
    missing = length - batch["attention_mask"].sum(1)

    def roll(value):
        if not isinstance(value, torch.Tensor) or value.shape != (rows, length):
            return value
        return torch.stack([row.roll(int(shift)) for row, shift in zip(value, missing, strict=True)])

    return {key: roll(value) for key, value in batch.items()}


def split_of(model, **setting):
    return Batching(**setting).apply(model).split


@pytest.mark.parametrize("name", ["gpt2", "qwen3_vl", "tied"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("max_tokens", [None, 20, 24, 40, 1000])
def test_equals_the_full_batch(zoo, name, side, max_tokens):
    batch = zoo[name].batch(0)
    if side == "left" and "attention_mask" in batch:
        batch = left_padded(batch)
    whole, plain = run(zoo[name], [], batch)
    parts, step = run(zoo[name], [Batching(max_tokens=max_tokens)], batch)
    torch.testing.assert_close(parts.loss, whole.loss, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(parts.grad_norm, whole.grad_norm, rtol=5e-6, atol=1e-6)
    for one, other in zip(step.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_rows_of_like_length_lie_together_and_are_trimmed(zoo):
    model, batch = zoo["gpt2"].build(), zoo["gpt2"].batch(0)  # rows of 12, 9, 7 and 6 tokens
    for padded in (batch, left_padded(batch)):
        parts = split_of(copy.deepcopy(model), max_tokens=14)(padded)
        assert [tuple(part["input_ids"].shape) for part in parts] == [(1, 12), (1, 9), (2, 7)]
        assert all(part["labels"].shape == part["attention_mask"].shape == part["input_ids"].shape for part in parts)
        assert int(sum(part["attention_mask"].sum() for part in parts)) == 34


def test_images_go_with_their_rows(zoo):
    model, batch = (
        zoo["qwen3_vl"].build(),
        zoo["qwen3_vl"].batch(0),
    )  # rows of 20, 17, 15 and 14 tokens, images in 0 and 2
    one, two, three = split_of(model, max_tokens=34)(batch)
    assert one["image_grid_thw"].tolist() == [[1, 4, 4]] and one["pixel_values"].shape[0] == 16
    assert two["input_ids"].shape == (2, 17) and two["image_grid_thw"].tolist() == [[1, 8, 4]]
    assert three["pixel_values"] is None and three["input_ids"].shape == (1, 14)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.sampled_from(["right", "left"]), st.integers(0, 20))
def test_every_token_survives_within_the_budget(lengths, side, spare):
    model = torch.nn.Embedding(4, 2)
    width = max(lengths) + spare % 3  # padded even beyond the longest row
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    mask = mask if side == "right" else mask.flip(1)
    ids = torch.where(mask, torch.arange(mask.numel()).view(mask.shape) + 1, 0)
    budget = max(lengths) + spare
    parts = split_of(model, max_tokens=budget)({"input_ids": ids, "attention_mask": mask.long()})
    assert all(part["input_ids"].numel() <= budget for part in parts)
    kept = torch.cat([part["input_ids"].flatten() for part in parts])
    assert sorted(kept[kept > 0].tolist()) == sorted(ids[ids > 0].tolist())
    assert all(bool(part["attention_mask"].any(0).all()) for part in parts)  # no column that is padding in all rows


def test_positions_of_left_padded_rows_stay(zoo):
    batch = left_padded(zoo["gpt2"].batch(0))
    *_, last = split_of(zoo["gpt2"].build(), max_tokens=14)(batch)
    assert last["position_ids"].tolist() == [list(range(5, 12))] * 2
    *_, last = split_of(zoo["qwen3_vl"].build(), max_tokens=34)(left_padded(zoo["qwen3_vl"].batch(0)))
    assert "position_ids" not in last


def test_rows_padded_on_both_sides_are_cut_but_keep_their_width():
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 0], [0, 0, 1, 1]])
    parts = split_of(torch.nn.Embedding(4, 2), max_tokens=8)({"input_ids": mask, "attention_mask": mask})
    assert [part["input_ids"].shape[0] for part in parts] == [2, 1]
    assert all(part["input_ids"].numel() <= 8 for part in parts)


def test_with_accumulation_in_any_order(zoo):
    batch = zoo["gpt2"].batch(0)
    whole, _ = run(zoo["gpt2"], [], batch)
    for techniques in (["batching(max_tokens=12)", "accumulation(micro_batches=2)"],) * 2:
        for order in (techniques, techniques[::-1]):
            parts, step = run(zoo["gpt2"], order, batch)
            torch.testing.assert_close(parts.loss, whole.loss, rtol=2e-6, atol=1e-6)
            assert [technique.name for technique in step.stack.techniques] == ["accumulation", "batching"]


def test_ranks_that_nobody_evens_out_are_refused(zoo):
    model, batch = zoo["gpt2"].build(), zoo["gpt2"].batch(0)
    with fake_ranks(2):
        for technique in (Batching(max_tokens=14), Packing(max_tokens=14)):
            split = technique.apply(copy.deepcopy(model)).split
            with pytest.raises(ConfigError, match=rf"{technique.name}.max_tokens .* would hang\nhint: add sharding"):
                split(batch)
        assert len(split_of(copy.deepcopy(model), max_tokens=None)(batch)) == 1


def test_it_counts_the_padding(zoo):
    _, step = run(zoo["gpt2"], ["batching(max_tokens=14)"], zoo["gpt2"].batch(0))
    facts = step.stack.facts()
    assert facts["batching.tokens"] == 34 and facts["batching.padding"] == 1  # of 48 - 34
    assert facts["batching.padding_removed"] == pytest.approx(13 / 14)


def test_the_model_is_left_alone(zoo):
    model = zoo["gpt2"].build()
    before = dict(model.__dict__)
    applied = Batching(max_tokens=24).apply(model)
    applied.undo()
    assert model.__dict__ == before


def test_bad_input(zoo):
    with pytest.raises(ConfigError, match=r"batching.max_tokens is 0\nhint: give 1 or more"):
        Batching(max_tokens=0)
    with pytest.raises(ConfigError, match=r"batching.window is 0"):
        Batching(window=0)
    with pytest.raises(ConfigError, match="Mlp has no token embedding, so its samples have no lengths"):
        Batching().apply(zoo["mlp"].build())
    with pytest.raises(
        DataError, match=r"row 0 of the batch has 12 tokens, more than batching\.max_tokens=10"
    ) as caught:
        run(zoo["gpt2"], ["batching(max_tokens=10)"], zoo["gpt2"].batch(0))
    assert caught.value.hint == "set batching.max_tokens=12 or more, or shorten the sample"
    with pytest.raises(DataError, match="this tuple has no input_ids"):
        split_of(zoo["gpt2"].build())((torch.ones(2, 3),))
    with pytest.raises(ConfigError, match="batching and packing cannot be combined: packed rows hold no padding"):
        Stack(["packing", "batching"])


def test_several_ranks_must_agree(zoo, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    batch = zoo["gpt2"].batch(0)
    with pytest.raises(ConfigError, match=r"batching\.max_tokens would cut each rank's batch into another number"):
        split_of(zoo["gpt2"].build(), max_tokens=24)(batch)
    assert len(split_of(zoo["gpt2"].build())(batch)) == 1


def test_supports_says_why(zoo):
    model = zoo["conv"].build()
    verdict = Batching().supports(hardware_of(model), model)
    assert not verdict and "no token embedding" in verdict.reason
