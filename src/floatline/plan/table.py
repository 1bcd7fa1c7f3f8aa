"""The table that guides print: what the plain run takes by component, in fp32 and in a half format, for both uses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from floatline.hardware import Hardware, resolve
from floatline.plan.allocator import AllocatorSettings
from floatline.plan.estimate import Estimate
from floatline.plan.parallel import ALONE, Alone
from floatline.plan.traces import TraceCache
from floatline.plan.trial import Trial
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
    helpers: Alone = ALONE,
) -> dict[tuple[str, str], Estimate]:
    """Return the estimate of each column: the plain step, no technique on it.

    Args:
        work: What is trained.
        hardware: The device.
        progress: Called before each estimate.
        allocator: Settings of the caching allocator; None for torch's defaults.
        traces: Traces of this workload to take from and to add to.
        helpers: Processes that make estimates of the same workload meanwhile.
    """
    made: dict[tuple[str, str], Estimate] = {}
    for column, trial in trials_of_table(hardware, allocator).items():
        progress(trial.told, len(made))
        made[column] = helpers.estimate(trial, partial(trial.estimate, work, traces))
    return made


def trials_of_table(
    hardware: str | Hardware, allocator: AllocatorSettings | None = None
) -> dict[tuple[str, str], Trial]:
    """Return the trial of each column; helpers may begin with them early."""
    return {
        (mode, precision): Trial(
            hardware=resolve(hardware),
            precision=precision,
            mode=mode,
            allocator=allocator,
            told=f"{mode} in {precision}",
        )
        for mode, precision in columns(hardware)
    }


def components(estimate: Estimate) -> dict[str, int]:
    """Return the rows of one column in bytes: what stands at the peak, what the allocator adds, and the context."""
    at_peak = {row: sum(estimate.categories.get(name, 0) for name in names) for row, names in COMPONENTS.items()}
    at_peak["temporaries"] += estimate.workspaces
    held = sum(at_peak.values())
    return {**at_peak, "allocator": max(0, estimate.peak_reserved - held), "context": estimate.context}
