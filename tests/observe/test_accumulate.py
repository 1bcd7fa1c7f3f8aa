"""Gradients that meet are added in place by autograd; a trace must not count a new tensor for each sum."""

from typing import ClassVar

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from floatline.observe.accumulate import engine_alone, grows_in_place

aten = torch.ops.aten


class Sums(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.in_place = []
        self.alone = engine_alone()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.saw(func, args, kwargs or {})
        return out

    def saw(self, func, args, kwargs):
        if func in self.alone and torch._C._current_autograd_node() is not None:
            self.in_place.append(grows_in_place(func, args, kwargs, self.alone))


def sums_of(program, **how):
    with FakeTensorMode(allow_non_fake_inputs=True), Sums() as sums:
        x = torch.ones(4, 8, requires_grad=True)
        program(x.exp()).sum().backward(**how)
    return sums.in_place


class Both(torch.autograd.Function):
    """Its backward adds in Python, which holds both operands."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        first, second = gradient * 2, gradient * 3
        return first + second


class Kept(torch.autograd.Function):
    """Its backward keeps what it returns."""

    held: ClassVar = []

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        made = gradient * 2
        Kept.held.append(made)
        return made


def test_paths_that_join_are_added_in_place():
    assert sums_of(lambda y: y.sin() + y.cos()) == [True]
    assert sums_of(lambda y: y.sin() + y.cos() + y.tanh()) == [True, True]


INDEX = torch.tensor([1, 2])


@pytest.mark.parametrize(
    "taken",
    [
        lambda y: y[INDEX],
        lambda y: y.index_select(0, INDEX),
        lambda y: y.gather(0, INDEX[:, None]),
        lambda y: y.max(dim=1).values,
        lambda y: y.topk(2).values,
    ],
)
def test_what_was_taken_out_goes_back_into_the_zeros(taken):
    assert sums_of(taken) == [True]


class Scattered(torch.autograd.Function):
    """Its backward scatters in Python, and the zeros live on."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        zeros = torch.zeros_like(gradient)
        return zeros.scatter_add(0, torch.zeros(1, 8, dtype=torch.long), gradient[:1])


def test_zeros_that_python_holds_are_not_written_into():
    assert sums_of(Scattered.apply) == [False]


def test_a_sum_in_python_is_a_new_tensor():
    assert sums_of(Both.apply) == [False]


def test_what_someone_else_holds_is_not_written_into():
    """The later path's gradient comes first: it is the one that is added to."""
    assert sums_of(lambda y: y.sin() + Kept.apply(y)) == [False]
    Kept.held.clear()


def test_a_view_of_something_larger_is_not_written_into():
    assert sums_of(lambda y: y.sin() + y.t().t()) == [False]


def test_with_a_graph_of_the_backward_nothing_is_in_place():
    assert sums_of(lambda y: y.sin() + y.cos(), create_graph=True)[:1] == [False]


def test_the_rest_of_the_program_is_left_alone():
    with FakeTensorMode(), Sums() as sums:
        nn.Linear(4, 4)(torch.ones(2, 4)) + 1
    assert sums.in_place == []
    assert not grows_in_place(aten.add.Tensor, (torch.ones(2), torch.ones(2)), {}, engine_alone())


@pytest.mark.parametrize("_", range(2))
def test_the_holders_are_counted_once(_):
    assert engine_alone() is engine_alone()
    assert all(count >= 1 for holders in engine_alone().values() for count in holders)
