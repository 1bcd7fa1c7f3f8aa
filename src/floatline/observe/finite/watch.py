"""Watch every op of a step and keep account of which one first made a value that is not finite.

A dispatch mode sees each op of forward, backward and optimizer with its real tensors. What comes out is looked at:

    finite in, not finite out            the op is an origin
    infinities that were meant, NaN out  the op is an origin: softmax over a masked row, inf - inf
    not finite in, not finite out        the result inherits the origins of what went in (origins.py)
    finite out                           nothing: whatever went in was discarded

What counts is decided at the end, by the origins of what was damaged: the loss, a gradient, a weight.

In the backward each op belongs to an autograd node, and the node's sequence number to the forward op that made it, with
the line and the module it ran in. An infinity of the forward was harmless there, so a derivative that makes NaN out of
it is an origin itself.

Not covered: ops inside of compiled code and custom kernels are one op here; what happens to values outside of torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type

from floatline.observe.finite.meant import OVERWRITING, RAW, is_mask, is_meant, plain_arguments
from floatline.observe.finite.numbers import dense, is_bad, numbers
from floatline.observe.finite.origins import Kind, Ledger, Made, Origin, Spot
from floatline.observe.finite.places import place_in_backward, places
from floatline.observe.real import tensors_in

MOST_ORIGINS = 256
"""Origins that are described in full; what comes later than that is never the first."""
_PLAIN = frozenset({torch.Tensor, nn.Parameter})


class Ran(NamedTuple):
    """One op that has run: what it was given, and its tensors as they were before it wrote."""

    func: Any
    name: str
    args: Any
    kwargs: Any
    inputs: list[tuple[str, torch.Tensor]]
    identities: list[int]  # of the tensors that it was given, in the order of `inputs`


class Watch(TorchDispatchMode):
    """The mode. Enter it by `watching`.

    Attributes:
        phase: "forward", "backward" or "optimizer"; the caller sets it.
        ledger: What is not finite, and since when.
        origins: All of them, in the order in which they happened.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = "forward"
        self.ledger = Ledger()
        self.origins: list[Origin] = []
        self.modules: list[str] = [""]
        self.call = 0
        self._number = 0
        self._nodes: dict[int, Spot] = {}  # sequence number of an autograd node -> the forward op
        self._made: dict[int, Made] = {}  # storage -> the op that wrote it last
        self._given: dict[int, Origin] = {}
        self._here: tuple[int, Spot] | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(kind not in _PLAIN and is_traceable_wrapper_subclass_type(kind) for kind in types):
            return NotImplemented  # shards and low-bit state come back as ops on the tensors that they are made of
        self._number += 1
        name = func._schema.name.split("::")[-1]
        self._mark_node(name)
        if func.is_view:
            return func(*args, **kwargs)
        inputs = list(_named_tensors(func, args, kwargs, read=name not in OVERWRITING))
        bad = [(label, tensor) for label, tensor in inputs if self._is_bad(tensor)]
        kept = _copies(func, args, kwargs, inputs) if func._schema.is_mutable else inputs
        out = func(*args, **kwargs)
        self._look(Ran(func, name, args, kwargs, kept, [id(tensor) for _, tensor in inputs]), out, bad)
        return out

    # What goes in

    def _is_bad(self, tensor: torch.Tensor) -> bool:
        """Say whether an input is not finite; what was made under watch and is not in the ledger is."""
        if tensor.layout is torch.strided and tensor.untyped_storage()._cdata in self._made:
            return bool(self.ledger.of(tensor)) and is_bad(tensor)
        return is_bad(tensor)

    def _mark_node(self, name: str) -> None:
        """Remember which forward op the newest autograd node belongs to: the first op that sees it."""
        if self.phase == "forward" or len(self.modules) > 1:
            newest = torch.autograd._get_sequence_nr() - 1
            if newest not in self._nodes:
                self._nodes[newest] = self._spot(name)

    def _spot(self, name: str) -> Spot:
        """Return where the present op is; found once for each op."""
        if self._here is None or self._here[0] != self._number:
            user, library = places()
            spot = Spot(op=name, module=self.modules[-1], user=user, library=library, call=self.call)
            self._here = self._number, spot
        return self._here[1]

    # What comes out

    def _look(self, ran: Ran, out: Any, bad: Any) -> None:
        results = _distinct([*tensors_in(out), *_written(ran.func, ran.args, ran.kwargs)])
        spoilt = [tensor for tensor in results if is_bad(tensor)]
        for tensor in results:
            if all(tensor is not other for other in spoilt):
                self.ledger.clear(tensor)
        if spoilt:
            if not bad:  # an address may have been used again: look at what is taken to be finite
                bad = [(label, tensor) for label, tensor in ran.inputs if is_bad(tensor)]
            origins = self._inherited(ran, bad, spoilt) if bad else frozenset()
            if not bad or self._is_new(ran, origins, bad, spoilt):
                origin = self._origin(ran, spoilt, kind=self._kind(ran, spoilt, fresh=not bad))
                origins = frozenset({origin}) if not _faults(origins) else origins | {origin}
            elif not _faults(origins) and ran.name not in _MOVING and _all_taken(bad, spoilt):
                origins = origins | {self._origin(ran, spoilt, kind=Kind.TAKEN)}
            for tensor in spoilt:
                self.ledger.add(tensor, origins)
        self._remember(ran, results)

    def _inherited(self, ran: Ran, bad: Any, spoilt: list[torch.Tensor]) -> frozenset[Origin]:
        """Return the origins of what went in and can be seen in what came out."""
        if ran.name == "where" and len(ran.args) == 3 and isinstance(ran.args[0], torch.Tensor):
            bad = _chosen(ran.args, bad, spoilt[0])
        found: frozenset[Origin] = frozenset()
        for label, tensor in bad:
            found |= self.ledger.of(tensor) or frozenset({self._given_origin(label, tensor, ran.name)})
        return found

    def _is_new(self, ran: Ran, origins: frozenset[Origin], bad: Any, spoilt: list[torch.Tensor]) -> bool:
        """Say whether an op with infinite inputs is an origin all the same: they were harmless until now."""
        if self._derives() and all(origin.phase == "forward" for origin in origins):
            return ran.name not in _MOVING
        if _faults(origins) or ran.name in _MOVING:
            return False
        nan = any(bool(torch.isnan(dense(tensor)).any()) for tensor in spoilt)
        if nan and not any(bool(torch.isnan(dense(tensor)).any()) for _, tensor in bad):
            return True
        return torch.Tag.pointwise in ran.func.tags and _unexplained(bad, spoilt[0])

    def _derives(self) -> bool:
        """Say whether the op is part of a derivative, and not of a forward that is computed again."""
        return self.phase == "backward" and len(self.modules) == 1

    def _kind(self, ran: Ran, spoilt: list[torch.Tensor], fresh: bool) -> Kind:
        """Return what kind of origin an op is; it can only mean infinities that it makes itself."""
        if ran.name in RAW:
            return Kind.RAW
        scalars = plain_arguments(ran.func, ran.args, ran.kwargs)
        return Kind.MEANT if fresh and is_meant(ran.name, scalars, ran.inputs, spoilt) else Kind.FAULT

    def _origin(self, ran: Ran, spoilt: list[torch.Tensor], kind: Kind) -> Origin:
        scalars = plain_arguments(ran.func, ran.args, ran.kwargs)
        spot, custom, saved = self._blame(ran.name)
        full = len(self.origins) < MOST_ORIGINS and kind in (Kind.FAULT, Kind.TAKEN)
        origin = Origin(
            number=self._number,
            kind=kind,
            phase=self.phase,
            spot=spot,
            ran=ran.name,
            scalars=scalars,
            inputs=_described(ran.inputs) if full else (),
            outputs=_described([("result", tensor) for tensor in spoilt]) if full else (),
            exact=_exact(ran) if full else None,
            saved=saved if full else (),
            made_by=self._makers(ran.inputs) if full else {},
            custom=custom,
        )
        self.origins.append(origin)
        return origin

    def _blame(self, name: str) -> tuple[Spot, bool, tuple[Any, ...]]:
        """Return the op that an origin is to be blamed on, whether a user's Function, and what the forward saved."""
        node = torch._C._current_autograd_node() if self._derives() else None
        if node is None:
            return self._spot(name), False, ()
        spot = self._nodes.get(node._sequence_nr()) or self._nearest(node._sequence_nr()) or self._spot(name)
        saved = _saved(node)
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            line = place_in_backward()
            op = type(node).__name__.removesuffix("Backward")
            return (
                Spot(op=op, module=spot.module, user=line or spot.user, library=spot.library, call=spot.call),
                True,
                saved,
            )
        return spot, False, saved

    def _nearest(self, number: int) -> Spot | None:
        earlier = [known for known in self._nodes if known < number]
        return self._nodes[max(earlier)] if earlier else None

    def _given_origin(self, label: str, tensor: torch.Tensor, name: str) -> Origin:
        """Return the origin of a tensor that was there before the watch: a constant that is meant, or a bad one."""
        key = tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)
        if key not in self._given:
            kind = Kind.MEANT if is_mask(tensor) else Kind.GIVEN
            self._given[key] = Origin(
                number=self._number,
                kind=kind,
                phase=self.phase,
                spot=self._spot(name),
                ran=name,
                inputs=(numbers(tensor, label),),
                tensor=tensor.detach(),
            )
            self.origins.append(self._given[key])
        return self._given[key]

    def _makers(self, inputs: Any) -> dict[str, Made]:
        found = {}
        for label, tensor in inputs:
            made = self._made.get(tensor.untyped_storage()._cdata) if tensor.layout is torch.strided else None
            if made is not None:
                found[label] = made
        return found

    def _remember(self, ran: Ran, results: list[torch.Tensor]) -> None:
        if ran.name in _MOVING and not ran.func._schema.is_mutable:
            return self._pass_on(ran.args, results)
        floats = [t for t in results if t.layout is torch.strided and t.is_floating_point()]
        if not floats:
            return None
        spot = (
            Spot(op=ran.name, module="", user=None, library=None, call=-1) if self._derives() else self._spot(ran.name)
        )
        scalars = plain_arguments(ran.func, ran.args, ran.kwargs)
        for tensor in floats:
            dtype = str(tensor.dtype).removeprefix("torch.")
            self._made[tensor.untyped_storage()._cdata] = Made(spot=spot, scalars=scalars, dtype=dtype)
        return None

    def _pass_on(self, args: Any, results: list[torch.Tensor]) -> None:
        """A copy counts as made by what made the original."""
        first = next((t for t in tensors_in(args) if t.layout is torch.strided), None)
        made = self._made.get(first.untyped_storage()._cdata) if first is not None else None
        for tensor in results:
            if tensor.layout is torch.strided and made is not None:
                self._made[tensor.untyped_storage()._cdata] = made


