"""The models that every technique is held against: an MLP, a conv net, a GPT-2, a Qwen3-VL and one with tied weights.

All are tiny and real: the last three are language models with labels, the Qwen3-VL sees images. Each is built anew from
a seed, with batches of four rows. conftest.py hands them out as the fixtures `zoo` and `case`.
"""

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from floatline.step import default_loss

ROWS = 4
VOCABULARY = 96


@dataclass(frozen=True)
class Case:
    """One model with its batches.

    Attributes:
        build: () -> model, the same weights each time.
        batch: (seed) -> batch.
        loss: For TrainStep; None is the model's own.
        head: Dotted name of the output head of language models, None elsewhere.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], Any]
    loss: Callable[[nn.Module, Any], torch.Tensor] | None = None
    head: str | None = None


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Mlp(nn.Module):
    def __init__(self, width=16, depth=3):
        super().__init__()
        self.stem = nn.Linear(8, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.out = nn.Linear(width, 1)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


class ConvBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x):
        return x + F.relu(self.norm(self.conv(x)))


class ConvNet(nn.Module):
    def __init__(self, width=8, depth=3):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(*[ConvBlock(width) for _ in range(depth)])
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class TiedLanguageModel(nn.Module):
    """A causal language model of plain torch parts; embedding and head are one weight."""

    def __init__(self, width=16, depth=2, heads=2, vocabulary=VOCABULARY):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, batch_first=True) for _ in range(depth)
        )
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight
        nn.init.normal_(self.embed.weight, std=0.1)

    def forward(self, input_ids, labels):
        length = input_ids.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).triu(1)
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden, src_mask=mask)
        logits = self.head(hidden)
        return {"loss": F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten()), "logits": logits}


def seeded(make):
    def build():
        torch.manual_seed(0)
        return make().train()

    return build


def generator(seed):
    return torch.Generator().manual_seed(seed)


def regression(seed, rows=ROWS):
    x = torch.randn(rows, 8, generator=generator(seed))
    return x, x.sum(1, keepdim=True).sin()


def pictures(seed, rows=ROWS, side=8):
    g = generator(seed)
    return torch.randn(rows, 3, side, side, generator=g), torch.randint(0, 5, (rows,), generator=g)


def text(seed, length=12, attention_mask=True, rows=ROWS, vocabulary=VOCABULARY, shorter=(0, 3, 5, 6)):
    """Rows of different lengths, right-padded; labels of the prompt and the padding are -100."""
    g = generator(seed)
    ids = torch.randint(5, vocabulary, (rows, length), generator=g)
    lengths = length - torch.tensor(shorter).repeat(rows)[:rows]
    mask = torch.arange(length) < lengths[:, None]
    labels = torch.where(mask & (torch.arange(length) >= 3), ids, -100)
    batch = {"input_ids": torch.where(mask, ids, 0), "labels": labels}
    return {**batch, "attention_mask": mask.long()} if attention_mask else batch


def shifted_text(seed, **sizes):
    """Text for models that do not shift labels themselves: each label is the next token."""
    batch = text(seed, attention_mask=False, **sizes)
    labels = batch["labels"].roll(-1, 1)
    labels[:, -1] = -100
    return {**batch, "labels": labels}


def gpt2(width=16, depth=3, heads=2, vocabulary=VOCABULARY, positions=64):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=positions,
        n_embd=width,
        n_layer=depth,
        n_head=heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2LMHeadModel(config)


IMAGE_TOKEN, VIDEO_TOKEN, VISION_START, VISION_END = 1, 2, 3, 4


def qwen3_vl(width=32, depth=2, vision_width=16, vision_depth=2, vocabulary=VOCABULARY):
    """Heads are 16 wide; the text model has as many query heads as fill its width, and half as many for keys."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    text_config = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": 3 * width // 2,
        "num_hidden_layers": depth,
        "num_attention_heads": width // 16,
        "num_key_value_heads": width // 32,
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3],
                            "mrope_interleaved": True},
    }  # fmt: skip
    vision_config = {
        "depth": vision_depth,
        "hidden_size": vision_width,
        "intermediate_size": 2 * vision_width,
        "num_heads": vision_width // 8,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": width,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    config = Qwen3VLConfig(
        text_config=text_config,
        vision_config=vision_config,
        image_token_id=IMAGE_TOKEN,
        video_token_id=VIDEO_TOKEN,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=True,
    )
    return Qwen3VLForConditionalGeneration(config)


def seen_text(seed, length=20, side=4, vocabulary=VOCABULARY, shorter=(0, 3, 5, 6)):
    """Four rows; the first and third show an image of side x side and 2 side x side patches, the others none.

    Four patches are one token: 4 and 8 tokens at side 4.
    """
    grids = torch.tensor([[1, side, side], [1, 2 * side, side]])
    batch = text(seed, length=length, vocabulary=vocabulary, shorter=shorter)
    for row, tokens in ((0, side * side // 4), (2, side * side // 2)):
        batch["input_ids"][row, : tokens + 2] = torch.tensor([VISION_START, *[IMAGE_TOKEN] * tokens, VISION_END])
        batch["labels"][row, : tokens + 2] = -100
    pixels = torch.randn(int(grids.prod(1).sum()), 3 * 2 * 4 * 4, generator=generator(seed + 1000))
    kinds = (batch["input_ids"] == IMAGE_TOKEN).int()
    return {**batch, "pixel_values": pixels, "image_grid_thw": grids, "mm_token_type_ids": kinds}


def squares(model, batch):
    x, y = batch
    return F.mse_loss(model(x).float(), y) / 8  # so that the first loss scale of 2^16 does not overflow fp16


def classes(model, batch):
    x, y = batch
    return F.cross_entropy(model(x).float(), y) / 8


CASES = [
    Case("mlp", seeded(Mlp), regression, squares),
    Case("conv", seeded(ConvNet), pictures, classes),
    Case("gpt2", seeded(gpt2), text, head="lm_head"),
    Case("qwen3_vl", seeded(qwen3_vl), seen_text, head="lm_head"),
    Case("tied", seeded(TiedLanguageModel), shifted_text, head="head"),
]


class _Storages(TorchDispatchMode):
    """Counts the bytes of storages that ops made and that are still alive."""

    def __init__(self, known):
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.live = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self.live and storage._cdata not in self.known:
                    self.live[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, storage._cdata, None)
        return out


def kept_bytes(model, batch, loss=None, around=nullcontext):
    """Return the bytes that the graph keeps after a forward, weights and batch not counted."""
    known = [*model.parameters(), *model.buffers(), *(t for t in tree_leaves(batch) if isinstance(t, torch.Tensor))]
    storages = _Storages(known)
    with storages, around():
        out = (loss or default_loss)(model, batch)
        gc.collect()
        assert out.requires_grad
        return sum(storages.live.values())
