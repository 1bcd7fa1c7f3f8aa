"""Which curves the report of one run shows.

They share one grammar: what was measured is faint, its smoothed course is strong, and an update that was not made is
a red cross at the upper edge, never a hole that looks as if nothing had happened.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from floatline.report.curves import finite, quantile, smooth, thin
from floatline.report.drawing import (
    FAINT,
    POINTS,
    Key,
    Plot,
    accuracies,
    columns,
    crosses,
    dots,
    memory_peak,
    percent_axis,
    plain_plot,
    scale,
    smoothed_loss,
    updates,
    window,
)
from floatline.report.load import RunData
from floatline.report.records import NAN, as_mapping, as_number
from floatline.report.summary import resumed_at, summarize
from floatline.report.svg import BAD, DASHES, INK, SERIES, render, series_style
from floatline.report.units import bytes_text, number_text, percent_text, power_of_two_text, rate_text, seconds_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def run_plots(run: RunData, *, name: str = "run", points: int = POINTS) -> list[Plot]:
    """Draw everything that one run has data for.

    Args:
        run: The run; without updates and evaluations the list is empty.
        name: Short name, unique on the page.
        points: About how many points a curve keeps.

    Returns:
        The plots in reading order.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    drawn = [
        _loss(run, name, points),
        _accuracy(run, name),
        _grad_norm(run, name, points),
        _learning_rate(run, name, points),
        _loss_scale(run, name, points),
        _step_time(run, name, points),
        _throughput(run, name, points),
        _memory(run, name, points),
    ]
    return [plot for plot in drawn if plot is not None]


def _loss(run: RunData, name: str, points: int) -> Plot | None:
    if not run.steps:
        return None
    xs, raw, course = updates(run.steps), [step.loss for step in run.steps], smoothed_loss(run)
    validation = [(item.step, item.loss) for item in run.evals if item.split == "validation"]
    marks = [step.step for step in run.steps if not math.isfinite(step.loss)]
    resumed = resumed_at(run)

    def paint(axes: Axes) -> None:
        axes.plot(*thin(xs, raw, points), color=SERIES[0], **FAINT, **dots(raw))
        axes.plot(*thin(xs, course, points), color=SERIES[0])
        axes.plot(*columns(validation), "o", color=SERIES[1], markersize=4.5)
        for place in resumed:
            axes.axvline(place, color=INK, linewidth=0.9, linestyle=":")
        scale(axes, [*raw, *columns(validation)[1]], xs)
        crosses(axes, marks)

    keys = [Key(label="each update", shape="faint"), Key(label="smoothed", shape="line")]
    keys += [Key(label="validation", shape="dot", colour="--series-1")] * bool(validation)
    keys += [Key(label=f"not finite ({len(marks)})", shape="cross", colour="--bad")] * bool(marks)
    keys += [Key(label="resumed", shape="rule", colour="--ink-2", dash="2 2")] * bool(resumed)
    known = finite(course) or [NAN]
    alt = f"Training loss over {len(xs)} updates, from {number_text(known[0])} to {number_text(known[-1])}"
    return Plot(title="Loss", svg=render(f"{name}-loss", paint, alt=alt), keys=tuple(keys))


def _accuracy(run: RunData, name: str) -> Plot | None:
    overall = accuracies(run)
    tests = [(item.step, item.accuracy) for item in run.evals if item.split == "test" and item.accuracy >= 0]
    kinds: dict[str, list[tuple[int, float]]] = {}
    for item in run.evals:
        for kind, tally in item.groups.items() if item.split == "validation" else ():
            kinds.setdefault(kind, []).append((item.step, tally.share))
    curves = [("all questions", overall)] * bool(overall)
    curves += list(kinds.items()) if len(kinds) > 1 or not overall else []
    curves = curves[: len(SERIES)]
    known = finite([100 * share for _, pairs in [*curves, ("", tests)] for _, share in pairs])
    if not known:
        return None

    def paint(axes: Axes) -> None:
        for index, (_, pairs) in enumerate(curves):
            x, y = columns(pairs)
            axes.plot(x, [100 * share for share in y], **series_style(index), marker="o", markersize=3)
        x, y = columns(tests)
        axes.plot(x, [100 * share for share in y], "D", color=BAD, markersize=6, markerfacecolor="none", clip_on=False)
        percent_axis(axes, known)

    keys = [
        Key(label=label, shape="line", colour=f"--series-{index}", dash=DASHES[index % len(DASHES)])
        for index, (label, _) in enumerate(curves)
    ]
    keys += [Key(label="test, all questions", shape="diamond", colour="--bad")] * bool(tests)
    alt = f"Accuracy by kind of question over updates, last value {percent_text(known[-1] / 100)}"
    caption = "Validation on the way, test at the end." if tests else "On validation."
    return Plot(title="Accuracy", svg=render(f"{name}-accuracy", paint, alt=alt), caption=caption, keys=tuple(keys))


