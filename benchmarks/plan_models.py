"""The models of benchmarks/plan_accuracy.py: many families, large enough that activations and states both matter.

Those of transformers come from their configs, a few layers deep; the others are plain torch, each with a habit that a
prediction could stumble over: masks as indices, values that are read, own gradients, weights made anew each step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

TESTS = Path(__file__).parent.parent / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "contracts")]

import other_models as others  # noqa: E402

import zoo  # noqa: E402

VOCABULARY = 4096
TEXT = {**others.TEXT, "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
        "num_attention_heads": 8, "max_position_embeddings": 512}  # fmt: skip
VISION = {key: TEXT[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
BOTH_SIDES = {"d_model": 256, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 8,
              "decoder_attention_heads": 8, "encoder_ffn_dim": 768, "decoder_ffn_dim": 768,
              "decoder_start_token_id": 3}  # fmt: skip


@dataclass(frozen=True)
class Model:
    """One model with its batch.

    Attributes:
        build: () -> model, the same weights each time.
        batch: () -> the batch of one update.
        loss: For TrainStep; None is the model's own.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[], Any]
    loss: Callable[[nn.Module, Any], Tensor] | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Batches

words = partial(zoo.text, 0, length=160, vocabulary=VOCABULARY, shorter=(0, 30, 50, 60))
unpadded = partial(zoo.text, 0, length=160, vocabulary=VOCABULARY, attention_mask=False)


def pairs() -> dict[str, Tensor]:
    """Text with a shorter text as its target."""
    batch = words()
    return {**batch, "labels": torch.where(torch.arange(48) == 0, 7, batch["labels"][:, 3:51])}


def labelled() -> dict[str, Tensor]:
    batch = words()
    return {**batch, "labels": batch["input_ids"].sum(1) % 2}


def images(side: int, rows: int = 8, classes: int = 10) -> dict[str, Tensor]:
    g = zoo.generator(0)
    return {
        "pixel_values": torch.randn(rows, 3, side, side, generator=g),
        "labels": torch.randint(0, classes, (rows,), generator=g),
    }


def segmented() -> dict[str, Tensor]:
    batch = images(128, rows=4)
    return {**batch, "labels": torch.randint(0, 5, (4, 128, 128), generator=zoo.generator(0))}


def boxed() -> dict[str, Any]:
    """Pictures in which objects are marked by class and box."""
    g = zoo.generator(0)
    labels = [
        {"class_labels": torch.randint(0, 5, (n,), generator=g), "boxes": torch.rand(n, 4, generator=g) / 4 + 0.3}
        for n in (3, 1)
    ]
    return {"pixel_values": images(128, rows=2)["pixel_values"], "labels": labels}


def captioned(side: int = 64) -> dict[str, Any]:
    ids = torch.randint(5, VOCABULARY, (8, 48), generator=zoo.generator(0))
    ids[:, -1] = 2
    return {"input_ids": ids, "pixel_values": images(side)["pixel_values"], "return_loss": True}


def looked_at(side: int, tokens: int, rows: int = 4) -> dict[str, Tensor]:
    """Text that begins with the image's tokens."""
    batch = zoo.text(0, length=tokens + 64, vocabulary=VOCABULARY, rows=rows)
    batch["input_ids"][:, :tokens], batch["labels"][:, :tokens] = 3, -100
    return {**batch, "pixel_values": images(side, rows=rows)["pixel_values"]}


def in_pieces() -> dict[str, Tensor]:
    """As `looked_at`, with the images in a dimension of their own."""
    batch = looked_at(64, 16)
    return {**batch, "pixel_values": batch["pixel_values"][:, None]}


def spoken() -> dict[str, Tensor]:
    g = zoo.generator(0)
    return {
        "input_features": torch.randn(4, 80, 400, generator=g),
        "labels": torch.randint(5, VOCABULARY, (4, 40), generator=g),
    }


def waves() -> dict[str, Tensor]:
    g = zoo.generator(0)
    return {"input_values": torch.randn(4, 8000, generator=g), "labels": torch.randint(1, 32, (4, 12), generator=g)}


def padded_waves() -> dict[str, Tensor]:
    batch = waves()
    lengths = torch.tensor([8000, 7000, 6000, 5000])
    return {**batch, "attention_mask": (torch.arange(8000) < lengths[:, None]).long()}


# ---------------------------------------------------------------------------------------------------------------------
# Models of transformers


