"""Trouble without NaN: each alarm rings for its trouble, and none for healthy training."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import floatline as fl
from floatline.step.spikes import Spikes


def step_of(model, precision="32-true", lr=1e-2, loss=None, every=4, optimizer=torch.optim.AdamW):
    return fl.TrainStep(model, optimizer(model.parameters(), lr=lr), precision, guard=fl.Guard(sample_every=every),
                        loss=loss or (lambda m, b: m(b).float().square().mean()))  # fmt: skip


def names(step):
    return [alarm.name for alarm in step.sentinel.alarms]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 1))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "16-true"])
def test_healthy_training_rings_no_alarm(precision):
    step = step_of(net(), precision)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        step(torch.randn(16, 8, generator=generator))
    assert names(step) == []


def test_swallowed_updates_with_the_cure():
    step = step_of(net(), "bf16-true", lr=1e-6)
    for _ in range(4):
        step(torch.randn(16, 8))
    assert step.silent.swallowed > 0.9
    step(torch.randn(16, 8))
    assert "updates swallowed" in names(step) or "no weight changed" in names(step)
    alarm = step.sentinel.alarms[0]
    assert "master_weights, kahan or stochastic_rounding" in alarm.remedy and "% of the sampled weights" in alarm.text


@pytest.mark.parametrize("technique", ["kahan", "stochastic_rounding"])
def test_what_rounding_cuts_off_is_not_lost_with_the_cure(technique):
    model = net()
    step = fl.TrainStep(model, lambda p: torch.optim.AdamW(p, lr=1e-5), "bf16-true", techniques=[technique],
                        loss=lambda m, b: m(b).float().square().mean(), guard=fl.Guard(sample_every=2))  # fmt: skip
    for _ in range(12):
        step(torch.randn(16, 8))
    assert step.silent.swallowed > 0.5 and "updates swallowed" not in names(step)


@pytest.mark.parametrize("check", ["before-backward", "after-backward"])
def test_an_update_that_was_not_made_is_not_swallowed(check):
    model = net()
    step = fl.TrainStep(model, torch.optim.AdamW(model.parameters(), lr=1e-2), "bf16-true",
                        loss=lambda m, b: m(b).float().square().mean(),
                        guard=fl.Guard(sample_every=2, check=check))  # fmt: skip
    for batch in (torch.randn(16, 8), torch.full((16, 8), float("nan")), torch.randn(16, 8)):
        step(batch)
    assert names(step) == []


def test_the_end_of_a_schedule_is_no_trouble():
    model = net()
    step = fl.TrainStep(model, torch.optim.AdamW(model.parameters(), lr=1e-2), "bf16-true",
                        loss=lambda m, b: (m(b).float() - b.float().sum(1, True)).square().mean(),
                        schedule=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 60),
                        guard=fl.Guard(sample_every=30))  # fmt: skip
    for _ in range(60):
        step(torch.randn(16, 8))
    assert names(step) == []


def test_a_converged_model_is_no_trouble():
    torch.manual_seed(0)
    model = nn.Linear(8, 1)
    step = fl.TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), "32-true",
                        loss=lambda m, b: (m(b) - b.sum(1, True)).square().mean(),
                        guard=fl.Guard(sample_every=100))  # fmt: skip
    for _ in range(700):
        step(torch.randn(16, 8))
    assert "updates swallowed" not in names(step) and step.silent.swallowed > 0.5


def test_no_weight_changed():
    step = step_of(net(), lr=1e-20)
    for _ in range(9):
        step(torch.randn(16, 8))
    assert "no weight changed" in names(step)


def test_a_learning_rate_of_zero_is_no_trouble():
    step = step_of(net(), lr=0.0)
    for _ in range(12):
        step(torch.randn(16, 8))
    assert names(step) == []


def test_gradients_that_are_zero():
    step = step_of(net(), loss=lambda m, b: (m(b) * 0.0).sum())
    for _ in range(5):
        step(torch.randn(16, 8))
    assert names(step) == ["gradients zero"]


def test_a_loss_spike_rings_once():
    step = step_of(net(), lr=1e-4)
    for _ in range(40):
        step(torch.randn(16, 8))
    step(torch.full((16, 8), 100.0))
    step(torch.full((16, 8), 100.0))
    assert names(step) == ["loss spike"]
    assert "robust deviations above its recent median" in str(step.sentinel.alarms[0])


def test_the_loss_scale_at_its_floor():
    step = step_of(net(), "16-mixed", every=1)
    step(torch.randn(16, 8))
    step.scaling.scaler._scale.fill_(1.0)
    step(torch.randn(16, 8))
    step(torch.randn(16, 8))
    assert "loss scale floor" in names(step)


def test_headroom_in_bits_before_the_first_inf():
    model = net()
    with torch.no_grad():
        model[0].weight.fill_(0.0)
        model[0].bias.fill_(40000.0)
        model[2].weight.mul_(1e-3)
    step = step_of(model, "16-mixed", lr=1e-9, loss=lambda m, b: (m(b).float() * 1e-9).mean())
    for _ in range(5):
        step(torch.randn(16, 8))
    assert step.silent.headroom["0"] == pytest.approx(0.71, abs=0.01)  # log2(65504 / 40000)
    assert step.silent.looks == len(step.silent.measured) > 0 and step.silent.measured[-1][1] == step.silent.headroom
    alarm = next(a for a in step.sentinel.alarms if a.name == "little headroom")
    assert "the output of 0 is 0.7 bits below overflow" in alarm.text and "0=32" in alarm.remedy


def test_a_bad_buffer_that_nobody_writes():
    model = net()
    model.register_buffer("unused", torch.tensor([float("nan")]))
    step = step_of(model)
    for _ in range(4):
        step(torch.randn(16, 8))
    assert names(step) == ["buffer not finite"]


HEALTHY = {
    "mostly zero": lambda r: max(0.0, r.gauss(-0.5, 0.5)),
    "around zero": lambda r: r.gauss(0.0, 1e-3),
    "heavy tail": lambda r: r.expovariate(1.0),
    "plateau": lambda r: 0.6931 + r.gauss(0.0, 1e-5) + 0.01 * (r.random() < 0.02),
    "constant": lambda r: 0.5,
}


@pytest.mark.parametrize("kind", HEALTHY)
def test_noise_is_no_spike(kind):
    spikes, numbers = Spikes(), random.Random(0)
    rung = sum(spikes.score(HEALTHY[kind](numbers)) is not None for _ in range(1000))
    assert rung <= (kind == "heavy tail")  # one value in thousands does lie out there


def test_a_loss_that_stays_where_it_jumped_to_is_no_spike_for_ever():
    spikes, numbers = Spikes(), random.Random(0)
    scores = [spikes.score(numbers.gauss(1.0 if n < 100 else 5.0, 0.1)) for n in range(300)]
    assert scores[100] is not None and sum(score is not None for score in scores) == 32


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.5, 2.0), min_size=32, max_size=200))
def test_spikes_never_ring_within_the_range_seen(losses):
    spikes = Spikes()
    seen = losses[:32]
    for loss in losses[:32]:
        spikes.score(loss)
    assert all(spikes.score(loss) is None for loss in losses[32:] if loss <= max(seen[-32:]))
    assert spikes._sorted == sorted(spikes._recent)
