"""What crosses the borders of modules: formats of inputs, errors of their gradients; inputs that are rounded."""

import torch
from torch import nn

import floatline as fl
from floatline.audit.metered import borders_watched, inputs_rounded
from floatline.observe.error import metering


class Steep(nn.Module):
    """Its derivative at the bf16 value is not that at the exact one."""

    def forward(self, x):
        return torch.sin(x * 300)


def test_input_gradients_are_held_against_the_exact_ones():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), Steep(), nn.Linear(8, 1))
    with metering(model) as meter, borders_watched(model, meter) as borders:
        meter.enter("forward")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(torch.randn(16, 8)).float().square().mean()
        meter.enter("backward")
        loss.backward()
    assert borders.half_inputs == {"1", "2"}
    assert borders.input_gradients["1"] > 0.1 and "0" not in borders.input_gradients  # the batch takes no gradient
    assert borders.input_gradients["2"] < 1.5


def test_watching_is_no_part_of_the_step():
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    x = torch.randn(4, 8, requires_grad=True)
    with metering(model) as meter, borders_watched(model, meter):
        meter.enter("forward")
        out = model(x.bfloat16().float())
        meter.enter("backward")
        out.sum().backward()
    assert {r.ran for r in meter.readings if r.phase == "backward"} <= {"_to_copy"}
    assert not model._forward_pre_hooks


def test_rounded_inputs_nested_and_by_keyword():
    seen = {}

    class Takes(nn.Module):
        def forward(self, a, b=None, *, c=None):
            seen.update(a=a[0].dtype, b=b["x"].dtype, c=c.dtype)

    module = Takes()
    with inputs_rounded(module, torch.float16):
        module([torch.ones(2)], b={"x": torch.ones(2)}, c=torch.tensor([1, 2]))
    assert seen == {"a": torch.float16, "b": torch.float16, "c": torch.int64}
    module([torch.ones(2)], b={"x": torch.ones(2)}, c=torch.ones(2))
    assert seen["a"] == torch.float32


class Variance(nn.Module):
    def forward(self, x):
        return x / ((x * x).mean(-1, keepdim=True) - x.mean(-1, keepdim=True) ** 2).clamp(min=1e-3).sqrt()


def test_a_module_that_computes_in_what_it_is_given_shows_when_it_alone_is_lowered():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), Variance(), nn.Linear(8, 1))
    with torch.no_grad():
        model[0].bias += 50
    loss = lambda model, x: model(x).square().mean()  # noqa: E731
    report = fl.audit(model, torch.randn(16, 8), loss, ("bf16",), hardware="cpu", repeats=0, probes=None)
    rows = {row.module: row for row in report.modules}
    assert rows["1"].gradient_change > 1 > rows["2"].gradient_change
    assert rows["1"].input_gradient is not None and rows["2"].weight_gradient is not None
