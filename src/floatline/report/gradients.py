"""A run's gradients.json as plain data, read with the same patience as its other files.

The file is the gradient monitor's record: points that each cover a stretch of updates, rows of norms by layer or
parameter, and what the monitor concluded for clipping. Numbers that are missing are NaN. A norm below zero in a row
means that there was no gradient.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from floatline.errors import RunDirectoryError
from floatline.report.records import NAN, as_list, as_mapping, as_number, as_text

FILE = "gradients.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class GradientPoint:
    """A stretch of updates; see `floatline.step.gradient_history.Point`."""

    step: int
    updates: int
    norm: float = NAN
    top_norm: float = NAN
    largest: float = NAN
    mean: float = NAN
    bad_updates: int = 0
    bad_parameters: int = 0
    bad_elements: int = 0

    @classmethod
    def read(cls, line: Mapping[str, Any]) -> GradientPoint:
        counts = {name: as_count(line.get(name)) for name in ("step", "bad_updates", "bad_parameters", "bad_elements")}
        numbers: dict[str, Any] = {name: as_number(line.get(name)) for name in ("norm", "top_norm", "largest", "mean")}
        return cls(updates=max(1, as_count(line.get("updates"))), **counts, **numbers)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipRow:
    """A clip value, the share of the updates that it would have clipped, and where the value comes from."""

    value: float
    share: float
    what: str


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """What a run's gradients were like.

    Args:
        points: In order, over the whole run.
        names: Layers or parameters of the rows.
        steps: Update of each row.
        rows: A norm for each name; NaN and infinity as they were, -1 without a gradient.
        per: "layer" or "parameter".
        max_grad_norm: The clip value, NaN without clipping.
        large_updates: Updates whose norm passed ten times the clip value.
        advice: The monitor's advice in sentences.
        candidates: Clip values with what each would have done.
    """

    points: tuple[GradientPoint, ...] = ()
    names: tuple[str, ...] = ()
    steps: tuple[int, ...] = ()
    rows: tuple[tuple[float, ...], ...] = ()
    per: str = "layer"
    max_grad_norm: float = NAN
    large_updates: int = 0
    advice: str = ""
    candidates: tuple[ClipRow, ...] = ()

    @property
    def updates(self) -> int:
        return sum(point.updates for point in self.points)

    @property
    def bad_updates(self) -> int:
        return sum(point.bad_updates for point in self.points)

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Gradients:
        """Take what is usable of a record; lines and rows that do not fit are left out."""
        rows = as_mapping(record.get("rows"))
        names = tuple(as_text(name) for name in as_list(rows.get("names")))
        pairs = [
            (as_count(step), tuple(as_number(value) for value in as_list(row)))
            for step, row in zip(as_list(rows.get("steps")), as_list(rows.get("norms")))
            if len(as_list(row)) == len(names) > 0
        ]
        advice = as_mapping(record.get("advice"))
        return cls(
            points=tuple(
                GradientPoint.read(as_mapping(point)) for point in as_list(as_mapping(record.get("points")).get("kept"))
            ),
            names=names,
            steps=tuple(step for step, _ in pairs),
            rows=tuple(row for _, row in pairs),
            per=as_text(record.get("per")) or "layer",
            max_grad_norm=as_number(record.get("max_grad_norm")),
            large_updates=as_count(record.get("large_updates")),
            advice=as_text(advice.get("text")),
            candidates=tuple(
                ClipRow(
                    value=as_number(row.get("value")), share=as_number(row.get("share")), what=as_text(row.get("what"))
                )
                for row in map(as_mapping, as_list(advice.get("candidates")))
            ),
        )


def as_count(value: object) -> int:
    """Return a whole number, 0 for anything that is none.

    >>> as_count(3), as_count(None), as_count(float("nan"))
    (3, 0, 0)
    """
    number = as_number(value)
    return int(number) if math.isfinite(number) else 0


def load_gradients(path: str | Path) -> Gradients:
    """Read a file that `GradientMonitor.save` wrote.

    Args:
        path: The file, or the directory that holds a `gradients.json`.

    Returns:
        The gradients.

    Raises:
        RunDirectoryError: It does not exist or holds something else.
    """
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    try:
        record = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        raise RunDirectoryError(
            f"cannot read {path}: {error.strerror}", hint="give the file that GradientMonitor.save() wrote"
        ) from error
    except (ValueError, RecursionError) as error:
        raise RunDirectoryError(f"{path} holds no JSON", hint="write it anew with GradientMonitor.save()") from error
    return Gradients.read(as_mapping(record))


def run_gradients(directory: Path, notes: list[str]) -> Gradients | None:
    """Return a run's gradients, None where it kept none; an unreadable file becomes a note."""
    if not (directory / FILE).is_file():
        return None
    try:
        return load_gradients(directory)
    except RunDirectoryError:
        notes.append(f"{FILE} could not be read: there is no section on gradients")
        return None
