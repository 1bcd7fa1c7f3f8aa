"""Read a run directory into plain data, however much of it there is.

A run may be going on, killed in the middle of a line, or resumed from a checkpoint that lies behind its last line;
each leaves files that are incomplete but not wrong. So every file but the metrics may be missing, and what is missing
or unreadable becomes a note that the report shows. A resumed run repeats the updates since its checkpoint: the later
line counts, and what the abandoned stretch said is dropped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from floatline.errors import RunDirectoryError
from floatline.report.gradients import Gradients, run_gradients
from floatline.report.records import Alarm, Cure, Eval, Fault, Headroom, Sample, Step, as_mapping, as_number


@dataclass(frozen=True, kw_only=True)
class RunData:
    """Everything a report needs to know of one run.

    Args:
        path: The run directory.
        steps: Updates in order, each number once.
        evals: Evaluations in order.
        faults: Updates that the guard refused.
        cures: What the run changed so that they do not come again.
        alarms: Trouble that no NaN showed.
        headroom: How near to overflow modules came, in the steps that were sampled.
        samples: Answers of the last evaluation.
        gradients: What the gradient monitor recorded, None where the run kept no gradients.json.
        recipe: The resolved recipe, empty when missing.
        recipe_text: The same as it stands in the file.
        info: run.json as it stands, empty when missing.
        notes: What is missing or could not be read, as sentences.
    """

    path: Path
    steps: tuple[Step, ...] = ()
    evals: tuple[Eval, ...] = ()
    faults: tuple[Fault, ...] = ()
    cures: tuple[Cure, ...] = ()
    alarms: tuple[Alarm, ...] = ()
    headroom: tuple[Headroom, ...] = ()
    samples: tuple[Sample, ...] = ()
    gradients: Gradients | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    recipe_text: str = ""
    info: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.path.resolve().name or str(self.path)


def load_run(path: str | Path) -> RunData:
    """Read one run directory.

    Args:
        path: A directory that `floatline train` wrote, finished or not.

    Returns:
        The run as plain data; `notes` says what is missing.

    Raises:
        RunDirectoryError: `path` does not exist, is no run directory, or may not be read.
    """
    path = Path(path)
    _check(path)
    notes: list[str] = []
    try:
        metrics = _Metrics.read(path / "metrics.jsonl", notes)
        recipe, recipe_text = _recipe(path / "recipe.yaml", notes)
        info = _info(path / "run.json", notes)
        samples = tuple(Sample.read(line) for line in _lines(path / "samples.jsonl", notes))
        gradients = run_gradients(path, notes)
    except OSError as error:
        raise RunDirectoryError(
            f"cannot read {error.filename}: {error.strerror}", hint="check the permissions of the run directory"
        ) from error
    return RunData(
        path=path,
        steps=tuple(metrics.steps),
        evals=tuple(metrics.evals),
        faults=tuple(metrics.faults),
        cures=tuple(metrics.cures),
        alarms=tuple(metrics.alarms),
        headroom=tuple(metrics.headroom),
        samples=samples,
        gradients=gradients,
        recipe=recipe,
        recipe_text=recipe_text,
        info=info,
        notes=tuple(notes),
    )


def is_run_directory(path: Path) -> bool:
    """Whether `path` holds what every run writes first: metrics, or the record of a run that ended before any."""
    return (path / "metrics.jsonl").is_file() or (path / "run.json").is_file()


def _check(path: Path) -> None:
    if not path.exists():
        raise RunDirectoryError(f"{path} does not exist", hint="give the directory that `floatline train` wrote")
    if not path.is_dir():
        raise RunDirectoryError(f"{path} is a file, not a run directory", hint=f"try its directory: {path.parent}")
    if not is_run_directory(path):
        inside = sorted(child.name for child in path.iterdir() if child.is_dir() and is_run_directory(child))
        hint = "give the directory that `floatline train` wrote"
        if inside:
            hint = f"runs inside it: {', '.join(inside[:8])}{', ...' if len(inside) > 8 else ''}"
        raise RunDirectoryError(f"{path} is no run directory: it holds no metrics.jsonl", hint=hint)


class _Metrics:
    """The metrics file, line by line, with the stretches that a resumed run repeated taken out."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.evals: list[Eval] = []
        self.faults: list[Fault] = []
        self.cures: list[Cure] = []
        self.alarms: list[Alarm] = []
        self.headroom: list[Headroom] = []

    @classmethod
    def read(cls, path: Path, notes: list[str]) -> _Metrics:
        metrics = cls()
        for line in _lines(path, notes):
            if not math.isfinite(as_number(line.get("step"))):
                continue
            kind = line.get("kind")
            if kind == "step":
                metrics.add(Step.read(line))
            elif kind == "eval":
                metrics.evals.append(Eval.read(line))
            elif kind == "fault":
                metrics.refuse(Fault.read(line))
            elif kind == "cure":
                metrics.cures.append(Cure.read(line))
            elif kind == "alarm":
                metrics.alarms.append(Alarm.read(line))
            elif kind == "headroom":
                metrics.headroom.append(Headroom.read(line))
        return metrics

    def refuse(self, fault: Fault) -> None:
        """Note a fault; the updates that a rollback took back are made again, the fault stays."""
        self.faults.append(fault)
        if math.isfinite(fault.to):
            self.evals = [item for item in self.evals if item.step <= fault.to]
            self.headroom = [item for item in self.headroom if item.step <= fault.to]
            while self.steps and self.steps[-1].step > fault.to:
                self.steps.pop()

    def add(self, step: Step) -> None:
        if self.steps and self.steps[-1].step >= step.step:
            while self.steps and self.steps[-1].step >= step.step:
                self.steps.pop()
            self.evals = [item for item in self.evals if item.step < step.step]
            self.faults = [fault for fault in self.faults if fault.step < step.step]
        self.steps.append(step)


def _lines(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSONL file; a broken last line is what a killed process leaves, others are counted."""
    if not path.is_file():
        notes.append(f"{path.name} is missing")
        return
    broken: list[int] = []
    number = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                line = None
            if isinstance(line, dict):
                yield line
            else:
                broken.append(number)
    if broken == [number]:
        notes.append(f"the last line of {path.name} is incomplete, as a killed run leaves it; it is left out")
    elif broken:
        where = ", ".join(map(str, broken[:5])) + (", ..." if len(broken) > 5 else "")
        notes.append(f"{len(broken)} lines of {path.name} could not be read and are left out (line {where})")


def _recipe(path: Path, notes: list[str]) -> tuple[dict[str, Any], str]:
    if not path.is_file():
        notes.append("recipe.yaml is missing")
        return {}, ""
    import yaml

    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        return dict(as_mapping(yaml.safe_load(text))), text
    except yaml.YAMLError:
        notes.append("recipe.yaml is not valid YAML; it is shown as it stands")
        return {}, text


def _info(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        notes.append("run.json is missing: status, versions and machine are unknown")
        return {}
    try:
        return dict(as_mapping(json.loads(path.read_text(encoding="utf-8", errors="replace"))))
    except (ValueError, RecursionError):
        notes.append("run.json could not be read: status, versions and machine are unknown")
        return {}
