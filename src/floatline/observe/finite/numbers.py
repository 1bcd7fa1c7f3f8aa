"""What the values of a tensor say: how many are not finite, which, and how far the others are from the format's end."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

MOST_INDICES = 8
MOST_ROWS = 64


def parts_of(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the tensors that a tensor is made of (codes and scales of 8-bit state, a shard), or the tensor itself."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from parts_of(getattr(tensor, name))
    else:
        yield tensor


def storage_of(tensor: torch.Tensor) -> int | None:
    """Return what tells one tensor's memory from another's; None where it has none that can be asked for.

    That is so for sparse tensors, and for the stand-ins that `torch.func` calls functions with.
    """
    if is_traceable_wrapper_subclass(tensor) or tensor.layout is not torch.strided:
        return None
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return None
    return tensor.untyped_storage()._cdata


def is_bad(tensor: torch.Tensor) -> bool:
    """Say whether a tensor of floats or complex numbers holds a NaN or an infinity."""
    if is_traceable_wrapper_subclass(tensor):
        return any(map(is_bad, parts_of(tensor)))
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.is_meta:
        return False
    if tensor._is_zerotensor() or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False
    values = dense(tensor)
    if not values.numel():
        return False
    if values.is_complex():
        values = torch.view_as_real(values.resolve_conj())
    # A sum is finite only where all of it is, and takes one pass; where it is not, it may have overflowed by itself.
    wide = torch.float32 if values.element_size() < 4 else values.dtype
    return not math.isfinite(values.sum(dtype=wide).item()) and not bool(torch.isfinite(values).all())


def has_nan(tensor: torch.Tensor) -> bool:
    """Say whether a tensor holds a NaN."""
    return bool(torch.isnan(dense(tensor)).any())


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """Return what a tensor stores as one that can be asked: sparse ones give their values, fp8 ones are widened."""
    tensor = tensor.detach()
    if tensor._is_zerotensor():  # autograd's zeros that have no memory
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    if tensor.layout is not torch.strided:
        tensor = tensor.coalesce().values() if tensor.layout is torch.sparse_coo else tensor.values()
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """The values of one tensor, summed up.

    Attributes:
        name: What it is called: an argument of an op, a key of a batch, a parameter.
        dtype: As text.
        shape: Its sizes.
        low: Smallest finite value, None where there is none.
        high: Largest finite value.
        nan: How many are NaN.
        positive: How many are +inf.
        negative: How many are -inf.
        zeros: How many are 0.
        indices: The first places that are not finite.
        rows: The first indices along dimension 0 where something is not finite.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    low: float | None
    high: float | None
    nan: int
    positive: int
    negative: int
    zeros: int
    indices: tuple[tuple[int, ...], ...] = ()
    rows: tuple[int, ...] = ()

    @property
    def bad(self) -> int:
        """How many are not finite."""
        return self.nan + self.positive + self.negative

    @property
    def largest(self) -> float | None:
        """Largest finite magnitude."""
        return None if self.low is None or self.high is None else max(abs(self.low), abs(self.high))

    @property
    def headroom_bits(self) -> float | None:
        """How many times the largest magnitude can double before the format ends."""
        kind = getattr(torch, self.dtype, None)
        if not self.largest or not isinstance(kind, torch.dtype) or not kind.is_floating_point:
            return None
        limit = torch.finfo(kind).max
        return float(torch.tensor(limit / self.largest, dtype=torch.float64).log2())

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape)) or "scalar"
        span = "" if self.low is None else f" in [{self.low:.4g}, {self.high:.4g}]"
        counts = [f"{count} {name}" for name, count in
                  (("NaN", self.nan), ("+inf", self.positive), ("-inf", self.negative)) if count]  # fmt: skip
        span += f", {self.zeros} zeros" if self.zeros and span and "float" in self.dtype else ""
        at = f" at {', '.join(map(_index, self.indices))}" if self.indices else ""
        return f"{self.name} {self.dtype}[{size}]{span}" + (f", {' and '.join(counts)}{at}" if counts else "")


def _index(index: tuple[int, ...]) -> str:
    return "[" + ", ".join(map(str, index)) + "]"


def numbers(tensor: torch.Tensor, name: str) -> Numbers:
    """Sum up a tensor.

    Args:
        tensor: Of any dtype; complex ones are summed up by their magnitude.
        name: What to call it.
    """
    with torch.no_grad():
        values = dense(tensor)
        wide = values.abs() if values.is_complex() else values
        if wide.element_size() < 4:
            wide = wide.float() if wide.is_floating_point() else wide.int()
        finite = torch.isfinite(wide)
        kept = wide[finite]
        bad = ~finite
        return Numbers(
            name=name,
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tuple(tensor.shape),
            low=float(kept.min()) if kept.numel() else None,
            high=float(kept.max()) if kept.numel() else None,
            nan=int(torch.isnan(wide).sum()),
            positive=int((wide == float("inf")).sum()) if wide.is_floating_point() else 0,
            negative=int((wide == float("-inf")).sum()) if wide.is_floating_point() else 0,
            zeros=int((wide == 0).sum()),
            indices=_first_indices(bad),
            rows=bad_rows(tensor) if bad.any() else (),
        )


def _first_indices(bad: torch.Tensor) -> tuple[tuple[int, ...], ...]:
    if not bad.dim() or not bad.any():
        return ()
    return tuple(tuple(map(int, index)) for index in bad.nonzero()[:MOST_INDICES].tolist())


def bad_rows(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return the first indices along dimension 0 at which a tensor is not finite."""
    values = dense(tensor)
    if values.dim() < 1 or not (values.is_floating_point() or values.is_complex()):
        return ()
    bad = ~torch.isfinite(values)
    rows = bad.reshape(bad.shape[0], -1).any(dim=1) if bad.dim() > 1 else bad
    return tuple(rows.nonzero().flatten()[:MOST_ROWS].tolist())
