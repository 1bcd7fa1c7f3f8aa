"""Remedies that are tried: what they change, and what is said when they could not be."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import floatline as fl
from floatline.diagnose.altered import RowsUnmasked, off_edge, widened
from floatline.diagnose.cures import _upward, island, samples_replaced

FUNCTIONS = ["log", "sqrt", "rsqrt", "acos", "atanh", "exp", "reciprocal", "log1p", "logit", "erfinv", "asin", "log2"]
values = st.floats(-(2.0**60), 2.0**60, width=32) | st.sampled_from([0.0, 1.0, -1.0, math.inf, -math.inf, math.nan])


@pytest.mark.parametrize("name", FUNCTIONS)
@given(st.lists(values, min_size=1, max_size=6))
def test_off_the_edge_function_and_derivative_are_finite(name, numbers):
    x = torch.tensor(numbers)
    moved = off_edge(name, x.masked_fill(x.abs() < 2.0**-40, 0.0)).requires_grad_()  # near 0 fp32 may end
    result = getattr(torch, name)(moved)
    result.sum().backward()
    assert torch.isfinite(result).all() and torch.isfinite(moved.grad).all()


def test_what_is_inside_stays_the_same_object():
    x = torch.tensor([0.5, 0.25])
    assert off_edge("log", x) is x and off_edge("acos", x) is x and off_edge("add", x) is x
    assert off_edge("add", torch.tensor([1.0, math.inf])).tolist() == [1.0, 0.5]
    assert off_edge("__rtruediv__", torch.tensor([0.0, 2.0])).tolist() == [0.5, 2.0]


def test_widened():
    assert widened("add", torch.ones(1, dtype=torch.float16)).dtype is torch.float32
    x = torch.ones(1, dtype=torch.float64)
    assert widened("add", x) is x


def test_masked_rows_are_unmasked_inside_of_library_code_too():
    scores = torch.tensor([[-math.inf, -math.inf], [0.0, -math.inf]])
    with RowsUnmasked() as rows:
        assert F.softmax(scores, -1).tolist() == [[0.5, 0.5], [1.0, 0.0]]
    assert rows.changed
    with RowsUnmasked() as rows:
        F.log_softmax(torch.zeros(2, 2), 0)
    assert not rows.changed


def test_an_island_is_in_fp32_and_leaves_no_trace():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).half()
    x = torch.ones(1, 2).half()
    seen = []
    hook = model[1].register_forward_pre_hook(lambda module, args: seen.append((module.weight.dtype, args[0].dtype)))
    with island(model, "1"):
        assert model(x).dtype is torch.float16
    hook.remove()
    assert torch.float32 in seen[0]
    assert model[1].weight.dtype is torch.float16 and model[1].weight.grad is None
    with pytest.raises(ZeroDivisionError), island(model, "1"):
        raise ZeroDivisionError
    assert model[1].weight.dtype is torch.float16


def test_islands_are_tried_from_the_inside_out_at_modules_that_are_called():
    model = nn.Sequential(nn.ModuleDict({"a": nn.Sequential(nn.Linear(1, 1))}))
    assert _upward("0.a.0", model) == ["0.a.0", "0.a"]
    assert _upward("0.a", model) == ["0.a"] and _upward("", model) == [] and _upward("gone", model) == []


def test_samples_are_replaced_by_one_that_is_good_in_all_tensors():
    x, y = torch.tensor([[1.0], [math.nan], [3.0]]), torch.tensor([math.inf, 2.0, 4.0])
    with samples_replaced([x, y], (1,)) as possible:
        assert possible and x.tolist()[1] == [3.0] and y.tolist()[1] == 4.0
    assert math.isnan(x[1]) and y.tolist() == [math.inf, 2.0, 4.0]


def test_a_remedy_that_does_not_fit_the_program_is_not_tried():
    model, x = nn.Linear(4, 4).half(), torch.randn(3, 4).half()

    def forward():
        h = model(x) * 600
        square = h * h
        assert square.dtype is torch.float16
        return square.float().mean()

    finding = fl.diagnose(forward, model)
    assert finding.cause_name == "overflow" and finding.counterfactual.cured is None
    assert "with it the program stops: AssertionError" in finding.counterfactual.why


def test_of_many_layers_with_one_line_all_are_mended():
    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x, mask):
            return (self.linear(x) @ x.T + mask).softmax(-1) @ x

    model, x = nn.ModuleList([Attend(), Attend(), Attend()]), torch.randn(3, 4)
    mask = torch.zeros(3, 3)
    mask[1] = -math.inf

    def forward():
        h = x
        for layer in model:
            h = layer(h, mask)
        return h.sum()

    finding = fl.diagnose(forward, model)
    assert (finding.module, finding.counterfactual.kind, finding.counterfactual.cured) == ("0", "row", True)


def test_a_loss_scale_that_is_too_high_is_lowered():
    model, x = nn.Linear(4, 1).half(), torch.full((3, 4), 50.0).half()
    finding = fl.diagnose(lambda: model(x).float().mean() * 2.0**16, model)
    assert finding.cause_name == "gradient overflow"
    assert (finding.counterfactual.kind, finding.counterfactual.cured) == ("scale", True)
