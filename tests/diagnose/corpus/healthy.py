"""Programs in which infinities and NaN come and go as they should: nothing is to be found."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from corpus.cases import healthy
from corpus.domains import layer, rows
from corpus.half import Block, autocast

OUT = float("-inf")


def adam(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


@healthy
def causal_mask():
    model, x = layer(), rows(4)
    mask = torch.full((4, 4), OUT).triu(1)
    return lambda: (torch.softmax(model(x) @ model(x).T + mask, -1) @ x).sum(), model, adam(model)


@healthy
def padding_mask_and_causal_mask():
    model, x = layer(), rows(4)
    hidden = torch.ones(4, 4).triu(1).bool()
    hidden[2:, 0] = True

    def forward():
        scores = (model(x) @ model(x).T).masked_fill(hidden, OUT)
        return (scores.softmax(-1) @ x).sum()

    return forward, model, adam(model)


@healthy
def masks_of_finfo_min():
    model, x = layer(), rows(4)
    mask = torch.full((4, 4), torch.finfo(torch.float32).min).triu(1)
    return lambda: (torch.softmax(model(x) @ model(x).T + mask, -1) @ x).sum(), model, adam(model)


@healthy
def double_where():
    model, x = layer(), rows()

    def forward():
        h = F.relu(model(x))
        safe = torch.where(h > 0, h, 1.0)
        return torch.where(h > 0, safe.log() + safe.sqrt() + 1 / safe, 0.0).sum()

    return forward, model, adam(model)


@healthy
def bad_branch_without_a_gradient():
    model, x = layer(), rows()

    def forward():
        h = model(x)
        weight = torch.where(h > 0, torch.log(h.detach()), 0.0)
        return (h * weight).sum()

    return forward, model, adam(model)


@healthy
def maximum_with_infinite_padding():
    model, x = layer(), rows()
    keep = torch.tensor([[True, True, False, False], [True] * 4, [True, False, False, False]])
    return lambda: model(x).masked_fill(~keep, OUT).amax(-1).sum(), model, adam(model)


@healthy
def minimum_that_starts_at_infinity():
    model, x = layer(), rows()

    def forward():
        best = torch.full((3,), float("inf"))
        for column in model(x).unbind(-1):
            best = torch.minimum(best, column)
        return best.sum()

    return forward, model, adam(model)


@healthy
def max_pooling_with_padding():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(3, padding=1), nn.Flatten(), nn.LazyLinear(1))
    images = torch.randn(2, 1, 8, 8)
    model(images)
    return lambda: model(images).mean(), model, adam(model)


@healthy
def logsumexp_over_some_masked():
    model, x = layer(), rows()
    keep = torch.tensor([True, False, True, True])
    return lambda: torch.logsumexp(model(x).masked_fill(~keep, OUT), -1).sum(), model, adam(model)


@healthy
def gumbel_softmax():
    model, x = layer(), rows()
    return lambda: F.gumbel_softmax(model(x), hard=True)[:, 0].sum(), model, adam(model)


@healthy
def logarithm_of_a_mask():
    model, x = layer(), rows()
    keep = torch.tensor([1.0, 0.0, 1.0, 1.0])
    return lambda: torch.softmax(model(x) + keep.log(), -1)[:, 0].sum(), model, adam(model)


@healthy
def observer_with_infinite_buffers():
    class Observer(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("lowest", torch.tensor(float("inf")))
            self.register_buffer("highest", torch.full((4,), OUT))

        def forward(self, x):
            h = self.linear(x)
            self.lowest = torch.minimum(self.lowest, h.detach().min())
            self.highest.copy_(torch.maximum(self.highest, h.detach().amax(0)))
            return h.sum()

    model, x = Observer(), rows()
    return lambda: model(x), model, adam(model)


@healthy
def nan_in_padding_that_is_sliced_off():
    model, x = layer(), rows(5)
    x[3:] = float("nan")
    return lambda: model(x[:3]).sum() + model(x).detach()[:3].sum(), model, adam(model)


@healthy
def nan_where_it_is_ignored():
    model, x = layer(), rows()
    x[1, 2] = float("nan")
    return lambda: (model(torch.nan_to_num(x)) - torch.nanmean(x)).sum() + x.nansum(), model, adam(model)


@healthy
def top_k_filter():
    model, x = layer(4, 8), rows()

    def forward():
        logits = model(x)
        kth = logits.topk(3, dim=-1).values[:, -1:]
        logits = torch.where(logits < kth, torch.full_like(logits, OUT), logits)
        p = logits.softmax(-1)
        torch.multinomial(p, 1)
        return -(p * p.clamp_min(1e-9).log()).sum()

    return forward, model, adam(model)


@healthy
def sdpa_with_a_boolean_mask():
    model, x = layer(8, 24), torch.randn(2, 5, 8)
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    mask[1, :, :, 3:] = False

    def forward():
        q, k, v = (t.view(2, 5, 2, 4).transpose(1, 2) for t in model(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).square().sum()

    return forward, model, adam(model)


@healthy
def sdpa_over_a_masked_row_gives_zeros():
    model, x = layer(8, 24), torch.randn(2, 5, 8)
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    mask[1] = False

    def forward():
        q, k, v = (t.view(2, 5, 2, 4).transpose(1, 2) for t in model(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).square().sum()

    return forward, model, adam(model)


@healthy
def encoder_layer_gives_zeros_for_a_padded_sample():
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x = torch.randn(3, 5, 8)
    padded = torch.zeros(3, 5, dtype=torch.bool)
    padded[0] = True
    return lambda: model(x, src_key_padding_mask=padded).square().mean(), model, adam(model)


@healthy
def ctc_with_zero_infinity():
    model, x = layer(4, 6), torch.randn(5, 2, 4)
    targets = torch.tensor([[1, 2, 3, 4, 5], [1, 1, 1, 1, 1]])

    def forward():
        log_p = model(x).log_softmax(-1)
        return F.ctc_loss(log_p, targets, torch.tensor([5, 5]), torch.tensor([3, 5]), zero_infinity=True)

    return forward, model, adam(model)


@healthy
def scaled_loss():
    model, x = layer(), rows()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)

    def forward():
        with autocast(torch.float16):
            return scaler.scale(model(x).float().mean())

    return forward, model


@healthy
def dropout_and_padding_index():
    model = nn.Sequential(nn.Embedding(10, 8, padding_idx=0), nn.Dropout(0.5), nn.Linear(8, 2))
    ids = torch.tensor([[1, 2, 0], [3, 0, 0]])
    return lambda: model(ids).mean(), model, adam(model)


@healthy
def checkpointed_blocks():
    model, x = nn.ModuleList([Block(), Block()]), rows(3, 8)

    def forward():
        h = checkpoint(model[0], x, use_reentrant=False)
        return checkpoint(model[1], h, use_reentrant=True).mean()

    return forward, model, adam(model)


@healthy
def gradient_penalty():
    model, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), rows()

    def forward():
        seen = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(seen).sum(), seen, create_graph=True)
        return ((slope.norm(dim=-1) - 1) ** 2).mean()

    return forward, model, adam(model)


@healthy
def log_sigmoid_instead_of_log_of_sigmoid():
    model, x = layer(), rows()
    return lambda: -F.logsigmoid(model(x) * 1e5).mean(), model, adam(model)


@healthy
def empty_memory_that_is_written_before_it_is_read():
    model, x = layer(), rows()

    def forward():
        out = torch.empty(3, 4)
        out.numpy()[:] = float("nan")
        out[:] = model(x)
        return out.sum()

    return forward, model, adam(model)


@healthy
def causal_attention_by_triu_of_empty():
    model, x = layer(), rows(4)

    def forward():
        mask = torch.empty(4, 4).fill_(OUT).triu_(1)
        return torch.softmax(model(x) @ model(x).T + mask, -1)[:, 0].sum()

    return forward, model, adam(model)


@healthy
def rows_without_a_target_are_selected_away():
    model, x = layer(), rows()
    labels = torch.tensor([1, -100, 2])

    def forward():
        each = F.cross_entropy(model(x), labels, reduction="none")
        count = (labels != -100).sum()
        return each.sum() / count.clamp_min(1)

    return forward, model, adam(model)


@healthy
def beam_scores_of_finished_beams():
    model, x = layer(), rows()

    def forward():
        score = torch.zeros(3).masked_fill(torch.tensor([False, True, True]), OUT)
        total = score[:, None] + model(x).log_softmax(-1)
        best = total.flatten().topk(2).values
        return best.sum()

    return forward, model, adam(model)


@healthy
def alibi_and_distance_bias():
    model, x = layer(), rows(4)
    distance = torch.arange(4.0)[:, None] - torch.arange(4.0)[None]

    def forward():
        bias = torch.where(distance >= 0, -distance, OUT)
        return torch.softmax(model(x) @ model(x).T + bias, -1)[:, 0].sum()

    return forward, model, adam(model)


@healthy
def viterbi_in_the_log_domain():
    model, x = layer(), rows(4)

    def forward():
        alpha = torch.full((4,), OUT)
        alpha[0] = 0
        for emission in model(x).log_softmax(-1):
            alpha = torch.logsumexp(alpha[:, None] + emission[None], dim=0)
        return -alpha.logsumexp(0)

    return forward, model, adam(model)


@healthy
def float_labels_with_nan_that_are_selected_away():
    model, x = layer(4, 1), rows()
    labels = torch.tensor([1.0, float("nan"), 0.5])

    def forward():
        known = ~labels.isnan()
        return F.mse_loss(model(x)[:, 0][known], labels[known])

    return forward, model, adam(model)


@healthy
def huge_loss_in_bf16_that_stays_finite():
    model, x = layer().bfloat16(), rows().bfloat16() * 1e10
    return lambda: model(x).float().square().mean(), model


@healthy
def power_of_two_of_minus_infinity():
    model, x = layer(), rows()
    gap = torch.tensor([0.0, -1.0, OUT, -2.0])
    return lambda: (model(x) * gap.exp()).sum(), model, adam(model)


@healthy
def derivatives_that_torch_makes_finite_at_the_edge():
    model, x = layer(), rows()
    with torch.no_grad():
        model.bias.zero_()
    x[0] = 0

    def forward():
        h = model(x)
        same = h[:, :1].expand(3, 4)
        return h.norm(dim=-1).sum() + same.std(-1).sum() + torch.cdist(h, h).sum() + F.normalize(h).sum()

    return forward, model, adam(model)
