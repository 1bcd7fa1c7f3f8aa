"""Undisturbed: a forward and backward that training does not notice."""

import pytest
import torch
from torch import nn

import floatline as fl
from floatline.errors import ConfigError
from floatline.step.undisturbed import undisturbed


class Counting(nn.Module):
    """Replaces its buffer by a new tensor at each call, as some models do."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        return self.layer(x)


def test_random_state_buffers_and_gradients_come_back():
    model = nn.Sequential(Counting(), nn.BatchNorm1d(4), nn.Dropout(0.5))
    model(torch.randn(6, 4)).sum().backward()
    values = {name: buffer.clone() for name, buffer in model.named_buffers()}
    objects = {name: id(tensor) for name, tensor in model.named_buffers()}
    gradients = {name: (id(p.grad), p.grad.clone()) for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    with undisturbed(model):
        model(torch.randn(6, 4)).sum().backward()
        assert not torch.equal(torch.get_rng_state(), state) and float(model[0].calls) == 2
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: id(tensor) for name, tensor in model.named_buffers()} == objects
    assert all(torch.equal(buffer, values[name]) for name, buffer in model.named_buffers())
    for name, parameter in model.named_parameters():
        assert id(parameter.grad) == gradients[name][0] and torch.equal(parameter.grad, gradients[name][1])


def test_also_after_an_error():
    model = nn.BatchNorm1d(2)
    with pytest.raises(ZeroDivisionError), undisturbed(model):
        model(torch.ones(3, 2))
        1 / 0  # noqa: B018
    assert int(model.num_batches_tracked) == 0


def test_no_warm_up_where_backward_updates(zoo):
    case = zoo["mlp"]
    model = case.build()
    step = fl.TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.1), precision="32-true", loss=case.loss)
    step._in_backward = object()
    with pytest.raises(ConfigError, match=r"optimizer_in_backward updates there\nhint: leave the warm-up out"):
        step.warm_up(case.batch(0))
