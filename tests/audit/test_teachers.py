"""Averages of weights that the forward itself makes: a momentum encoder whose weights are cast stands still."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import floatline as fl


class Student(nn.Module):
    """BYOL, MoCo: the teacher's weights take no gradient, and go a small way to the student's in every forward."""

    def __init__(self, momentum):
        super().__init__()
        self.momentum = momentum
        self.student, self.teacher, self.head = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 16)
        for mine, other in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            mine.requires_grad_(False).copy_(1.05 * other.detach())

    def forward(self, x):
        with torch.no_grad():
            for mine, other in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                mine.mul_(self.momentum).add_(other, alpha=1 - self.momentum)
            goal = self.teacher(x)
        return (1 - F.cosine_similarity(self.head(self.student(x)), goal, dim=-1)).mean()


def audited(momentum):
    torch.manual_seed(0)
    model, x = Student(momentum), torch.randn(32, 8)
    return model, x, fl.audit(model, (x,), candidates=("bf16",), mode="true", repeats=0, probes=0)


def moved(model, x, policy):
    """Share of the teacher's way to the student that it has gone after 20 forwards, the student standing still."""
    model = copy.deepcopy(model)
    start = model.teacher.weight.clone()
    step = fl.TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.0), precision=policy)
    for _ in range(20):
        step((x,))
    way = model.student.weight.detach().double() - start.double()
    return float(((model.teacher.weight.double() - start.double()) * way).sum() / way.square().sum())


def test_a_teacher_that_stands_still_is_kept_in_fp32():
    model, x, report = audited(0.996)
    assert report.policy == "bf16-true; teacher=32"
    assert {(row.module, row.op, row.phase, row.failure) for row in report.failures} == {
        ("teacher", "weight", "buffer", "stagnation"),
        ("teacher", "bias", "buffer", "stagnation"),
    }
    assert moved(model, x, "bf16-true") < 0.02
    assert moved(model, x, report.policy) == pytest.approx(1 - 0.996**20, rel=0.1)


def test_a_teacher_that_keeps_up_is_left_alone():
    assert audited(0.5)[2].policy == "bf16-true"
