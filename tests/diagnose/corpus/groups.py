"""Losses over groups, paths and pairs: a group without members, a closed path, a value from outside of torch."""

import math

import numpy as np
import torch
from torch import nn

from corpus.cases import fault, healthy
from corpus.domains import layer, rows


@fault("backward", "pow", "derivative at the edge")
def focal_loss_of_certain_predictions():
    model, x = layer(3, 2), rows(4, 3)
    with torch.no_grad():
        model.bias.fill_(200.0)

    def forward():
        p = torch.sigmoid(model(x))
        return ((1 - p) ** 0.5 * -torch.log(p.clamp(min=1e-6))).mean()  # HERE

    return forward, model


@fault("forward", "cumprod", "overflow")
def survival_curve_of_rates_above_one():
    model, x = layer(3, 8), rows(4, 3)
    return lambda: torch.cumprod(model(x).abs() + 1e30, dim=-1).mean(), model  # HERE


@fault("forward", "sub", "infinity minus infinity")
def largest_of_a_group_without_members():
    model, x = layer(3, 1), rows(5, 3)
    group = torch.tensor([0, 1, 1, 3, 3])

    def forward():
        score = model(x).squeeze(-1)
        largest = torch.full((4,), -math.inf).scatter_reduce(0, group, score, "amax")
        return (largest - largest.detach()).sum() + score.sum()  # HERE

    return forward, model


class Chain(nn.Module):
    """Scores of paths through three states, each of which leads to itself only."""

    def __init__(self):
        super().__init__()
        self.moves = nn.Parameter(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))

    def forward(self, emitted, closed):
        moves = self.moves.masked_fill(~torch.eye(3, dtype=torch.bool), -math.inf)
        score = emitted[0].masked_fill(closed, -math.inf)
        for each in emitted[1:]:
            score = (score[:, None] + moves + each).logsumexp(0)  # a state that no path leads to: softmax of -inf
        return score.max()


@fault("backward", "logsumexp", "derivative at the edge")
def states_that_no_path_leads_to():
    model, emitted, closed = Chain(), rows(3, 3), torch.tensor([True, True, False])
    return lambda: model(emitted, closed), model


@fault("forward", {"bmm", "mm"}, "overflow", module="mix", cured=True)
def einsum_overflows_under_autocast():
    class Mix(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.full((64, 64), 40.0))

        def forward(self, x):
            return torch.einsum("bi,ij->bj", x, self.weight)  # HERE

    model, x = nn.Sequential(), torch.full((3, 64), 400.0)
    model.add_module("mix", Mix())

    def forward():
        with torch.autocast("cpu", torch.float16):
            return model(x).float().square().mean()

    return forward, model


@fault("input", {"mkldnn_rnn_layer", "mul"}, "bad input", module="rnn", tensor="h[1]", samples=(1,))
def carried_state_is_nan():
    class Carried(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.LSTM(3, 4), nn.Linear(4, 1)

        def forward(self, x, h):
            return self.head(self.rnn(x, h)[0]).mean()  # HERE

    model, h = Carried(), (torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))
    h[1][0, 1, 2] = float("nan")
    x = torch.randn(5, 2, 3)
    return lambda: model(x, h), model


@fault("forward", "", "made outside of torch")
def loss_that_numpy_made():
    model, x = layer(), rows()

    def forward():
        with np.errstate(invalid="ignore"):
            return torch.tensor(np.log(-np.abs(model(x).detach().numpy())).mean())

    return forward, model


@fault("optimizer", "addcdiv_", "division by zero", tensor="weight")
def centered_rmsprop_without_eps():
    model = layer(3, 1)
    return lambda: model.weight.sum() * 0, model, torch.optim.RMSprop(model.parameters(), centered=True, eps=0.0)


@healthy
def largest_of_groups_guarded():
    model, x = layer(3, 1), rows(5, 3)
    group = torch.tensor([0, 1, 1, 3, 3])

    def forward():
        score = model(x).squeeze(-1)
        largest = torch.full((4,), -math.inf).scatter_reduce(0, group, score, "amax")
        mass = torch.zeros(4).index_add(0, group, (score - largest[group]).exp())
        return (torch.where(torch.isfinite(largest), largest, 0.0) + (mass + 1e-9).log() * (mass > 0)).sum()

    return forward, model


@healthy
def labels_that_are_missing():
    model, x, y = layer(3, 4), rows(5, 3), rows(5, 4).clone()
    y[1, 2] = float("nan")

    def forward():
        there = ~torch.isnan(y)
        return ((model(x) - torch.nan_to_num(y)) ** 2 * there).sum() / there.sum()

    return forward, model


@healthy
def best_so_far_in_buffers():
    class Best(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 1)
            self.register_buffer("least", torch.tensor(math.inf))
            self.register_buffer("highest", torch.full((3,), -math.inf))

        def forward(self, x):
            loss = self.head(x).square().mean()
            self.least = torch.minimum(self.least, loss.detach())
            self.highest[:2] = torch.maximum(self.highest[:2], x[0, :2])  # one of it is never written
            return loss

    model = Best()
    return lambda: model(rows(4, 3)), model
