"""Techniques by name: from a recipe's settings or a text to the object.

Each technique's module is imported when it is first asked for by name.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import MISSING, fields
from importlib import import_module
from typing import Any

from floatline.errors import ConfigError, did_you_mean
from floatline.techniques.base import Technique

HOMES = {
    "precision": "precision.MixedPrecision",
    "accumulation": "accumulation.Accumulation",
    "checkpointing": "checkpointing.Checkpointing",
    "attention": "attention.Attention",
    "offload": "offload.Offload",
    "sharding": "sharding.Sharding",
    "batching": "batching.Batching",
    "packing": "packing.Packing",
    "low_bit_optimizer": "low_bit_optimizer.LowBitOptimizer",
    "optimizer_offload": "optimizer_offload.OptimizerOffload",
    "master_weights": "master_weights.Fp32Master",
    "kahan": "kahan.Kahan",
    "stochastic_rounding": "stochastic_rounding.StochasticRounding",
    "optimizer_in_backward": "optimizer_in_backward.OptimizerInBackward",
    "freezing": "freezing.Freezing",
    "lora": "lora.Lora",
    "chunked_loss": "chunked_loss.ChunkedLoss",
    "compile": "compile.Compile",
}
"""Name of each technique -> module and class in this folder."""


def technique_class(name: str) -> type[Technique]:
    """Return the class of a technique.

    Raises:
        ConfigError: No technique has that name.
    """
    if name not in HOMES:
        raise ConfigError(f"there is no technique {name!r}", hint=did_you_mean(name, HOMES))
    module, class_name = HOMES[name].split(".")
    found: type[Technique] = getattr(import_module(f"floatline.techniques.{module}"), class_name)
    return found


def make_technique(spec: Technique | str, settings: Mapping[str, Any] | None = None) -> Technique:
    """Return the technique that a text, or a name with settings, describes.

    Args:
        spec: A technique (returned as it is), a name, or a text as techniques print: `checkpointing(every=2)`.
        settings: Settings by name, as recipes have them; only with a bare name.

    Raises:
        ConfigError: Unknown technique or setting, a value that does not fit, or a setting that is missing.

    >>> str(make_technique("checkpointing(every=2)")) == str(make_technique("checkpointing", {"every": 2}))
    True
    """
    if isinstance(spec, Technique):
        return spec
    if not isinstance(spec, str):
        raise ConfigError(
            f"{spec!r} is not a technique", hint='give e.g. "checkpointing(every=2)", or fl.techniques.Checkpointing()'
        )
    name, given = (spec.strip(), dict(settings or {})) if settings is not None else _parse(spec)
    kind = technique_class(name)
    known = {field.name: field for field in fields(kind)}
    for key in given:
        if key not in known:
            raise ConfigError(
                f"{name} has no setting {key!r}", hint=did_you_mean(key, known) if known else "it has none"
            )
    for key, field in known.items():
        if key not in given and field.default is MISSING and field.default_factory is MISSING:
            raise ConfigError(f"{name} needs {key}", hint=f"write {name}({key}=...)")
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in given.items()})


def _parse(text: str) -> tuple[str, dict[str, Any]]:
    """Read `name` or `name(key=value, ...)`; bare words are taken as texts."""
    bad = ConfigError(f"{text!r} is not a technique", hint="write a name, or name(setting=value, ...)")
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError):
        raise bad from None
    if isinstance(node, ast.Name):
        return node.id, {}
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
        raise bad
    settings = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise bad
        settings[keyword.arg] = (
            keyword.value.id if isinstance(keyword.value, ast.Name) else _literal(keyword.value, bad)
        )
    return node.func.id, settings


def _literal(node: ast.expr, bad: ConfigError) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise bad from None
