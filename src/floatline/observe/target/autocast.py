"""CUDA's autocast on CPU tensors: which operators cast their inputs down, which up, and which not at all.

`torch.autocast("cpu")` has lists of its own. layer_norm, softmax and exp, which CUDA computes in fp32, stay in bf16
there; fft, pooling, padding and cross_entropy, which CUDA leaves alone, go to fp32. A trace made with the CPU's lists
therefore has tensors of the wrong size. Within `cuda_autocast()` an autocast region of the CPU follows CUDA's lists:

    LOWER       all inputs are cast to the region's format: matmul, linear, convolutions, attention, RNN cells
    FP32        all inputs are cast to fp32: exp, pow, layer_norm, losses, upsampling
    FP32_DTYPE  the input stays as it is and `dtype=float32` is set, unless the caller gave one: softmax, sum, cumsum.
                The kernel converts inside, so autograd keeps the half-precision input where it keeps any
    APPENDED    the same for `norm`, whose variants without a dtype are sent to those with one
    PROMOTE     all inputs are cast to the widest format among them: addcmul, index_put, scatter_add
    BANNED      binary_cross_entropy, which raises

What an operator does is decided when it is called, by its kernel for the `AutocastCPU` key. Operators that both lists
cast down keep the CPU's own kernel, and with it torch's cache of cast weights. The others get a kernel here, and
those that only the CPU casts get none. Which operators are on CUDA's list is asked of the dispatcher, which knows
CUDA's registrations in a build for CPU too: a torch that lacks one of the names below is no error.

The cache holds casts of fp32 leaves that require grad, down to the region's format, until the outermost region ends; a
frozen weight is cast anew at each use. The kernels here keep a cache of the same rule, cleared together with torch's.

On real tensors an operator can meet a format that a CPU has no kernel for (avg_pool3d of bf16): there torch raises.

Not covered: a weight that is used by an operator with the CPU's kernel and by one with a kernel of ours (linear and
einsum) is cast once by each, CUDA casts it once. RNN modules see recurrent.py.

Source: ATen/autocast_mode.h, installed with torch (the rule of each list); torch.amp documentation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.library import fallthrough_kernel
from torch.utils.weak import WeakIdKeyDictionary

from floatline.errors import PrecisionError
from floatline.observe.target.autocast_lists import APPENDED, BANNED, CUDA_ONLY, FP32, FP32_DTYPE, LOWER, PROMOTE
from floatline.observe.target.kernels import Kernel, exists, kernels_on, operator
from floatline.observe.target.shared_patch import Replacement, SharedPatch

_EXCLUDED = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """Have autocast regions on CPU tensors, real or fake, cast by CUDA's lists while the context is open.

    >>> x = torch.ones(2, 2, dtype=torch.bfloat16)
    >>> with cuda_autocast(), torch.autocast("cpu", dtype=torch.bfloat16):
    ...     x.exp().dtype
    torch.float32
    """
    cache = _CastCache()
    with kernels_on("AutocastCPU", _table(cache)), cache.cleared_with_torchs():
        yield


def registered(dispatch_key: str) -> frozenset[str]:
    """Return the aten operators that have a kernel of their own for a dispatch key, e.g. "AutocastCUDA"."""
    names = torch._C._dispatch_get_all_op_names()
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return frozenset(n.removeprefix("aten::") for n in names if n.startswith("aten::") and has(n, dispatch_key))


_OWN_OF_CPU: frozenset[str] | None = None


def _of_cpu() -> frozenset[str]:
    """Return what the CPU's list holds by itself; asked once, for later our own kernels are among them."""
    global _OWN_OF_CPU
    if _OWN_OF_CPU is None:
        _OWN_OF_CPU = registered("AutocastCPU")
    return _OWN_OF_CPU


def _table(cache: _CastCache) -> dict[str, Kernel]:
    """Return the kernels to put on: those for CUDA's list, and fallthroughs for what only the CPU casts."""
    cuda, cpu = registered("AutocastCUDA"), _of_cpu()
    kept = LOWER & cpu
    table: dict[str, Kernel] = dict.fromkeys(cpu - cuda, fallthrough_kernel)
    for name in cuda - kept - CUDA_ONLY:
        if exists(name):
            table[name] = _kernel(name, cache)
    return table


def _kernel(name: str, cache: _CastCache) -> Kernel:
    """Return the kernel of one operator on CUDA's list; one that no list here names runs as it is."""
    if name == BANNED:
        return _refuse
    if name in LOWER:
        return _casting(name, lambda _: torch.get_autocast_dtype("cpu"), cache)
    if name in FP32:
        return _casting(name, lambda _: torch.float32, cache)
    if name in PROMOTE:
        return _casting(name, _widest, cache)
    if name in FP32_DTYPE:
        return _setting_dtype(name)
    if name in APPENDED:
        return _appending_dtype(name)
    return fallthrough_kernel


