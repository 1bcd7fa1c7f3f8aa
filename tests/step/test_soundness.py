"""What a checkpoint must not rest on is named: weights, statistics, optimizer state; masks may be infinite."""

import math

import pytest
import torch
from torch import nn

from floatline.step.soundness import not_finite


@pytest.fixture
def job():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model.register_buffer("mask", torch.full((2,), -math.inf))
    model.register_buffer("steps", torch.tensor(3))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_a_sound_job(job):
    assert not_finite(*job) == ""


@pytest.mark.parametrize(("spoil", "name"), [
    (lambda m, o: m[0].weight.data.view(-1)[3:4].fill_(math.nan), "0.weight"),
    (lambda m, o: m[0].bias.data[0:1].fill_(math.inf), "0.bias"),
    (lambda m, o: m[1].running_var[0:1].fill_(math.inf), "1.running_var"),
    (lambda m, o: m.mask[0:1].fill_(math.nan), "mask"),
    (lambda m, o: o.state[m[1].weight]["exp_avg_sq"][0:1].fill_(math.nan), "exp_avg_sq of 1.weight"),
])  # fmt: skip
def test_what_is_not_finite_is_named(job, spoil, name):
    spoil(*job)
    assert not_finite(*job) == name


def test_master_weights_are_looked_at(job):
    model, _ = job
    masters = [p.detach().clone() for p in model.parameters()]
    masters[1][0] = math.nan
    assert not_finite(model, torch.optim.SGD(masters, lr=0.1)) == "parameter 1 of the optimizer"
