"""Values beyond fp16's end of 65,504, and below its least, 6e-8."""

import torch
from audit_corpus.cases import Program, fault
from torch import nn
from torch.nn import functional as F


def squares(model, batch):
    x, y = batch
    return F.mse_loss(model(x).float(), y.float())


def regression(rows=16, width=8):
    return torch.randn(rows, width), torch.randn(rows, 1)


class Tail(nn.Module):
    """A linear layer, what is under test, and a linear layer."""

    def __init__(self, middle, width=8, inner=16, gain=1.0, bias=0.0, after=None):
        super().__init__()
        self.stem, self.middle = nn.Linear(width, inner), middle
        self.head = nn.Linear(after or inner, 1)
        with torch.no_grad():
            self.stem.weight.mul_(gain)
            self.stem.bias.fill_(bias)
            self.head.bias.zero_()

    def forward(self, x):
        return self.head(self.middle(self.stem(x)))


@fault("fp16", "mixed", "range", "up", hardware="a100-40gb")
def linear_overflows(faulty):
    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.norm, self.down = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 1)
            with torch.no_grad():
                self.up.weight.mul_(5e5 if faulty else 5.0)

        def forward(self, x):
            return self.down(self.norm(self.up(x)))

    return Program(Mlp(), regression(), squares)


@fault("fp16", "mixed", "range", "stem.2")
def convolution_overflows(faulty):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8))
            self.head = nn.Linear(8, 1)
            with torch.no_grad():
                self.stem[2].weight.mul_(6e5 if faulty else 1.0)

        def forward(self, x):
            return self.head(self.stem(x).mean((2, 3)))

    return Program(Net(), (torch.randn(4, 3, 12, 12), torch.randn(4, 1)), squares)


class HandAttention(nn.Module):
    """Scores are scaled after the product, as many do it by hand."""

    def __init__(self, width, gain):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        with torch.no_grad():
            self.qkv.weight[: 2 * width].mul_(gain)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = q @ k.transpose(1, 2)
        return torch.softmax(scores / q.shape[-1] ** 0.5 / 1000, -1) @ v


class Sequence(nn.Module):
    def __init__(self, attention, width=32):
        super().__init__()
        self.stem, self.attention, self.head = nn.Linear(8, width), attention, nn.Linear(width, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.head(x + self.attention(x)).mean(1)


@fault("fp16", "mixed", "range", "attention", hardware="a100-40gb")
def attention_scores_scaled_too_late(faulty):
    return Program(
        Sequence(HandAttention(32, 400.0 if faulty else 3.0)), (torch.randn(4, 10, 8), torch.randn(4, 1)), squares
    )


class Bump(nn.Module):
    """A block that writes a large constant into the residual stream, as trained language models do."""

    def __init__(self, width, size):
        super().__init__()
        self.fc = nn.Linear(width, width)
        self.size = size

    def forward(self, x):
        return x + torch.tanh(self.fc(x / 3e4)) + self.size


@fault("fp16", "true", "range", "trunk.blocks.3")
def residual_stream_grows(faulty):
    class Trunk(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Bump(16, 2e4 if faulty else 0.5) for _ in range(4))
            self.norm = nn.LayerNorm(16)

        def forward(self, x):
            tilt = torch.linspace(-1, 1, 16, device=x.device).to(x.dtype)
            for block in self.blocks:
                x = block(x)
            return self.norm(x * tilt)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.trunk, self.head = nn.Linear(8, 16), Trunk(), nn.Linear(16, 1)

        def forward(self, x):
            return self.head(self.trunk(self.stem(x)))

    return Program(Net(), regression(), squares)


@fault("fp16", "true", "range", "middle")
def l2_norm_by_hand_overflows(faulty):
    class Normalise(nn.Module):
        def forward(self, x):
            return x / (x * x).sum(-1, keepdim=True).sqrt()

    return Program(Tail(Normalise(), gain=400.0 if faulty else 1.0), regression(), squares)


@fault("fp16", "true", "range", "middle")
def rms_norm_squares_in_fp16(faulty):
    class RmsNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(16))

        def forward(self, x):
            return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))

    return Program(Tail(RmsNorm(), gain=500.0 if faulty else 1.0), regression(), squares)


@fault("fp16", "true", "range", "middle")
def fourth_power_in_kurtosis(faulty):
    class Kurtosis(nn.Module):
        def forward(self, x):
            centred = x - x.mean(-1, keepdim=True)
            return centred.pow(4).mean(-1, keepdim=True) / centred.pow(2).mean(-1, keepdim=True).pow(2)

    return Program(Tail(Kurtosis(), gain=60.0 if faulty else 3.0, after=1), regression(), squares)


