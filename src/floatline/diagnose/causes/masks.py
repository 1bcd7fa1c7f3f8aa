"""Why a mask, an empty selection or unwritten memory gives what is not finite."""

from __future__ import annotations

from floatline.diagnose.causes.cause import (
    ATTENTION,
    SOFTMAX,
    SPREADS,
    Cause,
    Rule,
    argument,
    first,
    gone_over,
    limit_of,
)
from floatline.observe.finite import Kind, Origin
from floatline.observe.finite.meant import base


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
                untried="how masks are combined is in the program's hands",
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


def _alignment(origin: Origin) -> Cause | None:
    if "ctc_loss" not in origin.ran or any(item.bad for item in origin.inputs):
        return None
    return Cause(
        name="impossible alignment",
        text=f"{origin.ran}: a target is longer than its input (repeated labels need a blank between them): log of 0",
        remedy="leave such samples out, or zero_infinity=True",
        untried="which samples to leave out is yours to choose",
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
    if any(abs(value) == float("inf") for value in origin.scalars.values() if isinstance(value, float)):
        return Cause(
            name="infinite constant",
            text=f"{origin.ran} was given an infinity as a number, and it reaches the loss",
            remedy="look where that number comes from; of a mask, select what is not masked before it is used",
            untried="what it should be is not known",
        )
    return Cause(
        name="masked value used",
        text=f"{origin.ran} takes in the infinities of a mask, and they reach the loss",
        remedy="select what is not masked before it, or mask with 0 instead of an infinity",
        untried="what was meant is not known",
    )


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


MEMORY: tuple[Rule, ...] = (_raw, _constant)
MASKS: tuple[Rule, ...] = (_masked_row, _two_masks, _targets, _alignment, _empty, _spread)
LEFT: tuple[Rule, ...] = (_taken,)
INFINITIES: tuple[Rule, ...] = (_infinities,)
