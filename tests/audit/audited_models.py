"""Small models for `floatline audit`: one that is safe, one that loses a sum, one that no format saves."""

import torch
from torch import nn

import floatline as fl


class Healthy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


class RunningSum(nn.Module):
    def forward(self, x):
        return x.cumsum(1)


class Counting(nn.Module):
    """Adds up a thousand steps of nearly one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.count, self.down = nn.Linear(1, 2), RunningSum(), nn.Linear(2, 1)
        nn.init.constant_(self.up.bias, 1.0)

    def forward(self, x):
        return self.down(self.count(self.up(x)) / 1000)


class Overflowing(nn.Module):
    """Overflows fp16 outside of all modules."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return (self.inner(x).half() * 1e5).float() if torch.is_autocast_enabled("cpu") else self.inner(x) * 1e5


def squared(model, batch):
    return model(*batch).square().mean()


def healthy(batch: int = 4):
    return Healthy(), (torch.randn(batch, 8, generator=torch.Generator().manual_seed(1)),), squared


def counting():
    return Counting(), (torch.rand(2, 1000, 1, generator=torch.Generator().manual_seed(1)),), squared


def overflowing():
    return Overflowing(), (torch.ones(2, 4),), squared


def own_optimizer():
    model, batch, loss = healthy()
    return fl.Workload(lambda: model, batch, loss, lambda parameters: torch.optim.SGD(parameters, lr=1e-12))


class Noisy(Healthy):
    def forward(self, x):
        print("a line of the model's own")
        return super().forward(x)


def noisy():
    return Noisy(), torch.ones(4, 8)


def no_factory():
    return fl.Workload(model=lambda: 1 / 0, batch=lambda: torch.ones(4, 8))
