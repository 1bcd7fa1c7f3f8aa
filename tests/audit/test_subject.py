"""What an audit runs on: weights as at the start in every run, policies that do not run."""

import math

import pytest
import torch
from torch import nn

from floatline.audit.subject import Subject
from floatline.errors import ModelError
from floatline.hardware import resolve
from floatline.precision import Policy


class Counting(nn.Module):
    """Writes a buffer and a weight in its forward."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        with torch.no_grad():
            self.seen += 1
            self.linear.weight.mul_(1.5)
        return self.linear(x).square().mean() * self.seen


class Mixing(nn.Module):
    """Multiplies what two of its modules give: both have to be in one format."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.left(x) @ self.right(x)


def subject_of(model, batch):
    torch.manual_seed(0)
    return Subject(model, [batch], None, resolve("cpu"), True, 0)


@pytest.mark.parametrize("policy", ["32-true", "bf16-mixed", "bf16-true", "16-true"])
def test_every_run_starts_from_the_same_weights(policy):
    subject = subject_of(Counting(), torch.ones(2, 4))
    before = {name: t.clone() for name, t in subject.model.state_dict().items()}
    exact = subject.exact()
    effects = [subject.effect(Policy.parse(policy), exact) for _ in range(2)]
    assert effects[0] == effects[1]
    assert all(torch.equal(t, before[name]) for name, t in subject.model.state_dict().items())


def test_cast_weights_get_their_bits_back_wherever_they_lie():
    """The allocator often gives a tensor that is cast back the memory that it had: its address had said "untouched"."""
    for seed in range(20):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(8 + seed % 5, 16), nn.Tanh(), nn.Linear(16, 4))
        subject = subject_of(model, torch.ones(4, 8 + seed % 5))
        exact = subject.exact()
        for _ in range(3):
            subject.effect(Policy.parse("bf16-true"), exact)
        state = model.state_dict()
        assert all(torch.equal(t, state[name]) for name, t in subject.model.state_dict().items())


def test_islands_that_do_not_run_are_as_wrong_as_can_be_and_are_noted():
    class Same(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return torch.mm(self.left.weight, self.right.weight).sum() + self.left(x).sum() + self.right(x).sum()

    subject = subject_of(Same(), torch.ones(4, 4))
    exact = subject.exact()
    for _ in range(2):
        effect = subject.effect(Policy.parse("bf16-true; left=32"), exact)
    assert effect.loss_error == math.inf and not effect.finite
    assert len([note for note in subject.notes if note.startswith("some islands do not run, and were not taken")]) == 1


def test_a_format_that_does_not_run_without_islands_is_an_error():
    class Stubborn(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(x) @ torch.eye(4)

    subject = subject_of(Stubborn(), torch.ones(2, 4))
    exact = subject.exact()
    with pytest.raises(ModelError, match=r"raises RuntimeError under bf16-true at .*dtype"):
        subject.effect(Policy.parse("bf16-true"), exact)
    assert subject.effect(Policy.parse("bf16-true; linear=32"), exact).loss_error == math.inf
