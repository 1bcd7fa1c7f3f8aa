"""The random state of python, numpy and torch, as plain values that load with `weights_only=True`."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def capture() -> dict[str, Any]:
    """Return the random state of python, torch and every CUDA device, and of numpy where it is loaded."""
    return {
        "python": random.getstate(),
        "numpy": _numpy(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _numpy() -> tuple[Any, ...] | None:
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    name, keys, position, has_gauss, gauss = numpy.random.get_state(legacy=True)
    return (str(name), torch.from_numpy(keys.astype(numpy.int64)), int(position), int(has_gauss), float(gauss))


def restore(state: dict[str, Any]) -> None:
    """Set the random state that `capture` returned; CUDA states for devices that are absent are left out."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if state["numpy"] is not None:
        import numpy

        name, keys, position, has_gauss, cached = state["numpy"]
        numpy.random.set_state((name, keys.numpy().astype(numpy.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


@contextmanager
def python_random_kept() -> Iterator[None]:
    """Context after which the random numbers of Python, and of numpy where it is in use, go on as before it."""
    python = random.getstate()
    numpy = sys.modules.get("numpy")
    state = numpy.random.get_state() if numpy is not None else None
    try:
        yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(state)


def generators(device: torch.device) -> tuple[torch.Tensor, ...]:
    """Return the state of torch's generators alone, of the CPU and of `device`: quick enough for every step."""
    state = torch.get_rng_state()
    return (state, torch.cuda.get_rng_state(device)) if device.type == "cuda" else (state,)


def set_generators(states: tuple[torch.Tensor, ...], device: torch.device) -> None:
    """Set what `generators` returned."""
    torch.set_rng_state(states[0])
    if len(states) > 1 and device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
