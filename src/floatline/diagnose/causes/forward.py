"""Why an op of the forward gives what is not finite: masks, eps that are lost, edges of domains, formats that end."""

from __future__ import annotations

import torch

from floatline.diagnose.causes.cause import (
    ARCS,
    ATTENTION,
    DIVISIONS,
    EXPONENTIALS,
    HALVES,
    LOGS,
    NORMS,
    ROOTS,
    SOFTMAX,
    SPREADS,
    Cause,
    Rule,
    argument,
    base,
    exact_largest,
    first,
    gone_over,
    limit_of,
    line_of,
    lost_eps,
    lost_gap,
)
from floatline.observe.finite import Made, Numbers, Origin
from floatline.observe.finite.origins import Kind

# Memory and constants


def _raw(origin: Origin) -> Cause | None:
    if origin.kind is not Kind.RAW:
        return None
    return Cause(
        name="uninitialised memory",
        text=f"{origin.ran} hands out memory that nobody has written before it was read",
        remedy="write it first: torch.zeros, or nn.init on a parameter",
        untried="what belongs there is not known",
    )


def _constant(origin: Origin) -> Cause | None:
    if any(isinstance(v, float) and v != v for v in origin.scalars.values()):
        return Cause(
            name="nan constant",
            text=f"{origin.ran} was given NaN as a number",
            remedy="look where that number comes from",
            untried="what it should be is not known",
        )
    return None


# Masks


def _masked_row(origin: Origin) -> Cause | None:
    scores = first(origin)
    if origin.ran not in SOFTMAX | ATTENTION or scores is None or not any(out.nan for out in origin.outputs):
        return None
    mask = argument(origin, "attn_mask", "attn_bias")
    masked = mask.negative if origin.ran in ATTENTION and mask is not None else scores.negative
    if not masked or scores.nan:
        return None
    return Cause(
        name="fully masked row",
        text=f"{origin.ran} met a row in which every score is -inf: each weight is exp(-inf) / 0",
        remedy="leave one position of each row unmasked, or set the weights of such rows to 0 by torch.where",
        cures=("attention", "row") if origin.ran in ATTENTION else ("row",),
    )


def _two_masks(origin: Origin) -> Cause | None:
    """finfo.min + finfo.min, or finfo(float32).min cast to fp16 (transformers#27114)."""
    if base(origin.ran) not in ("add", "sub", "mul", "_to_copy") or not gone_over(origin):
        return None
    for item in origin.inputs:
        lowest = -(limit_of("float32") or 0)
        if item.low is not None and item.low in (lowest, -(limit_of(item.dtype) or 0)):
            return Cause(
                name="mask overflow",
                text=f"a mask filled with the lowest number of a format ({item.low:.4g}) becomes -inf in {origin.ran}",
                remedy="combine masks as booleans and fill once, with torch.finfo(dtype).min of the dtype that the "
                "scores have",
                cures=("island",),
            )
    return None


def _targets(origin: Origin) -> Cause | None:
    if "nll_loss" not in origin.ran and "cross_entropy" not in origin.ran:
        return None
    if any(out.nan for out in origin.outputs) and not any(item.bad for item in origin.inputs):
        return Cause(
            name="no target",
            text="every label is ignored, so the mean over targets is 0/0",
            remedy="leave such batches out, or divide the sum by max(count, 1)",
            untried="the whole batch has no target: there is nothing to compute",
        )
    return Cause(
        name="masked target",
        text=f"{origin.ran} picks the log-probability of a class whose logit is -inf",
        remedy="do not mask the class that is the target, or ignore that target",
        untried="which of mask and target is wrong is not known",
    )


def _infinities(origin: Origin) -> Cause | None:
    """inf - inf and 0 * inf."""
    infinite = [item for item in origin.inputs if item.positive or item.negative]
    scalars = [v for v in origin.scalars.values() if isinstance(v, float) and abs(v) == float("inf")]
    if not any(out.nan for out in origin.outputs) or not (infinite or scalars):
        return None
    if base(origin.ran) in ("mul", "mm", "bmm", "addmm", "matmul", "baddbmm", "dot", "mv", "convolution", "prod"):
        return Cause(
            name="zero times infinity",
            text=f"{origin.ran} multiplies 0 by an infinity",
            remedy="choose instead of multiplying: masked_fill or torch.where",
            cures=("edge",),
        )
    if base(origin.ran) == "div":
        return Cause(
            name="infinity over infinity",
            text=f"{origin.ran} divides an infinity by an infinity",
            remedy="mask after the division, or use a large finite number in the mask",
            untried="what was meant is not known",
        )
    return Cause(
        name="infinity minus infinity",
        text=f"{origin.ran} takes an infinity from an infinity",
        remedy="mask after the difference, or use a large finite number in the mask",
        untried="what was meant is not known",
    )