def hf(name: str, family: str, kind: str, batch: Callable[[], Any], **settings: Any) -> Model:
    case = others.transformers_case(name, family, kind, batch, **settings)
    return Model(name, case.build, batch)


def causal(name: str, family: str, batch: Callable[[], Any] = words, **settings: Any) -> Model:
    return hf(name, family, "ForCausalLM", batch, **{**TEXT, "num_key_value_heads": 4, **settings})


def clip(family: str = "CLIP") -> nn.Module:
    import transformers

    config = getattr(transformers, family + "Config")(
        text_config={**TEXT, "projection_dim": 128, "max_position_embeddings": 64},
        vision_config={**VISION, "image_size": 64, "patch_size": 8, "projection_dim": 128},
    )
    return getattr(transformers, family + "Model")(config)  # type: ignore[no-any-return]


def llava() -> nn.Module:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION, image_size=64, patch_size=8),
        text_config=LlamaConfig(**TEXT),
        image_token_index=3,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return LlavaForConditionalGeneration(config)


def idefics3(family: str = "Idefics3") -> nn.Module:
    import transformers

    config = getattr(transformers, family + "Config")(
        vision_config={**VISION, "image_size": 64, "patch_size": 8},
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_id=3,
        scale_factor=2,
    )
    return getattr(transformers, family + "ForConditionalGeneration")(config)  # type: ignore[no-any-return]


def gemma3_vl() -> nn.Module:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    config = Gemma3Config(
        text_config={**TEXT, "num_key_value_heads": 4, "head_dim": 32, "sliding_window": 64},
        vision_config={**VISION, "image_size": 64, "patch_size": 8},
        mm_tokens_per_image=16,
        image_token_index=3,
        boi_token_index=1,
        eoi_token_index=2,
    )
    model = Gemma3ForConditionalGeneration(config)
    nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.02)  # else 0: Inf gradients
    return model


def gemma3_batch() -> dict[str, Tensor]:
    batch = looked_at(64, 16)
    return {**batch, "token_type_ids": (batch["input_ids"] == 3).long()}


