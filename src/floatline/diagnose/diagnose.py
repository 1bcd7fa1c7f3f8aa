"""Run a step under watch and report the first op that made it not finite, why, and whether the remedy helps.

    finding = fl.diagnose(lambda: loss(model(x), y), model)
    print(finding)

Forward, backward and, if given, the optimizer's step run in eager mode. What is damaged decides: a loss that is not
finite has its origins in the forward, a gradient in the backward, a weight in the optimizer. If nothing is damaged
there is no finding, whatever infinities were made and discarded on the way. Model, optimizer, gradients and random
numbers are as before afterwards.

Not covered: what happens outside of torch's ops (numpy, custom kernels without decomposition are one op); faults that
differ from call to call, of which one call is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from floatline.diagnose.causes import cause_of, limit_of
from floatline.diagnose.cures import samples_replaced, try_cures
from floatline.diagnose.finding import Counterfactual, Evidence, Finding
from floatline.diagnose.kept import everything_kept
from floatline.diagnose.names import Names
from floatline.errors import ConfigError
from floatline.observe.finite import Kind, Numbers, Origin, Watch, bad_rows, is_bad, numbers, watching

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
        ConfigError: `forward` is not callable or returns no scalar tensor, or `model` is no module.

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
    return Diagnosis(forward, model, optimizer).run(cures)


@dataclass(frozen=True)
class _Damage:
    """What was found damaged, and the origins of it."""

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

    def run(self, cures: bool = True) -> Finding | None:
        """Return the finding, None where nothing is wrong."""
        with everything_kept(self.model, self.optimizer):
            damage = self._watched()
        if damage is None:
            return self._bad_before()
        if not damage.origins:
            return None
        origin = _first(damage.origins)
        if origin.kind is Kind.GIVEN:
            return self._given(origin, damage, cures)
        return self._fault(origin, damage, cures)

    # Under watch

    def _watched(self) -> _Damage | None:
        with torch.enable_grad(), watching(self.model) as watch, self.names.of_arguments(self.model):
            return self._forward(watch)

    def _forward(self, watch: Watch) -> _Damage | None:
        try:
            loss = self.forward()
        except Exception:
            known = tuple(o for o in watch.origins if o.kind in (Kind.FAULT, Kind.GIVEN))
            if known:  # something refused the values: what made them is the answer
                return _Damage("forward", known)
            raise
        loss = _scalar(loss)
        if is_bad(loss):
            return _Damage("forward", self._origins(watch, [loss], "forward"))
        if loss.requires_grad:
            watch.phase = "backward"
            watch.modules[:] = [""]
            loss.backward()
            spoilt = [(n, p.grad) for n, p in self._parameters() if p.grad is not None and is_bad(p.grad)]
            if spoilt:
                return _Damage("backward", self._origins(watch, [g for _, g in spoilt], "backward"), spoilt[0][0])
        return self._buffers(watch) or (self._step(watch) if self.optimizer is not None else None)

    def _buffers(self, watch: Watch) -> _Damage | None:
        """A forward may spoil running statistics and still have a finite loss."""
        for name, buffer in self.model.named_buffers():
            origins = tuple(o for o in watch.ledger.of(buffer) if o.kind in (Kind.FAULT, Kind.RAW))
            if origins and is_bad(buffer):
                return _Damage("forward", origins, name)
        return None

    def _step(self, watch: Watch) -> _Damage | None:
        """Watch the optimizer's step, op by op: fused and foreach kernels are one op for all parameters."""
        assert self.optimizer is not None
        watch.phase = "optimizer"
        for group in self.optimizer.param_groups:
            group.update({key: False for key in ("foreach", "fused") if key in group})
        self.optimizer.step()
        self.names = Names(self.model, self.forward, self.optimizer)
        states = [(f"{key} of {name}", value) for name, p in self._parameters()
                  for key, value in self.optimizer.state.get(p, {}).items() if isinstance(value, torch.Tensor)]  # fmt: skip
        spoilt = [(n, t) for n, t in [*self._parameters(), *states] if is_bad(t) and watch.ledger.of(t)]
        if not spoilt:
            return None
        return _Damage("optimizer", self._origins(watch, [t for _, t in spoilt], "optimizer"), spoilt[0][0])

    def _parameters(self) -> list[tuple[str, torch.Tensor]]:
        found: dict[int, tuple[str, torch.Tensor]] = {id(p): (n, p) for n, p in self.model.named_parameters()}
        for group in self.optimizer.param_groups if self.optimizer is not None else ():
            for place, parameter in enumerate(group["params"]):
                found.setdefault(id(parameter), (f"parameter {place} of the optimizer", parameter))
        return list(found.values())

    def _origins(self, watch: Watch, spoilt: Iterable[torch.Tensor], phase: str) -> tuple[Origin, ...]:
        """Return the origins of what is spoilt; of a phase's own first, for what was before it was harmless then."""
        found = {origin for tensor in spoilt for origin in watch.ledger.of(tensor)}
        own = tuple(origin for origin in found if origin.phase == phase)
        if own or found:
            return own or tuple(found)
        return tuple(o for o in watch.origins if o.phase == phase and o.kind is Kind.FAULT)

    # What it amounts to

    def _fault(self, origin: Origin, damage: _Damage, cures: bool) -> Finding:
        cause = cause_of(origin)
        tried = try_cures(cause, origin, self.model, self._replay) if cures and damage.phase != "optimizer" else None
        if damage.phase == "optimizer" and cures:
            tried = Counterfactual(remedy=cause.remedy, cured=None, why=cause.untried)
        module = (
            origin.spot.module if damage.phase != "optimizer" else damage.tensor.rpartition(" ")[2].rpartition(".")[0]
        )
        return Finding(
            phase=damage.phase,
            op=origin.spot.op,
            module=module,
            location=origin.spot.user,
            cause=cause.text,
            cause_name=cause.name,
            evidence=_evidence(origin),
            remedy=cause.remedy,
            counterfactual=tried,
            tensor=damage.tensor if damage.phase == "optimizer" else "",
            samples=self._samples(origin),
        )

    def _samples(self, origin: Origin) -> tuple[int, ...]:
        """Return the samples in which the op went wrong, where its first dimension is the batch's."""
        sizes = {tensor.shape[0] for tensor in self.names.batch.values() if tensor.dim()}
        out = origin.outputs[0] if origin.outputs and origin.phase == "forward" else None
        return out.rows if out is not None and out.shape and out.shape[0] in sizes and len(sizes) == 1 else ()

    def _given(self, origin: Origin, damage: _Damage, cures: bool) -> Finding:
        """A tensor was bad before the step began."""
        assert origin.tensor is not None
        phase, name = self.names.of(origin.tensor)
        rows = bad_rows(origin.tensor) if phase == "input" else ()
        what = {
            "input": f"the input {name or '(a tensor without a name)'}",
            "parameter": f"the parameter {name}",
            "buffer": f"the buffer {name}",
            "optimizer": f"the optimizer's {name}",
        }[phase]
        module = name.rpartition(".")[0] if phase in ("parameter", "buffer") else origin.spot.module
        return Finding(
            phase=phase,
            op=origin.spot.op,
            module=module,
            location=origin.spot.user,
            cause=f"{what} was not finite before the step" + (f", in samples {_listed(rows)}" if rows else ""),
            cause_name={"input": "bad input", "parameter": "bad parameter", "buffer": "bad buffer"}.get(phase, "bad state"),
            evidence=Evidence(inputs=(replace(origin.inputs[0], name=name or origin.inputs[0].name),)),
            remedy=_REMEDIES[phase].format(name=name, rows=_listed(rows)),
            counterfactual=self._without(origin.tensor, rows) if cures and phase == "input" else None,
            tensor=name,
            samples=rows,
        )  # fmt: skip

    def _bad_before(self) -> Finding | None:
        """A NaN in a weight or a buffer is worth telling even where this batch did not meet it."""
        for phase, pairs in (("parameter", self.model.named_parameters()), ("buffer", self.model.named_buffers())):
            for name, tensor in pairs:
                found = numbers(tensor, name) if is_bad(tensor) else None
                if found is not None and found.nan:
                    return Finding(
                        phase=phase,
                        op="",
                        module=name.rpartition(".")[0],
                        location=None,
                        cause=f"the {phase} {name} holds NaN; this step did not meet it",
                        cause_name=f"bad {phase}",
                        evidence=Evidence(inputs=(found,)),
                        remedy=_REMEDIES[phase].format(name=name, rows=""),
                        tensor=name,
                    )
        return None

    # Again

    def _replay(self, around: AbstractContextManager[Any]) -> str:
        """Run forward and backward once more; return what was not finite, "" for nothing."""
        with everything_kept(self.model), torch.enable_grad(), torch.compiler.set_stance("force_eager"), around:
            loss = _scalar(self.forward())
            if is_bad(loss):
                return f"the loss is {loss.item()}"
            if loss.requires_grad:
                loss.backward()
            spoilt = [name for name, p in self._parameters() if p.grad is not None and is_bad(p.grad)]
            return f"the loss is finite then, the gradient of {spoilt[0]} is not" if spoilt else ""

    def _without(self, tensor: torch.Tensor, rows: tuple[int, ...]) -> Counterfactual:
        remedy = f"the samples {_listed(rows)} replaced by a good one"
        if not rows or tensor.dim() < 1:
            return Counterfactual(remedy="that input left out", cured=None, why="it is no batch of samples")
        batch = [other for other in self.names.batch.values() if other.dim() and other.shape[0] == tensor.shape[0]]
        known = {other.untyped_storage()._cdata for other in batch}
        batch += [tensor] if tensor.untyped_storage()._cdata not in known else []
        with samples_replaced(batch, rows) as possible:
            if not possible:
                return Counterfactual(remedy=remedy, cured=None, kind="sample", why="no sample is good")
            left = self._replay(nullcontext())
            return Counterfactual(remedy=remedy, cured=not left, kind="sample", why=left)