def _taken(origin: Origin) -> Cause | None:
    if origin.kind not in (Kind.TAKEN, Kind.MEANT):
        return None
    return Cause(
        name="masked value used",
        text=f"{origin.ran} takes in the infinities of a mask, and they reach the loss",
        remedy="select what is not masked before it, or mask with 0 instead of an infinity",
        untried="what was meant is not known",
    )


# Nothing to average


def _empty(origin: Origin) -> Cause | None:
    item = first(origin)
    if item is not None and 0 in item.shape and base(origin.ran) in ("mean", "sum", "div", "var", "std", "nanmean"):
        return Cause(
            name="mean of nothing",
            text=f"{origin.ran} over a tensor of shape {item.shape}: 0/0",
            remedy="leave empty selections out, or divide the sum by max(count, 1)",
            untried="what the mean of nothing should be is not known",
        )
    return None


def _spread(origin: Origin) -> Cause | None:
    if origin.ran not in SPREADS or gone_over(origin):
        return None
    return Cause(
        name="spread of one value",
        text=f"{origin.ran} over one value divides by n - 1 = 0",
        remedy="use correction=0, or leave out groups of one",
        untried="which of the two is yours to choose",
    )


# Formats that end


def _exponential(origin: Origin) -> Cause | None:
    item = first(origin)
    if base(origin.ran) not in EXPONENTIALS or item is None or item.bad or item.high is None:
        return None
    return Cause(
        name="exponential overflow",
        text=f"{origin.ran} of {item.high:.4g} is larger than any number of {item.dtype}",
        remedy="subtract the maximum first, or work with logarithms (logsumexp, softplus), or clamp the input",
        cures=("island", "edge") if item.dtype in HALVES else ("edge",),
    )


def _overflow(origin: Origin) -> Cause | None:
    if not origin.outputs or not gone_over(origin):
        return None
    out = origin.outputs[0]
    limit, true = limit_of(out.dtype), exact_largest(origin)
    if limit is None:
        return None
    if true <= limit:  # an intermediate sum went over
        text = f"{origin.ran} overflows on the way in {out.dtype}: the result itself, {true:.4g}, would fit"
    else:
        text = f"{origin.ran} would be {true:.4g}, and {out.dtype} ends at {limit:.5g}"
    half = out.dtype in HALVES
    if not half:
        remedy = "bound the input (clamp, normalise), or work with logarithms (logsumexp, softplus)"
    else:
        where = f"module {origin.spot.module}" if origin.spot.module else "line"
        remedy = f"compute this {where} in fp32 (an island), use bf16, or scale its weights or inputs down"
    return Cause(name="overflow", text=text, remedy=remedy, cures=("island", "wide") if half else (),
                 untried="" if half else "no wider format to compute in")  # fmt: skip


# Edges of domains


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
    )


def _lost_gap(origin: Origin, bound: float, step: Made) -> Cause:
    spacing = float(torch.finfo(getattr(torch, step.dtype)).eps)
    return Cause(
        name="eps absorbed",
        text=f"{origin.ran} of 0: the bound of {bound:.9g}{line_of(step)} rounds to 1 in {step.dtype}, whose numbers are "
        f"{spacing:.2g} apart there",
        remedy=f"take a bound that {step.dtype} can hold (1 - {spacing:.2g}), or compute this in fp32, or use "
        "binary_cross_entropy_with_logits",
        cures=("island", "edge"),
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
    if origin.ran not in NORMS or gone_over(origin):
        return None
    return _by_zero(origin, "a row that is normalised is 0 throughout")


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


FORWARD: tuple[Rule, ...] = (
    _raw, _constant, _masked_row, _two_masks, _targets, _empty, _spread, _exponential, _overflow, _logarithm, _taken,
    _division, _norm, _root, _power, _domain, _infinities,
)  # fmt: skip
