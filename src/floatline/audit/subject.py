"""What is audited: a copy of the model, its batches and its loss, run under one policy after another.

The copy is in evaluation mode, so that dropout does not hide rounding; normalisation and recurrent layers keep the
mode they had. Every run starts from the same weights, buffers, attributes and random numbers. The user's model is never
touched.

Where no loss is given and the model returns none, its first floating output is audited instead; the backward then
starts from a fixed random direction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from floatline.audit.buffers import stalled_buffers
from floatline.audit.exact import Exact
from floatline.audit.fp16_products import FP16Products
from floatline.audit.leaves import backward_alone
from floatline.audit.metered import Metered, borders_watched
from floatline.audit.model_copy import copied
from floatline.audit.model_state import ModelState
from floatline.audit.random_numbers import seeded
from floatline.audit.tolerance import Effect
from floatline.audit.user_code import UserCodeError, user_code
from floatline.audit.value import is_floating, kind, output_of
from floatline.errors import ModelError
from floatline.hardware import Hardware
from floatline.observe.error import ErrorMeter, metering
from floatline.observe.error.measures import relative_error, sampled
from floatline.observe.finite import plain_name
from floatline.observe.target import cuda_autocast
from floatline.precision import Policy
from floatline.precision.apply import AppliedPrecision, apply_precision
from floatline.step.batch import call_model, move

Loss = Callable[[nn.Module, Any], torch.Tensor]
SCALE = 2.0**16


@dataclass(kw_only=True)
class Passes:
    """How many forward passes were run, by what for."""

    count: dict[str, int] = field(default_factory=dict)

    def add(self, what: str) -> None:
        self.count[what] = self.count.get(what, 0) + 1

    @property
    def total(self) -> int:
        return sum(self.count.values())


class Subject:
    """The copy of a model with what it is run on.

    Args:
        model: Any module with floating parameters.
        batches: One or several.
        loss: `(model, batch) -> tensor`; None for the model's own loss, else its outputs.
        hardware: Whose autocast lists hold.
        backward: Also run the backward.
        seed: Of random numbers that the model draws.

    Raises:
        ModelError: It cannot be copied, has no floating parameters, or its output is no tensor; no gradient arrives.
    """

    def __init__(
        self, model: nn.Module, batches: list[Any], loss: Loss | None, hardware: Hardware, backward: bool, seed: int
    ) -> None:
        self.passes = Passes()
        self.hardware = hardware
        self.backward = backward
        self.loss = loss
        self.seed = seed
        self.model, self.notes = copied(model)
        self._original = model
        odd = {p.dtype for p in model.parameters() if p.is_floating_point()} - {torch.float32}
        self.device = next(self.model.parameters()).device
        if any(isinstance(leaf, torch.Tensor) and leaf.is_meta for leaf in tree_leaves(batches)):
            raise ModelError("the batch is on the meta device", hint="give it values")
        self.batches = [_as_weights(move(batch, self.device), odd) for batch in batches]
        self._recurrent = any(isinstance(module, nn.RNNBase) for module in self.model.modules())
        self._state = ModelState(self.model)
        self._doubles: dict[str, torch.Tensor] = {}

    # Runs

    def exact(self, batch: int = 0) -> Exact:
        """Run the step in fp32 with shadows, and return the exact one."""
        self.passes.add("exact")
        with self._started(Policy.parse("32-true")) as applied, metering(self.model, local=False) as meter:
            value, found = self._step(applied, batch, 1.0, meter)
            with _disable_current_modes():  # looking is no part of the step
                shadow = meter.shadows.of(value).clone()
                gradients, weights = {}, {}
                for name, parameter in self.taking():
                    if parameter.grad is not None:
                        gradients[name] = sampled(meter.shadows.of(parameter.grad)).clone()
                        weights[name] = parameter.numel() / max(gradients[name].numel(), 1)
        total = sum(float(g.square().sum()) * weights[n] for n, g in gradients.items())
        wrong = sum(float((found[n] - g).square().sum()) * weights[n] for n, g in gradients.items())
        return Exact(
            gradient_fp32=(wrong / total) ** 0.5 if total else 0.0,
            value=shadow,
            gradients=gradients,
            weights=weights,
            fp32={name: relative_error(found[name], exact) for name, exact in gradients.items()},
            loss_fp32=relative_error(value.detach(), shadow),
        )

    def effect(self, policy: Policy, exact: Exact, batch: int = 0, *, what: str = "joint", scale: float | None = None,
               around: Callable[[], Any] = nullcontext) -> Effect:  # fmt: skip
        """Run the step under a policy and hold it against the exact one.

        Args:
            policy: To put on.
            exact: Of the same batch.
            batch: Which batch.
            what: What the pass is counted as.
            scale: Loss scale; None takes 2^16 for policies that scale, made smaller until no gradient overflows.
            around: Makes a context that the step runs in.
        """
        try:
            return self.tried(policy, exact, batch, what=what, scale=scale, around=around)
        except UserCodeError as error:
            if not policy.rules:
                raise
            return self._does_not_run(policy, error)

    def tried(self, policy: Policy, exact: Exact, batch: int = 0, *, what: str = "joint", scale: float | None = None,
              around: Callable[[], Any] = nullcontext) -> Effect:  # fmt: skip
        """Return the effect likewise, and raise what the model raises."""
        if scale is None:
            scale = SCALE if policy.base.loss_scaling else 1.0
        while True:
            self.passes.add(what)
            with self._started(policy) as applied, around():
                value, gradients = self._step(applied, batch, scale, None)
            effect = exact.effect(value.detach().double(), gradients, str(policy), scale)
            routine = policy.base.loss_scaling and scale > 1 and bool(torch.isfinite(value).all())
            if effect.finite or not routine:
                return effect
            scale /= 16.0 if scale > 16 else scale

    def _does_not_run(self, policy: Policy, error: UserCodeError) -> Effect:
        """Return the effect of islands between which tensors meet in two formats: as wrong as can be."""
        said = f"some islands do not run, and were not taken: {error.message.splitlines()[0]}"
        if said not in self.notes:
            self.notes.append(said)
        return Effect(policy=str(policy), loss_error=float("inf"))

    def gradients(self, batch: int = 0) -> dict[str, torch.Tensor]:
        """Return the gradients in fp32, whole."""
        self.passes.add("updates")
        with self._started(Policy.parse("32-true")) as applied:
            self._step(applied, batch, 1.0, None)
            return {name: p.grad.detach().clone() for name, p in self.taking() if p.grad is not None}

    @contextmanager
    def fp32_step(self) -> Iterator[None]:
        """Context of a step of somebody else's, who takes its loss from `loss_once`."""
        with self._started(Policy.parse("32-true")), torch.enable_grad(), _told():
            yield

    def loss_once(self, batch: int = 0) -> torch.Tensor:
        """Return a scalar of one fp32 forward; within `fp32_step`."""
        self.passes.add("fp8")
        value = self._value(self.model, _fresh(self.batches[batch]))
        return value.reshape(()) if value.numel() == 1 else (value.float() * self._direction(value)).sum()

    def read(self, policy: Policy, scale: float, batch: int = 0, *, backward: bool = True) -> Metered:
        """Run the step, or its forward alone, under a policy with a meter on it."""
        self.passes.add("metered")
        with (
            self._started(policy) as applied,
            metering(self.model) as meter,
            borders_watched(self.model, meter) as borders,
        ):
            self._step(applied, batch, scale, meter, backward=backward)
            with _disable_current_modes():  # looking is no part of the step
                errors = {name: meter.reached(p.grad) for name, p in self.taking() if p.grad is not None}
                written = {name: (t.detach().clone(), meter.shadows.of(t).clone()) for name, t in self._named()
                           if _has_shadow(t) and not t.requires_grad}  # fmt: skip
        return Metered(
            readings=tuple(meter.readings),
            gradient_errors=errors,
            stalled_buffers=stalled_buffers(self._state.values, written),
            unmeasured=dict(meter.unmeasured),
            borders=borders,
        )

    def plain(self, seed: int, batch: int = 0) -> torch.Tensor:
        """Return the fp32 value of the forward alone, with random numbers of a seed."""
        self.passes.add("checks")
        with self._started(Policy.parse("32-true"), seed), self._graph(), self._original_refused(), _told():
            value = self._value(self.model, _fresh(self.batches[batch]))
            return value.detach().clone()

    @contextmanager
    def _original_refused(self) -> Iterator[None]:
        """Raise where the loss runs the user's model, which it closes over, and not the copy that it is given."""

        def refuse(module: nn.Module, args: Any) -> None:
            raise ModelError(
                "the loss runs your model and not the one that it is given",
                hint="write loss(model, batch) with the model of its arguments: a copy is audited",
            )

        with ExitStack() as stack:
            for module in self._original.modules() if self.loss is not None else ():
                stack.callback(module.register_forward_pre_hook(refuse).remove)
            yield

    @contextmanager
    def _started(self, policy: Policy, seed: int | None = None) -> Iterator[AppliedPrecision]:
        """Context in which the policy is on; weights, buffers, gradients and random numbers are as at the start."""
        devices = [d for d in {p.device for p in self.model.parameters()} if d.type == "cuda"]
        with ExitStack() as stack:
            stack.enter_context(seeded(self.seed if seed is None else seed, devices))
            if self.hardware.kind == "cuda" and not devices:
                stack.enter_context(cuda_autocast())
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            if self._recurrent:
                stack.enter_context(_without_onednn())
            if "fp16" in policy.formats and not devices:
                stack.enter_context(FP16Products())
            stack.enter_context(torch.autocast(self.device.type, enabled=False))  # the caller's, if he has one
            stack.enter_context(self._state.kept())
            applied = apply_precision(self.model, policy)
            stack.callback(applied.undo)
            yield applied

    def _step(
        self, applied: AppliedPrecision, batch: int, scale: float, meter: ErrorMeter | None, *, backward: bool = True
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        if meter is not None:
            for name, tensor in self._named():
                if _has_shadow(tensor):
                    meter.shadows.set(tensor, self._exact_values(name), shared=True)
            meter.enter("forward")
        with self._graph(), _told(applied.policy):
            with applied.autocast():
                value = self._value(self.model, _fresh(self.batches[batch]))
            if self.backward and backward:
                self._backward(value, scale, meter)
        with _disable_current_modes():  # looking is no part of the step
            gradients = {name: sampled(p.grad).double() / scale for name, p in self.taking() if p.grad is not None}
        return value, gradients

    def _exact_values(self, name: str) -> torch.Tensor:
        """Return a weight or buffer in fp64, which no run changes: memory costs more than what fills it."""
        if name not in self._doubles:
            self._doubles[name] = self._state.values[name].double().contiguous()
        return self._doubles[name]

    def _graph(self) -> AbstractContextManager[Any]:
        """Context of a forward: with gradients, for a force field or a gradient penalty takes some on its way."""
        return torch.enable_grad() if self.backward else torch.no_grad()

    def _backward(self, value: torch.Tensor, scale: float, meter: ErrorMeter | None) -> None:
        if not value.requires_grad:
            raise ModelError(
                "no gradient arrives: the loss depends on no trainable parameter",
                hint="look for detach(), no_grad() and frozen layers, or audit the forward alone with backward=False",
            )
        total = value.reshape(()) if value.numel() == 1 else (value.float() * self._direction(value)).sum()
        loss = total.float() * scale  # as GradScaler: the scale is fp32
        if meter is not None:
            meter.enter("backward")
        backward_alone(loss, self.model.parameters())

    def _direction(self, value: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        made = torch.randn(value.shape, generator=generator, dtype=torch.float32) / value.numel()
        return made.to(value.device)

    def _value(self, model: nn.Module, batch: Any) -> torch.Tensor:
        if self.loss is not None:
            value: Any = self.loss(model, batch)
            if not is_floating(value):
                raise ModelError(
                    f"the loss function returned a {kind(value)}", hint="return a floating tensor: a loss, or outputs"
                )
            return value
        return output_of(call_model(model, batch), type(model).__name__)

    def _named(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.model.named_parameters()
        yield from self.model.named_buffers()

    def taking(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                yield plain_name(name), parameter


def _told(policy: Policy | None = None) -> AbstractContextManager[None]:
    """Return the context of a step under a policy; None is fp32."""
    if policy is None or policy.name == "32-true":
        hint = "run loss(model, batch) and its backward by themselves first: batch and model must fit together"
        return user_code("the model or its loss", "in fp32", hint)
    hint = "compute in fp32 there (x.float()), in a module of its own; or audit the other mode, or leave the format out"
    return user_code("the model or its loss", f"under {policy.name}", hint)


@contextmanager
def _without_onednn() -> Iterator[None]:
    """Run recurrent layers by torch's own kernels.

    oneDNN has none in fp64, so there would be no exact step, and none in fp16 on most CPUs.
    """
    was = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(was)


def _as_weights(batch: Any, odd: set[torch.dtype]) -> Any:
    """Return a batch detached, in fp32 where it is in the format of weights that the copy has in fp32."""

    def changed(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return leaf.detach().float() if leaf.dtype in odd else leaf.detach()

    return tree_map(changed, batch)


def _fresh(batch: Any) -> Any:
    """Return a copy of a batch: a forward may write into its inputs."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, batch)


def _has_shadow(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and tensor.layout == torch.strided
