"""Attributes of torch's modules that are replaced while at least one context needs them.

Contexts that each put back what they found leave a replacement behind when an outer one ends before an inner one.
Here they are counted: the first to open replaces, the last to close puts back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Replacement = tuple[Any, str, Any]
"""Owner, name of the attribute, new value."""


class SharedPatch:
    """A set of replacements that contexts hold together.

    Args:
        replacements: Called when the first context opens.
    """

    def __init__(self, replacements: Callable[[], list[Replacement]]) -> None:
        self._replacements = replacements
        self._holders = 0
        self._before: list[Replacement] = []

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the attributes replaced while the context is open."""
        if self._holders == 0:
            new = self._replacements()
            self._before = [(owner, name, getattr(owner, name)) for owner, name, _ in new]
            _set_all(new)
        self._holders += 1
        try:
            yield
        finally:
            self._holders -= 1
            if self._holders == 0:
                _set_all(self._before)


def _set_all(replacements: list[Replacement]) -> None:
    for owner, name, value in replacements:
        setattr(owner, name, value)
