"""The random state of python, numpy and torch, as plain values that load with `weights_only=True`."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from floatline.train.data.sampler import mix_seed


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed python, numpy and torch (all devices); ranks draw different numbers, for they drop out different neurons."""
    seed = mix_seed(seed, -1 - rank) if rank else seed
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def capture() -> dict[str, Any]:
    """Return the random state of python, numpy, torch and every CUDA device."""
    state: Any = np.random.get_state(legacy=True)
    name, keys, position, has_gauss, gauss = state
    return {
        "python": random.getstate(),
        "numpy": (str(name), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore(state: dict[str, Any]) -> None:
    """Set the random state that `capture` returned; CUDA states for devices that are absent are left out."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def restore_rank(states: list[dict[str, Any]] | dict[str, Any], rank: int) -> None:
    """Set the random state that this rank had when the ranks' states were saved; a new rank keeps what it has."""
    states = [states] if isinstance(states, dict) else states  # of a run that knew of no ranks
    if rank < len(states):
        restore(states[rank])
