"""Run a model's own program without its memory: floats are fake, what steers the program is real.

A FakeTensorMode alone carries most models: each tensor has shape, dtype and strides, and no data. It ends where the
program looks at values: a vision-language model counts its image tokens, a mixture of experts sorts tokens by expert, a
constructor spreads drop-path rates with `linspace(...).tolist()`. So this mode, above the fake one, decides op by op:

    no fake input, small result      runs for real (ids, masks, grids, schedules, small tables)
    anything else                    runs on fake tensors; real inputs are turned into fake ones
    a size that values decide        is known where they are real, else assumed (selection.py)
    a fake value that is read        gets an ordinary answer (values.py)

A small real tensor into which fake values were written stays real, for its memory and its graph; its values count as
unknown from then on, and so do those of what is made of it. What the program was told without knowing is noted in
`assumptions`, each with its line.

Not covered: shapes that depend on fake floats through ops that neither file names (custom ops without a fake kernel,
sparse layouts): one clear error that names the op and the line.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type

from floatline.errors import ModelError
from floatline.observe import selection, values
from floatline.observe.layouts import LAID_OUT
from floatline.observe.operands import check_operands
from floatline.observe.real import asking, is_small, really, tensors_in, where
from floatline.step.random_state import python_random_kept
from floatline.techniques.placement import fakes_change_in_place

_ONE_AT_A_TIME = threading.RLock()
_VALUES_UNKNOWN = (DataDependentOutputException, DynamicOutputShapeException)
_DEVICE = torch.ops.prim.device.default
_PLAIN = frozenset({torch.Tensor, nn.Parameter, FakeTensor})
_SPECIAL: dict[Any, Callable[[Any, Any, Any, Any], Any]] = {**values.READING, **selection.SELECTING, **LAID_OUT}


class Faking(TorchDispatchMode):
    """The mode. Use it inside of `with FakeTensorMode(allow_non_fake_inputs=True) as fake_mode`.

    Args:
        fake_mode: The mode below this one.

    Attributes:
        assumptions: What the program asked of values that are not known, and what it was told; each once.
    """

    def __init__(self, fake_mode: FakeTensorMode) -> None:
        super().__init__()
        self.fake_mode = fake_mode
        self.assumptions: dict[str, None] = {}
        self._overwritten: set[int] = set()  # addresses of real storages that hold values nobody knows
        self._asked: tuple[tuple[int, int], bool, int] = ((0, 0), False, 0)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing compiles below this mode, and torch's guard against it costs a tenth of a trace."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:  # two of three calls; asked by autograd for each tensor that passes
            return args[0].fake_device if isinstance(args[0], FakeTensor) else args[0].device
        kwargs = _off_meta(args, kwargs or {})
        if any(kind not in _PLAIN and is_traceable_wrapper_subclass_type(kind) for kind in types):
            return NotImplemented  # shards and low-bit state come back as ops on the tensors that they are made of
        special = _SPECIAL.get(func)
        out = special(self, func, args, kwargs) if special else self.run(func, args, kwargs)
        self.saw(func, args, kwargs, out)
        return out

    def saw(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Called after each op; for observers."""

    def steers(self) -> bool:
        """Say whether the values of what is made now may steer the program; state of an optimizer does not."""
        return True

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an op on fake tensors, or for real where that is small and possible."""
        inputs = [*tensors_in(args), *tensors_in(kwargs)]
        if any(isinstance(tensor, FakeTensor) for tensor in inputs):
            out = self.run_fake(func, args, kwargs)
            if func._schema.is_mutable:
                return self._after_writing(func, args, kwargs, out)
            values.keep_known(self, func, args, kwargs, out)
            return out
        out = self._run_real(func, args, kwargs, inputs)
        if self._overwritten and any(self.is_unknown(tensor) for tensor in inputs):
            self._overwrite(out)
        return out

    def _run_real(self, func: Any, args: Any, kwargs: Any, inputs: list[torch.Tensor]) -> Any:
        """Run an op without fake inputs."""
        if inputs and not any(tensor.numel() > 256 or tensor.is_meta for tensor in inputs):
            return really(func, args, kwargs)  # nothing small grows large but by a factory
        if func._schema.is_mutable:
            return really(func, args, kwargs)
        try:
            guess = func(*args, **kwargs)  # the fake kernel says how large the result will be
        except (*_VALUES_UNKNOWN, UnsupportedOperatorException):
            return really(func, args, kwargs)
        may_steer = bool(inputs) or self.steers()
        if may_steer and all(is_small(tensor) and not tensor.is_meta for tensor in tensors_in(guess)):
            return really(func, args, kwargs)
        if inputs and not any(self.is_unknown(tensor) or tensor.is_meta for tensor in inputs):
            values.know(func, args, kwargs, guess)
        return guess

    def run_fake(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an op on fake tensors.

        Raises:
            ModelError: Its result depends on values, it has no fake kernel, or no real one for these dtypes.
        """
        check_operands(func, args)
        try:
            return func(*args, **kwargs)
        except _VALUES_UNKNOWN:
            raise ModelError(
                f"{func} makes a result whose shape depends on values that are not known before training"
                f"{where() or ''}",
                hint="plan a variant of the model whose shapes are fixed, or give that tensor as an integer input",
            ) from None
        except UnsupportedOperatorException:
            raise ModelError(
                f"{func} has no fake kernel, so its results cannot be predicted{where() or ''}",
                hint=f"register one: @torch.library.register_fake({func.name()!r})",
            ) from None

    def fake(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor as a fake one, the same one each time."""
        if isinstance(tensor, FakeTensor):
            return tensor
        return self.fake_mode.from_tensor(tensor, static_shapes=True)

    # What is not known

    def is_unknown(self, value: Any) -> bool:
        """Say whether a tensor is fake, or real with values that fake ones have gone into."""
        if not isinstance(value, torch.Tensor):
            return False
        if isinstance(value, FakeTensor):
            return True
        if value.layout is not torch.strided:
            return False  # a sparse tensor has no storage to remember
        return bool(self._overwritten) and value.untyped_storage()._cdata in self._overwritten

    def _after_writing(self, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
        """Note which real tensors fake values went into; the result is the tensor itself, not a stand-in for it."""
        places = enumerate(func._schema.arguments)
        taken = [
            args[place] if place < len(args) else kwargs.get(argument.name)
            for place, argument in places
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        written = list(tensors_in(taken))
        self._overwrite(written)
        self._overwrite(values.write_known(self, func, args, kwargs, written))
        alone = len(written) == 1 and isinstance(out, torch.Tensor)
        return written[0] if alone and not isinstance(written[0], FakeTensor) else out

    def _overwrite(self, out: Any) -> None:
        for tensor in tensors_in(out):
            strided = tensor.layout is torch.strided
            if strided and not isinstance(tensor, FakeTensor) and not self.is_unknown(tensor):
                storage = tensor.untyped_storage()
                self._overwritten.add(storage._cdata)
                weakref.finalize(storage, self._overwritten.discard, storage._cdata).atexit = False

    def assume(self, text: str) -> None:
        """Note an answer that was given without knowing."""
        line = where()
        if line is not None:
            self.assumptions[text + line] = None

    def patient(self, answer: bool) -> bool:
        """Return `answer`, or its opposite where one place in a running function has got it too often in a row."""
        place = asking()
        before, said, times = self._asked
        times = times + 1 if (before, said) == (place, answer) else 1
        if times > values.PATIENCE:
            self._asked = (place, answer, 0)
            return not answer
        self._asked = (place, answer, times)
        return answer


def _off_meta(args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return an op's keyword arguments with the CPU as the device where the program asks for the meta device.

    There is no data on either here, and a program may move to the CPU later, which fake tensors cannot (`to_empty`).
    An empty tensor stays: `torch.load` makes one to put a storage of the meta device into.
    """
    device = kwargs.get("device")
    if device is None or torch.device(device).type != "meta" or (args and isinstance(args[0], list) and args[0] == [0]):
        return kwargs
    return {**kwargs, "device": torch.device("cpu")}


@contextmanager
def faking(make: Callable[[FakeTensorMode], Faking] = Faking) -> Iterator[Faking]:
    """Enter the fake mode and the mode above it, whatever the caller is in.

    Gradients are on inside, and tensors are made on the CPU. One thread at a time is inside, for what fake tensors
    and a target's rules change is the whole process's; another one waits. Random numbers of the process (torch's,
    Python's and numpy's) are as before afterwards.
    """
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    with ExitStack() as stack:
        stack.enter_context(_ONE_AT_A_TIME)
        stack.enter_context(_random_numbers_kept())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(fake_mode)
        mode = stack.enter_context(make(fake_mode))
        stack.enter_context(_taught(mode))
        yield mode


@contextmanager
def _random_numbers_kept() -> Iterator[None]:
    """Put the generators back as they are now: a real run after a plan draws what it would have drawn without."""
    with python_random_kept(), torch.random.fork_rng(devices=[]):
        yield


@contextmanager
def _taught(mode: Faking) -> Iterator[None]:
    """Teach fake tensors three things that they do not learn from a mode, because torch does them below or beside it.

    numpy           is refused in C++; answered here.
    copy.deepcopy   copies the storage beside the tensor, and views of the copy lie in memory of their own ever after
                    (`nn.TransformerEncoder` copies its layers); a clone does what is meant.
    Module.to       swaps parameters, which fails on fake ones (techniques/placement.py).
    """
    taught: dict[str, Any] = {"numpy": lambda self, *, force=False: values.array(mode, self), "__deepcopy__": _deepcopy}
    before = {name: FakeTensor.__dict__.get(name) for name in taught}
    for name, method in taught.items():
        setattr(FakeTensor, name, method)
    try:
        with fakes_change_in_place():
            yield
    finally:
        for name, method in before.items():
            delattr(FakeTensor, name) if method is None else setattr(FakeTensor, name, method)


def _deepcopy(tensor: FakeTensor, memo: dict[int, Any]) -> torch.Tensor:
    if id(tensor) in memo:
        copied: torch.Tensor = memo[id(tensor)]
        return copied
    if not tensor.is_leaf:
        raise RuntimeError("Only Tensors created explicitly by the user support the deepcopy protocol at the moment.")
    with torch.no_grad():
        copied = tensor.detach().clone(memory_format=torch.preserve_format)
    if isinstance(tensor, nn.Parameter):
        copied = nn.Parameter(copied, requires_grad=tensor.requires_grad)
    copied.requires_grad_(tensor.requires_grad)
    memo[id(tensor)] = copied
    if tensor.grad is not None:
        copied.grad = copy.deepcopy(tensor.grad, memo)
    own = {name: value for name, value in tensor.__dict__.items() if name not in copied.__dict__}
    copied.__dict__.update(copy.deepcopy(own, memo))
    return copied
