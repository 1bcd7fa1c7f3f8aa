"""From an origin to a finding: its cause, the evidence, the remedy with its line, and what became of trying it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import nn

from floatline.diagnose.causes import cause_of, gone_over, limit_of
from floatline.diagnose.cures import Replay, samples_replaced, try_cures
from floatline.diagnose.finding import Counterfactual, Evidence, Finding
from floatline.diagnose.names import Names
from floatline.observe.finite import Kind, Numbers, Origin, bad_rows, has_nan, is_bad, numbers, plain_name, storage_of

_REMEDIES = {
    "input": "leave out or mend {rows}of {name}; look at how it was made",
    "parameter": "load the last weights in which {name} is finite, or initialise it",
    "buffer": "reset {name} to the statistics of a good checkpoint, or let it be computed again",
    "optimizer": "load the last optimizer state in which {name} is finite",
}
_CAUSES = {"input": "bad input", "parameter": "bad parameter", "buffer": "bad buffer", "optimizer": "bad state"}


def first_of(origins: Iterable[Origin]) -> Origin:
    """Return the earliest that is a fault; else the first that took in what was meant."""
    order = {Kind.FAULT: 0, Kind.RAW: 0, Kind.GIVEN: 0, Kind.TAKEN: 1, Kind.MEANT: 2}
    return min(origins, key=lambda origin: (order[origin.kind], origin.number))


def tell(origin: Origin, phase: str, tensor: str, model: nn.Module, names: Names, replay: Replay | None) -> Finding:
    """Return the finding about an origin.

    Args:
        origin: The first.
        phase: Of the damage.
        tensor: What is damaged, by name.
        model: The step's.
        names: Of the tensors that were there before.
        replay: Runs the step again; None to try nothing.
    """
    if origin.kind is Kind.GIVEN:
        return _given(origin, phase, names, replay)
    cause = cause_of(origin)
    if phase == "backward" and not origin.derivative and origin.phase == "forward" and gone_over(origin):
        phase = "forward"  # only the format was too small; that the loss is finite all the same is luck
    tried: tuple[Counterfactual, ...] = ()
    if replay is not None and phase == "optimizer":
        tried = (Counterfactual(remedy=cause.remedy, cured=None, why=cause.untried or "an update is not run again"),)
    elif replay is not None:
        tried = try_cures(cause, origin, model, replay)
    line = cause.line or origin.spot.user
    module = tensor.rpartition(" ")[2].rpartition(".")[0] if phase == "optimizer" else origin.spot.module
    return Finding(
        phase=phase,
        op=origin.spot.op,
        module=module,
        location=origin.spot.user,
        cause=cause.text,
        cause_name=cause.name,
        evidence=_evidence(origin, names),
        remedy=(f"{line.file}:{line.line}: " if line else "") + cause.remedy,
        tried=tried,
        tensor=tensor if phase == "optimizer" else "",
        samples=_samples(origin, names),
    )


def _samples(origin: Origin, names: Names) -> tuple[int, ...]:
    """Return the samples in which the op went wrong, where its first dimension is the batch's."""
    sizes = {tensor.shape[0] for tensor in names.batch.values() if tensor.dim()}
    out = origin.outputs[0] if origin.outputs and not origin.derivative else None
    return out.rows if out is not None and out.shape and out.shape[0] in sizes and len(sizes) == 1 else ()


def _given(origin: Origin, damage: str, names: Names, replay: Replay | None) -> Finding:
    """A tensor was bad before the step began."""
    assert origin.tensor is not None
    phase, name = names.of(origin.tensor)
    if damage == "optimizer" and phase == "input":
        phase, name = "optimizer", name or "number"  # a learning rate as a tensor, say
    name = name or origin.variable
    rows = bad_rows(origin.tensor) if phase == "input" else ()
    called = name or "a tensor without a name"
    what = {"input": f"the input {called}", "optimizer": f"the optimizer's {name}"}.get(phase, f"the {phase} {name}")
    return Finding(
        phase=phase,
        op=origin.spot.op,
        module=name.rpartition(".")[0] if phase in ("parameter", "buffer") else origin.spot.module,
        location=origin.spot.user,
        cause=f"{what} was not finite before the step" + (f", in samples {_listed(rows)}" if rows else ""),
        cause_name="hyperparameter" if phase == "optimizer" and " of " not in name else _CAUSES[phase],
        evidence=Evidence(inputs=(replace(origin.inputs[0], name=name or origin.inputs[0].name),)),
        remedy=_REMEDIES[phase].format(name=called, rows=f"the samples {_listed(rows)} " if rows else ""),
        tried=(_without(origin.tensor, rows, names, replay),) if replay and phase == "input" else (),
        tensor=name,
        samples=rows,
    )


