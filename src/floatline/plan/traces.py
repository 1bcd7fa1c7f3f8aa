"""Traces that are kept: a trace depends on the rules of a GPU, not on how much memory it has or how fast it is.

So all GPUs of one compute capability share the traces of a workload, and an estimate for the second of them is only a
replay through the allocator. What differs between them (memory, context, rates) comes in when a trace is summed up
(estimate.py).

Traces of a large model hold megabytes; drop the cache when the GPUs that share it are done.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch

from floatline.hardware import Hardware
from floatline.observe.events import Trace
from floatline.observe.trace import trace
from floatline.precision import Policy
from floatline.precision import resolve as resolve_precision
from floatline.step import Workload
from floatline.techniques import Technique


def rules_of(hardware: Hardware) -> Hashable:
    """Return what decides how a step runs on a device: devices with the same have the same traces.

    >>> from floatline.hardware import lookup
    >>> rules_of(lookup("a10g")) == rules_of(lookup("rtx-3090")), rules_of(lookup("t4")) == rules_of(lookup("l4"))
    (True, False)
    """
    return (hardware.kind, hardware.capability, hardware.cpu_formats)


class TraceCache:
    """The traces of one workload, each made once for all devices of the same rules.

    Args:
        work: What is traced.

    Attributes:
        made: How many traces were made so far.
    """

    def __init__(self, work: Workload) -> None:
        self.work = work
        self.made = 0
        self._kept: dict[Hashable, tuple[Trace, str]] = {}

    def trace(
        self, hardware: Hardware, precision: str | Policy, techniques: Sequence[Technique], mode: str, **settings: Any
    ) -> Trace:
        """Return the trace of the workload, made now or before; see `floatline.observe.trace.trace`.

        Args:
            hardware: The device.
            precision: A policy, its string, or "auto".
            techniques: In any order.
            mode: "train" or "inference".
            settings: Further arguments of `trace`.

        Raises:
            ConfigError: As `trace`.
            ModelError: As `trace`.
        """
        policy = resolve_precision(precision, hardware).policy
        key = (rules_of(hardware), str(policy), tuple(sorted(map(str, techniques))), mode, rank_count(),
               tuple(sorted(settings.items())))  # fmt: skip
        if key not in self._kept:
            made = trace(
                self.work, hardware=hardware, precision=precision, techniques=techniques, mode=mode, **settings
            )
            self.made += 1
            self._kept[key] = made, hardware.name
        kept, name = self._kept[key]
        return kept if name == hardware.name else _told_of(kept, name, hardware.name)


def rank_count() -> int:
    """Return how many processes train together, pretended ones (`fake_ranks`) included."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def _told_of(kept: Trace, name: str, other: str) -> Trace:
    """The same trace; its sentences name the other device."""
    notes, assumptions = ([text.replace(name, other) for text in texts] for texts in (kept.notes, kept.assumptions))
    return replace(kept, notes=notes, assumptions=assumptions)
