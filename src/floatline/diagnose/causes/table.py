"""Ask the rules: those of the forward, of a derivative, of the optimizer."""

from __future__ import annotations

from floatline.diagnose.causes.backward import BACKWARD
from floatline.diagnose.causes.cause import HALVES, Cause, Rule
from floatline.diagnose.causes.forward import FORWARD
from floatline.diagnose.causes.optimizer import OPTIMIZER
from floatline.observe.finite import Origin


def cause_of(origin: Origin) -> Cause:
    """Return the cause of an origin; "unknown" where no rule knows it."""
    for rule in _rules(origin):
        cause = rule(origin)
        if cause is not None:
            return cause
    return _unknown(origin)


def _rules(origin: Origin) -> tuple[Rule, ...]:
    if origin.derivative:
        return BACKWARD
    return (*OPTIMIZER, *FORWARD) if origin.phase == "optimizer" else FORWARD


def _unknown(origin: Origin) -> Cause:
    half = any(item.dtype in HALVES for item in (*origin.inputs, *origin.outputs))
    where = f"the derivative of {origin.spot.op} ({origin.ran})" if origin.derivative else origin.ran
    return Cause(
        name="unknown",
        text=f"{where} makes values that are not finite out of finite ones",
        remedy="look at its inputs below" + ("; try the module in fp32" if half else ""),
        cures=("island",) if half else (),
        untried="" if half else "the cause is not in the table",
    )