def qwen_vl(generation: str) -> nn.Module:
    import transformers

    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}
    vision: dict[str, Any] = {"depth": 4, "num_heads": 8, "patch_size": 4, "spatial_merge_size": 2,
                              "temporal_patch_size": 2}  # fmt: skip
    if generation == "Qwen2_5_VL":
        vision |= {"hidden_size": 128, "intermediate_size": 384, "out_hidden_size": 256, "window_size": 32,
                   "fullatt_block_indexes": [1, 3]}  # fmt: skip
    else:
        vision |= {"embed_dim": 128, "hidden_size": 256, "mlp_ratio": 3}
    config = getattr(transformers, generation + "Config")(
        text_config={**TEXT, "num_key_value_heads": 4, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=1,
        video_token_id=2,
        vision_start_token_id=3,
        vision_end_token_id=4,
    )
    return getattr(transformers, generation + "ForConditionalGeneration")(config)  # type: ignore[no-any-return]


seen = partial(zoo.seen_text, 0, length=256, side=16, vocabulary=VOCABULARY, shorter=(0, 60, 20, 50))


def detr() -> nn.Module:
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(
        hidden_sizes=[32, 64, 128, 256], depths=[1, 1, 1, 1], embedding_size=32, out_features=["stage4"]
    )
    config = DetrConfig(
        backbone_config=backbone, use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, num_queries=20,
        num_labels=5, d_model=128, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=256, decoder_ffn_dim=256,
    )  # fmt: skip
    return DetrForObjectDetection(config)


WAV = {**VISION, "vocab_size": 32, "conv_dim": (128,) * 4, "conv_stride": (5, 2, 2, 2), "conv_kernel": (10, 3, 3, 2),
       "num_feat_extract_layers": 4, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
       "ctc_loss_reduction": "mean", "ctc_zero_infinity": True}  # fmt: skip

TRANSFORMERS = [
    Model("gpt2", zoo.seeded(partial(zoo.gpt2, 256, 6, 8, VOCABULARY, 512)), words),
    causal("llama", "Llama"),
    causal("qwen3", "Qwen3", head_dim=32),
    causal("gemma2", "Gemma2", head_dim=32, sliding_window=64),
    causal("gemma3", "Gemma3", head_dim=32, sliding_window=64),
    causal("opt", "OPT", ffn_dim=768, word_embed_proj_dim=256),
    causal("neox", "GPTNeoX"),
    causal("bloom", "Bloom", n_layer=4, n_head=8),
    causal("mixtral", "Mixtral", num_local_experts=4, output_router_logits=True),
    causal("qwen3_moe", "Qwen3Moe", head_dim=32, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=192),
    causal(
        "deepseek_v3", "DeepseekV3", num_key_value_heads=8, n_routed_experts=8, num_experts_per_tok=2, n_group=2,
        topk_group=1, moe_intermediate_size=192, kv_lora_rank=64, q_lora_rank=96, qk_rope_head_dim=16,
        qk_nope_head_dim=32, v_head_dim=32, first_k_dense_replace=1,
    ),
    hf("mamba", "Mamba", "ForCausalLM", unpadded, vocab_size=VOCABULARY, hidden_size=192, state_size=8,
       num_hidden_layers=2, time_step_rank=12),
    hf("mamba2", "Mamba2", "ForCausalLM", unpadded, vocab_size=VOCABULARY, hidden_size=192, state_size=16,
       num_hidden_layers=2, num_heads=12, head_dim=32, n_groups=2, chunk_size=32),
    hf("rwkv", "Rwkv", "ForCausalLM", partial(zoo.text, 0, length=48, vocabulary=VOCABULARY, attention_mask=False),
       vocab_size=VOCABULARY, hidden_size=192, attention_hidden_size=192, num_hidden_layers=3, context_length=64),
    causal("qwen3_next", "Qwen3Next", head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=192,
           shared_expert_intermediate_size=192, linear_num_key_heads=4, linear_num_value_heads=8,
           linear_key_head_dim=32, linear_value_head_dim=32),
    hf("bert", "Bert", "ForMaskedLM", words, **TEXT),
    hf("deberta_v2", "DebertaV2", "ForSequenceClassification", labelled, **TEXT, relative_attention=True,
       pos_att_type=["p2c", "c2p"], position_buckets=32),
    hf("modernbert", "ModernBert", "ForMaskedLM", words, **TEXT, local_attention=32, cls_token_id=1, sep_token_id=2),
    hf("t5", "T5", "ForConditionalGeneration", pairs, vocab_size=VOCABULARY, d_model=256, d_kv=32, d_ff=768,
       num_layers=3, num_heads=8, decoder_start_token_id=0, use_cache=False),
    hf("bart", "Bart", "ForConditionalGeneration", pairs, **TEXT, **BOTH_SIDES),
    hf("vit", "ViT", "ForImageClassification", partial(images, 128), **VISION, image_size=128, patch_size=8,
       num_labels=10),
    hf("swin", "Swin", "ForImageClassification", partial(images, 128), image_size=128, patch_size=4, embed_dim=64,
       depths=[2, 2, 2], num_heads=[2, 4, 8], window_size=4, num_labels=10),
    hf("convnext", "ConvNext", "ForImageClassification", partial(images, 96), num_stages=3,
       hidden_sizes=[64, 128, 256], depths=[2, 2, 4], drop_path_rate=0.1, num_labels=10),
    hf("resnet", "ResNet", "ForImageClassification", partial(images, 128), embedding_size=64,
       hidden_sizes=[128, 256, 512], depths=[2, 2, 2], num_labels=10),
    hf("segformer", "Segformer", "ForSemanticSegmentation", segmented, depths=[2, 2, 2, 2],
       hidden_sizes=[32, 64, 160, 256], decoder_hidden_size=256, num_labels=5),
    Model("detr", zoo.seeded(detr), boxed),
    Model("clip", zoo.seeded(clip), captioned),
    Model("siglip", zoo.seeded(partial(clip, "Siglip")), captioned),
    hf("vit_mae", "ViTMAE", "ForPreTraining", lambda: {"pixel_values": images(128)["pixel_values"]}, **VISION,
       image_size=128, patch_size=8, decoder_hidden_size=128, decoder_intermediate_size=256,
       decoder_num_hidden_layers=2, decoder_num_attention_heads=4),
    hf("whisper", "Whisper", "ForConditionalGeneration", spoken, vocab_size=VOCABULARY, num_mel_bins=80,
       max_source_positions=200, max_target_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
       suppress_tokens=None, begin_suppress_tokens=None, **BOTH_SIDES),
    hf("wav2vec2", "Wav2Vec2", "ForCTC", waves, **WAV, layerdrop=0.0, mask_time_prob=0.05),
    hf("hubert", "Hubert", "ForCTC", padded_waves, **WAV, layerdrop=0.0, mask_time_prob=0.0),
    Model("qwen2_vl", zoo.seeded(partial(qwen_vl, "Qwen2VL")), seen),
    Model("qwen25_vl", zoo.seeded(partial(qwen_vl, "Qwen2_5_VL")), seen),
    Model("qwen3_vl", zoo.seeded(partial(zoo.qwen3_vl, 256, 4, 128, 4, VOCABULARY)), seen),
    Model("llava", zoo.seeded(llava), partial(looked_at, 64, 64)),
    Model("idefics3", zoo.seeded(idefics3), in_pieces),
    Model("smolvlm", zoo.seeded(partial(idefics3, "SmolVLM")), in_pieces),
    Model("gemma3_vl", zoo.seeded(gemma3_vl), gemma3_batch),
]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Models of plain torch


class Recurrent(nn.Module):
    """Packed sequences of different lengths through an LSTM or a GRU."""

    def __init__(self, kind: type[nn.Module], width: int = 256) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width, padding_idx=0)
        self.rnn = kind(width, width, num_layers=2, dropout=0.1, batch_first=True, bidirectional=kind is nn.LSTM)
        self.head = nn.Linear(width * (2 if kind is nn.LSTM else 1), VOCABULARY)

    def forward(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor) -> Tensor:
        lengths = attention_mask.sum(1)
        packed = nn.utils.rnn.pack_padded_sequence(
            self.embed(input_ids), lengths, batch_first=True, enforce_sorted=False
        )
        hidden, _ = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        return F.cross_entropy(self.head(hidden).flatten(0, 1), labels[:, : hidden.shape[1]].flatten())


