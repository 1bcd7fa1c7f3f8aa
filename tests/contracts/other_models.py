"""Models that the techniques were not written for: architectures of transformers, and modules with habits of their own.

All are tiny and built from a seed. Dropout and stochastic depth are left on where a model has them by default.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from zoo import VOCABULARY, Case, classes, generator, pictures, regression, seeded, seen_text, squares, text

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {key: TEXT[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
ENCODER_DECODER = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 3,
}


def transformers_case(name, family, kind, batch, **settings):
    """A model of transformers: class `family + kind` with the config of its family."""

    def make():
        import transformers

        config = getattr(transformers, f"{family}TextConfig" if family == "Gemma3" else f"{family}Config")
        return getattr(transformers, family + kind)(config(**settings))

    return Case(name, seeded(make), batch)


def causal(name, family, **settings):
    return transformers_case(name, family, "ForCausalLM", text, **{**TEXT, "num_key_value_heads": 1, **settings})


def targets_too(seed):
    batch = text(seed)
    labels = torch.where(torch.arange(8) == 0, 7, batch["labels"][:, :8])
    return {**batch, "labels": labels}


def classified(seed):
    batch = text(seed)
    return {**batch, "labels": batch["input_ids"].sum(1) % 2}


def images(side, classes=2):
    def batch(seed):
        pixels = torch.randn(4, 3, side, side, generator=generator(seed))
        return {"pixel_values": pixels, "labels": torch.randint(0, classes, (4,), generator=generator(seed))}

    return batch


def segmented(seed):
    batch = images(32)(seed)
    return {**batch, "labels": torch.randint(0, 3, (4, 32, 32), generator=generator(seed))}


def captioned(seed):
    ids = torch.randint(5, VOCABULARY, (4, 12), generator=generator(seed))
    ids[:, -1] = 2
    return {"input_ids": ids, "pixel_values": images(16)(seed)["pixel_values"], "return_loss": True}


def clip():
    from transformers import CLIPConfig, CLIPModel

    vision = {**VISION, "image_size": 16, "patch_size": 8, "projection_dim": 16}
    return CLIPModel(CLIPConfig(text_config={**TEXT, "projection_dim": 16}, vision_config=vision, projection_dim=16))


def llava():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION, image_size=16, patch_size=8),
        text_config=LlamaConfig(**TEXT),
        image_token_index=3,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    return LlavaForConditionalGeneration(config)


def llava_batch(seed):
    batch = text(seed, length=16)
    batch["input_ids"][:, :4], batch["labels"][:, :4] = 3, -100
    return {**batch, "pixel_values": images(16)(seed)["pixel_values"]}


def qwen25_vl():
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4,
              "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 32, "window_size": 16,
              "fullatt_block_indexes": [1]}  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, "num_key_value_heads": 1, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=1,
        video_token_id=2,
        vision_start_token_id=3,
        vision_end_token_id=4,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def spoken(seed):
    features = torch.randn(4, 8, 40, generator=generator(seed))
    return {"input_features": features, "labels": torch.randint(5, VOCABULARY, (4, 10), generator=generator(seed))}


def waves(seed):
    sound = torch.randn(4, 800, generator=generator(seed))
    return {"input_values": sound, "labels": torch.randint(1, 32, (4, 6), generator=generator(seed))}


def conv_pair(inside, outside):
    layers = [
        part
        for width in (inside, outside)
        for part in (nn.Conv2d(width, outside, 3, padding=1), nn.BatchNorm2d(outside), nn.ReLU(inplace=True))
    ]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Skips around two levels; batch norm and in-place activations inside the repeated layers."""

    def __init__(self, width=8):
        super().__init__()
        self.down = nn.ModuleList([conv_pair(3, width), conv_pair(width, 2 * width)])
        self.middle = conv_pair(2 * width, 2 * width)
        self.up = nn.ModuleList([conv_pair(4 * width, width), conv_pair(2 * width, width)])
        self.out = nn.Conv2d(width, 5, 1)

    def forward(self, x):
        skips = []
        for down in self.down:
            skips.append(down(x))
            x = F.max_pool2d(skips[-1], 2)
        x = self.middle(x)
        for up in self.up:
            x = up(torch.cat([F.interpolate(x, scale_factor=2.0), skips.pop()], 1))
        return self.out(x).mean((2, 3))


