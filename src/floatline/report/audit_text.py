"""An audit as plain text, for a terminal or a log."""

from __future__ import annotations

from typing import TYPE_CHECKING

from floatline.report.audit_sections import sections
from floatline.report.audit_sentences import about, cost, headline, lists, recipe_line
from floatline.report.paper import Paper

if TYPE_CHECKING:
    from floatline.audit.report import AuditReport

WIDTH = 100


def audit_text(report: AuditReport, *, width: int = WIDTH) -> str:
    """Render an audit as plain text: the verdict first, the line for a recipe last.

    Args:
        report: What `fl.audit` or the command returned.
        width: Columns at most; the recipe's line is not folded.
    """
    out = Paper(width)
    for sentence in (headline(report), report.verdict, about(report)):
        out.line(sentence)
    for section in sections(report):
        title = f"{section.title}. {section.hint}" if section.hint else section.title
        out.table(title, section.headings, section.rows, section.numeric)
    for title, sentences in lists(report):
        if sentences:
            out.line()
            out.line(title)
        for sentence in sentences:
            out.line(f"- {sentence}")
    out.line()
    out.line(cost(report))
    out.line()
    out.line("For a recipe:" if report.safe else "No lower format is safe. For a recipe:")
    out.block(recipe_line(report))
    return out.text()
