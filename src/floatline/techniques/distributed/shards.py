"""Which parts of a model are gathered together, and tensors that are laid out in shards.

FSDP2 gathers a *unit* of the model before its forward and frees it afterwards. Units here are the model's layers, and
modules that a precision rule keeps in another format, because one unit is gathered in one format. What is in no unit
belongs to the root's, which stays whole from the forward's beginning to the backward's end.

The two ends of a Hugging Face language model, often its largest weights, are units too. The embedding is freed after
its lookup, and not gathered for the backward, which needs no values of it. The head stays from its forward to its
backward, as both follow each other; as a unit of its own it makes FSDP gather the last layer after the loss's backward,
where the logits are, and not before it. Where both are one weight they are one unit, which stays.

A weight that two modules share must be in one unit. So a layer that shares a weight with the world outside is no unit
of its own, and an island of precision takes the modules that share its weights in.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass
class Unit:
    """Modules whose parameters are gathered together.

    Args:
        modules: By dotted name.
        island: Whether a precision rule gives it a format of its own.
        inside: Whether it lies inside another unit.
        end: Whether it is the embedding or the output head; their inputs are not cast, as the root's are not.
        stays: Whether it is kept gathered after its forward.
    """

    modules: dict[str, nn.Module]
    island: bool = False
    inside: bool = False
    end: bool = False
    stays: bool = False
    notes: list[str] = field(default_factory=list)


def plan_units(
    model: nn.Module, layers: Mapping[str, nn.Module], islands: Mapping[str, nn.Module]
) -> tuple[list[Unit], list[str]]:
    """Return the units of a model but for its root, inner ones first, and notes on layers that are none.

    Args:
        layers: Modules to gather one by one, by dotted name.
        islands: Modules with a format of their own.
    """
    wanted = {**layers, **islands}
    units = {
        name: Unit({name: module}, island=name in islands)
        for name, module in wanted.items()
        if name and next(module.parameters(), None) is not None
    }
    notes = _join_tied(model, units)
    for name, unit in units.items():
        unit.inside = any(name.startswith(f"{other}.") for other in units)
    return [units[name] for name in sorted(units, key=lambda name: -name.count("."))], notes


def end_units(model: nn.Module, units: list[Unit]) -> list[Unit]:
    """Return the embedding and the output head of a Hugging Face model as units, where they are in none of `units`.

    One that shares its weight with a third module is left to the root.
    """
    found = {"get_input_embeddings": "", "get_output_embeddings": ""}
    names = {id(module): name for name, module in model.named_modules()}
    for method in found:
        with suppress(NotImplementedError, AttributeError):
            found[method] = names.get(id(getattr(model, method)()), "")
    taken = [name for unit in units for name in unit.modules]
    ends = {name for name in found.values() if name and not any(_overlap(name, other) for other in taken)}
    tied = False
    for owners in _shared(model):
        touched = {end for end in ends if any(_overlap(end, owner) for owner in owners)}
        if touched and touched == ends == set(owners):
            tied = True
        else:
            ends -= touched
    # In the model's order: FSDP's state dict hook is on the first owner of a weight, which must be visited first.
    modules = {name: module for name, module in model.named_modules() if name in ends and list(module.parameters())}
    if tied:
        return [Unit(modules, end=True, stays=True)]
    head = found["get_output_embeddings"]
    return [Unit({name: module}, end=True, stays=name == head) for name, module in modules.items()]


def _overlap(one: str, other: str) -> bool:
    """Say whether two modules are the same or one lies inside the other, by their names."""
    return one == other or one.startswith(f"{other}.") or other.startswith(f"{one}.")


def _join_tied(model: nn.Module, units: dict[str, Unit]) -> list[str]:
    """Put the modules that share a weight into one unit; layers that do are no units any more."""
    notes = []
    modules = dict(model.named_modules())
    for owners in _shared(model):
        homes = {owner: _home(owner, units) for owner in owners}
        if len(set(homes.values())) == 1:
            continue
        for home in {home for home in homes.values() if home and not units[home].island}:
            del units[home]
            notes.append(f"{home} is gathered with its surroundings: it shares a weight with other modules")
        island = next((home for home in homes.values() if home in units), None)
        if island is None:
            continue
        for owner, home in homes.items():
            if home != island:
                joined = units.pop(home).modules if home in units else {owner: modules[owner]}
                units[island].modules.update(joined)
    return notes


def _shared(model: nn.Module) -> list[list[str]]:
    """Return, for each parameter that several modules hold, the names of these modules."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    return [names for names in owners.values() if len(names) > 1]


def _home(name: str, units: Mapping[str, Unit]) -> str:
    """Return the innermost unit that a module is in, "" for the root's."""
    inside = [key for key, unit in units.items() if any(name == m or name.startswith(f"{m}.") for m in unit.modules)]
    return max(inside, key=len, default="")


def is_sharded(tensor: torch.Tensor) -> bool:
    """Say whether a tensor is laid out in shards over several ranks (torch's DTensor)."""
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor whole; of shards it is gathered, which every rank must do."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def laid_out_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return `tensor`, which every rank has whole or in shards, in the layout of `like`, a tensor of the same shape."""
    if not is_sharded(like):
        return full_tensor(tensor)
    if is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    local = tensor.to(like.device)
    return distribute_tensor(local, mesh, placements, src_data_rank=None)  # nothing is sent: all ranks have it whole


def dequantised(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in shards with quantised ones (of low-bit optimizer state) as the fp32 values they stand for."""
    local = on_this_rank(tensor)
    if type(local) is torch.Tensor or not hasattr(local, "dequantize"):
        return tensor
    from torch.distributed.tensor import DTensor

    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    whole, stride = tensor.shape, tensor.stride()
    return DTensor.from_local(local.dequantize(), mesh, placements, run_check=False, shape=whole, stride=stride)


def reshard(model: nn.Module) -> None:
    """Put every gathered weight of a sharded model away, so that its parameters are its shards.

    After a forward without a backward the root's weights are still gathered.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def forget_iteration(model: nn.Module) -> bool:
    """Bring a sharded model to rest after an exception has ended its forward or backward.

    Weights are put away and FSDP's marks of where it was are cleared; gradients are the caller's to drop. Before torch
    2.13 (`reset_iter_state`) FSDP2 believes for ever that it is in a backward that was ended, and reduces no gradient.

    Returns:
        Whether the model can be trained on. Nothing can be done about a broken connection either.
    """
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(model, FSDPModule):
        return True
    state: Any = model._get_fsdp_state()
    if state._is_root is None:  # nothing has run yet, and torch has not made what it would clear
        return True
    reset = getattr(model, "reset_iter_state", None)
    if reset is None:
        return not state._state_ctx.post_backward_final_callback_queued
    try:
        reset()
    except RuntimeError:  # of the collectives that were under way; the exception that is being handled tells more
        return False
    return True


def local_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's parameters that lie on this rank."""
    return sum(on_this_rank(parameter).nbytes for parameter in model.parameters())


def on_this_rank(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a tensor in shards; others as they are."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
