"""Packing: rows without padding give the padded batch's loss and gradients, and samples do not see each other."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import floatline as fl
from floatline.errors import ConfigError, DataError
from floatline.step.batch import target_count
from floatline.techniques import Packing
from floatline.techniques.batches.tokens import token_mask
from floatline.techniques.packing import fill_rows, pack


def run(case, techniques, batch, precision="32-true"):
    model = case.build()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    step = fl.TrainStep(model, sgd, precision=precision, max_grad_norm=None, techniques=techniques)
    return step(batch), step


def left_padded(batch):
    """The same rows with their padding on the left."""
    shape = batch["input_ids"].shape
    missing = (shape[1] - batch["attention_mask"].sum(1)).tolist()

    def roll(value):
        return torch.stack([row.roll(shift) for row, shift in zip(value, missing, strict=True)])

    return {key: roll(value) if value.shape == shape else value for key, value in batch.items()}


def decoder(kind, **extra):
    def build():
        import transformers

        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            pad_token_id=0,
            **extra,
        )
        return getattr(transformers, f"{kind}ForCausalLM")(config).train()

    return build


MORE = {
    "llama": decoder("Llama"),
    "qwen3": decoder("Qwen3"),
    "llama_eager": decoder("Llama", attn_implementation="eager"),
    "mistral": decoder("Mistral", sliding_window=4),
}
NAMES = ["gpt2", "qwen3_vl", *MORE]


@pytest.fixture(scope="module")
def packable(zoo):
    """The zoo's two, and more decoders on GPT-2's batches."""
    return {name: replace(zoo["gpt2"], build=MORE[name]) if name in MORE else zoo[name] for name in NAMES}


def packed(model, batch, max_tokens=None):
    return pack(model, batch, token_mask(batch, "packing"), max_tokens)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("max_tokens", [None, 20, 28, 35])
def test_equals_the_padded_batch(packable, name, max_tokens):
    case = packable[name]
    batch = case.batch(0)
    whole, plain = run(case, [], batch)
    parts, step = run(case, [Packing(max_tokens=max_tokens)], batch)
    torch.testing.assert_close(parts.loss, whole.loss, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(parts.grad_norm, whole.grad_norm, rtol=5e-6, atol=1e-6)
    for one, other in zip(step.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert step.stack.facts()["packing.padding"] == 0


@pytest.mark.parametrize("name", ["qwen3_vl", "llama"])
def test_left_padding_packs_to_the_same(packable, name):
    case = packable[name]
    batch = case.batch(0)
    whole, _ = run(case, [], left_padded(batch))
    parts, _ = run(case, ["packing"], left_padded(batch))
    torch.testing.assert_close(parts.loss, whole.loss, rtol=2e-6, atol=1e-6)
    for right, left in zip(packed(case.build(), batch), packed(case.build(), left_padded(batch)), strict=True):
        assert all(torch.equal(right[key], left[key]) for key in right if isinstance(right[key], torch.Tensor))


@pytest.mark.parametrize("name", NAMES)
def test_samples_do_not_see_each_other(packable, name):
    case = packable[name]
    model = case.build().eval()
    row = packed(model, case.batch(0))[0]
    plain = row["position_ids"].reshape(-1, row["input_ids"].shape[1])[0]
    start, end = (plain == 0).nonzero()[1:3, 0].tolist()  # the second sample of four, which has no image
    other = {**row, "input_ids": row["input_ids"].clone()}
    other["input_ids"][0, start + 1 : end] = 7
    with torch.no_grad():
        before, after = (model(**{k: v for k, v in b.items() if k != "labels"}).logits for b in (row, other))
    assert torch.equal(before[:, :start], after[:, :start])
    assert torch.equal(before[:, end:], after[:, end:])
    assert not torch.allclose(before[:, start:end], after[:, start:end])


def test_a_mask_of_all_sees_all_so_the_test_above_can_fail(zoo):
    """The same row without restarting positions: there the last sample does see the others."""
    case = zoo["gpt2"]
    model = case.build().eval()
    row = packed(model, case.batch(0))[0]
    plain = {"input_ids": row["input_ids"]}
    other = {"input_ids": row["input_ids"].clone()}
    other["input_ids"][0, 14] = 7
    with torch.no_grad():
        assert not torch.allclose(model(**plain).logits[:, -3:], model(**other).logits[:, -3:])


def test_no_label_leaks_and_the_count_stays(packable):
    for name in NAMES:
        case = packable[name]
        model, batch = case.build(), case.batch(0)
        batch["labels"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)  # first tokens as well
        rows = packed(model, batch, 30)
        assert sum(int(target_count(model, row)) for row in rows) == int(target_count(model, batch))
        for row in rows:
            plain = row["position_ids"].reshape(-1, row["input_ids"].shape[1])[0]
            assert (row["labels"][0][plain == 0] == -100).all()
            assert "attention_mask" not in row and row["use_cache"] is False
        whole, _ = run(case, [], batch)
        parts, _ = run(case, ["packing(max_tokens=30)"], batch)
        torch.testing.assert_close(parts.loss, whole.loss, rtol=2e-6, atol=1e-6)


def test_three_dimensional_positions_go_with_the_plain_ones(zoo):
    case = zoo["qwen3_vl"]
    model, batch = case.build(), case.batch(0)
    row = packed(model, batch)[0]
    assert row["position_ids"].shape == (4, 1, 66)
    asked = model.model.get_rope_index(
        batch["input_ids"][:1, :20], image_grid_thw=batch["image_grid_thw"][:1],
        mm_token_type_ids=batch["mm_token_type_ids"][:1, :20],
    )[0]  # fmt: skip
    assert torch.equal(row["position_ids"][1:, :, :20], asked)
    assert torch.equal(row["pixel_values"], batch["pixel_values"])
    without = {key: value for key, value in batch.items() if key in ("input_ids", "labels", "attention_mask")}
    assert packed(model, without)[0]["position_ids"].shape == (1, 66)  # no images: plain ones, as the model does


def test_rows_without_tokens_are_left_out(zoo):
    case = zoo["qwen3_vl"]
    batch = case.batch(0)
    for key in ("attention_mask", "input_ids", "mm_token_type_ids"):
        batch[key][1] = 0
    batch["labels"][1] = -100
    assert packed(case.build(), batch)[0]["input_ids"].shape == (1, 49)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=40).filter(any), st.integers(0, 40))
def test_rows_are_filled_within_the_budget(lengths, spare):
    budget = max(lengths) + spare
    rows = fill_rows(lengths, budget)
    assert sorted(index for row in rows for index in row) == [i for i, length in enumerate(lengths) if length]
    sums = [sum(lengths[index] for index in row) for row in rows]
    assert all(0 < total <= budget for total in sums)
    assert all(one + other > budget for one, other in pairwise(sums))  # none could have been spared


def test_with_bf16_and_accumulation(zoo):
    batch = zoo["gpt2"].batch(0)
    whole, _ = run(zoo["gpt2"], [], batch, precision="bf16-mixed")
    parts, step = run(zoo["gpt2"], ["packing", "accumulation(micro_batches=2)"], batch, precision="bf16-mixed")
    torch.testing.assert_close(parts.loss, whole.loss, rtol=2e-2, atol=1e-2)
    assert [technique.name for technique in step.stack.techniques] == ["accumulation", "packing"]


def test_under_a_wrapper(zoo):
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = zoo["gpt2"].build()

        def forward(self, **batch):
            return self.inner(**batch)

    Packing().apply(Wrapper())


def test_bad_batches(zoo):
    model, batch = zoo["gpt2"].build(), zoo["gpt2"].batch(0)
    hole = {**batch, "attention_mask": batch["attention_mask"].clone()}
    hole["attention_mask"][1, 2] = 0
    with pytest.raises(DataError, match="row 1 of the batch has padding between its tokens"):
        packed(model, hole)
    with pytest.raises(ConfigError, match="packing sets position_ids itself"):
        packed(model, {**batch, "position_ids": batch["input_ids"]})
    with pytest.raises(
        ConfigError, match=r"weights of shape \(4,\) cannot be laid into one row.*\nhint: leave weights out"
    ):
        packed(model, {**batch, "weights": torch.ones(4)})
    with pytest.raises(DataError, match=r"row 0 of the batch has 12 tokens, more than packing\.max_tokens=9"):
        packed(model, batch, 9)
    with pytest.raises(DataError, match="the batch holds no token"):
        packed(model, {**batch, "attention_mask": torch.zeros_like(batch["input_ids"])})
    with pytest.raises(ConfigError, match=r"packing\.max_tokens is -1"):
        Packing(max_tokens=-1)


def test_a_second_apply_is_refused_and_undo_restores(zoo):
    model = zoo["gpt2"].build()
    before = dict(model.__dict__)
    applied = Packing().apply(model)
    with pytest.raises(ConfigError, match="packing is already applied"):
        fl.techniques.Packing().apply(model)
    applied.undo()
    assert model.__dict__ == before
