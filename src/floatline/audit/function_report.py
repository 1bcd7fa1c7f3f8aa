"""What the audit of a function says: its outputs, its lines, and which of them must be fp32."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from floatline.audit.report import Row, plain
from floatline.observe.finite.places import Place


@dataclass(frozen=True, kw_only=True)
class OutputError:
    """How far one output is from fp64.

    Attributes:
        name: Its place in what the function returned; "gradient of x" for that of an input.
        relative: Relative RMSE; `inf` where it is not finite and the exact one is; 0 for integers and booleans.
        largest: Largest absolute difference.
        cosine: Cosine to the exact output; None for integers and booleans, and for an exact output of zeros.
        flipped: Elements of an integer or boolean output that come out otherwise.
        decisions: How many it has; 0 for a floating one.
    """

    name: str
    relative: float
    largest: float
    cosine: float | None
    flipped: int = 0
    decisions: int = 0


@dataclass(frozen=True, kw_only=True)
class FunctionEffect:
    """What a choice of fp32 lines comes to.

    Attributes:
        lines: Those in fp32, (file, number).
        outputs: The error of each output.
        ratio: The worst of them in units of what is allowed; above 1 the choice is not safe.
        error: Why it could not be run; empty where it could.
        scale: Loss scale of the backward.
    """

    lines: tuple[tuple[str, int], ...]
    outputs: tuple[OutputError, ...]
    ratio: float
    error: str = ""
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class FunctionCandidate:
    """One lower format.

    Attributes:
        name: "bf16" or "fp16".
        all_lowered: Effect of the format with no line in fp32; of one that does not run so, with those in fp32 that
            have no kernel in it.
        lines: Lines to keep in fp32; None where no choice of them is within the tolerance.
        effect: What these lines come to, in a run with just them in fp32.
        no_kernel: Those that do not run in the format on this host, with what torch says.
        safe_outputs: Outputs that are within the tolerance with everything lowered.
        audited: How many lines have to do with the format.
        trials: Effects of all choices that were run, in order.
        reason: Why these lines.
        illegal: Why the hardware does not run the format; empty where it does.
    """

    name: str
    all_lowered: FunctionEffect
    lines: tuple[Place, ...] | None
    effect: FunctionEffect | None
    no_kernel: Mapping[str, str]
    safe_outputs: tuple[str, ...]
    audited: int
    trials: tuple[FunctionEffect, ...]
    reason: str
    illegal: str = ""

    @property
    def safe(self) -> bool:
        """Whether it is within the tolerance as it is, without a line in fp32."""
        return self.lines == ()


@dataclass(frozen=True, kw_only=True)
class FunctionReport:
    """The audit of a function.

    Attributes:
        function: Its name.
        mode: "true" or "mixed".
        hardware: Name of the target.
        tolerance: Largest relative error of an output that was allowed.
        fp32: Error of each output in fp32 itself.
        rows: Every op that has to do with a candidate format, the gravest first; `location` is its line.
        candidates: By name.
        verdict: One paragraph.
        notes: What a reader should know: random functions, what the host cannot tell, what fp32 cannot compute.
        passes: Runs of the function by purpose.
        seconds: Time of the audit.
    """

    function: str
    mode: str
    hardware: str
    tolerance: float
    fp32: tuple[OutputError, ...]
    rows: tuple[Row, ...]
    candidates: Mapping[str, FunctionCandidate]
    verdict: str
    notes: tuple[str, ...] = ()
    passes: Mapping[str, int]
    seconds: float

    @property
    def failures(self) -> tuple[Row, ...]:
        """The ops that fail, the gravest first."""
        return tuple(row for row in self.rows if row.failure is not None)

    @property
    def safe(self) -> tuple[str, ...]:
        """Candidates that are within the tolerance with everything lowered, in the order they were given."""
        return tuple(name for name, c in self.candidates.items() if c.safe and not c.illegal)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; what is infinite is the text "inf"."""
        tree = asdict(self)
        tree["safe"] = list(self.safe)
        tree["failures"] = len(self.failures)
        return plain(tree)

    def __str__(self) -> str:
        lines = [self.verdict, "", *_table(self)]
        for row in self.failures[:10]:
            lines.append(f"  {row.candidate} {row.failure}: {where(row.location)} {row.op} ({row.phase}): {row.why}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def where(place: Place | None) -> str:
    """Return a line as people write it: `texture.py:31`."""
    return f"{os.path.basename(place.file)}:{place.line}" if place is not None and place.file else "(built in)"


def percent(value: float) -> str:
    """Return a relative error as text.

    >>> percent(0.0123), percent(6.6), percent(float("inf"))
    ('1.2 %', '660 %', 'not finite')
    """
    if not math.isfinite(value):
        return "not finite"
    return f"{value * 100:.2g} %" if value < 0.1 else f"{value * 100:,.0f} %"


def _table(report: FunctionReport) -> list[str]:
    """Return a line for each output: its error in fp32, and in each candidate lowered and as advised."""
    heads = ["output", "fp32"]
    columns = [[e.name for e in report.fp32], [cell(e) for e in report.fp32]]
    for name, candidate in report.candidates.items():
        heads.append(name)
        columns.append([cell(e) for e in candidate.all_lowered.outputs])
        if candidate.lines and candidate.effect is not None:
            heads.append(f"{name} + {len(candidate.lines)} fp32 lines")
            columns.append([cell(e) for e in candidate.effect.outputs])
    count = len(report.fp32)
    filled = [[head, *(column or ["-"] * count)] for head, column in zip(heads, columns)]
    widths = [max(map(len, column)) for column in filled]
    return ["  " + "  ".join(column[i].ljust(w) for column, w in zip(filled, widths)).rstrip()
            for i in range(count + 1)]  # fmt: skip


def cell(error: OutputError) -> str:
    """Return an output's error in a word or two."""
    return f"{error.flipped}/{error.decisions} flipped" if error.decisions else percent(error.relative)
