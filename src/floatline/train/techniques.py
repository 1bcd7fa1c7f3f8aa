"""The recipe's techniques: how they are written, and what of them may change on resume.

    techniques: {checkpointing: {every: 2}, offload: true}
    techniques: [checkpointing(every=2), offload]             # the same

With `memory: auto` a technique that is null or false is not used by the plan either.

After reading, each technique has all its settings spelled out, so that a resolved recipe runs the same again when a
default changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from floatline.errors import ConfigError
from floatline.techniques import Technique, make_technique
from floatline.techniques.registry import technique_class

FREE_TECHNIQUES = frozenset(
    {
        "accumulation",
        "checkpointing",
        "offload",
        "attention",
        "compile",
        "chunked_loss",
        "optimizer_offload",
        "sharding",
    }
)
"""Those that only change how the same updates are computed: a run may be resumed with others of them."""


def read_techniques(tree: Mapping[str, Any]) -> list[Technique]:
    """Return the techniques of a mapping name -> settings; true takes the defaults, null and false leave it out.

    Raises:
        ConfigError: Unknown technique or setting, or a value that does not fit.
    """
    return [make_technique(name, _settings(name, value)) for name, value in tree.items() if value not in (None, False)]


def _settings(name: str, value: Any) -> dict[str, Any]:
    if value is True:
        return {}
    if isinstance(value, Mapping):
        return dict(value)
    raise ConfigError(f"techniques.{name} is {value!r}", hint="write true, null, or its settings: {setting: value}")


def write_techniques(techniques: list[Technique]) -> dict[str, Any]:
    """Return techniques as a recipe has them, every setting spelled out; true where there are none."""
    return {t.name: {f.name: _plain(getattr(t, f.name)) for f in fields(t)} or True for t in techniques}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def technique_tree(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe's tree with its techniques checked and spelled out; `techniques.precision` becomes `precision`.

    Raises:
        ConfigError: A technique that is unknown, written wrongly or given twice.
    """
    given = tree.get("techniques") or {}
    if isinstance(given, str):
        given = [given]
    if isinstance(given, list):
        techniques = [make_technique(text) for text in given]
    elif isinstance(given, Mapping):
        techniques = read_techniques(given)
    else:
        raise ConfigError(f"techniques is {given!r}", hint="write {checkpointing: true, ...} or a list of names")
    names = [technique.name for technique in techniques]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ConfigError(f"techniques names {twice} twice", hint="keep one of them")
    policy = next((technique.policy for technique in techniques if technique.name == "precision"), None)  # type: ignore[attr-defined]
    left_out = _left_out(given) if tree.get("memory") else {}
    tree = {**tree, "techniques": write_techniques([t for t in techniques if t.name != "precision"]) | left_out}
    if policy is None:
        return tree
    if tree.get("precision", "auto") not in ("auto", policy):
        raise ConfigError(
            f"precision={tree['precision']} and techniques.precision.policy={policy}", hint="give one of them"
        )
    return {**tree, "precision": policy}


def _left_out(given: Any) -> dict[str, bool]:
    """Return what a recipe that is planned says no to; else there is nobody to be told."""
    names = [name for name, value in given.items() if value in (None, False)] if isinstance(given, Mapping) else []
    for name in names:
        technique_class(name)
    return dict.fromkeys(names, False)


def with_free_techniques(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return the techniques of a run that goes on: its own, with those that may change as they are asked for now."""
    kept = {name: value for name, value in stored.items() if name not in FREE_TECHNIQUES}
    return kept | {name: value for name, value in asked.items() if name in FREE_TECHNIQUES}
