"""A program reads a value that a trace does not know: what it is told.

A number that is read (`.item()`, `.tolist()`, `.numpy()`) is 1. A truth that is read is what it would be for ordinary
numbers, finite, positive and small: the fake result of a comparison, and of logic on comparisons, carries it along. So
`isfinite(norm)` is true, `norm > limit`, `(x == 0).any()` and `x > 0.5` are false. A loop that waits for a truth to
change (draw again what lies outside) sees it change after some hundred rounds.

What a batch holds is known, and so is what is made of it and of real tensors alone, before weights come in (a mask of 0
and -inf for all pairs of tokens): such values are read as they are, and compared for real (which images are padding?).

Each answer that the user's program got is noted with its line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import _disable_current_modes

from floatline.observe.real import REAL_BYTES, really, tensors_in

if TYPE_CHECKING:
    from floatline.observe.fake import Faking

aten = torch.ops.aten
ORDINARY = 2.0**-10
"""Stands for a float in comparisons: positive, and below the limits that programs set on norms, shares and errors."""
PATIENCE = 100
"""Times that one place in a running function gets the same truth in a row."""
KNOWN = "_floatline_known"
"""Attribute of a fake tensor whose values are known: a real tensor that holds them."""
_NOMINAL = "_floatline_nominal"


def item(mode: Faking, func: Any, args: Any, kwargs: Any) -> Any:
    """One value is read."""
    tensor = args[0]
    known = getattr(tensor, KNOWN, tensor)
    if not mode.is_unknown(known):
        return really(func, (known,), kwargs)
    if tensor.dtype == torch.bool:
        return mode.patient(getattr(tensor, _NOMINAL, False))
    answer = 1.0 if tensor.is_floating_point() else 1
    mode.assume(f"a value that is read was taken to be {answer}")
    return complex(answer) if tensor.is_complex() else answer


def array(mode: Faking, tensor: torch.Tensor) -> Any:
    """All values are read, as numpy's array; the library that wants them cannot take fake ones."""
    known = getattr(tensor, KNOWN, None)
    if known is not None and not mode.is_unknown(known):
        return known.numpy(force=True).copy()
    mode.assume(f"values of shape {tuple(tensor.shape)} that are read as an array were taken to be 1")
    with _disable_current_modes(), unset_fake_temporarily():
        return torch.ones(tensor.shape, dtype=tensor.dtype).numpy()


def equal(mode: Faking, func: Any, args: Any, kwargs: Any) -> bool:
    """`torch.equal`: nothing tells two unknown tensors apart but their identity."""
    if any(mode.is_unknown(tensor) for tensor in args):
        return args[0] is args[1]
    return bool(really(func, args, kwargs))


def truth(mode: Faking, func: Any, args: Any, kwargs: Any) -> Any:
    """A comparison, or logic on one: the fake result remembers what it would be for ordinary numbers."""
    found = _of_known(mode, func, args, kwargs)
    if found is not None:
        return found
    out = mode.run(func, args, kwargs)
    if isinstance(out, FakeTensor) and out.dtype == torch.bool:
        try:
            with unset_fake_temporarily():
                scalars = [_ordinary(value) for value in args]
                nominal = bool(func(*scalars, **{key: value for key, value in kwargs.items() if key != "dtype"}))
        except (RuntimeError, TypeError, IndexError):
            nominal = False
        setattr(out, _NOMINAL, nominal)
    return out


def _of_known(mode: Faking, func: Any, args: Any, kwargs: Any) -> Any:
    """Return the real result of a comparison of known values with real ones; None for another one."""
    if (
        func._schema.returns[0].type.kind() != "TensorType"
        or not hasattr(args[0], KNOWN)
        or func._overloadpacket is aten.mul
    ):
        return None
    known = [getattr(value, KNOWN, value) for value in args]
    if any(mode.is_unknown(value) for value in known):
        return None
    return really(func, known, kwargs)


