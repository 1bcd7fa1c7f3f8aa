"""Where a value that is not finite came from: an `Origin`, and the ledger of which storage holds values of which.

An op that makes a NaN or an infinity out of finite numbers is an origin. What its result goes into inherits it, storage
by storage, until somebody overwrites or discards it. So at the end of a step a NaN loss has a list of origins, and
whatever was not finite on the way but reached nothing has no say.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch

from floatline.observe.finite.numbers import Numbers, parts_of, storage_of
from floatline.observe.finite.places import Place


class Kind(Enum):
    """What an origin is.

    FAULT: an op that made it out of finite numbers, or NaN out of infinities that were meant.
    MEANT: an infinity that the program asked for: the fill of a mask, the neutral element of a minimum.
    RAW: memory that nobody has written (`torch.empty`).
    GIVEN: it was there before: an input, a parameter, a buffer.
    TAKEN: an op after which nothing but infinities that were meant is left: a sum over a mask.
    """

    FAULT = "fault"
    MEANT = "meant"
    RAW = "raw"
    GIVEN = "given"
    TAKEN = "taken"


@dataclass(frozen=True, kw_only=True)
class Spot:
    """One op of a program.

    Attributes:
        op: Its aten name, without the overload.
        module: Dotted name of the module whose forward ran it, "" at the top.
        user: The user's line.
        library: The library's line below it, if any.
        function: The function of torch's Python interface that was called there: `norm` of a `linalg_vector_norm`.
    """

    op: str
    module: str
    user: Place | None
    library: Place | None
    function: str = ""

    @property
    def line(self) -> tuple[str, int] | None:
        """File and number of the innermost line that is not torch's: the library's, or else the user's."""
        place = self.library or self.user
        return (place.file, place.line) if place is not None else None


@dataclass(frozen=True, kw_only=True, eq=False)
class Origin:
    """The op after which a value was not finite.

    Attributes:
        number: How many there were before it; of one op's inputs in the order of its schema.
        kind: What kind of origin.
        phase: "forward", "backward" or "optimizer".
        spot: The op; in the backward the forward op whose derivative it is.
        ran: Name of the op that ran; in the backward that of the derivative's formula.
        scalars: Its arguments that are plain numbers.
        inputs: Its tensors before it ran.
        storages: Argument -> what tells whose memory that tensor is (`storage_of`).
        outputs: After.
        exact: Its result in fp64 on the same inputs; None where that cannot be known.
        saved: In the backward, what the forward op had saved.
        made_by: Argument -> the op that had made it.
        tensor: Of a GIVEN one, the tensor itself.
        variable: Of a GIVEN one, what the user's code calls it, "" where it has no name there.
        derivative: The op is part of a derivative's formula, and `spot` the forward op that the derivative is of.
        custom: The formula is that of a user-written autograd Function.
    """

    number: int
    kind: Kind
    phase: str
    spot: Spot
    ran: str
    scalars: dict[str, Any] = field(default_factory=dict)
    inputs: tuple[Numbers, ...] = ()
    storages: dict[str, int | None] = field(default_factory=dict)
    outputs: tuple[Numbers, ...] = ()
    exact: tuple[Numbers, ...] | None = None
    saved: tuple[Numbers, ...] = ()
    made_by: dict[str, Made] = field(default_factory=dict)
    tensor: torch.Tensor | None = None
    variable: str = ""
    derivative: bool = False
    custom: bool = False


@dataclass(frozen=True, kw_only=True)
class Made:
    """The op that made a tensor.

    Attributes:
        spot: The op.
        scalars: Its arguments that are plain numbers.
        dtype: Of the result, as text.
        before: The ops that had made its own inputs.
    """

    spot: Spot
    scalars: dict[str, Any]
    dtype: str
    before: tuple[Made, ...] = ()


class Ledger:
    """Which storages hold values that are not finite, and where those came from."""

    def __init__(self) -> None:
        self._of: dict[int, frozenset[Origin]] = {}

    def of(self, tensor: torch.Tensor) -> frozenset[Origin]:
        """Return the origins of what a tensor's storage holds."""
        return frozenset().union(*(self._of.get(storage_of(part) or 0, frozenset()) for part in parts_of(tensor)))

    def add(self, tensor: torch.Tensor, origins: Iterable[Origin]) -> None:
        """Note origins of a tensor's storage, besides those that it has unless the tensor is all of it."""
        key = storage_of(tensor)
        if key is None:
            return
        if key not in self._of:
            weakref.finalize(tensor.untyped_storage(), self._of.pop, key, None).atexit = False
        before = frozenset() if _covers(tensor) else self._of.get(key, frozenset())
        self._of[key] = before | frozenset(origins)

    def clear(self, tensor: torch.Tensor) -> None:
        """Note that a tensor is finite; what of its storage it does not cover may be otherwise."""
        key = storage_of(tensor)
        if key in self._of and _covers(tensor):
            self._of[key] = frozenset()


def _covers(tensor: torch.Tensor) -> bool:
    return tensor.numel() * tensor.element_size() >= tensor.untyped_storage().nbytes()
