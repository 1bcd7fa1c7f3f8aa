"""Why an update is not finite although the gradient is. What is not told here is asked of the forward's rules."""

from __future__ import annotations

from floatline.diagnose.causes.cause import Cause, Rule, argument, base, exact_largest, gone_over, limit_of, lost_eps
from floatline.observe.finite import Origin


def _rate(origin: Origin) -> Cause | None:
    wild = [name for name, v in origin.scalars.items() if isinstance(v, float) and (v != v or abs(v) == float("inf"))]
    if not wild:
        return None
    return Cause(
        name="hyperparameter",
        text=f"{wild[0]} of the optimizer's {origin.ran} is {origin.scalars[wild[0]]}",
        remedy="look at the learning rate and its schedule",
        untried="what it should be is not known",
    )


def _eps(origin: Origin) -> Cause | None:
    """Adam in fp16: sqrt(v) + 1e-8 is 0 where v is, and the update is 0/0 (optax#1754)."""
    below = argument(origin, "tensor2", "other")
    if base(origin.ran) not in ("addcdiv", "div") or below is None or not below.zeros:
        return None
    lost = lost_eps(origin.made_by.get(below.name))
    if lost is None:
        return None
    return Cause(
        name="optimizer eps underflow",
        text=f"{below.zeros} of the numbers that the update is divided by are 0: the optimizer's eps of {lost[0]:g} "
        f"is 0 in {below.dtype}, and where the second moment is 0 the update is 0/0",
        remedy=f"keep fp32 weights or master weights for the optimizer, or an eps that {below.dtype} can hold (1e-4)",
        untried="a larger eps is a choice of yours",
    )


def _overflow(origin: Origin) -> Cause | None:
    if not gone_over(origin) or not origin.outputs:
        return None
    out = origin.outputs[0]
    return Cause(
        name="optimizer overflow",
        text=f"{origin.ran} of the optimizer would be {exact_largest(origin):.4g}, and {out.dtype} ends at "
        f"{limit_of(out.dtype):.5g}",
        remedy="keep the optimizer's state in fp32 (master weights), clip the gradient, or lower the learning rate",
        untried="the format of the optimizer's state is a choice of yours",
    )


OPTIMIZER: tuple[Rule, ...] = (_rate, _eps, _overflow)
