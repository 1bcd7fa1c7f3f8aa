"""Settings of an audit, and what is refused before anything runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from floatline.errors import ConfigError, did_you_mean

NAMES = {"bf16": ("bf16-mixed", "bf16-true", "bf16"), "fp16": ("16-mixed", "16-true", "16")}
"""Candidate -> its policies in mode mixed and true, and what it is called in a rule."""
MODES = ("mixed", "true")
MOST_SEED = 2**62


def check_subject(model: Any, loss: Any, optimizer: Any) -> None:
    """Refuse what is no module, no loss, no optimizer.

    Raises:
        ConfigError: That.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model is a {type(model).__name__}", hint="pass a torch.nn.Module, or use audit_function(fn, inputs)"
        )
    if loss is not None and not callable(loss):
        raise ConfigError(f"loss={loss!r}", hint="pass a function (model, batch) -> tensor, or None")
    if optimizer is not None and not callable(optimizer) and not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            f"optimizer={optimizer!r}", hint="give an optimizer or a factory: lambda p: torch.optim.AdamW(p, lr=1e-5)"
        )


def check_runs(repeats: Any, probes: Any, most_trials: Any) -> None:
    """Refuse what is no number of runs.

    Raises:
        ConfigError: That.
    """
    for key, value in {"repeats": repeats, "probes": 0 if probes is None else probes}.items():
        if type(value) is not int or value < 0:
            raise ConfigError(f"{key}={value!r}", hint="give a number of runs, 0 or more")
    if most_trials is not None and (type(most_trials) is not int or most_trials < 2):
        raise ConfigError(f"most_trials={most_trials!r}", hint="give 2 or more, or None")


def check_candidates(candidates: Any) -> None:
    """Refuse what is no sequence of lower formats.

    Raises:
        ConfigError: A text, nothing, or an unknown name.
    """
    if not isinstance(candidates, (tuple, list)) or not candidates:
        raise ConfigError(f"candidates={candidates!r}", hint='give a tuple: candidates=("bf16",)')
    for name in candidates:
        if name not in tuple(NAMES):
            raise ConfigError(f"unknown candidate {name!r}", hint=did_you_mean(str(name), NAMES))


def check_mode(mode: Any) -> None:
    """Refuse what is neither "mixed" nor "true".

    Raises:
        ConfigError: That.
    """
    if mode not in MODES:
        raise ConfigError(f"unknown mode {mode!r}", hint=did_you_mean(str(mode), MODES))


def check_seed(seed: Any) -> None:
    """Refuse what torch takes no seed of.

    Raises:
        ConfigError: That.
    """
    if type(seed) is not int or not 0 <= seed < MOST_SEED:
        raise ConfigError(f"seed={seed!r}", hint="give a whole number, 0 or more and below 2^62")
