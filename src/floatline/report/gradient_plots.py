"""What gradients did over a run, drawn for the report page: values, norm, what was not finite.

The strokes are those of the other curves (drawing.py). Norms by layer are in heat_map.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from floatline.report.curves import finite, thin
from floatline.report.drawing import POINTS, Key, Plot, crosses, dots, scale
from floatline.report.gradients import Gradients
from floatline.report.need import need
from floatline.report.svg import BAD, DASHES, INK, SERIES, log_axis, render, series_style
from floatline.report.units import count_text, number_text, percent_text, times

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def gradient_plots(gradients: Gradients, *, name: str = "run", points: int = POINTS) -> list[Plot]:
    """Draw largest and mean magnitude, the norm against the clip value, and what was not finite.

    Args:
        gradients: Of one run.
        name: Short name, unique on the page.
        points: About how many points a curve keeps.

    Returns:
        The plots that have data.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    if not gradients.points:
        return []
    drawn = [_values(gradients, name, points), _norm(gradients, name, points), _bad(gradients, name)]
    return [plot for plot in drawn if plot is not None]


def _steps(gradients: Gradients) -> list[float]:
    return [float(point.step) for point in gradients.points]


def _bad_steps(gradients: Gradients) -> list[float]:
    return [float(point.step) for point in gradients.points if point.bad_updates]


def _bad_key(gradients: Gradients) -> list[Key]:
    count = gradients.bad_updates
    return [Key(label=f"not finite ({times(count, 'update')})", shape="cross", colour="--bad")] * bool(count)


def _values(gradients: Gradients, name: str, points: int) -> Plot | None:
    curves = element_curves(gradients)
    xs = curves[0].xs
    if not xs:
        return None

    def paint(axes: Axes) -> None:
        for index, curve in enumerate(curves):
            axes.plot(*thin(xs, curve.ys, points), **series_style(index), **dots(curve.ys))
        scale_log(axes, [value for curve in curves for value in curve.ys], xs)
        crosses(axes, _bad_steps(gradients))

    keys = [
        Key(label=curve.label, shape="line", colour=f"--series-{index}", dash=DASHES[index])
        for index, curve in enumerate(curves)
    ]
    top = number_text(max(curves[0].ys))
    alt = f"Largest and mean magnitude of gradient elements over updates; the largest was {top}"
    return Plot(
        title="Elements of the gradients",
        svg=render(f"{name}-elements", paint, alt=alt),
        caption=f"Largest {top}.",
        keys=(*keys, *_bad_key(gradients)),
    )


@dataclass(frozen=True)
class Curve:
    """A label and the points of a curve."""

    label: str
    xs: list[float]
    ys: list[float]


def element_curves(gradients: Gradients) -> tuple[Curve, Curve]:
    """Return largest and mean magnitude, at the points where somebody looked and found them finite."""
    known = [p for p in gradients.points if math.isfinite(p.largest) and math.isfinite(p.mean)]
    xs = [float(point.step) for point in known]
    return (
        Curve("largest |g|", xs, [point.largest for point in known]),
        Curve("mean |g|", xs, [point.mean for point in known]),
    )


def scale_log(axes: Axes, values: list[float], xs: list[float]) -> None:
    """Choose the y axis, logarithmic where any two values are far apart; zeros are left out of that."""
    positive = [value for value in finite(values) if value > 0]
    if positive and max(positive) > 8 * min(positive):
        scale(axes, positive, xs)
        log_axis(axes, positive)
    else:
        scale(axes, values, xs)


def _norm(gradients: Gradients, name: str, points: int) -> Plot | None:
    xs = _steps(gradients)
    mean, top = ([getattr(point, key) for point in gradients.points] for key in ("norm", "top_norm"))
    known = finite(top)
    if not known and not gradients.bad_updates:
        return None
    limit = gradients.max_grad_norm
    lines = clip_lines(gradients)

    def paint(axes: Axes) -> None:
        axes.plot(*thin(xs, top, points), color=SERIES[3], alpha=0.45, linewidth=0.8, **dots(top))
        axes.plot(*thin(xs, mean, points), color=SERIES[3])
        scale_log(axes, [*mean, *top, *([limit] if lines else [])], xs)
        for value, colour, style in lines:
            axes.axhline(value, color=colour, linewidth=1, linestyle=style)
        crosses(axes, _bad_steps(gradients))

    thinned = any(point.updates > 1 for point in gradients.points)
    keys = [Key(label="mean of each stretch" if thinned else "norm", shape="line", colour="--series-3")]
    keys += [Key(label="largest of each stretch", shape="faint", colour="--series-3")] * thinned
    keys += [Key(label=f"clipped to {number_text(limit)}", shape="rule", colour="--ink-2", dash="4 2")] * bool(lines)
    keys += [Key(label="ten times that", shape="rule", colour="--bad", dash="2 2")] * (len(lines) > 1)
    count = gradients.large_updates
    caption = f"{times(count, 'update')} above ten times the clip value." if count else ""
    alt = f"Gradient norm over updates, up to {number_text(max(known, default=math.nan))}. {caption}"
    return Plot(
        title="Norm against the clip value" if lines else "Total norm",
        svg=render(f"{name}-norm", paint, alt=alt),
        caption=caption,
        keys=(*keys, *_bad_key(gradients)),
    )


def clip_lines(gradients: Gradients) -> list[tuple[float, str, str]]:
    """Return the lines to draw at the clip value, and at ten times it where norms come near: (value, colour, style)."""
    limit = gradients.max_grad_norm
    if not math.isfinite(limit):
        return []
    near = max(finite([point.top_norm for point in gradients.points]), default=0.0) > 5 * limit
    return [(limit, INK, "--"), *([(10 * limit, BAD, ":")] * near)]


def _bad(gradients: Gradients, name: str) -> Plot | None:
    bad = [point for point in gradients.points if point.bad_updates]
    if not bad:
        return None
    elements = sum(point.bad_elements for point in bad)

    def paint(axes: Axes) -> None:
        paint_bad(axes, gradients)

    caption = (
        f"{times(gradients.bad_updates, 'update')} of {count_text(gradients.updates)} "
        f"({percent_text(gradients.bad_updates / gradients.updates)}) had NaN or Inf in a gradient, "
        f"{count_text(elements)} elements in all."
    )
    return Plot(title="NaN and Inf", svg=render(f"{name}-nonfinite", paint, alt=caption), caption=caption)


def paint_bad(axes: Axes, gradients: Gradients) -> None:
    """Draw how many elements were not finite, as stems on an axis of counts."""
    bad = [point for point in gradients.points if point.bad_updates]
    steps, counts = [point.step for point in bad], [max(1, point.bad_elements) for point in bad]
    axes.vlines(steps, 0.5, counts, color=BAD, linewidth=1.4)
    axes.plot(steps, counts, "o", color=BAD, markersize=3.5, linestyle="none")
    axes.set_yscale("log")
    axes.set_ylim(0.5, max(10, 2 * max(counts)))
    last = gradients.points[-1].step + gradients.points[-1].updates - 1
    axes.set_xlim(min(gradients.points[0].step, last - 1), last)
    axes.set_ylabel("elements")
    axes.set_xlabel("update")
    axes.yaxis.set_major_formatter(lambda value, _: count_text(value))
    axes.yaxis.set_minor_locator(need("matplotlib.ticker").NullLocator())
