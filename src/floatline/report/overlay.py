"""Several runs in one drawing: loss over updates and over time, accuracy over updates.

Loss over time is the fair one between precisions: a cheaper format may need more updates and still arrive first. Time
counts what the updates took, without evaluations and pauses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from floatline.report.compare import labels
from floatline.report.curves import finite, spans_decades, thin
from floatline.report.drawing import POINTS, Key, Plot, accuracies, dots, percent_axis, smoothed_loss, updates
from floatline.report.load import RunData
from floatline.report.svg import DASHES, NARROW, SERIES, log_axis, render, series_style
from floatline.report.units import number_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curve = tuple[list[float], list[float]]


def compare_plots(runs: Sequence[RunData], *, points: int = POINTS) -> list[Plot]:
    """Draw several runs over each other.

    Args:
        runs: Two or more runs.
        points: About how many points a curve keeps.

    Returns:
        The plots that have data.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    losses = [smoothed_loss(run) for run in runs]
    by_update = [(updates(run.steps), loss) for run, loss in zip(runs, losses)]
    clocks, unit = _clocks(runs)
    correct = [
        ([float(step) for step, _ in accuracies(run)], [100 * share for _, share in accuracies(run)]) for run in runs
    ]
    drawn = [
        _overlay("Loss over updates", runs, by_update, points, caption="Training loss, smoothed."),
        _overlay(
            "Loss over time",
            runs,
            list(zip(clocks, losses)),
            points,
            caption="The same loss against the time spent in updates.",
            xlabel=f"time ({unit})",
        ),
        _overlay("Accuracy", runs, correct, points, caption="All questions, on validation.", percent=True),
    ]
    return [plot for plot in drawn if plot is not None]


def run_keys(runs: Sequence[RunData]) -> tuple[Key, ...]:
    """Return the legend that names the runs."""
    return tuple(
        Key(label=label, shape="line", colour=f"--series-{index % len(SERIES)}", dash=DASHES[index % len(DASHES)])
        for index, label in enumerate(labels(runs))
    )


def _overlay(
    title: str,
    runs: Sequence[RunData],
    curves: list[Curve],
    points: int,
    *,
    caption: str,
    xlabel: str = "update",
    percent: bool = False,
) -> Plot | None:
    known = [value for x, y in curves if finite(x) for value in finite(y)]
    if not known:
        return None

    def paint(axes: Axes) -> None:
        for index, (x, y) in enumerate(curves):
            axes.plot(*thin(x, y, points), **series_style(index), **dots(y))
        if percent:
            percent_axis(axes, known)
        elif spans_decades(known):
            log_axis(axes, known)
        axes.set_xlabel(xlabel)

    alt = f"{title} of {len(runs)} runs, values from {number_text(min(known))} to {number_text(max(known))}"
    svg = render(f"all-{title.lower().replace(' ', '-')}", paint, alt=alt, width=NARROW)
    return Plot(title=title, svg=svg, caption=caption, keys=run_keys(runs))


def _clocks(runs: Sequence[RunData]) -> tuple[list[list[float]], str]:
    """Return the time at the end of each update, and the unit in which it reads best."""
    clocks = [list(accumulate(step.step_s if step.step_s > 0 else 0.0 for step in run.steps)) for run in runs]
    longest = max((clock[-1] for clock in clocks if clock), default=0.0)
    size, unit = (1, "s") if longest < 180 else (60, "min") if longest < 10_800 else (3600, "h")
    # A run that recorded no times has no place on this axis.
    return [[t / size for t in clock] if clock and clock[-1] else [math.nan] * len(clock) for clock in clocks], unit
