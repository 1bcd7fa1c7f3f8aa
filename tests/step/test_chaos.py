"""Chaos: NaN in data, weights, gradients, buffers and the loss scale, at random steps, several at once.

After every step the weights, moments and buffers are finite, no run hangs, and each fault that was put in is reported.
"""

import random

import pytest
import torch
from torch import nn

import floatline as fl

NAN, INF = float("nan"), float("inf")
PRECISIONS = ["32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true"]
STEPS = 14
KINDS = ("data", "one micro-batch", "weight", "gradient", "buffer", "loss scale")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.GELU(), nn.Dropout(0.1))
        self.embed = nn.Embedding(5, 12)
        self.head = nn.Linear(12, 1)

    def forward(self, x, ids):
        return self.head(self.body(x) + self.embed(ids).to(x.dtype))


def make(seed, precision, optimizer):
    torch.manual_seed(seed)
    model = Net()
    return fl.TrainStep(
        model,
        optimizer(model.parameters(), lr=0.01),
        precision,
        loss=lambda m, b: m(**b).float().square().mean(),
        guard=fl.Guard(on_fault="rollback", snapshot_every=3, max_rollbacks=50, max_faults_in_a_row=50, sample_every=4),
    )


def batch_of(step):
    kind = step.policy.base.weights
    x = torch.randn(8, 6).to({"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[kind])
    return [{"x": x[:4], "ids": torch.randint(5, (4,))}, {"x": x[4:], "ids": torch.randint(5, (4,))}]


def spoil(kind, step, batch, chance):
    """Put a fault in; says whether this run can have it."""
    value = chance.choice([NAN, INF, -INF])
    if kind == "data":
        for part in batch:
            part["x"][chance.randrange(4), chance.randrange(6)] = value
    elif kind == "one micro-batch":
        batch[chance.randrange(2)]["x"][0, 0] = value
    elif kind == "weight":
        with torch.no_grad():
            weight = step.model.body[0].weight
            weight[chance.randrange(12), chance.randrange(6)] = NAN
    elif kind == "gradient":
        parameter = step.model.head.weight
        handle = parameter.register_hook(lambda gradient: handle.remove() or torch.full_like(gradient, value))
    elif kind == "buffer":
        step.model.body[1].running_mean[chance.randrange(12)] = value
    elif kind == "loss scale":
        if step.scaling.tensor() is None:
            return False
        step.scaling.tensor().fill_(value)
    return True


def all_finite(step):
    moments = [v for state in step.optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    tensors = [*step.model.parameters(), *step.model.buffers(), *moments, *step.masters.state()]
    return all(bool(t.isfinite().all()) for t in tensors if t.is_floating_point())


def one_run(seed):
    chance = random.Random(seed)
    precision = chance.choice(PRECISIONS)
    optimizer = chance.choice([torch.optim.AdamW, torch.optim.SGD, torch.optim.Adam])
    step = make(seed, precision, optimizer)
    ticks = set(chance.sample(range(1, STEPS), chance.randint(1, 4)))
    for tick in range(STEPS):
        batch = batch_of(step)
        put_in = []
        if tick in ticks:
            kinds = chance.sample(KINDS, chance.choice([1, 1, 1, 2, 3]))
            put_in = [kind for kind in kinds if spoil(kind, step, batch, chance)]
        before = step.sentinel.noted
        step(batch)
        assert all_finite(step), (seed, precision, tick, put_in)
        if put_in:
            assert step.sentinel.noted > before, (seed, precision, tick, put_in)
    assert step.updates > 0 or step.rollback.total


@pytest.mark.parametrize("seed", range(20))
def test_a_short_run(seed):
    one_run(seed)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(20, 220))
def test_a_short_run_of_many(seed):
    one_run(seed)
