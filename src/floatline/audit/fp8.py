"""What if a model's linear layers multiplied in fp8? Measured on its own inputs, weights and gradients.

    rows = what_if(model, lambda: model(**batch).loss)
    print(fp8_policy(rows, model))                       # fp8-mixed; model.layers.*.mlp.down_proj=bf16

One forward and backward runs as it is. At each linear layer its three products are made once more on the side, from
operands rounded to fp8 (fp8_rounding.py: a scale a tensor, a row, a block) and to bf16, and held against the product of
the operands as they are. So errors are local: what rounding costs in this layer, given exact inputs.

Errors are taken in two ways, for a few large rows can hide that all others are lost: over all values, and as the median
over rows (tokens; outputs for the weight's gradient). The worse one counts. fp8_row.py judges them. Of each product 256
rows are computed, evenly spaced; operands are rounded whole, so that scales are the true ones.

Not covered: how errors of many layers add up in loss and gradients, the accumulator's rounding, speed. A layer that is
good here may still be kept high by `fp8-mixed`, which keeps first, last, small layers and routers (float8_layers.py).
A layer that the run does not call has no row.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from floatline.audit.fp8_choice import filter_of, fp8_policy
from floatline.audit.fp8_rounding import SCHEMES, OperandError, Scheme, operand_error, quantised
from floatline.audit.fp8_row import KEEP, PER_BLOCK, PER_TENSOR, POLICIES, Fp8Row, ProductError
from floatline.audit.leaves import backward_alone
from floatline.errors import ConfigError, ModelError
from floatline.observe.error.rounding import round_to
from floatline.precision import Policy
from floatline.precision.float8_layers import choose_linears, odd_dims
from floatline.techniques.adapters.targets import is_transposed_linear

__all__ = ["KEEP", "PER_BLOCK", "PER_TENSOR", "Fp8Row", "ProductError", "filter_of", "fp8_policy", "what_if"]

MOST_ROWS = 256
"""Rows of each product that are computed; scales see all values. Enough for a median within a few percent."""


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
    with ExitStack() as hooks:
        for meter in meters.values():
            hooks.callback(meter.module.register_forward_hook(meter.seen, with_kwargs=True).remove)
        backward_alone(_scalar(run()))
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
    return isinstance(module, nn.Linear) or is_transposed_linear(module)


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
        return self._rows(weight.t() if is_transposed_linear(self.module) else weight, "weight")  # type: ignore[operator, arg-type]

    @torch.no_grad()
    def _product(
        self, product: str, left: torch.Tensor, right: torch.Tensor, kind: str, left_dim: int, right_dim: int,
        multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> None:  # fmt: skip
        """Hold rounded products against the exact one; dims are those that the product sums over."""
        square = product != "weight gradient"  # the right operand is the weight then
        with torch.autocast(left.device.type, enabled=False):
            left, right = left.to(torch.promote_types(left.dtype, right.dtype)), right.to(left.dtype)
            some = _some_rows(left.shape[1 - left_dim], left.device)

            def of(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
                return multiply(a.index_select(1 - left_dim, some), b)

            exact = of(left, right)
            self.flops += 2 * left.numel() * (right.numel() // right.shape[right_dim])
            self._add("bf16", product, of(round_to(left, "bf16"), round_to(right, "bf16")), exact)
            for scheme in SCHEMES:
                pair = _rounded(scheme, kind, left, right, left_dim, right_dim, square)
                self._add(scheme.name, product, of(*pair), exact)

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
            impossible=odd_dims(in_features, out_features) or _never_converted(kept),
        )


def _some_rows(count: int, device: torch.device) -> torch.Tensor:
    """Return the numbers of at most `MOST_ROWS` rows, evenly spaced."""
    return torch.arange(0, count, max(1, -(-count // MOST_ROWS)), device=device)


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
