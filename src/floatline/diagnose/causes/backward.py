"""Why a derivative is not finite although the forward was, or although what was not finite in it was discarded.

sqrt(x) at 0: 1 / (2 sqrt(0)) is infinite, and `where` or a mask behind it gives 0 times infinity: NaN (pytorch#16317)
"""

from __future__ import annotations

from floatline.diagnose.causes.cause import (
    ARCS,
    DIVISIONS,
    EXPONENTIALS,
    HALVES,
    LOGS,
    NORMS,
    ROOTS,
    SPREADS,
    Cause,
    Rule,
    base,
    exact_largest,
    gone_over,
    limit_of,
)
from floatline.diagnose.causes.forward import FORWARD
from floatline.observe.finite import Origin

_REASONS = {
    **dict.fromkeys(ROOTS, "the derivative of {op} at 0 is infinite"),
    **dict.fromkeys(NORMS, "the derivative of a norm at 0 is 0/0"),
    **dict.fromkeys(LOGS, "the derivative of {op} at 0 is infinite"),
    **dict.fromkeys(DIVISIONS, "the derivative of a division by 0 is infinite"),
    **dict.fromkeys(ARCS, "the derivative of {op} at the end of its domain is infinite"),
    **dict.fromkeys(EXPONENTIALS, "{op} overflowed in the forward, and its derivative is that number again"),
    **dict.fromkeys(SPREADS, "the derivative of a standard deviation at 0 is 0/0"),
    "pow": "the derivative of a power below 1 at 0 is infinite",
    "atan2": "the derivative of atan2 at (0, 0) is 0/0",
    "prod": "the derivative of a product divides by its factors",
    "hypot": "the derivative of hypot at (0, 0) is 0/0",
    "special_entr": "the derivative of x log x at 0 is infinite",
    "sgn": "the derivative of a complex sign at 0 is 0/0",
    "abs": "the derivative of a complex magnitude at 0 is 0/0",
    "_fused_rms_norm": "all values are 0 and eps is 0 in this format",
    "native_layer_norm": "all values are equal and eps is 0 in this format",
    "native_group_norm": "all values are equal and eps is 0 in this format",
    "native_batch_norm": "all values are equal and eps is 0 in this format",
    "linalg_svd": "the derivative of singular vectors divides by the gaps between singular values, and some are equal",
    "_linalg_svd": "the derivative of singular vectors divides by the gaps between singular values, and some are equal",
    "_linalg_eigh": "the derivative of eigenvectors divides by the gaps between eigenvalues, and some are equal",
}


def _user_written(origin: Origin) -> Cause | None:
    if not origin.custom:
        return None
    inner = next((cause for rule in FORWARD if (cause := rule(origin)) is not None), None)
    why = inner.text if inner else f"{origin.ran} makes it out of finite numbers"
    return Cause(
        name="user-written backward",
        text=f"the backward of {origin.spot.op} is not finite: {why}",
        remedy="mend the formula in its backward; compare it with torch.autograd.gradcheck",
        untried="the formula is yours",
    )


def _discarded(origin: Origin) -> Cause | None:
    """The op's own result was not finite in the forward, and is a factor of its derivative."""
    result = next((item for item in origin.saved if item.name.startswith("result") and item.bad), None)
    if result is None:
        return None
    default = "the result of {op} was not finite and was discarded in the forward"
    return _at_the_edge(origin, _REASONS.get(base(origin.spot.op), default).format(op=origin.spot.op))


def _overflow(origin: Origin) -> Cause | None:
    if not origin.outputs or not gone_over(origin):
        return None
    out, true = origin.outputs[0], exact_largest(origin)
    limit = limit_of(out.dtype)
    if limit is None or true <= limit:
        return None
    small = out.dtype in HALVES
    return Cause(
        name="gradient overflow",
        text=f"a gradient would be {true:.4g} in the backward of {origin.spot.op}, and {out.dtype} ends at {limit:.5g}",
        remedy="lower the loss scale, compute this module in fp32, or use bf16" if small else
        "normalise what the loss grows with; the gradient is too large for fp32",
        cures=("scale", "island") if small else (),
        untried="" if small else "no wider format to compute in",
    )  # fmt: skip


def _edge(origin: Origin) -> Cause | None:
    op = origin.spot.op
    reason = _REASONS.get(base(op), _REASONS.get(op))
    return _at_the_edge(origin, reason.format(op=base(op))) if reason is not None else None


def _zero_times_infinity(origin: Origin) -> Cause | None:
    """A product whose other factor was infinite on purpose: the gradient of the first is 0 times that."""
    infinite = [item for item in (*origin.saved, *origin.inputs) if item.positive or item.negative]
    if not infinite or base(origin.spot.op) not in (
        "mul",
        "mm",
        "bmm",
        "addmm",
        "matmul",
        "baddbmm",
        "addcmul",
        "dot",
        "mv",
    ):
        return None
    return Cause(
        name="zero times infinity",
        text=f"a factor of {origin.spot.op} was infinite; the gradient of the other one multiplies it by 0",
        remedy="mask after the product, or put 0 in the place of the infinity before it (torch.where)",
        cures=("edge",),
    )


def _at_the_edge(origin: Origin, reason: str) -> Cause:
    op = base(origin.spot.op).removeprefix("_")
    return Cause(
        name="derivative at the edge",
        text=f"{reason}; a 0 from torch.where or a mask does not help, for 0 times infinity is NaN",
        remedy=f"keep the bad values away from {op} before it runs: x = torch.where(good, x, 1.0), and "
        f"then torch.where(good, {op}(x), 0.0)",
        cures=("edge",),
    )


BACKWARD: tuple[Rule, ...] = (_user_written, _discarded, _overflow, _edge, _zero_times_infinity)
