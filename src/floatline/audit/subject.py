"""What is audited: a copy of the model, its batches and its loss, run under one policy after another.

The copy is in evaluation mode, so that dropout does not hide rounding; normalisation and recurrent layers keep the
mode they had. Every run starts from the same weights, buffers and random numbers. The user's model is never touched.

Where no loss is given and the model returns none, its first floating output is audited instead; the backward then
starts from a fixed random direction.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from floatline.audit.buffers import stalled_buffers
from floatline.audit.fp16_products import FP16Products
from floatline.audit.tolerance import Effect
from floatline.errors import ModelError
from floatline.hardware import Hardware
from floatline.observe.error import ErrorMeter, Reading, metering
from floatline.observe.error.measures import ILL, sampled
from floatline.observe.finite import plain_name
from floatline.observe.target import cuda_autocast
from floatline.precision import Policy
from floatline.precision.apply import AppliedPrecision, apply_precision
from floatline.step.batch import call_model, move
from floatline.step.random_state import python_random_kept

Loss = Callable[[nn.Module, Any], torch.Tensor]
SCALE = 2.0**16
_KEEP_MODE = (nn.modules.batchnorm._BatchNorm, nn.RNNBase)


@dataclass(frozen=True, kw_only=True)
class Exact:
    """The step in fp64, on one batch.

    Attributes:
        value: Loss or outputs.
        gradients: Parameter -> a sample of its gradient, fp64.
        weights: Parameter -> elements that each sampled one stands for.
        fp32: Parameter -> relative error of its gradient in fp32.
        loss_fp32: Relative error of the value in fp32.
        gradient_fp32: Of the whole gradient.
    """

    value: torch.Tensor
    gradients: Mapping[str, torch.Tensor]
    weights: Mapping[str, float]
    fp32: Mapping[str, float]
    loss_fp32: float
    gradient_fp32: float = 0.0

    def sound(self, name: str) -> bool:
        """Say whether fp32 computes a parameter's gradient well; an exact zero by cancellation it does not."""
        return self.fp32.get(name, 0.0) <= ILL

    def effect(self, value: torch.Tensor, gradients: Mapping[str, torch.Tensor], policy: str, scale: float) -> Effect:
        """Hold a step against this one.

        Args:
            value: Its loss or outputs.
            gradients: Its gradients, unscaled and sampled alike.
            policy: Under which it ran.
            scale: Loss scale of it.
        """
        total = wrong = 0.0
        worst, name = 0.0, ""
        for key, exact in self.gradients.items():
            got = gradients.get(key)
            off = exact if got is None else got - exact
            size, error = float(exact.square().sum()), float(off.square().sum())
            total += size * self.weights[key]
            wrong += error * self.weights[key]
            if self.sound(key):
                relative = (error / size) ** 0.5 if size else (float("inf") if error else 0.0)
                if not relative <= worst:
                    worst, name = relative, key
        gradient = (wrong / total) ** 0.5 if total else 0.0
        clean = [x if x == x else float("inf") for x in (_relative(value, self.value), gradient, worst)]
        return Effect(
            policy=policy,
            loss_error=clean[0],
            gradient_error=clean[1],
            tensor_error=clean[2],
            tensor=name,
            scale=scale,
        )


