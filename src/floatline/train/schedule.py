"""Learning-rate schedules: linear warm-up, then cosine, linear or constant; a torch LambdaLR.

With peak `lr`, `w` warm-up updates, `n` updates in all and a final share `f`, update k (from 0) uses lr times

    (k + 1) / (w + 1)                              k < w
    f + (1 - f) * (1 + cos(pi * p)) / 2            cosine,   p = (k - w) / (n - w)
    f + (1 - f) * (1 - p)                          linear
    1                                              constant
"""

from __future__ import annotations

import math

import torch


def factor(step: int, *, kind: str, steps: int, warmup: int, final: float) -> float:
    """Return the share of the peak learning rate that update `step` (0-based) uses.

    >>> [round(factor(k, kind="linear", steps=4, warmup=0, final=0.0), 2) for k in range(4)]
    [1.0, 0.75, 0.5, 0.25]
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if kind == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    shape = (1 + math.cos(math.pi * progress)) / 2 if kind == "cosine" else 1 - progress
    return final + (1 - final) * shape


def make_schedule(
    optimizer: torch.optim.Optimizer, *, kind: str, steps: int, warmup: int, final: float
) -> torch.optim.lr_scheduler.LambdaLR:
    """Return the scheduler for `optimizer`, whose groups hold the peak learning rate."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: factor(step, kind=kind, steps=steps, warmup=warmup, final=final)
    )
