"""Loss scales that are set."""

import pytest
import torch
from torch import nn

from floatline.precision import LossScaling, NoLossScaling


@pytest.mark.parametrize(("scale", "grows"), [(2.0**16, True), (2.0, True), (1.0, False), (2.0**-8, False)])
def test_a_scale_that_was_set_to_1_or_less_does_not_grow_back(scale, grows):
    """torch doubles it after 2000 good updates; the last of them is made here."""
    scaling = LossScaling("cpu")
    scaling.set(scale)
    scaling.load_state_dict(scaling.state_dict() | {"_growth_tracker": 1999})
    _update(scaling, 1.0)
    assert scaling.current() == (2 * scale if grows else scale)
    again = LossScaling("cpu")
    again.load_state_dict(scaling.state_dict())  # and neither does that of a run that was resumed
    assert again.state_dict() == scaling.state_dict()
    _update(scaling, float("inf"))
    assert scaling.current() == (scale if grows else scale / 2)


def _update(scaling, gradient):
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    loss = scaling.scale(weight.sum() * gradient)
    weight.grad = torch.full((1,), gradient)
    scaling.unscale(optimizer)
    scaling.update(torch.zeros(()))
    assert loss.shape == ()


def test_without_scaling_there_is_nothing_to_set():
    scaling = NoLossScaling()
    scaling.set(2.0)
    assert scaling.current() is None
