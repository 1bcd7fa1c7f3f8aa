"""Running averages and weights that stop moving."""

import torch
from audit_corpus.cases import Program, fault
from audit_corpus.in_range import regression, squares
from torch import nn


@fault("bf16", "true", "stagnation", "centre", "buffer", witness="buffer")
def running_average_with_a_slow_momentum(faulty):
    class Centre(nn.Module):
        """The centre of a teacher's outputs."""

        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.linspace(1, 2, 8))

        def forward(self, x):
            with torch.no_grad():
                keep = 0.999 if faulty else 0.5
                self.mean.mul_(keep).add_(x.mean(0) * (1 - keep))
            return x - self.mean

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.centre, self.head = nn.Linear(8, 8), Centre(), nn.Linear(8, 1)

        def forward(self, x):
            return self.head(self.centre(self.stem(x)))

    return Program(Net(), regression(), squares)


@fault("bf16", "true", "stagnation", "quantise", "buffer", witness="buffer")
def cluster_sizes_of_a_codebook(faulty):
    class Quantise(nn.Module):
        """Vector quantisation; how often each code is used is an EMA."""

        def __init__(self):
            super().__init__()
            self.codes = nn.Parameter(torch.randn(4, 8))
            self.register_buffer("used", torch.tensor([60.0, 70.0, 50.0, 80.0]) if faulty else torch.zeros(4))

        def forward(self, x):
            nearest = (x[:, None] - self.codes).pow(2).sum(-1).argmin(-1)
            with torch.no_grad():
                counts = torch.bincount(nearest, minlength=4).to(self.used.dtype)
                keep = 0.999 if faulty else 0.5
                self.used.lerp_(counts, 1 - keep)
            return x + (self.codes[nearest] - x).detach() + self.codes.mean(0) * self.used.sum() * 1e-3

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.quantise, self.head = nn.Linear(8, 8), Quantise(), nn.Linear(8, 1)

        def forward(self, x):
            return self.head(self.quantise(self.stem(x)))

    return Program(Net(), regression(250), squares)


@fault("bf16", "true", "stagnation", "schedule", "buffer", witness="buffer")
def step_counter_kept_as_a_float(faulty):
    class Schedule(nn.Module):
        """Warms a gate up over the updates."""

        def __init__(self):
            super().__init__()
            self.register_buffer("steps", torch.full((1,), 512.0 if faulty else 16.0))

        def forward(self, x):
            self.steps += 1
            return x * (self.steps / 1000).clamp(max=1.0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.schedule, self.head = nn.Linear(8, 8), Schedule(), nn.Linear(8, 1)

        def forward(self, x):
            return self.head(self.schedule(self.stem(x)))

    return Program(Net(), regression(), squares)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 1)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


@fault("bf16", "true", "stagnation", ("up", "down"), "optimizer", witness="later")
def adamw_with_a_tiny_learning_rate(faulty):
    slow = lambda p: torch.optim.AdamW(p, lr=1e-6)  # noqa: E731
    fast = lambda p: torch.optim.SGD(p, lr=0.5)  # noqa: E731
    return Program(Mlp(), regression(), squares, optimizer=slow if faulty else fast)


@fault("bf16", "true", "stagnation", ("up", "down"), "optimizer", witness="later")
def plain_sgd_late_in_its_schedule(faulty):
    return Program(Mlp(), regression(), squares, optimizer=lambda p: torch.optim.SGD(p, lr=1e-5 if faulty else 0.5))
