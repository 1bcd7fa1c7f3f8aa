"""What was measured of one linear layer in fp8, and the verdict on it.

An error is judged by what rounding to its formats has to cost (`expected_error` in fp8_rounding.py). Twice that is four
times the noise: one of e4m3's three bits of mantissa is lost, to a badly placed scale or to terms that cancel. Where
terms cancel, bf16 suffers alike, and the row says so.

    fp8 per tensor        all products within twice what is expected, with one scale a tensor
    fp8 per block only    not so, but with blocks of 128 (the row tells whether a scale a row is enough)
    keep bf16             not even that, or dims and kinds of layer that fp8 cannot multiply
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from floatline.audit.fp8_rounding import SCHEMES, OperandError, expected_error

PER_TENSOR, PER_BLOCK, KEEP = "fp8 per tensor", "fp8 per block only", "keep bf16"
POLICIES = {"tensor": "fp8-mixed", "row": "fp8-rowwise-mixed"}
"""Policies that train with a scaling, by torchao; it has no blocks of 128."""
EXCESS = 2.0
"""Times the expected error that is still good: four times the noise energy, 6 dB, which is one bit of mantissa."""


@dataclass(frozen=True, kw_only=True)
class ProductError:
    """Relative RMS error of one product.

    Attributes:
        total: Over all values.
        median: Of the rows' errors, each relative to its own row.
    """

    total: float
    median: float

    @property
    def worst(self) -> float:
        return max(self.total, self.median)


@dataclass(frozen=True, kw_only=True)
class Fp8Row:
    """What fp8 would do to one linear layer.

    Attributes:
        name: Dotted name.
        in_features: Values of an input.
        out_features: Values of an output.
        tokens: Rows of input, over all calls.
        flops: Of its products in forward and backward.
        flops_share: Of all linear layers' that ran.
        errors: "bf16", "tensor", "row", "block" -> product -> error; products that did not happen are missing.
        operands: (operand, format, scaling) -> what rounding did to it, over the last call. Operands are "input",
            "weight" and "gradient"; scaling "none" is a bare cast.
        kept: Why an fp8 policy keeps it high by itself, by scaling ("tensor", "row"); missing where it does not.
        impossible: Why fp8 cannot multiply here at all; "" where it can.
    """

    name: str
    in_features: int
    out_features: int
    tokens: int
    flops: int
    flops_share: float
    errors: dict[str, dict[str, ProductError]]
    operands: dict[tuple[str, str, str], OperandError]
    kept: dict[str, str] = field(default_factory=dict)
    impossible: str = ""

    def excess(self, scheme: str) -> tuple[float, str]:
        """Return the largest error of a scheme ("bf16" too) in units of what is expected, and its product."""
        found = {p: e.worst / _expected(scheme, p) for p, e in self.errors[scheme].items()}
        worst = max(found, key=lambda product: found[product])
        return found[worst], worst

    def fits(self, scheme: str) -> bool:
        """Say whether fp8 with that scaling ("tensor", "row", "block") costs no more than rounding has to."""
        return not self.impossible and self.excess(scheme)[0] <= EXCESS

    @property
    def verdict(self) -> str:
        """One of `PER_TENSOR`, `PER_BLOCK`, `KEEP`."""
        return PER_TENSOR if self.fits("tensor") else PER_BLOCK if self.fits("block") else KEEP

    @property
    def reason(self) -> str:
        """Why that is the verdict, for a user."""
        if self.impossible:
            return self.impossible
        told = [f"{'one scale' if s == 'tensor' else f'a scale a {s}'}: {_told(self, s)}" for s in self._schemes()]
        if self.verdict == PER_BLOCK:
            told.append(
                "a scale a row is enough" if self.fits("row") else f"a scale a row is not: {_told(self, 'row')}"
            )
        if self.verdict == KEEP and self.excess("bf16")[0] > EXCESS:
            told.append(f"its terms cancel, so bf16 suffers alike: {_told(self, 'bf16')}")
        if self.verdict != PER_TENSOR and (lost := self._lost()):
            told.append(lost)
        if len(self.errors["tensor"]) == 1:
            told.append("no gradient reached it: judged by its output alone")
        return "; ".join(told)

    def _schemes(self) -> tuple[str, ...]:
        return ("tensor",) if self.verdict == PER_TENSOR else ("tensor", "block")

    def _lost(self) -> str:
        """Name the operand of which most underflows with one scale."""
        shares = {key: error.underflow for key, error in self.operands.items() if key in _ONE_SCALE}
        worst = max(shares, key=lambda key: shares[key])
        return f"{shares[worst]:.0%} of its {worst[0]} underflow with one scale" if shares[worst] >= 0.01 else ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; the keys of operands are joined by a space, infinite dB are None."""
        operands = {" ".join(key): _finite(asdict(error)) for key, error in self.operands.items()}
        return {**asdict(self), "operands": operands, "verdict": self.verdict, "reason": self.reason}


_ONE_SCALE = {("input", "fp8-e4m3", "tensor"), ("weight", "fp8-e4m3", "tensor"), ("gradient", "fp8-e5m2", "tensor")}


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    return {key: value if abs(value) != float("inf") else None for key, value in values.items()}


def _told(row: Fp8Row, scheme: str) -> str:
    excess, product = row.excess(scheme)
    return f"{product} off by {row.errors[scheme][product].worst:.2%}, {excess:.1f} times what rounding costs"


def _expected(scheme: str, product: str) -> float:
    if scheme == "bf16":
        return expected_error("bf16", "bf16")
    found = next(known for known in SCHEMES if known.name == scheme)
    return expected_error(found.values, found.values if product == "output" else found.gradients)
