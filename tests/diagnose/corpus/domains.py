"""Functions outside of their domain in the forward: log, sqrt, pow, acos, divisions, empty means, overflow in fp32."""

import torch
from torch import nn
from torch.nn import functional as F

from corpus.cases import fault


def layer(inputs=4, outputs=4):
    return nn.Linear(inputs, outputs)


def rows(count=3, width=4):
    return torch.randn(count, width)


@fault("forward", "log", "log of zero", cured=True)
def log_of_probability_zero():
    model, x = layer(), rows()

    def forward():
        p = F.relu(model(x) - 100)
        return -torch.log(p).mean()  # HERE

    return forward, model


@fault("forward", "log", "log of a negative number", cured=True)
def log_of_negative():
    model, x = layer(), rows()
    return lambda: model(x).sub(50).log().mean(), model  # HERE


@fault("forward", "log1p", "log of a negative number", cured=True)
def log1p_below_minus_one():
    model, x = layer(), rows()

    def forward():
        y = model(x) - 50
        return y.log1p().mean()  # HERE

    return forward, model


@fault("forward", "log2", "log of zero")
def entropy_in_bits_of_one_hot():
    model, x = layer(), rows()

    def forward():
        p = torch.softmax(model(x) * 1e5, dim=-1)
        return -(p * torch.log2(p)).sum()  # HERE

    return forward, model


@fault("forward", "log", "log of zero")
def cross_entropy_by_hand_with_p_zero():
    model, x = layer(), rows()
    target = torch.tensor([0.0, 1.0, 0.0, 1.0])

    def forward():
        p = torch.sigmoid(model(x) * 1e6)
        return -(target * torch.log(p) + (1 - target) * torch.log(1 - p)).mean()  # HERE

    return forward, model


@fault("forward", "log", "log of zero")
def kl_with_log_of_zero():
    model, x = layer(), rows()
    wanted = torch.tensor([[0.5, 0.5, 0.0, 0.0]])

    def forward():
        log_p = torch.log_softmax(model(x), dim=-1)
        q = wanted.expand_as(log_p).clone()
        return (q * (q.log() - log_p)).sum()  # HERE

    return forward, model


@fault("forward", "sqrt", "root of a negative number", cured=True)
def variance_as_difference_of_squares():
    model = layer(4, 5)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.fill_(1000.1)
    x = rows()

    def forward():
        h = model(x)
        variance = (h * h).mean(-1) - h.mean(-1) ** 2
        spread = torch.sqrt(variance)  # HERE
        return spread.sum()

    return forward, model


@fault("forward", "rsqrt", "root of a negative number")
def rsqrt_of_negative():
    model, x = layer(), rows()
    return lambda: torch.rsqrt(model(x) - 90).sum(), model  # HERE


@fault("forward", "rsqrt", "division by zero")
def rms_norm_without_eps():
    model, x = layer(), rows()
    x[1] = 0
    with torch.no_grad():
        model.bias.zero_()

    def forward():
        h = model(x)
        scale = torch.rsqrt(h.pow(2).mean(-1, keepdim=True))  # HERE
        return (h * scale).sum()

    return forward, model


@fault("forward", "pow", "power of a negative number", cured=True)
def gamma_correction_of_negative_pixels():
    model, x = layer(), rows()
    return lambda: ((model(x) - 10) ** 0.45).mean(), model  # HERE


@fault("forward", "pow", "division by zero")
def zero_to_a_negative_power():
    model, x = layer(), rows()
    return lambda: (F.relu(model(x) - 90) ** -0.5).mean(), model  # HERE


@fault("forward", "acos", "outside of the domain", cured=True)
def angle_of_a_cosine_just_above_one():
    model, x = layer(), rows()

    def forward():
        h = model(x)
        cosine = (h * h).sum(-1) / h.norm(dim=-1) ** 2 * 1.000001
        return torch.acos(cosine).sum()  # HERE

    return forward, model


@fault("forward", "atanh", "outside of the domain")
def atanh_of_saturated_tanh():
    model, x = layer(), rows()
    return lambda: torch.tanh(model(x) * 1e4).atanh().sum(), model  # HERE


@fault("forward", "logit", "outside of the domain")
def logit_of_one():
    model, x = layer(), rows()
    return lambda: torch.logit(torch.sigmoid(model(x) * 1e4)).sum(), model  # HERE


@fault("forward", "erfinv", "outside of the domain")
def gaussian_quantile_of_one():
    model, x = layer(), rows()

    def forward():
        u = torch.sigmoid(model(x).abs() * 1e4)
        z = torch.erfinv(2 * u - 1)  # HERE
        return z.sum()

    return forward, model


@fault("forward", "div", "division by zero")
def mean_over_a_mask_of_zeros():
    model, x = layer(), rows()
    mask = torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]])

    def forward():
        total = (model(x) * mask).sum(-1)
        pooled = total / mask.sum(-1)  # HERE
        return pooled.sum()

    return forward, model


