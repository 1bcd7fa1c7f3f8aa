"""What of a condemned step goes into a bundle when not all of it fits.

Things are offered in the order of their worth to a replay: the micro-batches at fault, the other ones, the buffers, the
weights. What does not fit any more is left out whole, and told with its size.

Bytes are those of the storages that are written: a tensor that is a view of a larger one brings all of it, two views of
one storage bring it once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


class Room:
    """So many bytes, and what did not fit in.

    Args:
        cap: Bytes.

    Attributes:
        left: Bytes that are left.
        left_out: What did not fit, with the reason.
    """

    def __init__(self, cap: int) -> None:
        self.cap = self.left = cap
        self.left_out: list[str] = []
        self._seen: set[int] = set()

    def take(self, name: str, tree: Any) -> bool:
        """Say whether nested tensors fit, and take their room if so.

        Args:
            name: What they are, for the user.
            tree: Mappings, lists and tuples of tensors and plain values.
        """
        storages = {s.data_ptr(): s.nbytes() for s in map(torch.Tensor.untyped_storage, _tensors(tree)) if s.nbytes()}
        new = {where: size for where, size in storages.items() if where not in self._seen}
        size = sum(new.values())
        if size > self.left:
            room = f"{size / 2**20:.1f} MiB, and {self.left / 2**20:.1f} of {self.cap / 2**20:.1f} MiB were left"
            self.left_out.append(f"{name} ({room})")
            return False
        self.left -= size
        self._seen |= new.keys()
        return True


def _tensors(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    inner = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, (list, tuple)) else ()
    return [tensor for each in inner for tensor in _tensors(each)]
