"""The table of causes: what an op did to its numbers, why that is not finite, and what to change.

Each rule looks at an origin and gives a cause or nothing; the first that gives one has it, so the special ones come
first. Facts behind the rules: shared knowledge of the field (fp16 ends at 65504, Adam's eps of 1e-8 is 0 in fp16, the
derivative of sqrt at 0 is infinite) and public issues (pytorch#41508 masked rows, pytorch#16317 where over a bad
branch, transformers#27114 two masks added).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from floatline.observe.finite import Made, Numbers, Origin
from floatline.observe.finite.origins import Kind


@dataclass(frozen=True, kw_only=True)
class Cause:
    """Why an op's result is not finite.

    Attributes:
        name: Short, of the table.
        text: With the numbers.
        remedy: What to change.
        cures: What can be tried on a replay: "island", "edge", "row", "attention"; in the order in which to try.
        untried: Why nothing can be tried; "" where something can.
    """

    name: str
    text: str
    remedy: str
    cures: tuple[str, ...] = ()
    untried: str = ""


Rule = Callable[[Origin], Cause | None]

SOFTMAX = frozenset({"_softmax", "_safe_softmax", "softmax", "_log_softmax", "log_softmax", "logsumexp"})
ATTENTION = frozenset({"_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
                       "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
                       "_scaled_dot_product_attention_math", "_scaled_dot_product_fused_attention_overrideable",
                       "_scaled_dot_product_attention_math_for_mps"})  # fmt: skip
LOGS = {"log": 0.0, "log2": 0.0, "log10": 0.0, "log1p": -1.0, "log_": 0.0, "log1p_": -1.0, "xlogy": 0.0}
DIVISIONS = frozenset({"div", "div_", "divide", "true_divide", "reciprocal", "reciprocal_", "rsqrt", "rsqrt_", "addcdiv",
                       "addcdiv_", "remainder", "fmod", "floor_divide"})  # fmt: skip
ROOTS = frozenset({"sqrt", "sqrt_"})
ARCS = {"acos": "[-1, 1]", "asin": "[-1, 1]", "atanh": "(-1, 1)", "acosh": "[1, inf)", "erfinv": "(-1, 1)",
        "logit": "(0, 1)", "special_logit": "(0, 1)", "arccos": "[-1, 1]", "arcsin": "[-1, 1]"}  # fmt: skip
EXPONENTIALS = frozenset({"exp", "exp_", "exp2", "expm1", "sinh", "cosh"})
NORMS = frozenset({"linalg_vector_norm", "norm", "_weight_norm_interface", "cdist", "_cdist_forward", "_euclidean_dist",
                   "pairwise_distance"})  # fmt: skip
SPREADS = frozenset({"var", "std", "var_mean", "std_mean"})
HALVES = ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
DOUBLE_WHERE = (
    "keep the bad values away from the op before it runs: x = torch.where(good, x, 1.0) and then "
    "torch.where(good, {op}(x), 0.0)"
)


def cause_of(origin: Origin) -> Cause:
    """Return the cause of an origin."""
    rules = {"backward": BACKWARD, "optimizer": OPTIMIZER}.get(origin.phase, FORWARD)
    for rule in rules:
        cause = rule(origin)
        if cause is not None:
            return cause
    return _unknown(origin)


def _argument(origin: Origin, *names: str) -> Numbers | None:
    by_name = {item.name: item for item in origin.inputs}
    return next((by_name[name] for name in names if name in by_name), None)


def _first(origin: Origin) -> Numbers | None:
    return origin.inputs[0] if origin.inputs else None


def limit_of(dtype: str) -> float | None:
    """Return the largest number of a format."""
    kind = getattr(torch, dtype, None)
    return float(torch.finfo(kind).max) if isinstance(kind, torch.dtype) and kind.is_floating_point else None


def eps_lost(made: Made | None) -> float | None:
    """Return the small constant that a sum or a lower bound had in it and that its format could not hold.

    A constant below half of the smallest number of a format is 0 in it; one below half an ulp of what it is added to
    is gone as well, but then the sum is not 0.
    """
    if made is None or made.spot.op.rstrip("_") not in ("add", "clamp", "clamp_min", "maximum", "sub", "rsub"):
        return None
    kind = getattr(torch, made.dtype, None)
    small = [abs(v) for v in made.scalars.values() if isinstance(v, float) and 0 < abs(v) < 1e-3]
    if not isinstance(kind, torch.dtype):
        return None
    return next((v for v in small if float(torch.tensor(v, dtype=kind)) == 0.0), None)


# Forward


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
    scores = _first(origin)
    if origin.ran not in SOFTMAX | ATTENTION or scores is None or not any(out.nan for out in origin.outputs):
        return None
    masked = scores.negative or (origin.ran in ATTENTION)
    if not masked or scores.nan:
        return None
    return Cause(
        name="fully masked row",
        text=f"{origin.ran} met a row in which every score is -inf: each weight is exp(-inf) / 0",
        remedy="leave one position of each row unmasked, or set the weights of such rows to 0 by torch.where",
        cures=("attention", "row") if origin.ran in ATTENTION else ("row",),
    )


def _two_masks(origin: Origin) -> Cause | None:
    if origin.ran.rstrip("_") not in ("add", "sub", "mul", "_to_copy") or not _gone_over(origin):
        return None
    for item in origin.inputs:
        lowest = -(limit_of("float32") or 0)
        mask = item.low is not None and item.low in (lowest, -(limit_of(item.dtype) or 0))
        if mask:
            return Cause(
                name="mask overflow",
                text=f"a mask filled with the lowest number of a format ({item.low:.4g}) becomes -inf in {origin.ran}",
                remedy="combine masks as booleans and fill once, with torch.finfo(dtype).min of the dtype that the "
                "scores have",
                cures=("island",),
            )
    return None


def _gone_over(origin: Origin) -> bool:
    """Say whether the op is finite in fp64: only the format was too small."""
    return bool(origin.exact) and not any(item.bad for item in origin.exact or ())


def _overflow(origin: Origin) -> Cause | None:
    if not origin.outputs or not _gone_over(origin):
        return None
    out = origin.outputs[0]
    limit = limit_of(out.dtype)
    true = max((item.largest or 0.0 for item in origin.exact or ()), default=0.0)
    if limit is None:
        return None
    if true <= limit:  # an intermediate sum went over
        text = f"{origin.ran} overflows on the way in {out.dtype}: the result itself, {true:.4g}, would fit"
    else:
        text = f"{origin.ran} would be {true:.4g}, and {out.dtype} ends at {limit:.5g}"
    if out.dtype == "float16":
        remedy = "compute this module in fp32 (an island), use bf16, or scale its weights or inputs down"
    elif out.dtype in HALVES:
        remedy = "compute this module in fp32 (an island)"
    else:
        remedy = "bound the input (clamp, normalise), or work with logarithms (logsumexp, softplus)"
    half = out.dtype in HALVES
    return Cause(
        name="overflow",
        text=text,
        remedy=remedy,
        cures=("island",) if half else (),
        untried="" if half else "no wider format to compute in",
    )


def _exponential(origin: Origin) -> Cause | None:
    first = _first(origin)
    if origin.ran not in EXPONENTIALS or first is None or first.bad:
        return None
    return Cause(
        name="exponential overflow",
        text=f"{origin.ran} of {first.high:.4g} is larger than any number of {first.dtype}",
        remedy="subtract the maximum first, or work with logarithms (logsumexp, softplus), or clamp the input",
        cures=("edge",),
    )


def _infinities(origin: Origin) -> Cause | None:
    """inf - inf and 0 * inf."""
    infinite = [item for item in origin.inputs if item.positive or item.negative]
    scalars = [v for v in origin.scalars.values() if isinstance(v, float) and abs(v) == float("inf")]
    if not any(out.nan for out in origin.outputs) or not (infinite or scalars):
        return None
    if origin.ran.rstrip("_") in ("mul", "mm", "bmm", "addmm", "matmul", "baddbmm", "dot", "mv"):
        return Cause(
            name="zero times infinity",
            text=f"{origin.ran} multiplies 0 by an infinity",
            remedy="choose instead of multiplying: masked_fill or torch.where",
            untried="what was meant is not known",
        )
    if origin.ran.rstrip("_") in ("add", "sub", "rsub", "sum", "mean", "cumsum", "logcumsumexp", "lerp", "addcmul"):
        return Cause(
            name="infinity minus infinity",
            text=f"{origin.ran} takes an infinity from an infinity",
            remedy="mask after the difference, or use a large finite number in the mask",
            untried="what was meant is not known",
        )
    return None


def _targets(origin: Origin) -> Cause | None:
    if "nll_loss" not in origin.ran and "cross_entropy" not in origin.ran:
        return None
    if any(out.nan for out in origin.outputs):
        return Cause(
            name="no target",
            text="every label is ignored, so the mean over targets is 0/0",
            remedy="leave such batches out, or divide the sum by max(count, 1)",
            cures=("sample",),
            untried="",
        )
    return Cause(
        name="masked target",
        text=f"{origin.ran} picks the log-probability of a class whose logit is -inf",
        remedy="do not mask the class that is the target, or ignore that target",
        untried="which of mask and target is wrong is not known",
    )


def _empty(origin: Origin) -> Cause | None:
    first = _first(origin)
    if first is not None and 0 in first.shape and origin.ran in ("mean", "sum", "div", "var", "std", "nanmean"):
        return Cause(
            name="mean of nothing",
            text=f"{origin.ran} over a tensor of shape {first.shape}: 0/0",
            remedy="leave empty selections out, or divide the sum by max(count, 1)",
            untried="what the mean of nothing should be is not known",
        )
    return None


def _logarithm(origin: Origin) -> Cause | None:
    name = origin.ran
    first = _argument(origin, "other") if name == "xlogy" else _first(origin)
    if name not in LOGS or first is None or first.low is None or first.low > LOGS[name]:
        return None
    lost = eps_lost(origin.made_by.get(first.name))
    if lost is not None and first.low == 0:
        return _lost_eps(origin, first, lost)
    edge = "0" if first.low == LOGS[name] else f"{first.low:.4g}"
    return Cause(
        name="log of zero" if first.low == LOGS[name] else "log of a negative number",
        text=f"{name} of {edge}",
        remedy=f"bound the input from below before {name} (clamp_min with an eps that {first.dtype} can hold), or use "
        "log_softmax, logsigmoid, xlogy",
        cures=("edge",),
    )


def _lost_eps(origin: Origin, item: Numbers, eps: float) -> Cause:
    smallest = float(torch.finfo(getattr(torch, item.dtype)).smallest_normal)
    return Cause(
        name="eps underflow",
        text=f"{origin.ran} of 0: the eps of {eps:g} that should prevent it is 0 in {item.dtype}",
        remedy=f"take an eps that {item.dtype} can hold (its smallest normal number is {smallest:.2g}), or compute "
        "this in fp32",
        cures=("island",),
        untried="" if item.dtype in HALVES else "a larger eps is a choice of yours",
    )


def _division(origin: Origin) -> Cause | None:
    if origin.ran not in DIVISIONS:
        return None
    below = _first(origin) if origin.ran.startswith(("rsqrt", "recip")) else _argument(origin, "other", "tensor2")
    scalar = origin.scalars.get("other")
    if below is None and scalar == 0:
        return _by_zero(origin, "the number it divides by is 0", ())
    if below is None:
        return None
    if origin.ran.startswith("rsqrt") and below.low is not None and below.low < 0:
        return _root_of_negative(origin, below)
    if not below.zeros:
        return None
    lost = eps_lost(origin.made_by.get(below.name))
    if lost is not None:
        return _lost_eps(origin, below, lost)
    return _by_zero(origin, f"{below.zeros} of the numbers it divides by are 0", ("edge",))


def _by_zero(origin: Origin, what: str, cures: tuple[str, ...]) -> Cause:
    above = _first(origin)
    both = above is not None and above.zeros and any(out.nan for out in origin.outputs)
    return Cause(
        name="division by zero",
        text=f"{origin.ran}: {what}" + (", and so are numbers above them (0/0)" if both else ""),
        remedy="divide by x.clamp_min(eps), by max(count, 1), or where the number is 0 not at all (torch.where on the "
        "divisor before the division)",
        cures=cures,
        untried="" if cures else "a larger eps is a choice of yours",
    )


def _root_of_negative(origin: Origin, item: Numbers) -> Cause:
    return Cause(
        name="root of a negative number",
        text=f"{origin.ran} of {item.low:.4g}",
        remedy="clamp_min(0) before it; a variance as E[x^2] - E[x]^2 rounds below 0, var() does not",
        cures=("edge",),
    )


def _root(origin: Origin) -> Cause | None:
    first = _first(origin)
    if origin.ran in ROOTS and first is not None and first.low is not None and first.low < 0:
        return _root_of_negative(origin, first)
    return None


def _power(origin: Origin) -> Cause | None:
    first = _first(origin)
    if not origin.ran.startswith(("pow", "float_power")) or first is None or first.low is None:
        return None
    exponent = origin.scalars.get("exponent")
    if (
        first.zeros
        and (not isinstance(exponent, (int, float)) or exponent < 0)
        and any(o.positive for o in origin.outputs)
    ):
        return _by_zero(
            origin, f"0 to the power {exponent if exponent is not None else 'of a negative number'}", ("edge",)
        )
    if first.low < 0:
        return Cause(
            name="power of a negative number",
            text=f"{origin.ran}: {first.low:.4g} to a power that is no whole number",
            remedy="take abs() or clamp_min(0) first",
            cures=("edge",),
        )
    return None


def _domain(origin: Origin) -> Cause | None:
    first = _first(origin)
    if origin.ran.rstrip("_") not in ARCS or first is None or first.low is None:
        return None
    return Cause(
        name="outside of the domain",
        text=f"{origin.ran} of numbers in [{first.low:.9g}, {first.high:.9g}]; it is defined on "
        f"{ARCS[origin.ran.rstrip('_')]}",
        remedy="clamp the input to just inside of the domain; rounding takes a cosine past 1",
        cures=("edge",),
    )


def _spread(origin: Origin) -> Cause | None:
    if origin.ran not in SPREADS:
        return None
    return Cause(
        name="spread of one value",
        text=f"{origin.ran} over one value divides by n - 1 = 0",
        remedy="use correction=0, or leave out groups of one",
        untried="which of the two is yours to choose",
    )


def _taken(origin: Origin) -> Cause | None:
    if origin.kind is not Kind.TAKEN:
        return None
    return Cause(
        name="masked value used",
        text=f"{origin.ran} takes in the infinities of a mask, and nothing finite is left",
        remedy="select what is not masked before it, or mask with 0 instead of an infinity",
        untried="what was meant is not known",
    )


def _unknown(origin: Origin) -> Cause:
    half = any(item.dtype in HALVES for item in (*origin.inputs, *origin.outputs))
    return Cause(
        name="unknown",
        text=f"{origin.ran} makes values that are not finite out of finite ones",
        remedy="look at its inputs below" + ("; try the module in fp32" if half else ""),
        cures=("island",) if half else (),
        untried="" if half else "the cause is not in the table",
    )


# Backward


def _gradient_overflow(origin: Origin) -> Cause | None:
    if not origin.outputs or not _gone_over(origin):
        return None
    out = origin.outputs[0]
    limit = limit_of(out.dtype)
    true = max((item.largest or 0.0 for item in origin.exact or ()), default=0.0)
    if limit is None or true <= limit:
        return None
    small = out.dtype in HALVES
    return Cause(
        name="gradient overflow",
        text=f"a gradient would be {true:.4g} in the backward of {origin.spot.op}, and {out.dtype} ends at {limit:.5g}",
        remedy="lower the loss scale, compute this module in fp32, or use bf16" if small else
        "normalise what the loss grows with; the gradient is too large for fp32",
        cures=("island",) if small else (),
        untried="" if small else "no wider format to compute in",
    )  # fmt: skip


def _edge(origin: Origin) -> Cause | None:
    """The forward was finite, or what was not finite in it was discarded; its derivative is not."""
    op = origin.spot.op
    base = op.rstrip("_")
    reasons = {
        **dict.fromkeys(ROOTS, "the derivative of sqrt at 0 is infinite"),
        **dict.fromkeys(NORMS, "the derivative of a norm at 0 is 0/0"),
        **dict.fromkeys(LOGS, "the derivative of log at 0 is infinite"),
        **dict.fromkeys(DIVISIONS, "the derivative of a division by 0 is infinite"),
        **dict.fromkeys(ARCS, f"the derivative of {base} at the end of its domain is infinite"),
        **dict.fromkeys(EXPONENTIALS, f"{base} overflowed in the forward, and its derivative is that number again"),
        **dict.fromkeys(SPREADS, "the derivative of a standard deviation at 0 is 0/0"),
        "pow": "the derivative of a power below 1 at 0 is infinite",
        "atan2": "the derivative of atan2 at (0, 0) is 0/0",
        "mul": "a factor was infinite in the forward",
        "prod": "the derivative of a product divides by its factors",
        "_fused_rms_norm": "all values are 0 and eps is too small",
        "native_layer_norm": "all values are equal and eps is too small",
    }
    if base not in reasons and op not in reasons:
        return None
    reason = reasons.get(op, reasons.get(base, ""))
    discarded = "; a 0 from torch.where or a mask does not help, for 0 times infinity is NaN"
    return Cause(
        name="derivative at the edge",
        text=f"{reason}{discarded}",
        remedy=DOUBLE_WHERE.format(op=base),
        cures=("edge",),
    )


def _own_backward(origin: Origin) -> Cause | None:
    if not origin.custom:
        return None
    inner = next((rule(origin) for rule in (_division, _logarithm, _root, _power, _overflow) if rule(origin)), None)
    why = inner.text if inner else f"{origin.ran} makes it out of finite numbers"
    return Cause(
        name="user-written backward",
        text=f"the backward of {origin.spot.op} is not finite: {why}",
        remedy="mend the formula in its backward; compare it with torch.autograd.gradcheck",
        untried="the formula is yours",
    )


# Optimizer


def _adam_eps(origin: Origin) -> Cause | None:
    below = _argument(origin, "tensor2", "other")
    if origin.ran.rstrip("_") not in ("addcdiv", "div", "_foreach_addcdiv", "_foreach_div") or below is None:
        return None
    if not below.zeros:
        return None
    return Cause(
        name="optimizer eps underflow",
        text=f"{below.zeros} of the numbers that the update is divided by are 0: in {below.dtype} the optimizer's eps is "
        "0, and where the second moment is 0 the update is 0/0",
        remedy=f"keep fp32 weights or master weights for the optimizer, or an eps that {below.dtype} can hold (1e-4)",
        untried="a larger eps is a choice of yours",
    )


def _moment_overflow(origin: Origin) -> Cause | None:
    if not _gone_over(origin) or not origin.outputs:
        return None
    out = origin.outputs[0]
    true = max((item.largest or 0.0 for item in origin.exact or ()), default=0.0)
    return Cause(
        name="optimizer overflow",
        text=f"{origin.ran} of the optimizer would be {true:.4g}, and {out.dtype} ends at {limit_of(out.dtype):.5g}",
        remedy="keep the optimizer's state in fp32 (master weights), or clip the gradient",
        untried="the format of the optimizer's state is a choice of yours",
    )


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


FORWARD: tuple[Rule, ...] = (
    _raw, _constant, _masked_row, _two_masks, _targets, _empty, _spread, _overflow, _exponential, _infinities, _logarithm,
    _division, _root, _power, _domain, _taken,
)  # fmt: skip
BACKWARD: tuple[Rule, ...] = (_own_backward, _gradient_overflow, _edge)
OPTIMIZER: tuple[Rule, ...] = (_rate, _adam_eps, _moment_overflow)
