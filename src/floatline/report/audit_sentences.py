"""An audit in sentences: the answer, what was allowed, what it took, the line for a recipe, advice and notes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from floatline.report.audit_words import error_text
from floatline.report.units import seconds_text, times

if TYPE_CHECKING:
    from floatline.audit.report import AuditReport, Candidate


def headline(report: AuditReport) -> str:
    """Return the answer as one sentence."""
    if not report.safe:
        return f"{report.model} on {report.hardware}: no lower format is safe, stay in 32-true."
    candidate = chosen(report)
    kept = f"with {times(len(candidate.islands), 'module')} in fp32" if candidate.islands else "as it is"
    return f"{report.model} on {report.hardware}: {candidate.base} is safe {kept}{_but(report, candidate)}."


def _but(report: AuditReport, candidate: Candidate) -> str:
    """Say what a precise step does not help against."""
    lost, looked_at = lost_updates(report, candidate)
    return f", but {lost} of {times(looked_at, 'parameter')} lose optimizer updates (see the advice)" if lost else ""


def lost_updates(report: AuditReport, candidate: Candidate) -> tuple[int, int]:
    """Return how many parameters lose updates in a candidate's weights, and how many were looked at."""
    updates = report.updates.get(candidate.name)
    return (sum(bool(row.found) for row in updates.rows), len(updates.rows)) if updates else (0, 0)


def chosen(report: AuditReport) -> Candidate:
    """Return the candidate whose policy the report recommends."""
    return next(c for c in report.candidates.values() if c.policy == report.policy)


def about(report: AuditReport) -> str:
    """Return what was audited and what was allowed."""
    allowed = report.tolerance
    mode = "autocast over fp32 weights" if report.mode == "mixed" else "weights that are cast"
    return (
        f"Mode {report.mode} ({mode}). Allowed against fp64: loss {error_text(allowed.loss)}, gradient "
        f"{error_text(allowed.gradient)}, any one parameter's gradient {error_text(allowed.tensor)}. fp32 itself: loss "
        f"{error_text(report.fp32.loss_error)}, gradient {error_text(report.fp32.gradient_error)}."
    )


def cost(report: AuditReport) -> str:
    """Return what the audit took."""
    parts = ", ".join(f"{count} {what}" for what, count in report.passes.items())
    return f"{report.forward_passes} forward passes ({parts}) in {seconds_text(report.seconds)}."


def recipe_line(report: AuditReport) -> str:
    """Return the line to put into a recipe."""
    return f'precision: "{report.policy}"'


def lists(report: AuditReport) -> list[tuple[str, list[str]]]:
    """Return titles and sentences."""
    advice = dict.fromkeys(a for candidate in report.candidates.values() for a in candidate.advice)
    return [("Advice", [_short(a) for a in advice]), ("Notes", list(report.notes))]


def _short(sentence: str) -> str:
    """Return a sentence in which files are called by their last two names."""
    words = [os.sep.join(word.split(os.sep)[-2:]) if word.startswith(os.sep) else word for word in sentence.split(" ")]
    return " ".join(words)