def know(func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Keep the values of a fake result of real arguments, unless it is a huge new tensor."""
    if isinstance(out, FakeTensor) and (func.is_view or out.numel() * out.element_size() <= REAL_BYTES):
        setattr(out, KNOWN, really(func, args, kwargs))


def write_known(mode: Faking, func: Any, args: Any, kwargs: Any, written: list[torch.Tensor]) -> list[torch.Tensor]:
    """Write into known values what is written into the fake tensor that has them; return those that are lost by it."""
    known = [getattr(tensor, KNOWN) for tensor in written if hasattr(tensor, KNOWN)]
    if not known:
        return []
    args, kwargs = _with_known(args), _with_known(kwargs)
    if any(mode.is_unknown(tensor) for tensor in tensors_in((args, kwargs))):
        return known
    really(func, args, kwargs)
    return []


def _with_known(tree: Any) -> Any:
    if isinstance(tree, (list, tuple)):
        return type(tree)(_with_known(item) for item in tree)
    if isinstance(tree, dict):
        return {key: _with_known(value) for key, value in tree.items()}
    return getattr(tree, KNOWN, tree)


def keep_known(mode: Faking, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Let what is made of known values alone know its values too; a large result only where it is a view."""
    inputs = tensors_in((args, kwargs))
    if not isinstance(out, FakeTensor) or any(isinstance(t, FakeTensor) and not hasattr(t, KNOWN) for t in inputs):
        return
    args, kwargs = _with_known(args), _with_known(kwargs)
    if not any(mode.is_unknown(tensor) for tensor in tensors_in((args, kwargs))):
        know(func, args, kwargs, out)


def check(mode: Faking, func: Any, args: Any, kwargs: Any) -> Any:
    """What libraries ask before they refuse an argument: it is as it should be."""
    out = mode.run(func, args, kwargs)
    if isinstance(out, FakeTensor):
        setattr(out, _NOMINAL, func is aten._is_all_true.default)
    return out


def passed_on(mode: Faking, func: Any, args: Any, kwargs: Any) -> Any:
    """Truths keep what they carry when they are reshaped or copied."""
    out = mode.run(func, args, kwargs)
    if isinstance(out, FakeTensor) and out.dtype == torch.bool and hasattr(args[0], _NOMINAL):
        setattr(out, _NOMINAL, getattr(args[0], _NOMINAL))
    return out


def _ordinary(value: Any) -> Any:
    """Return a number that stands for a tensor: itself where it is one real number, the nominal truth, or ORDINARY."""
    if not isinstance(value, torch.Tensor):
        return [] if isinstance(value, list) else value  # a list of dimensions to reduce
    if not isinstance(value, FakeTensor) and value.numel() == 1:
        return value.reshape(())
    if value.dtype == torch.bool:
        return torch.tensor(getattr(value, _NOMINAL, False))
    small = ORDINARY if value.is_floating_point() or value.is_complex() else 1
    return torch.full((), small, dtype=value.dtype)


_LOGIC = (aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge, aten.isnan, aten.isinf, aten.logical_and,
          aten.logical_or, aten.logical_not, aten.logical_xor, aten.bitwise_and, aten.bitwise_or, aten.bitwise_not,
          aten.bitwise_xor, aten.mul, aten.any, aten.all)  # fmt: skip
_KEPT = (aten.view.default, aten.reshape.default, aten.squeeze.default, aten.squeeze.dim, aten.unsqueeze.default,
         aten.detach.default, aten.clone.default, aten.expand.default, aten.select.int, aten.slice.Tensor)  # fmt: skip

READING = {
    aten._local_scalar_dense.default: item,
    aten.equal.default: equal,
    aten._is_all_true.default: check,
    aten._is_any_true.default: check,
    **dict.fromkeys(_KEPT, passed_on),
    **{getattr(packet, name): truth for packet in _LOGIC for name in packet.overloads()},
}
"""Op -> its handler (mode, op, args, kwargs) -> result."""
