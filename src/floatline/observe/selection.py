"""Ops whose result has a size that values decide, or that hand out indices: what stands for them in a trace.

a real mask as an index        becomes integer indices, so that the size is known exactly
a fake mask                    half of it is true
indices made of fake floats    (top-k, argmax, sort) become real ones that are spread evenly: each expert gets as
                               many tokens as the next
unique values                  all are different
packed sequences, CTC          real lengths count; fake ones are taken to be full
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from floatline.observe.real import REAL_BYTES, really, tensors_in

if TYPE_CHECKING:
    from floatline.observe.fake import Faking

aten = torch.ops.aten
Handler = Callable[["Faking", Any, Any, Any], Any]


# Masks


def nonzero(mode: Faking, func: Any, args: Any, kwargs: Any) -> Any:
    """Where a mask is true."""
    mask = args[0]
    if not mode.is_unknown(mask):
        return really(func, args, kwargs)
    with unset_fake_temporarily():
        count = max(1, mask.numel() // 2) if mask.numel() else 0
        mode.assume(f"half of a mask of {tuple(mask.shape)} was taken to be true")
        flat = torch.arange(count) * 2 if mask.numel() > 1 else torch.zeros(count, dtype=torch.long)
        return torch.stack(torch.unravel_index(flat, mask.shape), dim=1) if mask.dim() else flat[:, None][:, :0]


def by_integers(mode: Faking, func: Any, args: Any, kwargs: Any) -> Any:
    """Indexing: masks are replaced by the integers that they stand for."""
    indices = args[1]
    if any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices):
        if not any(mode.is_unknown(tensor) for tensor in tensors_in(args)):
            return mode.run(func, args, kwargs)
        args = (args[0], _integers(mode, indices), *args[2:])
    return mode.run(func, args, kwargs)


def _integers(mode: Faking, indices: Any) -> list[Any]:
    integers: list[Any] = []
    for index in indices:
        if index is None or index.dtype not in (torch.bool, torch.uint8):
            integers.append(index)
        else:
            found = nonzero(mode, aten.nonzero.default, (index,), {})
            integers += really(torch.unbind, (found, 1), {})
    return integers


def masked_select(mode: Faking, func: Any, args: Any, kwargs: Any) -> Any:
    """A mask as an index, broadcast."""
    if not any(mode.is_unknown(tensor) for tensor in args):
        return really(func, args, kwargs)
    shape = torch.broadcast_shapes(args[0].shape, args[1].shape)
    tensor, mask = (mode.run(aten.expand.default, (each, shape), {}) for each in args)
    return by_integers(mode, aten.index.Tensor, (tensor, [mask]), {})


# Indices


def spread(dimension: int, default: int | None) -> Handler:
    """Return the handler of an op that returns indices along a dimension.

    Args:
        dimension: Where in the arguments the dimension stands.
        default: What it is when it is not given; None for all elements.
    """

    def handler(mode: Faking, func: Any, args: Any, kwargs: Any) -> Any:
        out = mode.run(func, args, kwargs)
        indices = out if isinstance(out, torch.Tensor) else out[-1]
        if not isinstance(indices, FakeTensor) or indices.numel() * 8 > REAL_BYTES:
            return out
        dim = kwargs.get("dim", args[dimension] if len(args) > dimension else default)
        length = args[0].numel() if dim is None or not args[0].dim() else args[0].shape[dim]
        with unset_fake_temporarily():
            real = (torch.arange(indices.numel()) % max(1, int(length))).reshape(indices.shape)
        return real if isinstance(out, torch.Tensor) else (*out[:-1], real)

    return handler


def unique(mode: Faking, func: Any, args: Any, kwargs: Any) -> Any:
    """All values are taken to be different; inverse and counts become real."""
    tensor = args[0]
    if not mode.is_unknown(tensor):
        return really(func, args, kwargs)
    names = [argument.name for argument in func._schema.arguments]
    along = args[1] if "dim" in names and names[1] == "dim" else kwargs.get("dim")
    count = tensor.numel() if along is None else tensor.shape[along]
    mode.assume(f"{count} values, of which different ones are sought, were taken to be all different")
    values = torch.empty_like(tensor) if along is not None else torch.empty_like(tensor.flatten())
    with unset_fake_temporarily():
        inverse = torch.arange(count) if along is not None else torch.arange(count).reshape(tensor.shape)
        return (values, inverse, torch.ones(count, dtype=torch.long))[: len(func._schema.returns)]


def bincount(mode: Faking, func: Any, args: Any, kwargs: Any) -> Any:
    """Counts of unknown numbers: each as often as the next."""
    if not any(mode.is_unknown(tensor) for tensor in tensors_in((args, kwargs))):
        return really(func, args, kwargs)
    tensor, weights = args[0], kwargs.get("weights", args[1] if len(args) > 1 else None)
    least = kwargs.get("minlength", args[2] if len(args) > 2 else 0)
    if not mode.is_unknown(tensor) and tensor.numel():
        with unset_fake_temporarily():
            least = max(least, int(tensor.max()) + 1)
    mode.assume(f"{tensor.numel()} numbers that are counted were taken to be spread evenly")
    if weights is not None:
        return torch.empty(max(1, least), dtype=torch.float32 if weights.dtype == torch.float32 else torch.float64)
    with unset_fake_temporarily():
        return torch.full((max(1, least),), tensor.numel() // max(1, least), dtype=torch.long)


# Lengths


def repeat(mode: Faking, func: Any, args: Any, kwargs: Any) -> Any:
    """`repeat_interleave` by a tensor of counts: its length is their sum."""
    counts = args[1] if len(args) > 1 and isinstance(args[1], torch.Tensor) else args[0]
    if kwargs.get("output_size") is None and any(mode.is_unknown(tensor) for tensor in tensors_in(args)):
        kwargs = {**kwargs, "output_size": sum(_lengths(mode, counts, 1))}
    return mode.run(func, args, kwargs)


def _lengths(mode: Faking, lengths: Any, full: int) -> list[int]:
    """Return lengths as ints; unknown ones are `full`."""
    if not isinstance(lengths, torch.Tensor):
        return [int(length) for length in lengths]
    if mode.is_unknown(lengths):
        mode.assume(f"{lengths.numel()} lengths that are not known were taken to be {full}")
        return [full] * lengths.numel()
    with unset_fake_temporarily():
        return [int(length) for length in lengths.reshape(-1).tolist()]


def pack(mode: Faking, func: Any, args: Any, kwargs: Any) -> Any:
    """Sequences without their padding, one after the other; and how many are still running at each place."""
    tensor, lengths, batch_first = args
    if not any(mode.is_unknown(each) for each in args[:2]):
        return really(func, args, kwargs)
    numbers = _lengths(mode, lengths, tensor.shape[1 if batch_first else 0])
    tensor = mode.fake(tensor)
    with unset_fake_temporarily():
        places = torch.arange(max(numbers))
        running = (torch.tensor(numbers)[:, None] > places).sum(0)
    return tensor.new_empty(sum(numbers), *tensor.shape[2:]), running


def ctc(mode: Faking, func: Any, args: Any, kwargs: Any) -> Any:
    """The forward variables are as long as the longest target, with a blank around each label."""
    scores, targets, _, lengths = args[:4]
    if not isinstance(scores, FakeTensor):
        return really(func, args, kwargs)
    batch = scores.shape[1] if scores.dim() == 3 else 1
    longest = max(_lengths(mode, lengths, targets.shape[-1] if targets.dim() > 1 else targets.numel() // batch))
    loss = scores.new_empty(scores.shape[1:2])
    return loss, scores.new_empty(batch, scores.shape[0], 2 * longest + 1)


def grouped_mm(mode: Faking, func: Any, args: Any, kwargs: Any) -> Any:
    """Its fake kernel accepts bf16 on a GPU only; the shape of the result is simple."""
    if not any(isinstance(tensor, FakeTensor) for tensor in tensors_in(args)):
        return really(func, args, kwargs)
    left, right = mode.fake(args[0]), args[1]
    groups: list[int] = []
    if left.dim() == right.dim() == 2:
        groups = [kwargs.get("offs", args[2] if len(args) > 2 else None).shape[0]]
    elif left.dim() == right.dim() == 3:
        groups = [left.shape[0]]
    return left.new_empty(*groups, left.shape[-2], right.shape[-1], dtype=kwargs.get("out_dtype"))


SELECTING: dict[Any, Handler] = {
    aten.nonzero.default: nonzero,
    aten.index.Tensor: by_integers,
    aten.index_put.default: by_integers,
    aten.index_put_.default: by_integers,
    aten._index_put_impl_.default: by_integers,
    aten.masked_select.default: masked_select,
    aten.topk.default: spread(2, -1),
    aten.sort.default: spread(1, -1),
    aten.sort.stable: spread(2, -1),
    aten.argsort.default: spread(1, -1),
    aten.argsort.stable: spread(2, -1),
    aten.argmax.default: spread(1, None),
    aten.argmin.default: spread(1, None),
    aten.max.dim: spread(1, None),
    aten.min.dim: spread(1, None),
    aten.multinomial.default: spread(9, -1),
    aten._unique2.default: unique,
    aten.unique_dim.default: unique,
    aten.unique_consecutive.default: unique,
    aten.bincount.default: bincount,
    aten.repeat_interleave.Tensor: repeat,
    aten._pack_padded_sequence.default: pack,
    aten._ctc_loss.Tensor: ctc,
}
"""Op -> its handler (mode, op, args, kwargs) -> result."""
if hasattr(aten, "_grouped_mm"):
    SELECTING[aten._grouped_mm.default] = grouped_mm
