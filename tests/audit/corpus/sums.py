"""Sums that stand still."""

import torch
from audit_corpus.cases import Program, fault
from audit_corpus.in_range import Tail, squares
from torch import nn


@fault("bf16", "true", "stagnation", "middle", witness="later")
def cumulative_sum_over_ten_thousand(faulty):
    class Progress(nn.Module):
        def forward(self, x):
            total = x.abs().cumsum(1)
            return total / total[:, -1:]

    return Program(Tail(Progress(), inner=4), torch.randn(1, 10_000 if faulty else 40, 8))


@fault("bf16", "true", "stagnation", "histogram", witness="later")
def histogram_counts_above_256(faulty):
    class Histogram(nn.Module):
        def forward(self, ids, like):
            ones = torch.ones(ids.numel(), dtype=like.dtype, device=ids.device)
            counts = torch.zeros(8, dtype=like.dtype, device=ids.device).scatter_add(0, ids.flatten(), ones)
            return counts / counts.sum()

    class Colours(nn.Module):
        def __init__(self):
            super().__init__()
            self.histogram, self.head = Histogram(), nn.Linear(8, 4)

        def forward(self, ids):
            return self.head(self.histogram(ids, self.head.weight))

    skewed = torch.randint(0, 8, (3000 if faulty else 300,)).clamp(min=3)
    return Program(Colours(), skewed)


@fault("bf16", "true", "stagnation", "counter")
def counting_in_a_loop(faulty):
    class Counter(nn.Module):
        def forward(self, active):
            count = torch.zeros(active.shape[0], dtype=active.dtype, device=active.device)
            for step in active.unbind(1):
                count = count + step
            return count / active.shape[1]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.counter, self.head = Counter(), nn.Linear(4, 1)

        def forward(self, active):
            return self.head(self.counter(active))

    return Program(Net(), (torch.rand(4, 500 if faulty else 40) < 0.98).float())


@fault("bf16", "true", "stagnation", "welford")
def running_mean_in_a_loop(faulty):
    class Welford(nn.Module):
        def forward(self, x):
            mean = x[:, 0]
            for n in range(1, x.shape[1]):
                mean = mean + (x[:, n] - mean) / (n + 1)
            return mean

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.welford, self.head = nn.Linear(4, 4), Welford(), nn.Linear(4, 1)

        def forward(self, x):
            return self.head(self.welford(self.stem(x)))

    length = 600 if faulty else 30
    ramp = torch.cat([torch.full((length // 3,), 8.0), torch.full((length - length // 3,), 7.0)])
    return Program(Net(), (ramp[None, :, None] + 0.1 * torch.randn(2, length, 4), torch.randn(2, 1)), squares)


@fault("bf16", "true", "stagnation", "integrate")
def small_steps_of_an_integrator(faulty):
    class Euler(nn.Module):
        """dh/dt = tanh(W x) - h/10 in many small steps."""

        def __init__(self):
            super().__init__()
            self.rate = nn.Linear(4, 4)

        def forward(self, x):
            drive, h = torch.tanh(self.rate(x)), torch.ones_like(x)
            steps = 400 if faulty else 10
            for _ in range(steps):
                h = h + (drive - h / 10) / (4 * steps)
            return h

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.integrate, self.head = Euler(), nn.Linear(4, 1)

        def forward(self, x):
            return self.head(self.integrate(x))

    return Program(Net(), torch.randn(8, 4))


@fault("bf16", "true", "stagnation", "pool", witness="later")
def index_add_of_many_nodes(faulty):
    class Pool(nn.Module):
        """Sum of node features over each graph."""

        def forward(self, x, graph, graphs):
            out = torch.zeros(graphs, x.shape[-1], dtype=x.dtype, device=x.device)
            return out.index_add(0, graph, x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.node, self.pool, self.head = nn.Linear(4, 8), Pool(), nn.Linear(8, 1)

        def forward(self, x, graph):
            return self.head(self.pool(torch.sigmoid(self.node(x)), graph, 2) / x.shape[0])

    nodes = 3000 if faulty else 60
    return Program(Net(), (torch.randn(nodes, 4), torch.arange(nodes) % 2))
