"""Peak and live bytes of a stretch of code, by the real allocator.

On CUDA the caching allocator counts. On CPU torch's profiler records every allocation and release of tensor memory
(libraries' scratch included, where they use torch's allocator); their running sum is what is alive. Profiling slows the
code down, so time it elsewhere.

Not covered: memory that python objects, mapped files or other libraries take (`peak_memory` in memory.py sees it).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

_MARK = "floatline mark: "


@dataclass
class Allocations:
    """What was allocated since recording began; filled in when it ends.

    Attributes:
        peak: Most bytes that were alive at once, beyond those alive at the start.
        end: Bytes still alive at the end, beyond those at the start; negative when more was freed.
        marks: Name -> bytes alive at `mark(name)`, beyond those at the start; the last call of a name counts.
    """

    device: torch.device
    peak: int = 0
    end: int = 0
    marks: dict[str, int] = field(default_factory=dict)
    _start: int = 0

    def mark(self, name: str) -> None:
        """Note what is alive here."""
        if self.device.type == "cuda":
            self.marks[name] = torch.cuda.memory_allocated(self.device) - self._start
        else:
            with torch.profiler.record_function(_MARK + name):
                pass


@contextmanager
def record_allocations(device: torch.device) -> Iterator[Allocations]:
    """Record allocations of tensor memory on `device` while the context is active.

    >>> with record_allocations(torch.device("cpu")) as seen:
    ...     kept = torch.empty(1000)
    ...     seen.mark("one"); del kept
    >>> seen.marks["one"], seen.peak >= 4000, seen.end
    (4000, True, 0)
    """
    seen = Allocations(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        seen._start = torch.cuda.memory_allocated(device)
        yield seen
        torch.cuda.synchronize(device)
        seen.peak = torch.cuda.max_memory_allocated(device) - seen._start
        seen.end = torch.cuda.memory_allocated(device) - seen._start
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=False) as profile:
        yield seen
    _sum_up(profile, seen)


def _sum_up(profile: torch.profiler.profile, seen: Allocations) -> None:
    """Add up the allocator's events in their order, and read off the sum at marks."""
    results: Any = profile.profiler.kineto_results  # type: ignore[union-attr]
    events = [(e.start_ns(), e.name(), e.nbytes()) for e in results.events() if e.name() == "[memory]" or _is_mark(e)]
    live = 0
    for _, name, size in sorted(events, key=lambda event: event[0]):
        if name == "[memory]":
            live += size
            seen.peak = max(seen.peak, live)
        else:
            seen.marks[name.removeprefix(_MARK)] = live
    seen.end = live


def _is_mark(event: Any) -> bool:
    return str(event.name()).startswith(_MARK)
