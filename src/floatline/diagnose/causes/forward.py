"""The rules of the forward, in their order, and formats that end: fp16 at 65504."""

from __future__ import annotations

from floatline.diagnose.causes.cause import EXPONENTIALS, HALVES, Cause, Rule, exact_largest, first, gone_over, limit_of
from floatline.diagnose.causes.edges import EDGES, LOGARITHM
from floatline.diagnose.causes.masks import INFINITIES, LEFT, MASKS, MEMORY
from floatline.observe.finite import Origin
from floatline.observe.finite.meant import base


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
        what = "a cast of" if base(origin.ran) == "_to_copy" else f"{origin.ran} would be"
        text = f"{what} {true:.4g}, and {out.dtype} ends at {limit:.5g}"
    half = out.dtype in HALVES
    if not half:
        remedy = "bound the input (clamp, normalise), or work with logarithms (logsumexp, softplus)"
    else:
        where = f"module {origin.spot.module}" if origin.spot.module else "line"
        remedy = f"compute this {where} in fp32 (an island), use bf16, or scale its weights or inputs down"
    return Cause(name="overflow", text=text, remedy=remedy, cures=("island", "wide") if half else (),
                 untried="" if half else "no wider format to compute in")  # fmt: skip


FORWARD: tuple[Rule, ...] = (
    *MEMORY, *MASKS, _exponential, _overflow, *LOGARITHM, *LEFT, *EDGES, *INFINITIES,
)  # fmt: skip
