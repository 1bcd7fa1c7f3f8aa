"""Step bf16 weights in fp32, a bucket at a time, and round the result back in a way that loses nothing on average.

A bf16 weight has 8 significant bits: an update below half its spacing (0.2-0.4 % of the weight) is rounded away, and
at a learning rate of 1e-5 that is most of them. Here any torch optimizer steps on fp32 copies of a few parameters at a
time, so all its arithmetic is fp32 and its hyperparameters mean what they always mean; then the copies are rounded
down into the weights by one of three rules:

    Compensated   to nearest, and what was cut off is kept in a bf16 tensor and added again next time (Kahan)
    Stochastic    up or down at random, with the mean unchanged
    MasterCopy    to nearest, and the fp32 copy itself is kept: the classic master weights

The optimizer's moments are bf16 between steps as well, rounded stochastically: to nearest, the second moment stops
moving under beta2 = 0.999, since 0.1 % is less than half a spacing. Or they are kept in fp32.

Random bits come from a generator of its own, whose state is in the state dict: the model's randomness stays what it
was, and a resumed run rounds as an uninterrupted one. fp32 parameters are stepped as they are, bit for bit.

Costs a bucket's fp32 copies of weight, gradient and moments during the step, but for those that are fp32 anyway.
Not covered: fp16 weights (`16-true` keeps fp32 masters), sharded parameters.

Source: Higham, Accuracy and Stability of Numerical Algorithms, section 4.3 (compensated summation); Zamirai et al.,
Revisiting BFloat16 Training, arXiv 2010.06192.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from floatline.techniques.optim_steps.partial_step import Chunk, chunks, step_only
from floatline.techniques.optim_steps.wrapped import WrappedOptimizer, saved_state_of

COMPENSATION = "kahan_comp"
"""Key in a parameter's state of what rounding cut off."""

MASTER = "master"
"""Key in a parameter's state of its fp32 copy."""

RANDOMNESS = "rounding_generators"
"""Key in the state dict of the generators' states, by device."""