def _grad_norm(run: RunData, name: str, points: int) -> Plot | None:
    limit = summarize(run).max_grad_norm
    xs, raw = updates(run.steps), [step.grad_norm for step in run.steps]
    skipped = [step.step for step in run.steps if not step.applied]
    known = finite(raw)
    if not known and not skipped:
        return None
    bounded = math.isfinite(limit)

    def paint(axes: Axes) -> None:
        axes.plot(*thin(xs, raw, points), color=SERIES[3], **FAINT, **dots(raw))
        axes.plot(*thin(xs, smooth(raw, window(raw)), points), color=SERIES[3])
        scale(axes, raw, xs)
        if bounded and known:
            axes.axhline(limit, color=INK, linewidth=1, linestyle="--")
        crosses(axes, skipped)

    keys = [Key(label="each update", shape="faint", colour="--series-3")]
    keys += [Key(label="smoothed", shape="line", colour="--series-3")]
    keys += [Key(label=f"clipped to {number_text(limit)}", shape="rule", colour="--ink-2", dash="4 2")] * bounded
    keys += [Key(label=f"update skipped ({len(skipped)})", shape="cross", colour="--bad")] * bool(skipped)
    caption = f"Median {number_text(quantile(raw, 0.5))}."
    if bounded and known:
        caption += f" {percent_text(sum(norm > limit for norm in known) / len(known))} of the updates were clipped."
    alt = f"Gradient norm over updates. {caption} {len(skipped)} updates were skipped."
    return Plot(title="Gradient norm", svg=render(f"{name}-grad", paint, alt=alt), caption=caption, keys=tuple(keys))


def _learning_rate(run: RunData, name: str, points: int) -> Plot | None:
    values = [step.lr for step in run.steps]
    caption = f"Highest {number_text(max(finite(values), default=NAN))}, last {number_text((values or [NAN])[-1])}."
    return plain_plot(
        run,
        "Learning rate",
        f"{name}-lr",
        values,
        points,
        colour=2,
        alt=f"Learning rate over updates. {caption}",
        caption=caption,
        smoothed=False,
    )


def _loss_scale(run: RunData, name: str, points: int) -> Plot | None:
    exponents = [math.log2(step.loss_scale) if step.loss_scale > 0 else NAN for step in run.steps]
    known = finite(exponents)
    if not known:
        return None
    xs = updates(run.steps)
    skipped = [step.step for step in run.steps if not step.applied]

    def paint(axes: Axes) -> None:
        low, high = math.floor(min(known)) - 1, math.ceil(max(known)) + 2
        axes.plot(*thin(xs, exponents, points), color=SERIES[4], drawstyle="steps-post", **dots(exponents))
        axes.set_yticks(range(low, high + 1, max(1, (high - low) // 5)))
        axes.yaxis.set_major_formatter(lambda value, _: power_of_two_text(2.0**value))
        axes.set_ylim(low, high)
        axes.set_xlabel("update")
        crosses(axes, skipped)

    keys = [Key(label="loss scale", shape="line", colour="--series-4")]
    keys += [Key(label=f"update skipped ({len(skipped)})", shape="cross", colour="--bad")] * bool(skipped)
    first, last = (power_of_two_text(2.0**exponent) for exponent in (known[0], known[-1]))
    caption = f"From {first} to {last}."
    alt = f"Loss scale over updates. {caption}"
    return Plot(title="Loss scale", svg=render(f"{name}-scale", paint, alt=alt), caption=caption, keys=tuple(keys))


def _step_time(run: RunData, name: str, points: int) -> Plot | None:
    summary, values = summarize(run), [step.step_s for step in run.steps]
    steady = values[summary.warm_up :]
    slow = sum(value > 3 * summary.step_median for value in finite(steady))
    together = as_number(as_mapping(run.recipe.get("run")).get("log_every"))
    caption = f"Median {seconds_text(summary.step_median)}, 95th percentile {seconds_text(summary.step_p95)}"
    if slow:
        caption += f"; {slow} took more than three times the median"
    if summary.step_first > 2 * summary.step_median:
        ratio = summary.step_first / summary.step_median
        first = "the first" if summary.warm_up < 2 else f"the first {summary.warm_up}"
        caption += f"; {first}, {seconds_text(summary.step_first)} (×{ratio:.0f}: warm-up), not counted"
    if together > 1:
        caption += f". Averages of {together:.0f} updates read together"
    return plain_plot(
        run,
        "Time per update",
        f"{name}-time",
        values,
        points,
        colour=6,
        alt=f"Time of each update. {caption}.",
        caption=f"{caption}.",
        cut=1.25 * quantile(steady, 0.99),
        text=seconds_text,
    )


def _throughput(run: RunData, name: str, points: int) -> Plot | None:
    values = [step.tokens_per_s for step in run.steps]
    caption = f"Median {rate_text(summarize(run).tokens_per_s)}."
    alt = f"Throughput over updates. {caption}"
    return plain_plot(run, "Tokens per second", f"{name}-rate", values, points, colour=5, alt=alt, caption=caption)


def _memory(run: RunData, name: str, points: int) -> Plot | None:
    return plain_plot(
        run,
        "Memory",
        f"{name}-memory",
        [step.memory_bytes for step in run.steps],
        points,
        colour=0,
        alt=f"Memory over updates. {memory_peak(run)}",
        caption=memory_peak(run),
        text=bytes_text,
        smoothed=False,
    )
