"""The table that guides print: what the plain run takes by component, in fp32 and in a half format, for both uses."""

from __future__ import annotations

from collections.abc import Callable

from floatline.hardware import Hardware, resolve
from floatline.plan.allocator import AllocatorSettings
from floatline.plan.estimate import Estimate, estimate
from floatline.plan.traces import TraceCache
from floatline.precision.choose import choose
from floatline.step import Workload

COMPONENTS = {
    "weights": ("parameters", "buffers"),
    "gradients": ("gradients",),
    "optimizer state": ("optimizer state",),
    "activations": ("activations", "logits"),
    "inputs": ("inputs",),
    "temporaries": ("temporaries", "workspaces"),
}
"""Row of the table -> the categories that it adds up."""


def columns(hardware: str | Hardware) -> list[tuple[str, str]]:
    """Return (mode, precision) of the table's columns on a device.

    The half format is the one the hardware multiplies; in training it is autocast over fp32 weights, in inference the
    weights themselves are in it.

    >>> columns("t4")
    [('inference', '32-true'), ('inference', '16-true'), ('train', '32-true'), ('train', '16-mixed')]
    """
    mixed = choose(resolve(hardware)).policy.name
    half = mixed.replace("-mixed", "-true")
    made = [("inference", "32-true"), ("inference", half), ("train", "32-true"), ("train", mixed)]
    return list(dict.fromkeys(made))


def component_table(
    work: Workload,
    hardware: str | Hardware,
    progress: Callable[[str, int], None] = lambda what, done: None,
    *,
    allocator: AllocatorSettings | None = None,
    traces: TraceCache | None = None,
) -> dict[tuple[str, str], Estimate]:
    """Return the estimate of each column: the plain step, no technique on it.

    Args:
        work: What is trained.
        hardware: The device.
        progress: Called before each estimate.
        allocator: Settings of the caching allocator; None for torch's defaults.
        traces: Traces of this workload to take from and to add to.
    """
    made: dict[tuple[str, str], Estimate] = {}
    for mode, precision in columns(hardware):
        progress(f"{mode} in {precision}", len(made))
        made[mode, precision] = estimate(
            work, hardware, precision, mode=mode, quick=True, allocator=allocator, traces=traces
        )
    return made


def components(estimate: Estimate) -> dict[str, int]:
    """Return the rows of one column in bytes: what stands at the peak, what the allocator adds, and the context."""
    at_peak = {row: sum(estimate.categories.get(name, 0) for name in names) for row, names in COMPONENTS.items()}
    at_peak["temporaries"] += estimate.workspaces
    held = sum(at_peak.values())
    return {**at_peak, "allocator": max(0, estimate.peak_reserved - held), "context": estimate.context}
