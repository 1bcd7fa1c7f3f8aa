"""What the contract test asks of a technique, and how it compares two runs.

Two runs of the same batches, one with techniques and one without, are compared by what was learnt: the distance of the
weights, relative to how far the plain run moved them; the same for each gradient and for the optimizer's moments,
relative to their size. 0 means bit for bit.

Techniques that choose what is trained (freezing, adapters) are in the plain run as well: they are the model, not the
way it is trained.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import floatline as fl

DEVICE = torch.device(os.environ.get("FLOATLINE_TEST_DEVICE", "cpu"))
"""Where the models of the contract train; FLOATLINE_TEST_DEVICE=cuda puts them on a GPU."""
UPDATES = 3
ROUNDING = {"32-true": 2e-4, "bf16-mixed": 4e-2, "16-mixed": 2e-2}
"""How far a run may be off when sums are taken in another order, by precision."""
LANGUAGE = frozenset({"gpt2", "qwen3_vl", "tied"})
EVERYTHING = frozenset({"mlp", "conv", *LANGUAGE})


@dataclass(frozen=True)
class Spec:
    """How the contract runs one technique.

    Attributes:
        text: With settings that make it do something on models this small.
        models: Those of the zoo that it is for; on the others it must refuse or warn.
        tolerance: Allowed distance by precision; empty means bit for bit.
        per_model: Settings that depend on the model.
        defines: It chooses what is trained.
        clip: Gradient clipping that it allows.
        precisions: Those that it allows; in the others it must refuse.
        lists: Whether it allows several micro-batches.
        approximate_state: The optimizer's moments are rounded or kept in another form.
    """

    text: str
    models: frozenset[str] = EVERYTHING
    tolerance: dict[str, float] = field(default_factory=dict)
    per_model: dict[str, str] = field(default_factory=dict)
    defines: bool = False
    clip: float | None = 0.05
    precisions: tuple[str, ...] = ("32-true", "bf16-mixed", "16-mixed")
    lists: bool = True
    approximate_state: bool = False

    @property
    def name(self) -> str:
        return self.text.partition("(")[0]

    def on(self, model: str) -> str:
        return self.per_model.get(model, self.text)


_TARGETS = {
    "mlp": "['blocks.*.up']",
    "conv": "['head']",
    "gpt2": "['transformer.h.*.attn.c_attn']",
    "qwen3_vl": "['model.language_model.layers.*.self_attn.q_proj']",
    "tied": "['layers.*.linear1']",
}
_FROZEN = {
    "mlp": "['stem', 'blocks.0']",
    "conv": "['stem', 'blocks.0']",
    "gpt2": "['transformer.h.0']",
    "qwen3_vl": "['model.visual']",
    "tied": "['layers.0']",
}
_EIGHT_BIT = {"32-true": 0.15, "bf16-mixed": 0.15, "16-mixed": 0.15}

SPECS = {
    spec.name: spec
    for spec in (
        Spec("precision(policy='bf16-mixed')"),
        Spec("accumulation(micro_batches=2)", tolerance=ROUNDING, models=EVERYTHING - {"conv"}),
        Spec("checkpointing"),
        Spec("attention(kernel=math)", models=LANGUAGE, tolerance=ROUNDING),
        Spec("offload(to=disk, min_bytes=0)"),
        Spec("sharding", tolerance=ROUNDING),
        Spec("batching(max_tokens=30)", models=LANGUAGE, tolerance=ROUNDING),
        Spec("packing", models=frozenset({"gpt2", "qwen3_vl"}), tolerance=ROUNDING),
        Spec("low_bit_optimizer", tolerance=_EIGHT_BIT, approximate_state=True),
        Spec("optimizer_offload"),
        Spec("master_weights", approximate_state=True),
        Spec("kahan", tolerance=ROUNDING, approximate_state=True),
        Spec("stochastic_rounding", tolerance=ROUNDING, approximate_state=True),
        Spec("optimizer_in_backward", clip=None, lists=False, precisions=("32-true", "bf16-mixed")),
        Spec("freezing", per_model={m: f"freezing(modules={p})" for m, p in _FROZEN.items()}, defines=True),
        Spec("lora", per_model={m: f"lora(rank=2, targets={p})" for m, p in _TARGETS.items()}, defines=True),
        Spec("chunked_loss(chunk_tokens=8)", models=LANGUAGE, tolerance=ROUNDING),
        Spec("compile(backend=aot_eager)", tolerance=ROUNDING),
    )
}


def conflict(one: Spec, other: Spec) -> str | None:
    """Return why two techniques exclude each other, as they declare it."""
    a, b = (fl.techniques.make_technique(spec.on("gpt2")) for spec in (one, other))
    return a.conflict_with(b) or b.conflict_with(a)


@dataclass
class Result:
    """What a run left behind; tensors whole, on the CPU, in fp32 or wider."""

    weights: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]
    losses: list[torch.Tensor]
    norms: list[torch.Tensor]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a shard's whole tensor, a quantised one's values."""
    for method in ("full_tensor", "dequantize"):
        if hasattr(tensor, method) and type(tensor) is not torch.Tensor and type(tensor) is not nn.Parameter:
            tensor = getattr(tensor, method)()
    tensor = tensor.detach().cpu()
    return tensor.clone().float() if tensor.is_floating_point() else tensor.clone()


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """AdamW with an eps that keeps it from blowing rounding errors of tiny gradients up."""
    return torch.optim.AdamW(parameters, lr=1e-2, eps=1e-4)


