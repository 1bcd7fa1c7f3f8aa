"""An audit as sentences and tables of text, for the terminal and for the page.

Errors are relative and shown in percent; against fp64, whatever the format. Long lists end with what was left out.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from floatline.audit.trials import merged
from floatline.report.plan_sections import Section
from floatline.report.units import number_text, percent_text, seconds_text, times

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
T = TypeVar("T")
TOGETHER = "none of its ops by itself; the step's error with it lowered is too large"


def error_text(value: float | None) -> str:
    """Return a relative error as people read it.

    >>> error_text(0.00123), error_text(2e-7), error_text(35.0), error_text(math.inf), error_text(0.0)
    ('0.12 %', '2e-07', '35 ×', 'not finite', '0')
    """
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    if value < 1e-5:
        return f"{value:.1g}"
    return f"{number_text(value * 100, 2)} %" if value < 10 else f"{number_text(value)} ×"


def ratio_text(ratio: float) -> str:
    """Return an error in units of what is allowed."""
    return number_text(ratio, 2) if math.isfinite(ratio) else "∞"


def share_text(share: float | None) -> str:
    """Return a share, without a minus in front of what rounds to nothing.

    >>> share_text(-0.0001), share_text(None), share_text(0.5)
    ('0.0 %', '–', '50.0 %')
    """
    return percent_text(share if share is None or abs(share) >= 5e-4 else 0.0)


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


def lists(report: AuditReport) -> list[tuple[str, list[str]]]:
    """Return titles and sentences."""
    advice = dict.fromkeys(a for candidate in report.candidates.values() for a in candidate.advice)
    return [("Advice", [_short(a) for a in advice]), ("Notes", list(report.notes))]


# What is alike in repeated layers is told once


def alike(name: str) -> str:
    """Return a module's name with a star for each number.

    >>> alike("model.layers.11.mlp")
    'model.layers.*.mlp'
    """
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name) or "top"


def grouped(items: Iterable[T], key: Callable[[T], tuple[str, ...]]) -> list[tuple[str, list[T]]]:
    """Return items that have the same key together, in the order of their first ones, each group with a label.

    Args:
        items: The gravest first.
        key: The name first, as it is; the rest keeps apart what is not alike.
    """
    groups: dict[tuple[str, ...], list[T]] = {}
    for item in items:
        name, *rest = key(item)
        groups.setdefault((alike(name), *rest), []).append(item)
    return [(_label(pattern, {key(item)[0] for item in group}), group) for (pattern, *_), group in groups.items()]


def _label(pattern: str, names: set[str]) -> str:
    """Return a group's name: that of its one member, or the pattern and how many there are."""
    return f"{pattern} ({len(names)})" if len(names) > 1 else next(iter(names)) or "top"


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


def short_op(op: str) -> str:
    """Return an op's name without what only tells its kernels apart.

    >>> short_op("_scaled_dot_product_flash_attention_for_cpu"), short_op("native_layer_norm"), short_op("_softmax")
    ('flash_attention', 'layer_norm', 'softmax')
    """
    return re.sub(r"^_?(native_|scaled_dot_product_)?|_for_cpu$", "", op)


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


def bits_text(bits: float) -> str:
    """Return headroom; a minus says that values lie beyond the format's end."""
    return f"{bits:.0f}" if math.isfinite(bits) and abs(bits) >= 10 else f"{bits:.1f}" if math.isfinite(bits) else "–"


def lost_text(row: Row) -> str:
    """Return what of a row's values or decisions is lost."""
    if row.stalled is not None:
        return percent_text(row.stalled)
    if row.flipped:
        return f"{row.flipped} of {row.decisions}"
    underflow = row.measure.underflow if row.measure else 0.0
    return percent_text(underflow) if underflow >= 5e-4 else ""


def place_text(row: Row | None) -> str:
    """Return the user's line, the file without its directories."""
    if row is None or row.location is None:
        return ""
    return f"{os.path.basename(row.location.file)}:{row.location.line}"


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
    rows = [(percent_text(share) if share else "0", str(len(names)), _some(names),
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


def _some(names: Sequence[str], most: int = 3) -> str:
    labels = [label for label, _ in grouped(names, lambda name: (name,))]
    rest = f" and {len(labels) - most} more" if len(labels) > most else ""
    return ", ".join(labels[:most]) + rest


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


def _short(sentence: str) -> str:
    """Return a sentence in which files are called by their last two names."""
    words = [os.sep.join(word.split(os.sep)[-2:]) if word.startswith(os.sep) else word for word in sentence.split(" ")]
    return " ".join(words)
