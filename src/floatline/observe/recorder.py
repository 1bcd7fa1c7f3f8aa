"""The memory recorder: every storage's birth and death while a program runs on fake tensors.

Each op's results are looked at: a storage that was not there before is an allocation, the death of the last tensor
that holds it a release (`weakref.finalize` on the storage). Where in the program that happens is known from outside:

    module    global forward hooks keep a stack of the modules that run; ops of the backward belong to the module whose
              forward made the autograd node (torch numbers the nodes; the number is noted at each forward op)
    phase     an autograd node that is running means backward; what comes after it is clipping and the optimizer
    category  what a storage turned out to be for: looked up in the model, its gradients and the optimizer's state; what
              a forward leaves alive for the backward is an activation

What kernels allocate inside of an op and free again (scratch/) is recorded as a workspace around its results. A
sum of two gradients takes over the memory of the first where autograd would have added in place (accumulate.py).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from floatline.observe.accumulate import engine_alone, grows_in_place
from floatline.observe.cost import cost_of
from floatline.observe.events import Category, OpCost, Phase, Storage, Trace
from floatline.observe.fake import Faking
from floatline.observe.fake_model import tensors_of
from floatline.observe.real import tensors_in
from floatline.observe.scratch import NOTHING, Scratch
from floatline.techniques.placement import allocates_on_host, allocates_within_kernel


def plain_parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the plain tensors that a tensor subclass (low-bit state, shards) or a sparse tensor is made of."""
    if tensor.layout is not torch.strided:
        yield from _sparse_parts(tensor)
    elif is_traceable_wrapper_subclass(tensor):
        parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        for part in parts:
            if isinstance(part, torch.Tensor):  # a sharded tensor also names its mesh
                yield from plain_parts(part)
    else:
        yield tensor


def _sparse_parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    with torch.no_grad():
        if tensor.layout is torch.sparse_coo:
            yield from (tensor._indices(), tensor._values())
        elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
            yield from (tensor.crow_indices(), tensor.col_indices(), tensor.values())
        elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
            yield from (tensor.ccol_indices(), tensor.row_indices(), tensor.values())


