"""More models of benchmarks/plan_accuracy.py, of families that no other row stands for.

They were picked by somebody who had not written the trace: video, depth, time series, state-space hybrids, attention
with sinks, in windows and in chunks, layers that share weights, a graph, a flow, and a program that is stepped by hand.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from plan_models import MODELS as FIRST
from plan_models import TEXT, VISION, VOCABULARY, Model, causal, hf, images, own, unpadded, words, zoo


def clips() -> dict[str, Tensor]:
    """Videos of eight frames with a class each."""
    g = zoo.generator(0)
    return {
        "pixel_values": torch.randn(2, 8, 3, 64, 64, generator=g),
        "labels": torch.randint(0, 10, (2,), generator=g),
    }


def depths() -> dict[str, Tensor]:
    """Pictures with a class for each pixel."""
    g = zoo.generator(0)
    batch = images(128, rows=2)
    return {**batch, "labels": torch.randint(0, 5, (2, 128, 128), generator=g)}


def series() -> dict[str, Tensor]:
    return {"past_values": torch.randn(16, 256, 4, generator=zoo.generator(0)), "future_values": torch.ones(16, 64, 4)}


def dated_series() -> dict[str, Tensor]:
    """Values with gaps and with features of their time."""
    g = zoo.generator(0)
    return {
        "past_values": torch.randn(16, 103, generator=g),
        "past_time_features": torch.randn(16, 103, 2, generator=g),
        "past_observed_mask": (torch.rand(16, 103, generator=g) > 0.1).float(),
        "future_values": torch.randn(16, 24, generator=g),
        "future_time_features": torch.randn(16, 24, 2, generator=g),
    }


def spectrograms() -> dict[str, Tensor]:
    g = zoo.generator(0)
    return {"input_values": torch.randn(4, 128, 64, generator=g), "labels": torch.randint(0, 10, (4,), generator=g)}


def asked() -> dict[str, Tensor]:
    """Text with the place of an answer in it."""
    batch = words()
    del batch["labels"]
    ids = batch["input_ids"]
    ids[ids == 2] = 5
    ids[:, [20, 40, 60]] = 2  # question, answer and text are told apart by three separators
    return {**batch, "start_positions": torch.tensor([3, 5, 7, 9]), "end_positions": torch.tensor([9, 9, 11, 20])}


SERIES = {"d_model": 128, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 4,
          "decoder_attention_heads": 4, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256}  # fmt: skip

MORE_TRANSFORMERS = [
    causal("gpt_oss", "GptOss", head_dim=32, sliding_window=64, num_local_experts=4, num_experts_per_tok=2),
    causal("olmoe", "Olmoe", num_experts=8, num_experts_per_tok=2),
    causal("lfm2", "Lfm2", layer_types=["conv", "full_attention", "conv", "full_attention"], block_ff_dim=768),
    causal("falcon_h1", "FalconH1", mamba_d_ssm=256, mamba_n_heads=8, mamba_d_head=32, mamba_d_state=16,
           mamba_n_groups=1, mamba_chunk_size=32),
    hf("xlnet", "XLNet", "LMHeadModel", unpadded, vocab_size=VOCABULARY, d_model=256, n_layer=4, n_head=8,
       d_inner=768),
    hf("albert", "Albert", "ForMaskedLM", words, **TEXT, embedding_size=64),
    hf("longformer", "Longformer", "ForQuestionAnswering", asked, **TEXT, attention_window=32),
    hf("funnel", "Funnel", "ForMaskedLM", words, vocab_size=VOCABULARY, d_model=256, n_head=8, d_head=32, d_inner=768,
       block_sizes=[2, 2, 2], num_decoder_layers=1),
    hf("fnet", "FNet", "ForMaskedLM", unpadded, **TEXT, use_tpu_fourier_optimizations=False),
    hf("videomae", "VideoMAE", "ForVideoClassification", clips, **VISION, image_size=64, patch_size=8, num_frames=8,
       tubelet_size=2, num_labels=10),
    hf("efficientnet", "EfficientNet", "ForImageClassification", partial(images, 96), image_size=96,
       width_coefficient=0.5, depth_coefficient=0.4, hidden_dim=640, num_labels=10),
    hf("mobilenet_v2", "MobileNetV2", "ForImageClassification", partial(images, 96), image_size=96, num_labels=10),
    hf("dpt", "DPT", "ForSemanticSegmentation", depths, **VISION, image_size=128, patch_size=16, is_hybrid=False,
       backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[32, 64, 128, 128], fusion_hidden_size=64, num_labels=5),
    hf("patchtst", "PatchTST", "ForPrediction", series, num_input_channels=4, context_length=256, patch_length=16,
       patch_stride=8, prediction_length=64, d_model=128, num_hidden_layers=3, num_attention_heads=4, ffn_dim=256),
    hf("time_series", "TimeSeriesTransformer", "ForPrediction", dated_series, prediction_length=24, context_length=96,
       num_time_features=2, **SERIES),
    hf("ast", "AST", "ForAudioClassification", spectrograms, **VISION, max_length=128, num_mel_bins=64, num_labels=10),
]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Plain torch


class Graph(nn.Module):
    """Attention over the edges of a graph, by scatters; double-precision positions; an edge list that is read."""

    def __init__(self, width: int = 128, depth: int = 3) -> None:
        super().__init__()
        self.stem, self.out = nn.Linear(16, width), nn.Linear(width, 10)
        self.query = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.score = nn.ModuleList(nn.Linear(2 * width + 1, 1) for _ in range(depth))
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor, place: Tensor, edges: Tensor, y: Tensor) -> Tensor:
        x = self.stem(x)
        start, end = edges
        far = ((place[start] - place[end]).norm(dim=-1, keepdim=True) * self.scale).float()
        for query, score in zip(self.query, self.score):
            weight = score(torch.cat([x[start], x[end], far], -1)).exp()
            total = torch.zeros_like(x[:, :1]).index_add_(0, end, weight)
            gathered = torch.zeros_like(x).index_add_(0, end, weight * query(x)[start])
            x = x + F.silu(gathered / total[:].clamp_min(1e-6))
        return F.cross_entropy(self.out(x), y)


def nodes() -> tuple[Tensor, ...]:
    g = zoo.generator(0)
    edges = torch.randint(0, 2000, (2, 16000), generator=g)
    return (torch.randn(2000, 16, generator=g), torch.randn(2000, 3, generator=g, dtype=torch.float64), edges,
            torch.randint(0, 10, (2000,), generator=g))  # fmt: skip


class Flow(nn.Module):
    """Couplings with log-determinants, a mixing by a matrix exponential's cousin (LU), a prior by distributions."""

    def __init__(self, width: int = 64, depth: int = 6) -> None:
        super().__init__()
        self.nets = nn.ModuleList(
            nn.Sequential(nn.Linear(width // 2, 256), nn.GELU(), parametrizations.weight_norm(nn.Linear(256, width)))
            for _ in range(depth)
        )
        self.mix = nn.ParameterList(torch.linalg.qr(torch.randn(width, width)).Q for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        log_det = x.new_zeros(())
        for net, mix in zip(self.nets, self.mix):
            kept, moved = (x @ mix).chunk(2, dim=-1)
            scale, shift = net(kept).chunk(2, dim=-1)
            x = torch.cat([kept, moved * scale.tanh().exp() + shift], -1)
            log_det = log_det + scale.tanh().sum(-1).mean() + torch.linalg.slogdet(mix).logabsdet
        prior = torch.distributions.Normal(x.new_zeros(()), x.new_ones(()))
        return -(prior.log_prob(x).sum(-1).mean() + log_det)


class Stepped(nn.Module):
    """Cells called step by step, a state that grows as a list, teacher forcing by chance, one embedding for both."""

    def __init__(self, width: int = 192) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width, padding_idx=0, scale_grad_by_freq=True)
        self.cell, self.top = nn.LSTMCell(width, width), nn.GRUCell(width, width)
        self.head = nn.Linear(width, VOCABULARY)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(input_ids)
        h = c = top = x.new_zeros(len(x), x.shape[-1])
        outs: list[Tensor] = []
        for at in range(x.shape[1]):
            fed = x[:, at] if not outs or torch.rand(()) < 0.8 else self.embed(self.head(outs[-1]).argmax(-1))
            h, c = self.cell(fed, (h, c))
            top = self.top(h, top)
            outs.append(F.dropout(top, 0.1, self.training))
        return F.cross_entropy(self.head(torch.stack(outs, 1)).flatten(0, 1), labels.flatten())


class Codebook(nn.Module):
    """Vectors replaced by the nearest of a codebook, which is moved by counts and not by a gradient; two losses."""

    def __init__(self, width: int = 64, codes: int = 512) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Conv1d(1, width, 8, 4, 2), nn.SiLU(), nn.Conv1d(width, width, 8, 4, 2))
        self.decode = nn.Sequential(
            nn.ConvTranspose1d(width, width, 8, 4, 2), nn.SiLU(), nn.ConvTranspose1d(width, 1, 8, 4, 2)
        )
        self.register_buffer("codes", torch.randn(codes, width))
        self.register_buffer("counts", torch.ones(codes))

    def forward(self, x: Tensor) -> Tensor:
        z = self.encode(x).transpose(1, 2)
        flat = z.reshape(-1, z.shape[-1])
        nearest = torch.cdist(flat, self.codes).argmin(-1)
        found = self.codes[nearest].view_as(z)
        with torch.no_grad():
            chosen = F.one_hot(nearest, len(self.codes)).to(flat.dtype)
            self.counts.mul_(0.99).add_(chosen.sum(0), alpha=0.01)
            self.codes.lerp_(chosen.T @ flat / chosen.sum(0)[:, None].clamp_min(1), 0.01)
        out = self.decode((z + (found - z).detach()).transpose(1, 2))
        spectrum = torch.stft(out[:, 0], 256, 64, window=torch.hann_window(256), return_complex=True).abs()
        target = torch.stft(x[:, 0], 256, 64, window=torch.hann_window(256), return_complex=True).abs()
        return F.l1_loss(spectrum, target) + F.mse_loss(out, x) + 0.25 * F.mse_loss(z, found.detach())


MORE_PLAIN = [
    Model("graph", zoo.seeded(Graph), nodes, own),
    Model("flow", zoo.seeded(Flow), lambda: (torch.randn(1024, 64, generator=zoo.generator(0)),), own),
    Model("stepped", zoo.seeded(Stepped), partial(zoo.text, 0, length=40, vocabulary=VOCABULARY,
          attention_mask=False), own),
    Model("codebook", zoo.seeded(Codebook), lambda: (torch.randn(8, 1, 8192, generator=zoo.generator(0)),), own),
]  # fmt: skip

MODELS = {**FIRST, **{model.name: model for model in (*MORE_TRANSFORMERS, *MORE_PLAIN)}}
