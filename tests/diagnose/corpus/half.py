"""What half precision does to a forward: overflow in fp16, an eps that is 0 in fp16, 1 - eps that is 1 in bf16."""

import torch
from torch import nn
from torch.nn import functional as F

from corpus.cases import fault
from corpus.domains import layer, rows


def autocast(dtype):
    return torch.autocast("cpu", dtype=dtype)


class Block(nn.Module):
    def __init__(self, width=8, scale=1.0):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        with torch.no_grad():
            self.up.weight.mul_(scale)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


@fault("forward", "addmm", "overflow", module="up", cured=True)
def linear_overflows_fp16_under_autocast():
    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 1)
            with torch.no_grad():
                self.up.weight.fill_(3e4)

        def forward(self, x):
            return self.down(F.relu(self.up(x)) / 1e6)  # HERE

    model, x = Mlp(), torch.ones(3, 8)

    def forward():
        with autocast(torch.float16):
            return model(x).float().mean()

    return forward, model


@fault("forward", "addmm", "overflow", module="2.up")
def second_of_three_blocks_overflows():
    model = nn.Sequential(Block(), Block(), Block(scale=1.5e5), Block())
    x = rows(3, 8)

    def forward():
        with autocast(torch.float16):
            return model(x).float().mean()

    return forward, model


@fault("forward", "addmm", "overflow", module="up")
def true_fp16_weights_overflow():
    model = Block(scale=6e4).half()
    with torch.no_grad():
        model.up.weight.clamp_(-6e4, 6e4)
    x = rows(3, 8).half()
    return lambda: model(x).float().mean(), model


@fault("forward", "_to_copy", "overflow")
def cast_to_fp16_overflows():
    model, x = layer(), rows()

    def forward():
        h = model(x) * 1e6
        return h.half().float().mean()  # HERE

    return forward, model


@fault("forward", "mul", "overflow")
def scores_scaled_after_the_product_in_fp16():
    model = layer().half()
    x = rows().half()

    def forward():
        h = model(x) * 100
        return (h * 1000).float().mean()  # HERE

    return forward, model


@fault("forward", "bmm", "overflow")
def attention_scores_overflow_fp16():
    model = layer(8, 16)
    x = rows(6, 8).view(2, 3, 8)

    def forward():
        with autocast(torch.float16):
            query, key = (model(x) * 400).chunk(2, dim=-1)
            scores = torch.bmm(query, key.transpose(1, 2)) / 8**0.5  # HERE
            return torch.softmax(scores, dim=-1).float().mean()

    return forward, model


@fault("forward", "pow", "overflow")
def square_overflows_fp16():
    model = layer().half()
    x = rows().half()

    def forward():
        h = model(x) * 600
        return h.pow(2).float().mean()  # HERE

    return forward, model


@fault("forward", "sum", "overflow")
def sum_overflows_fp16():
    model = layer(4, 64).half()
    x = rows().half()

    def forward():
        h = model(x).abs() * 4000
        return h.sum().float()  # HERE

    return forward, model


@fault("forward", "cumsum", "overflow")
def cumulative_sum_overflows_fp16():
    model = layer(4, 64).half()
    x = rows().half()

    def forward():
        h = model(x).abs() * 4000
        return torch.cumsum(h, dim=-1).float().mean()  # HERE

    return forward, model


@fault("forward", "log", "eps underflow")
def log_with_an_eps_of_1e_8_in_fp16():
    model = layer().half()
    x = rows().half()

    def forward():
        p = F.relu(model(x) - 50)
        return -torch.log(p + 1e-8).float().mean()  # HERE

    return forward, model


@fault("forward", "log", "eps underflow")
def clamped_at_1e_8_in_fp16():
    model = layer().half()
    x = rows().half()

    def forward():
        p = F.relu(model(x) - 50).clamp(min=1e-8)
        return p.log().float().mean()  # HERE

    return forward, model


