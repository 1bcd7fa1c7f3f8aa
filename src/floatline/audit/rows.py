"""Turn readings into the report's rows: by op, by running average, by module."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from torch import nn

from floatline.audit.exact import Exact
from floatline.audit.judging import STALLED, Judged
from floatline.audit.lowered import Lowered
from floatline.audit.modules import callable_modules
from floatline.audit.report import ModuleRow, Row
from floatline.audit.tolerance import Effect
from floatline.audit.trials import inside
from floatline.observe.error import Reading


def rows_of(low: Lowered) -> list[Row]:
    """Return a row for each op, and one for each running average that stands still."""
    kept = _inside(low)
    rows = [op_row(low.name, reading, judged, kept=kept(reading.spot.module)) for reading, judged in low.judged]
    return rows + [
        Row(
            candidate=low.name,
            module=name.rpartition(".")[0],
            op=name.rpartition(".")[2],
            ran="",
            phase="buffer",
            location=None,
            failure="stagnation",
            severity=share / STALLED,
            why=f"{share * 100:.2g} % of the running average `{name}` keep their bits though they should move",
            measure=None,
            stalled=share,
            kept=kept(name.rpartition(".")[0]),
        )
        for name, share in low.stalled_buffers.items()
    ]


def op_row(candidate: str, reading: Reading, judged: Judged, *, kept: bool) -> Row:
    """Return the row of one op; `kept` says whether the candidate's policy has it in fp32."""
    return Row(
        candidate=candidate,
        module=reading.spot.module,
        op=reading.spot.op,
        ran=reading.ran,
        phase=reading.phase,
        location=reading.spot.user,
        failure=judged.failure,
        severity=judged.severity,
        why=judged.why,
        measure=reading.measure,
        stalled=reading.stalled,
        flipped=reading.flipped,
        decisions=reading.decisions,
        calls=reading.calls,
        kept=kept,
    )


def module_rows(
    model: nn.Module,
    low: Lowered,
    alone: Mapping[str, Effect],
    exact: Exact,
    fp32: Effect,
    sure: Mapping[str, float],
) -> list[ModuleRow]:
    """Return a row for each module whose forward runs an op in the format, in the model's order.

    Args:
        model: Whose modules.
        low: Its audit.
        alone: Module -> effect of lowering only that.
        exact: For the parameters that fp32 computes well.
        fp32: Its own effect.
        sure: Island -> confidence.
    """
    by_module: dict[str, list[tuple[Reading, Judged]]] = defaultdict(list)
    for reading, judged in low.judged:
        by_module[reading.spot.module].append((reading, judged))
    kept = _inside(low)
    rows = []
    for name in ["", *callable_modules(model)]:
        if name not in by_module:
            continue
        effect = alone.get(name)
        rows.append(
            ModuleRow(
                candidate=low.name,
                module=name,
                failure=next((j.failure for _, j in by_module[name] if j.failure is not None), None),
                local=_worst(by_module[name], "forward"),
                local_backward=_worst(by_module[name], "backward"),
                reached=max((r.measure.reached for r, _ in by_module[name] if r.measure is not None), default=0.0),
                weight_gradient=_weight_gradient(name, low, exact),
                input_gradient=low.borders.input_gradients.get(name),
                headroom=min(
                    (r.measure.headroom for r, _ in by_module[name] if r.measure and r.measure.format == low.name),
                    default=math.inf,
                ),
                loss_change=effect.loss_error if effect is not None else None,
                gradient_change=effect.gradient_error if effect is not None else None,
                cost=low.costs.get(name, 1.0),
                kept=kept(name),
                confidence=sure.get(name),
            )
        )
    return rows


def _worst(pairs: Sequence[tuple[Reading, Judged]], phase: str) -> float:
    return max((r.measure.error for r, _ in pairs if r.phase == phase and r.measure and r.measure.sound), default=0.0)


def _weight_gradient(module: str, low: Lowered, exact: Exact) -> float | None:
    own = [error for name, error in low.gradient_errors.items()
           if name.rpartition(".")[0] == module and exact.sound(name)]  # fmt: skip
    return max(own, default=None)


def _inside(low: Lowered) -> Callable[[str], bool]:
    """Return what says whether a module is in fp32 under the policy."""
    islands, again = low.islands or frozenset(), low.lowered_again

    def kept(module: str) -> bool:
        return inside(module, islands) and not inside(module, again)

    return kept
