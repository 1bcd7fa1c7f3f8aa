"""Which op made a tensor, and which made what went into that: where an eps was added, where a mask was filled."""

from __future__ import annotations

import torch

from floatline.observe.finite.meant import MOVING
from floatline.observe.finite.numbers import storage_of
from floatline.observe.finite.origins import Made, Spot
from floatline.observe.finite.ran import Given, Ran
from floatline.observe.real import tensors_in


class Makers:
    """The last op that wrote each storage."""

    def __init__(self) -> None:
        self._made: dict[int, Made] = {}

    def of(self, tensor: torch.Tensor) -> Made | None:
        """Return the op that wrote a tensor last, None where it was there before."""
        key = storage_of(tensor)
        return self._made.get(key) if key is not None else None

    def of_all(self, inputs: list[Given]) -> dict[str, Made]:
        """Return the ops that wrote an op's inputs, by the inputs' names."""
        return {given.label: made for given in inputs if (made := self.of(given.tensor)) is not None}

    def note(self, ran: Ran, results: list[torch.Tensor], spot: Spot) -> None:
        """Note what an op wrote; a copy counts as made by what made the original."""
        floats = [t for t in results if t.layout is torch.strided and t.is_floating_point()]
        if not floats:
            return
        if ran.name in MOVING and not ran.func._schema.is_mutable:
            first = next(iter(tensors_in(ran.args)), None)
            made = self.of(first) if first is not None else None
            if made is not None:
                self._write(floats, made)
                return
        before = tuple(self.of_all(ran.inputs).values())
        for tensor in floats:
            dtype = str(tensor.dtype).removeprefix("torch.")
            self._write([tensor], Made(spot=spot, scalars=ran.scalars, dtype=dtype, before=before))

    def _write(self, tensors: list[torch.Tensor], made: Made) -> None:
        for tensor in tensors:
            key = storage_of(tensor)
            if key is not None:
                self._made[key] = made
