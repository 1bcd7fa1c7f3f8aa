"""Stepping some parameters at a time: narrowed groups, chunks, what it refuses, and wrappers that share everything."""

import pytest
import torch

from floatline.errors import ConfigError
from floatline.techniques.optim_steps.partial_step import chunks, only, state_bytes, step_only
from floatline.techniques.optim_steps.wrapped import WrappedOptimizer, load_in_place


def parameters(*sizes):
    made = [torch.zeros(size, requires_grad=True) for size in sizes]
    for parameter in made:
        parameter.grad = torch.ones_like(parameter)
    return made


def sizes_of(cut):
    return [[[parameter.numel() for parameter in chosen] for _, chosen in chunk] for chunk in cut]


def test_only_narrows_in_place_and_puts_back_also_after_an_error():
    a, b, c = parameters(1, 2, 3)
    optimizer = torch.optim.SGD([{"params": [a, b]}, {"params": [c], "lr": 2.0}], lr=1.0)
    groups, first = optimizer.param_groups, optimizer.param_groups[0]
    with pytest.raises(KeyError), only(optimizer, [(first, [b])]):
        assert optimizer.param_groups is groups and groups == [first] and first["params"] == [b]
        raise KeyError
    assert [len(group["params"]) for group in groups] == [2, 1] and groups[0] is first
    step_only(optimizer, [(groups[1], [c])])
    assert [p[0].item() for p in (a, b, c)] == [0.0, 0.0, -2.0]


def test_chunks_hold_the_limit_keep_the_order_and_leave_out_what_has_no_gradient():
    made = parameters(4, 4, 9, 1, 1, 5)
    made[4].grad = None
    optimizer = torch.optim.SGD([{"params": made[:2]}, {"params": made[2:]}], lr=1.0)
    cut = chunks(optimizer, 8, torch.Tensor.numel)
    assert sizes_of(cut) == [[[4, 4]], [[9]], [[1, 5]]]
    assert sizes_of(chunks(optimizer, 17, torch.Tensor.numel)) == [[[4, 4], [9]], [[1, 5]]]
    assert sizes_of(chunks(optimizer, 1, torch.Tensor.numel)) == [[[4]], [[4]], [[9]], [[1]], [[5]]]


class CountsInGroups(torch.optim.SGD):
    def step(self, closure=None):
        for group in self.param_groups:
            group["updates"] = group.get("updates", 0) + 1
        return super().step(closure)


def test_an_optimizer_that_counts_in_its_groups_is_refused():
    optimizer = CountsInGroups(parameters(1, 1), lr=1.0)
    group = optimizer.param_groups[0]
    with pytest.raises(ConfigError, match=r"CountsInGroups keeps state in its parameter groups \(updates\)") as error:
        step_only(optimizer, [(group, group["params"][:1])])
    assert error.value.hint == "use an optimizer of torch.optim, or drop the technique"


def test_lbfgs_is_refused():
    with pytest.raises(ConfigError, match="demo steps some parameters at a time, which LBFGS cannot"):
        WrappedOptimizer(torch.optim.LBFGS(parameters(1)), "demo")


def test_a_wrapper_shares_groups_and_state_and_loading_keeps_them():
    inner = torch.optim.SGD(parameters(2), lr=1.0, momentum=0.9)
    wrapper = WrappedOptimizer(WrappedOptimizer(inner, "inside"), "outside")
    groups, group, state = inner.param_groups, inner.param_groups[0], inner.state
    inner.step()
    saved = wrapper.state_dict()
    saved["param_groups"][0]["lr"] = 0.25
    wrapper.load_state_dict(saved)
    for optimizer in (inner, wrapper.inner, wrapper):
        assert optimizer.param_groups is groups and groups[0] is group and optimizer.state is state
    assert group["lr"] == 0.25 and state[group["params"][0]]["momentum_buffer"].tolist() == [1.0, 1.0]


def test_load_in_place_keeps_objects_where_torch_makes_new_ones():
    optimizer = torch.optim.SGD(parameters(1), lr=1.0)
    group = optimizer.param_groups[0]
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0] is not group  # the reason for load_in_place
    group = optimizer.param_groups[0]
    load_in_place(optimizer, optimizer.state_dict(), optimizer.load_state_dict)
    assert optimizer.param_groups[0] is group


def test_state_bytes_counts_shared_storage_once():
    parameter = parameters(10)[0]
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    shared = torch.zeros(10)
    optimizer.state[parameter] = {"a": shared, "b": shared[:5], "c": torch.zeros(2), "step": 3}
    assert state_bytes(optimizer) == 48 and state_bytes(optimizer, "cuda") == 0
