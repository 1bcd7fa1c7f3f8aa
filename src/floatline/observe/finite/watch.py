"""Watch every op of a step and keep account of which one first made a value that is not finite.

A dispatch mode sees each op of forward, backward and optimizer with its real tensors. What comes out is looked at:

    finite in, not finite out            the op is an origin
    infinities that were meant, NaN out  the op is an origin: softmax over a masked row, inf - inf
    not finite in, not finite out        the result inherits the origins of what went in (origins.py)
    finite out                           nothing: whatever went in was discarded

What counts is decided at the end, by the origins of what was damaged: the loss, a gradient, a weight.

In the backward each op belongs to a forward op (derivatives.py). Where that op's own result was infinite and was
discarded, its derivative that makes NaN of it is an origin.

Not covered: ops inside of compiled code and custom kernels are one op here; what happens to values outside of torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type

from floatline.observe.finite.derivatives import Nodes, derivative_that_runs
from floatline.observe.finite.inherit import leaves_nothing_else, makes_nan, masks_only, seen, spoils_more
from floatline.observe.finite.makers import Makers
from floatline.observe.finite.meant import LOGS, MOVING, RAW, SOFTMAX, is_constant, is_mask, is_meant
from floatline.observe.finite.numbers import Numbers, is_bad, numbers, storage_of
from floatline.observe.finite.origins import Kind, Ledger, Origin, Spot
from floatline.observe.finite.places import place_of_optimizer, places, variable_of
from floatline.observe.finite.ran import Given, Opaque, Ran, inputs_of, written

MOST_ORIGINS = 256
"""Origins that are described in full; what comes later than that is never the first."""
MOST_EXACT = 32
"""Origins whose op is run again in fp64."""
_PLAIN = frozenset({torch.Tensor, nn.Parameter})
_NOWHERE = Spot(op="", module="", user=None, library=None)


class Watch(TorchDispatchMode):
    """The mode. Enter it by `watching` (watching.py), and say by `enter` which phase of the step comes.

    Attributes:
        phase: "forward", "backward" or "optimizer".
        ledger: What is not finite, and since when.
        origins: All of them, in the order in which they happened.
        modules: Names of the modules whose forward runs, the innermost last.
        before_write: (tensor) -> None, told of each tensor that an op is about to write; None for nobody.
        function: Name of the function of torch's Python interface that runs.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.phase = "forward"
        self.ledger = Ledger()
        self.origins: list[Origin] = []
        self.modules: list[str] = [""]
        self.function = ""
        self.before_write: Callable[[torch.Tensor], None] | None = None
        self._root: FrameType | None = None
        self._number = 0
        self._nodes = Nodes()
        self._makers = Makers()
        self._given: dict[int, Origin] = {}
        self._here: tuple[int, Spot] | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def enter(self, phase: str) -> None:
        """Begin a phase of the step. Call it from the function that runs it: lines outside are not the step's."""
        self.phase = phase
        self.modules[:] = [""]
        self._root = sys._getframe(1)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(kind not in _PLAIN and is_traceable_wrapper_subclass_type(kind) for kind in types):
            return NotImplemented  # shards and low-bit state come back as ops on the tensors that they are made of
        with torch._C.DisableTorchFunction():  # what is done here is no call of the program's
            return self._run(func, args, kwargs)

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        self._number += 1
        if not isinstance(func, torch._ops.OpOverload):
            func = Opaque(func)  # cond, flex_attention: one op here
        name = func._schema.name.split("::")[-1]
        self._tie(name)
        if func.is_view:
            return func(*args, **kwargs)
        inputs = inputs_of(func, name, args, kwargs)
        bad = [given for given in inputs if self._is_bad(given.tensor)]
        if self.before_write is not None and func._schema.is_mutable:
            for tensor in written(func, args, kwargs):
                self.before_write(tensor)
        out = func(*args, **kwargs)
        self._look(Ran(func, name, args, kwargs, inputs), out, bad)
        return out

    # Where the program is

    def _tie(self, name: str) -> None:
        """Tie the newest autograd node to the first op that sees it: its forward op."""
        number = self._nodes.newest()
        if number is None:
            return
        node = derivative_that_runs()
        # A derivative that can be derived again: its nodes belong to where the first forward op was.
        spot = replace(self._nodes.spot(node, name), op=name) if node is not None else self._spot(name)
        self._nodes.note(number, spot)

    def _spot(self, name: str) -> Spot:
        """Return where the present op is; found once for each op."""
        if self._here is None or self._here[0] != self._number:
            self._here = self._number, self._found(name)
        return self._here[1]

    def _found(self, name: str) -> Spot:
        if self.phase == "optimizer":
            user, library = place_of_optimizer(self._root), None
        else:
            user, library = places(self._root)
            user = user or library or places()[0]  # no line of the user's in the step: the library's, or who started it
        return Spot(op=name, module=self.modules[-1], user=user, library=library, function=self.function)

    # What goes in

    def _is_bad(self, tensor: torch.Tensor) -> bool:
        """Say whether an input is not finite; what was made under watch and is not in the ledger is."""
        if self._makers.of(tensor) is not None:
            return bool(self.ledger.of(tensor)) and is_bad(tensor)
        return is_bad(tensor)

    # What comes out

    def _look(self, ran: Ran, out: Any, bad: list[Given]) -> None:
        results = ran.results(out)
        spoilt = [tensor for tensor in results if is_bad(tensor)]
        for tensor in results:
            if all(tensor is not other for other in spoilt):
                self.ledger.clear(tensor)
        if spoilt:
            if not bad:  # an address may have been used again: look at what is taken to be finite
                bad = [given for given in ran.inputs if is_bad(given.before)]
            origins = self._origins_of(ran, bad, spoilt)
            for tensor in spoilt:
                self.ledger.add(tensor, origins)
        quiet = self.phase == "backward" and not torch.is_grad_enabled()
        self._makers.note(ran, results, replace(_NOWHERE, op=ran.name) if quiet else self._spot(ran.name))

    def _origins_of(self, ran: Ran, bad: list[Given], spoilt: list[torch.Tensor]) -> frozenset[Origin]:
        """Return where what came out of an op came from: the op itself, or what went in."""
        if not bad:
            return frozenset({self._origin(ran, spoilt, self._kind(ran, spoilt))})
        origins = self._inherited(ran, seen(ran, bad, spoilt[0]))
        if ran.name in MOVING:
            return origins
        node = derivative_that_runs() if self.phase == "backward" else None
        if node is not None and self._own(node, origins):
            return frozenset({self._origin(ran, spoilt, Kind.FAULT)})
        if _faults(origins) and not masks_only(ran, bad, origins):
            return origins
        if makes_nan(bad, spoilt) or spoils_more(ran, bad, spoilt[0]):
            logs = [o for o in origins if o.ran in LOGS and ran.name not in SOFTMAX]
            if logs:  # x log x at 0: nobody masks by multiplying with a logarithm
                return frozenset(replace(origin, kind=Kind.FAULT) for origin in logs)
            return frozenset({self._origin(ran, spoilt, Kind.FAULT)})
        if leaves_nothing_else(bad, spoilt):
            return origins | {self._origin(ran, spoilt, Kind.TAKEN)}
        return origins

    def _inherited(self, ran: Ran, bad: list[Given]) -> frozenset[Origin]:
        found: frozenset[Origin] = frozenset()
        for given in bad:
            found |= self.ledger.of(given.tensor) or frozenset({self._given_origin(given, ran.name)})
        return found

    def _own(self, node: Any, origins: frozenset[Origin]) -> bool:
        """Say whether a derivative that met what was not finite in the forward is at fault itself.

        It is where that was meant, or was its own forward op's result and discarded. What another op had made, or what
        was bad before the step, is not its fault.
        """
        if any(origin.derivative for origin in origins):
            return False
        spot = self._nodes.spot(node, "")
        return not any(o.kind in (Kind.GIVEN, Kind.RAW) or (o.kind is Kind.FAULT and o.spot != spot) for o in origins)

    def _kind(self, ran: Ran, spoilt: list[torch.Tensor]) -> Kind:
        if ran.name in RAW:
            return Kind.RAW
        return Kind.MEANT if is_meant(ran, spoilt, self._makers.of_all(ran.inputs)) else Kind.FAULT

    # Origins

    def _origin(self, ran: Ran, spoilt: list[torch.Tensor], kind: Kind) -> Origin:
        node = derivative_that_runs()
        blame = self._nodes.blame(node, ran.name) if node is not None else None
        full = len(self.origins) < MOST_ORIGINS
        origin = Origin(
            number=len(self.origins),
            kind=kind,
            phase="backward" if node is not None else self.phase,
            spot=blame.spot if blame else self._spot(ran.name),
            ran=ran.name,
            scalars=ran.scalars,
            inputs=_described([(g.label, g.before) for g in ran.inputs]) if full else (),
            storages={g.label: storage_of(g.tensor) for g in ran.inputs} if full else {},
            outputs=_described([("result", tensor) for tensor in spoilt]) if full else (),
            exact=ran.exact() if len(self.origins) < MOST_EXACT and kind is Kind.FAULT else None,
            saved=blame.saved if blame and full else (),
            made_by=self._makers.of_all(ran.inputs),
            derivative=node is not None,
            custom=blame is not None and blame.custom,
        )
        self.origins.append(origin)
        return origin

    def _given_origin(self, given: Given, name: str) -> Origin:
        """Return the origin of a tensor that no op under watch made bad: it was there before, or is unwritten."""
        tensor = given.tensor
        key = storage_of(tensor) or id(tensor)
        if key not in self._given:
            made = self._makers.of(tensor)
            raw = made is not None and made.spot.op in RAW
            variable = variable_of(tensor)
            constant = is_constant(given, name, variable)
            kind = Kind.RAW if raw else Kind.FAULT if constant else Kind.MEANT if is_mask(given.before) else Kind.GIVEN
            self._given[key] = Origin(
                number=len(self.origins),
                kind=kind,
                phase=self.phase,
                spot=made.spot if made is not None and raw else self._spot(name),
                ran=made.spot.op if made is not None and raw else name,
                inputs=(numbers(given.before, given.label),),
                tensor=tensor.detach(),
                variable=variable,
                scalars={given.label: float("nan")} if constant else {},
            )
            self.origins.append(self._given[key])
        return self._given[key]


def _faults(origins: frozenset[Origin]) -> bool:
    return any(origin.kind not in (Kind.MEANT, Kind.TAKEN) for origin in origins)


def _described(tensors: list[tuple[str, torch.Tensor]]) -> tuple[Numbers, ...]:
    return tuple(numbers(tensor, label) for label, tensor in tensors if not tensor.is_meta)
