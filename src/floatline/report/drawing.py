"""The strokes that all plots share: what a legend entry is, how gaps, single points and skipped updates look."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from floatline.report.curves import finite, smooth, spans_decades, thin, thin_marks
from floatline.report.load import RunData
from floatline.report.records import NAN, Step
from floatline.report.summary import summarize
from floatline.report.svg import BAD, SERIES, log_axis, render
from floatline.report.units import bytes_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POINTS = 900
MARKS = 120
FAINT: dict[str, Any] = {"alpha": 0.3, "linewidth": 0.8}


@dataclass(frozen=True, kw_only=True)
class Key:
    """One entry of a legend: `shape` is line, faint, dot, diamond, cross or rule."""

    label: str
    shape: str
    colour: str = "--series-0"
    dash: str = ""


@dataclass(frozen=True, kw_only=True)
class Plot:
    """One drawing with what stands around it."""

    title: str
    svg: str
    caption: str = ""
    keys: tuple[Key, ...] = ()


def plain_plot(
    run: RunData,
    title: str,
    name: str,
    values: list[float],
    points: int,
    *,
    colour: int,
    alt: str,
    caption: str = "",
    smoothed: bool = True,
    cut: float = math.inf,
    text: Callable[[float], str] | None = None,
) -> Plot | None:
    """Draw one quantity from zero up, values above `cut` off the scale; None when there is nothing to draw."""
    known = finite(values)
    if not known:
        return None
    xs = updates(run.steps)

    def paint(axes: Axes) -> None:
        faint = FAINT if smoothed else {}
        axes.plot(*thin(xs, values, points), color=SERIES[colour], **faint, **dots(values))
        if smoothed:
            # A value off the scale, or the warm-up, would drag the course along for a window.
            warm_up = summarize(run).warm_up
            steady = [NAN] * warm_up + values[warm_up:]
            course = smooth([value if value <= cut else NAN for value in steady], window(values))
            axes.plot(*thin(xs, course, points), color=SERIES[colour])
        top = min(max(known) * 1.08, cut) or 1.0
        axes.set_ylim(0, top)
        if text is not None:
            axes.yaxis.set_major_formatter(lambda value, _: "0" if value == 0 else text(value).replace(".0 ", " "))
        if text is bytes_text:
            axes.set_yticks(binary_ticks(top))
        axes.set_xlabel("update")

    return Plot(title=title, svg=render(name, paint, alt=alt), caption=caption)


def updates(steps: Sequence[Step]) -> list[float]:
    """Return the numbers of the updates, the x axis of most plots."""
    return [float(step.step) for step in steps]


def window(values: Sequence[float]) -> float:
    """Return how many updates a smoothed course spans: a fortieth of the run, 5 to 500."""
    return min(max(len(values) / 40, 5), 500)


def smoothed_loss(run: RunData) -> list[float]:
    """Return the course of the training loss; it starts at the first finite value."""
    losses = [step.loss for step in run.steps]
    return smooth(losses, window(losses))


def accuracies(run: RunData) -> list[tuple[int, float]]:
    """Return (update, overall accuracy) of each validation that measured one."""
    return [(item.step, item.accuracy) for item in run.evals if item.split == "validation" and item.accuracy >= 0]


def columns(pairs: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Return pairs as two lists, values that are not finite as gaps."""
    return [x for x, _ in pairs], [y if math.isfinite(y) else NAN for _, y in pairs]


def dots(values: Sequence[float]) -> dict[str, Any]:
    """Return the marker style of a short curve: a line through a single point would not show."""
    return {"marker": "o", "markersize": 3} if len(finite(values)) < 25 else {}


def crosses(axes: Axes, places: Sequence[float]) -> None:
    """Mark updates with a red cross at the upper edge."""
    shown = thin_marks(places, MARKS)
    if not shown:  # an empty line without clipping would spoil the layout of several axes
        return
    axes.plot(
        shown,
        [0.97] * len(shown),
        "x",
        color=BAD,
        markersize=5,
        markeredgewidth=1.3,
        transform=axes.get_xaxis_transform(),
        clip_on=False,
    )


def scale(axes: Axes, values: Sequence[float], xs: Sequence[float]) -> None:
    """Choose the y axis: logarithmic over decades, else linear; without a finite value say so."""
    known = finite(values)
    if spans_decades(known):
        log_axis(axes, known)
    elif not known:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no finite value", transform=axes.transAxes, ha="center")
    if len(xs) == 1:
        axes.set_xlim(xs[0] - 1, xs[0] + 1)
    axes.set_xlabel("update")


def percent_axis(axes: Axes, known: Sequence[float]) -> None:
    """Let the axis end at 100 %, begin at 0 or, when all is above half, at the ten below the lowest."""
    low = min(known)
    axes.set_ylim(0 if low < 50 else math.floor(low / 10) * 10, 102)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    axes.set_xlabel("update")


def binary_ticks(top: float) -> list[float]:
    """Return up to six ticks at round binary amounts.

    >>> [bytes_text(tick) for tick in binary_ticks(900 * 2**20)]
    ['0 B', '256 MiB', '512 MiB', '768 MiB']
    """
    space = 2.0 ** math.ceil(math.log2(max(top, 1) / 5))
    return [space * index for index in range(int(top / space) + 1)]


def memory_peak(run: RunData) -> str:
    """Return the peak memory as a caption."""
    return f"Peak {bytes_text(summarize(run).peak_memory)}."
