"""Follow a model's step in eager mode, always knowing which module's forward runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def followed(model: nn.Module | None, modules: list[str]) -> Iterator[None]:
    """Keep the last of `modules` at the dotted name of the module whose forward runs.

    What is compiled runs eager. The backward runs in this thread on CUDA as well, so that its nodes have one count.

    Args:
        model: Whose modules to name; None for none.
        modules: Holds "" for the top; names are appended and taken away.
    """
    named = list(model.named_modules()) if model is not None else []
    names = {id(module): plain_name(name) for name, module in named}

    def enter(module: nn.Module, args: Any) -> None:
        modules.append(names.get(id(module), modules[-1]))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if len(modules) > 1:
            modules.pop()

    with ExitStack() as stack:
        for _, module in named:
            stack.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def plain_name(name: str) -> str:
    """Return a module's or tensor's name without what wrappers put into it (torch.compile, checkpointing)."""
    return ".".join(part for part in name.split(".") if part not in ("_orig_mod", "_checkpoint_wrapped_module"))