@fault("fp16", "true", "range", "middle")
def log_sum_exp_by_hand(faulty):
    class Partition(nn.Module):
        def forward(self, x):
            if not faulty:
                return torch.logsumexp(x, -1, keepdim=True)
            return x.exp().sum(-1, keepdim=True).log()

    return Program(Tail(Partition(), gain=30.0, after=1), regression(), squares)


@fault("fp16", "true", "range", "middle")
def mean_as_a_sum_divided(faulty):
    class Pool(nn.Module):
        def forward(self, x):
            return x.sum(1) / x.shape[1]

    gain = 20.0 if faulty else 0.2
    return Program(Tail(Pool(), bias=gain), (torch.randn(2, 6000, 8), torch.randn(2, 1)), squares)


@fault("fp16", "true", "range", "contrast")
def temperature_of_a_fiftieth_exponentiated(faulty):
    class Contrast(nn.Module):
        def forward(self, a, b):
            similarity = F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T / (0.02 if faulty else 0.2)
            top = similarity.exp()
            return -(top.diagonal() / top.sum(-1)).log().mean()

    class Pairs(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.contrast = nn.Linear(8, 16), nn.Linear(8, 16), Contrast()
            with torch.no_grad():
                self.right.weight.copy_(self.left.weight + 0.05 * torch.randn(16, 8))

        def forward(self, x):
            return {"loss": self.contrast(self.left(x), self.right(x))}

    return Program(Pairs(), {"x": torch.randn(12, 8)})


@fault("fp16", "true", "range", "cosine")
def cosine_similarity_by_hand(faulty):
    class Cosine(nn.Module):
        def forward(self, a, b):
            return (a * b).sum(-1, keepdim=True) / (
                (a * a).sum(-1, keepdim=True) * (b * b).sum(-1, keepdim=True)
            ).sqrt()

    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.cosine = nn.Linear(8, 32), Cosine()
            with torch.no_grad():
                self.body.weight.mul_(15.0 if faulty else 1.0)

        def forward(self, x):
            return self.cosine(self.body(x), self.body(x.flip(0)))

    return Program(Twins(), regression(), squares)


@fault("fp16", "true", "range", "middle")
def softmax_over_scores_beyond_the_end(faulty):
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.scores = nn.Linear(16, 4)
            self.values = nn.Linear(16, 4)

        def forward(self, x):
            scores = self.scores(x) * (2e3 if faulty else 1.0)
            return torch.softmax(scores, -1) * self.values(x / 100)

    return Program(Tail(Gate(), gain=150.0 if faulty else 1.0, after=4), regression(), squares)


@fault("fp16", "true", "range", "middle")
def eps_of_1e_8_in_a_norm(faulty):
    class Unit(nn.Module):
        def forward(self, x):
            return x / (x.norm(dim=-1, keepdim=True) + (1e-8 if faulty else 0.1))

    class Words(nn.Module):
        """The padding's vector is zero, and so is its gradient."""

        def __init__(self):
            super().__init__()
            self.embed, self.middle, self.head = nn.Embedding(20, 16, padding_idx=0), Unit(), nn.Linear(16, 1)

        def forward(self, ids):
            return self.head(self.middle(self.embed(ids)))

    ids = torch.randint(1, 20, (4, 10))
    ids[1, 7:] = 0
    return Program(Words(), (ids, torch.randn(4, 10, 1)), squares)


@fault("fp16", "true", "range", "middle")
def log_of_a_small_probability(faulty):
    class Entropy(nn.Module):
        def forward(self, x):
            if not faulty:
                return torch.log_softmax(x, -1)[..., :1]
            return torch.softmax(x, -1)[..., :1].log()

    return Program(Tail(Entropy(), gain=12.0, after=1), regression(), squares)


@fault("fp16", "true", "range", "middle")
def power_iteration_on_a_small_weight(faulty):
    class Spectral(nn.Module):
        """Spectral norm with one power iteration, lengths by hand."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(16, 16) * (2e-5 if faulty else 0.3))
            self.register_buffer("u", F.normalize(torch.randn(16), dim=0))

        def forward(self, x):
            v = self.weight.T @ self.u
            v = v / (v.pow(2).sum().sqrt() + 1e-12)
            sigma = (self.weight @ v).pow(2).sum().sqrt()
            return x @ (self.weight / sigma)

    return Program(Tail(Spectral()), regression(), squares)
