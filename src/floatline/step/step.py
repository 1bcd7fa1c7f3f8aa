"""The one training step. Every command of Floatline runs this loop body, each under another observer.

    for each micro-batch:  forward and loss under the policy's autocast, weighted by its targets, scaled, backward
    then once:             unscale, judge, clip, update, schedule, forget the gradients

The maths is that of a bare PyTorch loop; what is added is the weighting (micro-batches sum up to the full batch) and
the verdict (a non-finite update is not made; guard.py says what else happens).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from floatline.errors import ConfigError
from floatline.hardware import Hardware
from floatline.precision import Policy, extend_precision
from floatline.step.accumulation import Accumulation
from floatline.step.agreement import Agreement
from floatline.step.batch import Batch, LossFunction, default_loss, move, scalar, target_count
from floatline.step.guard import Guard
from floatline.step.interruption import Interruption
from floatline.step.live_buffers import LiveBuffers
from floatline.step.monitor import GradientMonitor
from floatline.step.norm import GradientNorms, norms_of
from floatline.step.optimizers import OptimizerFactory, load_optimizer
from floatline.step.output import StepOutput
from floatline.step.parameter_names import ParameterNames
from floatline.step.prepared import Prepared
from floatline.step.random_state import generators, set_generators
from floatline.step.readback import Readback
from floatline.step.rollback import Rollback
from floatline.step.schedule import Schedule, advance, make_schedule
from floatline.step.sentinel import Judged, Rerun, Sentinel
from floatline.step.shares import weighted
from floatline.step.silent import SilentTrouble
from floatline.step.undisturbed import undisturbed
from floatline.step.verdict import Alarm
from floatline.techniques import Technique
from floatline.techniques.distributed.shards import laid_out_like


class TrainStep:
    """One optimizer update of `model`, in a given precision, guarded.

    Args:
        model: Any module, on its device. Changed in place by the precision policy; `undo()` takes that back.
        optimizer: An optimizer over the model's parameters, or a `callable(params) -> Optimizer`.
        precision: A policy, its string, or "auto" for the best that the model's device can do.
        loss: `(model, batch) -> scalar`, a mean over targets; None takes the model's own loss.
        max_grad_norm: Gradients are scaled down to this total 2-norm; None leaves them.
        guard: Limits on skipped updates; None for the defaults. The guard itself cannot be switched off.
        techniques: Techniques or their texts ("checkpointing(every=2)"), applied in the order of their stages.
        schedule: Stepped once an update, also when the update was skipped, so that it ends with the data. Or a
            `callable(optimizer) -> schedule`, for techniques may replace the optimizer.
        count: `batch -> number of targets`, the weight of a micro-batch; None for `batch.target_count`.
        hardware: Whose rules hold for precision and techniques: a GPU of the catalog ("t4") whose step a planner
            watches on (fake) CPU tensors; None is the device that the model is on.

    Attributes:
        monitor: A GradientMonitor that is fed with the norms of each update; None, the default, for none.
        rollback: Snapshots; register in its `extras` what is to go back with the weights.
        silent: What was last seen of silent trouble.

    Raises:
        PrecisionError: The policy is malformed, illegal on the hardware, or does not fit the model.
        ConfigError: `max_grad_norm` is not positive, `guard` is no Guard, the model has nothing to train, a technique
            cannot be applied, or no hardware has that name.

    Example:
        >>> model = nn.Linear(4, 1)
        >>> step = TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.1), precision="32-true",
        ...                  loss=lambda model, batch: model(*batch).square().mean())
        >>> bool(step((torch.ones(2, 4),)).applied)
        True
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | OptimizerFactory,
        precision: str | Policy = "auto",
        loss: LossFunction | None = None,
        max_grad_norm: float | None = 1.0,
        guard: Guard | None = None,
        techniques: Sequence[Technique | str] = (),
        schedule: Schedule | Callable[[torch.optim.Optimizer], Schedule] | None = None,
        count: Callable[[Batch], Any] | None = None,
        hardware: Hardware | str | None = None,
    ) -> None:
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ConfigError(f"max_grad_norm is {max_grad_norm}", hint="give a positive number, or None")
        guard = Guard() if guard is None else guard
        if not isinstance(guard, Guard):
            raise ConfigError(f"guard is {guard!r}", hint='give fl.Guard(on_fault="skip"), or None for the defaults')
        self.model = model
        self.loss = loss or default_loss
        self.max_grad_norm = max_grad_norm
        self.count = count or (lambda batch: target_count(model, batch))
        self.updates = 0
        prepared = Prepared(model, optimizer, precision, max_grad_norm, techniques, hardware)
        self.device, self.hardware, self.stack = prepared.device, prepared.hardware, prepared.stack
        self.policy, self.precision_reason, self.precision = prepared.policy, prepared.reason, prepared.precision
        self.optimizer, self.masters, self.scaling = prepared.optimizer, prepared.masters, prepared.scaling
        self.ranks = self.stack.ranks
        self.schedule = make_schedule(schedule, self.optimizer)
        self._prepared = prepared
        self._names = ParameterNames(model, self.masters)
        self._in_backward: Any = self.optimizer if hasattr(self.optimizer, "before_backward") else None
        self._make_guard(guard)

    def _make_guard(self, guard: Guard) -> None:
        """Make what judges, keeps and goes back.

        Raises:
            ConfigError: `before-backward` where every forward needs its backward.
        """
        self.guard = guard
        self.agreement = Agreement(self.model, self.ranks, self.device)
        self.monitor: GradientMonitor | None = None
        self.buffers = LiveBuffers(self.model)
        sharded = self.stack.find("sharding") is not None
        self._interruption = Interruption(self.model, self.optimizer, self.buffers, sharded)
        self.sentinel = Sentinel(guard, loss_scaling=self.scaling.active)
        carries = any(self.stack.find(name) is not None for name in ("master_weights", "kahan", "stochastic_rounding"))
        self.silent = SilentTrouble(self.model, guard.sample_every, self.sentinel.alarm, self.buffers, carries)
        self.sentinel.on_number = self.silent.number
        self.rollback = Rollback(guard, self.model, self, self.agreement.any)
        together = sharded or self.agreement.wrapped
        self._early = guard.reads_early(self.device, together)

    def __call__(self, batch: Batch | list[Batch]) -> StepOutput:
        """Run one update on a batch, or on a list of micro-batches.

        Raises:
            NonFiniteError: The guard's limit of skipped updates in a row is reached. The weights are untouched.
            ModelError: The model returns no scalar loss.
            ConfigError: No micro-batch; several, where the update happens in the backward; ranks with batches of
                different kinds; or, before torch 2.13, a sharded model whose backward an exception has ended.
        """
        micro_batches = batch if isinstance(batch, list) else self.stack.split(batch)
        if self._in_backward and len(micro_batches) > 1:
            raise ConfigError(
                f"{len(micro_batches)} micro-batches, but the optimizer steps in the backward of each",
                hint="give one batch an update, or drop optimizer_in_backward",
            )
        self.rollback.begin()
        with self.silent.measuring(self.updates + 1) if self._looks() else nullcontext(), self._interruption:
            accumulated = self._accumulate(micro_batches)
        with self.stack.update():
            return self._update(accumulated)

    def _looks(self) -> bool:
        """Say whether the coming update is one at which silent trouble is looked for; hooks would compile anew."""
        return self.silent.due(self.updates + 1) and self.stack.find("compile") is None

    # The loop body: for each micro-batch ...

    def _accumulate(self, micro_batches: list[Batch]) -> Accumulation:
        """Forward and backward of each micro-batch; one may be left out before its backward."""
        accumulation = Accumulation(self.buffers, self._early, stops=self.guard.on_fault == "stop")
        for micro_batch, weight in weighted(micro_batches, self.count, self.ranks):
            if accumulation.stopped:
                break
            accumulation.begin(self._rerun_of(micro_batch))
            with self.stack.during():
                share = accumulation.share(self._forward(micro_batch), weight)
                if share is None:  # it was left out
                    continue
                if self._in_backward:
                    self._in_backward.before_backward(share)
                self.scaling.scale(share).backward()
            accumulation.add(share)
        accumulation.end(self.agreement)
        return accumulation

    def _forward(self, micro_batch: Batch) -> torch.Tensor:
        with self.stack.around(), self.precision.autocast():
            loss: torch.Tensor = scalar(self.loss(self.model, move(micro_batch, self.device)))
        return loss

    # ... then once

    def _update(self, accumulated: Accumulation) -> StepOutput:
        """Judge, clip and step with the gradients that were accumulated."""
        loss = accumulated.loss
        if accumulated.none:
            nothing = torch.full_like(loss, float("nan"), dtype=torch.float32)
            return self._close(accumulated, nothing, torch.zeros_like(loss, dtype=torch.bool), None)
        self.masters.pull_gradients()
        self.scaling.unscale(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norms = self._norms(accumulated, parameters)
        grad_norm = norms.total if norms is not None else self._in_backward.gradient_norm()
        grad_norm = grad_norm.to(loss.device)  # of gradients that are kept in host memory it comes from there
        finite = self.sentinel.judge(loss, grad_norm, accumulated.buffers)
        self._clip_gradients(parameters, grad_norm)
        looks = self.silent.due(self.updates + 1)
        if looks:
            self.silent.before_update(parameters)
        if not self._in_backward:  # else it was made there, and asking for the verdict would wait for the device
            self.sentinel.make_update(self.optimizer, finite)
        if looks:
            groups, scale = self.optimizer.param_groups, self.scaling.tensor()
            self.silent.after_update(self.updates + 1, parameters, groups, scale, finite)
        self.masters.push_weights()
        return self._close(accumulated, grad_norm, finite, norms)

    def _norms(self, accumulated: Accumulation, parameters: list[torch.Tensor]) -> GradientNorms | None:
        """Return the norms of the gradients, None where the backward has used them up; the monitor sees them too."""
        if self._in_backward:
            return None
        accumulated.make_up_for_lost(parameters)
        norms = norms_of(zip(self._names.of(parameters), parameters, strict=True))
        if self.monitor is not None:
            report = self.monitor.check(norms)
            if report.large and self.monitor.history.large_updates == 1:
                self.sentinel.alarm(Alarm(report.step, "large gradient", str(report), report.hint))
        return norms

    def _clip_gradients(self, parameters: list[torch.Tensor], grad_norm: torch.Tensor) -> None:
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.max_grad_norm, grad_norm)

    def _close(
        self,
        accumulated: Accumulation,
        grad_norm: torch.Tensor,
        finite: torch.Tensor,
        norms: GradientNorms | None = None,
    ) -> StepOutput:
        """End the update: put back what must not stay, go on with scale and schedule, count, go back if need be."""
        loss, buffers, made = accumulated.loss, accumulated.buffers, not accumulated.none
        on_device = self.scaling.tensor() if loss.is_cuda else None
        reading = Readback.of([each for each in (loss, grad_norm, buffers, on_device) if each is not None])
        self.buffers.settle(finite)
        scale = self.scaling.current() if not loss.is_cuda else None
        self.scaling.update(loss)
        advance(self.schedule, first=self.updates == 0)
        left_out, reruns = tuple(accumulated.left_out), tuple(accumulated.reruns)
        judged = Judged(self.updates + 1, reading, norms, left_out, made, scale, reruns, on_device is not None)
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        left = tuple(place for place, _ in left_out) if made else ()
        return StepOutput(loss, grad_norm, finite, left, self._go_on_or_back(judged))

    def _go_on_or_back(self, judged: Judged) -> int | None:
        """Count the verdict and take the snapshot that is due; returns where the guard went back to, if it did."""
        back = self.rollback.answer(self.sentinel.record(judged), self.sentinel)
        if back is not None or not self.rollback.due(self.updates):
            return back
        back = self.read_verdict()  # a snapshot waits for the device anyway
        if back is None:
            self.rollback.after_update(self.updates)
        return back

    def read_verdict(self) -> int | None:
        """Read the verdict of the last update, which on CUDA may still be on its way, and go back if it says so.

        Call it before what must not rest on a fault: a checkpoint, the end.

        Returns:
            The number of updates that the guard went back to, None where it did not.
        """
        return self.rollback.answer(self.sentinel.flush(), self.sentinel)

    # Beside the loop

    def warm_up(self, batch: Batch | list[Batch]) -> dict[str, float]:
        """Run forward and backward of a batch without an update, so that what compiles lazily has compiled.

        Weights, optimizer, buffers, gradients, random numbers and the guard are as before.

        Returns:
            What the techniques counted, as `stack.facts()`: `compile.graphs`, `compile.compile_s` ...

        Raises:
            ConfigError: The optimizer updates in the backward, so there is no backward without an update.
        """
        if self._in_backward:
            raise ConfigError(
                "a warm-up runs a backward without an update, but optimizer_in_backward updates there",
                hint="leave the warm-up out, the first update compiles",
            )
        with undisturbed(self.model), self._interruption:
            self._accumulate(batch if isinstance(batch, list) else self.stack.split(batch))
        return self.stack.facts()

    def _rerun_of(self, micro_batch: Batch) -> Rerun | None:
        return Rerun(micro_batch, generators(self.device)) if self.sentinel.on_fault is not None else None

    def rerun(self, rerun: Rerun, scaled: bool = True) -> torch.Tensor:
        """Run the forward of a micro-batch as it was run, random numbers and all; returns the loss.

        Args:
            rerun: What the guard kept of it.
            scaled: With the loss scale on it, as it went into the backward.
        """
        set_generators(rerun.random, self.device)
        with self.stack.during():
            loss = self._forward(rerun.batch)
        return self.scaling.scale(loss) if scaled else loss

    def add_island(self, module: str) -> Policy:
        """Compute one more module in fp32 from now on; returns the policy with the rule for it.

        Args:
            module: Its dotted name.

        Raises:
            PrecisionError: The policy casts the weights themselves, or the module cannot be an island.
        """
        self.policy = extend_precision(self.precision, self.model, f"{module}=32")
        return self.policy

    def undo(self) -> None:
        """Take precision and techniques off the model again; the optimizer gets the model's parameters back."""
        self._prepared.undo()

    def state_dict(self) -> dict[str, Any]:
        """Return everything an exact resume needs besides the model's own weights."""
        return {
            "updates": self.updates,
            "optimizer": self.optimizer.state_dict(),
            "scaling": self.scaling.state_dict(),
            "masters": self.masters.state(),
            "guard": self.sentinel.state_dict(),
            "rollback": self.rollback.state_dict(),
            "schedule": self.schedule.state_dict() if self.schedule is not None else {},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned, after the model's weights were loaded.

        Tensors may be whole or in shards, whichever way this step has them.
        """
        self.updates = state["updates"]
        load_optimizer(self.optimizer, state["optimizer"])
        self.scaling.load_state_dict(state["scaling"])
        masters = zip(state["masters"], self.masters.state(), strict=True)
        self.masters.load_state([laid_out_like(saved, master) for saved, master in masters])
        self.sentinel.load_state_dict(state["guard"])
        self.rollback.load_state_dict(state.get("rollback", {"total": 0}))  # of a run that did not go back
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
