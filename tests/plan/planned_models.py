"""Functions to plan by `file.py:function`: quick to trace, yet too large for cards of a few GiB."""

import torch
from torch import nn

from floatline import Workload


def deep(batch=32, seq=512, layers=6):
    """Linear layers over every token: activations are most of it, and grow with the batch."""

    def model():
        rest = (nn.Sequential(nn.Linear(1024, 1024), nn.GELU()) for _ in range(layers))
        return nn.Sequential(nn.Embedding(1000, 1024), *rest)

    return Workload(
        model=model,
        batch=lambda: (torch.ones(batch, seq, dtype=torch.long),),
        loss=lambda model, batch: model(*batch).square().mean(),
    )


def wide():
    """8 GiB of weights: nothing makes it small enough for 2 GiB."""
    return Workload(
        model=lambda: nn.Sequential(*(nn.Linear(16384, 16384, bias=False) for _ in range(8))),
        batch=lambda: (torch.ones(1, 16384),),
        loss=lambda model, batch: model(*batch).square().mean(),
    )
