"""Run a program with stochastic rounding: the same arithmetic, another draw of its rounding errors.

Each op whose results are in a half format is run in fp32 on its inputs, and the results are rounded up or down at
random so that the mean is exact. Several runs tell how far the outcome of a step hangs on how the dice of rounding
fell: an error that is there in every run is the format's, one that comes and goes is noise.

It is what CADNA and Verificarlo do for numerical codes, at the price of about one fp32 step a run.

The rounding is done in fp32, quick enough for large weights:

    steps = x / 2^(e - m)              of the format; exact, for it divides by a power of two
    floor(steps), one more with the probability steps - floor(steps), times 2^(e - m)

`rounding.py` does it in fp64 for every format, with 53 bits of randomness. fp32 splits a step of a half format into
2^13 parts at least. Values that are not finite stay as they are; beyond the format's end they become infinite.

Not covered: what is decided by it (comparisons see the rounded values); fp32 kernels and half kernels may differ in
more than their rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type
from torch.utils._pytree import tree_map

from floatline.observe.error.measures import format_of
from floatline.observe.error.meter import AUTOCAST, HALVES, PLAIN
from floatline.observe.real import tensors_in

_EXPONENT = 0x7F800000


class StochasticRounding(TorchDispatchMode):
    """The mode.

    Args:
        seed: Of the random bits, which are none of torch's own.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(kind not in PLAIN and is_traceable_wrapper_subclass_type(kind) for kind in types):
            return NotImplemented
        with torch._C.DisableTorchFunction(), torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
            return self._run(func, args, kwargs)

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        if not _rounds(func, args, kwargs, out):
            return out
        try:
            wide = func(*tree_map(_widened, args), **tree_map(_widened, kwargs))
        except Exception:  # no kernel for it
            return out
        for result, exact in zip(tensors_in(out), tensors_in(wide)):
            if result.dtype in HALVES and result.shape == exact.shape and exact.dtype == torch.float32:
                result.copy_(rounded_at_random(exact, result.dtype, self._bits(result)))
        return out

    def _bits(self, tensor: torch.Tensor) -> torch.Generator:
        device = tensor.device
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]


def _rounds(func: Any, args: Any, kwargs: Any, out: Any) -> bool:
    """Say whether an op computes new half-precision values: no view, nothing random, nothing in place."""
    if not isinstance(func, torch._ops.OpOverload) or func.is_view or func._schema.is_mutable:
        return False
    if torch.Tag.nondeterministic_seeded in func.tags and "attention" not in func._schema.name:
        return False
    results = list(tensors_in(out))
    if not any(tensor.dtype in HALVES for tensor in results):
        return False
    storages = {t.untyped_storage()._cdata for t in tensors_in([args, kwargs]) if t.layout == torch.strided}
    return all(t.layout == torch.strided and t.untyped_storage()._cdata not in storages for t in results)


def _widened(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.dtype in HALVES:
        return value.float()
    return torch.float32 if value in HALVES else value


def rounded_at_random(wide: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Round values up or down at random, so that the mean is exact.

    Args:
        wide: fp32.
        dtype: A half format.
        generator: Of the random bits.

    Returns:
        The rounded values in `dtype`.
    """
    fmt = format_of(dtype)
    step = (wide.contiguous().view(torch.int32) & _EXPONENT).view(torch.float32).clamp_(min=fmt.min_normal)
    step.mul_(2.0**-fmt.mantissa_bits)
    share = wide / step
    below = share.floor()
    draw = torch.rand(wide.shape, device=wide.device, generator=generator, dtype=torch.float32)
    rounded = below.add_(draw < share.sub_(below)).mul_(step)
    return torch.where(torch.isfinite(wide), rounded, wide).to(dtype)
