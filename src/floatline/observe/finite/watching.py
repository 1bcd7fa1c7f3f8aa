"""Put a watch on a step: names of modules, functions of torch's interface, compiled parts run eager."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode

from floatline.observe.finite.watch import Watch


class _Calls(TorchFunctionMode):
    """Tells the watch which function of torch's Python interface runs, so that a remedy can meet it again."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.watch.function = getattr(func, "__name__", "")
        return func(*args, **(kwargs or {}))


@contextmanager
def watching(model: nn.Module | None = None) -> Iterator[Watch]:
    """Watch all ops inside, with the names of `model`'s modules.

    What is compiled runs eager. The backward runs in this thread on CUDA as well, so that its nodes have one count.
    """
    watch = Watch()
    names = {id(module): plain_name(name) for name, module in (model.named_modules() if model is not None else ())}

    def enter(module: nn.Module, args: Any) -> None:
        watch.modules.append(names.get(id(module), watch.modules[-1]))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if len(watch.modules) > 1:
            watch.modules.pop()

    with ExitStack() as stack:
        for module in model.modules() if model is not None else ():
            stack.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(watch)
        stack.enter_context(_Calls(watch))
        yield watch


def backward(loss: torch.Tensor) -> None:
    """Run a scalar's backward so that modes see what the program does in it: hooks, forwards that are computed again.

    `Tensor.backward` is itself a function of torch's interface. While a mode handles one, the mode is off.
    """
    seed = torch.ones_like(loss)
    _engine_run_backward((loss,), (seed,), False, False, (), allow_unreachable=True, accumulate_grad=True)


def plain_name(name: str) -> str:
    """Return a module's or tensor's name without what wrappers put into it (torch.compile, checkpointing)."""
    return ".".join(part for part in name.split(".") if part not in ("_orig_mod", "_checkpoint_wrapped_module"))
