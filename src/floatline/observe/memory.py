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
    counts python, libraries and the page cache of mapped files. Linux tells it in /proc/self/status; `getrusage`,
    which serves elsewhere, would inherit the peak of the process that started this one.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        with open("/proc/self/status", "rb") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith(b"VmHWM"))
    except (OSError, StopIteration):
        pass
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
