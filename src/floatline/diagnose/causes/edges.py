"""Why a function is not finite at the edge of its domain, and which eps should have kept it off."""

from __future__ import annotations

import torch

from floatline.diagnose.causes.cause import (
    ARCS,
    DIVISIONS,
    LOGS,
    NORMS,
    ROOTS,
    Cause,
    Rule,
    argument,
    first,
    gone_over,
    line_of,
    lost_eps,
    lost_gap,
)
from floatline.observe.finite import Made, Numbers, Origin
from floatline.observe.finite.meant import base

_LAYERS = frozenset({"native_layer_norm", "native_group_norm", "_fused_rms_norm", "native_batch_norm"})


def _logarithm(origin: Origin) -> Cause | None:
    name = base(origin.ran)
    item = argument(origin, "other") if name == "xlogy" else first(origin)
    if name not in LOGS or item is None or item.low is None or item.low > LOGS[name]:
        return None
    if item.low == LOGS[name]:
        lost = _lost(origin, item)
        if lost is not None:
            return lost
    edge = "0" if item.low == LOGS[name] else f"{item.low:.4g}"
    return Cause(
        name="log of zero" if item.low == LOGS[name] else "log of a negative number",
        text=f"{name} of {edge}",
        remedy=f"bound the input from below before {name} (clamp_min with an eps that {item.dtype} can hold), or use "
        "log_softmax, logsigmoid, xlogy",
        cures=("edge",),
    )


def _lost(origin: Origin, item: Numbers) -> Cause | None:
    """An eps or a bound that should have kept a number off 0, and that its format rounded away."""
    made = origin.made_by.get(item.name)
    eps, gap = lost_eps(made), lost_gap(made)
    if eps is not None:
        return _lost_eps(origin, *eps)
    return _lost_gap(origin, *gap) if gap is not None else None


def _lost_eps(origin: Origin, eps: float, step: Made) -> Cause:
    smallest = float(torch.finfo(getattr(torch, step.dtype)).smallest_normal)
    return Cause(
        name="eps underflow",
        text=f"{origin.ran} of 0: the eps of {eps:g} that should prevent it{line_of(step)} is 0 in {step.dtype}",
        remedy=f"take an eps that {step.dtype} can hold (its smallest normal number is {smallest:.2g}), or compute "
        "this in fp32",
        cures=("island", "edge"),
        line=step.spot.user,
    )


def _lost_gap(origin: Origin, bound: float, step: Made) -> Cause:
    spacing = float(torch.finfo(getattr(torch, step.dtype)).eps)
    return Cause(
        name="eps absorbed",
        text=f"{origin.ran} of 0: the bound of {bound:.9g}{line_of(step)} rounds to 1 in {step.dtype}, whose numbers "
        f"are {spacing:.2g} apart there",
        remedy=f"take a bound that {step.dtype} can hold (1 - {spacing:.2g}), or compute this in fp32, or use "
        "binary_cross_entropy_with_logits",
        cures=("island", "edge"),
        line=step.spot.user,
    )


def _division(origin: Origin) -> Cause | None:
    name = base(origin.ran)
    if name not in DIVISIONS:
        return None
    below = first(origin) if name in ("rsqrt", "reciprocal") else argument(origin, "other", "tensor2")
    if below is None and origin.scalars.get("other") == 0:
        return _by_zero(origin, "the number it divides by is 0")
    if below is None:
        return None
    if name == "rsqrt" and below.low is not None and below.low < 0:
        return _root_of_negative(origin, below)
    if not below.zeros:
        return None
    return _lost(origin, below) or _by_zero(origin, f"{below.zeros} of the numbers it divides by are 0")


def _by_zero(origin: Origin, what: str) -> Cause:
    above = first(origin)
    both = above is not None and above.zeros and any(out.nan for out in origin.outputs)
    return Cause(
        name="division by zero",
        text=f"{origin.ran}: {what}" + (", and so are numbers above them (0/0)" if both else ""),
        remedy="divide by x.clamp_min(eps), by max(count, 1), or where the number is 0 not at all (torch.where on the "
        "divisor before the division)",
        cures=("edge",),
    )


def _norm(origin: Origin) -> Cause | None:
    if origin.ran not in NORMS | _LAYERS or gone_over(origin):
        return None
    return _by_zero(origin, "what is normalised is 0 throughout, or all equal, and eps is 0")


def _root_of_negative(origin: Origin, item: Numbers) -> Cause:
    return Cause(
        name="root of a negative number",
        text=f"{origin.ran} of {item.low:.4g}",
        remedy="clamp_min(0) before it; a variance as E[x^2] - E[x]^2 rounds below 0, var() does not",
        cures=("edge",),
    )


def _root(origin: Origin) -> Cause | None:
    item = first(origin)
    if base(origin.ran) in ROOTS and item is not None and item.low is not None and item.low < 0:
        return _root_of_negative(origin, item)
    return None


def _power(origin: Origin) -> Cause | None:
    item = first(origin)
    if base(origin.ran) not in ("pow", "float_power") or item is None or item.low is None:
        return None
    power = origin.scalars.get("exponent")
    if item.zeros and (not isinstance(power, (int, float)) or power < 0) and any(o.positive for o in origin.outputs):
        lost = _lost(origin, item)
        return lost or _by_zero(origin, f"0 to the power {power if power is not None else 'of a negative number'}")
    if item.low < 0:
        return Cause(
            name="power of a negative number",
            text=f"{origin.ran}: {item.low:.4g} to a power that is no whole number",
            remedy="take abs() or clamp_min(0) first",
            cures=("edge",),
        )
    return None


def _domain(origin: Origin) -> Cause | None:
    item, name = first(origin), base(origin.ran)
    if name not in ARCS or item is None or item.low is None:
        return None
    return Cause(
        name="outside of the domain",
        text=f"{origin.ran} of numbers in [{item.low:.9g}, {item.high:.9g}]; it is defined on {ARCS[name]}",
        remedy="clamp the input to just inside of the domain; rounding takes a cosine past 1",
        cures=("edge",),
    )


LOGARITHM: tuple[Rule, ...] = (_logarithm,)
EDGES: tuple[Rule, ...] = (_division, _norm, _root, _power, _domain)
