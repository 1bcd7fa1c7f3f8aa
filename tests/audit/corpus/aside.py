"""A second set that was kept aside: written after the audit had been mended once, and run once after that."""

import torch
from audit_corpus.cases import Program, fault, healthy
from audit_corpus.in_range import regression, squares
from torch import nn
from torch.nn import functional as F


@fault("fp16", "mixed", "range", "transformer.h.1.mlp.c_proj", hardware="a100-40gb")
def gpt2_projection(faulty):
    import zoo

    model = zoo.gpt2().eval()
    if faulty:
        with torch.no_grad():
            model.transformer.h[1].mlp.c_proj.weight.mul_(1e8)
    return Program(model, zoo.text(0))


@fault("bf16", "true", "stagnation", "smooth")
def exponential_smoothing_in_a_loop(faulty):
    class Smooth(nn.Module):
        def forward(self, x):
            keep, h = (0.998, torch.zeros_like(x[:, 0])) if faulty else (0.5, torch.zeros_like(x[:, 0]))
            for step in x.unbind(1):
                h = keep * h + (1 - keep) * step
            return h

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.smooth, self.head = Smooth(), nn.Linear(4, 1)

        def forward(self, x):
            return self.head(self.smooth(x))

    return Program(Net(), 1 + 0.05 * torch.randn(4, 400 if faulty else 12, 4))


@fault("bf16", "true", "rounding", "distance")
def one_minus_the_cosine_of_near_twins(faulty):
    class Distance(nn.Module):
        def forward(self, x):
            twin = x + (0.02 if faulty else 1.0) * x.roll(1, 0)
            return 1 - F.cosine_similarity(x, twin, dim=-1)[:, None]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.distance, self.head = nn.Linear(8, 16), Distance(), nn.Linear(1, 1, bias=False)

        def forward(self, x):
            return self.head(self.distance(self.body(x)))

    return Program(Net(), regression()[0])


@fault("bf16", "true", "stagnation", "oscillator", witness="later")
def phase_of_an_oscillator(faulty):
    class Oscillator(nn.Module):
        """Additive synthesis: the phase is the running sum of the frequency."""

        def forward(self, frequency):
            return torch.sin(frequency.cumsum(1))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.pitch, self.oscillator, self.head = nn.Linear(4, 4), Oscillator(), nn.Linear(4, 1)

        def forward(self, x):
            return self.head(self.oscillator(torch.sigmoid(self.pitch(x)) / 4))

    return Program(Net(), torch.randn(1, 3000 if faulty else 10, 4))


@fault("fp16", "true", "range", "pairs")
def squared_differences_of_far_points(faulty):
    class Pairs(nn.Module):
        def forward(self, x):
            return ((x[:, None] - x[None]) ** 2).sum(-1).add(1.0).sqrt().mean(-1, keepdim=True)

    return Program(_wrapped("pairs", Pairs(), 600.0 if faulty else 1.0), regression(), squares)


@fault("fp16", "true", "range", "likelihood")
def precision_of_a_confident_gaussian(faulty):
    class Likelihood(nn.Module):
        def forward(self, x):
            mean, log_variance = x.chunk(2, -1)
            return (mean * mean * torch.exp(-(log_variance - (13 if faulty else 0)))).log1p()

    return Program(_wrapped("likelihood", Likelihood(), 1.0, after=8), regression(), squares)


def _wrapped(name, module, gain, after=1):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(8, 16)
            self.add_module(name, module)
            self.head = nn.Linear(after, 1)
            with torch.no_grad():
                self.body.weight.mul_(gain)

        def forward(self, x):
            return self.head(getattr(self, name)(self.body(x)))

    return Net()