def _casting(name: str, to: Callable[[list[torch.Tensor]], torch.dtype], cache: _CastCache) -> Kernel:
    call = operator(name)
    arguments = call._schema.arguments
    deciding = {a.name for a in arguments if str(a.type) in ("Tensor", "List[Tensor]")}
    castable = deciding | {a.name for a in arguments if str(a.type) == "Optional[Tensor]"}
    order = [argument.name for argument in arguments]

    def kernel(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(order, args)), **kwargs}
        dtype = to([t for n, v in given.items() if n in deciding for t in (v if isinstance(v, list | tuple) else [v])])
        with torch._C._ExcludeDispatchKeyGuard(_EXCLUDED):
            cast = {n: cache.cast(v, dtype) if n in castable else v for n, v in given.items()}
            return call(*(cast[n] for n in order[: len(args)]), **{n: cast[n] for n in kwargs})

    return kernel


def _setting_dtype(name: str) -> Kernel:
    call = operator(name)
    place = [argument.name for argument in call._schema.arguments].index("dtype")

    def kernel(*args: Any, **kwargs: Any) -> Any:
        given = args[place] if place < len(args) else kwargs.get("dtype")
        with torch._C._ExcludeDispatchKeyGuard(_EXCLUDED):
            if given is None and eligible(args[0]):
                args, kwargs = args[:place], {**kwargs, "dtype": torch.float32}
            return call(*args, **kwargs)

    return kernel


def _appending_dtype(name: str) -> Kernel:
    call = operator(APPENDED[name])
    order = [argument.name for argument in operator(name)._schema.arguments]
    defaults = {a.name: a.default_value for a in operator(name)._schema.arguments if a.has_default_value()}

    def kernel(*args: Any, **kwargs: Any) -> Any:
        given = {**defaults, **dict(zip(order, args)), **kwargs}
        dtype = torch.float32 if eligible(given["self"]) else given["self"].dtype
        with torch._C._ExcludeDispatchKeyGuard(_EXCLUDED):
            return call(*(given[n] for n in order), dtype=dtype)

    return kernel


def _refuse(*args: Any, **kwargs: Any) -> Any:
    raise PrecisionError(
        "binary_cross_entropy raises inside CUDA's autocast: the log of a half-precision probability is not safe",
        hint="use binary_cross_entropy_with_logits (nn.BCEWithLogitsLoss), or make the loss an fp32 island",
    )


def eligible(tensor: Any) -> bool:
    """Say whether autocast may touch an argument: a floating tensor on the device, and not fp64."""
    return (
        isinstance(tensor, torch.Tensor)
        and tensor.device.type == "cpu"
        and tensor.is_floating_point()
        and tensor.dtype != torch.float64
    )


def _widest(tensors: list[torch.Tensor]) -> torch.dtype:
    """Return fp32 when one of the tensors is fp32, else the region's format; read in order, as CUDA reads them."""
    current = lower = torch.get_autocast_dtype("cpu")
    for tensor in filter(eligible, tensors):
        if torch.float32 in (current, tensor.dtype):
            current = torch.float32
        elif tensor.dtype != lower:
            raise PrecisionError(
                f"an operator that promotes its inputs got {tensor.dtype} in autocast to {lower}: CUDA refuses that",
                hint=f"cast the input to {lower} or torch.float32 first",
            )
    return current


class _CastCache:
    """Casts of trainable fp32 weights, kept until the outermost autocast region ends, as torch keeps them."""

    def __init__(self) -> None:
        self._casts: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def cast(self, value: Any, dtype: torch.dtype) -> Any:
        """Return an argument, a tensor or a list of them, in `dtype`; what autocast may not touch stays as it is."""
        if isinstance(value, list | tuple):
            return [self.cast(item, dtype) for item in value]
        if not eligible(value) or value.dtype == dtype:
            return value
        if not self._keeps(value, dtype):
            return value.to(dtype)
        if value not in self._casts:
            with torch.enable_grad():  # a first use under no_grad must not hide the weight from a later one
                self._casts[value] = value.to(dtype)
        return self._casts[value]

    @staticmethod
    def _keeps(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
        return (
            dtype == torch.get_autocast_dtype("cpu")
            and tensor.dtype == torch.float32
            and tensor.requires_grad
            and tensor.is_leaf
            and not tensor._is_view()
            and torch.is_autocast_cache_enabled()
        )

    @contextmanager
    def cleared_with_torchs(self) -> Iterator[None]:
        """Clear the cache whenever torch clears its own, which `torch.autocast` asks for at its outermost exit."""
        _CACHES.append(self)
        try:
            with _CLEARING.held():
                yield
        finally:
            _CACHES.remove(self)
            self.clear()

    def clear(self) -> None:
        self._casts.clear()


_CACHES: list[_CastCache] = []
"""Those of the contexts that are open."""


def _clearing() -> list[Replacement]:
    torchs = torch.clear_autocast_cache

    def clear_autocast_cache() -> None:
        for cache in _CACHES:
            cache.clear()
        torchs()

    return [(torch, "clear_autocast_cache", clear_autocast_cache)]


_CLEARING = SharedPatch(_clearing)
