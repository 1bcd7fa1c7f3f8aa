"""Which name each parameter of an optimizer has in the model, found once and not in every update."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from floatline.step.optimizers import names_of


class ParameterNames:
    """Names in the optimizer's order.

    Args:
        model: Whose names they are.
        masters: Master weights go by the names of their weights.
    """

    def __init__(self, model: nn.Module, masters: Any) -> None:
        self._model = model
        self._masters = masters
        self._of: list[int] = []
        self._names: list[str] = []

    def of(self, parameters: list[torch.Tensor]) -> list[str]:
        """Return their names; "?" for one that the model does not have."""
        now = list(map(id, parameters))
        if now != self._of:
            names = names_of(self._model)
            pairs = getattr(self._masters, "pairs", ())
            names |= {id(master): names[id(own)] for own, master in pairs if id(own) in names}
            self._of, self._names = now, [names.get(number, "?") for number in now]
        return self._names