_MOVING = frozenset({"clone", "contiguous", "cat", "stack", "index", "index_select", "gather", "detach", "copy_",
                     "repeat", "roll", "flip", "select_scatter", "slice_scatter", "select_backward", "slice_backward",
                     "embedding", "unfold_backward", "constant_pad_nd", "_reshape_alias", "_unsafe_view", "lift_fresh",
                     "take", "masked_select", "tril", "triu", "unbind", "split_with_sizes_copy", "permute_copy"})  # fmt: skip
"""Ops that move values and compute none."""


def _faults(origins: frozenset[Origin]) -> bool:
    return any(origin.kind not in (Kind.MEANT, Kind.TAKEN) for origin in origins)


def _all_taken(bad: Any, spoilt: list[torch.Tensor]) -> bool:
    """Say whether nothing of a result is finite although something of what went in was."""
    some_left = any(bool(torch.isfinite(dense(tensor)).any()) for _, tensor in bad)
    return some_left and not any(bool(torch.isfinite(dense(tensor)).any()) for tensor in spoilt)


def _named_tensors(func: Any, args: Any, kwargs: Any, read: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield an op's tensors with the names of its schema; of an op that overwrites its first one, the others."""
    for place, argument in enumerate(func._schema.arguments):
        value = args[place] if place < len(args) else kwargs.get(argument.name)
        if argument.is_out or (not read and place == 0):
            continue
        found = list(tensors_in(value))
        for number, tensor in enumerate(found):
            yield (argument.name if len(found) == 1 else f"{argument.name}[{number}]"), tensor


def _written(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    if not func._schema.is_mutable:
        return []
    taken = [
        args[place] if place < len(args) else kwargs.get(argument.name)
        for place, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return list(tensors_in(taken))


def _distinct(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the tensors without those that are the same memory: an in-place op returns what it wrote."""
    if len(tensors) < 2:
        return tensors
    return list({(t.untyped_storage()._cdata, t.storage_offset()) if t.layout is torch.strided else id(t): t
                 for t in tensors}.values())  # fmt: skip


def _copies(func: Any, args: Any, kwargs: Any, inputs: Any) -> list[tuple[str, torch.Tensor]]:
    """Return the inputs with copies of those that the op will write over."""
    written = {id(tensor) for tensor in _written(func, args, kwargs)}
    return [(label, tensor.detach().clone() if id(tensor) in written else tensor) for label, tensor in inputs]


def _described(tensors: Any) -> tuple[Any, ...]:
    return tuple(numbers(tensor, label) for label, tensor in tensors if not tensor.is_meta)


def _saved(node: Any) -> tuple[Any, ...]:
    """Return what a forward op kept for its derivative, as far as it still has it."""
    found = []
    names = [name for name in dir(node) if name.startswith("_saved_")]
    for name in names:
        try:
            value = getattr(node, name)
        except RuntimeError:  # freed already
            continue
        if isinstance(value, torch.Tensor):
            found.append(numbers(value, name.removeprefix("_saved_")))
    if not names and isinstance(node, torch.autograd.function.BackwardCFunction):
        try:
            kept = node.saved_tensors  # type: ignore[attr-defined]
        except RuntimeError:
            return ()
        found += [numbers(tensor, f"saved[{place}]") for place, tensor in enumerate(kept) if tensor is not None]
    return tuple(found)


def _exact(ran: Ran) -> tuple[Any, ...] | None:
    """Return an op's result on the same inputs in fp64, None where it draws random numbers or will not run so."""
    if torch.Tag.nondeterministic_seeded in ran.func.tags or not ran.inputs:
        return None
    kept = dict(zip(ran.identities, (tensor for _, tensor in ran.inputs), strict=True))

    def widen(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            value = kept.get(id(value), value).detach()
            return value.double().clone() if value.is_floating_point() else value
        if isinstance(value, torch.dtype):
            return torch.float64 if value.is_floating_point else value
        return type(value)(map(widen, value)) if isinstance(value, (list, tuple)) else value

    try:
        positions = [widen(value) for value in ran.args]
        result = ran.func(*positions, **{key: widen(value) for key, value in ran.kwargs.items()})
    except Exception:  # no kernel for it in fp64: nothing can be said
        return None
    wanted = list(tensors_in(result)) or list(tensors_in(positions[:1]))
    return tuple(numbers(tensor, "exact") for tensor in wanted if tensor.is_floating_point())


def _chosen(args: Any, bad: Any, out: torch.Tensor) -> Any:
    """Of `where`'s two branches, keep those whose bad values were chosen."""
    taken, left, right = args
    spoilt = ~torch.isfinite(dense(out))
    kept = []
    for label, tensor in bad:
        chosen = taken if tensor is left else ~taken if tensor is right else None
        if chosen is None or bool((spoilt & chosen).any()):
            kept.append((label, tensor))
    return kept or bad


def _unexplained(bad: Any, out: torch.Tensor) -> bool:
    """Say whether a pointwise op made more elements bad than its inputs had."""
    explained: Any = False
    for _, tensor in bad:
        explained = explained | ~torch.isfinite(dense(tensor))
    try:
        return bool((~torch.isfinite(dense(out)) & ~explained).any())
    except RuntimeError:  # shapes that do not broadcast
        return False


class _Calls(TorchFunctionMode):
    """Numbers the calls of torch's Python interface, the outermost ones, so that one of them can be met again."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.watch.call += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def watching(model: nn.Module | None = None) -> Iterator[Watch]:
    """Watch all ops inside, with the names of `model`'s modules."""
    watch = Watch()
    names = {id(module): name.replace("_orig_mod.", "").removesuffix("_orig_mod")
             for name, module in (model.named_modules() if model is not None else ())}  # fmt: skip

    def enter(module: nn.Module, args: Any) -> None:
        watch.modules.append(names.get(id(module), watch.modules[-1]))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if len(watch.modules) > 1:
            watch.modules.pop()

    with ExitStack() as stack:
        for hook in (
            nn.modules.module.register_module_forward_pre_hook(enter),
            nn.modules.module.register_module_forward_hook(leave, always_call=True),
        ):
            stack.callback(hook.remove)
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(watch)
        stack.enter_context(_Calls(watch))
        yield watch
