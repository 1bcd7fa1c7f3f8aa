"""A meter over all ops of a step in a lower format: what each op loses by itself, and what has come together.

The step runs as it is, in its lower format. Beside each op that has to do with that format three more run:

    exact    in fp64 on the shadows of its inputs (shadows.py): the step as it would be without rounding
    low      the same inputs, rounded to the formats that the op was given: its local error
    fp32     the same inputs in fp32: what fp32 loses there

So no two runs have to be aligned: the program's own course decides which ops there are, in the backward too, where an
op belongs to the forward op whose derivative it is. Casts are no-ops on shadows, also those that a model's code does
by hand. Comparisons, maxima and casts to integers are decisions; those that come out otherwise on exact values are
counted, and the shadows go on with the exact decision.

Random ops have no exact result: what they drew is taken to be exact.

Not covered: `.item()` and what Python decides by it follow the lower format; compiled code must run eager; a custom
kernel that cannot run in fp64 keeps its own result for a shadow (`unmeasured`).
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Hashable
from dataclasses import replace
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type

from floatline.observe.cost import cost_of
from floatline.observe.error.call import Call, fit
from floatline.observe.error.chains import ADDING, Chains
from floatline.observe.error.measures import HALVES, Measure, measure, overflows, relative_error, sampled
from floatline.observe.error.reading import Reading
from floatline.observe.error.shadows import Shadows
from floatline.observe.error.sums import swallowed_share
from floatline.observe.finite.derivatives import Nodes, derivative_that_runs
from floatline.observe.finite.origins import Spot
from floatline.observe.finite.places import places

AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU).add(torch._C.DispatchKey.AutocastCUDA)
_UNWRITTEN = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted"})
_STATISTICS = frozenset({"native_layer_norm", "native_batch_norm", "native_group_norm", "_fused_rms_norm"})
"""Ops that also return means and such, small by cancellation: their results are judged by the first one."""
PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})


class ErrorMeter(TorchDispatchMode):
    """The mode. Enter it by `metering` (metering.py).

    Args:
        local: Also run each op on exact inputs; without it there are shadows and decisions only.

    Attributes:
        shadows: The exact values.
        phase: "forward" or "backward".
        modules: Names of the modules whose forward runs, the innermost last.
        unmeasured: Ops that have no exact result, and how often they ran.
    """

    supports_higher_order_operators = True

    def __init__(self, *, local: bool = True) -> None:
        super().__init__()
        self.shadows = Shadows()
        self.phase = "forward"
        self.modules: list[str] = [""]
        self.unmeasured: Counter[str] = Counter()
        self._local = local
        self._readings: dict[Hashable, Reading] = {}
        self._chains = Chains()
        self._nodes = Nodes()
        self._root: FrameType | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    @property
    def readings(self) -> list[Reading]:
        """All ops that were measured or have decided, in the order in which each ran first."""
        return list(self._readings.values())

    def enter(self, phase: str) -> None:
        """Begin a phase. Call it from the function that runs it: lines outside are not the program's."""
        self.phase = phase
        self.modules[:] = [""]
        self._root = sys._getframe(1)

    def reached(self, tensor: torch.Tensor) -> float:
        """Return the relative RMSE that a tensor has by now."""
        return relative_error(tensor.detach(), self.shadows.of(tensor))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(kind not in PLAIN and is_traceable_wrapper_subclass_type(kind) for kind in types):
            return NotImplemented
        with torch._C.DisableTorchFunction(), torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
            return self._run(func, args, kwargs)

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if not isinstance(func, torch._ops.OpOverload):
            return self._opaque(func, args, kwargs)
        name = func._schema.name.split("::")[-1]
        self._tie(name)
        if func.is_view or name in _UNWRITTEN:
            out = func(*args, **kwargs)
            if name in _UNWRITTEN:
                self.shadows.forget(out)
            return out
        call = Call(func, name, args, kwargs, self.shadows)
        out = func(*args, **kwargs)
        self._account(call, call.results(out), out)
        return out

    def _opaque(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A higher-order operator: its result stands for itself."""
        self.unmeasured[func.name()] += 1
        return func(*args, **kwargs)

    def _account(self, call: Call, results: list[torch.Tensor], out: Any) -> None:
        if not results or (not call.writes and all(_shares(tensor, call.reads) for tensor in results)):
            return  # a view by another name
        if call.draws:
            self._drawn(call, results)
            return
        if not call.wanted(results):
            return
        source = call.cast_of(results)
        exact = call.again(call.exact, torch.float64) if source is None else [call.exact[id(source)]]
        if exact is None or not fit(exact, results):
            exact = call.again(call.exact_by_given_decisions, torch.float64)
        if exact is None or not fit(exact, results):
            self.unmeasured[call.name] += 1
            for tensor in results:
                self.shadows.forget(tensor)
            return
        noise = self._note(call, results, exact, out)
        for tensor, values in zip(results, exact):
            if source is not None and self.shadows.share(tensor, source):
                pass
            elif tensor.is_floating_point() or self.shadows.known(tensor) or not torch.equal(tensor, values):
                own = values if source is None else values.clone()  # a window of the shadow of a part
                self.shadows.set(tensor, own if tensor.is_floating_point() else own.to(tensor.dtype))
            if noise:
                self.shadows.mark_noise(tensor)

    def _drawn(self, call: Call, results: list[torch.Tensor]) -> None:
        """Random numbers stand for themselves; dropout keeps its mask."""
        for tensor in results:
            self.shadows.forget(tensor)
        if call.name == "native_dropout" and len(results) == 2:
            share = call.args[1]
            kept = call.exact[id(call.args[0])] * results[1].double()
            self.shadows.set(results[0], kept / (1 - share) if share < 1 else kept)

    # What is measured

    def _note(self, call: Call, results: list[torch.Tensor], exact: list[torch.Tensor], out: Any) -> bool:
        """Measure a call; say whether its result is noise in fp32 as well."""
        floats = [tensor for tensor in call.reads if tensor.is_floating_point()]
        if floats and all(self.shadows.is_noise(tensor) for tensor in floats):
            return True
        lowered = call.lowered(results)
        decisions = [place for place, t in enumerate(results) if call.decides and not t.is_floating_point()]
        flipped = sum(_differing(results[place], exact[place]) for place in decisions)
        decided = sum(results[place].numel() for place in decisions)
        if not decisions and not (lowered and self._local):
            return False
        flops = cost_of(call.func, call.args, call.kwargs, out)[0]
        if lowered and call.name == "_to_copy" and not _overflows(exact, results):  # a sample of large weights will do
            call, results, exact = call.sampled(results), [sampled(results[0])], [sampled(exact[0])]
        low = call.again(call.exact, None) if lowered and self._local else None
        if low is not None and not fit(low, results):
            low = None
        excused = low is not None and call.does_not_fit()
        worst = None if low is None else self._measured(call, results, exact, low, excused)
        reading = Reading(
            spot=self._spot(call.name),
            phase="backward" if derivative_that_runs() is not None else self.phase,
            ran=call.name,
            measure=worst,
            flipped=flipped,
            flipped_here=sum(_differing(low[place], exact[place]) for place in decisions)
            if low is not None and not excused
            else 0,
            decisions=decided,
            stalled=swallowed_share(call.name, call.named(call.exact), results) if lowered else None,
            flops=flops,
        )
        if call.name in ADDING and results[0].dtype in HALVES:
            operands = [(tensor.detach(), call.exact[id(tensor)]) for tensor in floats]
            lost = self._chains.follow(reading.key, results[0], exact[0], operands)
            reading = replace(reading, stalled=lost)
        self._add(reading)
        return worst is not None and not worst.sound

    def _measured(
        self,
        call: Call,
        results: list[torch.Tensor],
        exact: list[torch.Tensor],
        low: list[torch.Tensor],
        excused: bool,
    ) -> Measure | None:
        fp32 = call.again(call.exact, torch.float32)
        worst: Measure | None = None
        for place, (tensor, values) in enumerate(zip(results, exact)):
            if not tensor.is_floating_point() or not tensor.numel() or (place and call.name in _STATISTICS):
                continue
            other = fp32[place] if fp32 is not None and fit(fp32, results) else None
            one = measure(values, low[place], other, tensor, excused=excused)
            worst = one if worst is None else worst.worst(one)
        return worst

    def _add(self, reading: Reading) -> None:
        known = self._readings.get(reading.key)
        self._readings[reading.key] = reading if known is None else known.joined(reading)

    # Where the program is

    def _tie(self, name: str) -> None:
        number = self._nodes.newest()
        if number is not None:
            node = derivative_that_runs()
            self._nodes.note(number, self._here(name) if node is None else self._nodes.spot(node, name))

    def _spot(self, name: str) -> Spot:
        node = derivative_that_runs()
        return self._here(name) if node is None else self._nodes.spot(node, name)

    def _here(self, name: str) -> Spot:
        user, library = places(self._root)
        return Spot(op=name, module=self.modules[-1], user=user or library, library=library)


def _overflows(exact: list[torch.Tensor], results: list[torch.Tensor]) -> bool:
    return results[0].dtype in HALVES and overflows(exact[0], results[0].dtype)


def _shares(tensor: torch.Tensor, others: list[torch.Tensor]) -> bool:
    storage = tensor.untyped_storage()._cdata
    return any(other.untyped_storage()._cdata == storage for other in others)


def _differing(tensor: torch.Tensor, exact: torch.Tensor) -> int:
    return int((tensor != exact.to(tensor.dtype)).sum())
