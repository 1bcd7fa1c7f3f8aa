"""The forward is finite, its derivative is not."""

import torch
from torch import nn
from torch.nn import functional as F

from corpus.cases import fault
from corpus.domains import layer, rows
from corpus.half import autocast


def split(model, x):
    """Values of which some are 0 and some are positive, with the mask of those."""
    h = model(x)
    h = (h + h.abs()) / 2  # relu would hide the NaN: its derivative selects
    return h, h > 0


@fault("backward", "sqrt", "derivative at the edge", cured=True)
def sqrt_behind_where():
    model, x = layer(), rows()

    def forward():
        h, good = split(model, x)
        root = h.sqrt()  # HERE
        return torch.where(good, root, 0.0).sum()

    return forward, model


@fault("backward", "log", "derivative at the edge", cured=True)
def log_behind_where():
    model, x = layer(), rows()

    def forward():
        h, good = split(model, x)
        return torch.where(good, torch.log(h), torch.zeros(())).sum()  # HERE

    return forward, model


@fault("backward", "reciprocal", "derivative at the edge", cured=True)
def division_behind_where():
    model, x = layer(), rows()

    def forward():
        h, good = split(model, x)
        inverse = 1.0 / h  # HERE
        return torch.where(good, inverse, 0.0).sum()

    return forward, model


@fault("backward", "div", "derivative at the edge", cured=True)
def ratio_behind_where():
    model, x = layer(), rows()

    def forward():
        h, good = split(model, x)
        ratio = x / h  # HERE
        return torch.where(good, ratio, torch.zeros_like(ratio)).sum()

    return forward, model


@fault("backward", "pow", "derivative at the edge", cured=True)
def power_behind_where():
    model, x = layer(), rows()

    def forward():
        h, good = split(model, x)
        y = h**0.3  # HERE
        return torch.where(good, y, 0.0).sum()

    return forward, model


@fault("backward", "sqrt", "derivative at the edge", cured=True)
def euclidean_distance_by_hand_to_itself():
    model, x = layer(), rows()

    def forward():
        h = model(x)
        distance = (h[:, None] - h[None]).pow(2).sum(-1).sqrt()  # HERE
        return distance.mean()

    return forward, model


@fault("backward", "acos", "derivative at the edge", cured=True)
def angle_behind_where():
    model, x = layer(), rows()

    def forward():
        cosine = torch.tanh(model(x) * 100)
        angle = torch.acos(cosine)  # HERE
        return torch.where(cosine.abs() < 1, angle, 0.0).sum()

    return forward, model


@fault("backward", "exp", "derivative at the edge", cured=True)
def exponential_behind_where():
    model, x = layer(), rows()

    def forward():
        h = model(x) * 400
        smooth = h.exp()  # HERE
        return torch.where(h > 0, h, smooth).mean()

    return forward, model


@fault("backward", "sqrt", "derivative at the edge", cured=True)
def root_of_a_variance_of_equal_values():
    model, x = layer(), rows()
    with torch.no_grad():
        model.weight.zero_()
        model.bias.fill_(0.5)

    def forward():
        variance = model(x).var(dim=-1)
        return variance.sqrt().sum()  # HERE

    return forward, model


@fault("backward", "mul", "gradient overflow")
def gradient_of_a_scaled_loss_overflows_fp16():
    model, x = layer().half(), rows().half()

    def forward():
        h = model(x)
        grown = h * 4000.0  # HERE
        return grown.float().mean() * 2.0**12

    return forward, model


@fault("backward", {"addmm", "mm"}, "gradient overflow", module="down")
def gradient_overflows_in_a_layer_under_autocast():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 1)
            with torch.no_grad():
                self.down.weight.fill_(500.0)

        def forward(self, x):
            return self.down(torch.tanh(self.up(x)))  # HERE

    model, x = Net(), rows()

    def forward():
        with autocast(torch.float16):
            return model(x).float().mean() * 2.0**10

    return forward, model


@fault("backward", "Cube", "user-written backward")
def user_written_backward_divides_by_zero():
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t):
            result = t**3
            ctx.save_for_backward(t, result)
            return result

        @staticmethod
        def backward(ctx, gradient):
            t, result = ctx.saved_tensors
            return gradient * 3 * result / t  # HERE

    model, x = layer(), rows()
    return lambda: Cube.apply(model(x) * 0).sum(), model


