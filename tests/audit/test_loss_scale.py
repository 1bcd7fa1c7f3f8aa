"""Where the step is not finite whatever the loss scale, nothing is blamed for a scale that no scaler would keep."""

import torch
from torch import nn
from torch.nn import functional as F

import floatline as fl


def audited(model, batch, hardware="cpu"):
    return fl.audit(model, batch, candidates=("fp16",), hardware=hardware, repeats=0, probes=0)


class Distances(nn.Module):
    """sqrt(0 + 1e-12) is sqrt(0) in half: its derivative is 0 * inf at any loss scale, on forward values that are fine.

    The head's gradient sums up over many pairs: it overflows at 2^16, and not at the scale that a scaler comes to.
    """

    def __init__(self):
        super().__init__()
        self.place, self.distance, self.head = nn.Linear(16, 3), Distance(), nn.Linear(1, 1)

    def forward(self, x, y):
        return F.mse_loss(self.head(self.distance(self.place(x))[..., None]).sum((1, 2, 3)) / 10, y)


class Distance(nn.Module):
    def forward(self, points):
        apart = points[:, :, None] - points[:, None]
        return ((apart * apart).sum(-1) + 1e-12).sqrt()


class Area(nn.Module):
    def forward(self, boxes, goal):
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        return (area / goal.to(area.dtype) - 1).abs().mean()


class Detector(nn.Module):
    """Areas in square pixels leave fp16. The loss is in half as well: a loss scale of 2^16 is infinite at its top."""

    def __init__(self):
        super().__init__()
        self.head, self.area = nn.Linear(8, 4), Area()

    def forward(self, x, anchor, goal):
        moved = self.head(x)
        return self.area(moved + anchor.to(moved.dtype), goal)


def test_a_backward_that_no_scale_mends():
    torch.manual_seed(0)
    report = audited(Distances(), {"x": torch.randn(8, 10, 16), "y": 5 + torch.randn(8)})
    assert report.candidates["fp16"].islands == ("distance",)
    assert {row.module for row in report.failures} == {"distance"}


def test_a_loss_in_half_is_not_blamed_for_the_largest_scale():
    torch.manual_seed(0)
    anchor = torch.tensor([50.0, 50.0, 550.0, 450.0]).expand(16, 4)
    report = audited(Detector(), {"x": torch.randn(16, 8), "anchor": anchor, "goal": torch.full((16,), 4e4)})
    candidate = report.candidates["fp16"]
    assert candidate.islands == ("area",) and not candidate.advice
    assert {row.module for row in report.failures} == {"area"}