@fault("forward", "div", "eps underflow")
def normalised_with_an_eps_of_1e_8_in_fp16():
    model = layer(4, 4).half()
    x = rows().half()
    x[1] = 0
    with torch.no_grad():
        model.bias.zero_()

    def forward():
        h = model(x)
        length = h.norm(dim=-1, keepdim=True) + 1e-8
        return (h / length).float().sum()  # HERE

    return forward, model


@fault("forward", "div", "eps underflow", module="1")
def layer_norm_by_hand_in_fp16():
    class Norm(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(width))

        def forward(self, x):
            centred = x - x.mean(-1, keepdim=True)
            spread = torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-8)
            return centred / spread * self.gain  # HERE

    model = nn.Sequential(nn.Linear(4, 8), Norm(8)).half()
    with torch.no_grad():
        model[0].bias.fill_(0.25)
    x = rows().half()
    x[2] = 0
    return lambda: model(x).float().sum(), model


@fault("forward", "rsqrt", "eps underflow", module="norm")
def rms_norm_by_hand_in_fp16():
    class RmsNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x):
            square = x.pow(2).mean(-1, keepdim=True)
            return x * torch.rsqrt(square + 1e-8) * self.weight  # HERE

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(5, 4, padding_idx=0)
            self.norm = RmsNorm()

        def forward(self, ids):
            return self.norm(self.embed(ids))

    model = Net().half()
    ids = torch.tensor([[1, 2, 0], [3, 0, 0]])
    return lambda: model(ids).float().sum(), model


@fault("forward", "log", "eps absorbed")
def one_minus_1e_6_in_bf16():
    model = layer().bfloat16()
    x = rows().bfloat16()

    def forward():
        p = torch.sigmoid(model(x) * 100).clamp(1e-6, 1 - 1e-6)
        return -(torch.log(p) + torch.log(1 - p)).float().mean()  # HERE

    return forward, model


@fault("forward", "log", "log of zero")
def sigmoid_saturates_in_bf16():
    model, x = layer(), rows()

    def forward():
        with autocast(torch.bfloat16):
            p = torch.sigmoid(model(x) * 20 + 10)
            return -torch.log(1 - p).float().mean()  # HERE

    return forward, model


@fault("forward", "_to_copy", "mask overflow")
def lowest_number_of_fp32_as_a_mask_in_fp16():
    model = layer(4, 4).half()
    x = rows(4).half()
    mask = torch.triu(torch.full((4, 4), torch.finfo(torch.float32).min), 1)
    mask[0] = torch.finfo(torch.float32).min

    def forward():
        scores = model(x) @ model(x).T
        scores = scores + mask.to(scores.dtype)  # HERE
        return torch.softmax(scores, dim=-1).float().mean()

    return forward, model


@fault("forward", "add", "mask overflow")
def two_masks_of_finfo_min_added():
    model, x = layer(), rows(4)
    lowest = torch.finfo(torch.float32).min
    causal = torch.triu(torch.full((4, 4), lowest), 1)
    padding = torch.zeros(4, 4)
    padding[:, 0] = lowest
    causal[2] = padding[2] = lowest

    def forward():
        scores = model(x) @ model(x).T
        mask = causal + padding  # HERE
        return torch.softmax(scores + mask, dim=-1).sum()

    return forward, model


@fault("forward", "convolution", "overflow", module="1")
def convolution_overflows_fp16():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 3))
    with torch.no_grad():
        model[1].weight.fill_(6e4)
        model[0].bias.fill_(2.0)
    images = torch.randn(2, 1, 8, 8)

    def forward():
        with autocast(torch.float16):
            return model(images).float().mean()

    return forward, model


@fault("forward", "exp", "exponential overflow")
def exponential_in_fp16():
    model = layer().half()
    x = rows().half()

    def forward():
        h = model(x) * 2 + 12
        return h.exp().float().mean()  # HERE

    return forward, model


@fault("forward", "mul", "overflow")
def image_scaled_twice_in_fp16():
    model = nn.Linear(16, 2)
    images = torch.randint(0, 256, (3, 16)).half()

    def forward():
        scaled = images * 512  # HERE
        with autocast(torch.float16):
            return model(scaled).float().mean()

    return forward, model
