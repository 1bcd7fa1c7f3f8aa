"""The one training step. Every command of Floatline runs this loop body, each under another observer.

    for each micro-batch:  forward and loss under the policy's autocast, weighted by its targets, scaled, backward
    then once:             unscale, judge, clip, update, schedule, forget the gradients

The maths is that of a bare PyTorch loop; what is added is the weighting (micro-batches sum up to the full batch) and
the verdict (a non-finite update is not made; guard.py says what else happens).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn

from floatline.errors import ConfigError
from floatline.hardware import Hardware
from floatline.hardware import resolve as resolve_hardware
from floatline.precision import (
    LossScaling,
    MasterWeights,
    NoLossScaling,
    NoMasterWeights,
    Policy,
    apply_precision,
    extend_precision,
)
from floatline.precision import resolve as resolve_precision
from floatline.step.agreement import Agreement
from floatline.step.batch import Batch, LossFunction, default_loss, move, scalar, target_count
from floatline.step.guard import Guard
from floatline.step.live_buffers import LiveBuffers
from floatline.step.monitor import GradientMonitor
from floatline.step.norm import GradientNorms, norms_of
from floatline.step.optimizers import OptimizerFactory, load_optimizer, make_optimizer, names_of, rebind
from floatline.step.random_state import generators, set_generators
from floatline.step.readback import Readback
from floatline.step.rollback import Rollback
from floatline.step.sentinel import Judged, Rerun, Sentinel
from floatline.step.shares import weighted
from floatline.step.silent import SilentTrouble
from floatline.step.undisturbed import undisturbed
from floatline.step.verdict import Alarm, Skip
from floatline.techniques import Stack, Technique
from floatline.techniques.base import hardware_of
from floatline.techniques.distributed.shards import forget_iteration, laid_out_like
from floatline.techniques.precision import asked_precision


class Schedule(Protocol):
    """Torch's learning-rate schedulers, or anything of their shape."""

    def step(self) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class StepOutput:
    """What one update did. Tensors stay on the device; reading them is the caller's wait.

    Attributes:
        loss: 0-d, weighted mean over the micro-batches, as it was (NaN included).
        grad_norm: 0-d fp32, total 2-norm of the unscaled gradients before clipping.
        applied: 0-d bool, False where the guard skipped the update.
        left_out: Indices of micro-batches without which it was made, because their loss was not finite.
        rolled_back_to: The number of updates that the guard went back to, None where it did not. On CUDA it is the
            update before whose fault is known by now.
    """

    loss: torch.Tensor
    grad_norm: torch.Tensor
    applied: torch.Tensor
    left_out: tuple[int, ...] = ()
    rolled_back_to: int | None = None