class Translator(nn.Module):
    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, width), nn.Linear(width, VOCABULARY)
        self.transformer = nn.Transformer(width, 8, 3, 3, 3 * width, dropout=0.1, batch_first=True)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = self.transformer.generate_square_subsequent_mask(target.shape[1])
        padding = source == 0
        hidden = self.transformer(
            self.embed(source), self.embed(target), tgt_mask=mask, src_key_padding_mask=padding, tgt_is_causal=True
        )
        return self.head(hidden)  # type: ignore[no-any-return]


def sentences() -> tuple[Tensor, Tensor]:
    ids = torch.randint(1, VOCABULARY, (4, 200), generator=zoo.generator(0))
    ids[1, 100:120] = 0
    return ids[:, :120], ids[:, 120:]


class SelfAttention(nn.Module):
    """Asks MultiheadAttention for its weights, and adds what they are to the loss."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.stem, self.out = nn.Linear(64, width), nn.Linear(width, 10)
        self.layers = nn.ModuleList(nn.MultiheadAttention(width, 8, dropout=0.1, batch_first=True) for _ in range(4))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x, extra = self.stem(x), x.new_zeros(())
        for layer in self.layers:
            out, weights = layer(x, x, x)
            x, extra = x + out, extra - (weights * (weights + 1e-9).log()).sum(-1).mean()
        return F.cross_entropy(self.out(x.mean(1)), y) + 0.01 * extra


def rows_of(length: int = 128, width: int = 64) -> tuple[Tensor, Tensor]:
    g = zoo.generator(0)
    return torch.randn(8, length, width, generator=g), torch.randint(0, 10, (8,), generator=g)


class Reverse(torch.autograd.Function):
    """Identity whose gradient is turned round, and which saves what it need not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x, x.square())
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        x, square = ctx.saved_tensors
        return -grad * (1 + 0 * x) / (1 + square)


