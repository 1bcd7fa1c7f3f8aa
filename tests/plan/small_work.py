"""Small workloads and cards whose memory can be set, for the tests of the planner."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from floatline.hardware import Hardware, lookup
from floatline.step import Workload

MIB = 2**20


class Blocks(nn.Module):
    """Repeated layers with wide activations; the batch has rows, the last layer counts as no layer of the list."""

    def __init__(self, width: int = 256, depth: int = 6) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(depth)
        )
        self.head = nn.Linear(width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x).square().mean()


def blocks(rows: int = 1024, width: int = 256, depth: int = 6, optimizer=torch.optim.AdamW) -> Workload:
    return Workload(model=lambda: Blocks(width, depth), batch=lambda: (torch.ones(rows, width),), optimizer=optimizer)


def fused(parameters):
    return torch.optim.AdamW(parameters, fused=True)


def card(mib: float, name: str = "a100-40gb") -> Hardware:
    """A catalog card with another memory and no context, so that small models fill it."""
    return replace(lookup(name), name=f"{name} with {mib:g} MiB", memory=int(mib * MIB), context=0)
