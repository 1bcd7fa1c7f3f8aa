"""What the tests of optimizer techniques share: a net with state worth quantising, steps, a trip through a file."""

import io

import torch
from torch import nn
from torch.nn import functional as F

import floatline as fl


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.Linear(64, 1))


def mse(model, batch):
    return F.mse_loss(model(batch[0]).float(), batch[1])


def data(seed):
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(seed))
    return x, x.sum(1, keepdim=True).sin()


def adamw(parameters, lr=1e-3, **settings):
    return torch.optim.AdamW(parameters, lr=lr, **settings)


def make(techniques=(), precision="32-true", max_grad_norm=1.0, optimizer=adamw, model=None, loss=mse, **settings):
    model = model or net()
    step = fl.TrainStep(
        model,
        optimizer,
        precision=precision,
        loss=loss,
        techniques=techniques,
        max_grad_norm=max_grad_norm,
        **settings,
    )
    return model, step


def train(step, batches):
    return [step(batch) for batch in batches]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def furthest(one, other):
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max((a.float() - b.float()).abs().max().item() for a, b in pairs)


def through_a_file(state):
    """As train/checkpoint.py writes and reads it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


def resumed(techniques, precision="32-true", max_grad_norm=1.0):
    """Train 3 updates, save, load into a new step, train 3 more: (uninterrupted model, resumed model)."""
    whole, step = make(techniques, precision, max_grad_norm)
    train(step, map(data, range(3)))
    saved = through_a_file({"model": whole.state_dict(), "step": step.state_dict()})
    again, second = make(techniques, precision, max_grad_norm)
    again.load_state_dict(saved["model"])
    second.load_state_dict(saved["step"])
    for each in (step, second):
        train(each, map(data, range(3, 6)))
    return whole, again
