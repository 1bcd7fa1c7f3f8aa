"""An audit as one HTML page that needs nothing outside itself, in the look of a run's report."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from floatline.files import write_whole
from floatline.report.audit_front import front_plot
from floatline.report.audit_heat import COLUMNS, heat_table
from floatline.report.audit_sections import TONES, sections
from floatline.report.audit_sentences import about, chosen, cost, headline, lists, lost_updates, recipe_line
from floatline.report.audit_words import error_text, ratio_text
from floatline.report.html import render_template
from floatline.report.sections import Tile
from floatline.report.units import percent_text, seconds_text, times

if TYPE_CHECKING:
    from floatline.audit.report import AuditReport


def audit_html(report: AuditReport) -> str:
    """Return an audit as an HTML page.

    Args:
        report: What `fl.audit` or the command returned.

    Raises:
        ConfigError: matplotlib or jinja2 is not installed.
    """
    tables = sections(report, wide=True)
    before = [section for section in tables if section.name == "formats" or section.name.startswith("islands")]
    plots = [front_plot(report, candidate) for candidate in report.candidates.values()]
    return render_template(
        "audit.html",
        title=f"{report.model} on {report.hardware}",
        verdict=_verdict(report),
        sentences=[headline(report), report.verdict],
        about=[about(report), cost(report)],
        tiles=_tiles(report),
        recipe=recipe_line(report),
        before=before,
        heats=[heat_table(report, name) for name in report.candidates],
        columns=COLUMNS,
        after=[section for section in tables if section not in before],
        plots=[plot for plot in plots if plot is not None],
        lists=lists(report),
        tones=TONES,
    )


def _verdict(report: AuditReport) -> tuple[str, str, str]:
    if not report.safe:
        return "bad", "✗", "stay in fp32"
    lost, _ = lost_updates(report, chosen(report))
    return ("warn", "!", "safe, but updates are lost") if lost else ("good", "✓", "safe")


def write_audit(report: AuditReport, path: str | Path) -> Path:
    """Write an audit as an HTML page.

    Raises:
        ConfigError: matplotlib or jinja2 is not installed.
        RunDirectoryError: The file cannot be written.
    """
    return write_whole(path, audit_html(report).encode("utf-8", errors="replace"))


def _tiles(report: AuditReport) -> list[Tile]:
    failing = f"{times(len(report.failures), 'op')} failing by themselves"
    told = [
        Tile(name="policy", value=report.policy.split(";")[0], small=failing, tone="good" if report.safe else "bad")
    ]
    for candidate in report.candidates.values():
        effect = candidate.effect or candidate.all_lowered
        ratio = effect.ratio(report.tolerance)
        told.append(
            Tile(
                name=f"error in {candidate.base}",
                value=f"{ratio_text(ratio)} of allowed" if math.isfinite(ratio) else "not finite",
                small=f"gradient off by {error_text(effect.gradient_error)}; in fp32: "
                + (
                    f"{times(len(candidate.islands), 'module')}, {percent_text(candidate.cost)} of FLOPs"
                    if candidate.islands
                    else "nothing"
                ),
                tone="good" if ratio <= 1 else "bad",
            )
        )
    if report.safe and chosen(report).noise_of_policy is not None:
        noise = chosen(report).noise_of_policy
        told.append(Tile(name="sure", value=percent_text(noise.confidence if noise else None),
                         small="by stochastic rounding and over the batches"))  # fmt: skip
    if report.safe and report.updates:
        lost, looked_at = lost_updates(report, chosen(report))
        told.append(Tile(name="updates lost", value=str(lost), small=f"of {times(looked_at, 'parameter')}",
                         tone="bad" if lost else "good"))  # fmt: skip
    told.append(Tile(name="audit", value=seconds_text(report.seconds), small=f"{report.forward_passes} forward passes"))
    return told
