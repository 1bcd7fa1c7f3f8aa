"""The models of benchmarks/techniques.py: those of the contract test (tests/zoo.py), made large enough to weigh."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

ZOO = Path(__file__).parent.parent / "tests" / "zoo.py"


def _load_zoo() -> Any:
    spec = importlib.util.spec_from_file_location("zoo", ZOO)
    assert spec is not None and spec.loader is not None
    module = sys.modules["zoo"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


zoo = _load_zoo()
VOCABULARY = 8192


@dataclass(frozen=True)
class Work:
    """A model that is trained, with what techniques need to know of it.

    Attributes:
        build: () -> model, the same weights each time.
        batch: () -> the batch of one update.
        loss: For TrainStep; None is the model's own.
        tower: Modules that freezing takes.
        adapted: Modules that LoRA takes.
        language: It has tokens, attention and an output head.
        padded: Its batches hold an attention mask.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[], Any]
    tower: str
    adapted: str
    loss: Callable[[nn.Module, Any], Tensor] | None = None
    language: bool = True
    padded: bool = True


WORKS = {
    work.name: work
    for work in (
        Work(
            "gpt2",
            zoo.seeded(partial(zoo.gpt2, width=256, depth=12, heads=8, vocabulary=VOCABULARY, positions=256)),
            partial(zoo.text, 0, length=256, rows=8, vocabulary=VOCABULARY, shorter=(0, 100, 160, 210)),
            tower="['transformer.wte', 'transformer.wpe', 'transformer.h.[0-5]']",
            adapted="['transformer.h.*.attn.c_attn', 'transformer.h.*.mlp.c_fc']",
        ),
        Work(
            "qwen3_vl",
            zoo.seeded(partial(zoo.qwen3_vl, 256, 8, 128, 8, VOCABULARY)),
            partial(zoo.seen_text, 0, length=256, side=16, vocabulary=VOCABULARY, shorter=(0, 200, 60, 160)),
            tower="['model.visual']",
            adapted="['model.language_model.layers.*.self_attn.[qkvo]_proj']",
        ),
        Work(
            "tied",
            zoo.seeded(partial(zoo.TiedLanguageModel, width=256, depth=12, heads=8, vocabulary=VOCABULARY)),
            partial(zoo.shifted_text, 0, length=256, rows=8, vocabulary=VOCABULARY),
            tower="['layers.[0-5]']",
            adapted="['layers.*.linear[12]']",
            padded=False,
        ),
        Work(
            "conv",
            zoo.seeded(partial(zoo.ConvNet, width=64, depth=12)),
            partial(zoo.pictures, 0, rows=16, side=32),
            tower="['stem', 'blocks.[0-5]']",
            adapted="['head']",
            loss=zoo.classes,
            language=False,
            padded=False,
        ),
        Work(
            "mlp",
            zoo.seeded(partial(zoo.Mlp, width=512, depth=12)),
            partial(zoo.regression, 0, rows=1024),
            tower="['stem', 'blocks.[0-5]']",
            adapted="['blocks.*.up']",
            loss=zoo.squares,
            language=False,
            padded=False,
        ),
    )
}
