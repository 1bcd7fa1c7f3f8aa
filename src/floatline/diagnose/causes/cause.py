"""A cause, and what the rules of the table ask of an origin."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from floatline.observe.finite import Made, Numbers, Origin, Place
from floatline.observe.finite.meant import base


@dataclass(frozen=True, kw_only=True)
class Cause:
    """Why an op's result is not finite.

    Attributes:
        name: Short, of the table.
        text: With the numbers.
        remedy: What to change.
        cures: What can be tried on a replay, in the order in which to try; see cures.py.
        untried: Why nothing can be tried; "" where something can.
        line: The line to change where that is another one than the op's: where an eps is added.
    """

    name: str
    text: str
    remedy: str
    cures: tuple[str, ...] = ()
    untried: str = ""
    line: Place | None = None


Rule = Callable[[Origin], Cause | None]

SOFTMAX = frozenset({"_softmax", "_safe_softmax", "softmax", "_log_softmax", "log_softmax", "logsumexp"})
ATTENTION = frozenset({"_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
                       "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
                       "_scaled_dot_product_attention_math", "_scaled_dot_product_fused_attention_overrideable",
                       "_scaled_dot_product_attention_math_for_mps"})  # fmt: skip
LOGS = {"log": 0.0, "log2": 0.0, "log10": 0.0, "log1p": -1.0, "xlogy": 0.0, "special_xlog1py": -1.0}
"""Op -> the edge of its domain; in-place forms are looked up without their underscore."""
DIVISIONS = frozenset({"div", "divide", "true_divide", "reciprocal", "rsqrt", "addcdiv", "remainder", "fmod",
                       "floor_divide"})  # fmt: skip
ROOTS = frozenset({"sqrt"})
ARCS = {"acos": "[-1, 1]", "asin": "[-1, 1]", "atanh": "(-1, 1)", "acosh": "[1, inf)", "erfinv": "(-1, 1)",
        "logit": "(0, 1)", "special_logit": "(0, 1)", "special_ndtri": "(0, 1)"}  # fmt: skip
"""Op -> where it is defined."""
EXPONENTIALS = frozenset({"exp", "exp2", "expm1", "sinh", "cosh", "special_exp2"})
NORMS = frozenset({"linalg_vector_norm", "norm", "_weight_norm_interface", "cdist", "_cdist_forward", "_euclidean_dist",
                   "pairwise_distance"})  # fmt: skip
SPREADS = frozenset({"var", "std", "var_mean", "std_mean"})
HALVES = ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
_KEEPING_ZERO = frozenset({"sqrt", "mean", "sum", "mul", "div", "_to_copy", "expand", "pow", "linalg_vector_norm",
                           "abs", "neg", "rsub", "sub", "add", "clamp", "clamp_min", "clamp_max",
                           "sigmoid"})  # fmt: skip
"""Ops through which an eps that was lost, or a bound that was rounded away, can be followed back."""
_FAR = 5
"""How many ops back they are followed."""


def argument(origin: Origin, *names: str) -> Numbers | None:
    """Return the first of an origin's inputs that has one of these names."""
    by_name = {item.name: item for item in origin.inputs}
    return next((by_name[name] for name in names if name in by_name), None)


def first(origin: Origin) -> Numbers | None:
    """Return an origin's first input."""
    return origin.inputs[0] if origin.inputs else None


def limit_of(dtype: str) -> float | None:
    """Return the largest number of a format."""
    kind = getattr(torch, dtype, None)
    return float(torch.finfo(kind).max) if isinstance(kind, torch.dtype) and kind.is_floating_point else None


def gone_over(origin: Origin) -> bool:
    """Say whether the op is finite in fp64: only the format was too small."""
    return bool(origin.exact) and not any(item.bad for item in origin.exact or ())


def exact_largest(origin: Origin) -> float:
    """Return the largest magnitude that an op would have given in fp64."""
    return max((item.largest or 0.0 for item in origin.exact or ()), default=0.0)


def lost_eps(made: Made | None) -> tuple[float, Made] | None:
    """Return the small constant that a sum or a bound had in it and that its format could not hold, and where.

    A constant below half of the smallest number of a format is 0 in it.
    """
    for step in _before(made):
        if base(step.spot.op) not in ("add", "clamp", "clamp_min", "sub", "rsub", "maximum"):
            continue
        for value in _constants(step):
            if 0 < abs(value) < 1e-3 and _rounded(value, step.dtype) == 0.0:
                return value, step
    return None


def lost_gap(made: Made | None) -> tuple[float, Made] | None:
    """Return the constant just beside 1 (1 - 1e-6) that its format rounds to 1, and where."""
    for step in _before(made):
        for value in _constants(step):
            if value != 1.0 and abs(value - 1.0) < 1e-2 and _rounded(value, step.dtype) == 1.0:
                return value, step
    return None


def _before(made: Made | None) -> Iterator[Made]:
    """Yield the ops that lead to a tensor as far as a zero goes through them."""
    level: tuple[Made, ...] = (made,) if made is not None else ()
    for _ in range(_FAR):
        yield from level
        level = tuple(e for step in level if base(step.spot.op) in _KEEPING_ZERO for e in step.before)


def _constants(made: Made) -> list[float]:
    return [value for value in made.scalars.values() if isinstance(value, float)]


def _rounded(value: float, dtype: str) -> float | None:
    kind = getattr(torch, dtype, None)
    return float(torch.tensor(value, dtype=kind)) if isinstance(kind, torch.dtype) else None


def line_of(made: Made) -> str:
    """Return where an op stands, as " at file:line"; "" where that is not known."""
    return f" at {made.spot.user.file}:{made.spot.user.line}" if made.spot.user else ""
