"""Random numbers are the same in every run of an audit, whoever draws them, and the report says that there are some."""

import itertools
import random

import numpy as np
import pytest
import torch
from torch import nn

import floatline as fl
from floatline.audit.random_numbers import randomness, seeded

CPU = torch.device("cpu")


class Noisy(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.linear, self.draw = nn.Linear(16, 4), draw

    def forward(self, x):
        return self.linear(x * (1 + self.draw())).square().mean()


DRAWS = [lambda: random.random(), lambda: np.random.rand(), lambda: torch.rand(())]  # a bound generator is copied


@pytest.mark.parametrize("draw", DRAWS)
def test_numbers_start_at_the_seed_and_go_on_afterwards(draw):
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    drawn = []
    for seed in (7, 7, -1, 2**40):
        with seeded(seed, [CPU]):
            drawn.append(float(draw()))
    assert drawn[0] == drawn[1] and len(set(drawn)) == 3
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


@pytest.mark.parametrize("draw", DRAWS)
def test_a_model_that_draws_is_told_and_does_not_hang_on_the_callers_state(draw):
    torch.manual_seed(0)
    model, x = Noisy(draw), torch.randn(8, 16)
    reports = []
    for state in (1, 2):
        random.seed(state)
        np.random.seed(state)
        torch.manual_seed(state)
        reports.append(fl.audit(model, x, candidates=("bf16",), hardware="l4", repeats=0, probes=0, seed=5))
    assert reports[0].candidates["bf16"].all_lowered == reports[1].candidates["bf16"].all_lowered
    assert "the model draws random numbers in evaluation mode (dropout that is always on?); every run uses seed 5" in (
        reports[0].notes
    )


@pytest.mark.parametrize("draw", DRAWS)
def test_a_function_that_draws_is_told(draw):
    def noisy(x):
        return x * (1 + draw())

    report = fl.audit_function(noisy, (torch.randn(64),), candidates=("bf16",), hardware="l4")
    assert "noisy draws random numbers; every run uses seed 0" in report.notes
    assert report.safe == ("bf16",)


def test_runs_that_differ_by_themselves():
    count = itertools.count()
    note = randomness(lambda seed: {"y": torch.full((2,), float(next(count)))}, 0, "it")
    assert note == "two runs of it with one seed differ by up to 1: that is in every error below"
    note = randomness(lambda seed: {"y": torch.zeros(next(count))}, 0, "it")
    assert "differ by up to inf" in note


def test_runs_that_are_alike():
    assert not randomness(lambda seed: {"y": torch.tensor([1.0, float("nan")])}, 0, "it")


def test_devices_that_a_program_does_not_use_keep_their_numbers(monkeypatch):
    seeded_devices = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded_devices.append)
    model = torch.nn.Linear(8, 4)
    fl.audit(model, torch.randn(2, 8), candidates=("bf16",), hardware="cpu", mode="true", repeats=1, probes=1)
    assert not seeded_devices