class Adversary(nn.Module):
    """A generator and a discriminator in one loss, with a gradient of its own and a gradient penalty."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.make = nn.Sequential(
            nn.ConvTranspose2d(64, 2 * width, 4), nn.BatchNorm2d(2 * width), nn.ReLU(),
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.ConvTranspose2d(width, 3, 4, 2, 1), nn.Tanh(),
        )  # fmt: skip
        norm = parametrizations.spectral_norm
        self.judge = nn.Sequential(
            norm(nn.Conv2d(3, width, 4, 2, 1)), nn.LeakyReLU(0.2, inplace=True),
            norm(nn.Conv2d(width, 2 * width, 4, 2, 1)), nn.LeakyReLU(0.2, inplace=True), nn.Flatten(),
            norm(nn.Linear(2 * width * 16, 1)),
        )  # fmt: skip

    def forward(self, noise: Tensor, real: Tensor) -> Tensor:
        made = Reverse.apply(self.make(noise))
        mixed = (real + made.detach()).div(2).requires_grad_()
        (slope,) = torch.autograd.grad(self.judge(mixed).sum(), mixed, create_graph=True)
        penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
        return F.softplus(self.judge(made)).mean() + F.softplus(-self.judge(real)).mean() + penalty


def noise_and_pictures() -> tuple[Tensor, Tensor]:
    g = zoo.generator(0)
    return torch.randn(32, 64, 1, 1, generator=g), torch.randn(32, 3, 16, 16, generator=g)


class Layer(nn.Module):
    """Dropped for the batch by a random number that the host reads, or for some rows by a mask."""

    def __init__(self, width: int, drop: float) -> None:
        super().__init__()
        self.inner, self.drop = zoo.Block(width), drop

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.rand(()).item() < self.drop / 8:
            return x
        kept = torch.rand(x.shape[0]) >= self.drop
        x = x.clone()
        x[kept] = x[kept] + self.inner(x[kept])
        return x


class Deep(nn.Module):
    """Stochastic depth with rates from a table of floats; weight norm; a table of bags; tied weights."""

    def __init__(self, width: int = 256, depth: int = 6) -> None:
        super().__init__()
        self.bags = nn.EmbeddingBag(VOCABULARY, width, mode="mean")
        self.layers = nn.ModuleList(Layer(width, rate.item()) for rate in torch.linspace(0, 0.3, depth))
        self.mix = parametrizations.weight_norm(nn.Linear(width, width))
        self.turn = parametrizations.orthogonal(nn.Linear(width, width, bias=False))
        self.head = nn.Linear(width, VOCABULARY)
        self.head.weight = self.bags.weight

    def forward(self, ids: Tensor, offsets: Tensor, y: Tensor) -> Tensor:
        x = self.bags(ids, offsets)
        for layer in self.layers:
            x = layer(x)
        x = self.turn(self.mix(x))
        if x.shape[0] % 2:  # an int of the shape
            x = x[:-1]
        clipped = x.norm(dim=-1).max()
        if clipped.item() > 1e6:
            x = x / clipped
        return F.cross_entropy(self.head(x), y)


def bags() -> tuple[Tensor, Tensor, Tensor]:
    g = zoo.generator(0)
    ids = torch.randint(0, VOCABULARY, (8192,), generator=g)
    return ids, torch.arange(0, 8192, 8), torch.randint(0, VOCABULARY, (1024,), generator=g)


class Spectral(nn.Module):
    """Mixes in the frequency domain with complex weights."""

    def __init__(self, width: int = 64, side: int = 64, depth: int = 4) -> None:
        super().__init__()
        self.stem, self.out = nn.Conv2d(3, width, 1), nn.Conv2d(width, 3, 1)
        shape = (depth, width, side, side // 2 + 1, 2)
        self.weight = nn.Parameter(torch.randn(shape) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for weight in torch.view_as_complex(self.weight):
            waves = torch.fft.rfft2(x, norm="ortho") * weight
            x = x + F.gelu(torch.fft.irfft2(waves, s=x.shape[-2:], norm="ortho"))
        return self.out(x)  # type: ignore[no-any-return]


class Warped(nn.Module):
    """A spatial transformer: looks for where to look, resamples, and compares patches by einsum."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.where = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * width, 6))
        self.norm, self.look = nn.GroupNorm(8, width), nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm(self.stem(x)))
        grid = F.affine_grid(self.where(x).view(-1, 2, 3), list(x.shape), align_corners=False)
        x = F.grid_sample(x, grid, align_corners=False, padding_mode="border")
        x = F.interpolate(x, size=(24, 24), mode="bilinear", align_corners=False)
        x = self.look(F.pad(x, (1, 1, 1, 1), mode="reflect"))
        score = torch.einsum("bchw,bcij->bhwij", x, F.max_pool2d(x, 4)).flatten(3).softmax(-1)
        x = torch.einsum("bhwk,bck->bchw", score, F.max_pool2d(x, 4).flatten(2))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


