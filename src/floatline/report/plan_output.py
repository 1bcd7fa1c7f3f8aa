"""Where an answer goes: text, page or picture, for one GPU or for all of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from floatline.errors import ConfigError
from floatline.plan.side_by_side import Comparison
from floatline.report.html import write_whole
from floatline.report.plan_page import comparison_html, plan_html
from floatline.report.plan_sections import headline
from floatline.report.plan_text import comparison_text, plan_text
from floatline.report.plan_timeline import timeline_png

if TYPE_CHECKING:
    from floatline.plan.command import PlanReport


def text_of(answer: PlanReport | Comparison, export: str | None = None) -> str:
    """Return an answer as text.

    Args:
        answer: One plan, or all GPUs.
        export: Whose settings to show instead of the recipe.

    Raises:
        ConfigError: No such settings.
    """
    if isinstance(answer, Comparison):
        if export is not None:
            raise _one_gpu("--export")
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


def write_picture(answer: PlanReport | Comparison, path: str | Path) -> Path:
    """Write the memory over one update as a PNG.

    Raises:
        ConfigError: matplotlib is not installed, or the answer is for all GPUs.
        RunDirectoryError: The file cannot be written.
    """
    if isinstance(answer, Comparison):
        raise _one_gpu("--png")
    return write_whole(path, timeline_png(answer.estimate, headline(answer)))


def _one_gpu(option: str) -> ConfigError:
    return ConfigError(f"{option} is for one GPU, and --hardware is all", hint=f"name one GPU, or leave {option} out")
