"""User-written autograd Functions, complex numbers, sparse gradients, distributions, ops inside of library modules."""

import torch
from torch import nn
from torch.nn import functional as F

from corpus.cases import fault
from corpus.domains import layer, rows


@fault("forward", "log", "log of zero")
def user_written_forward():
    class LogRelu(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t):
            ctx.save_for_backward(t)
            return t.clamp(min=0).log()  # HERE

        @staticmethod
        def backward(ctx, gradient):
            (t,) = ctx.saved_tensors
            return gradient / t.clamp(min=0.1)

    model, x = layer(), rows()
    return lambda: LogRelu.apply(model(x) - 10).sum(), model


@fault("backward", "Root", "user-written backward")
def user_written_backward_of_a_root():
    class Root(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t):
            root = t.sqrt()
            ctx.save_for_backward(root)
            return root

        @staticmethod
        def backward(ctx, gradient):
            (root,) = ctx.saved_tensors
            return gradient * (0.5 * root.pow(-1))  # HERE

    model, x = layer(), rows()
    return lambda: Root.apply(model(x) * 0).sum(), model


@fault("forward", {"div", "div_"}, "division by zero")
def whitening_in_the_frequency_domain():
    model, x = layer(8, 8), torch.randn(2, 8)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.fill_(1.0)

    def forward():
        spectrum = torch.fft.rfft(model(x))
        white = spectrum / spectrum.abs()  # HERE
        return white.real.sum()

    return forward, model


@fault("forward", "log", "log of zero")
def probabilities_into_a_distribution_that_refuses():
    model, x = layer(), rows()

    def forward():
        scale = F.relu(model(x) - 100)
        location = scale.log() - scale.log()[:1] * 0  # HERE
        return torch.distributions.Normal(location, 1.0).log_prob(x).mean()

    return forward, model


@fault("forward", {"div"}, "division by zero")
def multinomial_refuses_nan():
    model, x = layer(), rows()

    def forward():
        p = F.relu(model(x) - 100)
        p = p / p.sum(-1, keepdim=True)  # HERE
        chosen = torch.multinomial(p, 1)
        return p.gather(-1, chosen).sum()

    return forward, model


@fault("forward", "log", "log of zero")
def forward_raises_an_assertion():
    model, x = layer(), rows()

    def forward():
        h = F.relu(model(x) - 100)
        loss = h.log().mean()  # HERE
        assert torch.isfinite(loss), "loss is not finite"
        return loss

    return forward, model


@fault("backward", "sqrt", "derivative at the edge")
def sparse_embedding_gradient():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(10, 4, sparse=True, padding_idx=0)

        def forward(self, ids):
            return self.table(ids).pow(2).sum(-1).sqrt()  # HERE

    model = Net()
    with torch.no_grad():
        model.table.weight[3] = 0
    ids = torch.tensor([[1, 3], [2, 0]])
    return lambda: model(ids).sum(), model


@fault("forward", "native_layer_norm", "overflow", module="1", cured="any")
def layer_norm_of_huge_values():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    with torch.no_grad():
        model[0].weight.mul_(1e25)
    x = rows()
    return lambda: model(x).square().mean(), model  # HERE


@fault("forward", {"binary_cross_entropy", "div", "_softmax"}, "fully masked row", module="gate")
def gate_with_no_open_expert():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = nn.Linear(4, 4)

        def forward(self, x, open_):
            logits = self.router(x).masked_fill(~open_, float("-inf"))
            return logits.softmax(-1)  # HERE

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = Gate()

        def forward(self, x, open_):
            return self.gate(x, open_)

    model, x = Net(), rows()
    open_ = torch.tensor([[True, False, True, True], [True] * 4, [False] * 4])
    return lambda: model(x, open_).square().sum(), model


@fault(
    "forward",
    {"linalg_inv_ex", "linalg_lu_factor_ex", "_linalg_solve_ex", "_linalg_det", "linalg_inv", "div"},
    "division by zero",
)
def slope_of_a_line_through_equal_points():
    model, x = layer(4, 2), rows(1).expand(3, 4)

    def forward():
        h = model(x)
        slope = (h[1:, 1] - h[:1, 1]) / (h[1:, 0] - h[:1, 0])  # HERE
        return slope.sum()

    return forward, model


@fault("forward", "var", "spread of one value")
def batch_of_one_standardised():
    model, x = layer(), rows(1)

    def forward():
        h = model(x)
        variance = h.var(dim=0)  # HERE
        return ((h - h.mean(0)) / (variance + 1e-5).sqrt()).sum()

    return forward, model


@fault("forward", "lgamma", "unknown")
def log_gamma_at_a_pole():
    model, x = layer(), rows()

    def forward():
        concentration = F.relu(model(x) - 100)
        return torch.lgamma(concentration).mean()  # HERE

    return forward, model


@fault("forward", "log", "log of zero", module="")
def quantity_in_decibel_of_silence():
    model, x = layer(), torch.zeros(3, 4)
    with torch.no_grad():
        model.bias.zero_()

    def forward():
        power = model(x).square().mean(-1)
        level = 10 * torch.log(power) / 2.302585  # HERE
        return level.mean()

    return forward, model