class Recorder(Faking):
    """Records allocations of all ops that run under it.

    Args:
        fake_mode: The mode below.
        scratch: What kernels allocate inside.
    """

    def __init__(self, fake_mode: FakeTensorMode, scratch: Scratch) -> None:
        super().__init__(fake_mode)
        self.trace = Trace()
        self.scratch = scratch
        self.update = -1
        self.phase = Phase.START
        self.modules: list[str] = [""]
        self._numbers: dict[int, int] = {}  # address of a live storage -> its number
        self._made_by: dict[int, str] = {}  # number of an autograd node -> module
        self._gradients_of: nn.Module | None = None
        self._settled = 0
        self._finished = False
        self.vocabulary = 0
        self._alone = engine_alone()

    def saw(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        phase, module = self._place()
        name = func._schema.name.replace("::", ".")
        if grows_in_place(func, args, kwargs, self._alone):
            self._takes_over(args[0], out)
        elsewhere = func.is_view or allocates_within_kernel() or allocates_on_host()
        need = NOTHING if elsewhere else self.scratch(func, args, kwargs, out)
        for place, tensor in enumerate(tensors_in(out)):
            for part in (tensor,) if tensor.layout is torch.strided else plain_parts(tensor):
                self._born(part, name, phase, module, need.storages[place] if need.storages else 0)
        if func.is_view:
            return
        if need.extra:
            self._passing(need.extra, name, phase, module)
        if self.update >= 0:
            self._add_cost(func, args, kwargs, out, phase, name)

    def steers(self) -> bool:
        return self.phase is not Phase.OPTIMIZER

    def _place(self) -> tuple[Phase, str]:
        """Return the phase and the module that the present op belongs to."""
        node = torch._C._current_autograd_node()
        inside = len(self.modules) > 1
        if node is not None:
            if not inside and self.phase is Phase.FORWARD:
                self._end_forward()
            return Phase.BACKWARD, self.modules[-1] if inside else self._made_by.get(node._sequence_nr(), "")
        if self._gradients_of is not None and self.phase is Phase.OPTIMIZER:
            model, self._gradients_of = self._gradients_of, None
            self.enroll_gradients(model)
        if torch.is_grad_enabled():
            newest = torch.autograd._get_sequence_nr() - 1  # the first op that sees a node is the one that it is of
            self._made_by.setdefault(newest, self.modules[-1])
        return self.phase, self.modules[-1]

    def begin(self, update: int) -> None:
        """Called before each update; costs are kept of the last one."""
        self.update, self.phase = update, Phase.FORWARD
        self.trace.begins.append(len(self.trace.events))
        self.trace.costs.clear()
        self._made_by.clear()
        self._settled = len(self.trace.storages)

    def begin_forward(self, model: nn.Module) -> None:
        """Called when the whole model's forward begins."""
        self.phase, self._gradients_of = Phase.FORWARD, model

    def _end_forward(self) -> None:
        """What the forward allocated and is dead by now was temporary; the rest waits for the backward."""
        alive = set(self._numbers.values())
        for number in range(self._settled, len(self.trace.storages)):
            made = self.trace.storages[number]
            if made.category is Category.ACTIVATION and number not in alive:
                made.category = Category.TEMPORARY
        self._settled = len(self.trace.storages)
        self.phase = Phase.OPTIMIZER  # of what comes after the backward, until the next forward

    def _born(self, tensor: torch.Tensor, op: str, phase: Phase, module: str, real: int = 0) -> None:
        """Record a storage that was not there before; `real` are its bytes where the fake one has other ones."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        nbytes = 0 if address in self._numbers or allocates_within_kernel() else real or storage.nbytes()
        if not nbytes:
            return
        made = Storage(nbytes, self._category(tensor, phase), module, op, phase, self.update, allocates_on_host())
        number = len(self.trace.storages)
        self.trace.storages.append(made)
        self._events_of(made).append((number, nbytes))
        self._numbers[address] = number
        weakref.finalize(storage, self._died, address).atexit = False

    def _takes_over(self, earlier: torch.Tensor, later: torch.Tensor) -> None:
        """The memory of a tensor that is about to die becomes that of another."""
        number = self._numbers.pop(earlier.untyped_storage()._cdata, None)
        if number is not None:
            storage = later.untyped_storage()
            self._numbers[storage._cdata] = number
            weakref.finalize(storage, self._died, storage._cdata).atexit = False

    def _category(self, tensor: torch.Tensor, phase: Phase) -> Category:
        """Return what a storage seems to be for when it is born."""
        if phase is Phase.FORWARD or (phase is Phase.BACKWARD and len(self.modules) > 1):  # or computed again
            wide = tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary and tensor.is_floating_point()
            return Category.LOGITS if wide else Category.ACTIVATION
        return Category.TEMPORARY

    def _died(self, address: int) -> None:
        number = self._numbers.pop(address, None)
        if number is not None and not self._finished:
            made = self.trace.storages[number]
            self._events_of(made).append((number, -made.nbytes))

    def _events_of(self, made: Storage) -> list[tuple[int, int]]:
        return self.trace.host_events if made.host else self.trace.events

    def _passing(self, nbytes: int, op: str, phase: Phase, module: str) -> None:
        number = len(self.trace.storages)
        self.trace.storages.append(Storage(nbytes, Category.WORKSPACE, module, op, phase, self.update))
        self.trace.events += [(number, nbytes), (number, -nbytes)]

    def _add_cost(self, func: Any, args: Any, kwargs: Any, out: Any, phase: Phase, name: str) -> None:
        flops, nbytes, dtype = cost_of(func, args, kwargs, out)
        key = (phase, name, dtype, flops, nbytes)
        cost = self.trace.costs.get(key)
        if cost is None:
            cost = self.trace.costs[key] = OpCost()
        cost.calls += 1
        cost.flops += flops
        cost.nbytes += nbytes

    def finish(self) -> None:
        """End the record: what dies from now on dies because the model is given up."""
        self._finished = True

    # What no op shows (techniques/placement.py)

    def moved_to_host(self, tensor: torch.Tensor) -> None:
        for part in plain_parts(tensor):
            number = self.number_of(part)
            if number is not None and not self.trace.storages[number].host:
                self._replace(part, number, host=True)

    def resized(self, tensor: torch.Tensor) -> None:
        number, nbytes = self.number_of(tensor), tensor.untyped_storage().nbytes()
        if number is None:
            self._born(tensor, "resize", *self._place())
        elif nbytes != self.trace.storages[number].nbytes:
            self._replace(tensor, number, nbytes=nbytes)

    def _replace(self, tensor: torch.Tensor, number: int, **changes: Any) -> None:
        """End a storage's record and begin another for the same tensor."""
        address = tensor.untyped_storage()._cdata
        self._died(address)
        made = replace(self.trace.storages[number], update=self.update, **changes)
        if made.nbytes:
            self._numbers[address] = len(self.trace.storages)
            self._events_of(made).append((self._numbers[address], made.nbytes))
            self.trace.storages.append(made)

    # What a storage is for

    def number_of(self, tensor: torch.Tensor) -> int | None:
        """Return the number of a tensor's storage, None for one that was never seen."""
        return self._numbers.get(tensor.untyped_storage()._cdata)

    def enroll(self, tensors: Any, category: Category, owner: str | None = None) -> None:
        """Record tensors that came into being outside of an op (a batch, a copied model), and say what they are for.

        Args:
            tensors: What to record.
            category: What it is for.
            owner: The module that it belongs to, whichever op made it; None leaves that as it is known.
        """
        for tensor in tensors:
            for part in plain_parts(tensor):
                self._born(part, category.value, self.phase, self.modules[-1])
                number = self.number_of(part)
                if number is not None:
                    made = self.trace.storages[number]
                    made.category = category
                    if owner is not None:
                        made.module = owner
                    elif made.phase is Phase.START:
                        made.module = made.module or self.modules[-1]

    def enroll_model(self, model: nn.Module) -> None:
        """Say which storages are the model's, by module; called again it finds what techniques have added."""
        for name, module in model.named_modules():
            self.modules.append(name)
            self.enroll((p for p in module._parameters.values() if p is not None), Category.PARAMETER)
            self.enroll((b for b in module._buffers.values() if b is not None), Category.BUFFER)
            self.modules.pop()

    def enroll_batch(self, batch: Any) -> None:
        self.enroll(tensors_of(batch), Category.INPUT)

    def enroll_gradients(self, model: nn.Module) -> None:
        """Gradients belong to the modules that own the parameters, whichever op added them up."""
        for name, module in model.named_modules():
            gradients = [p.grad for p in module._parameters.values() if p is not None and p.grad is not None]
            self.enroll(gradients, Category.GRADIENT, owner=name)

    def enroll_state(self, optimizer: torch.optim.Optimizer) -> None:
        states = (value for state in optimizer.state.values() for value in state.values())
        self.enroll([value for value in states if isinstance(value, torch.Tensor)], Category.OPTIMIZER)

    def restart(self) -> None:
        """Begin the trace anew with what is alive now, in the order in which it was made."""
        old, alive = self.trace, sorted(self._numbers.items(), key=lambda item: item[1])
        self.trace = Trace()
        self._numbers.clear()
        for address, number in alive:
            made = old.storages[number]
            made.phase = Phase.START
            self._numbers[address] = len(self.trace.storages)
            self._events_of(made).append((len(self.trace.storages), made.nbytes))
            self.trace.storages.append(made)


@contextmanager
def module_names(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Keep `recorder.modules` at the dotted name of the module whose forward runs."""
    names = {id(module): name for name, module in model.named_modules()}

    def enter(module: nn.Module, args: Any) -> None:
        if module is model:
            recorder.begin_forward(model)
        recorder.modules.append(names.get(id(module), recorder.modules[-1]))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if len(recorder.modules) > 1:
            recorder.modules.pop()

    hooks = [
        nn.modules.module.register_module_forward_pre_hook(enter),
        nn.modules.module.register_module_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
