"""Bits that are not there: differences of large numbers, positions beyond 256, thresholds, numbers near 1."""

import torch
from audit_corpus.cases import Program, fault
from audit_corpus.in_range import Tail, regression, squares
from torch import nn
from torch.nn import functional as F


@fault("bf16", "mixed", "rounding", ("middle", "stem"))
def layer_norm_on_a_large_mean(faulty):
    return Program(Tail(nn.LayerNorm(16), gain=1.0, bias=1000.0 if faulty else 0.0), regression(), squares)


@fault("bf16", "true", "rounding", "middle")
def variance_as_a_difference_of_squares(faulty):
    class Whiten(nn.Module):
        def forward(self, x):
            mean = x.mean(-1, keepdim=True)
            spread = (x * x).mean(-1, keepdim=True) - mean * mean if faulty else x.var(-1, keepdim=True)
            return (x - mean) / (spread.abs() + 1e-3).sqrt()

    return Program(Tail(Whiten(), gain=12.0, bias=60.0 if faulty else 0.0), regression(), squares)


@fault("bf16", "true", "rounding", "rotary")
def rotary_table_at_position_5000(faulty):
    class Rotary(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.register_buffer("frequencies", 100.0 ** -(torch.arange(0, width, 2) / width))

        def forward(self, x, positions):
            angle = positions.to(self.frequencies.dtype)[..., None] * self.frequencies
            cos, sin = angle.cos(), angle.sin()
            a, b = x.chunk(2, -1)
            return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.rotary, self.head = nn.Embedding(32, 16), Rotary(16), nn.Linear(16, 1)

        def forward(self, ids, positions):
            return self.head(self.rotary(self.embed(ids), positions))

    start = 5000 if faulty else 0
    return Program(Net(), (torch.randint(0, 32, (4, 16)), torch.arange(start, start + 16).expand(4, 16)))


@fault("bf16", "true", "rounding", "time")
def time_embedding_of_a_diffusion_model(faulty):
    class Time(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("frequencies", torch.exp(-torch.linspace(0, 6, 8)))
            self.fc = nn.Linear(16, 16)

        def forward(self, t):
            angle = t.to(self.fc.weight.dtype)[:, None] * self.frequencies.to(self.fc.weight.dtype)
            return self.fc(torch.cat([angle.sin(), angle.cos()], -1))

    class Denoiser(nn.Module):
        def __init__(self):
            super().__init__()
            self.time, self.body, self.head = Time(), nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x, t):
            return self.head(F.silu(self.body(x) + 4 * self.time(t)))

    t = torch.randint(600, 1000, (16,)) if faulty else torch.randint(0, 4, (16,))
    return Program(Denoiser(), (torch.randn(16, 8), t))


@fault("bf16", "true", "rounding", "gate", witness="later")
def threshold_on_scores_near_it(faulty):
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.score = nn.Linear(8, 1, bias=False)
            with torch.no_grad():
                self.score.weight.fill_(0.002 if faulty else 0.5)

        def forward(self, x):
            keep = torch.sigmoid(self.score(x)) > 0.5006
            return x * keep

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.gate, self.head = nn.Linear(8, 8), Gate(), nn.Linear(8, 1)

        def forward(self, x):
            return self.head(self.gate(self.stem(x)))

    return Program(Net(), regression(256), squares)


@fault("bf16", "true", "rounding", "middle")
def softplus_by_hand(faulty):
    class Softplus(nn.Module):
        def forward(self, x):
            return F.softplus(x) if not faulty else (1 + x.exp()).log()

    return Program(Tail(Softplus(), bias=-7.0), regression()[0])


@fault("bf16", "true", "rounding", "middle")
def one_minus_a_saturated_sigmoid(faulty):
    class Survival(nn.Module):
        def forward(self, x):
            return 1 - torch.sigmoid(x) if faulty else torch.sigmoid(-x)

    return Program(Tail(Survival(), bias=7.0), regression()[0])


@fault("bf16", "mixed", "rounding", "distance")
def distances_by_the_expanded_square(faulty):
    class Distance(nn.Module):
        def forward(self, a, b):
            if not faulty:
                return (a[:, None] - b[None]).pow(2).sum(-1)
            cross = a @ b.T
            return (a * a).sum(-1)[:, None] + (b * b).sum(-1)[None] - 2 * cross

    class Codes(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode, self.distance = nn.Linear(8, 16), Distance()
            self.codes = nn.Parameter(5 + 0.3 * torch.randn(12, 16))

        def forward(self, x):
            return torch.softmax(-self.distance(5 + 0.3 * self.encode(x).to(self.codes.dtype), self.codes), -1)[:, :1]

    return Program(Codes(), regression()[0])


@fault("bf16", "true", "rounding", "physics")
def velocity_as_a_difference_of_positions(faulty):
    class Physics(nn.Module):
        def __init__(self):
            super().__init__()
            self.step = nn.Linear(8, 4)

        def forward(self, x):
            place = self.step(x).cumsum(0) * 0.01 + (300.0 if faulty else 0.0)
            return place[1:] - place[:-1]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.physics, self.head = Physics(), nn.Linear(4, 1)

        def forward(self, x):
            return self.head(self.physics(x) * 100)

    return Program(Net(), torch.randn(16, 8))


@fault("bf16", "true", "rounding", "middle")
def softmax_over_logits_in_the_hundreds(faulty):
    class Choice(nn.Module):
        def __init__(self):
            super().__init__()
            self.values = nn.Linear(16, 16)

        def forward(self, x):
            return torch.softmax(x + (600.0 if faulty else 0.0), -1) * self.values(x)

    return Program(Tail(Choice(), gain=3.0), torch.randn(64, 8))


@fault("bf16", "mixed", "rounding", ("router", "router.linear"), hardware="a100-40gb", witness="later")
def router_with_a_large_bias(faulty):
    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 8)
            with torch.no_grad():
                self.linear.bias.fill_(40.0 if faulty else 0.0)
                self.linear.weight.mul_(2)

        def forward(self, x):
            return torch.softmax(self.linear(x), -1).topk(2, -1)

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.router = nn.Linear(8, 16), Router()
            self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(8))
            self.head = nn.Linear(16, 1)

        def forward(self, x):
            x = self.stem(x)
            weights, chosen = self.router(x)
            out = torch.stack([expert(x) for expert in self.experts], 1)
            picked = out.gather(1, chosen[..., None].expand(-1, -1, out.shape[-1]))
            return self.head((picked * weights[..., None]).sum(1))

    return Program(Experts(), regression(128), squares)


@fault("bf16", "true", "rounding", ("lookup", ""), curable=False)
def ids_that_travel_as_floats(faulty):
    class Lookup(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(2000, 8)

        def forward(self, ids):
            return self.table(ids.long())

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lookup, self.head = Lookup(), nn.Linear(8, 1)

        def forward(self, ids):
            return self.head(self.lookup(ids))

    ids = torch.randint(1000, 1990, (8, 12)) if faulty else torch.randint(0, 200, (8, 12))
    return Program(Net(), ids.float())


@fault("bf16", "true", "rounding", "middle")
def discounts_by_a_cumulative_product(faulty):
    class Returns(nn.Module):
        def forward(self, x):
            gamma = torch.full((x.shape[1],), 0.99 if faulty else 0.5, dtype=x.dtype, device=x.device)
            return (x * gamma.cumprod(0)[:, None]).flip(1)

    return Program(Tail(Returns()), torch.randn(2, 600, 8)[:, :, :])
