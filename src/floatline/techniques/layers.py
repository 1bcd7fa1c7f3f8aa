"""Find a model's repeated layers: the parts that techniques recompute, compile or shard one by one.

Hugging Face models mark theirs: each decoder or encoder layer that may be recomputed is a `GradientCheckpointingLayer`.
Elsewhere the layers are the children of the outermost `ModuleList` or `Sequential` that repeats one class.
"""

from __future__ import annotations

from collections import Counter

from torch import nn

from floatline.errors import ConfigError
from floatline.select import near_names, select_modules


def repeated_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the model's repeated layers by dotted name, in the model's order; empty where nothing repeats.

    >>> list(repeated_layers(nn.Sequential(nn.Linear(2, 2), nn.Sequential(*[nn.GRU(2, 2) for _ in range(3)]))))
    ['1.0', '1.1', '1.2']
    """
    marked = {
        name: module
        for name, module in model.named_modules()
        if any(base.__name__ == "GradientCheckpointingLayer" for base in type(module).__mro__)
    }
    return outermost(marked) if marked else _children_of_lists(model)


def _children_of_lists(model: nn.Module) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or _inside(name, found):
            continue
        children = {f"{name}.{key}".lstrip("."): child for key, child in module.named_children()}
        weighty = {key: child for key, child in children.items() if next(child.parameters(), None) is not None}
        counts = Counter(type(child) for child in weighty.values())
        repeated = {kind for kind, count in counts.items() if count > 1 and not _is_one_op(kind) and _is_called(kind)}
        found.update({key: child for key, child in weighty.items() if type(child) in repeated})
    return found


def _is_one_op(kind: type[nn.Module]) -> bool:
    """Say whether a class is a single op of torch: alone it holds no activations worth recomputing."""
    return kind.__module__.startswith("torch.nn.modules") and not issubclass(
        kind,
        nn.Sequential | nn.TransformerEncoderLayer | nn.TransformerDecoderLayer | nn.RNNBase | nn.MultiheadAttention,
    )


def _is_called(kind: type[nn.Module]) -> bool:
    """Say whether a class has a forward; lists and other containers have none, what is in them is called."""
    return kind.forward is not nn.Module.forward


def _inside(name: str, found: dict[str, nn.Module]) -> bool:
    return any(name == other or name.startswith(f"{other}.") for other in found)


def outermost(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Leave out modules that lie inside another of them."""
    kept: dict[str, nn.Module] = {}
    for name, module in modules.items():
        if not _inside(name, kept):
            kept[name] = module
    return kept


def chosen_layers(model: nn.Module, patterns: tuple[str, ...], *, setting: str) -> dict[str, nn.Module]:
    """Return the modules that `patterns` select, or the repeated layers where there are none.

    Args:
        setting: The setting's name, for the error.

    Raises:
        ConfigError: A pattern matches nothing (near names are listed), or only lists that are never called themselves.
    """
    if not patterns:
        return repeated_layers(model)
    found: dict[str, nn.Module] = {}
    for pattern in patterns:
        matched = select_modules(model, pattern)
        if not matched:
            near = near_names(model, pattern)
            raise ConfigError(
                f"{setting}: {pattern!r} matches no module of {type(model).__name__}",
                hint=f"near names: {', '.join(near)}" if near else "list the names with model.named_modules()",
            )
        called = {name: module for name, module in matched.items() if _is_called(type(module))}
        if not called:
            name, module = next(iter(matched.items()))
            raise ConfigError(
                f"{setting}: {name} is a {type(module).__name__} that is never called itself",
                hint=f"name what is in it: {name}.*",
            )
        found.update(called)
    return found
