"""Try the remedy: run the step again with it, and see whether loss and gradients are finite.

    island     the module in fp32, then the module around it
    wide       the op in fp32
    edge       the op's input moved off the edge of its domain, before the op: the double `where`
    row        scores of fully masked rows set to 0 before the softmax
    attention  another attention kernel (the math one)
    scale      the loss scaled down, for gradients that leave the format

`edge` and `wide` meet the op again by its line and by the function of torch's interface that was called there. Where no
value was changed, or the remedy does not fit the program, nothing has been tried, and that is what is said.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from floatline.diagnose.altered import Altered, RowsUnmasked, off_edge, widened
from floatline.diagnose.causes import Cause
from floatline.diagnose.finding import Counterfactual
from floatline.observe.finite import Origin, bad_rows
from floatline.patch import ForwardPatch
from floatline.precision.islands import make_island

LOWER_SCALES = (2.0**-8, 2.0**-16)
"""What the loss is multiplied with to try a lower loss scale."""


class Replay(Protocol):
    """Runs the step again, and says what was not finite in it: "" for nothing."""

    def __call__(self, around: Any, scale: float = 1.0) -> str: ...


class _Remedy(NamedTuple):
    text: str
    around: Any
    module: str = ""
    scale: float = 1.0


def try_cures(cause: Cause, origin: Origin, model: nn.Module, replay: Replay) -> tuple[Counterfactual, ...]:
    """Return what became of the step with each remedy, up to the first that cured it.

    Args:
        cause: Its cures are tried in order.
        origin: What is to be cured.
        model: The step's.
        replay: Runs the step again.
    """
    results: list[Counterfactual] = []
    for kind in cause.cures:
        for remedy in _remedies(kind, origin, model):
            results.append(_tried(kind, remedy, replay))
            if results[-1].cured:
                return tuple(results)
    why = cause.untried or "the op runs outside of the model's modules, and its line cannot be altered from here"
    return tuple(results) or (Counterfactual(remedy=cause.remedy, cured=None, why=why),)


def _tried(kind: str, remedy: _Remedy, replay: Replay) -> Counterfactual:
    def said(cured: bool | None, why: str) -> Counterfactual:
        return Counterfactual(
            remedy=remedy.text, cured=cured, kind=kind, module=remedy.module, why=why, scale=remedy.scale
        )

    try:
        left = replay(remedy.around, remedy.scale)
    except Exception as error:  # the remedy does not fit the program; the finding stands all the same
        return said(None, f"with it the program stops: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
    if isinstance(remedy.around, (Altered, RowsUnmasked)) and not remedy.around.changed:
        return said(None, "no value that the op is given could be changed from outside")
    if not left and not replay(nullcontext()):
        return said(None, "the step is finite without it as well: it does not do the same each time")
    return said(not left, left)


def _remedies(kind: str, origin: Origin, model: nn.Module) -> Iterator[_Remedy]:
    spot = origin.spot
    if kind == "island":
        for name in _upward(spot.module, model):
            yield _Remedy(f"{name} computed in fp32", island(model, name), name)
    elif kind == "attention":
        yield _Remedy("the math attention kernel", sdpa_kernel(SDPBackend.MATH))
    elif kind == "scale":
        for scale in LOWER_SCALES:
            yield _Remedy(f"the loss scaled down by {1 / scale:g}", nullcontext(), scale=scale)
    elif kind == "row":
        yield _Remedy("scores of fully masked rows set to 0 before the softmax", RowsUnmasked())
    elif kind == "edge" and spot.line is not None:
        yield _Remedy(f"the input of {spot.op} moved off the edge where it lies on it", Altered(spot, off_edge))
    elif kind == "wide" and spot.line is not None:
        yield _Remedy(f"{spot.op} computed in fp32", Altered(spot, widened, by_autocast=False))


def _upward(module: str, model: nn.Module) -> list[str]:
    """Return a module's name and those of the modules around it, two at most, that are called."""
    parts = module.split(".") if module else []
    names = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
    known = dict(model.named_modules())
    return [name for name in names if name in known and type(known[name]).forward is not nn.Module.forward][:2]


@contextmanager
def island(model: nn.Module, name: str) -> Iterator[None]:
    """Compute one module in fp32 inside: its weights, its inputs, and no autocast.

    Args:
        model: The whole model.
        name: Dotted name of the module.
    """
    module = dict(model.named_modules())[name]
    halves = [p for p in [*module.parameters(), *module.buffers()] if p.dtype in (torch.float16, torch.bfloat16)]
    outer = halves[0].dtype if halves else None
    before = [(tensor, tensor.data) for tensor in halves]
    device = next((p.device.type for p in module.parameters()), "cpu")
    patch: ForwardPatch | None = None
    try:
        for tensor in halves:
            tensor.data = tensor.data.float()
        patch = make_island(module, torch.float32, device_type=device, outer=outer, by_autocast=False)
        yield
    finally:
        if patch is not None:
            patch.undo()
        for tensor, data in before:
            tensor.grad = None
            tensor.data = data


@contextmanager
def samples_replaced(tensors: list[torch.Tensor], rows: tuple[int, ...]) -> Iterator[bool]:
    """Overwrite the bad samples of a batch by a good one, inside. Yields whether there is a good one."""
    good = _good_row(tensors, rows)
    before = [(tensor, tensor.detach().clone()) for tensor in tensors] if good is not None else []
    try:
        with torch.no_grad():
            for tensor, _ in before:
                for row in rows:
                    tensor[row] = tensor[good]
        yield good is not None
    finally:
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)


def _good_row(tensors: list[torch.Tensor], rows: tuple[int, ...]) -> int | None:
    size = tensors[0].shape[0] if tensors and tensors[0].dim() else 0
    bad = {*rows, *(row for tensor in tensors for row in bad_rows(tensor))}
    return next((row for row in range(size) if row not in bad), None)
