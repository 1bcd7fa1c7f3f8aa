"""Ops whose buffers no formula predicts: run once for real when small, run smaller and scaled when large.

oneDNN chooses among dozens of convolution kernels by instruction set, shape, batch and threads. Each wants its own
reordered copies, so the op itself is asked (measure.py). The answer is kept per shape. An op that would take too long is

    convolution, batched product    measured with a small batch and with twice that, and continued as a straight line
    LSTM layer                      the same over time steps
    matrix product                  measured with its largest sides halved until it is small: packing buffers are blocks,
                                    they do not grow with the matrix
    attention                       taken from the formula of its kernel
    anything else                   taken to need nothing

Not covered: another processor than this one; it may choose other kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from floatline.observe.fake import tensors_in
from floatline.observe.scratch import NOTHING, Need
from floatline.observe.scratch.measure import Like, Measured, measure
from floatline.observe.scratch.shared import HALVES, plain_sizes, size_of

aten = torch.ops.aten
LEAST_BYTES = 2**14
"""Smaller ops are not worth a look."""
MOST_BYTES = 2**26
"""Inputs and results of an op that is run for real."""
MOST_FLOPS = 2 * 10**9
"""A tenth of a second on one slow core."""
_MEASURED: dict[Any, Measured | None] = {}


class Libraries:
    """Measures ops, and remembers. Answers are shared by all traces of this process."""

    def __init__(self) -> None:
        self.workspaces: dict[Any, int] = {}

    def __call__(self, func: Any, args: Any, kwargs: Any, out: Any) -> Need:
        packet = func._overloadpacket
        if packet in PRODUCTS and not any(_costs_a_copy(tensor) for tensor in tensors_in(args)):
            return NOTHING  # fp32 products of dense matrices go straight to MKL
        if packet is aten.mkldnn_rnn_layer_backward:
            args = (*args[:-1], Like((self._workspace(args),), torch.uint8))
        if _bytes(args, kwargs, out) < LEAST_BYTES:
            return NOTHING
        need = self._need(func, args, kwargs, out)
        if packet is aten.mkldnn_rnn_layer and need.storages:
            self.workspaces[_layer(args)] = need.storages[-1]
        return need

    def _workspace(self, args: Any) -> int:
        return self.workspaces.get(_layer(args), 0)

    def _need(self, func: Any, args: Any, kwargs: Any, out: Any) -> Need:
        if _is_small(func, args, kwargs, out):
            found = _once(func, args, kwargs)
            return NOTHING if found is None else Need(found.extra, _other_than(found.storages, plain_sizes(out)))
        packet = func._overloadpacket
        if packet in LINES:
            return _along_line(func, args, kwargs, out, LINES[packet])
        if packet in PRODUCTS:
            return _blocked(func, args, kwargs)
        formula = FORMULAS.get(packet)
        return Need(formula(args)) if formula else NOTHING


def _layer(args: Any) -> Any:
    """What a recurrent layer and its backward have in common."""
    return tuple(args[0].shape), args[0].dtype, tuple(args[1].shape), tuple(args[2].shape)


def _other_than(real: tuple[int, ...], fake: tuple[int, ...]) -> tuple[int, ...]:
    return real if len(real) == len(fake) and real != fake else ()


def _costs_a_copy(tensor: torch.Tensor) -> bool:
    return tensor.dtype in HALVES or (tensor.dim() > 1 and 1 not in tensor.stride()[-2:])


def _bytes(args: Any, kwargs: Any, out: Any) -> int:
    return sum(size_of(t) for tree in (args, kwargs, out) for t in tensors_in(tree))


def _is_small(func: Any, args: Any, kwargs: Any, out: Any) -> bool:
    formula = flop_registry.get(func._overloadpacket)
    flops = int(formula(*args, **kwargs, out_val=out)) if formula is not None else 0
    return flops <= MOST_FLOPS and _bytes(args, kwargs, out) <= MOST_BYTES


def _once(func: Any, args: Any, kwargs: Any) -> Measured | None:
    key = (func, torch.get_num_threads(), _signature(args), _signature(kwargs))
    if key not in _MEASURED:
        _MEASURED[key] = measure(func, args, kwargs)
    return _MEASURED[key]


def _signature(tree: Any) -> Any:
    if isinstance(tree, (torch.Tensor, Like)):
        return tuple(tree.shape), tuple(tree.stride()), tree.dtype
    if isinstance(tree, (list, tuple)):
        return tuple(_signature(item) for item in tree)
    if isinstance(tree, dict):
        return tuple((key, _signature(value)) for key, value in tree.items())
    return tree


# Larger than what can be run


def _along_line(func: Any, args: Any, kwargs: Any, out: Any, batched: tuple[int, ...]) -> Need:
    """Measure with two small batches and continue the line to the real one; `batched` are the arguments that have it."""
    whole = args[batched[0]].shape[0]
    first = min(whole, 4 * torch.get_num_threads())
    points = []
    for batch in (first, 2 * first):
        found = _once(func, _with_batch(args, batched, batch), kwargs)
        if found is None:
            return NOTHING
        points.append(found)
    def at(low: int, high: int) -> int:
        return max(0, low + (high - low) * (whole - first) // first)
    return Need(at(points[0].extra, points[1].extra))


def _with_batch(args: Any, batched: tuple[int, ...], batch: int) -> Any:
    return tuple(
        Like.of(item, (batch, *item.shape[1:])) if place in batched and item is not None else item
        for place, item in enumerate(args)
    )


def _blocked(func: Any, args: Any, kwargs: Any) -> Need:
    """Measure a product with its longest sides halved until it is small."""
    left, right = args[-2:]
    sides = [left.shape[-2], left.shape[-1], right.shape[-1]]
    while 2 * math.prod(sides) > MOST_FLOPS // 2:
        longest = sides.index(max(sides))
        sides[longest] //= 2
    rows, inner, columns = sides
    less = [Like.of(left, (rows, inner)), Like.of(right, (inner, columns))]
    if len(args) == 3:
        less.insert(0, Like.of(args[0], (columns,) if args[0].dim() == 1 else (rows, columns)))
    found = _once(func, tuple(less), kwargs)
    return NOTHING if found is None else Need(found.extra)


def _attention(args: Any) -> int:
    """cpu/FlashAttentionKernel.cpp: for each thread a tile of scores, two numbers per row, a tile of results, in fp32;
    in 16 bits the scores once more."""
    rows, keys = _tile(args[0], args[1])
    per_thread = 4 * rows * (keys + 2 + args[0].shape[-1]) + (2 * rows * keys if args[0].dtype in HALVES else 0)
    return torch.get_num_threads() * per_thread


def _attention_backward(args: Any) -> int:
    """The same file: the gradient of the result made contiguous, and two tiles of scores for each thread."""
    rows, keys = _tile(args[1], args[2])
    wide = 4 + (2 if args[1].dtype in HALVES else 0)
    return size_of(args[0]) + torch.get_num_threads() * 2 * rows * keys * wide + 4 * rows


def _tile(query: torch.Tensor, key: torch.Tensor) -> tuple[int, int]:
    length = query.shape[2]
    rows = 256 if length >= 768 else 64 if length >= 192 else 32
    return min(rows, length), min(512, key.shape[2])


PRODUCTS = {aten.mm, aten.addmm}
LINES: dict[Any, tuple[int, ...]] = {
    aten.convolution: (0,),
    aten.convolution_backward: (0, 1),
    aten.bmm: (0, 1),
    aten.baddbmm: (0, 1, 2),
    aten.mkldnn_rnn_layer: (0,),
}
FORMULAS: dict[Any, Callable[[Any], int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
