"""How other libraries do it, as contestants of benchmarks/techniques.py: each as its documentation says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import floatline as fl
from floatline.step import default_loss, move
from race import Contestant, adamw, tensors_of
from technique_models import Work


def transformers_checkpointing(name: str, work: Work, device: torch.device) -> Contestant | None:
    """transformers' own gradient checkpointing, non-reentrant, inside our plain step; only for its models."""
    model = work.build().to(device)
    if not hasattr(model, "gradient_checkpointing_enable"):
        return None
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    recording: list[Any] = []
    step = fl.TrainStep(model, adamw, precision="32-true", loss=_marking(work, recording))
    batch = move(work.batch(), device)
    return Contestant(name, lambda: step(batch), lambda: tensors_of(model, step.optimizer), step.optimizer, recording)


def save_on_cpu(name: str, work: Work, device: torch.device) -> Contestant:
    """torch's save_on_cpu hooks around forward and loss, inside our plain step."""
    recording: list[Any] = []
    inner = _marking(work, recording)

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        with torch.autograd.graph.save_on_cpu(pin_memory=device.type == "cuda"):
            return inner(model, batch)

    model = work.build().to(device)
    step = fl.TrainStep(model, adamw, precision="32-true", loss=loss)
    batch = move(work.batch(), device)
    return Contestant(name, lambda: step(batch), lambda: tensors_of(model, step.optimizer), step.optimizer, recording)


def accelerate_accumulation(name: str, work: Work, device: torch.device) -> Contestant:
    """accelerate's accumulation over 4 micro-batches: `accumulate`, `backward`, `clip_grad_norm_`."""
    from accelerate import Accelerator

    accelerator = Accelerator(gradient_accumulation_steps=4, cpu=device.type == "cpu")
    model, optimizer = accelerator.prepare(work.build(), adamw([nn.Parameter(torch.zeros(1))]))
    optimizer = accelerator.prepare(adamw(model.parameters()))
    micro_batches, recording = _quarters(model, work, device), []
    loss_of = _marking(work, recording)

    def step() -> None:
        for micro_batch in micro_batches:
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, micro_batch))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

    return Contestant(name, step, lambda: tensors_of(model, optimizer), optimizer.optimizer, recording)


def fabric_accumulation(name: str, work: Work, device: torch.device) -> Contestant:
    """Lightning Fabric's accumulation over 4 micro-batches, as its guide writes the loop."""
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator=device.type, devices=1)
    model = work.build()
    module, optimizer = fabric.setup(model, adamw(model.parameters()))
    micro_batches, recording = _quarters(model, work, device), []
    loss_of = _marking(work, recording)

    def step() -> None:
        for index, micro_batch in enumerate(micro_batches):
            with fabric.no_backward_sync(module, enabled=index < len(micro_batches) - 1):
                fabric.backward(loss_of(module, micro_batch) / len(micro_batches))
        fabric.clip_gradients(module, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()

    return Contestant(name, step, lambda: tensors_of(model, optimizer), optimizer.optimizer, recording)


def _marking(work: Work, recording: list[Any]) -> Callable[[nn.Module, Any], torch.Tensor]:
    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        value = (work.loss or default_loss)(model, batch)
        for seen in recording:
            seen.mark("forward")
        return value

    return loss


def _quarters(model: nn.Module, work: Work, device: torch.device) -> list[Any]:
    """Cut the batch as our accumulation does, so that all compute the same."""
    return [move(part, device) for part in fl.techniques.Accumulation(micro_batches=4).apply(model).split(work.batch())]


PEERS: dict[str, Callable[[str, Work, torch.device], Contestant | None]] = {
    "transformers checkpointing": transformers_checkpointing,
    "torch save_on_cpu (offload to host)": save_on_cpu,
    "accelerate accumulation, 4": accelerate_accumulation,
    "Lightning Fabric accumulation, 4": fabric_accumulation,
}
"""Name -> makes the contestant, or None where the peer does not fit the model."""
