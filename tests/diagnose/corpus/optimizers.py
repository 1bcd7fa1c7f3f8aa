"""Loss and gradients are finite, the update is not."""

import torch
from torch import nn

from corpus.cases import fault
from corpus.domains import layer, rows


@fault("optimizer", {"addcdiv_", "div"}, "optimizer eps underflow", tensor="weight")
def adam_eps_in_pure_fp16():
    model = layer().half()
    x = rows().half()
    x[:, 2] = 0
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    return lambda: model(x).float().square().mean(), model, optimizer


@fault("optimizer", {"addcdiv_", "div"}, "optimizer eps underflow", module="1", tensor="1.weight")
def adamw_foreach_in_pure_fp16():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).half()
    x = rows().half()
    optimizer = torch.optim.AdamW(model[1].parameters(), lr=1e-3, foreach=True)
    return lambda: model(x).float().square().mean(), model, optimizer


@fault("optimizer", {"addcmul_", "mul"}, "optimizer overflow", tensor="exp_avg_sq of weight")
def second_moment_overflows_fp16():
    model = layer(4, 1).half()
    x = torch.full((3, 4), 100.0).half()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-4, betas=(0.9, 0.5))
    return lambda: model(x).float().mean() * 100, model, optimizer


@fault("optimizer", {"add_", "mul", "addcdiv_"}, "hyperparameter", tensor="weight")
def learning_rate_is_infinite():
    model, x = layer(), rows()
    return lambda: model(x).square().mean(), model, torch.optim.SGD(model.parameters(), lr=float("inf"))


@fault("optimizer", {"add_", "mul_", "addcdiv_"}, "hyperparameter", tensor="weight")
def learning_rate_is_nan_after_a_schedule():
    model, x = layer(), rows()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer.param_groups[0]["lr"] = float("nan")
    return lambda: model(x).square().mean(), model, optimizer


@fault("optimizer", "div", "division by zero", tensor="weight")
def optimizer_by_hand():
    class Normalised(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 0.1})

        @torch.no_grad()
        def step(self):
            for group in self.param_groups:
                for p in group["params"]:
                    direction = p.grad / p.grad.norm()  # HERE
                    p.sub_(group["lr"] * direction)

    model, x = layer(), torch.zeros(3, 4)
    return lambda: model(x)[:, 0].mean(), model, Normalised([model.weight])


@fault("optimizer", {"add_", "addcdiv_", "lerp_", "mul_", "addcmul_"}, "bad state", tensor="exp_avg of weight")
def state_of_the_optimizer_is_bad_already():
    model, x = layer(), rows()
    optimizer = torch.optim.Adam(model.parameters())
    model(x).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.state[model.weight]["exp_avg"][0, 0] = float("nan")
    return lambda: model(x).square().mean(), model, optimizer


@fault("optimizer", "add_", "optimizer overflow", tensor="weight")
def step_leaves_fp16():
    model, x = layer(4, 1).half(), torch.full((3, 4), 100.0).half()
    return lambda: model(x).float().mean(), model, torch.optim.SGD(model.parameters(), lr=1e4)
