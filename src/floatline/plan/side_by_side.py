"""All GPUs of the catalog side by side: each is planned for, the smallest first.

GPUs of one capability run a step by the same rules, so they share traces, and the second of them costs a replay only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from floatline.errors import ConfigError
from floatline.hardware import CATALOG, Hardware
from floatline.plan.command import PlanRequest, load, planned, quiet
from floatline.plan.plan import Plan, Progress
from floatline.plan.sources import Source
from floatline.plan.traces import TraceCache, rules_of


@dataclass(frozen=True, kw_only=True)
class Row:
    """One GPU: its plan, or why there is none."""

    hardware: Hardware
    plan: Plan | None = None
    refused: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        if self.plan is None:
            return {"hardware": self.hardware.name, "memory": self.hardware.memory, "refused": self.refused}
        return {
            "hardware": self.hardware.name,
            "memory": self.hardware.memory,
            "precision": self.plan.precision,
            "plain_needed": self.plan.ladder[0].estimate.fit.needed,
            "plain_peak_total": self.plan.ladder[0].estimate.peak_total,
            "needed": self.plan.estimate.fit.needed,
            "peak_total": self.plan.estimate.peak_total,
            "verdict": self.plan.verdict,
            "chance": self.plan.estimate.fit.chance,
            "techniques": list(self.plan.techniques),
            "seconds": self.plan.estimate.time.seconds,
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
        return any(row.plan is not None and row.plan.fits for row in self.rows)

    @property
    def smallest(self) -> Row | None:
        """The smallest GPU on which it fits."""
        return next((row for row in self.rows if row.plan is not None and row.plan.fits), None)

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
    if request.mode == "inference":
        raise ConfigError("--hardware all plans training", hint="name one GPU for --mode inference")
    source = load(request)
    rows: list[Row] = []
    for group in _groups(gpus):
        traces = TraceCache(source.work)  # given up with the group: it may be large
        for gpu in group:
            rows.append(_row(request, source, gpu, traces, _counting(progress, len(rows), len(gpus))))
    if all(row.plan is None for row in rows):
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
        return Row(hardware=gpu, plan=planned(request, source, gpu, traces, progress, advice=False))
    except ConfigError as error:  # this GPU cannot do what was fixed, others may
        return Row(hardware=gpu, refused=error.message)
