"""Under which rows the norms of single gradients are summed up: one a repeated layer, one a module, or one a parameter.

The norm of a row is the root of the sum of its gradients' squares, so rows add up to the total as gradients do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import nn

from floatline.techniques.layers import repeated_layers


class GradientRows:
    """The rows of a model.

    Args:
        model: Whose parameters are summed up.
        per: "layer" for a row a repeated layer, and one for each other module; "parameter" for a row each.
    """

    def __init__(self, model: nn.Module, per: str) -> None:
        layers = tuple(repeated_layers(model)) if per == "layer" else ()
        self._row_of = {name: _row(name, layers, per) for name, _ in model.named_parameters()}
        self._per = per

    def norms(self, each: dict[str, float]) -> dict[str, float]:
        """Return norms by row, in the model's order, of norms by parameter."""
        if self._per == "parameter":
            return each
        squares: dict[str, float] = {}
        for name in self._in_order(each):
            row = self._row_of.get(name, name)
            squares[row] = squares.get(row, 0.0) + each[name] * each[name]
        return {row: math.sqrt(square) for row, square in squares.items()}

    def _in_order(self, each: dict[str, float]) -> Iterator[str]:
        yield from (name for name in self._row_of if name in each)
        yield from (name for name in each if name not in self._row_of)


def _row(name: str, layers: tuple[str, ...], per: str) -> str:
    """Return what a parameter's norm is summed up under: its layer, or else its module."""
    if per == "parameter":
        return name
    return next((layer for layer in layers if name.startswith(f"{layer}.")), name.rpartition(".")[0] or name)
