"""What fp8 would do to linear layers: planted trouble is found, healthy layers are let through, errors are right."""

import json

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from floatline.audit.fp8 import KEEP, PER_BLOCK, PER_TENSOR, what_if
from floatline.audit.fp8_rounding import quantised
from floatline.audit.fp8_row import EXCESS
from floatline.errors import ConfigError, ModelError


def seeded(*sizes, seed=0):
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def linear(inputs=256, outputs=128, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs)


def measured(layer, x, dy=None, grad=True):
    """The row of a single layer with given input and output gradient."""
    model = nn.ModuleDict({"layer": layer})
    x = x.clone().requires_grad_(grad)
    dy = seeded(x.shape[0], layer.out_features, seed=5) if dy is None else dy
    rows = what_if(model, lambda: (layer(x) * dy).sum())
    assert [row.name for row in rows] == ["layer"]
    return rows[0]


def test_a_healthy_layer_is_fit_for_one_scale():
    row = measured(linear(), seeded(512, 256))
    assert row.verdict == PER_TENSOR
    assert row.reason.startswith("one scale: ") and "1.1 times what rounding costs" in row.reason
    assert all(row.fits(scheme) for scheme in ("tensor", "row", "block"))
    assert (row.in_features, row.out_features, row.tokens) == (256, 128, 512)
    assert row.flops == 3 * 2 * 512 * 256 * 128 and row.flops_share == 1


def test_errors_are_those_of_the_three_products():
    layer, x, dy = linear(), seeded(64, 256), seeded(64, 128, seed=2)
    row, w = measured(layer, x, dy), layer.weight.detach()

    def q(values, fmt="fp8-e4m3"):
        return quantised(values, fmt, "tensor", 1)

    pairs = {
        "output": (q(x) @ q(w).t(), x @ w.t()),
        "input gradient": (q(dy, "fp8-e5m2") @ q(w), dy @ w),
        "weight gradient": (q(dy, "fp8-e5m2").t() @ q(x), dy.t() @ x),
    }
    for product, (found, exact) in pairs.items():
        error = row.errors["tensor"][product]
        assert error.total == pytest.approx(((found - exact).norm() / exact.norm()).item(), rel=1e-4)
        rows = (found - exact).norm(dim=1) / exact.norm(dim=1)
        assert error.median == pytest.approx(rows.median().item(), rel=1e-4)


def test_a_token_that_dwarfs_the_others_needs_rows_or_blocks():
    x = seeded(512, 256)
    x[8] *= 1e7
    row = measured(linear(), x)
    assert row.verdict == PER_BLOCK and row.fits("row")
    assert row.errors["tensor"]["output"].total < 0.05 < 0.9 < row.errors["tensor"]["output"].median
    assert "a scale a row is enough" in row.reason and "of its input underflow with one scale" in row.reason


def test_a_channel_that_dwarfs_the_others_spoils_rows_too():
    """The large channel is multiplied by nothing, so all of the output comes from what its scale has crushed."""
    layer, x = linear(), seeded(512, 256)
    x[:, 3] *= 1e7
    with torch.no_grad():
        layer.weight[:, 3] = 0
    row = measured(layer, x)
    assert row.verdict == KEEP and not row.fits("row")
    assert row.excess("block")[0] > EXCESS and "underflow" in row.reason and "cancel" not in row.reason


def test_terms_that_cancel_are_told_from_scales_that_do_not_fit():
    layer = linear()
    with torch.no_grad():
        layer.weight -= layer.weight.mean(1, keepdim=True)
    row = measured(layer, 1 + 0.01 * seeded(512, 256))
    assert row.verdict == KEEP
    assert "its terms cancel, so bf16 suffers alike: output off by" in row.reason


def test_a_gradient_that_only_a_bare_cast_would_lose():
    row = measured(linear(), seeded(64, 256), 1e-7 * seeded(64, 128, seed=3))
    assert row.verdict == PER_TENSOR
    assert row.operands["gradient", "fp8-e5m2", "none"].underflow > 0.99
    assert row.operands["gradient", "fp8-e5m2", "tensor"].underflow < 0.01


@pytest.mark.parametrize(("inputs", "outputs", "said"), [(250, 128, "250 inputs"), (256, 100, "100 outputs")])
def test_odd_dims_stay(inputs, outputs, said):
    row = measured(linear(inputs, outputs), seeded(64, inputs))
    assert row.verdict == KEEP and said in row.reason
    assert row.errors["tensor"]["output"].worst < 0.05