class Recurrent(nn.Module):
    """Returns a tuple."""

    def __init__(self, kind):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16, padding_idx=0)
        self.rnn = kind(16, 24, num_layers=2, dropout=0.1, batch_first=True)
        self.head = nn.Linear(24, VOCABULARY)

    def forward(self, input_ids, labels):
        logits = self.head(self.rnn(self.embed(input_ids))[0])
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits


class Translator(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, 16), nn.Linear(16, VOCABULARY)
        self.transformer = nn.Transformer(16, 2, 2, 2, 32, dropout=0.1, batch_first=True)

    def forward(self, source, target):
        mask = self.transformer.generate_square_subsequent_mask(target.shape[1])
        return self.head(self.transformer(self.embed(source), self.embed(target), tgt_mask=mask))


def sentences(seed):
    ids = torch.randint(1, VOCABULARY, (4, 16), generator=generator(seed))
    return ids[:, :9], ids[:, 9:]


def next_word(model, batch):
    source, target = batch
    return F.cross_entropy(model(source, target[:, :-1]).flatten(0, 1).float(), target[:, 1:].flatten())


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.out = nn.Linear(8, 16), nn.Linear(16, 1)
        self.layers = nn.ModuleList(nn.MultiheadAttention(16, 2, dropout=0.1, batch_first=True) for _ in range(3))

    def forward(self, x):
        x = self.stem(x)[:, None].expand(-1, 3, -1)
        for layer in self.layers:
            x = x + layer(x, x, x, need_weights=False)[0]
        return self.out(x.mean(1))


class StochasticDepth(nn.Module):
    """Drops the layer for the batch or for some rows; the host reads a random number."""

    def __init__(self, width=16):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Dropout(0.2), nn.Linear(width, width))

    def forward(self, x):
        if not self.training:
            return x + self.inner(x)
        if torch.rand(()) < 0.3:
            return x
        return x + (torch.rand(x.shape[0], 1) > 0.2).to(x.dtype) * self.inner(x)


class Reused(nn.Module):
    """A block that is called four times, of which twice by other names, and a weight that two layers share."""

    def __init__(self):
        super().__init__()
        self.stem, self.out = nn.Linear(8, 16), nn.Linear(16, 1)
        self.block = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(3))
        self.layers[2][0].weight = self.layers[0][0].weight
        self.again = nn.ModuleList([self.block, self.block])

    def forward(self, x):
        x = self.stem(x)
        for layer in (self.block, self.block, *self.layers, *self.again):
            x = x + layer(x)
        return self.out(x)


@dataclass
class State:
    x: torch.Tensor
    seen: dict


class Averaging(nn.Module):
    """Takes and returns a dataclass; reads buffers and then changes them, one in place and one by assignment."""

    def __init__(self, width=16):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("spread", torch.ones(width))

    def forward(self, state):
        y = (self.linear(state.x) - self.mean) + self.spread
        if self.training:
            with torch.no_grad():
                self.mean = 0.9 * self.mean + 0.1 * state.x.mean(0)
                self.spread.mul_(0.9)
        return State(state.x + torch.tanh(y), {**state.seen, "mean": y.detach().mean()})


