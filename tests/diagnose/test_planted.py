"""Faults planted at random places: in chains of ordinary modules, and in the weights of transformers models."""

import math
import random

import pytest
import torch
from corpus import models
from corpus.half import autocast
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import floatline as fl


class Op(nn.Module):
    """A module that is one function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def attend(x):
    mask = torch.full((3, 3), -math.inf).triu(1)
    return (x @ x.T + mask).softmax(-1) @ x


def in_parts(x):
    out = torch.empty_like(x)
    out[:, :2], out[:, 2:] = x[:, 2:], x[:, :2]
    return out


HARMLESS = {
    "tanh": torch.tanh,
    "scale": lambda x: x * 1.5 - 0.25,
    "flip": lambda x: torch.cat([x[:, 2:], x[:, :2]], dim=1).flip(0),
    "parts": in_parts,
    "attend": attend,
    "residual": lambda x: x + torch.sin(x),
    "hidden": lambda x: torch.where(x.detach() > 1e9, (x.detach() - 1e9).log(), x),
    "filled": lambda x: x.masked_fill(torch.eye(3, 4).bool(), -math.inf).tanh() + x,
    "in place": lambda x: x.clone().mul_(0.5).add_(0.1),
    "double": lambda x: x.double().float(),
    "norm": lambda x: nn.functional.layer_norm(x, (4,)),
}
FORWARD = {
    "sqrt": lambda x: torch.sqrt(-x.abs() - 1),
    "log": lambda x: torch.log(-x.abs() - 1),
    "acos": lambda x: torch.acos(x.abs() + 1.5),
    "div": lambda x: (x * 0) / (x * 0),
    "pow": lambda x: (-x.abs() - 1) ** 0.5,
    "_softmax": lambda x: x.masked_fill(torch.ones_like(x).bool(), -math.inf).softmax(-1),
}
BACKWARD = {
    "sqrt": lambda x: x + torch.where(x > 1e9, (x * 0).sqrt(), 0.0),
    "log": lambda x: x + torch.where(x > 1e9, (x * 0).log(), 0.0),
    "div": lambda x: x + torch.where(x > 1e9, x / (x * 0), 0.0),
    "asin": lambda x: x + torch.where(x > 1e9, torch.asin(x * 0 + 1), 0.0),
    "exp": lambda x: x + torch.where(x > 1e9, torch.exp(x * 0 + 1e3), 0.0),
}
steps = st.lists(st.sampled_from(sorted(HARMLESS)), max_size=5)


def program(before, fault, after, bad):
    functions = [HARMLESS[name] for name in before] + ([bad[fault]] if fault else []) + [HARMLESS[n] for n in after]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), *map(Op, functions))
    x = torch.randn(3, 4)
    return lambda: model(x).square().mean(), model


@settings(max_examples=40, deadline=None)
@given(steps, st.sampled_from(sorted(FORWARD)), steps)
def test_in_the_forward_of_a_chain(before, fault, after):
    finding = fl.diagnose(*program(before, fault, after, FORWARD), cures=False)
    assert (finding.phase, finding.op, finding.module) == ("forward", fault, str(len(before) + 1))


@settings(max_examples=40, deadline=None)
@given(steps, st.sampled_from(sorted(BACKWARD)), steps)
def test_in_the_backward_of_a_chain(before, fault, after):
    finding = fl.diagnose(*program(before, fault, after, BACKWARD), cures=False)
    assert (finding.phase, finding.op, finding.module) == ("backward", fault, str(len(before) + 1))


@settings(max_examples=40, deadline=None)
@given(steps)
def test_a_chain_without_a_fault_has_none(before):
    forward, model = program(before, None, [], {})
    assert fl.diagnose(forward, model, torch.optim.Adam(model.parameters())) is None


BATCHES = {
    "llama": models.text,
    "qwen3": models.text,
    "gpt2": models.text,
    "t5": models.text,
    "bert": lambda: {**models.text(), "labels": torch.tensor([0, 1, 0])},
    "vit": lambda: {"pixel_values": torch.randn(3, 3, 16, 16), "labels": torch.tensor([0, 1, 0])},
    "qwen3_vl": models.pictures,
}


@pytest.fixture(scope="module", params=BATCHES)
def planted(request):
    """(model, batch, random choice) of each architecture."""
    torch.manual_seed(0)
    model = getattr(models, request.param)().eval()
    return model, BATCHES[request.param](), random.Random(0)


def test_in_a_parameter_of_a_model(planted):
    model, batch, choose = planted
    for name, parameter in choose.sample(list(model.named_parameters()), 4):
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(-1)[choose.randrange(parameter.numel())] = math.nan
        finding = fl.diagnose(lambda: model(**batch).loss, model)
        assert (finding.phase, finding.tensor) == ("parameter", name)
        with torch.no_grad():
            parameter.copy_(before)
    assert fl.diagnose(lambda: model(**batch).loss, model) is None


def test_in_a_layer_that_leaves_fp16(planted):
    model, batch, choose = planted

    def forward():
        with autocast(torch.float16):
            return model(**batch).loss

    layers = {name: module for name, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D")}
    placed = 0
    for name in choose.sample(sorted(layers), min(4, len(layers))):
        before = layers[name].weight.detach().clone()
        overflowed = []
        hook = layers[name].register_forward_hook(lambda *a: overflowed.append(not a[2].isfinite().all()))  # noqa: B023
        with torch.no_grad():
            layers[name].weight.copy_(6e4 * before.sign())
            forward()
        hook.remove()
        finding = fl.diagnose(forward, model, cures=False)
        if any(overflowed) and finding is not None:
            assert (finding.module, finding.cause_name) == (name, "overflow")
            placed += 1
        with torch.no_grad():
            layers[name].weight.copy_(before)
    assert placed


def test_in_a_sample_of_the_batch(planted):
    model, batch, _ = planted
    pixels = batch.get("pixel_values")
    if pixels is None:
        pytest.skip("ids cannot be NaN")
    bad = {**batch, "pixel_values": pixels.clone()}
    bad["pixel_values"][1, 0] = math.nan
    finding = fl.diagnose(lambda: model(**bad).loss, model)
    assert (finding.phase, finding.tensor, finding.samples) == ("input", "pixel_values", (1,))
