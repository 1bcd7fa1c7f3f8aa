"""An audit as tables of text, for the terminal and for the page.

Errors are relative and shown in percent; against fp64, whatever the format. Long lists end with what was left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from floatline.audit.trials import merged
from floatline.report.audit_words import (
    bits_text,
    error_text,
    grouped,
    lost_text,
    place_text,
    ratio_text,
    share_text,
    short_op,
    some_of,
)
from floatline.report.plan_sections import Section
from floatline.report.units import number_text, percent_text, times

if TYPE_CHECKING:
    from floatline.audit.report import AuditReport, Candidate, Row
    from floatline.audit.tolerance import Effect
    from floatline.audit.update_report import UpdateReport, UpdateRow

TONES = {"safe": "good", "not on target": "warn", "not safe": "bad",
         "within": "good", "outside": "bad", "range": "bad", "rounding": "bad", "stagnation": "bad",
         "fp8 per tensor": "good", "fp8 per block only": "warn", "keep bf16": "info", "fp32": "info"}  # fmt: skip
"""Text of a cell -> how it looks."""
OPS, ISLANDS, UPDATES, FP8 = 14, 24, 10, 24
"""Rows shown of a table."""
TOGETHER = "none of its ops by itself; the step's error with it lowered is too large"


def state(candidate: Candidate) -> str:
    """Return a candidate's verdict in a word or three."""
    if candidate.policy is None:
        return "not safe"
    return "not on target" if candidate.illegal else "safe"


def sections(report: AuditReport, *, wide: bool = False) -> list[Section]:
    """Return all tables that have rows.

    Args:
        report: The audit.
        wide: There is room for more columns than a terminal has.
    """
    made = [
        candidates_section(report),
        *(islands_section(report, c) for c in report.candidates.values()),
        ops_section(report, wide=wide),
        *(front_section(report, c) for c in report.candidates.values()),
        *(updates_section(names, found) for names, found in distinct_updates(report.updates)),
        fp8_section(report),
    ]
    return [section for section in made if section.rows]


# Tables


def candidates_section(report: AuditReport) -> Section:
    """What each format does to the step, without rules and with its policy."""
    rows = []
    for candidate in report.candidates.values():
        plain = _effect(candidate.all_lowered, report)
        rows.append((candidate.base, "nothing", *plain, percent_text(candidate.noise.confidence),
                     "" if candidate.islands else state(candidate)))  # fmt: skip
        if candidate.islands and candidate.effect is not None:
            sure = candidate.noise_of_policy.confidence if candidate.noise_of_policy else None
            kept = times(len(candidate.islands), "module")
            rows.append(("", kept, *_effect(candidate.effect, report), percent_text(sure), state(candidate)))
    return Section(
        name="formats",
        title="What each format does to the step",
        headings=("format", "in fp32", "loss off", "gradient off", "worst tensor", "of allowed", "sure", "verdict"),
        rows=tuple(rows),
        numeric=frozenset({2, 3, 4, 5, 6}),
        hint="Relative to fp64; 'of allowed' is the worst of them, above 1 is outside of the tolerance.",
    )


def _effect(effect: Effect, report: AuditReport) -> tuple[str, str, str, str]:
    return (
        error_text(effect.loss_error),
        error_text(effect.gradient_error),
        error_text(effect.tensor_error),
        ratio_text(effect.ratio(report.tolerance)),
    )


def islands_section(report: AuditReport, candidate: Candidate) -> Section:
    """The modules that a candidate's policy keeps in fp32, and why."""
    sure = {row.module: row.confidence for row in report.modules if row.candidate == candidate.name}
    found = {name: gravest(report, candidate.name, name) for name in candidate.islands}
    groups = grouped(found, lambda name: (name, _failure(found[name]), place_text(found[name])))
    rows = []
    for label, names in groups[:ISLANDS]:
        row = max((found[name] for name in names), key=lambda r: r.severity if r else 0.0)
        known = [value for name in names if (value := sure.get(name)) is not None]
        why = f"{short_op(row.op)}, {row.phase}: {row.why}" if row else TOGETHER
        rows.append((label, _failure(row), why, place_text(row), percent_text(min(known, default=None))))
    if len(groups) > ISLANDS:
        rows.append((f"{len(groups) - ISLANDS} more", "", "", "", ""))
    return Section(
        name=f"islands-{candidate.name}",
        title=f"Kept in fp32 under {candidate.base}: {times(len(candidate.islands), 'module')}",
        headings=("module", "fails by", "why", "where", "sure"),
        rows=tuple(rows),
        numeric=frozenset({4}),
        hint=f"They have {percent_text(candidate.cost)} of the step's FLOPs.",
    )


