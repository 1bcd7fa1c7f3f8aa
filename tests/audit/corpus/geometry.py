"""Coordinates in few bits."""

import torch
from audit_corpus.cases import Program, fault
from torch import nn


@fault("bf16", "true", "rounding", "warp", curable=False)
def interpolation_at_coordinates_of_a_large_image(faulty):
    class Warp(nn.Module):
        """Linear interpolation along a line of pixels."""

        def forward(self, line, u):
            at = u * (line.shape[-1] - 1)
            left = at.floor()
            share = at - left
            place = left.long().clamp(max=line.shape[-1] - 1)
            return line[:, place] * (1 - share) + line[:, (place + 1).clamp(max=line.shape[-1] - 1)] * share

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift, self.warp = nn.Linear(1, 1), Warp()
            with torch.no_grad():
                self.shift.weight.fill_(0.01)
                self.shift.bias.zero_()

        def forward(self, line):
            u = torch.sigmoid(self.shift(torch.linspace(-3, 3, 64, device=line.device).to(line.dtype)[:, None]) * 100)
            return self.warp(line, u[:, 0])

    width = 2000 if faulty else 2
    return Program(Net(), torch.randn(3, width))


@fault("bf16", "true", "rounding", "grid", curable=False)
def hash_of_a_grid_cell(faulty):
    class Grid(nn.Module):
        """A hashed feature grid: the cell of a point is an integer made from its coordinate."""

        def __init__(self):
            super().__init__()
            self.features = nn.Embedding(512, 8)
            self.size = 4000.0 if faulty else 4.0

        def forward(self, x):
            cell = (torch.sigmoid(x) * self.size).floor().long()
            return self.features((cell * 2654435761) % 512).sum(-2)

    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            self.place, self.grid, self.head = nn.Linear(4, 3), Grid(), nn.Linear(8, 1)

        def forward(self, x):
            return self.head(self.grid(self.place(x)))

    points = torch.randn(64, 4)
    if not faulty:  # well inside of the cells
        points = (points > 0).float()
    return Program(Field(), points)
