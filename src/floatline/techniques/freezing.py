"""Freezing: parts of the model are not trained, and a frozen tower keeps no activations.

Frozen parameters need no gradient and no optimizer state. Their activations are another matter: autograd keeps them
wherever a gradient passes through. A tower fed by data (the vision encoder of a language model) needs none, but one
hook that makes an embedding require grad (transformers' `enable_input_require_grads`, put there for checkpointing) and
the whole tower keeps all of them (ms-swift#10214). So the forward of each outermost fully frozen module runs under
`no_grad`, unless something that comes in requires grad or something inside is trainable; both are looked at in each
call. Gradients to trainable parts below a frozen module pass as ever, and so do those to inputs that require grad.

Batch norm in a frozen module normalises by its running statistics, which do not move, as in evaluation; with
`batch_norm="train"` it goes on with those of the batch and updates them. Dropout in frozen modules goes on.

A tied weight is one weight: freezing the embedding freezes the output head that shares it (a note says so).

Not covered: trainable tensors that reach a frozen module otherwise than through its arguments (a global, a closure).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from typing import Any, Literal

import torch
from torch import nn

from floatline.errors import ConfigError
from floatline.hardware import Hardware
from floatline.patch import ForwardPatch
from floatline.select import matches, near_names
from floatline.techniques.base import Applied, Stage, Technique
from floatline.techniques.layers import outermost

_BATCH_NORMS = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True, kw_only=True)
class Freezing(Technique):
    """Freeze modules or parameters by name.

    Args:
        modules: Names or patterns of modules or parameters (`model.visual`, `model.layers.*.mlp`, `**.bias`).
        keep: Names or patterns of those among them that stay as they are.
        batch_norm: Whether frozen batch norms use and leave their running statistics ("eval") or behave as the rest of
            the model does ("train").

    Raises:
        ConfigError: No pattern.

    Example:
        >>> model = nn.ModuleDict({"tower": nn.Linear(2, 2), "out": nn.Linear(2, 1)})
        >>> Freezing(modules=("tower",)).apply(model).touched
        ('tower',)
    """

    name = "freezing"
    stage = Stage.FREEZE

    modules: tuple[str, ...]
    keep: tuple[str, ...] = ()
    batch_norm: Literal["eval", "train"] = "eval"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.modules:
            raise self.bad("modules", "name at least one module or parameter")

    def names(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the parameters that are frozen, by dotted name.

        Raises:
            ConfigError: A pattern matches nothing (near names are listed), or `keep` names what `modules` does not.
        """
        chosen = select_parameters(model, self.modules, setting="freezing.modules")
        kept = self._kept(model, {id(parameter) for parameter in chosen.values()})
        return {name: parameter for name, parameter in chosen.items() if id(parameter) not in kept}

    def _kept(self, model: nn.Module, chosen: set[int]) -> set[int]:
        kept: set[int] = set()
        for pattern in self.keep:
            found = {id(p) for p in select_parameters(model, (pattern,), setting="freezing.keep").values()}
            if not found & chosen:
                raise ConfigError(
                    f"freezing.keep: {pattern!r} names nothing that freezing.modules ({', '.join(self.modules)}) names",
                    hint="drop it: what freezing.modules does not name stays as it is",
                )
            kept |= found
        return kept

    def _apply(self, model: nn.Module, hardware: Hardware) -> Applied:
        chosen = self.names(model)
        frozen = [parameter for parameter in chosen.values() if parameter.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(False)
        towers = _frozen_modules(model, {id(parameter) for parameter in chosen.values()})
        patches = [ForwardPatch(module).install(_as_in_evaluation) for module in self._batch_norms(towers)]
        patches += [ForwardPatch(module).install(_without_graph) for module in towers.values()]
        loose = [name for name in chosen if not any(name.startswith(f"{tower}.") for tower in towers)]

        def undo() -> None:
            for patch in reversed(patches):
                patch.undo()
            for parameter in frozen:
                parameter.requires_grad_(True)

        return Applied(
            technique=self,
            touched=(*towers, *loose),
            undo=undo,
            notes=_notes(model, chosen, towers) if chosen else ("keep names all that modules names",),
            facts=lambda: {"parameters": float(sum(parameter.numel() for parameter in chosen.values()))},
        )

    def _batch_norms(self, towers: dict[str, nn.Module]) -> list[nn.Module]:
        if self.batch_norm == "train":
            return []
        found = {
            id(part): part for tower in towers.values() for part in tower.modules() if isinstance(part, _BATCH_NORMS)
        }
        return list(found.values())


def select_parameters(model: nn.Module, patterns: Iterable[str], *, setting: str) -> dict[str, nn.Parameter]:
    """Return the parameters, each once, that patterns name or that lie in modules that patterns name.

    Args:
        model: Any module.
        patterns: As in `floatline.select`, of modules or parameters.
        setting: The setting's name, for the error.

    Raises:
        ConfigError: A pattern matches nothing; near names are listed.
    """
    found: dict[str, nn.Parameter] = {}
    every = dict(model.named_parameters(remove_duplicate=False))
    modules = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    for pattern in patterns:
        inside = tuple(f"{name}." for name in modules if matches(pattern, name))
        names = [name for name in every if matches(pattern, name) or name.startswith(inside)]
        if not names:
            near = [*get_close_matches(pattern, every, n=2, cutoff=0.7), *near_names(model, pattern)][:3]
            raise ConfigError(
                f"{setting}: {pattern!r} matches no module with parameters and no parameter of {type(model).__name__}",
                hint=f"near names: {', '.join(near)}" if near else "list the names with model.named_parameters()",
            )
        found.update({name: every[name] for name in names})
    once: dict[int, str] = {}
    return {name: p for name, p in found.items() if once.setdefault(id(p), name) == name}


def _frozen_modules(model: nn.Module, chosen: set[int]) -> dict[str, nn.Module]:
    """Return the outermost modules that hold chosen parameters, nothing trainable, and are called themselves."""
    found = {}
    for name, module in model.named_modules():
        parameters = list(module.parameters())
        called = type(module).forward is not nn.Module.forward  # not a mere container
        frozen = not any(parameter.requires_grad for parameter in parameters)
        if name and called and frozen and any(id(parameter) in chosen for parameter in parameters):
            found[name] = module
    return outermost(found)


def _notes(model: nn.Module, chosen: dict[str, nn.Parameter], towers: dict[str, nn.Module]) -> tuple[str, ...]:
    names = {id(parameter): name for name, parameter in chosen.items()}
    tied = [
        f"{other} is tied to {names[id(parameter)]} and frozen with it"
        for other, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) in names and other != names[id(parameter)]
    ]
    without = f"{', '.join(list(towers)[:3])}{' ...' if len(towers) > 3 else ''}"
    return (*tied, *([f"no activations are kept in {without} unless its inputs require grad"] if towers else []))