def _failure(row: Row | None) -> str:
    return (row.failure or "") if row else "together"


def gravest(report: AuditReport, candidate: str, module: str) -> Row | None:
    """Return the gravest failing op of a module or of what is inside of it; None where none fails by itself."""
    own = (row for row in report.failures if row.candidate == candidate)
    return next((row for row in own if row.module == module or row.module.startswith(f"{module}.")), None)


def ops_section(report: AuditReport, *, wide: bool = False, most: int = OPS) -> Section:
    """The gravest ops; where none fails, those nearest to failing."""
    failing = report.failures
    groups = grouped(failing or report.rows[:200], _like)
    rows = [_op(label, group, wide) for label, group in groups[: most if failing else 5]]
    if failing and len(groups) > most:
        rows.append(("", f"{len(groups) - most} more", *[""] * (len(rows[0]) - 2)))
    headings = ("in", "op", "fails by", "error", "ulps", "fp32's", "bits left", "lost")
    return Section(
        name="ops",
        title=f"Ops that fail by themselves: {len(failing)}" if failing else "No op fails by itself; the nearest to it",
        headings=(*headings, "where", "why") if wide else headings,
        rows=tuple(rows),
        numeric=frozenset({3, 4, 5, 6, 7}),
        hint="On exact inputs, the worst of those alike. Rounding alone is 0.4 ulps; bits left to the format's end; "
        "lost: increments of a running sum, decisions that flip, or values flushed to zero.",
    )


def _op(label: str, rows: Sequence[Row], wide: bool) -> tuple[str, ...]:
    first = rows[0]
    more = (place_text(first), first.why) if wide else ()
    what = f"{label}: {short_op(first.op)}, {first.phase}"
    return first.candidate, what, first.failure or "no", *_numbers(rows), *more


def _like(row: Row) -> tuple[str, ...]:
    return row.module, row.candidate, row.op, row.phase, row.failure or "", place_text(row)


def _numbers(rows: Sequence[Row]) -> tuple[str, str, str, str, str]:
    found = [row.measure for row in rows if row.measure is not None]
    lost = next((text for text in map(lost_text, rows) if text), "")
    if not found:
        return "–", "–", "–", "–", lost
    error, ulps = max(m.error for m in found), max(m.ulps for m in found)
    return (
        error_text(error),
        number_text(ulps, 2),
        error_text(max(m.error_fp32 for m in found)),
        bits_text(min(m.headroom for m in found)),
        lost,
    )


def front_points(report: AuditReport, candidate: Candidate) -> list[tuple[float, float, tuple[str, ...]]]:
    """Return (share of FLOPs in fp32, error in units of what is allowed, islands), by ascending cost.

    Modules that fail by themselves are islands in every trial of the search; without them there is only the base.
    """
    shares = {row.module: row.cost for row in report.modules if row.candidate == candidate.name}
    failing = {row.module for row in report.failures if row.candidate == candidate.name and row.module in shares}
    fixed = merged(failing - {""})

    def point(islands: Iterable[str], error: float) -> tuple[float, float, tuple[str, ...]]:
        names = tuple(sorted(islands))
        return sum(shares.get(name, 0.0) for name in names), error, names

    points = [point((), candidate.all_lowered.ratio(report.tolerance))]
    points += [point(merged(fixed | trial.islands), trial.outcome.error) for trial in candidate.front]
    if candidate.effect is not None:
        points.append(point(candidate.islands, candidate.effect.ratio(report.tolerance)))
    distinct = {p[2]: p for p in points}
    return sorted(distinct.values(), key=lambda p: (p[0], -p[1]))


