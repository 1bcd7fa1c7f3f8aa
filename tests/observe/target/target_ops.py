"""What the tests of the target's rules share: the ops that a piece of code runs, and the bytes that its graph keeps."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Ops(TorchDispatchMode):
    """Names of the aten ops that run, without overloads, and the storages they made that are still alive."""

    def __init__(self):
        super().__init__()
        self.names = []
        self.live = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace == "aten":
            self.names.append(func.__name__.split(".")[0])
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu":
                storage = leaf.untyped_storage()
                if storage._cdata not in self.live:
                    self.live[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, storage._cdata, None)
        return out

    @property
    def bytes(self):
        return sum(self.live.values())
