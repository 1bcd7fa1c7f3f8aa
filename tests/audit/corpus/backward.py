"""What only the backward loses."""

import torch
from audit_corpus.cases import Program, fault
from audit_corpus.in_range import regression, squares
from torch import nn


@fault(
    "fp16", "mixed", "range", ("block", "block.fc", "block.out"), "backward", hardware="a100-40gb", witness="gradient"
)
def gradients_below_6e_8_behind_a_tiny_layer_scale(faulty):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.out = nn.Linear(16, 16), nn.Linear(16, 16)
            self.gain = nn.Parameter(torch.full((16,), 1e-11 if faulty else 1e-2))

        def forward(self, x):
            return x + self.gain * self.out(torch.tanh(self.fc(x)))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.block, self.head = nn.Linear(8, 16), Scaled(), nn.Linear(16, 1)

        def forward(self, x):
            return self.head(self.block(self.stem(x)))

    return Program(Net(), regression(), squares)


@fault("fp16", "true", "range", ("branch", ""), "backward", witness="gradient")
def auxiliary_loss_with_a_tiny_weight(faulty):
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(16, 4)

        def forward(self, x):
            return self.fc(x.detach()).pow(2).mean() * (1e-12 if faulty else 1e-2)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.branch, self.head = nn.Linear(8, 16), Branch(), nn.Linear(16, 1)

        def forward(self, x, y):
            h = self.stem(x)
            return {"loss": (self.head(h) - y).float().pow(2).mean() + self.branch(h).float()}

    x, y = regression()
    return Program(Net(), {"x": x, "y": y})


@fault("fp16", "true", "range", "middle", witness="gradient")
def derivative_of_a_square_root_near_zero(faulty):
    class Length(nn.Module):
        """The distance to a point that all rows are close to: their squares are below fp16's least."""

        def forward(self, x):
            return (x * x).sum(-1, keepdim=True).add(1e-12 if faulty else 1e-2).sqrt()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.middle, self.head = nn.Linear(8, 16), Length(), nn.Linear(1, 1)
            with torch.no_grad():
                self.stem.weight.mul_(1e-4 if faulty else 1.0)
                self.stem.bias.zero_()
                self.head.weight.fill_(20.0)

        def forward(self, x):
            return self.head(self.middle(self.stem(x)))

    return Program(Net(), regression(), squares)
