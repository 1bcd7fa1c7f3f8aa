"""What a tensor that was there before the step is called: a parameter, a buffer, an argument of the model."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten_with_path

from floatline.observe.finite import plain_name, storage_of


class Names:
    """Finds a tensor's name by its storage.

    Args:
        model: Its parameters and buffers.
        forward: Its closure and globals.
        optimizer: Its state.
    """

    def __init__(
        self, model: nn.Module, forward: Callable[[], Any] | None = None, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        self._known: dict[int, tuple[str, str]] = {}
        self.batch: dict[str, torch.Tensor] = {}
        self.variables = _variables(forward) if forward is not None else {}
        for phase, pairs in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
            for name, tensor in pairs:
                self._add(tensor, phase, plain_name(name))
        for owner, module in model.named_modules():  # a tensor that is a mere attribute is a buffer to its readers
            for key, value in vars(module).items():
                if isinstance(value, torch.Tensor):
                    self._add(value, "buffer", plain_name(f"{owner}.{key}".lstrip(".")))
        for group in optimizer.param_groups if optimizer is not None else ():
            for key, value in group.items():
                if isinstance(value, torch.Tensor):
                    self._add(value, "optimizer", key)
            for parameter in group["params"]:
                name = self.of(parameter)[1]
                for key, value in optimizer.state.get(parameter, {}).items() if optimizer is not None else ():
                    if isinstance(value, torch.Tensor):
                        self._add(value, "optimizer", f"{key} of {name}")

    def _add(self, tensor: torch.Tensor, phase: str, name: str) -> None:
        key = storage_of(tensor)
        if key is not None:
            self._known.setdefault(key, (phase, name))

    def of(self, tensor: torch.Tensor) -> tuple[str, str]:
        """Return ("parameter" | "buffer" | "optimizer" | "input", name); the name is "" where nobody names it."""
        key = storage_of(tensor)
        if key is None:
            return "input", ""
        if key in self._known:
            return self._known[key]
        return "input", next((name for name, other in self.variables.items() if storage_of(other) == key), "")

    def known(self, storage: int | None) -> str:
        """Return the name of a parameter, buffer or argument of the model by its storage, "" where it is none."""
        return self._known[storage][1] if storage in self._known else ""

    @contextmanager
    def of_arguments(self, model: nn.Module) -> Iterator[None]:
        """Learn the names of the tensors that the model is called with, inside."""

        def learn(module: nn.Module, args: Any, kwargs: Any) -> None:
            with torch._C.DisableTorchFunction():  # calls of the program are counted (watch.py), these are not its own
                for name, value in _named(module, args, kwargs).items():
                    for path, tensor in _tensors(name, value):
                        self.batch.setdefault(path, tensor)
                        self._add(tensor, "input", path)

        hook = model.register_forward_pre_hook(learn, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    try:
        positional = [p.name for p in inspect.signature(module.forward).parameters.values()
                      if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]  # fmt: skip
    except (TypeError, ValueError):
        positional = []
    named = {positional[i] if i < len(positional) else f"args[{i}]": value for i, value in enumerate(args)}
    return {**named, **kwargs}


def _tensors(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors in nested containers with their paths."""
    if isinstance(value, Mapping) and not isinstance(value, dict):
        value = dict(value)
    leaves, _ = tree_flatten_with_path(value)
    for path, leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            yield name + "".join(map(str, path)), leaf


def _variables(forward: Callable[[], Any]) -> dict[str, torch.Tensor]:
    """Return the tensors that a function sees: closure, the globals that it uses, defaults, what it is bound to."""
    found: dict[str, torch.Tensor] = {}
    for scope in _scopes(forward):
        for name, value in scope.items():
            if not isinstance(value, (nn.Module, type)):
                for path, tensor in _tensors(name, value):
                    found.setdefault(path, tensor)
    return found


def _scopes(forward: Callable[[], Any]) -> Iterator[Mapping[str, Any]]:
    if isinstance(forward, functools.partial):
        yield forward.keywords
        yield {f"args[{place}]": value for place, value in enumerate(forward.args)}
        yield from _scopes(forward.func)
        return
    function = inspect.unwrap(forward)
    try:
        seen = inspect.getclosurevars(function)
        yield seen.nonlocals
        yield seen.globals
    except TypeError:  # a callable object
        yield vars(function) if hasattr(function, "__dict__") else {}
    owner = getattr(function, "__self__", None)
    if owner is not None and hasattr(owner, "__dict__"):
        yield {f"self.{name}": value for name, value in vars(owner).items()}
    yield getattr(function, "__kwdefaults__", None) or {}
    defaults = getattr(function, "__defaults__", None) or ()
    names = getattr(getattr(function, "__code__", None), "co_varnames", ())
    count = getattr(getattr(function, "__code__", None), "co_argcount", 0)
    yield dict(zip(names[count - len(defaults) : count], defaults, strict=False))