@fault("forward", "div", "division by zero")
def cosine_similarity_by_hand_of_a_zero_vector():
    model, x = layer(), rows()
    other = rows()
    other[2] = 0

    def forward():
        h = model(x)
        return ((h * other).sum(-1) / (h.norm(dim=-1) * other.norm(dim=-1))).mean()  # HERE

    return forward, model


@fault("forward", "div_", "division by zero")
def in_place_normalisation_by_zero_range():
    model, x = layer(), torch.zeros(3, 4)

    def forward():
        h = model(x)
        h = h - h.detach()[:1]
        span = h.detach().amax() - h.detach().amin()
        h.div_(span)  # HERE
        return h.sum()

    return forward, model


@fault("forward", "reciprocal", "division by zero")
def reciprocal_of_a_count():
    model, x = layer(), rows()
    counts = torch.tensor([3.0, 0.0, 1.0])
    return lambda: (model(x) * counts.reciprocal()[:, None]).mean(), model  # HERE


@fault("forward", "mean", "mean of nothing")
def mean_of_an_empty_selection():
    model, x = layer(), rows()

    def forward():
        h = model(x)
        chosen = h[h > 1e6]
        return chosen.mean()  # HERE

    return forward, model


@fault("forward", "nll_loss_forward", "no target")
def all_labels_ignored():
    model, x = layer(), rows()
    labels = torch.full((3,), -100)

    def forward():
        logits = model(x)
        return F.cross_entropy(logits, labels)  # HERE

    return forward, model


@fault("forward", "nll_loss_forward", "masked target")
def target_among_the_masked_classes():
    model, x = layer(), rows()
    labels = torch.tensor([0, 1, 3])
    allowed = torch.tensor([True, True, True, False])

    def forward():
        logits = model(x).masked_fill(~allowed, float("-inf"))
        return F.cross_entropy(logits, labels)  # HERE

    return forward, model


@fault("forward", "std", "spread of one value")
def standard_deviation_of_one_value():
    model, x = layer(4, 1), rows()
    return lambda: model(x).std(dim=-1).sum(), model  # HERE


@fault("forward", "exp", "exponential overflow", cured=True)
def softplus_by_hand():
    model, x = layer(), rows()

    def forward():
        h = model(x) * 1e3 + 1e3
        return torch.log(1 + torch.exp(h)).mean()  # HERE

    return forward, model


@fault("forward", "exp", "exponential overflow")
def logsumexp_by_hand():
    model, x = layer(), rows()

    def forward():
        h = model(x)
        h = h + 200
        total = h.exp().sum(-1)  # HERE
        return total.log().sum()

    return forward, model


@fault("forward", "exp", "exponential overflow")
def variance_from_log_variance():
    model, x = layer(4, 8), rows()

    def forward():
        mean, log_variance = model(x).chunk(2, dim=-1)
        variance = (log_variance * 300 + 100).exp()  # HERE
        return (mean**2 / variance + variance).mean()

    return forward, model


@fault("forward", "div", "division by zero")
def softmax_by_hand():
    model, x = layer(), rows()
    bias = torch.full((4,), 0.0)
    bias[0] = float("-inf")

    def forward():
        scores = (model(x) + bias) + torch.tensor([0.0, *[float("-inf")] * 3])
        e = torch.exp(scores)
        return (e / e.sum(-1, keepdim=True)).sum()  # HERE

    return forward, model


@fault("forward", "mul", "overflow")
def product_overflows_fp32():
    model, x = layer(), rows()
    return lambda: (model(x) * 1e30 * 1e30).mean(), model  # HERE


@fault("forward", "cumprod", "overflow")
def cumulative_product():
    model, x = layer(4, 64), rows()

    def forward():
        growth = model(x).abs() + 10
        return growth.cumprod(-1).mean()  # HERE

    return forward, model


@fault("forward", "add", "infinity minus infinity")
def infinity_minus_infinity():
    model, x = layer(), rows()
    mask = torch.tensor([0.0, 0.0, 0.0, float("-inf")])

    def forward():
        scores = model(x) + mask
        best = -scores + mask  # HERE
        return best[:, -1].sum() + scores[:, 0].sum()

    return forward, model


@fault("forward", "mul", "zero times infinity")
def mask_by_multiplication():
    model, x = layer(), rows()
    keep = torch.tensor([1.0, 1.0, 0.0, 1.0])

    def forward():
        scores = model(x).masked_fill(keep == 0, float("-inf"))
        return (scores * keep).sum()  # HERE

    return forward, model


@fault("forward", "fmod", "division by zero")
def remainder_by_zero():
    model, x = layer(), rows()
    period = torch.tensor([1.0, 2.0, 0.0, 1.0])
    return lambda: torch.fmod(model(x), period).sum(), model  # HERE
