"""The report as plain text, for a terminal, a log or a mail: no colour, no cursor movement, no mark-up.

What a model or a data file says may hold control characters, which a terminal would obey; they are shown as `?`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from floatline.errors import ConfigError
from floatline.report.compare import differences, labels, side_by_side
from floatline.report.curves import finite
from floatline.report.drawing import smoothed_loss
from floatline.report.gallery import pick
from floatline.report.headroom import tightest
from floatline.report.load import RunData
from floatline.report.paper import WIDTH, Paper
from floatline.report.records import as_text
from floatline.report.sections import splits, tiles
from floatline.report.summary import choices_of, summarize, techniques_of, verdict
from floatline.report.units import DASH, number_text, times

LISTED = 8
ABREAST = 4

_BARS = "▁▂▃▄▅▆▇█"


def render_text(runs: Sequence[RunData], *, width: int = WIDTH) -> str:
    """Render the report of one or several runs as plain text.

    Args:
        runs: What `load_run` returned; several runs get the comparison and a verdict each.
        width: Columns at most.

    Returns:
        Text that ends with a newline and reads the same with and without a terminal.

    Raises:
        ConfigError: `runs` is empty.

    Example:
        print(render_text([load_run("runs/digits")]))
    """
    if not runs:
        raise ConfigError("there is no run to report", hint="give one or several run directories")
    out = Paper(width)
    if len(runs) > 1:
        _comparison(out, runs)
    else:
        _one(out, runs[0], labels(runs)[0])
    return out.text()


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """Return a curve as a row of bars; gaps are spaces.

    >>> sparkline([1.0, 2.0, float("nan"), 3.0])
    '▁▅ █'
    """
    known = finite(values)
    if not known:
        return ""
    low, high = min(known), max(known)
    picks = [values[index * len(values) // width] for index in range(width)] if len(values) > width else values
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] if math.isfinite(value) else " " for value in picks)


def _one(out: Paper, run: RunData, label: str) -> None:
    summary = summarize(run)
    out.line(label)
    out.line(verdict(summary))
    for note in run.notes:
        out.line(f"note: {note}")
    if run.info.get("error"):
        out.line(f"error: {run.info['error']}")
    out.table("Result", ("what", "value", ""), [(tile.name, tile.value, tile.small) for tile in tiles(run, summary)])
    out.line()
    out.line(f"Loss {_course(run)}")
    if run.faults:
        rows = [(str(f.step), f.what, f.action, f.reason) for f in run.faults[:LISTED]]
        out.table(_title("Faults and overflows", len(run.faults)), ("update", "what", "action", "reason"), rows)
    for cure in run.cures[:LISTED]:
        out.line()
        out.line(f"Healed at update {cure.step}: {cure.done}")
        out.line(cure.reason)
    if run.alarms:
        rows = [(str(alarm.step), alarm.what, alarm.text, alarm.remedy) for alarm in run.alarms[:LISTED]]
        out.table(_title("Warnings", len(run.alarms)), ("update", "what", "measured", "remedy"), rows)
    if tight := tightest(run):
        title = f"Least headroom to overflow ({times(len(run.headroom), 'step')} sampled; 1 bit is a factor of 2)"
        out.table(title, ("module", "least bits", "at update", "last bits"), [each.cells for each in tight])
    wrong = [sample for sample in pick(run.samples) if sample.correct is False]
    if wrong:
        total = sum(sample.correct is False for sample in run.samples)
        answers = [(sample.question, sample.answer or "(nothing)", sample.truth) for sample in wrong[:LISTED]]
        title = _title(f"Wrong answers among {len(run.samples)} samples", total)
        out.table(title, ("question", "model", "truth"), answers)
    if data := splits(run):
        out.table("Data", ("split", "samples", "left out"), [(s.name, s.samples, str(s.skipped)) for s in data])
    left_out = [item for split in data for item in split.listed]
    if left_out:
        out.table(_title("Left out", len(left_out)), ("where", "reason"), left_out[:LISTED])
    if techniques := techniques_of(run):
        out.table("Techniques", ("technique", "touched", "notes"), techniques)
    if choices := choices_of(run):
        rows3 = [tuple(as_text(choice.get(key)) for key in ("key", "value", "reason")) for choice in choices]
        out.table("Automatic choices", ("key", "value", "reason"), rows3)


def _course(run: RunData) -> str:
    course = smoothed_loss(run)
    known = finite(course)
    return f"{number_text(known[0])} {sparkline(course)} {number_text(known[-1])}" if known else DASH


def _title(title: str, total: int) -> str:
    return f"{title} (first {LISTED} of {total})" if total > LISTED else title


def _comparison(out: Paper, runs: Sequence[RunData]) -> None:
    table = side_by_side(runs)
    out.line(f"{len(runs)} runs side by side")
    rows = [[cell.text + (" *" if cell.best else "") for cell in row] for row in table.rows]
    for start in range(0, len(rows), ABREAST):
        shown = rows[start : start + ABREAST]
        title = "Result (* best of all runs)" if start == 0 else "Result, continued"
        headings = (table.headings[0], *(row[0] for row in shown))
        out.table(title, headings, zip(table.headings[1:], *(row[1:] for row in shown)))
    out.line()
    for label, run in zip(labels(runs), runs):
        out.line(f"{label}: {verdict(summarize(run))}")
        out.line(f"  loss {_course(run)}")
        for note in run.notes:
            out.line(f"  note: {note}")
    changed = differences(runs)
    if changed:
        out.table("Where the recipes differ", ("key", *labels(runs)), [(key, *values) for key, values in changed])
