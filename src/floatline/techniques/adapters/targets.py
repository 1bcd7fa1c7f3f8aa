"""Which layers get a LoRA adapter: those that a pattern names, or the usual ones."""

from __future__ import annotations

from difflib import get_close_matches

from torch import nn

from floatline.errors import ConfigError
from floatline.select import near_names, select_modules
from floatline.techniques.layers import repeated_layers
from floatline.techniques.logits.heads import find_head

_UNCALLED_IN_MAMBA = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")


def _is_adaptable(module: nn.Module) -> bool:
    kinds = nn.Linear | nn.Embedding | nn.Conv1d | nn.Conv2d | nn.Conv3d
    return isinstance(module, kinds) or is_transposed_linear(module)


def is_transposed_linear(module: nn.Module) -> bool:
    """Say whether a module is the `Conv1D` of transformers' GPT-2: a Linear with its weight transposed."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers")


def _adaptable(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that can be adapted.

    Those inside `nn.MultiheadAttention` are never called, nor are two of Mamba's, whose kernels read their weights.
    """
    never = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention))
    found = {n: m for n, m in model.named_modules() if n and _is_adaptable(m) and not n.startswith(never)}
    if getattr(getattr(model, "config", None), "model_type", None) in _UNCALLED_IN_MAMBA:  # peft refuses them
        found = {n: m for n, m in found.items() if n.rpartition(".")[2] not in ("out_proj", "conv1d")}
    return found


def matched_layers(model: nn.Module, pattern: str) -> dict[str, nn.Module]:
    """Return the layers that a pattern, or a bare last name, selects.

    Raises:
        ConfigError: It selects none that can be adapted; near names are listed.
    """
    matched = select_modules(model, pattern if "." in pattern else f"**.{pattern}")
    adaptable = _adaptable(model)
    found = {name: module for name, module in matched.items() if name in adaptable}
    if found:
        return found
    bare = {name: name.rpartition(".")[2] for name in adaptable}
    close = get_close_matches(pattern, set(bare.values()), n=2, cutoff=0.6)
    near = [next(name for name, last in bare.items() if last == word) for word in close] or near_names(model, pattern)
    if matched:
        inside = [name for name in adaptable if name.startswith(tuple(f"{other}." for other in matched))]
        near = inside[:3] or near
        kind = ", ".join(sorted({type(module).__name__ for module in matched.values()}))
        raise ConfigError(
            f"lora.targets: {pattern!r} names no layer that can be adapted (Linear, Embedding, Conv), but {kind}",
            hint=f"near names: {', '.join(near)}" if near else "name other layers",
        )
    raise ConfigError(
        f"lora.targets: {pattern!r} matches no layer of {type(model).__name__}",
        hint=f"near names: {', '.join(near)}" if near else "list the names with model.named_modules()",
    )


def usual_targets(model: nn.Module) -> tuple[dict[str, nn.Module], str]:
    """Return the projections of attention, else the Linear layers of repeated layers, and the choice in words."""
    linear = {n: m for n, m in _adaptable(model).items() if isinstance(m, nn.Linear) or is_transposed_linear(m)}
    attention = tuple(f"{name}." for name, module in model.named_modules() if "Attention" in type(module).__name__)
    found = {name: module for name, module in linear.items() if name.startswith(attention)}
    if found:
        return found, f"targets: the {len(found)} projections of attention"
    layers = tuple(f"{name}." for name in repeated_layers(model))
    head, _ = find_head(model)
    found = {name: module for name, module in linear.items() if name.startswith(layers) and name != head}
    if found:
        return found, f"targets: the {len(found)} Linear layers of its repeated layers, for no attention module has any"
    return {}, "it has neither projections of attention nor Linear layers in repeated layers: set targets"
