"""The memory of one update as a picture: bytes by category over the step, the peak named, the card's limit drawn in.

The axis counts allocations and releases, not seconds: where little is computed and much is allocated, it is wide. Of a
long step about 700 points are drawn, each the fullest of its stretch, so that no peak is lost.

The stack holds tensors, and at its foot what lies outside of them (context, workspaces). What the allocator keeps in
gaps is not a curve of tensors; it is the distance between the stack's peak and the dashed line of what the run needs.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING

from floatline.report.drawing import Key, Plot, binary_ticks
from floatline.report.need import need
from floatline.report.svg import BAD, INK, SERIES, STYLE, render
from floatline.report.units import bytes_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from floatline.plan.estimate import Estimate

LAYERS = ("parameters", "buffers", "optimizer state", "gradients", "activations", "logits", "inputs", "temporaries")
"""From the bottom up; each has its colour whatever else is there."""
OUTSIDE = "context, workspaces"
_COLOURS = dict(zip(LAYERS, (SERIES[0], SERIES[7], SERIES[3], SERIES[2], SERIES[1], SERIES[4], SERIES[6], SERIES[5])))
_DRAWN = 700
_IN_VIEW = 2.5
"""A limit further above the peak than this is told, not drawn: it would press the curve flat."""


def timeline_plot(estimate: Estimate, name: str = "timeline") -> Plot:
    """Draw the memory of one update.

    Args:
        estimate: What was planned.
        name: Short name, unique on the page.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    keys = [Key(label=layer, shape="area", colour=f"--series-{SERIES.index(_COLOURS[layer])}")
            for layer in LAYERS if layer in estimate.timeline.curves]  # fmt: skip
    outside = [Key(label=OUTSIDE, shape="area", colour="--ink-2")] * bool(_outside(estimate))
    needs = Key(label=f"needs {bytes_text(estimate.fit.needed)}", shape="rule", colour="--ink-2", dash="4 2")
    limit = Key(label=f"capacity {bytes_text(estimate.fit.capacity)}", shape="line", colour="--bad")
    return Plot(
        title="Memory over one update" if estimate.mode == "train" else "Memory over one forward",
        svg=render(name, painter(estimate), alt=caption(estimate), width=9.0, height=3.4),
        caption=caption(estimate),
        keys=(*keys, *outside, needs, *[limit] * _shows_capacity(estimate)),
    )


def caption(estimate: Estimate) -> str:
    """Return what the picture says, as sentences."""
    timeline = estimate.timeline
    said = f"Peak of tensors {bytes_text(timeline.peak_bytes)} in the {timeline.phase}, by {timeline.op} of "
    said += f"{timeline.module or 'the top of the model'}."
    if not _shows_capacity(estimate):
        said += f" The capacity of {bytes_text(estimate.fit.capacity)} lies far above the picture."
    return said


def timeline_png(estimate: Estimate, title: str) -> bytes:
    """Draw the same as a PNG that stands alone, with title and legend.

    Args:
        estimate: What was planned.
        title: The answer as a sentence.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    matplotlib, figure_module = need("matplotlib"), need("matplotlib.figure")
    with matplotlib.rc_context(STYLE):
        figure = figure_module.Figure(figsize=(9.0, 4.4), layout="constrained", dpi=150, facecolor="white")
        axes = figure.subplots()
        axes.margins(x=0.01)
        lines = [line for said in (title, caption(estimate)) for line in textwrap.wrap(said, 110)]
        axes.set_title("\n".join(lines), loc="left", fontsize=8.5, parse_math=False, pad=16)
        painter(estimate)(axes)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles[::-1], labels[::-1], loc="outside right upper", frameon=False)
        file = io.BytesIO()
        figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def painter(estimate: Estimate) -> Callable[[Axes], None]:
    """Return what draws the curve on axes."""
    timeline, fit = estimate.timeline, estimate.fit
    places = fullest(timeline.curves, timeline.peak, _DRAWN)
    outside = _outside(estimate)
    top = 1.12 * max(fit.needed, fit.capacity if _shows_capacity(estimate) else 0, timeline.peak_bytes + outside)

    def paint(axes: Axes) -> None:
        xs = [float(place) for place in places]
        floor = [float(outside)] * len(places)
        if outside:
            axes.fill_between(xs, 0, floor, color=INK, alpha=0.45, linewidth=0, label=OUTSIDE)
        for layer in (layer for layer in LAYERS if layer in timeline.curves):
            roof = [below + timeline.curves[layer][place] for below, place in zip(floor, places)]
            axes.fill_between(xs, floor, roof, color=_COLOURS[layer], alpha=0.8, linewidth=0, label=layer)
            floor = roof
        _line(axes, fit.needed, f"needs {bytes_text(fit.needed)}", INK, "--", "right")
        if _shows_capacity(estimate):
            _line(axes, fit.capacity, f"capacity {bytes_text(fit.capacity)}", BAD, "-", "left")
        axes.plot([timeline.peak], [timeline.peak_bytes + outside], "o", color=INK, markersize=4)
        _phases(axes, timeline.phases)
        axes.set_ylim(0, top)
        axes.set_xticks([])
        axes.set_yticks(binary_ticks(top))
        axes.yaxis.set_major_formatter(lambda value, _: "0" if value == 0 else bytes_text(value).replace(".00 ", " "))
        axes.set_xlabel("allocations and releases, in their order")

    return paint


def _line(axes: Axes, value: int, label: str, colour: str, style: str, side: str) -> None:
    """Draw a limit with its figure above it, at the left or right end."""
    axes.axhline(value, color=colour, linewidth=1.2, linestyle=style)
    at = 0.005 if side == "left" else 0.995
    axes.text(at, value, label, transform=axes.get_yaxis_transform(), ha=side, va="bottom", color=colour, fontsize=7.5)


def _phases(axes: Axes, phases: tuple[tuple[str, int], ...]) -> None:
    """Mark where each phase begins; names that would run into each other are left out."""
    width = axes.get_xlim()[1] - axes.get_xlim()[0]
    last = -width
    for phase, place in phases:
        axes.axvline(place, color=INK, linewidth=0.7, linestyle=":")
        if place - last > 0.09 * width:
            axes.text(place, 1.01, f" {phase}", transform=axes.get_xaxis_transform(), fontsize=7.5, va="bottom")
            last = place


def fullest(curves: dict[str, tuple[int, ...]], peak: int, count: int) -> list[int]:
    """Return about `count` places of a curve: of each stretch the one where most is alive, the ends, and the peak.

    >>> fullest({"a": (0, 5, 1, 2, 9, 3), "b": (0, 0, 7, 0, 0, 0)}, 4, 3)
    [0, 1, 2, 4, 5]
    """
    total = [sum(values) for values in zip(*curves.values())]
    size = max(1, -(-len(total) // count))
    starts = range(0, len(total), size)
    chosen = {max(range(start, min(start + size, len(total))), key=lambda place: total[place]) for start in starts}
    return sorted({0, *chosen, peak, len(total) - 1})


def _outside(estimate: Estimate) -> int:
    return estimate.context + estimate.workspaces


def _shows_capacity(estimate: Estimate) -> bool:
    return estimate.fit.capacity <= _IN_VIEW * estimate.fit.needed
