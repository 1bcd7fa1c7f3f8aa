"""Who is compared in finite_overhead.py: ways to know that a step was not finite.

The training is that of step_contestants.py.

floatline.TrainStep          the guard with all it does by default: verdict over loss, gradients and buffers, names of
                             the gradients at fault, silent trouble every 100 updates
the same, every 10           silent trouble looked for every 10 updates
the same, rollback           and a snapshot every 100 updates
guide-style monitor          isnan, isinf, max and mean of each parameter's gradient, read one by one
isfinite of the norm         the least that a loop can do: one test of the clipped norm before the step
anomaly mode                 torch.autograd.set_detect_anomaly
DebugUnderflowOverflow       transformers' hooks on every module
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import floatline as fl
from common import Clock
from step_contestants import MAX_GRAD_NORM, bare_losses, clip, make_loader, make_model, make_optimizer, make_schedule


def _guarded(clock: Clock, **settings: Any) -> None:
    model = make_model(clock)
    optimizer = make_optimizer(model)
    step = fl.TrainStep(model, optimizer, "bf16-mixed", max_grad_norm=MAX_GRAD_NORM, schedule=make_schedule(optimizer),
                        guard=fl.Guard(**settings))  # fmt: skip
    losses = []
    for batch in make_loader(clock):
        losses.append(step(batch).loss.item())


def guarded(clock: Clock, folder: Path) -> None:
    _guarded(clock)


def guarded_closely(clock: Clock, folder: Path) -> None:
    _guarded(clock, sample_every=10)


def guarded_with_rollback(clock: Clock, folder: Path) -> None:
    _guarded(clock, on_fault="rollback")


def _read(losses: Iterator[Tensor]) -> None:
    kept = []
    for loss in losses:
        kept.append(loss.item())


def guide_monitor(clock: Clock, folder: Path) -> None:
    history: list[dict[str, float]] = []

    def watch(model: nn.Module) -> bool:
        largest, mean, bad = 0.0, 0.0, 0
        for parameter in model.parameters():
            gradient = parameter.grad
            if gradient is None:
                continue
            bad += bool(torch.isnan(gradient).any().item()) + bool(torch.isinf(gradient).any().item())
            largest = max(largest, gradient.abs().max().item())
            mean += gradient.abs().mean().item()
        history.append({"max": largest, "mean": mean, "bad": bad})
        clip(model)
        return not bad

    _read(bare_losses(clock, watch))


def norm_tested(clock: Clock, folder: Path) -> None:
    def watch(model: nn.Module) -> bool:
        return bool(torch.isfinite(nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)))

    _read(bare_losses(clock, watch))


def anomaly_mode(clock: Clock, folder: Path) -> None:
    with torch.autograd.set_detect_anomaly(True):
        _read(bare_losses(clock))


def debug_hooks(clock: Clock, folder: Path) -> None:
    from transformers.debug_utils import DebugUnderflowOverflow

    debuggers: list[Any] = []

    def watch(model: nn.Module) -> bool:
        if not debuggers:  # from the second step on
            debuggers.append(DebugUnderflowOverflow(model, max_frames_to_save=1))
        return clip(model)

    _read(bare_losses(clock, watch))
