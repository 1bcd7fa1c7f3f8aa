"""Draw with matplotlib, hand over an SVG that takes its colours from the page.

Figures are drawn in stand-in colours; each of them is replaced by a CSS variable, so that one drawing is right in
light, dark and print. Text stays text (small, searchable, in the page's font). Nothing a user wrote goes in here:
names stand in the page's own legend, where they are escaped and may be as long as they like.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING, Any

from floatline.report.need import need
from floatline.report.units import number_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SERIES = ("#2a6fd1", "#c85a12", "#1b8a5a", "#8451c2", "#b33a78", "#6f7a12", "#14808f", "#8a5a3a")
GOOD, BAD, INK, GRID = "#1c8a50", "#c8303c", "#5f6b7a", "#d8dde4"
VARIABLES = {
    **{colour: f"--series-{index}" for index, colour in enumerate(SERIES)},
    GOOD: "--good",
    BAD: "--bad",
    INK: "--ink-2",
    GRID: "--grid",
}
DASHES: tuple[str, ...] = ("", "6 2.5", "2 2", "8 2.5 2 2.5")
WIDE, NARROW = 5.2, 3.7
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "floatline",
    "font.size": 8.5,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.titlesize": 9,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.linewidth": 1.6,
    "path.simplify": True,
    "path.simplify_threshold": 0.2,
}


def series_style(index: int) -> dict[str, Any]:
    """Return colour and dashes of the series at `index`; the dashes differ too, for those who do not see the colour."""
    dash = DASHES[index % len(DASHES)]
    style: dict[str, Any] = {"color": SERIES[index % len(SERIES)]}
    return style | ({"dashes": [float(part) / 1.6 for part in dash.split()]} if dash else {})


def render(name: str, paint: Callable[[Axes], None], *, alt: str, width: float = WIDE, height: float = 2.5) -> str:
    """Draw one plot.

    Args:
        name: Short name, unique on the page: it keeps the ids of several drawings apart.
        paint: Draws on the axes it is given.
        alt: What the plot shows, for those who do not see it.
        width: Inches; the page scales it, so a narrower drawing has the larger letters.
        height: Inches.

    Returns:
        An `<svg>` element to stand inside a page that defines the colour variables.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    matplotlib = need("matplotlib")
    figure_module = need("matplotlib.figure")
    ticker = need("matplotlib.ticker")
    with matplotlib.rc_context(STYLE):
        figure = figure_module.Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots()
        axes.margins(x=0.01)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(nbins=6, integer=True))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}" if value < 10_000 else f"{value / 1000:g}k")
        axes.yaxis.set_major_locator(ticker.MaxNLocator(nbins=5))
        axes.yaxis.set_major_formatter(lambda value, _: "0" if value == 0 else number_text(value, 4))
        paint(axes)
        file = io.StringIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="constrained_layout not applied")  # drawn without it then
            figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return _themed(file.getvalue(), name, alt)


def log_axis(axes: Axes, values: list[float]) -> None:
    """Make the y axis logarithmic, with ticks that read as plain numbers."""
    ticker = need("matplotlib.ticker")
    axes.set_yscale("log")
    wide = max(values) > 300 * min(values)
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0), numticks=8))
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: number_text(value))


def _themed(svg: str, name: str, alt: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    head = re.search(r'viewBox="[^"]*"', svg)
    assert head, "matplotlib writes a viewBox"
    body = svg[svg.index(">") + 1 :]
    used = set(re.findall(r"#([\w.-]+)\)?\"", body))
    body = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", body)
    body = re.sub(r'xlink:href="#', f'href="#{name}-', body).replace("url(#", f"url(#{name}-")
    for colour, variable in VARIABLES.items():
        body = body.replace(colour, f"var({variable})")
    body = re.sub(r"\n\s*", "\n", body)
    return f'<svg role="img" aria-label="{escape(alt)}" {head[0]}>{body}'