@dataclass(frozen=True)
class _Accumulated:
    """What the forwards and backwards of an update gave.

    Attributes:
        loss: 0-d, weighted over the micro-batches that count.
        left_out: Index and loss of those that do not.
        lost: Their share of the targets.
        none: There is no gradient to update with.
        reruns: The micro-batches, where somebody asks for them.
        buffers: What `LiveBuffers.fault` says, of all ranks.
    """

    loss: torch.Tensor
    left_out: tuple[tuple[int, float], ...] = ()
    lost: float = 0.0
    none: bool = False
    reruns: tuple[Rerun, ...] = ()
    buffers: torch.Tensor | None = None


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
        ConfigError: `max_grad_norm` is not positive, the model has nothing to train, a technique cannot be applied, or
            no hardware has that name.

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
        self.model = model
        self.loss = loss or default_loss
        self.max_grad_norm = max_grad_norm
        self.count = count or (lambda batch: target_count(model, batch))
        self.updates = 0
        self._torn = False
        self.device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        self.stack = Stack(techniques)
        self.hardware = hardware_of(model) if hardware is None else resolve_hardware(hardware)
        choice = resolve_precision(asked_precision(precision, self.stack.find("precision")), self.hardware)
        self.policy, self.precision_reason = choice.policy, choice.reason
        self.stack.refuse(self.policy, max_grad_norm)
        names = names_of(model)
        self._exact: dict[str, torch.Tensor] = {}
        self.stack.apply(model, self.hardware, self._apply_precision, self.policy)
        self.ranks = self.stack.ranks
        self._names = names_of(model)
        try:
            self._prepare_optimizer(optimizer, names)
        except BaseException:  # an optimizer that a technique cannot convert
            self.stack.undo()
            raise
        self.schedule = schedule(self.optimizer) if callable(schedule) else schedule
        if getattr(self.schedule, "optimizer", self.optimizer) is not self.optimizer:
            self.schedule.optimizer = self.optimizer  # type: ignore[union-attr]  # it was made for the one replaced
        self._make_guard(guard or Guard())

    def _make_guard(self, guard: Guard) -> None:
        """Make what judges, keeps and goes back.

        Raises:
            ConfigError: `before-backward` where every forward needs its backward.
        """
        self.guard = guard
        self.agreement = Agreement(self.model, self.ranks, self.device)
        self.monitor: GradientMonitor | None = None
        self._ordered: tuple[list[int], list[str]] = ([], [])
        self.buffers = LiveBuffers(self.model)
        self.sentinel = Sentinel(guard, loss_scaling=self.scaling.active)
        carries = any(self.stack.find(name) is not None for name in ("master_weights", "kahan", "stochastic_rounding"))
        self.silent = SilentTrouble(self.model, guard.sample_every, self.sentinel.alarm, self.buffers, carries)
        self.sentinel.on_number = self.silent.number
        self.rollback = Rollback(guard, self.model, self, self.agreement.any)
        together = self.stack.find("sharding") is not None or self.agreement.wrapped
        if together and guard.check == "before-backward":
            raise ConfigError(
                "guard.check is before-backward, but ranks that train together run every backward together",
                hint="use guard.check=after-backward: all ranks leave the update out",
            )
        on_host = guard.check == "before-backward" or (guard.check == "auto" and self.device.type == "cpu")
        self._early = on_host and not together

    def _names_in_order(self, parameters: list[torch.Tensor]) -> list[str]:
        """Return the names of the optimizer's parameters, masters under their weights' names; found once."""
        now = list(map(id, parameters))
        if now != self._ordered[0]:
            names = names_of(self.model)
            pairs = getattr(self.masters, "pairs", ())
            names |= {id(master): names[id(own)] for own, master in pairs if id(own) in names}
            self._ordered = now, [names.get(number, "?") for number in now]
        return self._ordered[1]

    def _apply_precision(self) -> Callable[[], None]:
        trainable = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if not trainable:
            raise ConfigError(f"{type(self.model).__name__} has no trainable parameters", hint="unfreeze some of them")
        if self.policy.base.master_weights:
            self._exact = {name: parameter.detach().clone() for name, parameter in trainable.items()}
        self.precision = apply_precision(self.model, self.policy, self.hardware)
        return self.precision.undo

    def _prepare_optimizer(self, optimizer: torch.optim.Optimizer | OptimizerFactory, names: dict[int, str]) -> None:
        base = self.policy.base
        made = make_optimizer(optimizer, self.model, names)
        self.masters = NoMasterWeights()
        if base.master_weights:
            now = dict(self.model.named_parameters())
            exact: dict[torch.Tensor, torch.Tensor] = {
                now[name]: laid_out_like(value, now[name])
                for name, value in self._exact.items()
                if now[name].shape == value.shape
            }
            self.masters = MasterWeights(made, exact)
            self._exact.clear()
        self.optimizer = self.stack.convert(made)
        self.scaling = LossScaling(self.device.type) if base.loss_scaling else NoLossScaling()
        self._in_backward: Any = self.optimizer if hasattr(self.optimizer, "before_backward") else None

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
        with self.silent.measuring(self.updates + 1) if self._looks() else nullcontext():
            accumulated = self._accumulate_or_forget(micro_batches)
        with self.stack.update():
            return self._update(accumulated)

    def _looks(self) -> bool:
        """Say whether the coming update is one at which silent trouble is looked for; hooks would compile anew."""
        return self.silent.due(self.updates + 1) and self.stack.find("compile") is None

    def _update(self, accumulated: _Accumulated) -> StepOutput:
        """Judge, clip and step with the gradients that were accumulated."""
        loss = accumulated.loss
        if accumulated.none:
            nothing = torch.full_like(loss, float("nan"), dtype=torch.float32)
            return self._close(accumulated, nothing, torch.zeros_like(loss, dtype=torch.bool))
        self.masters.pull_gradients()
        self.scaling.unscale(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norms = None
        if self._in_backward:
            grad_norm = self._in_backward.gradient_norm()
        else:
            self._make_up_for(accumulated.lost, parameters)
            norms = norms_of(zip(self._names_in_order(parameters), parameters, strict=True))
            grad_norm = norms.total
            if self.monitor is not None:
                self._monitored(self.monitor, norms)
        grad_norm = grad_norm.to(loss.device)  # of gradients that are kept in host memory it comes from there
        buffers = accumulated.buffers
        finite = self.sentinel.judge(loss, grad_norm, buffers)
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
        return self._close(accumulated, grad_norm, finite, norms, buffers)

    def _monitored(self, monitor: GradientMonitor, norms: GradientNorms) -> None:
        report = monitor.check(norms)
        if report.large and monitor.history.large_updates == 1:
            self.sentinel.alarm(Alarm(report.step, "large gradient", str(report), report.hint))

    def _make_up_for(self, lost: float, parameters: list[torch.Tensor]) -> None:
        """Weigh the micro-batches that are left as if the others had never been there."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if lost and gradients:
            torch._foreach_mul_(gradients, 1.0 / (1.0 - lost))

    def _close(
        self,
        accumulated: _Accumulated,
        grad_norm: torch.Tensor,
        finite: torch.Tensor,
        norms: GradientNorms | None = None,
        buffers: torch.Tensor | None = None,
    ) -> StepOutput:
        """End the update: put back what must not stay, go on with scale and schedule, count, go back if need be."""
        loss = accumulated.loss
        reading = Readback.of([loss, grad_norm, *([buffers] if buffers is not None else [])])
        self.buffers.settle(finite)
        scale = self.scaling.current() if not loss.is_cuda else None
        self.scaling.update(loss)
        self._step_schedule()
        made, reruns = not accumulated.none, accumulated.reruns
        judged = Judged(self.updates + 1, reading, norms, accumulated.left_out, made, scale, reruns)
        left = tuple(place for place, _ in accumulated.left_out)
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        back = self._go_back(self.sentinel.record(judged))
        if back is None and self.rollback.due(self.updates):  # a snapshot waits for the device anyway
            back = self.read_verdict()
        if back is None:
            self.rollback.after_update(self.updates)
        return StepOutput(loss, grad_norm, finite, left if not accumulated.none else (), back)

    def read_verdict(self) -> int | None:
        """Read the verdict of the last update, which on CUDA may still be on its way, and go back if it says so.

        Call it before what must not rest on a fault: a checkpoint, the end.

        Returns:
            The number of updates that the guard went back to, None where it did not.
        """
        return self._go_back(self.sentinel.flush())

    def _go_back(self, skip: Skip | None) -> int | None:
        if skip is None or not skip.fault or skip.made or not self.guard.goes_back:
            return None
        counted = self.sentinel.counts()  # an update after it, whose verdict is on its way, has never been
        back = self.rollback.go_back(skip)
        self.sentinel.load_state_dict(counted)  # what was counted stays counted
        self.sentinel.skips[-1] = replace(skip, rolled_back_to=back)
        return back

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
        with undisturbed(self.model):
            self._accumulate_or_forget(batch if isinstance(batch, list) else self.stack.split(batch))
        return self.stack.facts()

    def rerun(self, rerun: Rerun, scaled: bool = True) -> torch.Tensor:
        """Run the forward of a micro-batch as it was run, random numbers and all; returns the loss.

        Args:
            rerun: What the guard kept of it.
            scaled: With the loss scale on it, as it went into the backward.
        """
        set_generators(rerun.random, self.device)
        with self.stack.during(), self.stack.around(), self.precision.autocast():
            loss = scalar(self.loss(self.model, move(rerun.batch, self.device)))
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

    def _accumulate_or_forget(self, micro_batches: list[Batch]) -> _Accumulated:
        """Accumulate all of an update's gradients; after an exception none is left for the next update to find."""
        if self._torn:
            raise ConfigError(
                f"an exception has ended an earlier update, from which FSDP2 of torch {torch.__version__} has not "
                "recovered: it would reduce no gradients any more",
                hint="make model and step anew and load the newest checkpoint; torch 2.13 and newer recover",
            )
        try:
            return self._accumulate(micro_batches)
        except BaseException:
            self.model.zero_grad(set_to_none=True)  # of shards: those that are gathered just now
            self._torn = self.stack.find("sharding") is not None and not forget_iteration(self.model)
            self.optimizer.zero_grad(set_to_none=True)
            raise

    def _accumulate(self, micro_batches: list[Batch]) -> _Accumulated:
        """Forward and backward of each micro-batch; one may be left out before its backward."""
        total: torch.Tensor | None = None
        left_out: list[tuple[int, float]] = []
        reruns: list[Rerun] = []
        lost, loss = 0.0, None
        for place, (micro_batch, weight) in enumerate(weighted(micro_batches, self.count, self.ranks)):
            if place == 0:
                self.buffers.keep()
            elif self._early:
                self.buffers.mark()
            if self.sentinel.on_fault is not None:
                reruns.append(Rerun(micro_batch, generators(self.device)))
            with self.stack.during():
                with self.stack.around(), self.precision.autocast():
                    loss = scalar(self.loss(self.model, move(micro_batch, self.device)))
                value = loss.item() if self._early else 0.0
                if value - value != 0.0:
                    self.buffers.leave_out_last()
                    left_out.append((place, value))
                    lost += 1.0 if weight is None else float(weight)
                    if self.guard.on_fault == "stop":  # with the weights as they were
                        return _Accumulated(loss.detach(), tuple(left_out), lost, True, tuple(reruns))
                    continue
                if weight is not None:
                    loss = loss.float() * weight
                if self._in_backward:
                    self._in_backward.before_backward(loss)
                self.scaling.scale(loss).backward()
            total = loss.detach() if total is None else total + loss.detach()
        if loss is None:
            raise ConfigError(
                "an update needs at least one micro-batch, the list is empty", hint="leave out updates without data"
            )
        if total is None:
            return _Accumulated(loss.detach(), tuple(left_out), lost, True, tuple(reruns))
        if lost:
            total = total / (1.0 - lost)
        total, buffers = self.agreement.numbers(total, self.buffers.fault())
        return _Accumulated(total, tuple(left_out), lost, False, tuple(reruns), buffers)

    def _step_schedule(self) -> None:
        if self.schedule is None:
            return
        with warnings.catch_warnings() if self.updates == 0 else nullcontext():
            if self.updates == 0:  # torch takes a skipped first update, or a replaced optimizer, for a wrong order
                warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
                warnings.filterwarnings("ignore", message=r"Seems like `optimizer.step\(\)` has been overridden")
            self.schedule.step()

    def _clip_gradients(self, parameters: list[torch.Tensor], grad_norm: torch.Tensor) -> None:
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.max_grad_norm, grad_norm)

    def undo(self) -> None:
        """Take precision and techniques off the model again; the optimizer gets the model's parameters back."""
        self.masters.undo()
        self.stack.undo()
        rebind(self.optimizer, self._names, self.model)

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