class Experts(nn.Module):
    """A mixture of experts as written by hand: masks as indices, a loop, `index_add_`, counts that are read."""

    def __init__(self, width: int = 256, experts: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, width), nn.Linear(width, VOCABULARY)
        self.routers = nn.ModuleList(nn.Linear(width, experts) for _ in range(depth))
        self.experts = nn.ModuleList(nn.ModuleList(zoo.Block(width) for _ in range(experts)) for _ in range(depth))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(input_ids).flatten(0, 1)
        for router, experts in zip(self.routers, self.experts):
            weight, chosen = router(x).softmax(-1).topk(2, dim=-1)
            out = torch.zeros_like(x)
            for number, expert in enumerate(experts):
                rows, place = torch.where(chosen == number)
                if rows.numel():
                    out.index_add_(0, rows, expert(x[rows]) * weight[rows, place, None])
            x = x + out
        kept = labels.flatten() != -100
        return F.cross_entropy(self.head(x[kept]), labels.flatten()[kept])


class Sparse(nn.Module):
    """Losses over what masks select: hard examples, positives, the largest errors."""

    def __init__(self, width: int = 512) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.SiLU())
        self.scores, self.boxes = nn.Linear(width, 10), nn.Linear(width, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = self.body(x)
        scores, boxes = self.scores(hidden), self.boxes(hidden)
        labels = y[:, None].expand(-1, x.shape[1])
        losses = F.cross_entropy(scores.flatten(0, 1), labels.flatten(), reduction="none")
        hardest = losses.topk(losses.numel() // 4).values.mean()
        positive = boxes[labels < 5]
        return (
            hardest + F.smooth_l1_loss(positive, torch.zeros_like(positive)) + losses.masked_select(losses > 0).mean()
        )


class Volumes(nn.Module):
    """3-d and 1-d convolutions, instance norm, transposed, dilated and grouped."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv3d(1, width, 3, padding=1), nn.InstanceNorm3d(width, affine=True), nn.LeakyReLU(0.1),
            nn.Conv3d(width, 2 * width, 3, stride=2, padding=1, groups=4), nn.BatchNorm3d(2 * width), nn.ELU(),
            nn.ConvTranspose3d(2 * width, width, 2, stride=2), nn.AvgPool3d(2), nn.Conv3d(width, 10, 3, dilation=2),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).amax((2, 3, 4))  # type: ignore[no-any-return]


def volumes() -> tuple[Tensor, Tensor]:
    g = zoo.generator(0)
    return torch.randn(2, 1, 32, 32, 32, generator=g), torch.randint(0, 10, (2,), generator=g)


def own(model: nn.Module, batch: Any) -> Tensor:
    """The model takes the whole batch and returns its loss."""
    return model(**batch) if isinstance(batch, dict) else model(*batch)  # type: ignore[no-any-return]


def restored(model: nn.Module, batch: Any) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[0])


PLAIN = [
    Model("mlp", zoo.seeded(partial(zoo.Mlp, 512, 8)), partial(zoo.regression, 0, rows=1024), zoo.squares),
    Model("conv", zoo.seeded(partial(zoo.ConvNet, 64, 8)), partial(zoo.pictures, 0, rows=16, side=32), zoo.classes),
    Model("unet", zoo.seeded(partial(others.UNet, 48)), partial(zoo.pictures, 0, rows=4, side=64), zoo.classes),
    Model("tied", zoo.seeded(partial(zoo.TiedLanguageModel, 256, 6, 8, VOCABULARY)),
          partial(zoo.shifted_text, 0, length=160, vocabulary=VOCABULARY)),
    Model("lstm", zoo.seeded(partial(Recurrent, nn.LSTM)), words, own),
    Model("gru", zoo.seeded(partial(Recurrent, nn.GRU)), words, own),
    Model("translator", zoo.seeded(Translator), sentences, others.next_word),
    Model("attention", zoo.seeded(SelfAttention), rows_of, own),
    Model("adversary", zoo.seeded(Adversary), noise_and_pictures, own),
    Model("deep", zoo.seeded(Deep), bags, own),
    Model("spectral", zoo.seeded(Spectral), partial(zoo.pictures, 0, rows=4, side=64), restored),
    Model("warped", zoo.seeded(Warped), partial(zoo.pictures, 0, rows=8, side=48), zoo.classes),
    Model("experts", zoo.seeded(Experts), unpadded, own),
    Model("sparse", zoo.seeded(Sparse), rows_of, own),
    Model("volumes", zoo.seeded(Volumes), volumes, zoo.classes),
]  # fmt: skip

MODELS = {model.name: model for model in (*TRANSFORMERS, *PLAIN)}
