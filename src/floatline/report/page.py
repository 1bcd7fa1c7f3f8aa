"""The report as one HTML page that needs nothing outside itself.

Styles, drawings and pictures stand in the page, and its content security policy forbids it to load anything. There is
no script: the filter over the samples is a pair of radio buttons. Colours follow the reader's light or dark setting;
paper is always light.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from floatline.errors import ConfigError
from floatline.files import write_whole
from floatline.report.compare import Table, differences, labels, side_by_side
from floatline.report.drawing import POINTS, Plot
from floatline.report.gallery import CARDS, IMAGE_BUDGET, Card, gallery
from floatline.report.gradient_plots import gradient_plots
from floatline.report.headroom import Tight, tightest
from floatline.report.heat_map import ROWS as ROWS_OF_LAYERS
from floatline.report.heat_map import HeatMap, heat_map
from floatline.report.html import render_template
from floatline.report.load import RunData
from floatline.report.need import need
from floatline.report.overlay import compare_plots
from floatline.report.plots import run_plots
from floatline.report.sections import Split, facts, splits, tiles
from floatline.report.summary import Summary, choices_of, status_words, summarize, techniques_of, verdict

ROWS = 100


@dataclass(frozen=True, kw_only=True)
class RunPart:
    """Everything the template shows of one run."""

    number: int
    label: str
    run: RunData
    summary: Summary
    verdict: str
    status: tuple[str, str, str]
    tiles: list[Any]
    plots: list[Plot]
    gradient_plots: list[Plot]
    heat: HeatMap | None
    cards: list[Card]
    splits: list[Split]
    facts: list[tuple[str, str]]
    techniques: list[tuple[str, str, str]]
    choices: list[Any]
    headroom: list[Tight]
    error: str
    rows: int = ROWS


def write_html(runs: Sequence[RunData], path: str | Path) -> Path:
    """Write the report of one or several runs as one HTML file.

    Args:
        runs: What `load_run` returned; several runs are set side by side first.
        path: The file to write. It appears complete or not at all; missing directories are made.

    Returns:
        The path written.

    Raises:
        ConfigError: `runs` is empty, or matplotlib or jinja2 is not installed.
        RunDirectoryError: The file cannot be written.
    """
    text = render_html(runs)
    return write_whole(path, text.encode("utf-8", errors="replace"))  # JSON can hold half a character


def render_html(runs: Sequence[RunData]) -> str:
    """Return the report as HTML text; see `write_html`.

    Args:
        runs: One or several runs.

    Returns:
        A complete page.

    Raises:
        ConfigError: `runs` is empty, or matplotlib or jinja2 is not installed.
    """
    if not runs:
        raise ConfigError("there is no run to report", hint="give one or several run directories")
    need("jinja2")  # said before anything is drawn
    several = len(runs) > 1
    points = max(POINTS // len(runs), 150)
    table: Table | None = side_by_side(runs) if several else None
    return render_template(
        "page.html",
        parts=[_part(index, label, run, len(runs)) for index, (label, run) in enumerate(zip(labels(runs), runs))],
        table=table,
        overlays=compare_plots(runs, points=points) if several else [],
        differences=differences(runs) if several else [],
        labels=labels(runs),
        title=runs[0].name if not several else f"{len(runs)} runs side by side",
    )


def _part(index: int, label: str, run: RunData, runs: int) -> RunPart:
    summary = summarize(run)
    points = max(POINTS // runs, 150)
    gradients = run.gradients
    return RunPart(
        number=index,
        label=label,
        run=run,
        summary=summary,
        verdict=verdict(summary),
        status=status_words(summary.status),
        tiles=tiles(run, summary),
        plots=run_plots(run, name=f"r{index}", points=points),
        gradient_plots=gradient_plots(gradients, name=f"r{index}-g", points=points) if gradients else [],
        heat=heat_map(gradients, most=max(ROWS_OF_LAYERS // runs, 16)) if gradients else None,
        cards=gallery(run, cards=max(CARDS // runs, 12), budget=IMAGE_BUDGET // runs) if run.samples else [],
        splits=splits(run),
        facts=facts(run),
        techniques=techniques_of(run),
        choices=choices_of(run),
        headroom=tightest(run),
        error=str(run.info.get("error") or ""),
    )
