"""What one plan of a run takes: memory by category, what the allocator makes of it, whether it fits, and time.

`estimate` runs the step on fake tensors (observe/trace.py), replays the allocations through the target's allocator
(allocator.py) and adds what lies outside of it: the CUDA context, and the workspaces of cuBLAS.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from floatline.hardware import Hardware, resolve
from floatline.observe.events import Category, Trace, peak_of
from floatline.observe.target.workspaces import workspaces
from floatline.plan.allocator import AllocatorSettings, Replay, simulate
from floatline.plan.fit import BAND, Fit, fit_of
from floatline.plan.roofline import UpdateTime, assumptions, update_time
from floatline.plan.timeline import Timeline, timeline_of
from floatline.plan.traces import TraceCache
from floatline.precision import Policy
from floatline.precision import resolve as resolve_precision
from floatline.step import Workload
from floatline.techniques import Technique, make_technique

_CERTAIN = (Category.PARAMETER, Category.GRADIENT, Category.OPTIMIZER, Category.BUFFER)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run takes on a device. Bytes are plain integers, times seconds.

    Attributes:
        hardware: The device.
        precision: The policy, as its string.
        techniques: Their texts.
        mode: "train" or "inference".
        peak_allocated: Peak of tensors, as `torch.cuda.max_memory_allocated` counts it.
        peak_reserved: Peak of what the caching allocator holds, as `max_memory_reserved`.
        peak_total: That and what lies outside: context and libraries. Where it is over the device's memory the run may
            still go through, for the allocator gives back what lies idle; `fit.needed` is what is compared.
        context: Bytes of the CUDA context.
        workspaces: Bytes of cuBLAS's workspaces, part of the allocated ones.
        categories: Bytes at the peak by category.
        states: Bytes of each category between two updates: what is always there.
        host_peak: Peak of host memory that techniques use.
        timeline: The curve over the step, with the op and module at the peak.
        fit: Margin and chance.
        time: One update by the roofline.
        flops: Of one update.
        micro_batches: Of one update.
        assumptions: What the prediction rests on.
        notes: What the techniques chose, with reasons.
    """

    hardware: Hardware
    precision: str
    techniques: tuple[str, ...]
    mode: str
    peak_allocated: int
    peak_reserved: int
    peak_total: int
    context: int
    workspaces: int
    categories: dict[str, int]
    states: dict[str, int]
    host_peak: int
    timeline: Timeline = field(repr=False)
    fit: Fit
    time: UpdateTime
    flops: int
    micro_batches: int
    assumptions: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """ "fits", "tight" or "does not fit"."""
        return self.fit.verdict

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; the curve is left out."""
        return {
            "hardware": self.hardware.name,
            "precision": self.precision,
            "techniques": list(self.techniques),
            "mode": self.mode,
            "verdict": self.verdict,
            "chance": self.fit.chance,
            "needed": self.fit.needed,
            "band": list(self.fit.band),
            "capacity": self.fit.capacity,
            "margin": self.fit.margin,
            "reserve": self.fit.reserve,
            **{name: getattr(self, name) for name in _NUMBERS},
            "seconds": self.time.seconds,
            "peak_op": self.timeline.op,
            "peak_module": self.timeline.module,
            "peak_phase": self.timeline.phase,
            "categories": self.categories,
            "states": self.states,
            "assumptions": list(self.assumptions),
            "notes": list(self.notes),
        }


_NUMBERS = ("peak_allocated", "peak_reserved", "peak_total", "context", "workspaces", "host_peak", "flops",
            "micro_batches")  # fmt: skip


def estimate(
    work: Workload,
    hardware: str | Hardware = "auto",
    precision: str | Policy = "auto",
    techniques: Sequence[Technique | str] = (),
    mode: str = "train",
    *,
    max_grad_norm: float | None = 1.0,
    allocator: AllocatorSettings | None = None,
    traces: TraceCache | None = None,
    quick: bool = False,
) -> Estimate:
    """Predict the memory and time of one update, or one forward, without the GPU.

    Args:
        work: What is trained.
        hardware: A catalog name ("t4"), facts about a device, or "auto" for this machine.
        precision: A policy, its string, or "auto".
        techniques: Techniques or their texts.
        mode: "train" or "inference".
        max_grad_norm: As for `TrainStep`.
        allocator: Settings of the caching allocator; None for torch's defaults.
        traces: Traces of this workload to take from and to add to; None makes one anew.
        quick: Run one update instead of two, and take the second to go the same way.

    Returns:
        The estimate; `.verdict` says whether it fits.

    Raises:
        ConfigError: Something the step refuses, or an unknown name.
        ModelError: The model cannot run without values.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> work = Workload(model=lambda: nn.Linear(1000, 1000), batch=lambda: (torch.ones(8, 1000),),
        ...                 loss=lambda model, batch: model(*batch).square().mean())
        >>> estimate(work, "t4", "32-true").verdict
        'fits'
    """
    hardware = resolve(hardware)
    made = [make_technique(technique) for technique in techniques]
    kept = traces or TraceCache(work)
    seen = kept.trace(hardware, precision, made, mode, max_grad_norm=max_grad_norm, quick=quick)
    policy = resolve_precision(precision, hardware).policy
    return summarize(seen, hardware, str(policy), tuple(map(str, made)), mode, allocator or AllocatorSettings())


def summarize(
    seen: Trace,
    hardware: Hardware,
    precision: str,
    techniques: tuple[str, ...],
    mode: str,
    allocator: AllocatorSettings,
) -> Estimate:
    """Return the estimate that a trace amounts to on a device."""
    extra = workspaces(hardware, training=mode == "train") if hardware.kind == "cuda" else 0
    if hardware.kind == "cuda":
        events = [*_workspace_events(seen, extra), *seen.events]
        replay = simulate(events, allocator)
        allocated, reserved = replay.peak_allocated, replay.peak_reserved
        needed = smallest_device(events, replay, hardware.memory - hardware.context, allocator)
    else:
        allocated = reserved = needed = peak_of(seen.events)[0]
    timeline = timeline_of(seen)
    states = _states(seen)
    certain = sum(timeline.at_peak.get(category.value, 0) for category in _CERTAIN)
    total = reserved + hardware.context
    return Estimate(
        hardware=hardware,
        precision=precision,
        techniques=techniques,
        mode=mode,
        peak_allocated=allocated,
        peak_reserved=reserved,
        peak_total=total,
        context=hardware.context,
        workspaces=extra,
        categories=timeline.at_peak,
        states=states,
        host_peak=peak_of(seen.host_events)[0],
        timeline=timeline,
        fit=fit_of(needed + hardware.context, certain, hardware),
        time=update_time(seen, hardware),
        flops=seen.flops,
        micro_batches=seen.micro_batches,
        assumptions=(*seen.assumptions, *assumptions(hardware), BAND),
        notes=tuple(seen.notes),
    )


def smallest_device(events: list[tuple[int, int]], replay: Replay, capacity: int, allocator: AllocatorSettings) -> int:
    """Return the least memory with which the run goes through, in bytes.

    With plenty of memory the allocator reserves more than it must: it never returns a segment. Short of it, it returns
    what is free and goes on. So where the reserved peak is more than `capacity` and the allocated one is not, smaller
    devices are tried, to within 2 %.
    """
    most, least = replay.peak_reserved, replay.peak_allocated
    if most <= capacity or least > capacity:
        return most if most <= capacity else least
    if simulate(events, allocator, capacity).out_of_memory is not None:
        return most
    most = capacity
    while most - least > 0.02 * most:
        middle = (most + least) // 2
        if simulate(events, allocator, middle).out_of_memory is None:
            most = middle
        else:
            least = middle
    return most


def _workspace_events(seen: Trace, nbytes: int) -> list[tuple[int, int]]:
    """cuBLAS takes its workspaces at the first product and keeps them."""
    return [(len(seen.storages), nbytes)] if nbytes else []


def _states(seen: Trace) -> dict[str, int]:
    """Return what is alive when the trace ends, by category."""
    alive: dict[str, int] = {}
    for number, nbytes in seen.events:
        name = seen.storages[number].category.value
        alive[name] = alive.get(name, 0) + nbytes
    return {name: nbytes for name, nbytes in alive.items() if nbytes}
