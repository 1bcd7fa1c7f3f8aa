"""Where an answer goes: text, page or picture, for one GPU or for all of them.

A plan may take a minute, so what cannot be written or shown is told before it begins.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from floatline.errors import ConfigError, did_you_mean
from floatline.files import check_writable, write_whole
from floatline.plan.command import SETTINGS
from floatline.plan.side_by_side import Comparison
from floatline.report.plan_page import comparison_html, plan_html
from floatline.report.plan_sections import headline
from floatline.report.plan_text import comparison_text, plan_text
from floatline.report.plan_timeline import timeline_png

if TYPE_CHECKING:
    from floatline.plan.command import PlanReport, PlanRequest


def check_outputs(request: PlanRequest, out: Path | None, png: Path | None, export: str | None) -> None:
    """Refuse what could not be shown in the end.

    Args:
        request: What is to be planned.
        out: The page to write.
        png: The picture to write.
        export: Whose settings to show.

    Raises:
        ConfigError: An option that is for one GPU or for training, or unknown settings.
        RunDirectoryError: A file that cannot be written.
    """
    for option, value in (("--png", png), ("--export", export)):
        if value is not None and request.hardware == "all":
            raise ConfigError(
                f"{option} is for one GPU, and --hardware is all", hint=f"name one GPU, or leave {option} out"
            )
    if export is not None and request.mode != "train":
        raise ConfigError("--export is for training, and --mode is inference", hint="leave --export out")
    if export is not None and export not in SETTINGS:
        raise ConfigError(f"a plan cannot be exported as {export!r}", hint=did_you_mean(export, SETTINGS))
    for path in (out, png):
        if path is not None:
            check_writable(path)


def text_of(answer: PlanReport | Comparison, export: str | None = None) -> str:
    """Return an answer as text.

    Args:
        answer: One plan, or all GPUs.
        export: Whose settings to show instead of the recipe.

    Raises:
        ConfigError: The plan has no such settings.
    """
    if isinstance(answer, Comparison):
        return comparison_text(answer)
    return plan_text(answer, export=export)


def write_page(answer: PlanReport | Comparison, path: str | Path) -> Path:
    """Write an answer as an HTML page.

    Raises:
        ConfigError: matplotlib or jinja2 is not installed.
        RunDirectoryError: The file cannot be written.
    """
    text = comparison_html(answer) if isinstance(answer, Comparison) else plan_html(answer)
    return write_whole(path, text.encode("utf-8", errors="replace"))


def write_picture(answer: PlanReport, path: str | Path) -> Path:
    """Write the memory over one update as a PNG.

    Raises:
        ConfigError: matplotlib is not installed.
        RunDirectoryError: The file cannot be written.
    """
    return write_whole(path, timeline_png(answer.estimate, headline(answer)))
