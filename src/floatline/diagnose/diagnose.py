"""Run a step under watch and report the first op that made it not finite, why, and whether the remedy helps.

    finding = fl.diagnose(lambda: loss(model(x), y), model)
    print(finding)

Forward, backward and, if given, the optimizer's step run in eager mode. What is damaged decides: the origins of a loss,
a gradient or a weight that is not finite are asked, the earliest one is the finding, and the phase is that of the
damage: "backward" says that the loss was finite and a gradient is not. If nothing is damaged there is no finding,
whatever infinities were made and discarded on the way. Model, optimizer, gradients and random numbers are as before
afterwards, also when the program stops with an error.

Not covered: what happens outside of torch's ops (numpy, custom kernels without decomposition are one op); faults that
differ from call to call, of which one call is seen; of two faults in different rows of one tensor the earlier one is
told, even if only the other one's rows go on.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from floatline.diagnose.finding import Finding
from floatline.diagnose.kept import SavingWrites, Written, everything_kept
from floatline.diagnose.names import Names
from floatline.diagnose.telling import bad_before, first_of, tell, untraced
from floatline.errors import ConfigError
from floatline.observe.finite import Kind, Origin, Watch, backward, is_bad, watching
from floatline.observe.real import tensors_in

Forward = Callable[[], torch.Tensor]


def diagnose(
    forward: Forward,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    cures: bool = True,
) -> Finding | None:
    """Find the origin of a loss, gradient or weight that is not finite.

    Args:
        forward: () -> scalar loss, under the autocast and on the batch that failed. It may be called several times.
        model: The module that it runs, for names.
        optimizer: Its step is watched as well, on the gradients that the backward made.
        cures: Run the step again with the remedy, to say whether it cures it.

    Returns:
        The finding; None where loss, gradients, weights and buffers are finite.

    Raises:
        ConfigError: `forward` is not callable or returns no scalar tensor, `model` is no module or a lazy one, or
            `optimizer` is no optimizer.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> finding = diagnose(lambda: (layer(torch.ones(3, 2)).sum() * 0).log(), layer)
        >>> finding.phase, finding.op, finding.cause_name
        ('forward', 'log', 'log of zero')
    """
    if not callable(forward):
        raise ConfigError(f"forward is a {type(forward).__name__}", hint="pass a function: lambda: loss(model(x), y)")
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model is a {type(model).__name__}", hint="pass the torch.nn.Module that forward runs")
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        name = getattr(optimizer, "__name__", type(optimizer).__name__)
        raise ConfigError(f"optimizer is {name}", hint="pass the torch.optim.Optimizer that steps the model, or None")
    unmade = [name for name, value in [*model.named_parameters(), *model.named_buffers()] if is_lazy(value)]
    if unmade:
        raise ConfigError(f"{unmade[0]} has no values yet", hint="run the model once on a batch, then diagnose it")
    return Diagnosis(forward, model, optimizer).run(cures)


@dataclass(frozen=True)
class Damage:
    """What was found damaged, and the origins of it.

    Attributes:
        phase: "forward", "backward" or "optimizer".
        origins: Where it came from.
        tensor: The parameter, gradient, state or buffer, by name.
    """

    phase: str
    origins: tuple[Origin, ...]
    tensor: str = ""


class Diagnosis:
    """One diagnosis; `run` does it.

    Args:
        forward: As for `diagnose`.
        model: As for `diagnose`.
        optimizer: As for `diagnose`.
    """

    def __init__(self, forward: Forward, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.forward = forward
        self.model = model
        self.optimizer = optimizer
        self.names = Names(model, forward, optimizer)
        self._raised = ""  # the error that forward ended with
        self._buffers_hurt: set[str] = set()

    def run(self, cures: bool = True) -> Finding | None:
        """Return the finding, None where nothing is wrong."""
        with everything_kept(self.model, self.optimizer, self._leaves()) as copies:
            damage = self._watched(copies)
        if damage is None:
            return bad_before(self.model)
        if not damage.origins:
            return untraced(damage.phase, damage.tensor)
        origin = first_of(damage.origins)
        return tell(origin, damage.phase, damage.tensor, self.model, self.names, self.replay if cures else None)

    # Under watch

    def _watched(self, copies: Written) -> Damage | None:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            watching(self.model) as watch,
            self.names.of_arguments(self.model),
        ):
            watch.before_write = copies.save
            return self._step(watch)

    def _step(self, watch: Watch) -> Damage | None:
        watch.enter("forward")
        try:
            loss = self.forward()
        except Exception as error:
            refused = _refused(watch, error)
            if not refused:
                raise
            self._raised = type(error).__name__
            return Damage("forward", refused)
        loss = _scalar(loss)
        if is_bad(loss):
            return Damage("forward", _origins(watch, [loss]))
        return self._backward(watch, loss) or self._buffers(watch) or self._update(watch)

    def _backward(self, watch: Watch, loss: torch.Tensor) -> Damage | None:
        if not loss.requires_grad:
            return None
        watch.enter("backward")
        backward(loss)
        spoilt = self._bad_gradients()
        return Damage("backward", _origins(watch, [g for _, g in spoilt]), spoilt[0][0]) if spoilt else None

    def _buffers(self, watch: Watch) -> Damage | None:
        """A forward may spoil running statistics and still have a finite loss."""
        for name, buffer in self.model.named_buffers():
            origins = tuple(o for o in watch.ledger.of(buffer) if o.kind in (Kind.FAULT, Kind.RAW))
            if origins and is_bad(buffer):
                self._buffers_hurt.add(name)
                return Damage("forward", origins, name)
        return None

    def _update(self, watch: Watch) -> Damage | None:
        """Watch the optimizer's step, op by op: fused and foreach kernels are one op for all parameters."""
        if self.optimizer is None:
            return None
        watch.enter("optimizer")
        for group in self.optimizer.param_groups:
            group.update({key: False for key in ("foreach", "fused") if key in group})
        self._step_of(self.optimizer)
        self.names = Names(self.model, self.forward, self.optimizer)
        changed = self._parameters()
        for name, parameter in self._parameters():
            state = self.optimizer.state.get(parameter, {})
            changed += [(f"{key} of {name}", value) for key, value in state.items() if isinstance(value, torch.Tensor)]
        spoilt = [(name, tensor) for name, tensor in changed if is_bad(tensor) and watch.ledger.of(tensor)]
        if not spoilt:
            return None
        origins = _origins(watch, [tensor for _, tensor in spoilt])
        first = first_of(origins)
        return Damage("optimizer", origins, next((n for n, t in spoilt if first in watch.ledger.of(t)), spoilt[0][0]))

    def _step_of(self, optimizer: torch.optim.Optimizer) -> None:
        """Run an update; one that wants to compute the loss itself (LBFGS) may."""

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = _scalar(self.forward())
            backward(loss)
            return loss

        wants = inspect.signature(optimizer.step).parameters.get("closure")
        if wants is not None and wants.default is wants.empty:
            optimizer.step(closure)  # type: ignore[arg-type]
        else:
            optimizer.step()

    def _parameters(self) -> list[tuple[str, torch.Tensor]]:
        found: dict[int, tuple[str, torch.Tensor]] = {id(p): (n, p) for n, p in self.model.named_parameters()}
        for group in self.optimizer.param_groups if self.optimizer is not None else ():
            for place, parameter in enumerate(group["params"]):
                found.setdefault(id(parameter), (f"parameter {place} of the optimizer", parameter))
        return list(found.values())

    def _leaves(self) -> list[torch.Tensor]:
        """Return the tensors beside the model's that a backward gives gradients."""
        return [tensor for tensor in self.names.variables.values() if tensor.is_leaf and tensor.requires_grad]

    def _bad_gradients(self) -> list[tuple[str, torch.Tensor]]:
        return [(name, p.grad) for name, p in self._parameters() if p.grad is not None and is_bad(p.grad)]

    # Again

    def replay(self, around: AbstractContextManager[Any], scale: float = 1.0) -> str:
        """Run forward and backward once more; return what was not finite, "" for nothing.

        Args:
            around: Context that both run in.
            scale: What the loss is multiplied with before the backward.
        """
        leaves = [*self._leaves(), *(p for _, p in self._parameters())]
        with (
            everything_kept(self.model, others=leaves) as copies,
            SavingWrites(copies),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.compiler.set_stance("force_eager"),
            around,
        ):
            try:
                loss = _scalar(self.forward())
            except Exception as error:
                if type(error).__name__ != self._raised:
                    raise
                return f"the program still stops with a {self._raised}"
            if is_bad(loss):
                return f"the loss is {loss.item()}"
            if loss.requires_grad:
                backward(loss * scale)
            spoilt = self._bad_gradients()
            if spoilt:
                return f"the loss is finite then, the gradient of {spoilt[0][0]} is not"
            bad = [name for name, buffer in self.model.named_buffers() if is_bad(buffer) and name in self._buffers_hurt]
            return f"the buffer {bad[0]} is not finite" if bad else ""


def _origins(watch: Watch, spoilt: list[torch.Tensor]) -> tuple[Origin, ...]:
    """Return the origins of what is spoilt; all faults where the ledger does not follow a layout."""
    found = {origin for tensor in spoilt for origin in watch.ledger.of(tensor)}
    return tuple(found) or tuple(o for o in watch.origins if o.phase == watch.phase and o.kind is Kind.FAULT)


def _refused(watch: Watch, error: Exception) -> tuple[Origin, ...]:
    """Return the origins of what a program had at hand where it stopped with an error; () where all of it was finite.

    A check of the user's, `multinomial` and distributions refuse NaN. Other errors have nothing to do with values.
    """
    trace, frames = error.__traceback__, []
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    for frame in reversed(frames):
        bad = [tensor for tensor in tensors_in(list(frame.f_locals.values())) if is_bad(tensor)]
        found = {origin for tensor in bad for origin in watch.ledger.of(tensor) if origin.kind is not Kind.MEANT}
        if found:
            return tuple(found)
    return ()


def _scalar(loss: Any) -> torch.Tensor:
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else f"a {type(loss).__name__}"
        raise ConfigError(f"forward returned {got}, not a scalar loss", hint="return one number: the mean over targets")
    return loss.reshape(())