def round_stochastically(values: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Round fp32 to bf16, up with the probability of the part that is cut off, so that the mean stays.

    16 random bits are added to the 16 that bf16 drops; the carry decides. Infinities and NaN stay what they are.

    Args:
        values: Any shape, fp32.
        generator: On their device; None is torch's own.

    Returns:
        bf16, the same shape.

    >>> round_stochastically(torch.tensor([1.0, -0.5])).tolist()
    [1.0, -0.5]
    """
    noise = torch.randint(0, 1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    finite = values.view(torch.int32).add(noise).bitwise_and(-(1 << 16)).view(torch.float32)
    return torch.where(torch.isfinite(values), finite, values).to(torch.bfloat16)


class Compensated:
    """Rounding to nearest that keeps what it cut off: weight + compensation has 16 bits."""

    def widen(self, parameter: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
        compensation = state.pop(COMPENSATION, None)
        wide = parameter.detach().float()
        return wide if compensation is None else wide.add_(compensation)

    def narrow(
        self, parameter: torch.Tensor, wide: torch.Tensor, state: dict[str, Any], generator: torch.Generator
    ) -> None:
        parameter.copy_(wide)
        state[COMPENSATION] = wide.sub_(parameter).to(parameter.dtype)


class Stochastic:
    """Rounding at random with the right mean; needs no memory."""

    def widen(self, parameter: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
        return parameter.detach().float()

    def narrow(
        self, parameter: torch.Tensor, wide: torch.Tensor, state: dict[str, Any], generator: torch.Generator
    ) -> None:
        parameter.copy_(round_stochastically(wide, generator))


class MasterCopy:
    """Rounding to nearest of an fp32 copy that stays: nothing is lost, for 4 bytes a parameter."""

    def widen(self, parameter: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
        master: torch.Tensor | None = state.pop(MASTER, None)
        return parameter.detach().float() if master is None else master

    def narrow(
        self, parameter: torch.Tensor, wide: torch.Tensor, state: dict[str, Any], generator: torch.Generator
    ) -> None:
        parameter.copy_(wide)
        wide.grad = None  # it lives on, its gradient need not
        state[MASTER] = wide


class WideStep(WrappedOptimizer):
    """Steps another optimizer on fp32 copies of bf16 parameters.

    Args:
        inner: Any optimizer of torch.optim, LBFGS excepted.
        rounding: Back into the weights.
        moments: Format of its state between steps.
        bucket_bytes: Bound on the copies that exist at once, if no single parameter is larger.
        seed: Of the random bits.
        name: The technique, for errors.
    """

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        rounding: Compensated | Stochastic | MasterCopy,
        *,
        moments: Literal["bf16", "fp32"],
        bucket_bytes: int,
        seed: int,
        name: str,
    ) -> None:
        super().__init__(inner, name)
        self.rounding = rounding
        self.moments = moments
        self.bucket_bytes = bucket_bytes
        self.seed = seed
        self._generators: dict[str, torch.Generator] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for chunk in chunks(self, self.bucket_bytes, self._copied_bytes):
            self._step_chunk(chunk)
        return loss

    def _copied_bytes(self, parameter: torch.Tensor) -> int:
        if not is_narrow(parameter):
            return 0
        moments = sum(isinstance(value, torch.Tensor) for value in self.state.get(parameter, {}).values())
        return 4 * parameter.numel() * (2 + (max(moments, 2) if self.moments == "bf16" else 0))

    def _step_chunk(self, chunk: Chunk) -> None:
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        try:
            wide: Chunk = [(group, [self._widen(p, pairs) for p in parameters]) for group, parameters in chunk]
            step_only(self.inner, wide)
        finally:  # also after an error each parameter must find its state again
            for parameter, copy in pairs:
                self._narrow(parameter, copy)

    def _widen(self, parameter: torch.Tensor, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        if not is_narrow(parameter):
            return parameter
        state = self.state.pop(parameter, {})
        wide = self.rounding.widen(parameter, state)
        assert parameter.grad is not None  # chunks leaves the others out
        wide.grad = parameter.grad.float()
        if state:
            self.state[wide] = {key: value.float() if _is_moment(value) else value for key, value in state.items()}
        pairs.append((parameter, wide))
        return wide

    def _narrow(self, parameter: torch.Tensor, wide: torch.Tensor) -> None:
        state = self.state.pop(wide, {})
        generator = self._generator(parameter.device)
        if self.moments == "bf16":
            state = {key: round_stochastically(v, generator) if _is_moment(v) else v for key, v in state.items()}
        self.rounding.narrow(parameter, wide, state, generator)
        if state:
            self.state[parameter] = state

    def _generator(self, device: torch.device) -> torch.Generator:
        key = str(device)
        if key not in self._generators:
            self._generators[key] = torch.Generator(device).manual_seed(self.seed)
        return self._generators[key]

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's state dict and the state of the random bits."""
        randomness = {key: generator.get_state() for key, generator in self._generators.items()}
        return {**super().state_dict(), RANDOMNESS: randomness}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this or of the plain optimizer."""
        super().load_state_dict(state_dict)
        for _, parameter, saved in saved_state_of(self, state_dict):  # torch has cast them to the weights' format
            exact = {
                k: v.to(parameter.device, torch.float32, copy=True) for k, v in saved.items() if self._is_wide(k, v)
            }
            self.state[parameter].update(exact if is_narrow(parameter) else {})
        self._generators.clear()  # one that was not drawn from yet begins with its seed
        devices = {str(parameter.device) for group in self.param_groups for parameter in group["params"]}
        for key, randomness in state_dict.get(RANDOMNESS, {}).items():
            if key in devices:  # a run that goes on on another device draws from its seed anew
                self._generator(torch.device(key)).set_state(randomness.cpu())

    def _is_wide(self, key: str, value: Any) -> bool:
        """Say whether a state value is kept in fp32 between steps."""
        return key == MASTER or (self.moments == "fp32" and key != COMPENSATION and _is_moment(value))

    def finish(self) -> None:
        """Leave the inner optimizer with a state that is all its own."""
        for state in self.state.values():
            state.pop(COMPENSATION, None)
            state.pop(MASTER, None)


def is_narrow(parameter: torch.Tensor) -> bool:
    """Say whether a parameter is stepped on a wide copy."""
    return parameter.dtype is torch.bfloat16


def _is_moment(value: Any) -> bool:
    """Say whether a state value is a tensor of the weights' kind, not a counter (0-d)."""
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 0
