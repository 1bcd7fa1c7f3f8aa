"""What a user's model, loss or optimizer raises is one error, with its line and what to do."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import floatline as fl
from floatline.audit.user_code import user_code
from floatline.errors import ConfigError, ModelError
from floatline.report.audit_page import audit_html
from floatline.report.audit_text import audit_text

X = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))


class Raises(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ValueError("no derivative")


class OnlyFp32(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        if x.dtype != torch.float32:
            raise TypeError("a kernel for fp32 alone")
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Net(nn.Module):
    def __init__(self, middle):
        super().__init__()
        self.first, self.last, self.middle = nn.Linear(16, 16), nn.Linear(16, 4), middle

    def forward(self, x):
        return self.last(self.middle(self.first(x)))


def leave(x):
    raise SystemExit(5)


def in_numpy(x):
    return x + torch.from_numpy(np.tanh(x.detach().numpy()))


def fp32_expected(x):
    assert x.dtype == torch.float32, "fp32 is expected"
    return x


@pytest.mark.parametrize(
    ("middle", "said"),
    [
        (Raises.apply, r"raises ValueError in fp32 at test_user_code.py:\d+ \(raise Val.*\): no derivative\nhint: run"),
        (leave, r"raises SystemExit in fp32 at test_user_code.py:\d+ .*: 5\nhint: run"),
        (
            OnlyFp32.apply,
            "raises TypeError under bf16-mixed at .*: a kernel for fp32 alone\nhint: compute in",
        ),
        (in_numpy, r"raises TypeError under bf16-mixed at .*in_numpy|np\.tanh.*: Got unsupported ScalarType BFloat16"),
        (fp32_expected, r"raises AssertionError under bf16-mixed at .*: fp32 is expected\nhint: compute in fp32 there"),
    ],
)
def test_a_model_that_raises(middle, said):
    model = Net(middle)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ModelError, match=said):
        fl.audit(model, X, candidates=("bf16",), hardware="l4", repeats=0, probes=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model._forward_pre_hooks and "forward" not in vars(model)


def test_a_format_in_which_the_model_raises_does_not_cost_the_others():
    report = fl.audit(Net(in_numpy), X, candidates=("bf16", "fp16"), hardware="l4", repeats=0, probes=0)
    assert report.policy == "16-mixed" and list(report.candidates) == ["bf16", "fp16"]
    assert "bf16-mixed does not run: the model or its loss raises TypeError" in report.verdict
    raised = report.candidates["bf16"]
    assert raised.policy is None and not raised.trials and not raised.all_lowered.finite
    assert "bf16-mixed does not run" in audit_text(report).replace("\n", " ")
    assert "does not run" in audit_html(report) and json.loads(json.dumps(report.as_dict()))["policy"] == "16-mixed"


def test_an_optimizer_that_raises():
    with pytest.raises(ModelError, match=r"the optimizer factory raises ZeroDivisionError .*division by zero\nhint: "):
        fl.audit(nn.Linear(16, 4), X, candidates=("bf16",), optimizer=lambda p: 1 / 0, repeats=0, probes=0)


def test_a_loss_that_cannot_be_called():
    with pytest.raises(ConfigError, match=r"loss='mse'\nhint: pass a function"):
        fl.audit(nn.Linear(16, 4), X, "mse")


def test_one_line_is_told_of_many():
    with (
        pytest.raises(ModelError, match=r"it raises RuntimeError in fp32.*: one\nhint: look$"),
        user_code("it", "in fp32", "look"),
    ):
        raise RuntimeError("one\ntwo")


def test_no_memory_is_told_as_such():
    said = r"it runs out of memory in fp32: .*\nhint: take a smaller batch"
    with pytest.raises(ModelError, match=said), user_code("it", "in fp32", "look"):
        torch.empty(2**60)
