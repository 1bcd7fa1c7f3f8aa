"""The attention implementations of Hugging Face models: which a model has, setting another, putting the old ones back.

A model's config names its implementation ("eager", "sdpa", "flash_attention_2", "flex_attention" ...), and so does each
part's own config: the vision tower of a vision-language model may have another than the text model. Attention modules
read the name at each forward, so setting it needs no new module. `set_attn_implementation` (transformers 5) checks what
a model supports and raises where it does not; then the parts are tried one by one.

Not covered: remote code that picks its attention class when the model is built; transformers leaves that as it is.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from floatline.techniques.layers import outermost

NAMES = {"flex": "flex_attention", "flash-attn-2": "flash_attention_2", "flash-attn-3": "flash_attention_3"}
"""Our kernel names -> transformers' implementation names."""

_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
Snapshot = list[tuple[Any, Any]]


def hugging_face_parts(model: nn.Module) -> dict[str, nn.Module]:
    """Return the outermost modules whose attention implementation can be set, by dotted name ("" is the model)."""
    if hasattr(model, "set_attn_implementation"):
        return {"": model}
    return outermost({name: part for name, part in model.named_modules() if hasattr(part, "set_attn_implementation")})


def configs_of(model: nn.Module) -> list[Any]:
    """Return every config in the model that names an attention implementation, each once."""
    found: dict[int, Any] = {}
    queue: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    while queue:
        config = queue.pop()
        if id(config) in found or not hasattr(config, "_attn_implementation_internal"):
            continue
        found[id(config)] = config
        queue += [sub for key in config.sub_configs if (sub := getattr(config, key, None)) is not None]
    return list(found.values())


def has_config(module: nn.Module) -> bool:
    """Say whether a module holds a config that names an attention implementation."""
    return hasattr(getattr(module, "config", None), "_attn_implementation")


def implementations(model: nn.Module) -> set[str]:
    """Return the names of the implementations in use."""
    return {config._attn_implementation for config in configs_of(model)} - {None}


def attention_dropout(model: nn.Module) -> float:
    """Return the largest dropout of attention weights that a config asks for."""
    return max((float(getattr(c, key, 0.0) or 0.0) for c in configs_of(model) for key in _DROPOUTS), default=0.0)


def snapshot(model: nn.Module) -> Snapshot:
    """Return each config with the implementation it names now."""
    return [(config, config._attn_implementation_internal) for config in configs_of(model)]


def restore(taken: Snapshot) -> None:
    """Put back what `snapshot` returned. The inner attribute is set: the property would spread to the parts."""
    for config, implementation in taken:
        config._attn_implementation_internal = implementation


def kernel_of(implementation: str) -> str | None:
    """Return our name of the kernel behind an implementation, None where it is SDPA's, eager or unknown.

    >>> kernel_of("flash_attention_2"), kernel_of("kernels-community/flash-attn3"), kernel_of("sdpa")
    ('flash-attn-2', 'flash-attn-3', None)
    """
    known = {name: kernel for kernel, name in NAMES.items()}
    if "/" in implementation:  # a kernel from the Hub, which transformers takes where the package is not installed
        return (
            "flash-attn-3" if "attn3" in implementation else "flash-attn-2" if "flash-attn" in implementation else None
        )
    return known.get(implementation)


def switch(part: nn.Module, implementation: str) -> tuple[bool, list[str]]:
    """Give a Hugging Face model an attention implementation, or at least those of its parts that support it.

    Returns:
        Whether anything has it now, and what keeps its old one, each with the reason.
    """
    kept = _try_all(part, implementation)
    if kept is None:
        return True, []
    reasons, changed = [kept], False
    for key in getattr(part.config, "sub_configs", {}):  # the whole was refused: perhaps one tower alone can
        if getattr(part.config, key, None) is not None:
            reason = _try_all(part, {key: implementation})
            changed = changed or reason is None
            reasons += [f"{key}: {reason}"] if reason and reason != kept else []
    return changed, reasons


def _try_all(part: Any, implementation: str | dict[str, str]) -> str | None:
    """Set it; where that is refused, leave all as it was and return the reason."""
    taken = snapshot(part)
    try:
        part.set_attn_implementation(implementation)
    except Exception as error:  # unsupported (ValueError), package (ImportError), or a kernel that cannot be fetched
        restore(taken)
        return f"{type(part).__name__} keeps {_spelled(taken)}: {_first_sentence(error)}"
    wanted = implementation if isinstance(implementation, str) else next(iter(implementation.values()))
    now = snapshot(part)  # a kernel from the Hub goes by another name than the one asked for
    if now != taken or any(name == wanted for _, name in now):
        return None
    return f"{type(part).__name__} keeps {_spelled(taken)}: its attention cannot be set from outside"


def _spelled(taken: Snapshot) -> str:
    return ", ".join(sorted({str(implementation) for _, implementation in taken}))


def _first_sentence(error: Exception) -> str:
    return re.split(r"(?<=[a-z`\"'])\. |\n", str(error).strip())[0].rstrip(".") or type(error).__name__
