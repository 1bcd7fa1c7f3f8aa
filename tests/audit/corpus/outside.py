"""Faults in code that no rule can name: the top of the model, the loss function."""

import torch
from audit_corpus.cases import Program, fault
from audit_corpus.in_range import regression, squares
from torch import nn


@fault("fp16", "true", "range", "", curable=False)
def loss_scaled_by_hand(faulty):
    def loss(model, batch):
        x, y = batch
        value = (model(x) - y.to(model.weight.dtype)).abs().mean()
        return value * (2.0**17 if faulty else 2.0)  # HERE

    return Program(nn.Linear(8, 1), regression(), loss)


@fault("fp16", "true", "range", "", curable=False)
def squared_errors_summed_in_the_loss(faulty):
    def loss(model, batch):
        x, y = batch
        error = model(x) - (y * (300 if faulty else 1)).to(model.weight.dtype)
        return (error * error).sum() / error.numel()  # HERE

    return Program(nn.Linear(8, 1), regression(), loss)


@fault("bf16", "true", "rounding", "", curable=False)
def difference_of_large_numbers_at_the_top(faulty):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.head = nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(4, 1)

        def forward(self, x):
            far = 500.0 if faulty else 0.0
            return self.head((self.left(x) + far) - (self.right(x) + far))  # HERE

    return Program(Net(), regression(), squares)


@fault("bf16", "true", "rounding", "", curable=False)
def log_of_one_minus_a_probability_in_the_loss(faulty):
    def loss(model, batch):
        x, _ = batch
        p = torch.sigmoid(model(x) - (7 if faulty else 0))
        return -torch.log(1 - p).mean()  # HERE

    return Program(nn.Linear(8, 1), regression(), loss)
