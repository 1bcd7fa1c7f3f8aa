"""Run a program with stochastic rounding: the same arithmetic, another draw of its rounding errors.

Each op whose results are in a half format is run in fp32 on its inputs, and the results are rounded up or down at
random so that the mean is exact. Several runs tell how far the outcome of a step hangs on how the dice of rounding
fell: an error that is there in every run is the format's, one that comes and goes is noise.

It is what CADNA and Verificarlo do for numerical codes, at the price of about one fp32 step a run.

The rounding adds 16 random bits (13 for fp16) below the last place that the format keeps, and cuts off there: a carry
comes with just the probability of rounding up. Beyond the format's end values become infinite, as in rounding to
nearest. `rounding.py` does it in fp64 for every format, with 53 random bits.

Not covered: what is decided by it (comparisons see the rounded values); fp32 kernels and half kernels may differ in
more than their rounding.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type
from torch.utils._pytree import tree_map

from floatline.formats import NumberFormat
from floatline.observe.error.measures import HALVES, format_of
from floatline.observe.error.meter import AUTOCAST, PLAIN
from floatline.observe.real import tensors_in

_BITS = 16
CHUNK = 2**18
"""Elements that are rounded at a time: they stay in the cache."""


class StochasticRounding(TorchDispatchMode):
    """The mode.

    Args:
        seed: Of the random bits, which are none of torch's own.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self._seed = seed
        self._dice: dict[torch.device, Dice] = {}

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
                result.copy_(rounded_at_random(exact, result.dtype, self._dice_of(result)))
        return out

    def _dice_of(self, tensor: torch.Tensor) -> Dice:
        if tensor.device not in self._dice:
            self._dice[tensor.device] = Dice(self._seed, tensor.device)
        return self._dice[tensor.device]


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


class Dice:
    """Random bits, drawn once and used again from random places: drawing them anew costs more than the rounding.

    Args:
        seed: Of torch's generator.
        device: Where they are.
    """

    def __init__(self, seed: int = 0, device: torch.device | str = "cpu") -> None:
        self._generator = torch.Generator(device).manual_seed(seed)
        self._places = random.Random(seed)
        self._pool = torch.randint(
            0, 2**_BITS, (2 * CHUNK,), dtype=torch.int32, device=device, generator=self._generator
        )

    def bits(self, count: int) -> torch.Tensor:
        """Return `count` (at most `CHUNK`) int32 of 16 random bits each."""
        start = self._places.randrange(CHUNK)
        return self._pool[start : start + count]


def rounded_at_random(wide: torch.Tensor, dtype: torch.dtype, dice: Dice) -> torch.Tensor:
    """Round values up or down at random, so that the mean is exact.

    Args:
        wide: fp32.
        dtype: A half format.
        dice: The random bits.

    Returns:
        The rounded values in `dtype`.
    """
    fmt = format_of(dtype)
    drop = 23 - fmt.mantissa_bits
    flat = wide.reshape(-1)
    out = torch.empty(flat.shape, dtype=dtype, device=wide.device)
    for start in range(0, flat.numel(), CHUNK):
        part = flat[start : start + CHUNK].contiguous()
        bits = dice.bits(part.numel()) >> (_BITS - drop)
        cut = bits.add_(part.view(torch.int32)).bitwise_and_(-(2**drop)).view(torch.float32)
        if fmt.name == "fp16":  # bf16's subnormals are fp32's
            small = part.abs() < fmt.min_normal
            cut[small] = _subnormal(part[small], fmt, dice.bits(part.numel())[small])
        if not bool(torch.isfinite(part.sum())):
            cut = torch.where(torch.isfinite(part), cut, part)
        out[start : start + CHUNK] = cut.to(dtype)
    return out.view(wide.shape)


def _subnormal(values: torch.Tensor, fmt: NumberFormat, bits: torch.Tensor) -> torch.Tensor:
    """Round values below the smallest normal one: their grid has the one step of the smallest subnormal."""
    step = fmt.spacing(0.0)
    share = values / step
    below = share.floor()
    return below.add_(bits * 2.0**-_BITS < share - below).mul_(step)