def front_section(report: AuditReport, candidate: Candidate) -> Section:
    """The trials that no other beats in cost and error."""
    points = front_points(report, candidate)
    rows = [(percent_text(share) if share else "0", str(len(names)), some_of(names),
             ratio_text(error), "within" if error <= 1 else "outside")
            for share, error, names in points]  # fmt: skip
    return Section(
        name=f"front-{candidate.name}",
        title=f"Cost against error under {candidate.base}",
        headings=("FLOPs in fp32", "islands", "which", "of allowed", "tolerance"),
        rows=tuple(rows) if len(rows) > 1 else (),
        numeric=frozenset({0, 1, 3}),
        hint=f"The Pareto front of {times(len(candidate.trials), 'joint trial')}.",
    )


def distinct_updates(updates: Mapping[str, UpdateReport]) -> list[tuple[str, UpdateReport]]:
    """Return the reports on updates that differ, each with the candidates that it is of."""
    found: dict[tuple[str, bool], tuple[list[str], UpdateReport]] = {}
    for name, report in updates.items():
        found.setdefault((report.weights, report.master), ([], report))[0].append(name)
    return [(" and ".join(names), report) for names, report in found.values()]


def updates_section(names: str, report: UpdateReport, most: int = UPDATES) -> Section:
    """Which optimizer updates are lost; where none is, those that get the least far."""
    failing = [row for row in report.rows if row.found]
    ranked = sorted(failing or report.rows, key=lambda row: _progress(row.weights.progress))
    groups = grouped(ranked, lambda row: (row.name, *row.found))
    rows = [_update(label, group) for label, group in groups[: most if failing else 3]]
    if failing and len(groups) > most:
        rows.append((f"{len(groups) - most} more", "", "", "", "", ""))
    on = f"{report.weights} weights" + (" with an fp32 master" if report.master else "")
    return Section(
        name=f"updates-{report.weights}",
        title=f"Optimizer updates lost on {on} ({names}): {len(failing)} of {times(len(report.rows), 'parameter')}",
        headings=("parameter", "lr", "swallowed", "of the way", "2nd moment", "fails by"),
        rows=tuple(rows),
        numeric=frozenset({1, 2, 3, 4}),
        hint=f"{report.steps} updates beside fp64. Swallowed: updates that leave the weight's bits alone; of the way: "
        "how far the weights got, and their second moments.",
    )


def _progress(value: float | None) -> float:
    return math.inf if value is None else value


def _update(label: str, rows: Sequence[UpdateRow]) -> tuple[str, ...]:
    worst = min(rows, key=lambda row: _progress(row.weights.progress))
    moments = [row.second_moment.progress for row in rows if row.second_moment is not None]
    known = [moment for moment in moments if moment is not None]
    return (
        label,
        "–" if worst.lr is None else f"{worst.lr:g}",
        share_text(worst.weights.swallowed),
        share_text(worst.weights.progress),
        share_text(min(known, default=None)),
        ", ".join(worst.found),
    )


def fp8_section(report: AuditReport, most: int = FP8) -> Section:
    """What fp8 would do to each linear layer, the largest ones first."""
    found = sorted(report.fp8, key=lambda row: -row.flops_share)
    groups = grouped(found, lambda row: (row.name, row.verdict, ""))
    rows = []
    for label, group in groups[:most]:
        worst = max(group, key=lambda row: row.excess("tensor")[0])
        rows.append((label, percent_text(sum(row.flops_share for row in group)), worst.verdict, worst.reason))
    if len(groups) > most:
        rows.append((f"{len(groups) - most} more", "", "", ""))
    share = sum(row.flops_share for row in found if row.verdict == "fp8 per tensor")
    return Section(
        name="fp8",
        title="Linear layers in fp8",
        headings=("layer", "FLOPs", "verdict", "why"),
        rows=tuple(rows),
        numeric=frozenset({1}),
        hint=f"{percent_text(share)} of the linear layers' FLOPs could be fp8 with a scale a tensor. By size and place "
        f"as well: {report.fp8_policy}",
    )