@fault("backward", "sub", "infinity minus infinity")
def hook_on_a_gradient():
    model, x = layer(), rows()

    def wrong(gradient):
        return gradient + torch.full_like(gradient, float("inf")) - float("inf")  # HERE

    def forward():
        h = model(x)
        h.register_hook(wrong)
        return h.sum()

    return forward, model


@fault("backward", "div", "division by zero")
def clipping_by_hand_of_a_zero_gradient():
    model, x = layer(), rows()

    def clipped(gradient):
        return gradient / gradient.norm()  # HERE

    def forward():
        h = model(x)
        h.register_hook(clipped)
        return F.relu(h - 100).sum()

    return forward, model


@fault("backward", "prod", "derivative at the edge")
def product_with_an_infinite_branch():
    model, x = layer(), rows()

    def forward():
        h = model(x).abs() + 1e15
        volume = h.prod(dim=-1)  # HERE
        return torch.where(volume < 1e30, volume, h[:, 0]).sum()

    return forward, model


@fault("backward", "sqrt", "derivative at the edge", module="blocks.1")
def edge_inside_a_checkpointed_module():
    from torch.utils.checkpoint import checkpoint

    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            h = self.linear(x) * 0
            return x + h.sqrt()  # HERE

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(4, 4), Root()])

        def forward(self, x):
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return x

    model, x = Net(), rows()
    return lambda: model(x).sum(), model


@fault("backward", "log", "derivative at the edge", module="")
def edge_inside_a_reentrant_checkpoint_of_a_function():
    from torch.utils.checkpoint import checkpoint

    def body(h):
        return torch.where(h > 1e9, (h * 0).log(), 0.0)  # HERE

    model, x = layer(), rows()
    return lambda: checkpoint(body, model(x), use_reentrant=True).sum(), model


@fault("backward", "sqrt", "derivative at the edge")
def gradient_penalty_at_zero():
    model, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), rows()
    with torch.no_grad():
        model[2].weight.zero_()

    def forward():
        seen = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(seen).sum(), seen, create_graph=True)
        return ((slope.square().sum(-1).sqrt() - 1) ** 2).mean()  # HERE

    return forward, model


@fault("backward", "native_layer_norm", "derivative at the edge", module="norm")
def layer_norm_without_eps_over_equal_values():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(4, 4), nn.LayerNorm(4, eps=0.0)
            with torch.no_grad():
                self.linear.weight.zero_()
                self.linear.bias.zero_()

        def forward(self, x):
            h = self.linear(x)
            return torch.where(h == 0, 0.0, self.norm(h))  # HERE

    model, x = Net(), rows()
    return lambda: model(x).sum(), model


@fault("backward", "log", "derivative at the edge")
def first_of_two_faults_in_the_backward():
    model, x = layer(), rows()

    def forward():
        h = model(x) * 0
        early = h.sqrt()
        late = h.log()  # HERE
        return torch.where(h > 0, late + early, 0.0).sum()

    return forward, model


@fault("backward", "hypot", "derivative at the edge", cured=True)
def length_of_a_zero_vector_by_hypot():
    model, x = layer(), rows()
    with torch.no_grad():
        model.bias.zero_()
    x[1] = 0

    def forward():
        h = model(x)
        length = torch.hypot(h[:, 0], h[:, 1])  # HERE
        return length.sum()

    return forward, model


@fault("backward", "_linalg_eigh", "derivative at the edge")
def eigenvectors_of_equal_eigenvalues():
    model, x = layer(), torch.zeros(4, 4)
    with torch.no_grad():
        model.bias.zero_()

    def forward():
        h = model(x) + torch.eye(4)
        _, vectors = torch.linalg.eigh((h + h.T) / 2)  # HERE
        return vectors[0].sum()

    return forward, model


@fault("backward", "special_entr", "derivative at the edge", cured=True)
def entropy_of_a_certain_outcome():
    model, x = layer(), rows()

    def forward():
        h, _ = split(model, x)
        p = h / h.sum()
        return torch.special.entr(p).sum()  # HERE

    return forward, model


@fault("backward", "xlogy", "derivative at the edge", cured=True)
def x_log_x_at_zero():
    model, x = layer(), rows()

    def forward():
        h, _ = split(model, x)
        return torch.xlogy(h, h).sum()  # HERE

    return forward, model


@fault("backward", "asin", "derivative at the edge", cured=True)
def latitude_at_the_pole():
    model, x = layer(), rows()

    def forward():
        height = torch.tanh(model(x) * 100)
        return torch.asin(height).sum()  # HERE

    return forward, model