class Stateful(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.out = nn.Linear(8, 16), nn.Linear(16, 1)
        self.layers = nn.ModuleList(Averaging() for _ in range(3))

    def forward(self, x):
        state = State(self.stem(x), {})
        for layer in self.layers:
            state = layer(state)
        return {"loss": self.out(state.x).square().mean(), "seen": state.seen}


class Bare(nn.Module):
    """A parameter of its own, one that is never used, nothing that repeats, an activation in place."""

    def __init__(self):
        super().__init__()
        self.weight, self.unused = nn.Parameter(torch.randn(8, 16) / 8), nn.Parameter(torch.zeros(3))
        self.inner, self.out = nn.Linear(16, 16), nn.Linear(16, 1)

    def forward(self, x):
        return self.out(F.relu(self.inner(x @ self.weight), inplace=True))


def stochastic():
    return nn.Sequential(nn.Linear(8, 16), nn.Sequential(*[StochasticDepth() for _ in range(4)]), nn.Linear(16, 1))


def unmasked(seed):
    return text(seed, attention_mask=False)


OTHERS = [
    causal("llama", "Llama", attention_dropout=0.1),
    causal("qwen3", "Qwen3", head_dim=16),
    causal("mistral", "Mistral", sliding_window=4),
    causal("gemma2", "Gemma2", head_dim=16, sliding_window=4),
    causal("gemma3", "Gemma3", head_dim=16, sliding_window=4),
    causal("phi3", "Phi3", resid_pdrop=0.1),
    causal("opt", "OPT", ffn_dim=48, word_embed_proj_dim=32),
    causal("neox", "GPTNeoX"),
    causal("mixtral", "Mixtral", num_local_experts=4, output_router_logits=True),
    causal("qwen3_moe", "Qwen3Moe", head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24),
    transformers_case(
        "mamba", "Mamba", "ForCausalLM", unmasked, vocab_size=VOCABULARY, hidden_size=32, state_size=8,
        num_hidden_layers=2, time_step_rank=4,
    ),
    transformers_case(
        "t5", "T5", "ForConditionalGeneration", targets_too, vocab_size=VOCABULARY, d_model=32, d_kv=16, d_ff=48,
        num_layers=2, num_heads=2, decoder_start_token_id=0, use_cache=False,
    ),
    transformers_case("bart", "Bart", "ForConditionalGeneration", targets_too, **TEXT, **ENCODER_DECODER),
    transformers_case("bert_masked", "Bert", "ForMaskedLM", text, **TEXT),
    transformers_case("bert_classes", "Bert", "ForSequenceClassification", classified, **TEXT),
    transformers_case("vit", "ViT", "ForImageClassification", images(16), **VISION, image_size=16, patch_size=8),
    transformers_case(
        "segformer", "Segformer", "ForSemanticSegmentation", segmented, num_encoder_blocks=2, depths=[1, 2],
        sr_ratios=[2, 1], hidden_sizes=[16, 32], patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2],
        mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=3,
    ),
    transformers_case(
        "convnext", "ConvNext", "ForImageClassification", images(32), num_stages=2, hidden_sizes=[8, 16],
        depths=[2, 2], drop_path_rate=0.2,
    ),
    Case("clip", seeded(clip), captioned),
    transformers_case(
        "whisper", "Whisper", "ForConditionalGeneration", spoken, vocab_size=VOCABULARY, num_mel_bins=8,
        max_source_positions=20, max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        suppress_tokens=None, begin_suppress_tokens=None, dropout=0.1, **ENCODER_DECODER,
    ),
    transformers_case(
        "wav2vec2", "Wav2Vec2", "ForCTC", waves, **VISION, vocab_size=32, conv_dim=(16, 16), conv_stride=(5, 2),
        conv_kernel=(10, 3), num_feat_extract_layers=2, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
        layerdrop=0.0, mask_time_prob=0.0, ctc_loss_reduction="mean", ctc_zero_infinity=True,
    ),
    Case("qwen25_vl", seeded(qwen25_vl), seen_text),
    Case("llava", seeded(llava), llava_batch),
    Case("unet", seeded(UNet), lambda seed: pictures(seed, side=16), classes),
    Case("lstm", seeded(lambda: Recurrent(nn.LSTM)), unmasked, lambda model, batch: model(**batch)[0]),
    Case("gru", seeded(lambda: Recurrent(nn.GRU)), unmasked, lambda model, batch: model(**batch)[0]),
    Case("translator", seeded(Translator), sentences, next_word),
    Case("self_attention", seeded(SelfAttention), regression, squares),
    Case("stochastic_depth", seeded(stochastic), regression, squares),
    Case("reused", seeded(Reused), regression, squares),
    Case("stateful", seeded(Stateful), lambda seed: (regression(seed)[0],)),
    Case("bare", seeded(Bare), regression, squares),
]  # fmt: skip
