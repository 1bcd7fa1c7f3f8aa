"""Peaks that others published for CUDA GPUs, and the same settings as workloads: the second table of plan_peers.py.

No measurement of ours: it tells whether the rules for CUDA are in the right place until a GPU is at hand. Each entry
says what of the published setting is not in ours. Sources:

    transformers docs, "Methods and tools for efficient training on a single GPU" (BERT-large, V100-16, HF Trainer)
    torchtune README, "Optimization flags" (Llama-3.2-3B, A100, bf16 weights and state, batch 2 x 4096, peak active;
    cumulative, LoRA without the two optimizer flags). Its unpacked baseline (25.5 GiB) is left out: the rows' length is
    not published. Its QLoRA (4.6 GiB) too: there is no 4-bit base here.
    NVIDIA NeMo Automodel docs, "Gradient checkpointing" (Llama-3.2-1B, H100, local batch 8 x 2048, torch 2.8), and its
    source: what it checkpoints (components/distributed/parallelizer.py) and that its loop holds the logits through
    backward (recipes/llm/finetune.py)
    Qwen3-VL-2B's states by arithmetic: bytes a parameter x 2,127,532,032
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from floatline.plan.building import model_factory
from floatline.plan.configs import find_config
from floatline.plan.shape import Shape
from floatline.plan.sources import load_source
from floatline.plan.tasks import choose_training
from floatline.step import Workload

GIB, MB, GB = 2**30, 2**20, 10**9


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published peak.

    Args:
        what: The setting in words.
        where: Whose figure.
        nbytes: The figure in bytes.
        unit: The unit it was published in, with bytes of one.
        quantity: "allocated" (active tensors), "total" (device, context included) or "states" (between updates).
        work: () -> the workload.
        hardware, precision, techniques, clip: As for `estimate`.
        context: Bytes of context where the source tells them; else the catalog's count.
        ranks: Processes that train together.
        comparable: "yes", "partly" or "no": whether the difference is a test of the planner.
        differs: What of the published setting is not in ours.
    """

    what: str
    where: str
    nbytes: float
    quantity: str
    work: Callable[[], Workload]
    hardware: str
    precision: str
    techniques: tuple[str, ...] = ()
    clip: float | None = None
    context: int | None = None
    ranks: int = 1
    comparable: str = "yes"
    differs: str = ""


class ZeroingAdamW(torch.optim.AdamW):
    """AdamW as it was then: one parameter at a time, gradients zeroed between updates and never freed."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, foreach=False)

    def zero_grad(self, set_to_none: bool = False) -> None:
        super().zero_grad(set_to_none=False)


def bert_large() -> Workload:
    """BERT-large as a classifier, 4 rows of 512 random tokens, attention multiplied out as it was then."""
    found = find_config("bert-large")
    training = choose_training(found.config, "sequence-classification", "bert-large")
    rows = {"input_ids": torch.full((4, 512), 7), "labels": torch.zeros(4, dtype=torch.long)}
    build = model_factory(training.cls, found.config, torch.float32, attention="eager")
    return Workload(model=build, batch=lambda: dict(rows), optimizer=ZeroingAdamW)


def bundled(name: str, **shape: Any) -> Callable[[], Workload]:
    return lambda: load_source(name, Shape(**shape)).work


def full(name: str, rows: int, length: int) -> Callable[[], Workload]:
    """Full rows without a mask."""

    def make() -> Workload:
        ids = torch.full((rows, length), 7)
        return replace(bundled(name, batch=rows, seq=length)(), batch=lambda: {"input_ids": ids, "labels": ids.clone()})

    return make


def holding(name: str, rows: int, length: int) -> Callable[[], Workload]:
    """As `full`, in a loop that computes the loss itself and holds the model's output meanwhile."""
    held: dict[str, Any] = {}

    def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        held["output"] = output = model(input_ids=batch["input_ids"])
        return cross_entropy(output.logits.flatten(0, 1).float(), batch["labels"].flatten())

    return lambda: replace(full(name, rows, length)(), loss=loss)


