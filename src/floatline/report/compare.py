"""Several runs side by side: who is who, the table, and where their recipes differ.

The best value of a column is marked only where "best" means something: an accuracy wins only when its 95 % interval
lies clear of all others, a time only among finished runs, and nothing wins when all are equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from floatline.report.load import RunData
from floatline.report.records import NAN
from floatline.report.summary import Summary, interval_text, summarize, wilson
from floatline.report.units import DASH, bytes_text, number_text, percent_text, seconds_text, times


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell of the table: text, a smaller second line, and whether it is the best of its column."""

    text: str
    small: str = ""
    best: bool = False


@dataclass(frozen=True, kw_only=True)
class Table:
    """The comparison as text: a heading a column, a row a run."""

    headings: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def labels(runs: Sequence[RunData]) -> list[str]:
    """Return a name for each run: its directory and precision, with more of the path where names clash.

    Args:
        runs: The runs, in the order they are shown.

    Returns:
        As many names, all different.
    """
    precisions = [summarize(run).precision for run in runs]
    return [f"{name} · {precision}" if precision else name for name, precision in zip(_names(runs), precisions)]


def _names(runs: Sequence[RunData]) -> list[str]:
    names = [run.name for run in runs]
    for depth in range(2, 5):
        names = [
            "/".join(run.path.resolve().parts[-depth:]) if names.count(name) > 1 else name
            for run, name in zip(runs, names)
        ]
    seen: dict[str, int] = {}
    for index, name in enumerate(names):
        seen[name] = seen.get(name, 0) + 1
        names[index] = f"{name} ({seen[name]})" if seen[name] > 1 else name
    return names


def side_by_side(runs: Sequence[RunData]) -> Table:
    """Return the comparison table.

    Args:
        runs: Two or more runs.

    Returns:
        Headings and a row for each run, in the order given.
    """
    all_of = [summarize(run) for run in runs]
    columns: list[tuple[str, list[Cell]]] = [
        ("run", [Cell(text=name) for name in _names(runs)]),
        ("precision", [Cell(text=s.precision or DASH) for s in all_of]),
        ("status", [Cell(text=s.status or "unknown", small=f"{s.updates} updates") for s in all_of]),
        ("accuracy", _accuracy(all_of)),
        ("validation loss", _lowest(all_of, lambda s: s.validation_loss, number_text)),
        ("train loss", [Cell(text=number_text(s.train_loss)) for s in all_of]),
        ("time", _lowest(all_of, lambda s: s.seconds, seconds_text, among=lambda s: s.status == "finished")),
        ("peak memory", _lowest(all_of, lambda s: s.peak_memory, bytes_text)),
        ("median step", _lowest(all_of, lambda s: s.step_median, seconds_text, relative=True)),
        (
            "skipped",
            [
                Cell(text=str(s.skipped) if s.updates else DASH, small=f"{s.faults} faults" if s.faults else "")
                for s in all_of
            ],
        ),
    ]
    return Table(
        headings=tuple(heading for heading, _ in columns),
        rows=tuple(zip(*(cells for _, cells in columns))),
    )


def _skipped(summary: Summary) -> Cell:
    faults = times(summary.faults, "fault") if summary.faults else ""
    return Cell(text=str(summary.skipped) if summary.updates else DASH, small=faults)


def _lowest(
    summaries: Sequence[Summary],
    value: Callable[[Summary], float],
    text: Callable[[float], str],
    *,
    relative: bool = False,
    among: Callable[[Summary], bool] = lambda _: True,
) -> list[Cell]:
    values = [value(summary) for summary in summaries]
    racing = [among(summary) and math.isfinite(number) for summary, number in zip(summaries, values)]
    known = [number for number, runs in zip(values, racing) if runs]
    lowest = text(min(known, default=NAN))
    contest = len({text(number) for number in known}) > 1
    first = values[0]
    return [
        Cell(
            text=text(number),
            small=f"×{number / first:.2f}" if relative and first > 0 and math.isfinite(number) else "",
            best=contest and runs and text(number) == lowest,
        )
        for number, runs in zip(values, racing)
    ]


def _accuracy(summaries: Sequence[Summary]) -> list[Cell]:
    bounds = [wilson(summary.answers) if summary.answers else (NAN, NAN) for summary in summaries]
    cells = []
    for index, summary in enumerate(summaries):
        others = [high for place, (_, high) in enumerate(bounds) if place != index and math.isfinite(high)]
        split = summary.final.split if summary.final else ""
        small = f"{interval_text(summary.answers)} on {split}" if summary.answers else ""
        clear = bool(others) and all(bounds[index][0] > high for high in others)
        cells.append(Cell(text=percent_text(summary.accuracy), small=small, best=clear))
    return cells


def differences(runs: Sequence[RunData]) -> list[tuple[str, list[str]]]:
    """Return the recipe keys in which the runs differ, but for their directories, which always do.

    Args:
        runs: Two or more runs; those without a recipe have a dash everywhere.

    Returns:
        Dotted key and the value in each run, in the order of the first recipe that has the key.
    """
    flat = [_flat(run.recipe) for run in runs]
    keys = list(dict.fromkeys(key for recipe in flat for key in recipe))
    differ = [key for key in keys if key != "run.dir" and len({recipe.get(key) for recipe in flat if recipe}) > 1]
    return [(key, [recipe.get(key, DASH) for recipe in flat]) for key in differ]


def _flat(recipe: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    result: dict[str, str] = {}
    for key, value in recipe.items():
        if isinstance(value, Mapping):
            result |= _flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = "null" if value is None else str(value)
    return result
