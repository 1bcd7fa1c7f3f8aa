"""The exact value of every tensor of a step, in fp64: a shadow of each storage.

A shadow belongs to a storage, not to a tensor: views need no bookkeeping, and what autograd saves and hands back as a
new object is found again. A tensor's shadow is the same window (sizes, strides, offset) on its storage's shadow.

Integers and booleans have a shadow only once they differ from the exact decision: a comparison that came out the other
way, another index of a maximum.

A weak reference keeps the C++ object of a storage, so its address is not used again while it is known here; the
shadow of a storage that has died is dropped at the next sweep.

Not covered: complex tensors, and one storage that is read in two formats of different width (`view(dtype)`): their
values stand for themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.multiprocessing.reductions import StorageWeakRef

SWEEP = 32
"""Storages that may be added before the dead ones are looked for."""


@dataclass
class _Kept:
    storage: StorageWeakRef
    itemsize: int
    values: torch.Tensor
    noise: bool = False
    shared: bool = False  # others read these values too: they are copied before something is written into them


class Shadows:
    """The shadows of all storages that were written under watch, or were given one."""

    def __init__(self) -> None:
        self._kept: dict[int, _Kept] = {}
        self._added = 0

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the exact values of a floating tensor, fp64 of its shape; its own values where nobody knows better.

        The result may be a view of the shadow: it is not to be written.
        """
        kept = self._find(tensor)
        return tensor.detach().double() if kept is None else _window(kept.values, tensor)

    def decided(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Return what an integer or boolean tensor would be if all had been exact; None where it is the same."""
        kept = self._find(tensor)
        return None if kept is None else _window(kept.values, tensor)

    def known(self, tensor: torch.Tensor) -> bool:
        """Say whether the tensor has a shadow."""
        return self._find(tensor) is not None

    def set(self, tensor: torch.Tensor, exact: torch.Tensor, *, shared: bool = False) -> None:
        """Let `exact` be the exact values of `tensor`, whose memory was written just now.

        Args:
            tensor: Strided.
            exact: Of its shape; fp64 for a floating tensor, else of its dtype.
            shared: The caller goes on to use `exact`, and it must stay as it is.
        """
        storage = tensor.untyped_storage()
        length = storage.nbytes() // tensor.element_size()
        whole = _is_whole(tensor)
        kept = self._find(tensor)
        if whole and exact.is_contiguous() and exact._base is None and exact.numel() == length:
            self._keep(tensor, exact.detach().reshape(-1)).shared = shared
            return
        if kept is None:
            values = torch.empty(length, dtype=exact.dtype, device=tensor.device)
            if not whole:  # what lies around the tensor stands for itself
                around = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage, 0, (length,), (1,))
                values.copy_(around)
            kept = self._keep(tensor, values)
        elif kept.shared:
            kept.values, kept.shared = kept.values.clone(), False
        kept.noise = False
        _window(kept.values, tensor).copy_(exact)

    def share(self, tensor: torch.Tensor, source: torch.Tensor) -> bool:
        """Let the exact values of `tensor` be those of `source`, without a copy; say whether that can be."""
        kept = self._find(source)
        if kept is None or not (_is_whole(tensor) and _is_whole(source)) or tensor.shape != source.shape:
            return False
        kept.shared = True
        self._keep(tensor, kept.values).shared = True
        return True

    def mark_noise(self, tensor: torch.Tensor) -> None:
        """Note that fp32 does not compute the values of `tensor` either: what is left when all has cancelled."""
        kept = self._find(tensor)
        if kept is not None:
            kept.noise = True

    def is_noise(self, tensor: torch.Tensor) -> bool:
        """Say whether that was noted."""
        kept = self._find(tensor)
        return kept is not None and kept.noise

    def forget(self, tensor: torch.Tensor) -> None:
        """Let the values of `tensor` stand for themselves."""
        self._kept.pop(tensor.untyped_storage()._cdata, None)

    def _find(self, tensor: torch.Tensor) -> _Kept | None:
        if not self._kept or tensor.layout != torch.strided:
            return None
        kept = self._kept.get(tensor.untyped_storage()._cdata)
        return kept if kept is not None and kept.itemsize == tensor.element_size() else None

    def _keep(self, tensor: torch.Tensor, values: torch.Tensor) -> _Kept:
        storage = tensor.untyped_storage()
        key = storage._cdata
        self._added += key not in self._kept
        self._kept[key] = kept = _Kept(StorageWeakRef(storage), tensor.element_size(), values)
        if self._added >= SWEEP:
            self._added = 0
            for dead in [key for key, known in self._kept.items() if known.storage.expired()]:
                del self._kept[dead]
        return kept


def _is_whole(tensor: torch.Tensor) -> bool:
    """Say whether a tensor is all of its storage, in order."""
    return tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes() and tensor.is_contiguous()


def _window(values: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    return values.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
