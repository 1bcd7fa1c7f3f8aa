"""Placement: what techniques tell about where memory lies, and who hears of it."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from floatline.hardware import resolve
from floatline.techniques.placement import (
    allocates_on_host,
    allocates_within_kernel,
    holds_fakes,
    is_fake,
    moved_to_host,
    on_host,
    resized,
    stands_in,
    watching,
    within_kernel,
)


class Listener:
    def __init__(self):
        self.heard = []

    def moved_to_host(self, tensor):
        self.heard.append(("moved", tensor))

    def resized(self, tensor):
        self.heard.append(("resized", tensor))


@pytest.mark.parametrize("context, asked", [(on_host, allocates_on_host), (within_kernel, allocates_within_kernel)])
def test_contexts_hold_inside_and_end_with_an_exception(context, asked):
    assert not asked()
    with pytest.raises(KeyError), context():
        with context():
            assert asked()
        assert asked()
        raise KeyError
    assert not asked()


def test_what_leaves_a_kernel_has_memory():
    with within_kernel():
        with within_kernel(False):
            assert not allocates_within_kernel()
        assert allocates_within_kernel() and not allocates_on_host()


def test_the_watcher_hears_and_without_one_nothing_happens():
    tensor, listener = torch.ones(1), Listener()
    moved_to_host(tensor)
    with watching(listener):
        moved_to_host(tensor)
        resized(tensor)
    resized(tensor)
    assert [(what, heard is tensor) for what, heard in listener.heard] == [("moved", True), ("resized", True)]


def test_a_backward_runs_in_the_callers_context():
    """Saved tensors are fetched there, and say where."""
    found = []

    class Asks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            found.append(allocates_on_host())
            return gradient

    loss = Asks.apply(torch.ones(2, requires_grad=True)).sum()
    with on_host():
        loss.backward()
    assert found == [True]


def test_cpu_tensors_stand_in_for_a_gpu_only():
    model = nn.Linear(2, 2)
    assert stands_in(model, resolve("t4")) and not stands_in(model, resolve("cpu"))
    assert not stands_in(nn.Linear(2, 2, device="meta"), resolve("t4"))


def test_fakes_are_told():
    with FakeTensorMode():
        model = nn.Linear(2, 2)
    assert holds_fakes(model) and is_fake(model.weight) and not is_fake(torch.ones(1))
    assert not holds_fakes(nn.Linear(2, 2)) and not holds_fakes(nn.ReLU())
