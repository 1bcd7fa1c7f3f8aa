"""The Pareto front of an audit as a picture: what is in fp32 against the error that is left."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from floatline.report.audit_sections import front_points
from floatline.report.drawing import Key, Plot
from floatline.report.svg import BAD, GOOD, INK, SERIES, log_axis, render
from floatline.report.units import times

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from floatline.audit.report import AuditReport, Candidate


def front_plot(report: AuditReport, candidate: Candidate) -> Plot | None:
    """Draw one format's front; None where there is but one point, or none that is finite.

    Args:
        report: The audit.
        candidate: Which format.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    points = front_points(report, candidate)
    if len(points) < 2 or all(math.isinf(error) for _, error, _ in points):
        return None
    finite = [error for _, error, _ in points if 0 < error < math.inf]
    top = 10 * max([1.0, *finite])
    caption = (
        f"{times(len(points), 'policy').replace('policys', 'policies')} of {times(len(candidate.trials), 'trial')}"
    )
    infinite = any(math.isinf(error) for _, error, _ in points)
    keys = [Key(label="within the tolerance", shape="dot", colour="--good"),
            Key(label="outside", shape="dot", colour="--bad"),
            Key(label="the tolerance", shape="line", colour="--ink-2", dash="4 2")]  # fmt: skip
    if infinite:
        keys.append(Key(label="not finite", shape="cross", colour="--bad"))

    def paint(axes: Axes) -> None:
        known = [(100 * share, error) for share, error, _ in points if 0 < error < math.inf]
        axes.plot(*zip(*known), color=SERIES[0], linewidth=1.2)
        for x, error in known:
            axes.plot([x], [error], "o", markersize=5, color=GOOD if error <= 1 else BAD)
        for share, error, _ in points:
            if math.isinf(error):
                axes.plot([100 * share], [top], "x", markersize=6, color=BAD)
        axes.axhline(1.0, color=INK, linewidth=1, dashes=(4, 2))
        log_axis(axes, [*finite, 1.0, top] if infinite else [*finite, 1.0])
        axes.set_xlabel("% of FLOPs in fp32")
        axes.set_ylabel("error / allowed")
        axes.margins(y=0.12)
        widest = max(100 * share for share, _, _ in points)
        axes.set_xlim(-0.04 * max(widest, 1.0), 1.08 * max(widest, 1.0))

    return Plot(
        title=f"Cost against error, {candidate.base}",
        svg=render(f"front-{candidate.name}", paint, alt=caption, height=2.3),
        caption=f"{caption}; each point is the real step under one policy.",
        keys=tuple(keys),
    )
