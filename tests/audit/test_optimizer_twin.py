"""Twins of optimizers: the same step, on cut-outs, with the original left alone."""

import pytest
import torch
from torch import nn

from floatline.audit.optimizer_twin import Cut, cut_of, make_twin, steps_elements_alone
from floatline.techniques.optim_steps.wide_step import COMPENSATION, Compensated, WideStep

ALONE = ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam", "Rprop", "ASGD"]


def trained(make, dtype=torch.float32, steps=3):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(6, 5).to(dtype))
    optimizer = make([weight])
    for _ in range(steps):
        weight.grad = torch.randn(6, 5).to(dtype)
        optimizer.step()
    return weight, optimizer


def kahan(params):
    inner = torch.optim.AdamW(params, lr=1e-2)
    return WideStep(inner, Compensated(), moments="fp32", bucket_bytes=1000, seed=0, name="kahan")


@pytest.mark.parametrize("name", ALONE)
def test_a_twin_of_the_same_format_steps_as_the_optimizer_does(name):
    weight, optimizer = trained(lambda params: getattr(torch.optim, name)(params, lr=1e-2))
    cut = Cut(name="w", parameter=weight, index=torch.tensor([0, 7, 29]))
    twin = make_twin(optimizer, [cut], torch.float32)
    gradient = torch.randn(6, 5)
    weight.grad = gradient
    optimizer.step()
    twin.step([cut.of(gradient)])
    assert torch.equal(twin.weights[0].reshape(-1), weight.reshape(-1)[cut.index])


def test_a_twin_of_kahan_has_its_inner_optimizer_and_its_compensation():
    weight, optimizer = trained(kahan, torch.bfloat16)
    cut = Cut(name="w", parameter=weight)
    twin = make_twin(optimizer, [cut], torch.bfloat16)
    assert twin.optimizer.inner is not optimizer.inner and twin.optimizer.state is twin.optimizer.inner.state
    gradient = torch.randn(6, 5).bfloat16()
    weight.grad = gradient
    optimizer.step()
    twin.step([gradient])
    assert torch.equal(twin.weights[0], weight)
    expected = weight.detach().double() + optimizer.state[weight][COMPENSATION].double()
    assert torch.equal(twin.carried(0), expected)


def test_hooks_and_schedulers_stay_behind():
    weight, optimizer = trained(lambda params: torch.optim.SGD(params, lr=1e-2))
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(1))
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    twin = make_twin(optimizer, [Cut(name="w", parameter=weight)], torch.float64)
    twin.step([torch.ones(6, 5)])
    assert not seen and not getattr(optimizer, "_opt_called", False) and schedule.last_epoch == 0


def test_parameters_held_elsewhere_in_the_optimizer_are_its_own():
    weight, optimizer = trained(lambda params: torch.optim.SGD(params, lr=1e-2))
    optimizer.remembered = [weight]
    twin = make_twin(optimizer, [Cut(name="w", parameter=weight)], torch.float64)
    assert twin.optimizer.remembered[0] is twin.weights[0]


@pytest.mark.parametrize("name", ALONE)
def test_elementwise_optimizers_are_known_by_what_they_do(name):
    weight, optimizer = trained(lambda params: getattr(torch.optim, name)(params, lr=1e-2), steps=0)
    assert steps_elements_alone(optimizer, weight)


@pytest.mark.parametrize("name", ["Muon", "Adafactor"])
def test_optimizers_that_mix_elements_are_too(name):
    weight, optimizer = trained(lambda params: getattr(torch.optim, name)(params, lr=1e-2))
    assert not steps_elements_alone(optimizer, weight)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (40, 50), (2, 3, 4, 50)])
def test_cuts_keep_dimensions_and_repeat_small_parameters(shape):
    parameter = torch.randn(shape)
    cut = cut_of("w", parameter, 600, torch.Generator().manual_seed(0))
    taken = cut.of(parameter)
    assert taken.dim() == max(1, parameter.dim()) and 250 < taken.numel() <= 600
    assert torch.isin(taken, parameter).all()


def test_age_moves_counters_of_state_and_groups():
    weight, optimizer = trained(lambda params: torch.optim.AdamW(params, lr=1e-2))
    optimizer.param_groups[0]["step"] = torch.tensor(3)
    twin = make_twin(optimizer, [Cut(name="w", parameter=weight)], torch.float64)
    twin.age(100)
    assert float(twin.optimizer.state[twin.weights[0]]["step"]) == 103
    assert int(twin.optimizer.param_groups[0]["step"]) == 103 and int(optimizer.param_groups[0]["step"]) == 3
