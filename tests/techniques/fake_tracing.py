"""A small planner for tests, independent of the real one: fake floats, real integers, and a ledger of live bytes."""

import weakref

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import floatline as fl
from floatline.techniques.placement import allocates_on_host, allocates_within_kernel, watching

aten = torch.ops.aten
PLAIN = (torch.Tensor, FakeTensor, torch.nn.Parameter)
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Steered(TorchDispatchMode):
    """Above FakeTensorMode: what is computed of real tensors alone stays real, and a fake value reads as a good one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(kind not in PLAIN for kind in types):
            return NotImplemented  # a subclass first; its parts come by here
        given = tensors((args, kwargs))
        if any(isinstance(tensor, FakeTensor) for tensor in given):
            return self.on_fakes(func, args, kwargs)
        if not given:
            made = func(*args, **kwargs)
            if any(tensor.is_floating_point() for tensor in tensors(made)):
                return made
        with unset_fake_temporarily():
            return func(*args, **kwargs)

    @staticmethod
    def on_fakes(func, args, kwargs):
        if func is aten._local_scalar_dense.default:
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 1)
        if func in INDEXING:
            with unset_fake_temporarily():
                args = (args[0], [part for index in args[1] for part in positions(index)], *args[2:])
        return func(*args, **kwargs)


def positions(index):
    """A real mask as the integers that it stands for, whose number a fake result needs."""
    masks = index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor)
    return index.nonzero(as_tuple=True) if masks else [index]


class Ledger(TorchDispatchMode):
    """Bytes of the storages that are alive, on the device and on the host, as the techniques tell."""

    def __init__(self):
        super().__init__()
        self.live = {}
        self.peak = self.host_peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(kind not in PLAIN for kind in types):
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        for tensor in tensors(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.live and not allocates_within_kernel():
                self.live[storage._cdata] = (storage.nbytes(), allocates_on_host())
                weakref.finalize(storage, self.live.pop, storage._cdata, None)
        self.peak, self.host_peak = max(self.peak, self.device), max(self.host_peak, self.host)
        return out

    def moved_to_host(self, tensor):
        self.live[tensor.untyped_storage()._cdata] = (tensor.untyped_storage().nbytes(), True)

    def resized(self, tensor):
        key = tensor.untyped_storage()._cdata
        self.live[key] = (tensor.untyped_storage().nbytes(), self.live[key][1])

    @property
    def device(self):
        return sum(size for size, host in self.live.values() if not host)

    @property
    def host(self):
        return sum(size for size, host in self.live.values() if host)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3)


class Plan:
    """Two updates of a step on fake tensors on behalf of a GPU; then it is undone.

    Attributes:
        peak: Most device bytes during the second update.
        device, host: Bytes after it.
        idle: Device bytes after the step was made, before the first update.
    """

    def __init__(self, case, techniques=(), hardware="a100", precision="32-true", max_grad_norm=1.0, ledger=None):
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.ledger = ledger or Ledger()
        with mode, Steered(), self.ledger, watching(self.ledger):
            self.model = case.build()
            self.step = fl.TrainStep(
                self.model,
                adamw,
                precision=precision,
                loss=case.loss,
                techniques=techniques,
                max_grad_norm=max_grad_norm,
                hardware=hardware,
            )
            self.idle = self.ledger.device
            with unset_fake_temporarily():
                batch = case.batch(0)
            batch = tree_map(lambda leaf: mode.from_tensor(leaf) if leaf.is_floating_point() else leaf, batch)
            self.outputs = [self.step(batch)]
            self.ledger.peak = self.ledger.host_peak = 0
            self.outputs.append(self.step(batch))
            self.peak, self.device, self.host = self.ledger.peak, self.ledger.device, self.ledger.host
            self.notes, self.facts = self.step.stack.notes, self.step.stack.facts()
            self.step.undo()