@fault("fp16", "mixed", "range", "mix", hardware="a100-40gb")
def linear_attention_sums_over_its_tokens(faulty):
    class Mix(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(8, 24)
            with torch.no_grad():
                self.qkv.weight.mul_(20.0 if faulty else 1.0)

        def forward(self, x):
            q, k, v = self.qkv(x).relu().chunk(3, -1)
            state = torch.einsum("btd,bte->bde", k, v)
            return torch.einsum("btd,bde->bte", q, state) / x.shape[1] / 100

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.norm, self.head = Mix(), nn.LayerNorm(8), nn.Linear(8, 1)

        def forward(self, x):
            return self.head(self.norm(self.mix(x)).mean(1))

    return Program(Net(), (torch.randn(2, 2048 if faulty else 64, 8), torch.randn(2, 1)), squares)


@fault("bf16", "true", "rounding", "bins", curable=False)
def values_put_into_a_thousand_bins(faulty):
    class Bins(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(1024, 4)
            self.many = 1000 if faulty else 2

        def forward(self, x):
            return self.table((x * self.many).floor().long().clamp(0, 1023)).mean(1)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.bins, self.head = Bins(), nn.Linear(4, 1)

        def forward(self, x):
            return self.head(self.bins(x))

    x = torch.rand(32, 6)
    return Program(Net(), x if faulty else torch.where(x > 0.5, 0.75, 0.25))


@fault("fp16", "true", "range", "", "backward", curable=False, witness="gradient")
def loss_divided_by_a_large_number(faulty):
    def loss(model, batch):
        x, y = batch
        error = model(x).float() - y.float()  # HERE
        return error.pow(2).sum() / (1e14 if faulty else 16)

    return Program(nn.Linear(8, 1), regression(), loss)


@fault("bf16", "mixed", "stagnation", "progress", witness="later")
def progress_by_autocast_on_a_cpu(faulty):
    class Progress(nn.Module):
        def __init__(self):
            super().__init__()
            self.rate = nn.Linear(8, 4)

        def forward(self, x):
            done = torch.sigmoid(self.rate(x)).cumsum(1)
            return done[:, -1] / x.shape[1]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.progress, self.head = Progress(), nn.Linear(4, 1)

        def forward(self, x):
            return self.head(self.progress(x))

    return Program(Net(), torch.randn(2, 4000 if faulty else 50, 8))


@fault("bf16", "true", "stagnation", "observer", "buffer", witness="buffer")
def observer_of_a_quantiser(faulty):
    class Observer(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("largest", torch.tensor([3.0]) if faulty else torch.zeros(1))

        def forward(self, x):
            with torch.no_grad():
                self.largest += (0.005 if faulty else 0.5) * (x.abs().amax().reshape(1) - self.largest)
            return x.clamp(-4, 4)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.observer, self.head = Observer(), nn.Linear(8, 1)

        def forward(self, x):
            return self.head(self.observer(x))

    return Program(Net(), regression(), squares)


@fault("fp16", "true", "range", "left")
def weight_shared_with_a_module_elsewhere(faulty):
    class Side(nn.Module):
        def __init__(self, gain):
            super().__init__()
            self.fc, self.gain = nn.Linear(16, 16), gain

        def forward(self, x):
            h = self.fc(x) * self.gain
            return h / h.abs().amax(-1, keepdim=True)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.left, self.right = nn.Linear(8, 16), Side(5e5 if faulty else 2.0), Side(1.0)
            self.right.fc.weight = self.left.fc.weight
            self.head = nn.Linear(16, 1)

        def forward(self, x):
            x = self.stem(x)
            return self.head(self.left(x) + self.right(x))

    return Program(Net(), regression(), squares)


@healthy
def residual_blocks_with_a_layer_scale_of_1e_6():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
            self.scale = nn.Parameter(torch.full((16,), 1e-6))

        def forward(self, x):
            return x + self.scale * self.down(F.gelu(self.up(self.norm(x))))

    model = nn.Sequential(nn.Linear(8, 16), *[Block() for _ in range(4)], nn.LayerNorm(16), nn.Linear(16, 1))
    return Program(model, regression(), squares)


@healthy
def cross_attention_of_latents():
    class Perceiver(nn.Module):
        def __init__(self):
            super().__init__()
            self.latents = nn.Parameter(torch.randn(4, 16))
            self.read = nn.MultiheadAttention(16, 2, kdim=8, vdim=8, batch_first=True)
            self.mix, self.head = (
                nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True),
                nn.Linear(16, 1),
            )

        def forward(self, x):
            latents = self.latents.expand(len(x), -1, -1)
            return self.head(self.mix(latents + self.read(latents, x, x)[0])).mean(1)

    return Program(Perceiver(), (torch.randn(4, 30, 8), torch.randn(4, 1)), squares)


@healthy
def denoiser_with_its_times_in_fp32():
    class Denoiser(nn.Module):
        def __init__(self):
            super().__init__()
            self.time, self.body, self.out = nn.Linear(16, 32), nn.Linear(8, 32), nn.Linear(32, 8)

        def forward(self, x, t):
            angle = t.float()[:, None] * torch.exp(-torch.linspace(0, 9, 8, device=t.device))
            embedded = torch.cat([angle.sin(), angle.cos()], -1).to(x.dtype)
            return self.out(F.silu(self.body(x) + self.time(embedded)))

    return Program(Denoiser(), (torch.randn(16, 8), torch.randint(0, 1000, (16,))))


@healthy
def mean_over_many_masked_tokens():
    class Pool(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.fc, self.head = nn.Embedding(100, 16), nn.Linear(16, 16), nn.Linear(16, 2)

        def forward(self, ids, mask):
            h = torch.tanh(self.fc(self.embed(ids)))
            m = mask[..., None].to(h.dtype)
            return self.head((h * m).sum(1) / m.sum(1).clamp(min=1))

    mask = (torch.arange(1500) < torch.tensor([1500, 1200, 700])[:, None]).long()
    return Program(Pool(), {"ids": torch.randint(0, 100, (3, 1500)), "mask": mask})


@healthy
def temporal_convolutions_with_weight_norm():
    norm = nn.utils.parametrizations.weight_norm
    first, second = nn.Conv1d(4, 16, 3, padding=2, dilation=2), nn.Conv1d(16, 16, 3, padding=4, dilation=4)
    model = nn.Sequential(norm(first), nn.PReLU(), norm(second), nn.PReLU(), nn.Conv1d(16, 1, 1))
    return Program(model, (torch.randn(4, 4, 40), torch.randn(4, 1, 40)), squares)
