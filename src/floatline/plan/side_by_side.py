"""All GPUs of the catalog side by side: each is planned for, or inference estimated, the smallest first.

GPUs of one capability run a step by the same rules, so they share traces, and the second of them costs a replay only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from floatline.errors import ConfigError
from floatline.hardware import CATALOG, Hardware
from floatline.plan.command import PlanRequest, inference_precision, load, planned, quiet
from floatline.plan.estimate import Estimate, estimate
from floatline.plan.plan import Plan, Progress
from floatline.plan.sources import Source
from floatline.plan.traces import TraceCache, rules_of


@dataclass(frozen=True, kw_only=True)
class Row:
    """One GPU: its plan, or why there is none.

    Attributes:
        hardware: The GPU.
        plan: How to train on it; None for inference.
        inference: The estimate of inference; None for training.
        refused: Why the GPU cannot do what was asked.
    """

    hardware: Hardware
    plan: Plan | None = None
    inference: Estimate | None = None
    refused: str = ""

    @property
    def estimate(self) -> Estimate | None:
        """With the plan's techniques, or of inference; None where the GPU cannot do what was asked."""
        return self.plan.estimate if self.plan is not None else self.inference

    @property
    def plain(self) -> Estimate | None:
        """The estimate without any technique."""
        return self.plan.ladder[0].estimate if self.plan is not None else self.inference

    @property
    def fits(self) -> bool:
        """Whether the run fits on this GPU."""
        return self.estimate is not None and bool(self.estimate.fit)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        found, plain = self.estimate, self.plain
        if found is None or plain is None:
            return {"hardware": self.hardware.name, "memory": self.hardware.memory, "refused": self.refused}
        return {
            "hardware": self.hardware.name,
            "memory": self.hardware.memory,
            "precision": found.precision,
            "plain_needed": plain.fit.needed,
            "plain_peak_total": plain.peak_total,
            "needed": found.fit.needed,
            "peak_total": found.peak_total,
            "verdict": found.verdict,
            "chance": found.fit.chance,
            "techniques": list(found.techniques),
            "seconds": found.time.seconds,
        }


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The answer for all GPUs.

    Attributes:
        source: The model and its batch.
        rows: One a GPU, by memory.
    """

    source: Source
    rows: tuple[Row, ...]

    @property
    def fits(self) -> bool:
        """Whether there is a GPU on which it fits."""
        return any(row.fits for row in self.rows)

    @property
    def smallest(self) -> Row | None:
        """The smallest GPU on which it fits."""
        return next((row for row in self.rows if row.fits), None)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"model": self.source.name, "fits": self.fits, "hardware": [row.as_dict() for row in self.rows]}


@quiet()
def compare(
    request: PlanRequest,
    progress: Progress = lambda what, done: None,
    *,
    gpus: Sequence[Hardware] = tuple(CATALOG.values()),
) -> Comparison:
    """Plan for each GPU.

    Args:
        request: The options; its hardware is not looked at.
        progress: Called before each trial.
        gpus: Which; by default the whole catalog.

    Raises:
        ConfigError: Options that belong to one GPU, or that no GPU can do.
        ModelError: A model that cannot be loaded or run without values.
    """
    for option, value in (("--vram", request.vram), ("--capability", request.capability)):
        if value is not None:
            raise ConfigError(f"{option} describes one GPU, and --hardware is all", hint=f"leave {option} out")
    source = load(request)
    rows: list[Row] = []
    for group in _groups(gpus):
        traces = TraceCache(source.work)  # given up with the group: it may be large
        for gpu in group:
            rows.append(_row(request, source, gpu, traces, _counting(progress, len(rows), len(gpus))))
    if all(row.estimate is None for row in rows):
        raise ConfigError(
            rows[0].refused, hint="no GPU of the catalog can do it; see `floatline doctor --hardware NAME`"
        )
    return Comparison(source=source, rows=tuple(sorted(rows, key=lambda row: (row.hardware.memory, row.hardware.name))))


def _groups(gpus: Sequence[Hardware]) -> list[list[Hardware]]:
    groups: dict[Any, list[Hardware]] = {}
    for gpu in gpus:
        groups.setdefault(rules_of(gpu), []).append(gpu)
    return list(groups.values())


def _counting(progress: Progress, done: int, of: int) -> Progress:
    """Tell how many GPUs are done instead of how many trials."""
    return lambda what, trials: progress(f"GPU {done + 1} of {of}, {what}", trials)


def _row(request: PlanRequest, source: Source, gpu: Hardware, traces: TraceCache, progress: Progress) -> Row:
    try:
        if request.mode == "inference":
            progress(f"inference on {gpu.name}", 0)
            precision, _ = inference_precision(request, gpu)
            found = estimate(source.work, gpu, precision, mode="inference", allocator=request.allocator, traces=traces)
            return Row(hardware=gpu, inference=found)
        return Row(hardware=gpu, plan=planned(request, source, gpu, traces, progress, advice=False))
    except ConfigError as error:  # this GPU cannot do what was fixed, others may
        return Row(hardware=gpu, refused=error.message)
