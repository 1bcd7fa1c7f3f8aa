"""How far 300 updates at a small learning rate move bf16 weights, beside fp32, with each choice of `train.optimizer`.

    python benchmarks/small_updates.py
    python benchmarks/small_updates.py --lr 1e-4 --steps 1000 --json results.json

One net of 17 k parameters is trained on 20 batches in turn, from weights that bf16 holds exactly, as `floatline train`
sets a step up (constant learning rate, no weight decay, clipping at 1.0).

    way      <moved, moved in fp32> / |moved in fp32|^2; 1 is all of it
    error    |moved - moved in fp32| / |moved in fp32|; weights are read in bf16, so their last rounding is in it
    still    share of weights that have not moved
    bytes    of optimizer state a parameter
"""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from common import print_table, report
from floatline.techniques.optim_steps.partial_step import state_bytes
from floatline.train.recipe import parse_recipe
from floatline.train.resolve import resolve_recipe
from floatline.train.setup import make_step

CHOICES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "adamw in 32-true": ("adamw", "32-true", {}),
    "adamw in bf16-mixed": ("adamw", "bf16-mixed", {}),
    "adamw (fp32 master weights)": ("adamw", "bf16-true", {}),
    "kahan": ("kahan", "bf16-true", {}),
    "kahan, library=optimi": ("kahan", "bf16-true", {"kahan": {"library": "optimi"}}),
    "stochastic-rounding": ("stochastic-rounding", "bf16-true", {}),
    "stochastic-rounding, library=torchao": (
        "stochastic-rounding",
        "bf16-true",
        {"stochastic_rounding": {"library": "torchao"}},
    ),
    "adamw-plain": ("adamw-plain", "bf16-true", {}),
}


class Net(nn.Module):
    """A model that answers with its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.Linear(64, 1))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=F.mse_loss(self.layers(x).float(), y.float()))


def moved(choice: tuple[str, str, dict[str, Any]], lr: float, steps: int) -> tuple[torch.Tensor, float]:
    """Return how far the weights moved, and the bytes of optimizer state a parameter."""
    optimizer, precision, techniques = choice
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    start = [parameter.detach().double().clone() for parameter in model.parameters()]
    train = {"optimizer": optimizer, "steps": steps, "schedule": "constant", "warmup_steps": 0, "lr": lr,
             "weight_decay": 0.0}  # fmt: skip
    tree = {"model": {"path": "-"}, "data": {"train": "-"}, "hardware": "cpu"}
    recipe = parse_recipe({**tree, "precision": precision, "train": train, "techniques": techniques})
    step = make_step(model, resolve_recipe(recipe, train_samples=steps))
    for update in range(steps):
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(update % 20))
        step({"x": x, "y": x.sum(1, keepdim=True).sin()})
    pairs = list(zip(model.parameters(), start, strict=True))
    way = torch.cat([(parameter.detach().double() - before).flatten() for parameter, before in pairs])
    return way, state_bytes(step.optimizer) / way.numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    exact, _ = moved(CHOICES["adamw in 32-true"], args.lr, args.steps)
    rows = []
    for name, choice in CHOICES.items():
        way, size = moved(choice, args.lr, args.steps)
        rows.append(
            {
                "choice": name,
                "way": float(way @ exact / (exact @ exact)),
                "error": float((way - exact).norm() / exact.norm()),
                "still": float((way == 0).double().mean()),
                "bytes": size,
            }
        )
    header = ["train.optimizer", "way", "error", "still", "bytes"]
    cells = [
        [r["choice"], f"{r['way']:.3f}", f"{r['error']:.3f}", f"{r['still']:.1%}", f"{r['bytes']:.1f}"] for r in rows
    ]
    print_table(header, cells)
    report(rows, ["torch", "torch-optimi", "torchao"], args.json, lr=args.lr, steps=args.steps)


if __name__ == "__main__":
    main()
