"""A plan as one HTML page that needs nothing outside itself, in the look of a run's report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from floatline.report.html import render_template
from floatline.report.plan_sections import (
    TONES,
    about_model,
    about_plan,
    comparison_section,
    comparison_sentence,
    headline,
    notes,
    odds,
    sections,
)
from floatline.report.plan_text import exported
from floatline.report.plan_timeline import timeline_plot
from floatline.report.sections import Tile
from floatline.report.units import bytes_text, seconds_text

if TYPE_CHECKING:
    from floatline.plan.command import PlanReport
    from floatline.plan.side_by_side import Comparison

_MARKS = {"fits": "✓", "tight": "!", "does not fit": "✗"}


def plan_html(report: PlanReport) -> str:
    """Return a plan as an HTML page.

    Args:
        report: What `floatline.plan.command.answer` returned.

    Raises:
        ConfigError: matplotlib or jinja2 is not installed.
    """
    verdict = report.estimate.verdict
    filled = [name for name, settings in report.settings.items() if settings]
    return _page(
        title=f"{report.source.name} on {report.hardware.name}",
        verdict=(TONES[verdict], _MARKS[verdict], verdict),
        sentences=[headline(report), odds(report)],
        about=[about_plan(report), about_model(report)],
        tiles=_tiles(report),
        plots=[timeline_plot(report.estimate)],
        sections=sections(report),
        lists=[("Notes", notes(report)), ("Assumed", list(report.estimate.assumptions))],
        blocks=[block for block in (exported(report, name) for name in (None, *filled)) if block[1]],
    )


def comparison_html(comparison: Comparison) -> str:
    """Return all GPUs side by side as an HTML page.

    Args:
        comparison: What `floatline.plan.side_by_side.compare` returned.

    Raises:
        ConfigError: jinja2 is not installed.
    """
    return _page(
        title=f"{comparison.source.name} on all GPUs",
        sentences=[comparison_sentence(comparison)],
        about=[about_model(comparison)],
        sections=[comparison_section(comparison)],
    )


def _page(**shown: Any) -> str:
    empty: dict[str, Any] = {"verdict": None, "tiles": [], "plots": [], "lists": [], "blocks": []}
    return render_template("plan.html", tones=TONES, **(empty | shown))


def _tiles(report: PlanReport) -> list[Tile]:
    found = report.estimate
    tone = TONES[found.verdict]
    cut = f"{found.micro_batches} micro-batches; " if found.micro_batches > 1 else ""
    spare = "spare" if found.fit.margin >= 0 else "too much"
    told = [
        Tile(name="needs", value=bytes_text(found.fit.needed), small=f"of {bytes_text(found.fit.capacity)}", tone=tone),
        Tile(name=spare, value=bytes_text(abs(found.fit.margin)), small=f"{bytes_text(found.fit.reserve)} in reserve"),
        Tile(name="precision", value=found.precision),
        Tile(name="an update" if found.mode == "train" else "a forward", value=seconds_text(found.time.seconds),
             small=f"{cut}by a roofline model"),
    ]  # fmt: skip
    if report.plan is not None:
        plain = report.plan.ladder[0].estimate
        told.append(Tile(name="plain step", value=bytes_text(plain.fit.needed), small=plain.verdict))
    return told
