"""torchao's low-bit Adam, made to fit where torch's Adam was.

torchao's classes want the learning rate as a tensor, always compile, give each state tensor a table of its own and put
tensor subclasses into state dicts. What is added here: the learning rate stays the number that schedules and logs
know, the step can run eagerly (torch's compiler is told so for the time of the step only), all state shares one table,
and state dicts hold plain tensors and load from either kind of Adam.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any, Literal

import torch

from floatline.techniques.distributed.shards import laid_out_like
from floatline.techniques.optim_steps.low_bit_state import decode, encode, is_quantised, state_classes, torchao_optim
from floatline.techniques.optim_steps.wrapped import load_in_place, saved_state_of, share
from floatline.techniques.placement import within_kernel

MOMENTS = {"exp_avg": True, "exp_avg_sq": False}
"""Adam's state tensors, and whether each has signs."""


def is_adamw(optimizer: torch.optim.Optimizer) -> bool:
    """Say whether weight decay is decoupled."""
    return isinstance(optimizer, torch.optim.AdamW) or bool(optimizer.defaults.get("decoupled_weight_decay"))


class LowBitAdam(torch.optim.Optimizer):
    """What is added to torchao's Adam: a plain learning rate, eager steps, one table for all, state dicts."""

    eager: bool
    stands_for_kernel: bool
    block_size: int

    def prepare(self, *, eager: bool, stands_for_kernel: bool) -> None:
        """Say how to step; called once, after torchao's own constructor."""
        state_classes()  # makes torchao's tables, which must not happen while tensors are fake
        self.eager = eager
        self.stands_for_kernel = stands_for_kernel
        self._tables: dict[tuple[Any, ...], torch.Tensor] = {}

    def _new_buffer(self, p: torch.Tensor, signed: bool) -> torch.Tensor:
        """Return zero state; all tensors of one kind share the table, which is 1 KiB each otherwise."""
        with within_kernel(False):
            made: torch.Tensor = super()._new_buffer(p, signed)  # type: ignore[misc]
        return self._with_shared_table(made)

    def _with_shared_table(self, value: Any) -> Any:
        if hasattr(value, "qmap") and is_quantised(value):
            key = (type(value), value.signed, value.qmap.device, type(value.qmap))
            value.qmap = self._tables.setdefault(key, value.qmap)
        return value

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """torchao wants the learning rate as a tensor; schedules and logs keep the number they know."""
        rates = [group["lr"] for group in self.param_groups]
        try:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate if isinstance(rate, torch.Tensor) else torch.tensor(rate, dtype=torch.float32)
            with self._stance(), _kernel(self.stands_for_kernel):
                return super().step(closure)
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate

    def _stance(self) -> AbstractContextManager[Any]:
        return torch.compiler.set_stance("force_eager") if self.eager else nullcontext()

    def state_dict(self) -> dict[str, Any]:
        """Return the state with quantised tensors as plain ones."""
        packed = super().state_dict()
        state = {key: {name: encode(v) for name, v in values.items()} for key, values in packed["state"].items()}
        return {**packed, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a low-bit state dict bit for bit; full-precision moments, or those of other bits, are quantised."""
        load_in_place(self, {**state_dict, "state": {}}, super().load_state_dict)
        for _, parameter, saved in saved_state_of(self, state_dict):
            self.state[parameter] = {key: self._loaded(parameter, key, value) for key, value in saved.items()}

    def _loaded(self, parameter: torch.Tensor, key: str, value: Any) -> Any:
        if key not in MOMENTS:
            return value.clone() if isinstance(value, torch.Tensor) else value
        return self.quantised(parameter, key, decode(value))

    def quantised(self, parameter: torch.Tensor, key: str, value: Any) -> torch.Tensor:
        """Return a moment in the format that this optimizer has for `parameter`."""
        fresh: Any = self._new_buffer(parameter, MOMENTS[key])
        if type(value) is type(fresh) and is_quantised(value) and value.block_size == fresh.block_size:
            return self._with_shared_table(value.to(parameter.device))
        full = value.dequantize() if is_quantised(value) else value
        fresh.copy_(laid_out_like(full.to(parameter.device, torch.float32), parameter))
        return fresh


@contextmanager
def _kernel(stands_in: bool) -> Iterator[None]:
    """Where the step stands for one compiled kernel, its arithmetic has neither memory nor values: it is left out."""
    if not stands_in:
        yield
        return
    import torchao.optim.adam as home

    arithmetic = home.single_param_adam
    home.single_param_adam = lambda *args, **kwargs: None
    try:
        with within_kernel():
            yield
    finally:
        home.single_param_adam = arithmetic


@cache
def _low_bit_class(base: type) -> Any:
    return type(base.__name__, (LowBitAdam, base), {"__doc__": base.__doc__})


def to_torchao(
    optimizer: torch.optim.Optimizer,
    bits: Literal[8, 4, "fp8"],
    *,
    block_size: int,
    stochastic_rounding: bool,
    eager: bool,
    stands_for_kernel: bool = False,
) -> LowBitAdam:
    """Return torchao's low-bit counterpart of an Adam or AdamW, with the same groups and state objects.

    Args:
        optimizer: Its state, if it has any, is quantised in place.
        bits: Format of the moments.
        block_size: Values that share a scale.
        stochastic_rounding: Of bf16 weights.
        eager: Do not compile the step.
        stands_for_kernel: The eager step stands for a compiled one, whose intermediates have no memory.
    """
    suffix = "Fp8" if bits == "fp8" else f"{bits}bit"
    base = getattr(torchao_optim(), f"Adam{'W' if is_adamw(optimizer) else ''}{suffix}")
    known = {key: optimizer.defaults[key] for key in ("lr", "betas", "eps", "weight_decay", "amsgrad")}
    rates = [group["lr"] for group in optimizer.param_groups]
    made: LowBitAdam = _low_bit_class(base)(
        optimizer.param_groups,
        **known,
        block_size=block_size,
        bf16_stochastic_round=stochastic_rounding,
    )
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    share(made, optimizer)
    made.prepare(eager=eager, stands_for_kernel=stands_for_kernel)
    for parameter, state in made.state.items():
        state.update({key: made.quantised(parameter, key, state[key]) for key in MOMENTS if key in state})
    return made


@torch.no_grad()
def dequantise(optimizer: LowBitAdam) -> None:
    """Turn low-bit state into tensors of the weights' format, in place."""
    for parameter, state in optimizer.state.items():
        for key in MOMENTS:
            if is_quantised(state.get(key)):
                state[key] = state[key].dequantize().to(parameter.dtype)
