"""Peak memory of this process: the allocator's on CUDA, resident memory on CPU."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

_RSS_UNIT = 1 if sys.platform == "darwin" else 1024


def peak_memory(device: torch.device) -> int:
    """Return the peak since the last reset in bytes.

    On CUDA what tensors occupied (`max_memory_allocated`); on CPU the process's largest resident size, which also
    counts python, libraries and the page cache of mapped files.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT


def reset_peak_memory(device: torch.device) -> None:
    """Start a new peak. On CPU this needs Linux's clear_refs; elsewhere the process's peak stands."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return
