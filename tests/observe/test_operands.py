"""Tensors of different dtypes in one op: refused by a trace where they are by a real step."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from floatline.errors import ModelError
from floatline.observe.trace import trace
from floatline.step import TrainStep, Workload

X = torch.ones(4, 8)
AT = torch.tensor([0])
MEETINGS = {
    "mm": lambda y: y @ torch.ones(8, 8).double().requires_grad_(),
    "addmm": lambda y: F.linear(y, torch.ones(8, 8).requires_grad_(), torch.ones(8).double().requires_grad_()),
    "mv": lambda y: y @ torch.ones(8).double(),
    "convolution": lambda y: F.conv1d(y[None], torch.ones(4, 4, 3).bfloat16()),
    "index_add": lambda y: y.index_add(0, AT, torch.ones(1, 8).double()),
    "index_put": lambda y: y.index_put((AT,), torch.ones(1, 8).double()),
}


def work(meeting):
    return Workload(
        model=lambda: nn.Linear(8, 8), batch=lambda: (X,), loss=lambda model, batch: meeting(model(*batch)).sum()
    )


@pytest.mark.parametrize("name", MEETINGS)
def test_what_a_real_step_refuses_a_trace_refuses(name):
    asked = work(MEETINGS[name])
    with pytest.raises(RuntimeError):
        TrainStep(asked.build_model(), asked.optimizer, "32-true", asked.loss)((X,))
    with pytest.raises(ModelError, match="takes tensors of one dtype, but got float") as caught:
        trace(asked, hardware="cpu", precision="32-true")
    assert "test_operands.py" in caught.value.message and "cast one of them" in caught.value.hint


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_what_autocast_brings_together_is_fine(precision):
    asked = work(lambda y: y.float() @ torch.ones(8, 8))
    assert trace(asked, hardware="a100-40gb", precision=precision).events


def test_a_part_that_stays_in_bf16_is_found():
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 1)

        def forward(self, x):
            return self.head(self.body(x).bfloat16()).sum()

    asked = Workload(model=Part, batch=lambda: (X,))
    with pytest.raises(ModelError, match=r"got float32 and bfloat16|got bfloat16 and float32"):
        trace(asked, hardware="t4", precision="32-true")
    assert trace(asked, hardware="a100-40gb", precision="bf16-mixed").events