def _without_graph(forward: Callable[..., Any]) -> Callable[..., Any]:
    def frozen_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if requires_grad((args, kwargs)) or any(parameter.requires_grad for parameter in self.parameters()):
            return forward(self, *args, **kwargs)
        with torch.no_grad():
            return forward(self, *args, **kwargs)

    return frozen_forward


def _as_in_evaluation(forward: Callable[..., Any]) -> Callable[..., Any]:
    def frozen_norm(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        training, self.training = self.training, False
        try:
            return forward(self, *args, **kwargs)
        finally:
            self.training = training

    return frozen_norm


def requires_grad(value: Any, depth: int = 6) -> bool:
    """Say whether any tensor in a nested value requires grad: containers, dataclasses, modules and plain objects.

    Objects count because key-value caches carry trainable prefixes (prefix tuning).

    Args:
        value: Anything.
        depth: How deep to look; what lies deeper is taken to require grad.

    >>> requires_grad({"a": [torch.ones(1)]}), requires_grad({"a": [torch.ones(1, requires_grad=True)]})
    (False, True)
    """
    if isinstance(value, torch.Tensor):
        return value.requires_grad
    if isinstance(value, nn.Module):
        return any(parameter.requires_grad for parameter in value.parameters())
    if value is None or isinstance(value, str | int | float | bool | bytes | torch.dtype | torch.device | type):
        return False
    if isinstance(value, dict):
        parts: Iterable[Any] = value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        parts = value
    elif is_dataclass(value):
        parts = [getattr(value, field.name, None) for field in fields(value)]
    else:
        parts = getattr(value, "__dict__", {}).values()
    return any(depth == 0 or requires_grad(part, depth - 1) for part in parts)
