"""Written before the audit was run on any of the corpus, and not looked at while it was mended."""

import torch
from audit_corpus.cases import LARGE, Program, fault, healthy
from audit_corpus.in_range import Tail, regression, squares
from torch import nn
from torch.nn import functional as F


@fault("fp16", "true", "range", "experts.1.gate")
def gated_unit_multiplies_two_large_numbers(faulty):
    class Gate(nn.Module):
        """x W times x V, as in gated feed-forward layers."""

        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return self.left(x) * self.right(x)

    class Expert(nn.Module):
        def __init__(self, gain):
            super().__init__()
            self.gate, self.norm = Gate(), nn.LayerNorm(16)
            with torch.no_grad():
                self.gate.left.weight.mul_(gain)
                self.gate.right.weight.mul_(gain)

        def forward(self, x):
            return self.norm(self.gate(x))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Linear(8, 16)
            self.experts = nn.ModuleList([Expert(1.0), Expert(1500.0 if faulty else 1.0)])
            self.head = nn.Linear(16, 1)

        def forward(self, x):
            x = self.stem(x)
            return self.head(self.experts[0](x) + self.experts[1](x))

    return Program(Net(), regression(), squares)


@fault("fp16", "true", "range", "middle")
def softmax_without_its_maximum(faulty):
    class Weights(nn.Module):
        def forward(self, x):
            e = x.exp() if faulty else (x - x.amax(-1, keepdim=True)).exp()
            return e / e.sum(-1, keepdim=True)

    return Program(Tail(Weights(), gain=40.0), regression(), squares)


@fault("fp16", "true", "range", "depth")
def inverse_depth_of_a_far_point(faulty):
    class Depth(nn.Module):
        def forward(self, x):
            disparity = torch.sigmoid(x) * (1e-4 if faulty else 1.0)
            return (1 / (disparity * disparity)).log()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.depth, self.head = nn.Linear(8, 8), Depth(), nn.Linear(8, 1)

        def forward(self, x):
            return self.head(self.depth(self.body(x)))

    return Program(Net(), regression(), squares)


@fault("bf16", "true", "rounding", "fit")
def determinant_of_nearly_parallel_rows(faulty):
    class Fit(nn.Module):
        """Solves 2x2 least squares by the determinant."""

        def forward(self, x):
            a, b = x[..., 0] + 6, x[..., 1] + 6
            c, d = (a * (1.001 if faulty else -1.0)) + 0.02 * x[..., 2], b
            return (a * d - b * c)[..., None]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.fit, self.head = nn.Linear(8, 3), Fit(), nn.Linear(1, 1)

        def forward(self, x):
            return self.head(self.fit(self.stem(x)))

    return Program(Net(), regression()[0])


@fault("bf16", "true", "rounding", "encode", curable=False)
def fourier_features_of_high_frequency(faulty):
    class Encode(nn.Module):
        """Positional encoding of a radiance field: sin(2^k x)."""

        def forward(self, x):
            octaves = 2.0 ** torch.arange(12 if faulty else 2, device=x.device).to(x.dtype)
            angle = (x[..., None] * octaves).flatten(-2)
            return torch.cat([angle.sin(), angle.cos()], -1)

    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            self.place, self.encode, self.head = nn.Linear(3, 3), Encode(), nn.LazyLinear(1)

        def forward(self, x):
            return self.head(self.encode(self.place(x)))

    model = Field()
    model(torch.randn(2, 3))
    return Program(model, torch.randn(32, 3))


