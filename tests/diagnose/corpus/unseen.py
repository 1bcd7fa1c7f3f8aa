"""Faults that were written after the rules, without looking at them: how far the rules carry."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from corpus.cases import fault, healthy
from corpus.domains import layer, rows
from corpus.half import autocast

NAN, INF = float("nan"), float("inf")


@fault("forward", "div", "division by zero")
def library_normalize_without_eps():
    model, x = layer(), torch.zeros(3, 4)
    with torch.no_grad():
        model.bias.zero_()
    return lambda: F.normalize(model(x), eps=0.0).sum(), model  # HERE


@fault("forward", "log", "log of zero")
def library_poisson_loss_without_eps():
    model, x = layer(), rows()
    counts = torch.ones(3, 4)
    return lambda: F.poisson_nll_loss(model(x) * 0, counts, log_input=False, eps=0.0), model  # HERE


@fault("forward", "div", "division by zero")
def distribution_without_spread():
    model, x = layer(), rows()

    def forward():
        normal = torch.distributions.Normal(model(x), torch.zeros(4), validate_args=False)
        return -normal.log_prob(model(x)).mean()  # HERE

    return forward, model


@fault(
    "input",
    {"addmm", "_to_copy", "native_layer_norm"},
    "bad input",
    module="0",
    tensor="input",
    samples=(0,),
    cured=True,
)
def rnn_fed_with_a_bad_sequence():
    model, x = nn.Sequential(nn.LayerNorm(4), nn.GRU(4, 4, batch_first=True)), torch.randn(3, 5, 4)
    x[0, 4] = INF
    return lambda: model(x)[0].mean(), model  # HERE


@fault("parameter", "addmm", "bad parameter", module="", tensor="weight_hh_l0")
def recurrent_weight_is_nan():
    model, x = nn.GRU(4, 4, batch_first=True), torch.randn(3, 5, 4)
    with torch.no_grad():
        model.weight_hh_l0[2, 2] = NAN
    return lambda: model(x)[0].mean(), model  # HERE


@fault("parameter", {"mul", "div"}, "bad parameter", module="", tensor="temperature")
def learnable_temperature_is_infinite():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.temperature = nn.Parameter(torch.tensor(INF))

        def forward(self, x):
            return self.linear(x) * self.temperature  # HERE

    model, x = Scaled(), rows()
    return lambda: model(x).mean(), model


@fault("parameter", "addmm", "bad parameter", module="1", tensor="1.bias")
def zero_bias_with_one_infinity():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), rows()
    with torch.no_grad():
        model[1].bias.zero_()
        model[1].bias[1] = -INF
    return lambda: model(x).sum(), model  # HERE


@fault("forward", "index_add", "overflow")
def scattered_sum_overflows_fp16():
    model, x = layer(4, 1).half(), rows(64).half()
    where = torch.zeros(64, dtype=torch.long)

    def forward():
        h = model(x) * 0 + 6000
        total = torch.zeros(2, 1, dtype=torch.float16).index_add(0, where, h)  # HERE
        return total.float().sum()

    return forward, model


@fault("forward", "div", "division by zero", module="pool")
def segment_mean_of_an_empty_segment():
    class Pool(nn.Module):
        def forward(self, h, segment):
            total = h.new_zeros(3, h.shape[1]).index_add_(0, segment, h)
            count = torch.bincount(segment, minlength=3)
            return total / count[:, None]  # HERE

    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.pool = nn.Linear(4, 4), Pool()

        def forward(self, x, segment):
            return self.pool(self.linear(x), segment)

    model, x = Graph(), rows(4)
    return lambda: model(x, torch.tensor([0, 0, 2, 2])).sum(), model


@fault("forward", {"fill_", "copy_", "index_put_"}, "nan constant")
def nan_written_as_a_marker():
    model, x = layer(), rows()

    def forward():
        h = model(x).clone()
        h[1] = NAN  # HERE
        return h.mean()

    return forward, model


@fault("forward", "mul", "nan constant")
def factor_is_nan():
    model, x = layer(), rows()
    return lambda: (model(x) * NAN).mean(), model  # HERE


@fault("forward", "div", "division by zero")
def weights_of_a_weighted_mean_are_all_zero():
    model, x = layer(), rows()
    weight = torch.zeros(3)

    def forward():
        each = model(x).square().mean(-1)
        return (each * weight).sum() / weight.sum()  # HERE

    return forward, model


@fault("forward", "convolution", "overflow", module="encoder.1")
def one_dimensional_convolution_in_fp16():
    class Audio(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(nn.Conv1d(1, 4, 3), nn.Conv1d(4, 4, 3))
            with torch.no_grad():
                self.encoder[1].weight.fill_(3e4)

        def forward(self, x):
            return self.encoder(x).mean()  # HERE

    model, x = Audio(), torch.randn(2, 1, 16) * 10

    def forward():
        with autocast(torch.float16):
            return model(x).float()

    return forward, model


@fault("backward", "div", "derivative at the edge")
def ratio_of_two_losses():
    model, x = layer(), rows()

    def forward():
        h = model(x)
        good = h.detach() > 1e6
        ratio = h / (h * 0)  # HERE
        return ratio.masked_fill(~good, 0.0).sum()

    return forward, model


@fault("backward", "rsqrt", "division by zero", module="norm")
def rms_norm_whose_bad_rows_are_masked():
    class Rms(nn.Module):
        def forward(self, x):
            scale = torch.rsqrt(x.square().mean(-1, keepdim=True))  # HERE
            return torch.where(scale.isinf(), 0.0, x * scale)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(4, 4, bias=False), Rms()

        def forward(self, x):
            return self.norm(self.linear(x)).sum()

    model, x = Net(), rows()
    x[1] = 0
    return lambda: model(x), model


@fault("backward", "log", "log of zero")
def entropy_with_nan_to_num():
    model, x = layer(), rows()

    def forward():
        p = (model(x) * 1e4).softmax(-1)
        surprise = torch.log(p)  # HERE
        return -torch.nan_to_num(p * surprise).sum()

    return forward, model


@fault("backward", "pow", "derivative at the edge", module="1")
def generalised_mean_pooling():
    class GeM(nn.Module):
        def __init__(self):
            super().__init__()
            self.p = nn.Parameter(torch.tensor(3.0))

        def forward(self, x):
            mean = F.relu(x).pow(self.p).mean(-1)
            return mean.pow(1 / self.p)  # HERE

    model, x = nn.Sequential(nn.Linear(4, 4), GeM()), rows()
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    return lambda: model(x).sum(), model


@fault("forward", "sqrt", "root of a negative number")
def adjusted_variance():
    model, x = layer(), rows()

    def forward():
        h = model(x)
        spread = (h.var(-1) - 100.0).sqrt()  # HERE
        return (h / spread[:, None]).mean()

    return forward, model


@fault("forward", "acos", "outside of the domain", module="angular")
def angular_margin_in_fp16():
    class Angular(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.eye(4))

        def forward(self, h):
            cosine = F.normalize(h, dim=-1) @ F.normalize(self.weight, dim=-1).T * 1.001
            return torch.cos(torch.acos(cosine) + 0.5)  # HERE

    class Face(nn.Module):
        def __init__(self):
            super().__init__()
            self.angular = Angular()

        def forward(self, h):
            return self.angular(h)

    model = Face().half()
    x = torch.eye(4)[:3].half()
    return lambda: model(x).float().sum(), model


@fault("forward", "_softmax", "fully masked row")
def pointer_over_an_empty_list():
    model, x = layer(), rows()
    available = torch.tensor([[True, True, False, False], [False] * 4, [True] * 4])

    def forward():
        bias = torch.zeros(3, 4)
        bias[~available] = -math.inf
        scores = model(x) + bias
        return F.softmax(scores, dim=-1, dtype=torch.float32).square().sum()  # HERE

    return forward, model


@fault("forward", "mul", "overflow")
def logits_beyond_the_format():
    model, x = layer().half(), rows().half()

    def forward():
        logits = model(x) * 60000 * 10  # HERE
        return logits.softmax(-1).float().square().sum()

    return forward, model


@fault("buffer", {"div", "sub"}, "bad buffer", module="scaler", tensor="scaler.mean")
def input_scaler_fitted_on_nan():
    class Scaler(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.tensor([0.0, NAN, 0.0, 0.0]))
            self.register_buffer("std", torch.ones(4))

        def forward(self, x):
            return (x - self.mean) / self.std  # HERE

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scaler, self.head = Scaler(), nn.Linear(4, 1)

        def forward(self, x):
            return self.head(self.scaler(x))

    model, x = Net(), rows()
    return lambda: model(x).mean(), model


@fault("input", {"mul", "embedding"}, "bad input", module="", tensor="batch['weights']", samples=(1, 2))
def per_token_weights_in_a_batch_of_ids():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(9, 4)

        def forward(self, ids):
            return self.table(ids)

    model = Tagger()
    batch = {"ids": torch.tensor([[1, 2], [3, 4], [5, 6]]), "weights": torch.ones(3, 2)}
    batch["weights"][1:, 1] = NAN

    def forward():
        each = model(batch["ids"]).mean(-1)
        return (each * batch["weights"]).sum()  # HERE

    return forward, model


@fault("optimizer", {"div", "div_"}, "division by zero", tensor="weight")
def clipping_by_hand_inside_of_a_step():
    class Clipped(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad.div_(p.grad.norm() / 1.0)  # HERE
            return super().step(closure)

    model, x = nn.Linear(4, 2, bias=False), torch.zeros(3, 4)
    return lambda: model(x).sum(), model, Clipped(model.parameters(), lr=0.1)


@fault("optimizer", {"mul_", "add_", "lerp_", "addcdiv_"}, "hyperparameter", module="0", tensor="0.weight")
def weight_decay_is_infinite():
    model, x = nn.Sequential(nn.Linear(4, 2)), rows()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=INF)
    return lambda: model(x).mean(), model, optimizer


@fault("optimizer", {"add_", "sub_"}, "optimizer overflow", tensor="weight")
def momentum_overflows_fp16():
    model, x = nn.Linear(4, 1, bias=False).half(), torch.full((3, 4), 100.0).half()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
    model(x).float().mean().mul(600).backward()
    optimizer.step()
    optimizer.zero_grad()
    return lambda: model(x).float().mean() * 600, model, optimizer


@fault("forward", "_ctc_loss", "impossible alignment")
def target_longer_than_its_input():
    model, x = layer(4, 6), torch.randn(3, 2, 4)
    targets, lengths = torch.tensor([[1, 1, 1], [1, 2, 3]]), torch.tensor([3, 3])
    return lambda: F.ctc_loss(model(x).log_softmax(-1), targets, lengths, lengths), model  # HERE


@fault("forward", "native_group_norm", "division by zero", module="1")
def group_norm_of_equal_values_without_eps():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.GroupNorm(2, 4, eps=0.0)), rows()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(1.0)
    return lambda: model(x).sum(), model  # HERE


@healthy
def sparsemax():
    model, x = layer(), rows()

    def forward():
        z = model(x)
        order = z.sort(-1, descending=True).values
        ranks = torch.arange(1, 5.0)
        inside = 1 + ranks * order > order.cumsum(-1)
        threshold = (torch.where(inside, order, 0.0).sum(-1) - 1) / inside.sum(-1)
        return F.relu(z - threshold[:, None]).square().sum()

    return forward, model, torch.optim.Adam(model.parameters())


@healthy
def nearest_neighbour_without_itself():
    model, x = layer(), rows()

    def forward():
        distances = torch.cdist(model(x), model(x)).masked_fill(torch.eye(3).bool(), INF)
        return distances.amin(-1).sum()

    return forward, model, torch.optim.Adam(model.parameters())


@healthy
def what_is_finite_is_selected():
    model, x = layer(), rows()

    def forward():
        logs = model(x).detach().sub(1).log()
        good = torch.isfinite(logs)
        return model(x)[good].sum() + logs[good].sum()

    return forward, model, torch.optim.Adam(model.parameters())


@healthy
def masked_categorical_with_entropy():
    model, x = layer(), rows()
    legal = torch.tensor([True, False, True, True])

    def forward():
        logits = model(x).masked_fill(~legal, torch.finfo(torch.float32).min)
        actions = torch.distributions.Categorical(logits=logits)
        return -(actions.log_prob(actions.sample()).mean() + 0.01 * actions.entropy().mean())

    return forward, model, torch.optim.Adam(model.parameters())


@healthy
def early_stopping_that_starts_at_infinity():
    class Best(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 1)
            self.best = INF

        def forward(self, x):
            loss = self.linear(x).square().mean()
            self.best = min(self.best, float(loss.detach()))
            return loss + torch.tensor(self.best).clamp(max=1.0) * 0

    model, x = Best(), rows()
    return lambda: model(x), model, torch.optim.Adam(model.parameters())


@healthy
def softmax_off_by_one_with_a_sink():
    model, x = layer(), rows()

    def forward():
        scores = torch.cat([torch.zeros(3, 1), torch.full((3, 4), -INF)], -1) + F.pad(model(x), (1, 0))
        return scores.softmax(-1)[:, 1:].sum() + model(x).sum()

    return forward, model, torch.optim.Adam(model.parameters())


@healthy
def triplet_mining_with_infinities():
    model, x = layer(), rows(6)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])

    def forward():
        d = torch.cdist(model(x), model(x))
        same = labels[:, None] == labels[None]
        hardest = d.masked_fill(~same, -INF).amax(-1)
        easiest = d.masked_fill(same, INF).amin(-1)
        return F.relu(hardest - easiest + 1).mean()

    return forward, model, torch.optim.Adam(model.parameters())