def packed(name: str, rows: int, length: int) -> Callable[[], Workload]:
    """Rows of several samples, kept apart by a mask over pairs of tokens, as torchtune packs."""

    def batch() -> dict[str, torch.Tensor]:
        mask = torch.ones(rows, 1, length, length, dtype=torch.bool).tril()
        mask[..., length // 2 :, : length // 2] = False
        ids = torch.full((rows, length), 7)
        return {"input_ids": ids, "labels": ids.clone(), "attention_mask": mask}

    return lambda: replace(bundled(name, batch=rows, seq=length)(), batch=batch)


BERT: dict[str, Any] = {"where": "transformers docs", "quantity": "total", "work": bert_large, "hardware": "v100-16gb",
                        "precision": "32-true", "clip": 1.0, "context": 1343 * MB}  # fmt: skip
TUNE: dict[str, Any] = {"where": "torchtune", "quantity": "allocated", "work": packed("llama-3.2-3b", 2, 4096),
                        "hardware": "a100-80gb", "precision": "bf16-true"}  # fmt: skip
COMPILED = "theirs is compiled"
CHUNKS = COMPILED + ", and its chunks' bf16 logits are all held at once (2.0 GiB); ours are made chunk by chunk"
NEMO: dict[str, Any] = {"where": "NeMo Automodel", "quantity": "allocated", "hardware": "h100-80gb",
                        "precision": "bf16-true"}  # fmt: skip
LOGITS_HELD, LOGITS_NEVER = holding("llama-3.2-1b", 8, 2048), full("llama-3.2-1b", 8, 2048)
KERNELS = "8.0 GiB less is what Liger's RMSNorm and SwiGLU save by arithmetic; the page does not name its kernels"
PARTS = (
    "checkpointing(layers=["
    + ", ".join(
        f"'model.layers.*.{part}'" for part in ("mlp", "self_attn", "input_layernorm", "post_attention_layernorm")
    )
    + "])"
)
"""Its checkpointing wraps the parts of a layer one by one, not the layer."""
QWEN: dict[str, Any] = {"where": "arithmetic", "quantity": "states", "work": bundled("qwen3-vl-2b", image=(256, 256)),
                        "hardware": "a100-80gb", "comparable": "yes"}  # fmt: skip
CHUNKED, EVERY_LAYER = "chunked_loss", "checkpointing"
THRIFTY = (CHUNKED, EVERY_LAYER, "optimizer_in_backward")

PUBLISHED = (
    Published(
        what="BERT-large, 4 x 512",
        nbytes=14949 * MB,
        comparable="partly",
        differs="torch and transformers of 2022",
        **BERT,
    ),
    Published(
        what="+ 4 micro-batches",
        nbytes=8681 * MB,
        techniques=("accumulation(micro_batches=4)",),
        comparable="partly",
        differs="torch and transformers of 2022",
        **BERT,
    ),
    Published(
        what="+ checkpointing",
        nbytes=6775 * MB,
        techniques=("accumulation(micro_batches=4)", EVERY_LAYER),
        comparable="partly",
        differs="torch and transformers of 2022",
        **BERT,
    ),
    Published(what="Llama-3.2-3B, 2 x 4096 packed", nbytes=60.0 * GIB, **TUNE),
    Published(what="+ compile", nbytes=51.0 * GIB, comparable="no", differs=COMPILED, **TUNE),
    Published(
        what="+ chunked loss",
        nbytes=42.9 * GIB,
        techniques=(CHUNKED,),
        comparable="no",
        differs=CHUNKS,
        **TUNE,
    ),
    Published(
        what="+ checkpointing",
        nbytes=24.9 * GIB,
        techniques=(CHUNKED, EVERY_LAYER),
        comparable="partly",
        differs=CHUNKS,
        **TUNE,
    ),
    Published(
        what="+ optimizer in backward",
        nbytes=23.1 * GIB,
        techniques=THRIFTY,
        comparable="partly",
        differs=CHUNKS,
        **TUNE,
    ),
    Published(
        what="+ activation offload",
        nbytes=21.8 * GIB,
        techniques=(*THRIFTY, "offload"),
        comparable="partly",
        differs=CHUNKS,
        **TUNE,
    ),
    Published(
        what="+ 8-bit Adam",
        nbytes=17.6 * GIB,
        techniques=(*THRIFTY, "offload", "low_bit_optimizer"),
        comparable="partly",
        differs=CHUNKS + "; whose 8-bit Adam is not said",
        **TUNE,
    ),
    Published(
        what="LoRA",
        nbytes=8.5 * GIB,
        techniques=(CHUNKED, EVERY_LAYER, "offload", "lora(rank=64)"),
        comparable="partly",
        differs=CHUNKS,
        **TUNE,
    ),
    Published(
        what="Llama-3.2-1B, 8 x 2048", nbytes=53.03 * GIB, work=LOGITS_HELD, comparable="no", differs=KERNELS, **NEMO
    ),
    Published(
        what="+ FSDP, 8 GPUs",
        nbytes=47.59 * GIB,
        work=LOGITS_HELD,
        techniques=("sharding",),
        ranks=8,
        comparable="no",
        differs=KERNELS,
        **NEMO,
    ),
    Published(
        what="+ checkpointing", nbytes=33.06 * GIB, work=LOGITS_HELD, techniques=("sharding", PARTS), ranks=8, **NEMO
    ),
    Published(
        what="+ fused loss",
        nbytes=7.3 * GIB,
        work=LOGITS_NEVER,
        techniques=("sharding", CHUNKED, PARTS),
        ranks=8,
        comparable="partly",
        differs="cut cross-entropy; ours is the chunked loss",
        **NEMO,
    ),
    Published(what="Qwen3-VL-2B, autocast", nbytes=34.0 * GB, precision="bf16-mixed", **QWEN),
    Published(what="pure bf16", nbytes=17.0 * GB, precision="bf16-true", **QWEN),
    Published(what="bf16 + Kahan", nbytes=21.3 * GB, precision="bf16-true", techniques=("kahan",), **QWEN),
    Published(
        what="bf16 + 8-bit Adam", nbytes=12.8 * GB, precision="bf16-true", techniques=("low_bit_optimizer",), **QWEN
    ),
)
