"""For how many helper processes a machine has room: the cores and the memory that this process may use now.

What a container may use is read where Linux tells it (version 2 of control groups). Not covered: limits of nested
groups above the container's own, batch systems that only promise cores.
"""

from __future__ import annotations

import os
from pathlib import Path

MOST_HELPERS = 3
HELD, SPARE = 2 * 2**30, 4 * 2**30
"""Bytes of memory that a helper may take, and that must be left for this process and others."""


def room() -> int:
    """Return for how many helpers this machine has cores and memory now."""
    return max(0, min(MOST_HELPERS, _cores() - 1, (available_memory() - SPARE) // HELD))


def _cores() -> int:
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    return min(allowed, int(quota) // int(period)) if quota.isdigit() and period.strip().isdigit() else allowed


def available_memory() -> int:
    """Return the bytes of memory that are free or can be freed, as far as the container allows; unknown is plenty."""
    told = [line.split()[1] for line in _read("/proc/meminfo").splitlines() if line.startswith("MemAvailable:")]
    free = int(told[0]) * 1024 if told else 2**40
    most, used = (_read(f"/sys/fs/cgroup/memory.{name}").strip() for name in ("max", "current"))
    return min(free, int(most) - int(used)) if most.isdigit() and used.isdigit() else free


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
