"""Failures that people report of half precision, each in a small model, and healthy models that look like them.

Every fault was measured without the audit, in fp64 beside the lower format: it is out of the tolerance, and within it
once the named modules compute in fp32.
"""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import floatline as fl


class Chain(nn.Module):
    """A body, a part under test, a head; the loss is the output's mean square."""

    def __init__(self, part, width, features=16):
        super().__init__()
        self.body, self.part, self.head = nn.Linear(8, features), part, nn.Linear(width, 3)

    def forward(self, *x):
        return self.head(self.part(self.body(x[0]), *x[1:])).float().square().mean()


class Similar(nn.Module):
    """F.normalize of padding: eps=1e-12 is zero in half, and 0 / 0 is NaN."""

    def forward(self, x, keep):
        x = F.normalize(x * keep.to(x.dtype), dim=-1)
        return x @ x.transpose(-1, -2)


class Confident(nn.Module):
    """Cross entropy by hand: the sigmoid of a confident model is 1 in bf16."""

    def forward(self, x):
        return torch.log(1 - torch.sigmoid(x + 7) + 1e-8)


class Grid(nn.Module):
    """A hash grid: the cell of a coordinate that has eight bits."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(1025, 16))

    def forward(self, x, pixel):
        place = pixel.to(x.dtype) / 4
        return x + self.table[place.long()]


class Counted(nn.Module):
    """A mean over tokens with the mask in half: 70 000 are infinite, and the loss is 0."""

    def forward(self, x):
        mask = torch.ones(70_000, dtype=x.dtype)
        return x * 1e4 / mask.sum()


class Twins(nn.Module):
    """Contrastive logits of embeddings that share a direction, at CLIP's largest scale of 100."""

    def forward(self, x):
        cone = F.normalize(x + 4 * torch.ones_like(x), dim=-1)
        return (100 * (cone @ cone.T)).softmax(-1)


class Noisy(nn.Module):
    """The reparameterisation draws in the format of its input, other numbers in each."""

    def forward(self, x):
        mean, log = x.chunk(2, -1)
        return mean + torch.randn_like(mean) * (0.5 * log).exp()


class Pooled(nn.Module):
    """Maxima of near values are another element's now and then."""

    def forward(self, x):
        return F.max_pool1d(F.relu(x), 4)


class Experts(nn.Module):
    """The sum over experts adds zeros for those that were not chosen."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(16, 16, bias=False)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(16))
        with torch.no_grad():
            self.gate.weight.mul_(8)

    def forward(self, x):
        weight, chosen = self.gate(x).float().softmax(-1).topk(2, -1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            out = out + expert(x) * (weight * (chosen == number)).sum(-1, keepdim=True).to(x.dtype)
        return out


class Accuracy(nn.Module):
    """A metric beside the step: its maxima come out otherwise, and nothing hangs on them."""

    def forward(self, x):
        self.share = ((x * 1e-3 + 1).argmax(-1) == 0).float().mean()
        return x


class Recomputed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x):
        return x + checkpoint(self.inner, x, use_reentrant=False)


def keep():
    return (torch.arange(12) < 9)[:, None]


FAULTS = {
    "padding": (lambda: (Chain(Similar(), 12), torch.randn(8, 12, 8), keep()), "fp16", "mixed", "range"),
    "confident": (lambda: (Chain(Confident(), 16), torch.randn(64, 8)), "bf16", "mixed", "rounding"),
    "grid": (lambda: (Chain(Grid(), 16), torch.randn(99, 8), torch.randint(4096, (99,))), "bf16", "true", "rounding"),
    "count": (lambda: (Chain(Counted(), 16), torch.randn(64, 8)), "fp16", "mixed", "range"),
    "twins": (lambda: (Chain(Twins(), 64), torch.randn(64, 8)), "bf16", "mixed", "rounding"),
}
HEALTHY = {
    "noise": (Noisy, 8),
    "pool": (Pooled, 4),
    "experts": (Experts, 16),
    "metric": (Accuracy, 16),
    "checkpoint": (Recomputed, 16),
}


def audited(build, fmt, mode):
    torch.manual_seed(0)
    model, *batch = build()
    report = fl.audit(model, tuple(batch), candidates=(fmt,), mode=mode, hardware="cpu", repeats=0, probes=0)
    return report, report.candidates[fmt]


@pytest.mark.parametrize("build, fmt, mode, failure", FAULTS.values(), ids=FAULTS)
def test_the_fault_is_named_and_cured(build, fmt, mode, failure):
    report, candidate = audited(build, fmt, mode)
    assert ("part", failure) in {(row.module, row.failure) for row in report.failures}, report
    assert "part" in candidate.islands and candidate.all_lowered.ratio(report.tolerance) > 1
    assert candidate.effect.ratio(report.tolerance) < 0.8


@pytest.mark.parametrize("fmt", ["bf16", "fp16"])
@pytest.mark.parametrize("part, width", HEALTHY.values(), ids=HEALTHY)
def test_nothing_is_asked_of_what_is_healthy(part, width, fmt):
    report, candidate = audited(lambda: (Chain(part(), width), torch.randn(64, 8)), fmt, "mixed")
    assert (candidate.policy, report.failures) == (candidate.base, ()), report
    assert math.isfinite(candidate.all_lowered.gradient_error)


def test_decisions_of_a_metric_are_told_and_need_nothing():
    report, candidate = audited(lambda: (Chain(Accuracy(), 16), torch.randn(64, 8)), "bf16", "mixed")
    row = next(row for row in report.rows if row.op == "argmax")
    assert row.failure is None and row.flipped > 0 and "the same to the bit" in row.why
    assert candidate.islands == () and len(candidate.trials) <= 2
