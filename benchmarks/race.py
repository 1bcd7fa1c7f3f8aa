"""Contestants that train in one process, a step at a time: how they are weighed and timed in turns.

Each is warmed up, weighed in a step of its own by the real allocator, and then timed round by round; who begins changes
from round to round, so a machine that gets slower meanwhile does so for all.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from common import progress
from floatline.observe.allocations import Allocations, record_allocations


@dataclass
class Contestant:
    """Something that trains one model a step at a time.

    Attributes:
        step: Makes one update.
        tensors: () -> what lives between steps: weights, buffers, optimizer state.
        optimizer: Whose state is weighed; None where it is out of reach.
        recording: Where the end of the forward is noted, while memory is recorded.
    """

    name: str
    step: Callable[[], Any]
    tensors: Callable[[], list[torch.Tensor]]
    optimizer: torch.optim.Optimizer | None = None
    recording: list[Allocations] = field(default_factory=list)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """AdamW as everybody here uses it."""
    return torch.optim.AdamW(parameters, lr=1e-4, fused=True)


def tensors_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Return what lives between steps."""
    return [*model.parameters(), *model.buffers(), *state_of(optimizer)]


def state_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]


def bytes_of(tensors: list[torch.Tensor]) -> int:
    """Return the bytes of tensors, shared storages once; of quantised ones and shards the parts that lie here."""
    storages: dict[int, int] = {}
    for tensor in tensors:
        if hasattr(tensor, "__tensor_flatten__"):
            names, _ = tensor.__tensor_flatten__()
            parts = [getattr(tensor, name) for name in names]
            inner = [part for part in parts if isinstance(part, torch.Tensor)]  # of shards, one is the mesh
        else:
            inner = [tensor]
        for part in inner:
            storages[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
    return sum(storages.values())


def weigh(contestant: Contestant, device: torch.device) -> tuple[int, int, int]:
    """Return activations, peak and optimizer state of one step in bytes; two steps before it warm up."""
    contestant.step()
    contestant.step()
    gc.collect()
    with record_allocations(device) as seen:
        contestant.recording.append(seen)
        contestant.step()
        contestant.recording.clear()
    state = bytes_of(state_of(contestant.optimizer)) if contestant.optimizer is not None else 0
    return seen.marks.get("forward", 0), bytes_of(contestant.tensors()) + seen.peak, state


def time_in_turns(racers: list[Contestant], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Return the seconds of a step of each contestant, one a round; who begins changes from round to round."""
    seconds: dict[str, list[float]] = {racer.name: [] for racer in racers}
    for number in range(rounds):
        shift = number % len(racers)
        for racer in racers[shift:] + racers[:shift]:
            progress(f"round {number + 1}/{rounds}: {racer.name}")
            seconds[racer.name].append(_one_step(racer, device))
    progress("")
    return seconds


def _one_step(racer: Contestant, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    racer.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