_REMEDIES = {
    "input": "leave out or mend the samples {rows} of {name}; look at how they were made",
    "parameter": "load the last weights in which {name} is finite, or initialise it",
    "buffer": "reset {name} to the statistics of a good checkpoint, or let it be computed again",
    "optimizer": "load the last optimizer state in which {name} is finite",
}


def _first(origins: Iterable[Origin]) -> Origin:
    """Return the earliest that is a fault; else the first that took in what was meant."""
    order = {Kind.FAULT: 0, Kind.RAW: 0, Kind.GIVEN: 0, Kind.TAKEN: 1, Kind.MEANT: 2}
    return min(origins, key=lambda origin: (order[origin.kind], origin.number))


def _evidence(origin: Origin) -> Evidence:
    notes = []
    if origin.spot.library is not None:
        notes.append(f"inside a library: {origin.spot.library}")
    if origin.phase == "backward" and origin.ran != origin.spot.op:
        notes.append(f"in the derivative, {origin.ran} made it")
    for name, made in origin.made_by.items():
        if made.spot.call >= 0 and made.scalars:
            notes.append(
                f"{name} was made by {made.spot.op} with {made.scalars}"
                + (f" at {made.spot.user}" if made.spot.user else "")
            )
    notes += [_room(item) for item in (*origin.inputs, *origin.outputs) if _room(item)]
    return Evidence(
        inputs=origin.inputs, outputs=origin.outputs, exact=origin.exact or (), saved=origin.saved, notes=tuple(notes)
    )  # fmt: skip


def _room(item: Numbers) -> str:
    bits, limit = item.headroom_bits, limit_of(item.dtype)
    if bits is None or limit is None or bits > 4:
        return ""
    return f"{item.name} is {bits:.1f} bits below the end of {item.dtype} ({limit:.5g})"


def _listed(rows: tuple[int, ...]) -> str:
    return ", ".join(map(str, rows[:8])) + (" ..." if len(rows) > 8 else "")


def _scalar(loss: Any) -> torch.Tensor:
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else f"a {type(loss).__name__}"
        raise ConfigError(f"forward returned {got}, not a scalar loss", hint="return one number: the mean over targets")
    return loss.reshape(())