def test_conv1d_is_measured_as_the_linear_that_it_is():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    transposed, plain = Conv1D(128, 256), linear()
    with torch.no_grad():
        plain.weight.copy_(transposed.weight.t())
    x, dy = seeded(32, 256), seeded(32, 128, seed=1)
    row = what_if(nn.ModuleDict({"c": transposed}), lambda: (transposed(x) * dy).sum())[0]
    assert row.verdict == KEEP and row.reason.startswith("not convertible: a Conv1D of transformers")
    assert (row.in_features, row.out_features) == (256, 128)
    assert row.errors["row"] == measured(plain, x, dy, grad=False).errors["row"]


def test_products_that_do_not_happen_are_missing():
    layer = linear()
    assert "input gradient" not in measured(layer, seeded(8, 256), grad=False).errors["tensor"]
    layer.weight.requires_grad_(False)
    assert "weight gradient" not in measured(layer, seeded(8, 256)).errors["tensor"]


def test_a_layer_without_a_gradient_is_judged_by_its_output():
    frozen, learning = linear().requires_grad_(False), linear(128, 64, seed=1)
    x = seeded(16, 256)
    rows = what_if(nn.Sequential(frozen, learning), lambda: learning(frozen(x)).sum())
    assert rows[0].reason.endswith("no gradient reached it: judged by its output alone")
    assert set(rows[0].errors["bf16"]) == {"output"}


class Twice(nn.Module):
    def __init__(self, recompute):
        super().__init__()
        self.body, self.head, self.recompute = linear(64, 64), linear(64, 16), recompute

    def forward(self, x):
        for _ in range(2):
            x = checkpoint(self.body, x, use_reentrant=False) if self.recompute else self.body(x)
        return self.head(x).square().sum()


def test_recomputation_and_several_calls():
    x = seeded(32, 64)
    plain, again = ({row.name: row for row in what_if(m, lambda m=m: m(x))} for m in (Twice(False), Twice(True)))
    assert plain["body"].tokens == 64
    for name in ("body", "head"):
        found, expected = again[name].errors["tensor"], plain[name].errors["tensor"]
        assert found["weight gradient"] == expected["weight gradient"]
        assert found["output"].total == pytest.approx(expected["output"].total)


def test_a_run_under_autocast_is_measured_with_its_own_operands():
    model, x = nn.Sequential(linear(), linear(128, 64, seed=1)), seeded(64, 256)
    with torch.no_grad():
        model[1].weight.copy_(model[1].weight.bfloat16())

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float().square().mean()

    rows = what_if(model, run)
    assert [row.verdict for row in rows] == [PER_TENSOR] * 2
    assert rows[0].errors["bf16"]["output"].total > 1e-3
    assert rows[1].errors["bf16"]["output"].total == 0  # its input comes in bf16


def test_nothing_is_left_behind():
    model, x = nn.Sequential(linear(), linear(128, 64, seed=1)), seeded(8, 256)
    model(x).sum().backward()
    before = [(p.grad, p.grad.clone(), p.detach().clone()) for p in model.parameters()]
    what_if(model, lambda: model(x).square().sum())
    for parameter, (grad, values, weight) in zip(model.parameters(), before, strict=True):
        assert parameter.grad is grad and torch.equal(grad, values) and torch.equal(parameter, weight)
    assert not any(layer._forward_hooks for layer in model)


def test_rows_are_json():
    row = measured(linear(), seeded(8, 256))
    tree = json.loads(json.dumps(row.to_dict(), allow_nan=False))
    assert tree["verdict"] == PER_TENSOR and tree["reason"] == row.reason
    assert tree["errors"]["tensor"]["output"]["total"] == row.errors["tensor"]["output"].total
    assert "gradient fp8-e5m2 tensor" in tree["operands"]


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (lambda m, x: m(x), r"run returned a tensor of shape \(2, 16\)\nhint: return the scalar loss"),
        (lambda m, x: m(x).sum().detach(), r"run returned a tensor of shape \(\) without a gradient"),
        (lambda m, x: m(x).sum().item(), "run returned float"),
    ],
)
def test_run_must_return_a_loss(result, said):
    model = nn.Sequential(linear(32, 16))
    with pytest.raises(ConfigError, match=said):
        what_if(model, lambda: result(model, torch.ones(2, 32)))


def test_a_model_without_linears_is_refused():
    with pytest.raises(ConfigError, match="Conv2d has no linear layers"):
        what_if(nn.Conv2d(1, 1, 1), lambda: torch.zeros(()))


def test_what_is_not_finite_is_sent_to_diagnose():
    model, x = nn.Sequential(linear(32, 16)), torch.ones(2, 32)
    x[0, 0] = torch.inf
    with pytest.raises(ModelError, match=r"the input of 0 holds inf or NaN before(.|\n)*floatline diagnose"):
        what_if(model, lambda: model(x).sum())
    with pytest.raises(ModelError, match="the output gradient of 0 holds inf or NaN"):
        what_if(model, lambda: (model(torch.zeros(2, 32)) * torch.inf).sum())
    assert not model[0]._forward_hooks
