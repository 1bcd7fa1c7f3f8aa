"""Everything a monitor keeps of a run: points, rows of norms, the distribution of norms; as state and as a file.

The file, `gradients.json`, is the state and the advice that follows from it. It is bounded in size and replaced whole,
so a run of any length rewrites it as often as it likes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from floatline.errors import ConfigError
from floatline.files import write_whole
from floatline.step.clip_advice import ClipAdvice, NormDistribution, advise
from floatline.step.gradient_history import Point, Points, Rows
from floatline.step.gradient_report import GradientReport

FILE = "gradients.json"
_VERSION = 1


class GradientLog:
    """Keeps what reports say, in bounded memory.

    Args:
        per: What the rows are norms of, "layer" or "parameter".
        every: Updates between rows.
        history: Points to keep; a quarter as many rows.
        max_grad_norm: The clip norm, None without.
    """

    def __init__(self, *, per: str, every: int, history: int, max_grad_norm: float | None) -> None:
        self.per = per
        self.max_grad_norm = max_grad_norm
        self.large_updates = 0
        self.distribution = NormDistribution()
        self.points = Points(history // 2 * 2)
        self.rows = Rows(max(2, history // 8 * 2), every)

    def add(self, report: GradientReport, norms: Callable[[], Mapping[str, float]]) -> None:
        """Keep the report of one more update; `norms` gives its row, asked for only where one is due."""
        bad = len(report.bad)
        point = Point(report.step, 1, report.norm, report.norm)
        if report.largest is not None and report.mean is not None:
            point.looked, point.largest, point.mean = int(not bad), report.largest, report.mean
        if bad:
            point.bad_updates, point.bad_parameters = 1, bad
            point.bad_elements = sum(max(1, (one.nan or 0) + (one.inf or 0)) for one in report.bad)
        else:
            self.distribution.add(report.norm)
        self.points.add(point)
        if bad or self.rows.due(report.step):
            self.rows.add(report.step, norms())
        self.large_updates += report.large

    def advice(self) -> ClipAdvice:
        return advise(self.distribution, self.max_grad_norm)

    def record(self, step: int) -> dict[str, Any]:
        """Return the state and the advice, as JSON can hold them."""
        advice = self.advice()
        candidates = [vars(candidate) for candidate in advice.candidates]
        said = {"text": advice.text, "suggested": advice.suggested, "candidates": candidates}
        return {**self.state_dict(step), "advice": said}

    def state_dict(self, step: int) -> dict[str, Any]:
        return {
            "version": _VERSION,
            "per": self.per,
            "max_grad_norm": self.max_grad_norm,
            "step": step,
            "large_updates": self.large_updates,
            "points": self.points.state_dict(),
            "rows": self.rows.state_dict(),
            "distribution": self.distribution.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            ConfigError: It is of another version, or has norms per parameter where this one has them per layer.
        """
        if state.get("version") != _VERSION:
            raise ConfigError(
                f"the monitor's state is of version {state.get('version')}, this one reads {_VERSION}",
                hint="leave it out: the history starts anew",
            )
        if state["per"] != self.per:
            raise ConfigError(
                f"the monitor's state has norms per {state['per']}, this monitor per {self.per}",
                hint=f"make it with per={state['per']!r}",
            )
        self.large_updates = state["large_updates"]
        self.points.load_state_dict(state["points"])
        self.rows.load_state_dict(state["rows"])
        self.distribution.load_state_dict(state["distribution"])


def write_gradients(record: Mapping[str, Any], path: str | Path) -> Path:
    """Write a monitor's record as JSON; the file appears complete or not at all.

    Args:
        record: What `GradientMonitor.record()` returned.
        path: A file, or a directory that gets a `gradients.json`.

    Returns:
        The file written.

    Raises:
        RunDirectoryError: It cannot be written.
    """
    path = Path(path)
    return write_whole(path / FILE if path.is_dir() else path, (json.dumps(record) + "\n").encode())
