"""Seeds and random states of the ranks of a run."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from floatline.step.random_state import capture, restore
from floatline.train.data.sampler import mix_seed

__all__ = ["capture", "restore", "restore_rank", "seed_everything"]


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed python, numpy and torch (all devices); ranks draw different numbers, for they drop out different neurons."""
    seed = mix_seed(seed, -1 - rank) if rank else seed
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def restore_rank(states: list[dict[str, Any]] | dict[str, Any], rank: int) -> None:
    """Set the random state that this rank had when the ranks' states were saved; a new rank keeps what it has."""
    states = [states] if isinstance(states, dict) else states  # of a run that knew of no ranks
    if rank < len(states):
        restore(states[rank])
