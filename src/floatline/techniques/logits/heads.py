"""Find a language model's output head: the Linear layer that turns hidden states into logits over the vocabulary.

Hugging Face models name theirs (`get_output_embeddings`). Elsewhere it is the one Linear layer with as many outputs as
an embedding of the model has rows.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from floatline.errors import ConfigError
from floatline.select import near_names, select_modules


def find_head(model: nn.Module, pattern: str | None = None) -> tuple[str, str]:
    """Return the dotted name of the output head, or "", and how it was found or why not.

    Args:
        model: Any module.
        pattern: Name or pattern of the head; None finds it.

    Raises:
        ConfigError: `pattern` does not match exactly one Linear layer.

    >>> find_head(nn.ModuleDict({"embed": nn.Embedding(9, 4), "up": nn.Linear(4, 8), "out": nn.Linear(4, 9)}))
    ('out', 'the only Linear with as many outputs (9) as an embedding has rows')
    """
    if pattern is not None:
        return _named(model, pattern), "as named"
    named: Any = getattr(model, "get_output_embeddings", None)
    head = _ask(named) if callable(named) else None
    for name, module in model.named_modules():
        if module is head and name and is_linear(module):
            return name, "the model's output embeddings"
    return _by_size(model)


def is_linear(module: nn.Module | None) -> bool:
    """Say whether a module is a Linear layer, bare or wrapped by an adapter."""
    return isinstance(module, nn.Linear) or isinstance(getattr(module, "base_layer", None), nn.Linear)


def _named(model: nn.Module, pattern: str) -> str:
    found = {name: module for name, module in select_modules(model, pattern).items() if is_linear(module)}
    if len(found) == 1:
        return next(iter(found))
    if found:
        raise ConfigError(f"head {pattern!r} matches {len(found)} Linear layers", hint=f"name one: {', '.join(found)}")
    near = near_names(model, pattern)
    raise ConfigError(
        f"head {pattern!r} matches no Linear layer of {type(model).__name__}",
        hint=f"near names: {', '.join(near)}" if near else "list the names with model.named_modules()",
    )


def _ask(get: Any) -> nn.Module | None:
    try:
        found = get()
    except (AttributeError, NotImplementedError):  # models without a head inherit the method
        return None
    return found if isinstance(found, nn.Module) else None


def _by_size(model: nn.Module) -> tuple[str, str]:
    sizes = {module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)}
    fitting: dict[str, int] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{other}.") for other in fitting)
        outputs = getattr(module, "out_features", None)
        if name and is_linear(module) and outputs in sizes and not inside:
            fitting[name] = int(outputs)
    largest = [name for name, outputs in fitting.items() if outputs == max(fitting.values())]
    if len(largest) == 1:
        return largest[0], f"the only Linear with as many outputs ({fitting[largest[0]]}) as an embedding has rows"
    if largest:
        return "", f"several Linear layers could be the output head ({', '.join(largest)}): set head"
    return "", "no Linear has as many outputs as an embedding has rows: set head"
