"""What the tests of the target's rules share: the ops that a piece of code runs, and the bytes that its graph keeps."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Ops(TorchDispatchMode):
    """Names of the aten ops that run, without overloads, and the storages they made: alive now, most at once."""

    def __init__(self, known=()):
        super().__init__()
        self.names = []
        self.live = {}
        self.peak = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace == "aten":
            self.names.append(func.__name__.split(".")[0])
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu":
                storage = leaf.untyped_storage()
                if storage._cdata not in self.live and storage._cdata not in self.known:
                    self.live[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, storage._cdata, None)
        self.peak = max(self.peak, self.bytes)
        return out

    @property
    def bytes(self):
        return sum(self.live.values())
