"""What a person is told of a plan, as plain values: sentences, tables, lists. The text and the page show the same.

The figure to hold against a card is what the run needs: what the allocator holds, and the CUDA context. Short of memory
the allocator gives back what lies idle, so where it would like more than the card has, `needs` is less than its peak.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from floatline.report.units import DASH, bytes_text, count_text, percent_text, seconds_text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from floatline.plan.command import PlanReport
    from floatline.plan.estimate import Estimate
    from floatline.plan.fit import Fit
    from floatline.plan.plan import Plan
    from floatline.plan.side_by_side import Comparison, Row

TONES = {"fits": "good", "tight": "warn", "does not fit": "bad", "cannot run": "bad"}
"""Verdict -> how it looks."""
_SIZES = {"batch": "samples a micro-batch", "seq": "tokens a sample", "image": "pixels a side of an image"}
_LIMITS = {
    "memory": "the next size up does not fit",
    "model": "the model takes no larger one",
    "tried": "the largest that was tried",
}


@dataclass(frozen=True, kw_only=True)
class Section:
    """One table.

    Attributes:
        name: Short, for links.
        title: Above it.
        headings: Of the columns.
        rows: Texts.
        numeric: Places of columns that are set flush right.
        hint: A sentence below the title; may be empty.
    """

    name: str
    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: frozenset[int] = field(default_factory=frozenset)
    hint: str = ""


def headline(report: PlanReport) -> str:
    """Return the answer as one sentence."""
    fit = report.estimate.fit
    where = f"{bytes_text(fit.needed)} of {bytes_text(fit.capacity)} on {report.hardware.name}"
    return f"{report.source.name} needs {where}: {report.estimate.verdict}, {_room(fit)}."


def _room(fit: Fit) -> str:
    if fit.margin < 0:
        return f"{bytes_text(-fit.margin)} too much"
    spare = f"{bytes_text(fit.margin)} spare"
    return spare if fit else f"{spare}, {bytes_text(fit.reserve)} of it kept for surprises"


def odds(report: PlanReport) -> str:
    """Return how sure the answer is."""
    fit = report.estimate.fit
    low, high = fit.band
    return (
        f"The true peak lies between {bytes_text(low)} and {bytes_text(high)} nine times in ten; the chance that it "
        f"leaves the reserve of {bytes_text(fit.reserve)} free is {_chance(fit.chance)}."
    )


def _chance(chance: float) -> str:
    return "over 99.9 %" if chance > 0.999 else "under 0.1 %" if chance < 0.001 else percent_text(chance)


def about_model(report: PlanReport | Comparison) -> str:
    """Return the model and the batch as one sentence."""
    source = report.source
    count = _parameters(report)
    about = [source.task or source.kind, f"{count_text(count)} parameters" if count else ""]
    facts = ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in source.facts.items())
    shape = f": {source.shape}" if str(source.shape) else ""
    return (
        f"{source.name} ({', '.join(part for part in about if part)}){shape}{f' ({facts} a sample)' if facts else ''}"
    )


def _parameters(report: Any) -> int | None:
    plans = [report.plan] if hasattr(report, "plan") else [row.plan for row in report.rows]
    known = next((plan.probe.parameters for plan in plans if plan is not None), None)
    return known or report.source.parameters


def about_plan(report: PlanReport) -> str:
    """Return precision, techniques and time as one sentence."""
    estimate, plan = report.estimate, report.plan
    if plan is None:
        return f"In {estimate.precision}; about {seconds_text(estimate.time.seconds)} a forward by a roofline."
    with_what = ", ".join(plan.techniques) or "no technique"
    cost = f", {_times(estimate, plan)} of the plain step's" if plan.techniques else ""
    return (
        f"In {plan.precision} with {with_what}; about {seconds_text(estimate.time.seconds)} an update by a "
        f"roofline{cost}."
    )


def _times(estimate: Estimate, plan: Plan) -> str:
    return f"×{estimate.time.seconds / plan.ladder[0].estimate.time.seconds:.2f}"


def sections(report: PlanReport) -> list[Section]:
    """Return the tables of a plan in reading order; empty ones are left out."""
    made = [_components(report.table), *_of_plan(report), _at_peak(report.estimate), _held(report.estimate),
            _largest(report), _choices(report)]  # fmt: skip
    return [section for section in made if section.rows]


def _of_plan(report: PlanReport) -> list[Section]:
    plan = report.plan
    return [] if plan is None else [_ladder(plan), _advice(plan), _rejected(plan)]


def _components(table: Mapping[tuple[str, str], Estimate]) -> Section:
    from floatline.plan.table import components

    found = list(table.values())
    parts = [components(estimate) for estimate in found]
    rows = [(name, *(_mib(part[name]) for part in parts)) for name in (parts[0] if parts else ())]
    rows = [row for row in rows if any(cell != DASH for cell in row[1:])]
    rows.append(("in all", *(bytes_text(estimate.peak_total) for estimate in found)))
    if any(estimate.fit.needed != estimate.peak_total for estimate in found):
        rows.append(("needs, at least", *(bytes_text(estimate.fit.needed) for estimate in found)))
    rows.append(("verdict", *(estimate.verdict for estimate in found)))
    names = (f"{mode.replace('train', 'training')}, {precision}" for mode, precision in table)
    return Section(
        name="components",
        title="Memory by component at the peak, without techniques",
        headings=("component", *names),
        rows=tuple(rows) if found else (),
        numeric=frozenset(range(1, len(found) + 1)),
    )


def _mib(nbytes: int) -> str:
    return bytes_text(nbytes) if nbytes else DASH


def _ladder(plan: Plan) -> Section:
    rows, below, fitted = [], plan.ladder[0].estimate, False
    for rung in plan.ladder:
        found = rung.estimate
        marks = [] if rung.kept else ["saves too little: left out again"]
        if found.fit and not fitted:
            marks, fitted = ["first fit"], True
        saved = below.fit.needed - found.fit.needed
        step = f"+\u00a0{rung.added}" if rung.added else "plain step" + _fixed(plan)
        rows.append((step, bytes_text(found.fit.needed),
                     _signed(saved) if rung.added else "", f"×{rung.slowdown:.2f}", found.verdict,
                     ", ".join(marks)))  # fmt: skip
        below = found if rung.kept else below
    if sorted(plan.estimate.techniques) != sorted(below.techniques):
        named = ", ".join(plan.techniques) or "nothing"
        rows.append((f"the plan: {named}", bytes_text(plan.estimate.fit.needed), "", _times(plan.estimate, plan),
                     plan.verdict, "what is not needed taken off"))  # fmt: skip
    return Section(
        name="ladder",
        title="The ladder, each technique added to those above it",
        headings=("step", "needs", "saved", "time", "verdict", ""),
        rows=tuple(rows),
        numeric=frozenset({1, 2, 3}),
    )


def _fixed(plan: Plan) -> str:
    fixed = plan.ladder[0].estimate.techniques
    return f" with {', '.join(fixed)}" if fixed else ""


def _signed(nbytes: int) -> str:
    return f"-{bytes_text(-nbytes)}" if nbytes < 0 else bytes_text(nbytes)


def _advice(plan: Plan) -> Section:
    rows = [(piece.text, ", ".join(piece.techniques) or DASH, bytes_text(piece.needed), bytes_text(piece.capacity))
            for piece in plan.advice]  # fmt: skip
    return Section(
        name="advice",
        title="What would fit",
        headings=("instead", "with", "needs", "of"),
        rows=tuple(rows),
        numeric=frozenset({2, 3}),
    )


def _rejected(plan: Plan) -> Section:
    by_reason: dict[str, list[str]] = {}
    for rejected in plan.rejected:
        by_reason.setdefault(rejected.reason, []).append(rejected.name)
    rows = tuple((", ".join(names), reason) for reason, names in by_reason.items())
    return Section(name="rejected", title="Not used, and why", headings=("technique", "reason"), rows=rows)


def _at_peak(estimate: Estimate) -> Section:
    by_size = sorted(estimate.categories.items(), key=lambda item: -item[1])
    total = sum(estimate.categories.values())
    return Section(
        name="peak",
        title="At the peak",
        headings=("what", "bytes", "share"),
        rows=tuple((name, bytes_text(nbytes), percent_text(nbytes / total)) for name, nbytes in by_size),
        numeric=frozenset({1, 2}),
        hint=f"It is reached {peak_place(estimate)}.",
    )


def peak_place(estimate: Estimate) -> str:
    """Return where the peak is: phase, op and module."""
    timeline = estimate.timeline
    return f"in the {timeline.phase}, by {timeline.op} of {timeline.module or 'the top of the model'}"


def _held(estimate: Estimate) -> Section:
    rows = [(module or "the top", op or DASH, category, bytes_text(nbytes))
            for module, op, category, nbytes in estimate.timeline.largest[:6]]  # fmt: skip
    return Section(
        name="held",
        title="Largest tensors at the peak",
        headings=("module", "made by", "what", "bytes"),
        rows=tuple(rows),
        numeric=frozenset({3}),
    )


def _largest(report: PlanReport) -> Section:
    rows = [
        (
            "samples a batch" if found.key == "batch" and report.plan is None else _SIZES.get(found.key, found.key),
            _value(found.value),
            bytes_text(found.needed),
            _LIMITS.get(found.limited_by, ""),
        )
        for found in report.largest
    ]
    return Section(
        name="largest",
        title="Largest that fits "
        + ("with this plan" if report.plan else "in inference")
        + ", one size raised at a time",
        headings=("size", "up to", "needs", "then"),
        rows=tuple(rows),
        numeric=frozenset({1, 2}),
    )


def _value(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _choices(report: PlanReport) -> Section:
    rows = [("precision", report.estimate.precision, report.precision_reason)]
    rows += [(choice.key, _value(choice.value), choice.reason) for choice in report.source.choices]
    return Section(name="choices", title="Chosen for you", headings=("key", "value", "reason"), rows=tuple(rows))


def notes(report: PlanReport) -> list[str]:
    """Return what a reader should know of the model, the device and the techniques."""
    said = [report.hardware.note, *report.source.notes, *report.estimate.notes]
    if report.estimate.peak_allocated > 1.01 * (report.estimate.timeline.peak_bytes + report.estimate.workspaces):
        said.append(
            f"tensors reach their peak of {bytes_text(report.estimate.peak_allocated)} before the update that is shown"
        )
    if report.estimate.host_peak:
        said.append(f"{bytes_text(report.estimate.host_peak)} of host memory are used as well")
    return list(dict.fromkeys(text for text in said if text))


def comparison_sentence(comparison: Comparison) -> str:
    """Return the answer for all GPUs as one sentence."""
    smallest = comparison.smallest
    if smallest is None or smallest.estimate is None:
        return f"{comparison.source.name} fits on no GPU of the catalog."
    if smallest.plan is None:
        where = f"from {smallest.hardware.name} on, there in {smallest.estimate.precision}"
        return f"Inference with {comparison.source.name} fits {where}."
    with_what = ", ".join(smallest.plan.techniques) or "no technique"
    return f"{comparison.source.name} fits from {smallest.hardware.name} on, there with {with_what}."


def comparison_section(comparison: Comparison) -> Section:
    """Return all GPUs as one table, by memory."""
    return Section(
        name="gpus",
        title="All GPUs",
        headings=("GPU", "memory", "precision", "plain step", "verdict", "needs", "with", _whole(comparison)),
        rows=tuple(_gpu(row) for row in comparison.rows),
        numeric=frozenset({1, 3, 5, 7}),
        hint="Techniques by name; plan for one GPU to see their settings. Times are a roofline model, for comparing.",
    )


def _whole(comparison: Comparison) -> str:
    """Return what the times are of."""
    modes = {row.estimate.mode for row in comparison.rows if row.estimate is not None}
    return "forward" if modes == {"inference"} else "update"


def _gpu(row: Row) -> tuple[str, ...]:
    memory = bytes_text(row.hardware.memory)
    found, plain = row.estimate, row.plain
    if found is None or plain is None:
        return (row.hardware.name, memory, DASH, DASH, "cannot run", DASH, row.refused, DASH)
    return (
        row.hardware.name,
        memory,
        found.precision,
        bytes_text(plain.fit.needed),
        found.verdict,
        bytes_text(found.fit.needed),
        ", ".join(text.partition("(")[0] for text in found.techniques) or DASH,
        seconds_text(found.time.seconds),
    )
