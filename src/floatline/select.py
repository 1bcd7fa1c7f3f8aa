"""Select modules by dotted name, one path component at a time.

    `*`    exactly one component          model.visual.blocks.*.mlp
    `**`   any number of components       **.lm_head
    `fc*`  a glob inside one component    model.visual.blocks.*.mlp.linear_fc*

Whole components are matched, never substrings: a rule for `wo` does not touch `word_embedding` (the mistake behind
transformers#26589). Patterns are anchored at the model's root.
"""

from __future__ import annotations

from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn


def matches(pattern: str, name: str) -> bool:
    """Say whether the dotted `name` matches `pattern`.

    >>> matches("blocks.*.mlp", "blocks.0.mlp"), matches("blocks.*.mlp", "blocks.0.mlp.fc")
    (True, False)
    >>> matches("**.mlp", "a.b.mlp"), matches("wo", "word_embedding")
    (True, False)
    """
    return _match(pattern.split("."), name.split("."))


def _match(pattern: list[str], name: list[str]) -> bool:
    if not pattern:
        return not name
    head, *rest = pattern
    if head == "**":
        return any(_match(rest, name[start:]) for start in range(len(name) + 1))
    return bool(name) and fnmatchcase(name[0], head) and _match(rest, name[1:])


def select_modules(model: nn.Module, pattern: str) -> dict[str, nn.Module]:
    """Return the modules of `model` whose dotted name matches `pattern`, in the model's order."""
    return {name: module for name, module in model.named_modules() if name and matches(pattern, name)}


def near_names(model: nn.Module, pattern: str, count: int = 3) -> list[str]:
    """Return dotted module names that look like `pattern`, for error messages."""
    names = [name for name, _ in model.named_modules() if name]
    near = get_close_matches(pattern, names, n=count, cutoff=0.5)
    last = pattern.split(".")[-1]
    same_end = [name for name in names if name.split(".")[-1] == last and name not in near]
    return (near + same_end)[:count]
