"""Code that raises in a lower format: a constant that fp16 cannot hold, a matrix that is not definite any more."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import floatline as fl
from floatline.errors import ModelError


class Masked(nn.Module):
    """`value cannot be converted to type at::Half without overflow`: -1e9 is what many models mask with."""

    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        scores = self.query(x) @ self.key(x).transpose(-1, -2)
        return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -1e9).softmax(-1) @ x


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.head = nn.ModuleList([Masked(), Masked()]), nn.Linear(8, 3)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 8)

    def forward(self, x):
        scores = self.head(x)
        return scores.masked_fill(scores.isnan(), -1e9)


class Whitened(nn.Module):
    def forward(self, x):
        x = x - x.mean(0)
        covariance = x.T @ x / len(x) + 1e-4 * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        return torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), x.T, upper=False).T


class Collapsed(nn.Module):
    """All features but for a little are one feature: rounded, the covariance has negative eigenvalues."""

    def __init__(self):
        super().__init__()
        self.body, self.white = nn.Linear(8, 4), Whitened()
        with torch.no_grad():
            self.body.weight[1:] = self.body.weight[:1] + 0.1 * self.body.weight[1:]

    def forward(self, x):
        return F.mse_loss(self.white(self.body(x)), x[:, :4])


def audited(model, x, *candidates, **settings):
    return fl.audit(model, (x,), candidates=candidates, hardware="cpu", repeats=2, probes=2, **settings)


@pytest.mark.parametrize("mode", ["mixed", "true"])
def test_modules_that_raise_are_islands_and_the_other_format_is_audited_too(mode):
    torch.manual_seed(0)
    model, x = Reader(), torch.randn(2, 6, 8)
    report = audited(model, x, "bf16", "fp16", mode=mode)
    assert report.candidates["bf16"].policy == f"bf16-{mode}"
    half = report.candidates["fp16"]
    assert half.islands == ("layers.0", "layers.1") and half.effect.ratio(report.tolerance) < 0.1
    assert not half.all_lowered.finite and "layers.0, layers.1 raises in fp16" in half.reason
    assert sum("without overflow" in advice and "test_raising.py:" in advice for advice in half.advice) == 2
    step = fl.TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.1), precision=half.policy,
                        loss=lambda model, batch: model(*batch).float().square().mean())  # fmt: skip
    assert any(step((x,)).applied for _ in range(8))  # the first ones look for the loss scale


def test_a_factorisation_that_fails():
    torch.manual_seed(0)
    report = audited(Collapsed(), torch.randn(64, 8), "bf16")
    candidate = report.candidates["bf16"]
    assert "white" in candidate.islands and candidate.effect.ratio(report.tolerance) <= 1
    assert any("positive-definite" in advice for advice in candidate.advice)


def test_what_raises_outside_of_modules_is_said():
    with pytest.raises(ModelError, match=r"raises RuntimeError under 16-true.*without overflow") as caught:
        audited(Bare(), torch.randn(2, 8), "fp16", mode="true")
    assert "a module of its own" in str(caught.value)


class OnlyFp32(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x):
        if torch.is_autocast_enabled("cpu"):
            raise AssertionError  # says nothing
        return x * self.weight


@pytest.mark.parametrize("others", [1, 2])
def test_what_raises_is_kept_high_while_others_are_lowered_alone(others):
    torch.manual_seed(0)
    model = nn.Sequential(OnlyFp32(), *(nn.Linear(8, 8) for _ in range(others)))
    report = fl.audit(model, torch.randn(4, 8), candidates=("bf16",), hardware="cpu", repeats=0)
    assert report.policy == "bf16-mixed; 0=32"
    assert "in fp32, for 0 raises in bf16: loss within" in report.verdict
    changes = [row.loss_change for row in report.modules if row.module in ("1", "2") and row.loss_change is not None]
    assert len(changes) == others and max(changes) < 0.05
