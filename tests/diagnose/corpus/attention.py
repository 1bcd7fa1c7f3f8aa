"""Rows of attention that are masked throughout, in every way that attention is computed."""

import torch
from torch import nn
from torch.nn import functional as F

from corpus.cases import fault
from corpus.domains import layer, rows

OUT = float("-inf")
KERNELS = {"_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_attention_math", "_softmax",
           "_safe_softmax", "bmm"}  # fmt: skip


@fault("forward", "_softmax", "fully masked row", cured=True)
def softmax_over_a_row_masked_throughout():
    model, x = layer(), rows(4)
    mask = torch.ones(4, 4).triu(1).bool()
    mask[2] = True

    def forward():
        scores = (model(x) @ model(x).T).masked_fill(mask, OUT)
        return torch.softmax(scores, dim=-1).square().sum()  # HERE

    return forward, model


@fault("forward", "_softmax", "fully masked row", module="attention")
def padded_sample_without_a_token():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x, mask):
            q, k, v = self.qkv(x).chunk(3, -1)
            scores = q @ k.transpose(1, 2) / 8**0.5
            scores = scores + torch.zeros_like(scores).masked_fill(~mask[:, None, :], OUT)
            weights = scores.softmax(-1)  # HERE
            return weights @ v

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = Attention()
            self.head = nn.Linear(8, 2)

        def forward(self, x, mask):
            return self.head(self.attention(x, mask))

    model = Net()
    x = torch.randn(3, 5, 8)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1] = False
    return lambda: model(x, mask).square().mean(), model


@fault("forward", KERNELS, "fully masked row", module="")
def multihead_attention_with_everything_padded():
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(3, 5, 8)
    padded = torch.zeros(3, 5, dtype=torch.bool)
    padded[2] = True
    return lambda: model(x, x, x, key_padding_mask=padded)[0].square().mean(), model  # HERE


@fault("forward", "_log_softmax", "fully masked row")
def log_softmax_over_nothing():
    model, x = layer(), rows(3)
    legal = torch.tensor([[True, True, False, True], [False] * 4, [True] * 4])

    def forward():
        logits = torch.where(legal, model(x), torch.tensor(OUT))
        chosen = F.log_softmax(logits, dim=-1)  # HERE
        return -chosen[:, 0].sum()

    return forward, model


@fault("forward", "sub", "infinity minus infinity")
def softmax_by_hand_over_a_masked_row():
    model, x = layer(), rows(3)
    legal = torch.tensor([[True, True, False, True], [False] * 4, [True] * 4])

    def forward():
        scores = model(x).masked_fill(~legal, OUT)
        e = torch.exp(scores - scores.amax(-1, keepdim=True))  # HERE
        return (e / e.sum(-1, keepdim=True))[:, 0].sum()

    return forward, model


@fault("forward", "logsumexp", "masked value used")
def free_energy_of_a_masked_row():
    model, x = layer(), rows(3)
    legal = torch.tensor([[True, True, False, True], [False] * 4, [True] * 4])

    def forward():
        scores = model(x).masked_fill(~legal, OUT)
        return torch.logsumexp(scores, dim=-1).sum()  # HERE

    return forward, model


@fault("forward", "sum", "masked value used")
def sum_over_masked_scores():
    model, x = layer(), rows(3)
    keep = torch.tensor([True, True, False, True])

    def forward():
        scores = model(x).masked_fill(~keep, OUT)
        return scores.sum()  # HERE

    return forward, model


@fault("forward", "mean", "masked value used")
def mean_over_a_running_minimum_of_nothing():
    model, x = layer(), rows(3)

    def forward():
        best = torch.full((3,), float("inf"))
        best[:2] = torch.minimum(best[:2], model(x)[:2, 0])
        return best.mean()  # HERE

    return forward, model


@fault("forward", "_softmax", "fully masked row", cured=True)
def relative_bias_with_a_masked_row():
    model, x, bias = layer(), rows(4), torch.randn(4, 4)
    bias[1] = OUT

    def forward():
        scores = model(x) @ x.T + bias
        return scores.softmax(-1).square().sum()  # HERE

    return forward, model
