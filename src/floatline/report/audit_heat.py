"""What each module does in a lower format, as a heat map: a row a module in the model's order, a column a measure.

A cell's colour is its value in units of what is allowed, in steps of half an order of magnitude; its text is the value.
Modules of one repeated layer stand together under its name. Of a large model the gravest modules are shown, and each
layer says what was left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from floatline.audit.judging import ROUNDING
from floatline.report.audit_words import bits_text, error_text
from floatline.report.units import percent_text

if TYPE_CHECKING:
    from floatline.audit.report import AuditReport, ModuleRow
    from floatline.audit.tolerance import Tolerance

ROWS = 80
"""Modules shown of one format."""
STEPS = (0.03, 0.1, 0.3, 1.0, 10.0)
"""Share of what is allowed at which the next colour begins; from the fourth on it is too much."""
COLUMNS = (
    ("forward", "largest error of its own forward ops on exact inputs"),
    ("backward", "the same of its backward ops"),
    ("weight grad", "error of its parameters' gradients, everything lowered"),
    ("input grad", "the same of its inputs' gradients"),
    ("propagated", "error that its results have in the step, everything lowered"),
    ("bits left", "to the format's end, the least of its ops"),
    ("loss alone", "change of the loss with only this module lowered"),
    ("grad alone", "change of the gradient with only this module lowered"),
    ("FLOPs", "share of the step's, with what is inside of it"),
)
"""Heading and meaning of the columns."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One value: its text, how hot it is (0 to 5, 4 and 5 are too much), and a bar's length in percent."""

    text: str
    heat: int = 0
    bar: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Line:
    """One module: its name within its block, its cells, how it fails, whether it is kept in fp32."""

    name: str
    full: str
    cells: tuple[Cell, ...]
    failure: str
    kept: bool


@dataclass(frozen=True, kw_only=True)
class Block:
    """One repeated layer or part of the model: its lines, and what was left out of it."""

    name: str
    lines: tuple[Line, ...]
    left_out: str


@dataclass(frozen=True, kw_only=True)
class HeatTable:
    """The heat map of one format."""

    name: str
    title: str
    blocks: tuple[Block, ...]
    caption: str


def heat_table(report: AuditReport, candidate: str, *, most: int = ROWS) -> HeatTable:
    """Return the heat map of one format.

    Args:
        report: The audit.
        candidate: Which format.
        most: Modules at most.
    """
    rows = [row for row in report.modules if row.candidate == candidate]
    ranked = sorted(rows, key=lambda row: (row.kept or row.failure is not None, worst(row, report)), reverse=True)
    shown = {row.module for row in ranked[:most]}
    blocks = tuple(_block(name, list(group), shown, report.tolerance)
                   for name, group in groupby(rows, key=lambda row: block_of(row.module)))  # fmt: skip
    base = report.candidates[candidate].base
    left = f" {len(rows) - len(shown)} of {len(rows)} modules, the mildest, are summed up." if len(rows) > most else ""
    return HeatTable(
        name=f"heat-{candidate}",
        title=f"{base}, module by module",
        blocks=blocks,
        caption="Colour: the value over what is allowed; errors of ops may be "
        f"{error_text(ROUNDING)}, those of gradients and results {error_text(report.tolerance.tensor)}, of the loss "
        f"{error_text(report.tolerance.loss)}, of the whole gradient {error_text(report.tolerance.gradient)}. "
        f"Empty: not run, or there is nothing to measure.{left}",
    )


def block_of(module: str) -> str:
    """Return the repeated layer that a module is in, down to its last number; else the part of the model.

    >>> block_of("model.layers.11.mlp.up"), block_of("model.norm"), block_of("")
    ('model.layers.11', 'model', '')
    """
    found = re.match(r"(.*(?:^|\.)\d+)(?:\.|$)", module)
    return found[1] if found else module.rpartition(".")[0]


def _block(name: str, rows: Sequence[ModuleRow], shown: set[str], allowed: Tolerance) -> Block:
    lines = tuple(_line(row, name, allowed) for row in rows if row.module in shown)
    rest = [row for row in rows if row.module not in shown]
    hottest = max((cell.heat for row in rest for cell in cells(row, allowed)), default=0)
    told = f"below {100 * STEPS[hottest]:g} % of what is allowed" if hottest < 4 else "some above what is allowed"
    left_out = f"{len(rest)} more, {told}" if rest else ""
    return Block(name=name or "top of the model", lines=lines, left_out=left_out)


def _line(row: ModuleRow, block: str, allowed: Tolerance) -> Line:
    own = row.module.removeprefix(f"{block}.") if row.module != block else "(itself)"
    return Line(
        name=own or "(itself)",
        full=row.module,
        cells=cells(row, allowed),
        failure=row.failure or "",
        kept=row.kept,
    )


def cells(row: ModuleRow, allowed: Tolerance) -> tuple[Cell, ...]:
    """Return the cells of a row, in the order of `COLUMNS`."""
    return (
        _error(row.local, ROUNDING),
        _error(row.local_backward, ROUNDING),
        _error(row.weight_gradient, allowed.tensor),
        _error(row.input_gradient, allowed.tensor),
        _error(row.reached, allowed.tensor),
        _bits(row.headroom),
        _error(row.loss_change, allowed.loss),
        _error(row.gradient_change, allowed.gradient),
        Cell(text=percent_text(row.cost) if row.cost else "", bar=100 * min(row.cost, 1.0)),
    )


def worst(row: ModuleRow, report: AuditReport) -> float:
    """Return the hottest of a module's errors in units of what is allowed, without what reaches it from others."""
    allowed = report.tolerance
    alone = [row.local / ROUNDING, row.local_backward / ROUNDING, (row.loss_change or 0.0) / allowed.loss,
             (row.gradient_change or 0.0) / allowed.gradient]  # fmt: skip
    return max(alone)


def heat(ratio: float) -> int:
    """Return how hot a value is, from 0 to 5.

    >>> [heat(r) for r in (0.01, 0.05, 0.2, 0.5, 2.0, math.inf)]
    [0, 1, 2, 3, 4, 5]
    """
    return sum(ratio >= step for step in STEPS)


def _error(value: float | None, allowed: float) -> Cell:
    if value is None or value == 0:
        return Cell(text="" if value is None else "0")
    text = "∞" if math.isinf(value) else error_text(value)
    return Cell(text=text, heat=heat(value / allowed))


def _bits(bits: float) -> Cell:
    """Below 0 values are lost; a few bits are what data differ by from batch to batch."""
    if not math.isfinite(bits):
        return Cell(text="")
    hot = 5 if bits < 0 else 3 if bits < 1 else 2 if bits < 3 else 1 if bits < 6 else 0
    return Cell(text=bits_text(bits), heat=hot)
