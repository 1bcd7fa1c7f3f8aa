"""Accumulation: micro-batches cut from one batch sum up to it."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import floatline as fl
from floatline.errors import ConfigError, FloatlineWarning
from floatline.techniques import make_technique
from floatline.techniques.batches.rows import cut_rows, rows_of


def run(case, techniques, batch=None):
    model = case.build()
    step = fl.TrainStep(
        model, torch.optim.SGD(model.parameters(), lr=0.1), precision="32-true", loss=case.loss, techniques=techniques
    )
    return step(case.batch(0) if batch is None else batch), model


@pytest.mark.parametrize("micro_batches", [2, 3, 4, 99])
def test_sums_up_to_the_full_batch(zoo, micro_batches):
    for name in ("mlp", "gpt2", "qwen3_vl", "tied"):
        whole, _ = run(zoo[name], [])
        parts, _ = run(zoo[name], [fl.techniques.Accumulation(micro_batches=micro_batches)])
        torch.testing.assert_close(parts.loss, whole.loss, rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(parts.grad_norm, whole.grad_norm, rtol=5e-6, atol=1e-6)


def test_images_go_with_their_rows(zoo):
    model, batch = zoo["qwen3_vl"].build(), zoo["qwen3_vl"].batch(0)
    first, rest = cut_rows(model, batch, torch.tensor([0, 1])), cut_rows(model, batch, torch.tensor([2, 3]))
    assert first["image_grid_thw"].tolist() == [[1, 4, 4]] and first["pixel_values"].shape[0] == 16
    assert rest["image_grid_thw"].tolist() == [[1, 8, 4]] and rest["pixel_values"].shape[0] == 32
    assert torch.equal(torch.cat([first["pixel_values"], rest["pixel_values"]]), batch["pixel_values"])
    blind = cut_rows(model, batch, torch.tensor([1]))
    assert blind["pixel_values"] is None and rows_of(blind) == 1


def test_a_list_of_the_callers_is_left_alone(zoo):
    case = zoo["mlp"]
    x, y = case.batch(0)
    halves = [(x[:2], y[:2]), (x[2:], y[2:])]
    out, _ = run(case, ["accumulation(micro_batches=4)"], halves)
    whole, _ = run(case, [])
    torch.testing.assert_close(out.loss, whole.loss, rtol=1e-6, atol=1e-6)


def test_bad_input(zoo):
    with pytest.raises(ConfigError, match=r"accumulation.micro_batches is 0\nhint: give 1 or more"):
        fl.techniques.Accumulation(micro_batches=0)
    with pytest.raises(ConfigError, match="cannot be cut into micro-batches of 4 rows"):
        cut_rows(zoo["mlp"].build(), {"input_ids": torch.zeros(4, 2), "extra": torch.zeros(3)}, torch.tensor([0]))


class Contrastive(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.logit_scale = nn.Parameter(torch.ones(()))


@pytest.mark.parametrize("text", ["accumulation", "batching(max_tokens=8)"])
def test_a_loss_that_compares_rows_is_warned_of(text):
    with pytest.warns(FloatlineWarning, match=r"has a logit_scale.*another loss: drop (accumulation|batching)"):
        make_technique(text).apply(Contrastive())


def test_batching_that_only_trims_needs_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_technique("batching").apply(Contrastive())


def test_the_balance_of_experts_is_noted():
    model = nn.Linear(2, 2)
    model.config = SimpleNamespace(output_router_logits=True)
    (note,) = fl.techniques.Accumulation().apply(model).notes
    assert "the experts' balance loss" in note