def make_step(
    case: Any,
    techniques: list[str],
    precision: str,
    *,
    clip: float | None = None,
    optimizer: Callable[[Any], torch.optim.Optimizer] = adamw,
) -> fl.TrainStep:
    """Return a step on a fresh model."""
    return fl.TrainStep(
        case.build().to(DEVICE),
        optimizer,
        precision=precision,
        loss=case.loss,
        max_grad_norm=clip,
        techniques=techniques,
    )


def run(step: fl.TrainStep, batches: list[Any]) -> Result:
    """Make the updates, and keep what the last of them did."""
    gradients: dict[str, torch.Tensor] = {}
    clip_gradients = step._clip_gradients

    def watch(parameters: list[torch.Tensor], norm: torch.Tensor) -> None:
        named = [(n, p.grad) for n, p in step.model.named_parameters() if p.grad is not None]
        gradients.update({name: whole(gradient) for name, gradient in named})
        clip_gradients(parameters, norm)

    step._clip_gradients = watch  # type: ignore[method-assign]
    outputs = [step(batch) for batch in batches]
    assert all(bool(out.applied) for out in outputs)
    names = {id(p): n for n, p in step.model.named_parameters()}
    moments = {
        f"{names[id(parameter)]}.{key}": whole(value)
        for parameter, state in step.optimizer.state.items()
        for key, value in state.items()
        if key in ("exp_avg", "exp_avg_sq") and id(parameter) in names
    }
    return Result(
        weights={name: whole(parameter) for name, parameter in step.model.named_parameters()},
        gradients=gradients,
        moments=moments,
        buffers={name: whole(buffer) for name, buffer in step.model.named_buffers()},
        losses=[out.loss.cpu() for out in outputs],
        norms=[out.grad_norm.cpu() for out in outputs],
    )


def distance(ours: dict[str, torch.Tensor], plain: dict[str, torch.Tensor], start: dict[str, torch.Tensor]) -> float:
    """Return |ours - plain| / |plain - start| over all tensors together; 0 only if they are equal to the bit."""
    assert ours.keys() == plain.keys(), sorted(ours.keys() ^ plain.keys())
    if all(torch.equal(ours[name], plain[name]) for name in plain):
        return 0.0
    off = sum(float((ours[n].double() - plain[n].double()).square().sum()) for n in plain) ** 0.5
    moved = (
        sum(float((plain[n].double() - start.get(n, torch.zeros(())).double()).square().sum()) for n in plain) ** 0.5
    )
    return max(off / moved if moved else float("inf"), 1e-300)
