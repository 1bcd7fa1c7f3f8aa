"""Where a batch's tokens lie."""

import pytest
import torch
from torch import nn

from floatline.errors import DataError
from floatline.techniques.batches.tokens import PaddingCounter, spans, token_aligned, token_mask, transformers_model


def test_the_mask_or_everything():
    ids = torch.ones(2, 3, dtype=torch.long)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert torch.equal(token_mask({"input_ids": ids, "attention_mask": mask}, "x"), mask.bool())
    assert bool(token_mask({"input_ids": ids}, "x").all())
    assert bool(token_mask({"input_ids": ids, "attention_mask": torch.zeros(2, 1, 3, 3)}, "x").all())


@pytest.mark.parametrize(
    ("batch", "what"),
    [
        ((torch.zeros(2, 3),), "this tuple has no input_ids"),
        ({"input_ids": torch.zeros(3)}, r"input_ids of shape \(3,\)"),
    ],
)
def test_a_batch_without_lengths(batch, what):
    with pytest.raises(DataError, match=f"batching needs the lengths of a batch's samples, but .*{what}") as caught:
        token_mask(batch, "batching")
    assert "attention_mask" in caught.value.hint and "drop batching" in caught.value.hint


def test_spans_on_both_sides_and_of_empty_rows():
    first, last = spans(torch.tensor([[0, 1, 0], [1, 1, 0], [0, 0, 0], [0, 1, 1]]).bool())
    assert first.tolist() == [1, 0, 0, 1] and last.tolist() == [2, 2, 3, 3]


def test_token_aligned():
    batch = {"a": torch.zeros(2, 3), "b": torch.zeros(2, 3, 5), "c": torch.zeros(3, 2), "d": None, "e": "text"}
    assert token_aligned(batch, torch.Size((2, 3))) == ["a", "b"]


def test_a_wrapped_model_is_found(zoo):
    model = zoo["gpt2"].build()
    assert transformers_model(nn.Sequential(model)) is model
    assert transformers_model(zoo["mlp"].build()) is None


def test_the_counter():
    counter = PaddingCounter()
    assert counter.facts() == {"tokens": 0, "padding": 0, "padding_removed": 0.0}
    counter.add(10, 20, 12)
    counter.add(10, 10, 10)
    assert counter.facts() == {"tokens": 20, "padding": 2, "padding_removed": pytest.approx(0.8)}
