"""Gradient norms: of each parameter and in total, computed once for judging, clipping and naming the guilty.

One foreach call gives the 2-norm of every gradient in fp32, whatever format the gradients are in. Stacked, they are one
tensor: its norm is the total that is judged and clipped by, and its entries say which parameter went wrong. Nothing is
read by the host here; whoever needs a name reads `each` when something is wrong, and pays for it only then.

    norms = norms_of(model.named_parameters())
    norms.total           # 0-d, on the device
    norms.culprits()      # names whose norm is not finite: one read

Shards: each rank takes the norms of its own parts, and the squares of all gradients are summed over the ranks
together, in one exchange. Every rank gets the same numbers, so every rank must call. Sparse gradients count by their
values, duplicates summed up first.

Not covered: complex gradients; finite gradients whose norm passes 3.4e38 or whose values are 1.8e19 and more, for which
the norm is infinite. They would be useless to train with, and are judged like Inf.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from floatline.errors import ConfigError
from floatline.techniques.distributed.shards import is_sharded


@dataclass(frozen=True)
class Alike:
    """Gradients that lie alike: on one device, and whole or in shards over the same ranks.

    Args:
        names: Of the parameters.
        gradients: As the parameters hold them.
        parts: What of each gradient lies here, dense; of a shard that may be nothing.
        mesh: torch's DeviceMesh that the shards lie on, None for whole gradients.
        summed: Along which dimensions of the mesh different parts lie.
    """

    names: tuple[str, ...]
    gradients: list[torch.Tensor]
    parts: list[torch.Tensor]
    mesh: Any = None
    summed: tuple[bool, ...] = ()

    @property
    def sizes(self) -> list[int]:
        """Elements of the whole gradients."""
        return [gradient.numel() for gradient in self.gradients]

    def over_ranks(self, values: torch.Tensor, how: str = "sum") -> torch.Tensor:
        """Reduce one value a gradient over the ranks that hold its parts; `how` is torch's "sum" or "max"."""
        if self.mesh is None:
            return values
        from torch.distributed.tensor import DTensor, Partial, Replicate

        placements = [Partial(how) if summed else Replicate() for summed in self.summed]
        return DTensor.from_local(values, self.mesh, placements, run_check=False).full_tensor()


@dataclass(frozen=True)
class GradientNorms:
    """The 2-norms of all gradients, on the device.

    Attributes:
        names: Of the parameters that have a gradient, in the order of `each`.
        each: (n,) fp32, the norm of each gradient, over all ranks.
        total: 0-d fp32, the norm of all of them together.
        groups: The gradients themselves.
    """

    names: tuple[str, ...]
    each: torch.Tensor
    total: torch.Tensor
    groups: tuple[Alike, ...]

    def culprits(self) -> list[str]:
        """Return the names whose norm is not finite. Reads the device: ask when the total is known to be bad."""
        return [name for name, norm in zip(self.names, self.each.tolist(), strict=True) if norm - norm != 0.0]


@torch.no_grad()
def norms_of(named: Iterable[tuple[str, torch.Tensor]]) -> GradientNorms:
    """Return the norms of the gradients of named parameters; those without a gradient are left out.

    Args:
        named: (name, parameter), as `model.named_parameters()` gives them.

    Returns:
        The norms; of shards every rank gets those of the whole gradients.

    Raises:
        ConfigError: No parameter has a gradient.

    Example:
        >>> linear = torch.nn.Linear(2, 1, bias=False)
        >>> linear(torch.tensor([3.0, 4.0])).backward()
        >>> norms_of(linear.named_parameters()).each
        tensor([5.])
    """
    pairs = [(name, parameter.grad) for name, parameter in named if parameter.grad is not None]
    if not pairs:
        raise ConfigError(
            "no gradient reached any parameter of the optimizer", hint="pass it the parameters that the loss depends on"
        )
    groups = _alike(pairs)
    norms = [_norms(group) for group in groups]
    first = norms[0].device
    each = norms[0] if len(norms) == 1 else torch.cat([norm.to(first) for norm in norms])
    return GradientNorms(
        tuple(name for group in groups for name in group.names), each, torch.linalg.vector_norm(each), groups
    )


def total_norm(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the 2-norm over all gradients together, 0-d fp32; `get_total_norm` would round it to a half format.

    Raises:
        ConfigError: No parameter has a gradient.
    """
    return norms_of([("", parameter) for parameter in parameters]).total


def _norms(group: Alike) -> torch.Tensor:
    norms = torch.stack(torch._foreach_norm(group.parts, 2, dtype=wide_dtype(group.parts))).float()
    if group.mesh is None:
        return norms
    return group.over_ranks(norms.double().square()).sqrt().float()  # fp64: the square of a small norm is not 0


def wide_dtype(parts: list[torch.Tensor]) -> torch.dtype:
    """Return the format that norms of these are taken in: fp32; of fp64 gradients fp64, as torch narrows none."""
    return torch.float64 if any(part.dtype == torch.float64 for part in parts) else torch.float32


def _alike(pairs: list[tuple[str, torch.Tensor]]) -> tuple[Alike, ...]:
    """Sort gradients into groups that can be stacked."""
    gradients = [gradient for _, gradient in pairs]
    if _plain(gradients):
        return (Alike(tuple(name for name, _ in pairs), gradients, gradients),)
    groups: dict[tuple[Any, ...], list[tuple[str, torch.Tensor, torch.Tensor]]] = {}
    for name, gradient in pairs:
        key, part = _shard(gradient) if is_sharded(gradient) else ((gradient.device, None, ()), gradient)
        if part.layout is not torch.strided:
            part = part.coalesce().values() if part.layout is torch.sparse_coo else part.values()
        groups.setdefault(key, []).append((name, gradient, part))
    return tuple(
        Alike(tuple(name for name, _, _ in rows), [g for _, g, _ in rows], [part for _, _, part in rows], mesh, summed)
        for (_, mesh, summed), rows in groups.items()
    )


def _plain(gradients: list[torch.Tensor]) -> bool:
    """Say whether all are ordinary tensors on one device, as they mostly are; quicker than sorting them."""
    return (
        len({gradient.device for gradient in gradients}) == 1
        and {type(gradient) for gradient in gradients} == {torch.Tensor}
        and {gradient.layout for gradient in gradients} == {torch.strided}
    )


def _shard(gradient: Any) -> tuple[tuple[Any, ...], torch.Tensor]:
    """Return how a gradient in shards lies, and the part of it here."""
    if any(placement.is_partial() for placement in gradient.placements):  # summands, whose norm says nothing
        return (gradient.device, None, ()), gradient.full_tensor()
    summed = tuple(not placement.is_replicate() for placement in gradient.placements)
    return (gradient.device, gradient.device_mesh, summed), gradient.to_local()