@dataclass(frozen=True, kw_only=True)
class Metered:
    """A step with a meter on it.

    Attributes:
        readings: Every op that has to do with the lower format.
        gradient_errors: Parameter -> relative error that its gradient has come to.
        stalled_buffers: Running average -> share of it that should move and does not.
        unmeasured: Ops without an exact result, and how often they ran.
    """

    readings: tuple[Reading, ...]
    gradient_errors: Mapping[str, float]
    stalled_buffers: Mapping[str, float]
    unmeasured: Mapping[str, int]


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
        ConfigError: No module, no batch.
        ModelError: It cannot be copied, has no floating parameters, or its output is no tensor; fp32 is not finite; no
            gradient arrives.
    """

    def __init__(
        self, model: nn.Module, batches: list[Any], loss: Loss | None, hardware: Hardware, backward: bool, seed: int
    ) -> None:
        self.passes = Passes()
        self.notes: list[str] = []
        self.hardware = hardware
        self.backward = backward
        self.loss = loss
        self.seed = seed
        self.model = self._copied(model)
        self.device = next(self.model.parameters()).device
        self.batches = [_detached(move(batch, self.device)) for batch in batches]
        self._recurrent = any(isinstance(module, nn.RNNBase) for module in self.model.modules())
        self._weights = {name: t.detach().clone() for name, t in _tensors(self.model)}

    def _copied(self, model: nn.Module) -> nn.Module:
        floats = [p for p in model.parameters() if p.is_floating_point()]
        if not floats:
            raise ModelError(
                f"{type(model).__name__} has no floating-point parameters: there is no precision to audit",
                hint="audit_function(fn, inputs) audits plain functions of tensors",
            )
        try:
            made = copy.deepcopy(model)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise ModelError(
                f"{type(model).__name__} cannot be copied: {error}", hint="audit a freshly built model"
            ) from error
        halves = {str(p.dtype).removeprefix("torch.") for p in floats if p.element_size() < 4}
        if halves:
            self.notes.append(f"the weights are {', '.join(sorted(halves))}: what they lost before is not seen")
        made.float()
        for module in made.modules():
            module.training = module.training and isinstance(module, _KEEP_MODE)
            if isinstance(module, nn.RNNBase):
                module.dropout = 0.0
        for parameter in made.parameters():
            parameter.grad = None
        return made

    # Runs

    def exact(self, batch: int = 0) -> tuple[Exact, ErrorMeter]:
        """Run the step in fp32 with shadows, and return the exact one."""
        self.passes.add("exact")
        with self._started(Policy.parse("32-true")) as applied, metering(self.model, local=False) as meter:
            value, _ = self._step(applied, batch, 1.0, meter)
            shadow = meter.shadows.of(value)
            gradients, weights, fp32 = {}, {}, {}
            for name, parameter in self.taking():
                if parameter.grad is not None:
                    gradients[name] = sampled(meter.shadows.of(parameter.grad)).clone()
                    weights[name] = parameter.numel() / max(gradients[name].numel(), 1)
                    fp32[name] = _relative(sampled(parameter.grad), gradients[name])
            total = sum(float(g.square().sum()) * weights[n] for n, g in gradients.items())
            wrong = sum(float(g.square().sum()) * weights[n] * fp32[n] ** 2 for n, g in gradients.items() if total)
            made = Exact(
                gradient_fp32=(wrong / total) ** 0.5 if total else 0.0,
                value=shadow.clone(),
                gradients=gradients,
                weights=weights,
                fp32=fp32,
                loss_fp32=_relative(value.detach(), shadow),
            )
        return made, meter

    def effect(self, policy: Policy, exact: Exact, batch: int = 0, *, what: str = "joint", scale: float | None = None,
               around: Callable[[], Any] = nullcontext) -> Effect:  # fmt: skip
        """Run the step under a policy and hold it against the exact one.

        Args:
            policy: To put on.
            exact: Of the same batch.
            batch: Which batch.
            what: What the pass is counted as.
            scale: Loss scale; None takes 2^16 for policies that scale, halved until no gradient overflows.
            around: Makes a context that the step runs in.
        """
        if scale is None:
            scale = SCALE if policy.base.loss_scaling else 1.0
        while True:
            self.passes.add(what)
            try:
                with self._started(policy) as applied, around():
                    value, gradients = self._step(applied, batch, scale, None)
            except RuntimeError as error:
                if not policy.rules or isinstance(error, torch.OutOfMemoryError):
                    raise
                return self._does_not_run(policy, error)
            effect = exact.effect(value.detach().double(), gradients, str(policy), scale)
            routine = policy.base.loss_scaling and scale > 1 and bool(torch.isfinite(value).all())
            if effect.finite or not routine:
                return effect
            scale /= 16.0 if scale > 16 else scale

    def _does_not_run(self, policy: Policy, error: RuntimeError) -> Effect:
        """Return the effect of islands between which tensors meet in two formats: as wrong as can be."""
        said = f"some islands do not run, and were not taken: {str(error).splitlines()[0]}"
        if said not in self.notes:
            self.notes.append(said)
        return Effect(policy=str(policy), loss_error=float("inf"))

    def gradients(self, batch: int = 0) -> dict[str, torch.Tensor]:
        """Return the gradients in fp32, whole."""
        self.passes.add("updates")
        with self._started(Policy.parse("32-true")) as applied:
            self._step(applied, batch, 1.0, None)
            return {name: p.grad.detach().clone() for name, p in self.taking() if p.grad is not None}

    def loss_once(self, batch: int = 0) -> torch.Tensor:
        """Return a scalar of one fp32 forward, for a backward of somebody else's."""
        self.passes.add("fp8")
        value = self._value(self.model, self.batches[batch])
        return value.reshape(()) if value.numel() == 1 else (value.float() * self._direction(value)).sum()

    def read(self, policy: Policy, scale: float, batch: int = 0) -> Metered:
        """Run the step under a policy with a meter on it."""
        self.passes.add("metered")
        with self._started(policy) as applied, metering(self.model) as meter:
            self._step(applied, batch, scale, meter)
            with _disable_current_modes():  # looking is no part of the step
                errors = {name: meter.reached(p.grad) for name, p in self.taking() if p.grad is not None}
                buffers = {name: (b.detach().clone(), meter.shadows.of(b).clone())
                           for name, b in self.model.named_buffers() if b.is_floating_point()}  # fmt: skip
        return Metered(
            readings=tuple(meter.readings),
            gradient_errors=errors,
            stalled_buffers=stalled_buffers(self._weights, buffers),
            unmeasured=dict(meter.unmeasured),
        )

    def plain(self, seed: int, batch: int = 0) -> torch.Tensor:
        """Return the fp32 value of the forward alone, with random numbers of a seed."""
        self.passes.add("checks")
        with self._started(Policy.parse("32-true"), seed), torch.no_grad():
            return self._value(self.model, self.batches[batch]).detach().clone()

    @contextmanager
    def _started(self, policy: Policy, seed: int | None = None) -> Iterator[AppliedPrecision]:
        """Context in which the policy is on; weights, buffers, gradients and random numbers are as at the start."""
        devices = [d for d in {p.device for p in self.model.parameters()} if d.type == "cuda"]
        with ExitStack() as stack:
            stack.enter_context(python_random_kept())
            stack.enter_context(torch.random.fork_rng(devices=[d.index or 0 for d in devices]))
            if self.hardware.kind == "cuda" and not devices:
                stack.enter_context(cuda_autocast())
            if "fp16" in policy.formats and self._recurrent:
                stack.enter_context(_without_onednn())
            if "fp16" in policy.formats and not devices:
                stack.enter_context(FP16Products())
            torch.manual_seed(self.seed if seed is None else seed)
            before = {name: (tensor._version, tensor.data_ptr()) for name, tensor in _tensors(self.model)}
            applied = apply_precision(self.model, policy)
            try:
                yield applied
            finally:
                applied.undo()
                with torch.no_grad():
                    for name, tensor in _tensors(self.model):
                        if before[name] != (tensor._version, tensor.data_ptr()):  # written, or cast and cast back
                            tensor.copy_(self._weights[name])
                for parameter in self.model.parameters():
                    parameter.grad = None

    def _step(
        self, applied: AppliedPrecision, batch: int, scale: float, meter: ErrorMeter | None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        if meter is not None:
            for name, tensor in _tensors(self.model):
                if tensor.is_floating_point():
                    meter.shadows.set(tensor, self._weights[name].double())
            meter.enter("forward")
        with torch.enable_grad() if self.backward else torch.no_grad():
            with applied.autocast():
                value = self._value(self.model, self.batches[batch])
            if self.backward:
                self._backward(value, scale, meter)
        with _disable_current_modes():  # looking is no part of the step
            gradients = {name: sampled(p.grad).double() / scale for name, p in self.taking() if p.grad is not None}
        return value, gradients

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
        loss.backward()

    def _direction(self, value: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        made = torch.randn(value.shape, generator=generator) / value.numel()
        return made.to(value.device)

    def _value(self, model: nn.Module, batch: Any) -> torch.Tensor:
        if self.loss is not None:
            value: Any = self.loss(model, batch)
            if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                raise ModelError(
                    f"the loss function returned a {_kind(value)}", hint="return a floating tensor: a loss, or outputs"
                )
            return value
        return _output(call_model(model, batch), type(model).__name__)

    def taking(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                yield plain_name(name), parameter


@contextmanager
def _without_onednn() -> Iterator[None]:
    """Run recurrent layers by torch's own kernels: oneDNN has none in fp16 on most CPUs, and raises."""
    was = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(was)


def _output(output: Any, source: str) -> torch.Tensor:
    """Return the loss of what a model returned, else its first floating tensor."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(loss, torch.Tensor):
        return loss
    leaves = tree_leaves(dict(output) if isinstance(output, Mapping) else output)
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            return leaf
    kinds = ", ".join(sorted({_kind(leaf) for leaf in leaves})) or _kind(output)
    raise ModelError(
        f"{source} returned no floating tensor ({kinds})",
        hint="pass loss=(model, batch) -> tensor that makes one of it",
    )


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"tensor of {str(value.dtype).removeprefix('torch.')}"
    return type(value).__name__


def _detached(batch: Any) -> Any:
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, torch.Tensor) else leaf, batch)


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _relative(value: torch.Tensor, exact: torch.Tensor) -> float:
    size = float(exact.double().square().sum().sqrt())
    error = float((value.double() - exact.double()).square().sum().sqrt())
    if error != error:
        return float("inf")
    return error / size if size else (float("inf") if error else 0.0)
