"""Descriptions of well-known models that come with Floatline: facts of their configs, no weights.

Each is a file in `architectures/`:

    hub               where the weights are
    parameters        how many it has, tied ones once, in the class that trains it
    parameters_from   "published", or "computed" where no exact figure is public
    processor         facts of its image processor, where it has one
    config            what config.json says that shapes the model

A test builds every one and compares the count.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "architectures"


@dataclass(frozen=True, kw_only=True)
class Description:
    """One bundled model; the fields are those of its file."""

    name: str
    hub: str
    parameters: int
    parameters_from: str
    config: dict[str, Any]
    processor: dict[str, Any] = field(default_factory=dict)


@cache
def bundled_names() -> tuple[str, ...]:
    """Return the names of all bundled models, sorted."""
    return tuple(sorted(path.name.removesuffix(".json") for path in FOLDER.glob("*.json")))


@cache
def describe(name: str) -> Description:
    """Return a bundled model's description.

    >>> describe("gpt2").parameters
    124439808
    """
    return Description(name=name, **json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")))


def bundled_name(text: str) -> str | None:
    """Return the bundled name that `text` is, as a name in any case or as a hub id; None where it is neither."""
    folded = text.lower()
    if folded in bundled_names():
        return folded
    return next((name for name in bundled_names() if describe(name).hub.lower() == folded), None)
