"""Optimizer in the backward: each parameter is updated the moment its gradient is complete, and the gradient is freed.

Plain training holds all gradients until the last one exists: 4 bytes a parameter in fp32. A hook on each parameter,
which autograd runs once when the whole gradient has been accumulated (a weight used twice gets the sum), steps just
this parameter and drops the gradient, so that only a few exist at a time. One ordinary optimizer does all the steps
(optim_steps/partial_step.py): its state dict is the plain one, and for optimizers that treat each parameter on its own,
as those of torch.optim do, the numbers are bit for bit those of a plain step without clipping.

What it costs, and cannot be had otherwise:

- No clipping: the total norm is known when the weights have changed. `max_grad_norm` must be None.
- No loss scaling: an overflow, which is routine there, would leave half an update in the weights each time.
- One batch an update: a second micro-batch would meet changed weights.
- The guard sees less. A non-finite loss changes no weight. A non-finite gradient never reaches its parameter nor any
  that comes after it in the backward, but those before it are updated already. The update then counts as skipped.

On CUDA fused Adam and AdamW take the verdict on the device; other optimizers wait for the device once a parameter.

Not covered: backwards that are run inside a backward (reentrant checkpointing) over a weight that is used elsewhere
too: its gradient comes in two parts, which is an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from floatline.errors import ConfigError
from floatline.hardware import Hardware
from floatline.precision import Policy
from floatline.techniques.base import Applied, Stage, Technique
from floatline.techniques.optim_steps.partial_step import step_only
from floatline.techniques.optim_steps.select_step import can_select, step_by_select
from floatline.techniques.optim_steps.wrapped import WrappedOptimizer


@dataclass(frozen=True, kw_only=True)
class OptimizerInBackward(Technique):
    """Update each parameter in the backward, as soon as its gradient exists."""

    name = "optimizer_in_backward"
    stage = Stage.OPTIMIZER
    order = 2
    exact = True
    conflicts: ClassVar = {
        "accumulation": "the weights change in the backward of the first micro-batch; drop accumulation and shrink "
        "activations with checkpointing or a smaller batch",
        "sharding": "FSDP2 hands out gradients after they were summed over the ranks, past the hooks; "
        "it frees and shards gradients itself",
    }

    def conflict_with(self, other: Technique) -> str | None:
        if other.name in ("batching", "packing") and getattr(other, "max_tokens", None) is not None:
            return f"{other.name} with max_tokens makes several micro-batches of a batch; drop max_tokens"
        return super().conflict_with(other)

    def refuses(self, policy: Policy, max_grad_norm: float | None) -> str | None:
        if policy.base.loss_scaling:
            return (
                f"under {policy.base.name} scaled gradients overflow now and then, which is known only when half of "
                "the weights are updated; use bf16-mixed, bf16-true or 32-true"
            )
        if max_grad_norm is not None:
            return (
                f"max_grad_norm is {max_grad_norm}, but the total norm is known only after the updates; "
                "set max_grad_norm=None (in a recipe train.max_grad_norm: null)"
            )
        return None

    def _apply(self, model: nn.Module, hardware: Hardware) -> Applied:
        made: list[BackwardOptimizer] = []

        def convert(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
            made.append(BackwardOptimizer(optimizer))
            return made[-1]

        def undo() -> None:
            for optimizer in made:
                optimizer.remove_hooks()
            made.clear()

        touched = tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad)
        notes: tuple[str, ...] = ()
        if hardware.kind == "cuda":
            notes = ("fused Adam and AdamW take the verdict on the device, others wait for it once a parameter",)
        return Applied(technique=self, touched=touched, undo=undo, notes=notes, optimizer=convert)


class BackwardOptimizer(WrappedOptimizer):
    """Steps another optimizer from hooks, one parameter at a time.

    Args:
        inner: Any optimizer of torch.optim, LBFGS excepted.
    """

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner, OptimizerInBackward.name)
        self._verdict: torch.Tensor | None = None
        self._norms: dict[torch.Tensor, torch.Tensor] = {}
        self._group_of = {parameter: group for group in self.param_groups for parameter in group["params"]}
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._update)
            for parameter in self._group_of
            if parameter.requires_grad
        ]

    def before_backward(self, loss: torch.Tensor) -> None:
        """Note the loss of the backward to come; a backward that is not announced changes nothing."""
        self._norms = {}
        self._verdict = torch.isfinite(loss.detach())

    @torch.no_grad()
    def _update(self, parameter: torch.Tensor) -> None:
        """Judge a parameter's gradient, step the parameter with it, free it."""
        if self._verdict is None or parameter.grad is None:
            return
        if parameter in self._norms:
            raise ConfigError(
                f"a parameter of shape {tuple(parameter.shape)} got its gradient in two parts, and was updated with "
                "the first already",
                hint="checkpoint with use_reentrant=False, or drop optimizer_in_backward",
            )
        norm = torch._foreach_norm([parameter.grad], 2, dtype=torch.float32)[0]
        self._norms[parameter] = norm
        self._verdict = self._verdict & torch.isfinite(norm)
        self._step_if(self._verdict, parameter)
        parameter.grad = None

    def _step_if(self, finite: torch.Tensor, parameter: torch.Tensor) -> None:
        chunk = [(self._group_of[parameter], [parameter])]
        if finite.is_cuda and can_select(self.inner):
            step_by_select(self.inner, finite, lambda: step_only(self.inner, chunk))
        elif finite:
            step_only(self.inner, chunk)

    def gradient_norm(self) -> torch.Tensor:
        """Return the 2-norm over all gradients of the backward just done, 0-d fp32, as the step would have taken it.

        Raises:
            ConfigError: No parameter got a gradient.
        """
        norms = [self._norms[parameter] for parameter in self._group_of if parameter in self._norms]
        self._verdict, self._norms = None, {}
        if not norms:
            raise ConfigError(
                "no gradient reached any parameter of the optimizer", hint="pass it the parameters the loss depends on"
            )
        return torch.linalg.vector_norm(torch.stack(norms))

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Do nothing: the updates have been made."""

    def remove_hooks(self) -> None:
        """Stop updating in the backward."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
