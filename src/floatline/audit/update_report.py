"""What became of optimizer updates: rows, the ways in which they fail, and the change that answers them.

The module that fills the rows (updates.py) says what the ways mean.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from floatline.audit.movement import Movement
from floatline.formats import FORMATS

PROGRESS = 0.75
"""Share of the way below which weights or a second moment count as stuck."""
SURE = 3.0
"""Standard errors by which progress must be below that."""
FAR_OFF = 0.5
"""Error of the weights, relative to their way, above which a lost second moment matters."""

Which = Literal["overflow", "eps underflows", "second moment underflows", "swallowed", "stalled second moment"]
STAGNATION = ("swallowed", "stalled second moment")


@dataclass(frozen=True, kw_only=True)
class UpdateRow:
    """One parameter.

    Attributes:
        name: Its dotted name.
        elements: How many were looked at.
        lr: Learning rate of its group; None where the optimizer has none.
        weights: How the weights moved.
        second_moment: How the second moment followed; None without one.
        state_format: Format of the second moment, else of the weights.
        second_moment_ratio: Median of the low second moment over the exact one after those steps.
        second_moment_lost: Share of elements whose second moment is 0 or infinite in the format, and should not be.
        eps_lost: eps is not 0 but rounds to 0 in the state's format; not under fused kernels, which compute in fp32.
        non_finite: Share of weights that are not finite at the end, where fp64's are.
        gradients_lost: Share of gradients that round to 0 or to infinity in the weights' format.
        found: Every way in which it fails, the gravest first.
    """

    name: str
    elements: int
    lr: float | None
    weights: Movement
    second_moment: Movement | None = None
    state_format: str
    second_moment_ratio: float | None = None
    second_moment_lost: float = 0.0
    eps_lost: bool = False
    non_finite: float = 0.0
    gradients_lost: float = 0.0
    found: tuple[Which, ...] = ()

    @property
    def which(self) -> Which | None:
        """The gravest way in which it fails."""
        return self.found[0] if self.found else None

    @property
    def failure(self) -> Literal["stagnation", "range"] | None:
        """The kind of failure."""
        if self.which is None:
            return None
        return "stagnation" if self.which in STAGNATION else "range"


@dataclass(frozen=True, kw_only=True)
class UpdateReport:
    """What became of the updates.

    Attributes:
        weights: Format of the weights.
        master: Whether the optimizer had an fp32 copy.
        steps: Updates made.
        rows: One for each parameter looked at, in order.
        unseen: Parameter -> why it was not looked at.
    """

    weights: str
    master: bool
    steps: int
    rows: tuple[UpdateRow, ...]
    unseen: dict[str, str]

    @property
    def worst(self) -> UpdateRow | None:
        """The row that fails most gravely: range before stagnation, then the least progress; None if none fails."""
        failing = [row for row in self.rows if row.found]
        return min(failing, key=lambda row: (row.failure != "range", row.weights.progress or 0.0), default=None)

    @property
    def failures(self) -> dict[str, int]:
        """How often each way to fail was found."""
        found = [which for row in self.rows for which in row.found]
        return {which: found.count(which) for which in dict.fromkeys(found)}

    @property
    def advice(self) -> str:
        """What to change, in one sentence; empty where nothing is asked for."""
        return advise(self)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        rows = [{**asdict(row), "found": list(row.found), "failure": row.failure, "which": row.which}
                for row in self.rows]  # fmt: skip
        return {"weights": self.weights, "master": self.master, "steps": self.steps, "rows": rows,
                "unseen": dict(self.unseen), "failures": self.failures, "advice": self.advice}  # fmt: skip


def judge(row: UpdateRow, *, infinite: bool) -> tuple[Which, ...]:
    """Return the ways in which a parameter fails, the gravest first.

    Args:
        row: What was measured.
        infinite: Its second moment left the format.
    """
    moved, moment = row.weights, row.second_moment
    ways: dict[Which, bool] = {
        "eps underflows": row.eps_lost,
        "overflow": infinite or (row.non_finite > 0 and not row.eps_lost),
        "second moment underflows": not row.eps_lost
        and not infinite
        and row.second_moment_lost > 0
        and (moved.error or 0.0) > FAR_OFF,
        "swallowed": _is_stuck(moved),
        "stalled second moment": moment is not None and _is_stuck(moment),
    }
    return tuple(way for way, is_so in ways.items() if is_so)


def _is_stuck(movement: Movement) -> bool:
    if movement.progress is None or movement.noise is None:
        return False
    return bool(movement.swallowed) and movement.progress + SURE * movement.noise < PROGRESS


def advise(report: UpdateReport) -> str:
    """Return the one change that answers what was found; empty where nothing was."""
    row = report.worst
    if row is None:
        return ""
    fp32 = report.master or report.weights == "fp32"
    if row.failure == "range":
        return _of_range(row, report.weights, fp32)
    if fp32:
        return _beyond_fp32(row)
    if report.weights == "fp16":
        return (
            "step an fp32 master copy of the fp16 weights (precision=16-true keeps one), or keep fp32 weights (-mixed)"
        )
    if "swallowed" in report.failures:
        return (
            "keep what rounding takes away: train.optimizer=kahan, stochastic-rounding or adamw (fp32 master weights) "
            "in a recipe, techniques=['kahan'] in TrainStep; or keep fp32 weights (precision=bf16-mixed)"
        )
    return (
        "keep the second moment moving: train.optimizer=kahan or stochastic-rounding round it stochastically, adamw "
        "keeps it in fp32; or lower beta2 to 0.99"
    )


def _of_range(row: UpdateRow, weights: str, fp32: bool) -> str:
    rate = f"{row.lr or 0.0:g}"
    if fp32:
        return f"{row.name} overflows in fp32: lower the learning rate ({rate}) or clip its gradients"
    if weights == "bf16":
        return f"{row.name} overflows: lower the learning rate ({rate}), clip its gradients, or keep fp32 weights"
    eps = 10.0 ** math.ceil(math.log10(FORMATS[row.state_format].min_normal))
    larger = f"; or give the optimizer eps={eps:g}" if row.which == "eps underflows" else ""
    return f"step an fp32 master copy of the fp16 weights (precision=16-true), or keep fp32 weights (16-mixed){larger}"


def _beyond_fp32(row: UpdateRow) -> str:
    if row.which == "swallowed":
        return f"the updates of {row.name} are below what fp32 resolves: raise its learning rate ({row.lr or 0.0:g})"
    return f"the second moment of {row.name} changes by less than fp32 resolves: lower beta2"
