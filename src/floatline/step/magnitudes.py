"""Largest value and sum of magnitudes of each gradient, and how many elements are NaN or Inf.

Both are reductions of the device: nothing is read by the host. On CUDA they are two foreach calls. On a CPU torch's
infinity norm is not vectorised (23 times slower than `aminmax`, measured with 2.13), and its 1-norm half as fast as
taking magnitudes block by block in a buffer that stays in the cache.
"""

from __future__ import annotations

import math

import torch

from floatline.step.norm import Alike, GradientNorms, wide_dtype

_BLOCK = 65_536
"""Elements; 256 KiB of fp32."""
_SMALL = 16_384
"""Up to this size one call is quicker than a block's three."""


@torch.no_grad()
def magnitudes_of(norms: GradientNorms) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest magnitude and the sum of magnitudes of each gradient.

    Args:
        norms: As `norms_of` gave them; the gradients are still there.

    Returns:
        Two (n,) fp32 tensors in the order of `norms.names`, over all ranks. NaN where a gradient holds one.
    """
    pairs = [_of(group) for group in norms.groups]
    first = norms.each.device
    largest = torch.cat([pair[0].to(first) for pair in pairs])
    sums = torch.cat([pair[1].to(first) for pair in pairs])
    # Not every backend's "max" over ranks keeps NaN; a sum does.
    return torch.where(norms.each.isnan(), norms.each, largest), sums


def _of(group: Alike) -> tuple[torch.Tensor, torch.Tensor]:
    parts = [part if part.numel() else part.new_zeros(1) for part in group.parts]  # nothing has no largest
    if parts[0].device.type == "cpu":
        largest, sums = _largest_on_cpu(parts), _sums_on_cpu(parts)
    else:
        largest, sums = (
            torch.stack(torch._foreach_norm(parts, order, dtype=wide_dtype(parts))).float() for order in (math.inf, 1)
        )
    return group.over_ranks(largest, "max"), group.over_ranks(sums)


def _largest_on_cpu(parts: list[torch.Tensor]) -> torch.Tensor:
    ends = [torch.aminmax(part) for part in parts]
    same = len({part.dtype for part in parts}) == 1
    low, high = (
        torch.stack(values if same else [value.float() for value in values])
        for values in ([end.min for end in ends], [end.max for end in ends])
    )
    return torch.maximum(-low, high).float()


def _sums_on_cpu(parts: list[torch.Tensor]) -> torch.Tensor:
    buffers: dict[torch.dtype, torch.Tensor] = {}
    return torch.stack([_sum_on_cpu(part, buffers).float() for part in parts])


def _sum_on_cpu(part: torch.Tensor, buffers: dict[torch.dtype, torch.Tensor]) -> torch.Tensor:
    if part.numel() <= _SMALL:
        return torch.linalg.vector_norm(part, 1, dtype=wide_dtype([part]))
    if part.dtype not in buffers:
        buffers[part.dtype] = torch.empty(_BLOCK, dtype=part.dtype)
    buffer = buffers[part.dtype]
    blocks = part.reshape(-1).split(_BLOCK)
    return torch.stack([torch.abs(b, out=buffer[: b.numel()]).sum(dtype=torch.float32) for b in blocks]).sum()


@torch.no_grad()
def nonfinite_counts(norms: GradientNorms, wanted: set[str]) -> dict[str, tuple[int, int]]:
    """Count NaN and infinite elements, for when something is wrong; all numbers are read together.

    Args:
        norms: As `norms_of` gave them; the gradients are still there.
        wanted: Names of the parameters to look at. The same on every rank.

    Returns:
        (NaN, Inf) by name, over all ranks.
    """
    names: list[str] = []
    columns = []
    for group in norms.groups:
        chosen = [(name, part) for name, part in zip(group.names, group.parts, strict=True) if name in wanted]
        for kind in (torch.isnan, torch.isinf):
            if chosen:
                counts = torch.stack([kind(part).sum() for _, part in chosen])
                columns.append(group.over_ranks(counts).to(norms.each.device))
                names += [name for name, _ in chosen]
    values = torch.cat(columns).tolist() if columns else []
    found: dict[str, list[int]] = {}
    for name, value in zip(names, values, strict=True):
        found.setdefault(name, []).append(value)
    return {name: (nan, inf) for name, (nan, inf) in found.items()}
