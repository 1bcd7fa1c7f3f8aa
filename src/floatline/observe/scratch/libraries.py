"""Ops whose buffers no formula predicts: run once for real when small, run smaller and scaled when large.

oneDNN chooses among dozens of convolution kernels by instruction set, shape, batch and threads. Each wants its own
reordered copies, so the op itself is asked (measure.py), once per shape. What would take too long is

    convolution, batched product   measured with a small batch and with twice that, and continued as a straight line
    LSTM layer                     the same over time steps
    matrix product                 measured with its largest sides halved until it is small: packing buffers are blocks
    attention                      taken from the formula of its kernel
    anything else                  taken to need nothing

Not covered: another processor than this one; it may choose other kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from floatline.observe.real import tensors_in
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
_MEASURED: dict[Any, Measured] = {}


class Libraries:
    """Measures ops, and remembers. Answers are shared by all traces of this process."""

    def __init__(self) -> None:
        self.workspaces: dict[Any, int] = {}

    def __call__(self, func: Any, args: Any, kwargs: Any, out: Any) -> Need:
        packet = func._overloadpacket
        if packet in PRODUCTS and not any(_costs_a_copy(tensor) for tensor in tensors_in(args)):
            return NOTHING  # fp32 products of dense matrices go straight to MKL
        if _bytes(args, kwargs, out) < LEAST_BYTES:
            return NOTHING
        if _is_small(func, args, kwargs, out):
            found = self._once(func, args, kwargs)
            return NOTHING if found is None else Need(found.extra, _other_than(found.storages, plain_sizes(out)))
        if packet in LINES:
            return self._along_line(func, args, kwargs, out, LINES[packet])
        if packet in PRODUCTS:
            return self._blocked(func, args, kwargs)
        formula = FORMULAS.get(packet)
        return Need(formula(args)) if formula else NOTHING

    def _once(self, func: Any, args: Any, kwargs: Any) -> Measured | None:
        """Measure, or remember. A recurrent layer's backward gets the workspace that its forward was seen to leave."""
        packet = func._overloadpacket
        if packet is aten.mkldnn_rnn_layer_backward:
            if _layer(args) not in self.workspaces:
                return None
            args = (*args[:-1], Like((self.workspaces[_layer(args)],), torch.uint8))
        key = (func, torch.get_num_threads(), _signature(args), _signature(kwargs))
        found = _MEASURED.get(key) or measure(func, args, kwargs)
        if found is not None:
            _MEASURED[key] = found
        if packet is aten.mkldnn_rnn_layer and found is not None:
            self.workspaces[_layer(args)] = found.storages[-1]
        return found

    def _along_line(self, func: Any, args: Any, kwargs: Any, out: Any, batched: tuple[int, ...]) -> Need:
        """Measure with two small batches and continue the line; `batched` are the arguments that have the batch."""
        whole = args[batched[0]].shape[0]
        first = min(whole, 4 * torch.get_num_threads())
        low, high = (self._once(func, _with_batch(args, batched, batch), kwargs) for batch in (first, 2 * first))
        if low is None or high is None:
            return NOTHING

        def at(start: int, end: int) -> int:
            return max(0, start + (end - start) * (whole - first) // first)

        storages = tuple(at(*pair) for pair in zip(low.storages, high.storages, strict=True))
        return Need(at(low.extra, high.extra), _other_than(storages, plain_sizes(out)))

    def _blocked(self, func: Any, args: Any, kwargs: Any) -> Need:
        """Measure a product with its longest sides halved until it is small."""
        left, right = args[-2:]
        sides = [left.shape[-2], left.shape[-1], right.shape[-1]]
        while 2 * math.prod(sides) > MOST_FLOPS:
            longest = sides.index(max(sides))
            sides[longest] //= 2
        rows, inner, columns = sides
        less = [Like.of(left, (rows, inner)), Like.of(right, (inner, columns))]
        if len(args) == 3:
            less.insert(0, Like.of(args[0], (columns,) if args[0].dim() == 1 else (rows, columns)))
        found = self._once(func, tuple(less), kwargs)
        return NOTHING if found is None else Need(found.extra)


def _layer(args: Any) -> Any:
    """What a recurrent layer and its backward have in common."""
    return tuple(args[0].shape), args[0].dtype, tuple(args[1].shape), tuple(args[2].shape)


def _other_than(real: tuple[int, ...], fake: tuple[int, ...]) -> tuple[int, ...]:
    return real if len(real) == len(fake) and real != fake else ()


def _costs_a_copy(tensor: torch.Tensor) -> bool:
    return tensor.dtype in HALVES or (tensor.dim() > 1 and 1 not in tensor.stride()[-2:])


def _bytes(args: Any, kwargs: Any, out: Any) -> int:
    return sum(size_of(tensor) for tree in (args, kwargs, out) for tensor in tensors_in(tree))


def _is_small(func: Any, args: Any, kwargs: Any, out: Any) -> bool:
    formula = flop_registry.get(func._overloadpacket)
    flops = int(formula(*args, **kwargs, out_val=out)) if formula is not None else 0
    return flops <= MOST_FLOPS and _bytes(args, kwargs, out) <= MOST_BYTES


def _signature(tree: Any) -> Any:
    if isinstance(tree, (torch.Tensor, Like)):
        return tuple(tree.shape), tuple(tree.stride()), tree.dtype
    if isinstance(tree, (list, tuple)):
        return tuple(_signature(item) for item in tree)
    if isinstance(tree, dict):
        return tuple((key, _signature(value)) for key, value in tree.items())
    return tree


def _with_batch(args: Any, batched: tuple[int, ...], batch: int) -> Any:
    return tuple(
        Like.of(item, (batch, *item.shape[1:])) if place in batched and item is not None else item
        for place, item in enumerate(args)
    )


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
    aten.mkldnn_rnn_layer_backward: (0, 7, 10),
}
FORMULAS: dict[Any, Callable[[Any], int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