@fault("bf16", "true", "rounding", "compare")
def expm1_by_hand(faulty):
    class Compare(nn.Module):
        def forward(self, x):
            return x.exp() - 1 if faulty else torch.expm1(x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.compare, self.head = nn.Linear(8, 8), Compare(), nn.Linear(8, 1, bias=False)
            with torch.no_grad():
                self.body.weight.mul_(1e-3)
                self.body.bias.mul_(1e-3)

        def forward(self, x):
            return self.head(self.compare(self.body(x)) * 1000)

    return Program(Net(), regression()[0])


@fault("bf16", "true", "stagnation", "clock")
def time_advanced_in_a_loop(faulty):
    class Clock(nn.Module):
        """A phase that is advanced step by step."""

        def forward(self, rate):
            phase, out = torch.full_like(rate, 3.0 if faulty else 0.0), []
            for _ in range(300 if faulty else 8):
                phase = phase + rate * (0.01 if faulty else 1.0)
                out.append(phase)
            return torch.stack(out[-4:], -1)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rate, self.clock, self.head = nn.Linear(8, 4), Clock(), nn.Linear(4, 1)

        def forward(self, x):
            return self.head(self.clock(torch.sigmoid(self.rate(x))))

    return Program(Net(), regression()[0])


@fault("bf16", "true", "stagnation", "normal", "buffer", witness="buffer")
def observation_statistics_of_a_policy(faulty):
    class Normal(nn.Module):
        """Running mean by the count, as reinforcement learning normalises observations."""

        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.linspace(0.5, 1.5, 8))
            self.register_buffer("count", torch.tensor(4096.0 if faulty else 16.0), persistent=False)

        def forward(self, x):
            with torch.no_grad():
                self.mean += (x.mean(0) - self.mean) * len(x) / (self.count * 16 if faulty else self.count * 2)
            return x - self.mean

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.normal, self.head = Normal(), nn.Linear(8, 1)

        def forward(self, x):
            return self.head(self.normal(x))

    return Program(Net(), regression(), squares)


@fault("fp16", "true", "range", ("steep", "steep.fc"), "backward", witness="gradient")
def gradients_through_a_saturated_exponential(faulty):
    class Steep(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, x):
            return x + (self.fc(x) - (30 if faulty else 1)).exp()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.steep, self.head = nn.Linear(8, 16), Steep(), nn.Linear(16, 1)

        def forward(self, x):
            return self.head(self.steep(self.stem(x)))

    return Program(Net(), regression(), squares)


@fault("fp16", "true", "range", "", curable=False)
def perplexity_in_the_loss(faulty):
    def loss(model, batch):
        x, y = batch
        nll = (model(x) - y.to(model.weight.dtype)).pow(2).mean() + (12 if faulty else 1)
        return nll.exp()  # HERE

    return Program(nn.Linear(8, 1), regression(), loss)


@healthy(settings=LARGE)
def gated_recurrent_unit_reads_a_long_sequence():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru, self.head = nn.GRU(4, 16, batch_first=True, bidirectional=True), nn.Linear(32, 1)

        def forward(self, x):
            return self.head(self.gru(x)[0].mean(1))

    return Program(Reader(), (torch.randn(4, 20, 4), torch.randn(4, 1)), squares)


@healthy
def graph_network():
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.message, self.update, self.head = nn.Linear(8, 16), nn.Linear(24, 16), nn.Linear(16, 3)

        def forward(self, x, edges):
            sent = torch.relu(self.message(x))[edges[0]]
            got = torch.zeros(len(x), 16, dtype=sent.dtype, device=x.device).index_add(0, edges[1], sent)
            degree = torch.bincount(edges[1], minlength=len(x)).clamp(min=1)
            h = torch.relu(self.update(torch.cat([x, got / degree[:, None].to(got.dtype)], -1)))
            return self.head(h)

    return Program(Graph(), {"x": torch.randn(20, 8), "edges": torch.randint(0, 20, (2, 80))})


@healthy
def regression_with_a_predicted_variance():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.mean, self.spread = nn.Linear(8, 32), nn.Linear(32, 1), nn.Linear(32, 1)

        def forward(self, x, y):
            h = F.silu(self.body(x))
            mean, variance = self.mean(h).float(), F.softplus(self.spread(h).float()) + 1e-3
            return {"loss": F.gaussian_nll_loss(mean, y.float(), variance)}

    x, y = regression(32)
    return Program(Net(), {"x": x, "y": y})


@healthy
def depthwise_convolutions_with_squeeze_and_excitation():
    class Block(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.depth = nn.Conv2d(width, width, 3, padding=1, groups=width)
            self.norm, self.point = nn.BatchNorm2d(width), nn.Conv2d(width, width, 1)
            self.down, self.up = nn.Linear(width, 4), nn.Linear(4, width)

        def forward(self, x):
            h = self.point(F.hardswish(self.norm(self.depth(x))))
            weight = torch.sigmoid(self.up(F.relu(self.down(h.mean((2, 3))))))
            return x + h * weight[..., None, None]

    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), Block(16), Block(16), nn.AvgPool2d(8), nn.Flatten(), nn.Linear(16, 4)
    )
    return Program(
        model.train(),
        (torch.randn(4, 3, 8, 8), torch.randint(0, 4, (4,))),
        lambda m, b: F.cross_entropy(m(b[0]).float(), b[1]),
    )
