"""A plan as plain text, for a terminal or a log."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml

from floatline.errors import ConfigError, did_you_mean
from floatline.report.paper import WIDTH, Paper
from floatline.report.plan_sections import (
    Section,
    about_model,
    about_plan,
    comparison_section,
    comparison_sentence,
    headline,
    notes,
    odds,
    sections,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from floatline.plan.command import PlanReport
    from floatline.plan.side_by_side import Comparison


def plan_text(report: PlanReport, *, export: str | None = None, width: int = WIDTH) -> str:
    """Render a plan as plain text.

    Args:
        report: What `floatline.plan.command.answer` returned.
        export: Show these settings of another program instead of the recipe: "trainer", "accelerate" or "fsdp".
        width: Columns at most; settings that are meant to be copied keep their lines.

    Raises:
        ConfigError: No such settings.
    """
    title, block = exported(report, export)
    out = Paper(width)
    for sentence in (headline(report), odds(report), about_plan(report), about_model(report)):
        out.line(sentence)
    for section in sections(report):
        _table(out, section)
    _list(out, "Notes", notes(report))
    _list(out, "Assumed", report.estimate.assumptions)
    if block:
        out.line()
        out.line(title)
        out.block(block)
    return out.text()


def _table(out: Paper, section: Section) -> None:
    title = f"{section.title}. {section.hint}" if section.hint else section.title
    out.table(title, section.headings, section.rows, section.numeric)


def _list(out: Paper, title: str, sentences: Sequence[str]) -> None:
    if sentences:
        out.line()
        out.line(title)
    for sentence in sentences:
        out.line(f"- {sentence}")


def exported(report: PlanReport, name: str | None) -> tuple[str, str]:
    """Return title and text of what a plan is exported as; empty texts for inference.

    Args:
        report: The plan.
        name: "trainer", "accelerate", "fsdp"; None for the recipe.

    Raises:
        ConfigError: The plan has no such settings.
    """
    if name is None:
        recipe = report.plan.recipe() if report.plan else {}
        return "The recipe's part, for `floatline train`", to_yaml(recipe) if recipe else ""
    if name not in report.settings:
        known = list(report.settings)
        raise ConfigError(f"a plan cannot be exported as {name!r}", hint=did_you_mean(name, known))
    gaps = [f"# {what}: {instead}\n" for what, instead in report.gaps.get(name, {}).items()]
    if gaps:
        gaps.insert(0, "# it has no setting for:\n")
    settings = dict(report.settings[name])
    return TITLES[name], (to_yaml(settings) if settings else "# none: the plan does not shard\n") + "".join(gaps)


TITLES = {
    "trainer": "transformers TrainingArguments",
    "accelerate": "accelerate config",
    "fsdp": "FSDP2, fully_shard",
}


def to_yaml(tree: Any) -> str:
    """Return plain values as YAML, keys in their order."""
    return str(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, default_flow_style=False))


def comparison_text(comparison: Comparison, *, width: int = WIDTH) -> str:
    """Render all GPUs side by side as plain text.

    Args:
        comparison: What `floatline.plan.side_by_side.compare` returned.
        width: Columns at most.
    """
    out = Paper(width)
    out.line(comparison_sentence(comparison))
    out.line(about_model(comparison))
    _table(out, comparison_section(comparison))
    return out.text()
