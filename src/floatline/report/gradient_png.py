"""The gradients of a run as one PNG: elements, norm with the clip line, NaN and Inf, heat map by layer.

For those who keep pictures rather than pages; the page of a run has the same (gradient_plots.py, heat_map.py).
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from floatline.errors import ConfigError
from floatline.files import write_whole
from floatline.report.curves import finite
from floatline.report.drawing import crosses, dots
from floatline.report.gradient_plots import clip_lines, element_curves, paint_bad, scale_log
from floatline.report.gradients import Gradients, load_gradients
from floatline.report.heat_map import RED, choose, span
from floatline.report.need import need
from floatline.report.svg import BAD, GOOD, SERIES, STYLE, series_style
from floatline.report.units import count_text, number_text, times

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NAMES = 32
"""Layers that the heat map has room to name."""


def plot_gradients(source: Any, path: str | Path) -> Path:
    """Draw a run's gradients as PNG.

    Args:
        source: A `GradientMonitor`, its `record()`, or the path of the file that its `save()` wrote.
        path: The picture to write. It appears complete or not at all.

    Returns:
        The path written.

    Raises:
        ConfigError: Nothing has been recorded, or matplotlib is not installed.
        RunDirectoryError: The source cannot be read or the picture not written.

    Example:
        plot_gradients(monitor, "gradients.png")
    """
    gradients = _gradients(source)
    if not gradients.points:
        raise ConfigError("no update has been recorded", hint="call monitor.check() after backward() and draw later")
    matplotlib, figure_module = need("matplotlib"), need("matplotlib.figure")
    rows = min(len(gradients.names), _NAMES)
    with matplotlib.rc_context(STYLE | {"text.parse_math": False}):
        figure = figure_module.Figure(figsize=(11, 5.4 + 0.16 * max(rows - 12, 0)), layout="constrained", dpi=130)
        grid = figure.subplots(2, 2, height_ratios=(1, 1 + 0.06 * max(rows - 12, 0)))
        for axes, paint in zip(grid.flat, (_elements, _norm, _bad, _heat)):
            paint(axes, gradients)
        figure.suptitle(f"Gradients of {times(gradients.updates, 'update')}", fontsize=11)
        file = io.BytesIO()
        figure.savefig(file, format="png")
    return write_whole(path, file.getvalue())


def _gradients(source: Any) -> Gradients:
    if isinstance(source, str | Path):
        return load_gradients(source)
    if isinstance(source, Gradients):
        return source
    return Gradients.read(source.record() if hasattr(source, "record") else source)


def _elements(axes: Axes, gradients: Gradients) -> None:
    curves = element_curves(gradients)
    for index, curve in enumerate(curves):
        axes.plot(curve.xs, curve.ys, label=curve.label, **series_style(index), **dots(curve.ys))
    _finish(axes, gradients, "Elements of the gradients", [value for curve in curves for value in curve.ys])


def _norm(axes: Axes, gradients: Gradients) -> None:
    xs = [float(point.step) for point in gradients.points]
    mean, top = ([getattr(point, key) for point in gradients.points] for key in ("norm", "top_norm"))
    thinned = any(point.updates > 1 for point in gradients.points)  # then a point is a stretch of updates
    if thinned:
        axes.plot(xs, _gaps(top), color=SERIES[3], alpha=0.45, linewidth=0.8, label="largest")
    axes.plot(xs, _gaps(mean), color=SERIES[3], label="mean" if thinned else "norm", **dots(mean))
    labels = (f"clipped to {number_text(gradients.max_grad_norm)}", "×10")
    lines = clip_lines(gradients)
    for (value, colour, style), label in zip(lines, labels):
        axes.axhline(value, color=colour, linestyle=style, linewidth=1, label=label)
    _finish(axes, gradients, "Total norm", [*mean, *top, *(value for value, _, _ in lines)])


def _gaps(values: list[float]) -> list[float]:
    return [value if finite([value]) else float("nan") for value in values]


def _finish(axes: Axes, gradients: Gradients, title: str, values: list[float]) -> None:
    """Scale, mark what was not finite, name the curves."""
    scale_log(axes, values, [float(point.step) for point in gradients.points])
    bad = [float(point.step) for point in gradients.points if point.bad_updates]
    crosses(axes, bad)
    if bad:
        axes.plot([], [], "x", color=BAD, markersize=5, label="not finite")
    axes.set_title(title, loc="left")
    place: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1, 1), "ncols": 4, "borderpad": 0.2}
    axes.legend(frameon=False, fontsize=7.5, handlelength=1.6, columnspacing=1.2, **place)


def _bad(axes: Axes, gradients: Gradients) -> None:
    title = f"NaN and Inf: {times(gradients.bad_updates, 'update')}" if gradients.bad_updates else "NaN and Inf"
    axes.set_title(title, loc="left")
    if gradients.bad_updates:
        paint_bad(axes, gradients)
        return
    axes.set_axis_off()
    text = f"none in {count_text(gradients.updates)} updates"
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", color=GOOD, fontsize=11)


def _heat(axes: Axes, gradients: Gradients) -> None:
    axes.set_title(f"Norm by {gradients.per}", loc="left")
    axes.grid(visible=False)
    if not gradients.rows:
        axes.set_axis_off()
        return
    colours, maps = need("matplotlib.colors"), need("matplotlib").colormaps
    shown = choose(gradients, _NAMES)
    low, high = span(gradients, shown)
    palette = maps["viridis"].with_extremes(bad="#00000000", over=maps["viridis"](1.0))
    table = [[row[place] for row in gradients.rows] for place in shown]
    values = [[max(value, low) if 0 <= value < float("inf") else float("nan") for value in row] for row in table]
    wide = gradients.steps[-1] - gradients.steps[0] or 1
    step = wide / max(len(gradients.steps) - 1, 1)
    extent = (gradients.steps[0], gradients.steps[-1] + step, len(shown) - 0.5, -0.5)
    settings: dict[str, Any] = {"aspect": "auto", "interpolation": "nearest", "extent": extent}
    image = axes.imshow(values, norm=colours.LogNorm(low, high), cmap=palette, **settings)
    clear = (0.0, 0.0, 0.0, 0.0)
    red = tuple(part / 255 for part in RED)
    faults = [[red if value != value or value == float("inf") else clear for value in row] for row in table]
    axes.imshow(faults, **settings)
    axes.set_yticks(range(len(shown)), [_short(gradients.names[place]) for place in shown], fontsize=7)
    axes.set_xlabel("update")
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02)
    bar.set_ticks([low, (low * high) ** 0.5, high], labels=[number_text(v) for v in (low, (low * high) ** 0.5, high)])
    bar.ax.yaxis.set_minor_locator(need("matplotlib.ticker").NullLocator())
    bar.outline.set_visible(False)


def _short(name: str) -> str:
    """Return a name with its middle left out where it is long: the ends tell layers apart."""
    return name if len(name) <= 28 else f"{name[:10]}…{name[-17:]}"
