"""What if a model's linear layers multiplied in fp8? Measured on its own inputs, weights and gradients.

    rows = what_if(model, lambda: model(**batch).loss)
    print(fp8_policy(rows, model))                       # fp8-mixed; model.layers.*.mlp.down_proj=bf16

One forward and backward runs as it is. At each linear layer its three products are made once more on the side, from
operands rounded to fp8 (fp8_rounding.py: a scale a tensor, a row, a block) and to bf16, and held against the product of
the operands as they are. So errors are local: what rounding costs in this layer, given exact inputs.

An error is judged by what rounding to that format has to cost, `expected_error`. Twice that is four times the noise:
one of e4m3's three bits of mantissa is lost to a badly placed scale, or to terms that cancel (bf16 suffers alike then,
and the row says so). Errors are taken in two ways, for a few large rows can hide that all others are lost: over all
values, and as the median over rows (tokens; outputs for the weight's gradient). The worse one counts.

    fp8 per tensor        all products within twice what is expected, with one scale a tensor
    fp8 per block only    not so, but with blocks of 128 (the row tells whether a scale a row is enough)
    keep bf16             not even that, or dims and kinds of layer that fp8 cannot multiply

Not covered: how errors of many layers add up in loss and gradients, the accumulator's rounding, speed. A layer that is
good here may still be kept high by `fp8-mixed`, which keeps first, last, small layers and routers (float8_layers.py).
A layer that the run does not call has no row.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from floatline.audit.fp8_rounding import (
    SCHEMES,
    OperandError,
    Scheme,
    expected_error,
    operand_error,
    quantised,
)
from floatline.errors import ConfigError, ModelError
from floatline.observe.error.rounding import round_to
from floatline.precision import Policy
from floatline.precision.float8_layers import choose_linears, odd_dims

PER_TENSOR, PER_BLOCK, KEEP = "fp8 per tensor", "fp8 per block only", "keep bf16"
PRODUCTS = ("output", "input gradient", "weight gradient")
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
            told.append(f"its terms cancel, bf16 loses as much: {_told(self, 'bf16')}")
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


def what_if(model: nn.Module, run: Callable[[], torch.Tensor]) -> tuple[Fp8Row, ...]:
    """Return what fp8 would do to every linear layer that `run` calls, in the model's order.

    Args:
        model: Any module; its `nn.Linear` and transformers' `Conv1D` layers are looked at.
        run: Runs the model and returns the scalar loss; called once. Run it in fp32, or under the autocast it trains
            with. What it changes (buffers, random state) stays changed; gradients are put back as they were.

    Raises:
        ConfigError: The model has no linear layer, or `run` no scalar loss with a gradient.
        ModelError: An operand is not finite before anything is rounded.
    """
    linears = {name: module for name, module in model.named_modules() if _is_linear(module)}
    if not linears:
        raise ConfigError(f"{type(model).__name__} has no linear layers", hint="fp8 is for nn.Linear and Conv1D layers")
    meters = {name: _Meter(name, module) for name, module in linears.items()}
    before = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        model.zero_grad(set_to_none=True)  # a backward would add to the gradients that are there, in place
        with ExitStack() as hooks:
            for meter in meters.values():
                handle = meter.module.register_forward_hook(meter.seen, with_kwargs=True)
                hooks.callback(handle.remove)
            _scalar(run()).backward()
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient
    kept = {s: choose_linears(model, Policy(name), {}).kept for s, name in POLICIES.items()}
    ran = [meter for meter in meters.values() if meter.tokens]
    flops = sum(meter.flops for meter in ran)
    return tuple(
        meter.row(flops, {scaling: reasons[meter.name] for scaling, reasons in kept.items() if meter.name in reasons})
        for meter in ran
    )


def _scalar(loss: Any) -> torch.Tensor:
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
        free = "" if not isinstance(loss, torch.Tensor) or loss.requires_grad else " without a gradient"
        raise ConfigError(f"run returned {what}{free}", hint="return the scalar loss, with gradients enabled")
    return loss.reshape(())


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers")


@dataclass
class _Sum:
    """Squared error and squared size, over all calls and row by row."""

    noise: float = 0.0
    signal: float = 0.0
    rows: list[torch.Tensor] = field(default_factory=list)

    def add(self, found: torch.Tensor, exact: torch.Tensor) -> None:
        noise, signal = (found - exact).square().sum(1), exact.square().sum(1)
        self.noise += noise.sum().item()
        self.signal += signal.sum().item()
        self.rows.append((noise / signal)[signal > 0].sqrt())

    def result(self) -> ProductError:
        rows = torch.cat(self.rows)
        median = rows.median().item() if rows.numel() else 0.0
        return ProductError(total=(self.noise / self.signal) ** 0.5 if self.signal else 0.0, median=median)


class _Meter:
    """Watches one linear layer."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module
        self.tokens = self.flops = 0
        self.sums: dict[str, dict[str, _Sum]] = {scheme: {} for scheme in ("bf16", *(s.name for s in SCHEMES))}
        self.operands: dict[tuple[str, str, str], OperandError] = {}

    def seen(self, module: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> None:
        given = args[0] if args else next(iter(kwargs.values()))
        if not given.numel():
            return
        x, w = self._rows(given, "input"), self._weight()
        self.tokens += x.shape[0]
        self._product("output", x, w, "values", 1, 1, lambda a, b: a @ b.t())
        self._note("input", x, ("fp8-e4m3",), 1)
        self._note("weight", w, ("fp8-e4m3",), 1)
        if output.requires_grad:
            output.register_hook(partial(self.arrived, given.detach(), given.requires_grad))

    def arrived(self, given: torch.Tensor, wanted: bool, gradient: torch.Tensor) -> None:
        dy = self._rows(gradient, "output gradient")
        if wanted:
            self._product("input gradient", dy, self._weight(), "gradients", 1, 0, lambda a, b: a @ b)
        if self.module.weight.requires_grad:
            x = self._rows(given, "input")
            self._product("weight gradient", dy, x, "gradients", 0, 0, lambda a, b: a.t() @ b)
        self._note("gradient", dy, ("fp8-e4m3", "fp8-e5m2"), 1)

    def _rows(self, tensor: torch.Tensor, what: str) -> torch.Tensor:
        """Return a tensor as a matrix of at least fp32."""
        rows = tensor.detach().reshape(-1, tensor.shape[-1])
        rows = rows if rows.dtype is torch.float64 else rows.float()
        if not rows.isfinite().all():
            raise ModelError(
                f"the {what} of {self.name} holds inf or NaN before anything is rounded to fp8",
                hint="find its cause first: floatline diagnose",
            )
        return rows

    def _weight(self) -> torch.Tensor:
        weight = self.module.weight
        return self._rows(weight.t() if _is_conv1d(self.module) else weight, "weight")  # type: ignore[operator, arg-type]

    @torch.no_grad()
    def _product(
        self, product: str, left: torch.Tensor, right: torch.Tensor, kind: str, left_dim: int, right_dim: int,
        multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> None:  # fmt: skip
        """Hold rounded products against the exact one; dims are those that the product sums over."""
        square = product != "weight gradient"  # the right operand is the weight then
        with torch.autocast(left.device.type, enabled=False):
            left, right = left.to(torch.promote_types(left.dtype, right.dtype)), right.to(left.dtype)
            exact = multiply(left, right)
            self.flops += 2 * left.numel() * (right.numel() // right.shape[right_dim])
            self._add("bf16", product, multiply(round_to(left, "bf16"), round_to(right, "bf16")), exact)
            for scheme in SCHEMES:
                pair = _rounded(scheme, kind, left, right, left_dim, right_dim, square)
                self._add(scheme.name, product, multiply(*pair), exact)

    def _add(self, scheme: str, product: str, found: torch.Tensor, exact: torch.Tensor) -> None:
        self.sums[scheme].setdefault(product, _Sum()).add(found, exact)

    @torch.no_grad()
    def _note(self, operand: str, values: torch.Tensor, formats: tuple[str, ...], dim: int) -> None:
        for fmt in formats:
            for scaling in ("none", *(scheme.name for scheme in SCHEMES)):
                error = operand_error(values, fmt, scaling, dim, square=operand == "weight")
                self.operands[operand, fmt, scaling] = error

    def row(self, flops: int, kept: dict[str, str]) -> Fp8Row:
        out_features, in_features = self._weight().shape
        conv1d = "transformers' Conv1D is not converted by torchao" if _is_conv1d(self.module) else ""
        return Fp8Row(
            name=self.name,
            in_features=in_features,
            out_features=out_features,
            tokens=self.tokens,
            flops=self.flops,
            flops_share=self.flops / flops,
            errors={s: {product: total.result() for product, total in found.items()} for s, found in self.sums.items()},
            operands=self.operands,
            kept=kept,
            impossible=odd_dims(in_features, out_features) or conv1d or _never_converted(kept),
        )


def _never_converted(kept: dict[str, str]) -> str:
    return next((reason for reason in kept.values() if reason.startswith("not convertible")), "")


def _rounded(
    scheme: Scheme, kind: str, left: torch.Tensor, right: torch.Tensor, left_dim: int, right_dim: int, square: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    left_format = scheme.values if kind == "values" else scheme.gradients
    return (
        quantised(left, left_format, scheme.name, left_dim),
        quantised(right, scheme.values, scheme.name, right_dim, square=square),
    )
