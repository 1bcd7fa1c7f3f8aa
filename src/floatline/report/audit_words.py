"""How an audit's numbers, places and names of modules are written; what is alike in repeated layers is told once."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

from floatline.report.units import number_text, percent_text

if TYPE_CHECKING:
    from floatline.audit.report import Row

T = TypeVar("T")


def error_text(value: float | None) -> str:
    """Return a relative error as people read it.

    >>> error_text(0.00123), error_text(2e-7), error_text(35.0), error_text(math.inf), error_text(0.0)
    ('0.12 %', '2e-07', '35 ×', 'not finite', '0')
    """
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    if value < 1e-5:
        return f"{value:.1g}"
    return f"{number_text(value * 100, 2)} %" if value < 10 else f"{number_text(value)} ×"


def ratio_text(ratio: float) -> str:
    """Return an error in units of what is allowed."""
    return number_text(ratio, 2) if math.isfinite(ratio) else "∞"


def share_text(share: float | None) -> str:
    """Return a share, without a minus in front of what rounds to nothing.

    >>> share_text(-0.0001), share_text(None), share_text(0.5)
    ('0.0 %', '–', '50.0 %')
    """
    return percent_text(share if share is None or abs(share) >= 5e-4 else 0.0)


def bits_text(bits: float) -> str:
    """Return headroom; a minus says that values lie beyond the format's end."""
    return f"{bits:.0f}" if math.isfinite(bits) and abs(bits) >= 10 else f"{bits:.1f}" if math.isfinite(bits) else "–"


def lost_text(row: Row) -> str:
    """Return what of a row's values or decisions is lost."""
    if row.stalled is not None:
        return percent_text(row.stalled)
    if row.flipped:
        return f"{row.flipped} of {row.decisions}"
    underflow = row.measure.underflow if row.measure else 0.0
    return percent_text(underflow) if underflow >= 5e-4 else ""


def place_text(row: Row | None) -> str:
    """Return the user's line, the file without its directories."""
    if row is None or row.location is None:
        return ""
    return f"{os.path.basename(row.location.file)}:{row.location.line}"


def short_op(op: str) -> str:
    """Return an op's name without what only tells its kernels apart.

    >>> short_op("_scaled_dot_product_flash_attention_for_cpu"), short_op("native_layer_norm"), short_op("_softmax")
    ('flash_attention', 'layer_norm', 'softmax')
    """
    return re.sub(r"^_?(native_|scaled_dot_product_)?|_for_cpu$", "", op)


def alike(name: str) -> str:
    """Return a module's name with a star for each number.

    >>> alike("model.layers.11.mlp")
    'model.layers.*.mlp'
    """
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name) or "top"


def grouped(items: Iterable[T], key: Callable[[T], tuple[str, ...]]) -> list[tuple[str, list[T]]]:
    """Return items that have the same key together, in the order of their first ones, each group with a label.

    Args:
        items: The gravest first.
        key: The name first, as it is; the rest keeps apart what is not alike.
    """
    groups: dict[tuple[str, ...], list[T]] = {}
    for item in items:
        name, *rest = key(item)
        groups.setdefault((alike(name), *rest), []).append(item)
    return [(_label(pattern, {key(item)[0] for item in group}), group) for (pattern, *_), group in groups.items()]


def _label(pattern: str, names: set[str]) -> str:
    """Return a group's name: that of its one member, or the pattern and how many there are."""
    return f"{pattern} ({len(names)})" if len(names) > 1 else next(iter(names)) or "top"


def some_of(names: Sequence[str], most: int = 3) -> str:
    """Return the first few names in words, what is alike together, and how many more there are."""
    labels = [label for label, _ in grouped(names, lambda name: (name,))]
    rest = f" and {len(labels) - most} more" if len(labels) > most else ""
    return ", ".join(labels[:most]) + rest