def _without(tensor: torch.Tensor, rows: tuple[int, ...], names: Names, replay: Replay) -> Counterfactual:
    if not rows or tensor.dim() < 1:
        return Counterfactual(remedy="that input left out", cured=None, kind="sample", why="it is no batch of samples")
    remedy = f"the samples {_listed(rows)} replaced by a good one"
    batch = [other for other in names.batch.values() if other.dim() and other.shape[0] == tensor.shape[0]]
    batch += [tensor] if storage_of(tensor) not in map(storage_of, batch) else []
    try:
        with samples_replaced(batch, rows) as possible:
            if not possible:
                return Counterfactual(remedy=remedy, cured=None, kind="sample", why="no sample is good")
            left = replay(nullcontext())
    except RuntimeError as error:  # a batch that shares memory between its samples
        return Counterfactual(remedy=remedy, cured=None, kind="sample", why=str(error).partition("\n")[0])
    return Counterfactual(remedy=remedy, cured=not left, kind="sample", why=left)


def bad_before(model: nn.Module) -> Finding | None:
    """Return a finding about a NaN in a weight or a buffer: worth telling even where this batch did not meet it."""
    for phase, pairs in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for full, tensor in pairs:
            if not is_bad(tensor) or not has_nan(tensor):
                continue
            name = plain_name(full)
            return Finding(
                phase=phase,
                op="",
                module=name.rpartition(".")[0],
                location=None,
                cause=f"the {phase} {name} holds NaN; this step did not meet it",
                cause_name=_CAUSES[phase],
                evidence=Evidence(inputs=(numbers(tensor, name),)),
                remedy=_REMEDIES[phase].format(name=name, rows=""),
                tensor=name,
            )
    return None


def untraced(phase: str, tensor: str) -> Finding:
    """Return a finding about damage that no op under watch has made and nobody had given.

    Args:
        phase: Of the damage.
        tensor: What is damaged, by name; "" for the loss.
    """
    what = {"forward": tensor or "the loss", "backward": f"the gradient of {tensor}"}.get(phase, tensor)
    return Finding(
        phase=phase,
        op="",
        module=tensor.rpartition(" ")[2].rpartition(".")[0],
        location=None,
        cause=f"{what} is not finite, and no op under watch has made it so: its values come from outside of torch",
        cause_name="made outside of torch",
        evidence=Evidence(),
        remedy="look at where values leave torch's ops: float(), item(), numpy, a kernel of your own",
        tensor=tensor,
    )


def _evidence(origin: Origin, names: Names) -> Evidence:
    notes = []
    for label, storage in origin.storages.items():
        if called := names.known(storage):
            notes.append(f"{label} is {called}")
    if origin.spot.library is not None:
        notes.append(f"inside a library: {origin.spot.library}")
    if origin.derivative and origin.ran != origin.spot.op:
        notes.append(f"in the derivative, {origin.ran} made it")
    for name, made in origin.made_by.items():
        if made.spot.user is not None and made.scalars:
            given = ", ".join(f"{key}={value}" for key, value in made.scalars.items())
            notes.append(f"{name} was made by {made.spot.op} with {given} at {made.spot.user}")
    notes += [room for item in (*origin.inputs, *origin.outputs) if (room := _room(item))]
    return Evidence(
        inputs=origin.inputs, outputs=origin.outputs, exact=origin.exact or (), saved=origin.saved, notes=tuple(notes)
    )


def _room(item: Numbers) -> str:
    bits, limit = item.headroom_bits, limit_of(item.dtype)
    if item.bad or bits is None or limit is None or bits > 4:
        return ""
    return f"{item.name} is {bits:.1f} bits below the end of {item.dtype} ({limit:.5g})"


def _listed(rows: tuple[int, ...]) -> str:
    return ", ".join(map(str, rows[:8])) + (" ..." if len(rows) > 8 else "")
